"""Views beside the live disk: time to the first byte after N records, and reads of both.

    python bench/views.py [--records 2000000] [--size-mib 2048] [--repeat 5] [--seconds 3]

Fills a disk through NBD with random 4 KiB writes and has everything applied. Then opens points all
over its history, each by connecting to `d@seq:N` and reading 4 KiB: points that nobody has opened
before, and the first one is the first view that the disk ever had. (The viewer's process runs by
then, as it does for every disk.) Then fio reads the live disk and the view in the middle of the
history, alternating; all of it is in the page cache as it comes.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peers import (
    BLOCK,
    DISK,
    MIB,
    Outcome,
    Protected,
    Server,
    alternate,
    fio,
    protected,
    rates,
    spread,
    summary,
)
from bench.report import Report, machine, parser, require, scratch
from cdp.nbd.client import NbdClient

FIRST_BYTE_SECONDS_MAX = 0.3
READS: dict[str, tuple[dict[str, object], float]] = {
    "random 4 KiB reads of a view": ({"rw": "randread", "bs": "4k", "iodepth": 32}, 0.3),
    "sequential 256 KiB reads of a view": ({"rw": "read", "bs": "256k", "iodepth": 8}, 0.5),
}


def first_byte(disk: Protected, seq: int, offset: int) -> float:
    """Seconds from connecting to a point until 4 KiB have come."""
    started = time.monotonic()
    with NbdClient.connect(disk.daemon.uri(f"{DISK}@seq:{seq}")) as client:
        client.read(offset, BLOCK)
    return time.monotonic() - started


def open_points(report: Report, disk: Protected, size: int, opens: int) -> None:
    """Times to the first byte."""
    rng = random.Random(1)
    newest = int(disk.status()["durable_seq"])
    times = []
    for number in range(1 + opens):
        seq = newest * (number + 1) // (opens + 2)
        times.append(first_byte(disk, seq, rng.randrange(size // BLOCK) * BLOCK))
    further = sorted(times[1:])
    report.at_most(
        f"first byte of a view, {newest:,} records", statistics.median(further),
        FIRST_BYTE_SECONDS_MAX, " s", detail=f"{further[0]:.3f} to {further[-1]:.3f}",
    )  # fmt: skip
    report.at_most(
        f"first byte of the first view, {newest:,} records", times[0], FIRST_BYTE_SECONDS_MAX, " s"
    )


def compare(
    report: Report, live: Server, view: Server, directory: Path, *, repeat: int, seconds: int,
    size: int,
) -> None:  # fmt: skip
    """Alternating reads."""
    for what, (load, least) in READS.items():

        def run(server: Server, repetition: int, load: dict[str, object] = load) -> Outcome:
            options = {**load, "size": size, "randseed": repetition + 1, "time_based": True}
            return fio(server, directory, options | {"runtime": seconds})

        report.say(f"\n{what}")
        outcomes = alternate([live, view], repeat, run)
        for name, each in outcomes.items():
            report.say(f"  {name:9}{summary(each)}")
        mine, other = (rates(outcomes[server.name]) for server in (view, live))
        report.at_least(
            f"{what} / live", statistics.median(mine) / statistics.median(other), least, " x",
            detail=spread(mine, other),
        )  # fmt: skip


def main() -> None:
    """See the module."""
    arguments = parser(__doc__)
    arguments.add_argument("--records", type=int, default=2_000_000)
    arguments.add_argument("--size-mib", type=int, default=2048)
    arguments.add_argument("--repeat", type=int, default=5)
    arguments.add_argument("--seconds", type=int, default=3)
    arguments.add_argument("--opens", type=int, default=9)
    chosen = arguments.parse_args()
    require("fio")
    size = chosen.size_mib * MIB
    with scratch(chosen.directory) as directory:
        report = Report(f"views after {chosen.records:,} records", chosen.rows)
        report.say(machine(directory))
        with protected(directory, None, size, journal_limit="64G") as disk:
            fill = {
                "rw": "randwrite", "bs": "4k", "iodepth": 32, "size": size,
                "io_size": chosen.records * BLOCK, "randseed": 1,
            }  # fmt: skip
            fio(disk, directory, fill)
            disk.settle()
            open_points(report, disk, size, chosen.opens)
            middle = int(disk.status()["durable_seq"]) // 2
            viewer = disk.process("viewer")
            view = Server("view", disk.daemon.uri(f"{DISK}@seq:{middle}"), viewer)
            live = Server("live", disk.uri, disk.pid)
            compare(
                report, live, view, directory,
                repeat=chosen.repeat, seconds=chosen.seconds, size=size,
            )  # fmt: skip


if __name__ == "__main__":
    main()
