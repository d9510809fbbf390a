"""Bursts through NBD: `cdpd` with everything on, beside qemu-nbd and nbdkit on plain raw files.

    python bench/burst.py [--works write-32,...] [--repeat 7] [--size-mib 1024] [--scale 1.0]

A burst is a fixed number of requests, such that the default tail takes them without slowing anyone
down: 240 MiB. Apply and index are at work meanwhile, on a disk that was full before, so at first
each block's old content is saved. Between two bursts all of it comes to rest.

The runs alternate, see `peers.alternate`; printed are medians, the range of what was measured, and
ratios of medians with the range of ratios of neighbouring runs. Reads are of applied data.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peers import (
    MIB,
    OURS,
    PEERS,
    QEMU,
    Outcome,
    Protected,
    Server,
    alternate,
    fio,
    make_file,
    peer,
    protected,
    rates,
    spread,
    summary,
    warm,
)
from bench.report import Report, machine, parser, require, scratch

FASTER = "the faster"


@dataclass(frozen=True, slots=True)
class Work:
    """What fio does; ``requests`` of a burst, 0: for some seconds; ``targets``: ratios to reach."""

    title: str
    options: dict[str, object]
    requests: int
    targets: dict[str, float]


# What the issue asks for. The last work is for those who want to know.
WORKS = {
    "write-32": Work(
        "4 KiB random write, depth 32",
        {"rw": "randwrite", "bs": "4k", "iodepth": 32},
        61_440,
        {QEMU: 2.5, "nbdkit": 1.0},
    ),
    "write-1": Work(
        "4 KiB random write, depth 1",
        {"rw": "randwrite", "bs": "4k", "iodepth": 1},
        20_480,
        {FASTER: 1.0},
    ),
    "fsync-16": Work(
        "4 KiB random write, depth 16, fsync every 16",
        {"rw": "randwrite", "bs": "4k", "iodepth": 16, "fsync": 16},
        15_360,
        {FASTER: 1.0},
    ),
    "read-32": Work(
        "4 KiB random read of applied data, depth 32",
        {"rw": "randread", "bs": "4k", "iodepth": 32},
        0,
        {FASTER: 1.5},
    ),
    "write-256k": Work(
        "256 KiB sequential write, depth 8",
        {"rw": "write", "bs": "256k", "iodepth": 8},
        960,
        {FASTER: 0.7},
    ),
    "mixed-32": Work(
        "4 KiB random, 70 % reads, depth 32",
        {"rw": "randrw", "rwmixread": 70, "bs": "4k", "iodepth": 32},
        61_440,
        {},
    ),
}
DEFAULT = "write-32,write-1,fsync-16,read-32,write-256k"


def options_of(
    work: Work, size: int, *, scale: float, seconds: float, repetition: int
) -> dict[str, object]:
    """fio's options for one run."""
    chosen = {**work.options, "size": size, "randseed": repetition + 1}
    if not work.requests:
        return chosen | {"time_based": True, "runtime": f"{seconds * 1000:.0f}ms"}
    block = int(str(work.options["bs"]).rstrip("k")) << 10
    requests = max(64, int(work.requests * scale))
    offset = 0
    if work.options["rw"] == "write":  # each burst goes on where the last one ended
        offset = repetition * requests * block % max(block, size - requests * block)
        offset -= offset % block
    return chosen | {"offset": offset, "size": size - offset, "io_size": requests * block}


def report_of(report: Report, work: Work, outcomes: dict[str, list[Outcome]]) -> None:
    """The lines of one work."""
    report.say(f"\n{work.title}")
    for name, each in outcomes.items():
        report.say(f"  {name:9}{summary(each)}")
    median = {name: statistics.median(rates(each)) for name, each in outcomes.items()}
    peers = [name for name in outcomes if name != OURS]
    faster = max(peers, key=lambda name: median[name])
    targets = {faster if name == FASTER else name: least for name, least in work.targets.items()}
    for name in peers:
        ratio = median[OURS] / median[name]
        pairs = spread(rates(outcomes[OURS]), rates(outcomes[name]))
        if name in targets:
            report.at_least(f"{work.title} / {name}", ratio, targets[name], " x", detail=pairs)
        else:
            report.say(f"      {work.title} / {name}: {ratio:.2f} x; {pairs}")


def prepare(work: Work, ours: Protected, size: int, directory: Path, scale: float) -> None:
    """Reads are of a disk with history: much of it has been written and applied."""
    if not work.requests:
        fill = options_of(WORKS["write-32"], size, scale=scale, seconds=0, repetition=0)
        fio(ours, directory, fill)


def main() -> None:
    """See the module."""
    arguments = parser(__doc__)
    arguments.add_argument("--works", default=DEFAULT, help=f"of {','.join(WORKS)}")
    arguments.add_argument("--repeat", type=int, default=7)
    arguments.add_argument("--seconds", type=float, default=2.0, help="of a run of reads")
    arguments.add_argument("--scale", type=float, default=1.0, help="of the length of bursts")
    arguments.add_argument("--size-mib", type=int, default=1024)
    chosen = arguments.parse_args()
    names = chosen.works.split(",")
    if unknown := set(names) - set(WORKS):
        raise SystemExit(f"bench: no such work: {', '.join(sorted(unknown))}")
    require("fio", *PEERS)
    size = chosen.size_mib * MIB
    with scratch(chosen.directory) as directory, ExitStack() as stack:
        report = Report("bursts through NBD", chosen.rows)
        report.say(machine(directory))
        peers = [stack.enter_context(peer(name, directory, size)) for name in PEERS]
        for number, name in enumerate(names):
            work, place = WORKS[name], directory / str(number)
            place.mkdir()
            backing = make_file(place / "backing.raw", size)
            with protected(place, backing, size) as ours:
                prepare(work, ours, size, place, chosen.scale)
                for path in (backing, *directory.glob("*.raw")):
                    warm(path)

                def run(server: Server, repetition: int, work: Work = work) -> Outcome:
                    options = options_of(
                        work, size, scale=chosen.scale, seconds=chosen.seconds,
                        repetition=repetition,
                    )  # fmt: skip
                    return fio(server, directory, options)

                report_of(report, work, alternate([*peers, ours], chosen.repeat, run))
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
