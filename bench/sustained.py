"""Sustained 4 KiB random writes with everything on, past the tail bound and past the journal limit.

    python bench/sustained.py [--seconds 300] [--journal-limit 4G] [--tail 1G] [--size-mib 4096]
                              [--chunk 60] [--series FILE]

The disk was full before, the load never pauses, so apply, index, reclaim and giving up history all
have to keep up. It is measured in chunks; between them the disk's processes are stopped (SIGSTOP)
just as they are, with their backlog, and qemu-nbd gets the same load for a while. What comes out:

- sustained: the median of all seconds after the journal limit was reached, over qemu-nbd's median,
  and over the disk's own burst (a drained disk, 240 MiB, median of three, before all else);
- smooth: the slowest second of those over their median;
- bounded: anonymous memory of recorder and curator late and early, and the journal over its limit.

Per second counts what the client has had answered (fio's log), a second without an answer as 0.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peers import (
    MIB,
    QEMU,
    Protected,
    Server,
    fio,
    make_file,
    peer,
    protected,
    rates,
    summary,
)
from bench.report import Report, machine, parser, require, scratch
from bench.watch import ROLES, Watch
from cdp.units import parse_size

LOAD = {"rw": "randwrite", "bs": "4k", "iodepth": 32}
BURST_BYTES = 240 * MIB
BURSTS = 3
# Memory late in the run over memory early in it, and what it may differ by anyway.
GROWTH_MAX = 1.2
GROWTH_BYTES = 16 * MIB
LIMIT_OVERRUN_MAX = 1.05


def seconds_of(server: Server, directory: Path, size: int, seconds: int, seed: int) -> list[float]:
    """Requests answered in each second of a run."""
    log = directory / "rate"
    fio(
        server, directory,
        {
            **LOAD, "size": size, "randseed": seed, "time_based": True, "runtime": seconds,
            "write_iops_log": log, "log_avg_msec": 1000,
        },
    )  # fmt: skip
    counted = [0.0] * seconds
    for line in log.with_name("rate_iops.1.log").read_text().splitlines():
        at, value = line.split(",")[:2]
        number = round(int(at) / 1000) - 1
        if 0 <= number < seconds:
            counted[number] += float(value)
    # fio does not always log the last window.
    return counted if counted[-1] else counted[:-1]


def burst(ours: Protected, directory: Path, size: int, report: Report) -> float:
    """The disk's own burst: the median of a few."""
    outcomes = []
    for number in range(BURSTS):
        ours.settle()
        os.sync()
        io_size = min(BURST_BYTES, size)
        options = {**LOAD, "size": size, "io_size": io_size, "randseed": 1000 + number}
        outcomes.append(fio(ours, directory, options))
    report.say(f"own burst       {summary(outcomes)}")
    return statistics.median(rates(outcomes))


