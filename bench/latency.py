"""Latency of 4 KiB writes at a fixed rate, while the curator works and while it stands still.

    python bench/latency.py [--rate 20000] [--seconds 10] [--repeat 5] [--size-mib 4096] [--drained]

Alternating: with the curator stopped (SIGSTOP), and with it working off the backlog that this has
left, so it is busy all the time (how busy is printed); ``--drained`` has it begin without a backlog
and keep up. Compared are medians of each run's 99th percentile, as the client sees it.
"""

from __future__ import annotations

import os
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peers import MIB, Outcome, Protected, cpu_seconds, fio, make_file, protected, summary
from bench.report import Report, machine, parser, require, scratch

# A run that did not reach its rate queues in the client: its latencies are the client's own.
RATE_MIN = 0.95
# Far above all backlogs, so that nobody is slowed down for them.
TAIL = "64G"


class Half:
    """One side of the comparison."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outcomes: list[Outcome] = []
        self.busy: list[float] = []

    def p99(self) -> float:
        """The median of the runs'."""
        return statistics.median(outcome.p99 for outcome in self.outcomes)

    def line(self, rate: int) -> str:
        """Everything about it."""
        p999 = statistics.median(outcome.p999 for outcome in self.outcomes)
        late = sum(outcome.rate < RATE_MIN * rate for outcome in self.outcomes)
        return (
            f"{self.name:16}{summary(self.outcomes)}, p99.9 {p999:,.0f} us; curator busy "
            f"{statistics.median(self.busy):.0%}; {late} of {len(self.outcomes)} below the rate"
        )


def run(half: Half, disk: Protected, directory: Path, options: dict[str, object]) -> None:
    """One run, and how much the curator worked in it."""
    pid = disk.process("curator")
    before = cpu_seconds(pid)
    outcome = fio(disk, directory, options)
    half.outcomes.append(outcome)
    half.busy.append((cpu_seconds(pid) - before) / outcome.seconds)


def main() -> None:
    """See the module."""
    arguments = parser(__doc__)
    arguments.add_argument("--rate", type=int, default=20_000)
    arguments.add_argument("--seconds", type=int, default=10)
    arguments.add_argument("--repeat", type=int, default=5)
    arguments.add_argument("--size-mib", type=int, default=4096)
    arguments.add_argument("--drained", action="store_true")
    chosen = arguments.parse_args()
    require("fio")
    size = chosen.size_mib * MIB
    without, working = Half("without curator"), Half("curator works")
    with scratch(chosen.directory) as directory:
        report = Report(f"latency at {chosen.rate:,} writes/s", chosen.rows)
        report.say(machine(directory))
        backing = make_file(directory / "backing.raw", size)
        with protected(directory, backing, size, journal_limit="32G") as disk:
            disk.set(tail=TAIL)
            for number in range(2 * chosen.repeat):
                half = (without, working)[number % 2]
                if half is without or chosen.drained:
                    disk.settle()
                os.sync()
                options = {
                    "rw": "randwrite", "bs": "4k", "iodepth": 32, "rate_iops": chosen.rate,
                    "size": size, "randseed": number // 2 + 1, "time_based": True,
                    "runtime": chosen.seconds,
                }  # fmt: skip
                with ExitStack() as stack:
                    if half is without:
                        stack.enter_context(disk.stopped("curator"))
                    run(half, disk, directory, options)
        for half in (without, working):
            report.say(half.line(chosen.rate))
        what = f"p99 at {chosen.rate:,}/s, curator working / without"
        reached = min(outcome.rate for half in (without, working) for outcome in half.outcomes)
        if reached < RATE_MIN * chosen.rate:
            report.void(what, f"the rate was not reached: {reached:,.0f}/s; try a quieter machine")
        else:
            report.at_most(what, working.p99() / without.p99(), 2.0, " x")


if __name__ == "__main__":
    main()
