"""A crash at every operation of the storage, in the recovery that follows, and at random.

`tour` does all that a disk's processes do; it is interrupted at each of its operations, in each way
that there is: the power goes, and takes any part of what is not synced, or all of one side's; the
recorder, the curator or both die, and the page cache stays. The recovery that follows, up to where
apply has caught up, is interrupted in its turn. `curator_runs` says what must hold afterwards.

By default a part of it is done, chosen by the seed; by `make test-crash` (`CDP_CRASH_FULL=1`) all:

* `CDP_CRASH_RUNS`: how many random runs, 100000 by default;
* `CDP_CRASH_SECONDS`: after so many the pairs, and the random runs, end where they are;
* `CDP_CRASH_COURSE="tour/1 17/power/0"` does again what a failure has printed.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from journal.format import Kind
from tests.crash.curator_forks import Branch, Choose, Course, Forks, Tally
from tests.crash.curator_runs import FAILURES, Plan, Run, at_random, every, nothing, replay

FULL = os.environ.get("CDP_CRASH_FULL") == "1"
RUNS = int(os.environ.get("CDP_CRASH_RUNS") or (100_000 if FULL else 100))
SECONDS = float(os.environ.get("CDP_CRASH_SECONDS") or 3600)
COURSE = os.environ.get("CDP_CRASH_COURSE")
ORDERS = ("power", "both")  # the power goes, or all processes die: the pairs are in every order
PASSES = 16  # over the history: so an end before the end has seen something of everywhere
SHOWN = 5

pytestmark = [
    pytest.mark.crash,
    pytest.mark.expect_log("were acknowledged|history before seq", required=False),
    pytest.mark.timeout(max(7200, 2 * SECONDS) if FULL else 400),
]


class Long:
    """A long run: its children, its end, and what it says meanwhile."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.forks = Forks(root, len(os.sched_getaffinity(0)))
        self.roots = (root / f"history-{number}" for number in itertools.count())
        self.until = time.monotonic() + SECONDS
        self.said = time.monotonic()
        self.capsys = capsys

    @property
    def over(self) -> bool:
        """Whether it has taken long enough."""
        return time.monotonic() > self.until

    def limited(self, plan: Plan) -> Plan:
        """A plan that ends with the time."""

        def limited(course: Course) -> Choose:
            choose = plan(course)
            return choose if choose is nothing else lambda at: () if self.over else choose(at)

        return limited

    def history(self, run: Run, course: Course) -> Tally:
        """Live through one, with all that is planned; what was done so far."""
        root = next(self.roots)
        root.mkdir()
        try:
            run.begin(root, course)
        finally:
            tally = self.forks.join()
        return tally

    def say(self, what: str, *, every: float = 0.0) -> None:
        """A line for somebody who waits, if the last one was so many seconds ago."""
        if FULL and time.monotonic() - self.said >= every:
            self.said = time.monotonic()
            with self.capsys.disabled():
                print(f"\n{what}", end="", flush=True)

    def end(self, what: str) -> None:
        """Say what was done, and fail if anything was wrong."""
        tally = self.forks.join()
        self.say(f"{what}; {len(tally.failures)} violations")
        lines = []
        for course, why in tally.failures[:SHOWN]:
            lines.append(
                f"CDP_CRASH_COURSE='{course}' .venv/bin/python -m pytest -q -k replay "
                f"tests/crash/test_every_point.py\n{why}"
            )
        if lines:
            pytest.fail(f"{len(tally.failures)} violations\n" + "\n".join(lines), pytrace=False)


@pytest.fixture
def long(roots: Iterator[Path], capsys: pytest.CaptureFixture[str]) -> Long:
    return Long(next(roots), capsys)


@pytest.mark.parametrize("number", range(3))
def test_the_tour_does_all_there_is(roots: Iterator[Path], seed: int, number: int) -> None:
    """Every operation of the storage, on every kind of file, is among those interrupted."""
    course = Course("tour", seed + number)
    world = Run(lambda _course: nothing, None).begin(next(roots), course)
    for wanted in (
        "create redo/spare", "rename redo/spare", "write redo/", "sync redo/", "allocate redo/",
        "sync_dir redo", "unlink redo/", "create undo/", "write undo/", "sync undo/",
        "sync_dir undo", "unlink undo/", "write backing", "sync backing", "write catalog.0",
        "sync catalog.0", "write catalog.1", "sync catalog.1",
    ):  # fmt: skip
        assert any(line.startswith(wanted) for line in world.sim.log), wanted
    assert {record.kind for record in world.records.values()} >= {
        Kind.WRITE, Kind.ZERO, Kind.TRIM, Kind.REF, Kind.BOOKMARK, Kind.ROLLBACK_BEGIN,
        Kind.ROLLBACK_COMMIT, Kind.ROLLBACK_ABORT,
    }  # fmt: skip


def test_every_point(long: Long, seed: int) -> None:
    """Each operation in every way; by default half of them, in one."""

    def half(course: Course) -> Choose:
        rng = random.Random(f"{seed} {course}")

        def choose(at: int) -> list[Branch]:
            what = rng.choice(tuple(FAILURES))
            return [Branch(at, what)] if rng.random() < 0.5 else []

        return nothing if course.branches else choose

    plan = every(FAILURES, depth=1, keep=lambda *_: True) if FULL else half
    run = Run(plan, long.forks, again=FULL or 0.1, emptied=0.1 if FULL else 0.02)
    tally = long.history(run, Course("tour", seed))
    points = tally.counts["failures 1"]
    assert points > 150 or tally.failures
    long.end(f"crash points: {points}")


def test_every_pair(long: Long, seed: int) -> None:
    """Power loss and the death of all processes, one after the other, in every order."""

    def some(course: Course, at: int) -> bool:
        if FULL:
            return bool(course.branches) or at % PASSES == number
        share = 0.08 if course.branches else 0.02
        return random.Random(f"{seed} {course} {at}").random() < share

    run = Run(long.limited(every(ORDERS, depth=2, keep=some)), long.forks, quick=True)
    for number in range(PASSES if FULL else 1):
        tally = long.history(run, Course("tour", seed))
        long.say(f"pairs: {tally.counts['failures 2']} after pass {number + 1} of {PASSES}")
        if long.over:
            break
    pairs = tally.counts["failures 2"]
    assert pairs or tally.failures
    end = f" (cut off after {SECONDS:.0f} s)" if long.over else ""
    long.end(f"pairs of crashes: {pairs}{end}")


def test_random_runs(long: Long, seed: int) -> None:
    """Histories that nobody thought of, and failures in a row, also in the middle of recoveries."""
    rng = random.Random(seed)
    done = 0
    plan = long.limited(at_random(2.0 if FULL else 0.5))
    run = Run(plan, long.forks, forking=1, quick=True)
    while True:
        name = rng.choice(("short", "short", "story", "pieces"))
        tally = long.history(run, Course(name, rng.randrange(1 << 32)))
        done = sum(tally.counts.values())
        if done >= RUNS or long.over:
            break
        long.say(f"random runs: {done}, {len(tally.failures)} violations", every=60)
    long.end(f"random runs: {done} ({dict(sorted(tally.counts.items()))})")


if COURSE:

    def test_replay(roots: Iterator[Path]) -> None:
        """What `CDP_CRASH_COURSE` tells."""
        assert COURSE
        replay(next(roots), COURSE)