class Run:
    """The alternation. ``ours`` and ``theirs``: requests answered, second by second."""

    def __init__(self, directory: Path, size: int) -> None:
        self.directory, self.size = directory, size
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.limit_second: int | None = None
        self.tail_second: int | None = None

    def measure(
        self, disk: Protected, other: Server, watch: Watch, *, seconds: int, chunk: int, tail: int
    ) -> None:
        """All chunks; a fifth of the time, in between, is the other's."""
        number = 0
        while len(self.ours) < seconds:
            number += 1
            with watch.paused, disk.stopped(*ROLES):
                os.sync()
                part = max(4, chunk // 5)
                self.theirs += seconds_of(other, self.directory, self.size, part, number)
                os.sync()
            before = len(self.ours)
            part = max(4, min(chunk, seconds - before))
            seen = len(watch.samples)
            self.ours += seconds_of(disk, self.directory, self.size, part, 100 + number)
            watch.check()
            for at, sample in enumerate(watch.samples[seen:]):
                second = before + at
                if self.limit_second is None and sample.window_start > 1:
                    self.limit_second = second
                # Nobody is slowed down below half of the bound; work is twice the bytes.
                if self.tail_second is None and 4 * sample.lag_bytes > tail:
                    self.tail_second = second


def judge(report: Report, run: Run, own_burst: float, watch: Watch) -> None:
    """All rows."""
    steady = run.ours[run.limit_second or 0 :]
    median, theirs = statistics.median(steady), statistics.median(run.theirs)
    report.say(
        f"cdpd            {median:>9,.0f}/s median of {len(steady)} seconds "
        f"({min(steady):,.0f} to {max(steady):,.0f})\n"
        f"qemu-nbd        {theirs:>9,.0f}/s median of {len(run.theirs)} seconds "
        f"({min(run.theirs):,.0f} to {max(run.theirs):,.0f})\n"
        f"tail bound felt from second {run.tail_second}, journal limit from {run.limit_second}"
    )
    if run.limit_second is None:
        report.void("sustained", "the journal limit was not reached: more --seconds or a lower one")
    if run.tail_second is None:
        report.say("the tail bound was not felt: apply kept up with the client")
    report.at_least("sustained / qemu-nbd", median / theirs, 2.5, " x")
    report.at_least("sustained / own burst", median / own_burst, 0.6, " x")
    low = sum(second < median / 2 for second in steady)
    report.at_least(
        "slowest second / median", min(steady) / max(median, 1.0), 0.5, " x",
        detail=f"{low} of {len(steady)} seconds below half",
    )  # fmt: skip
    fullest = max(watch.samples, key=lambda sample: max(sample.journal_bytes, sample.allocated))
    used, limit = max(fullest.journal_bytes, fullest.allocated), fullest.journal_limit
    report.at_most(
        "journal / its limit", used / limit, LIMIT_OVERRUN_MAX, " x",
        detail=f"{used / MIB:,.0f} of {limit / MIB:,.0f} MiB; "
        f"redo {fullest.redo_bytes / MIB:,.0f}, undo {fullest.undo_bytes / MIB:,.0f}",
    )  # fmt: skip
    for role in ROLES:
        memory(report, role, [sample.memory[role] for sample in watch.samples], watch)


def memory(report: Report, role: str, values: Sequence[int], watch: Watch) -> None:
    """Whether a process goes on growing: the last third against the second one."""
    third = len(values) // 3
    if third < 3:
        report.void(f"memory of the {role}", "too few samples")
        return
    early, late = max(values[third : 2 * third]), max(values[2 * third :])
    report.at_most(
        f"memory of the {role}, last third / second",
        max(0, late - GROWTH_BYTES) / early, GROWTH_MAX, " x",
        detail=f"{early / MIB:.0f}, then {late / MIB:.0f} MiB anonymous; "
        f"peak with mapped files {watch.peak(role) / MIB:.0f}",
    )  # fmt: skip


def main() -> None:
    """See the module."""
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=int, default=300)
    arguments.add_argument("--chunk", type=int, default=60, help="seconds between two of qemu-nbd")
    arguments.add_argument("--journal-limit", default="4G")
    arguments.add_argument("--tail", default="1G")
    arguments.add_argument("--size-mib", type=int, default=4096)
    arguments.add_argument("--series", type=Path, help="a file that receives every second as JSON")
    chosen = arguments.parse_args()
    require("fio", QEMU)
    size = chosen.size_mib * MIB
    with scratch(chosen.directory) as directory:
        report = Report("sustained random writes", chosen.rows)
        report.say(machine(directory))
        backing = make_file(directory / "backing.raw", size)
        with (
            peer(QEMU, directory, size) as other,
            protected(directory, backing, size, journal_limit=chosen.journal_limit) as disk,
        ):
            disk.set(tail=chosen.tail)
            own_burst = burst(disk, directory, size, report)
            disk.settle()
            run = Run(directory, size)
            with Watch(disk) as watch:
                run.measure(
                    disk, other, watch,
                    seconds=chosen.seconds, chunk=chosen.chunk, tail=parse_size(chosen.tail),
                )  # fmt: skip
            if chosen.series:
                samples = [asdict(sample) for sample in watch.samples]
                series = {"ours": run.ours, "theirs": run.theirs, "samples": samples}
                chosen.series.write_text(json.dumps(series))
            judge(report, run, own_burst, watch)


if __name__ == "__main__":
    main()
