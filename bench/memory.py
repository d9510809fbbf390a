"""Memory of the recorder with a disk of 1 TiB that is written and trimmed all over.

    python bench/memory.py [--writes 500000] [--trims 50000] [--size-gib 1024]

The disk is a sparse file. Writes of 4 KiB go anywhere on it, then trims of 64 KiB do: of those the
recorder keeps a bitmap for good. What the tail takes is bounded by its setting and comes on top: it
is what memory falls by when everything has been applied.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peers import MIB, Protected, fio, protected
from bench.report import Report, machine, parser, require, scratch
from bench.watch import Watch, memory_of

LIMIT_MIB = 100
# The recorder gives up what is applied when it looks, which is once in a while.
REST_SECONDS = 3.0


def megabytes(disk: Protected, name: str, role: str = "recorder") -> float:
    """MiB of a kind of memory of a process."""
    return memory_of(disk.process(role))[name] / MIB


def main() -> None:
    """See the module."""
    arguments = parser(__doc__)
    arguments.add_argument("--writes", type=int, default=500_000)
    arguments.add_argument("--trims", type=int, default=50_000)
    arguments.add_argument("--size-gib", type=int, default=1024)
    chosen = arguments.parse_args()
    require("fio")
    size = chosen.size_gib << 30
    loads = {
        "4 KiB writes": {"rw": "randwrite", "bs": "4k", "io_size": chosen.writes * 4096},
        "64 KiB trims": {"rw": "randtrim", "bs": "64k", "io_size": chosen.trims * 65536},
    }
    with scratch(chosen.directory) as directory:
        report = Report(f"memory with a disk of {chosen.size_gib} GiB", chosen.rows)
        report.say(machine(directory))
        with protected(directory, None, size) as disk, Watch(disk) as watch:
            start = megabytes(disk, "VmRSS")
            report.say(f"recorder at the start: {start:.0f} MiB resident")
            for what, load in loads.items():
                fio(disk, directory, {**load, "iodepth": 32, "size": size, "randseed": 1})
                loaded = megabytes(disk, "VmRSS")
                disk.drain()
                time.sleep(REST_SECONDS)
                report.say(
                    f"after {what}: {loaded:.0f} MiB, applied: {megabytes(disk, 'VmRSS'):.0f} MiB; "
                    f"curator {megabytes(disk, 'VmRSS', 'curator'):.0f} MiB "
                    f"({megabytes(disk, 'RssAnon', 'curator'):.0f} anonymous)"
                )
            watch.check()
            backlog = watch.highest(lambda sample: sample.lag_records)
            report.at_most(
                "recorder, resident, everything applied", megabytes(disk, "VmRSS"), LIMIT_MIB,
                " MiB",
            )  # fmt: skip
            report.at_most(
                "recorder, resident, at its peak, tail included",
                watch.peak("recorder") / MIB, LIMIT_MIB, " MiB",
                detail=f"backlog up to {backlog:,.0f} records",
            )  # fmt: skip


if __name__ == "__main__":
    main()
