"""A world that crashes at every operation, without being made anew for each.

While the work goes on, the process forks at the operations that are chosen: the child crashes
there, recovers and is judged, the parent goes on as if nothing had been. So a crash costs its
recovery and nothing of the history before it, and a crash in a recovery costs no more than that.
What lies in real files - the frontier, the index - is copied first (`World.move`).

A *course* tells how a world came to be: its history's name and seed, and for each failure so far
the operation (counted from the failure before, or from the beginning), what failed, and the number
of an outcome, all of which `follow` does again in one process.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import re
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

from tests.crash.curator_model import World
from tests.crash.sim_storage import Crash

CHILD_SECONDS_MAX = 3600  # one that forks has hundreds of its own
EXPECTED = re.compile("were acknowledged|history before seq")  # what a child may warn of


class Branch(NamedTuple):
    """One failure of a course."""

    at: int
    failure: str
    outcome: int = 0

    def __str__(self) -> str:
        return f"{self.at}/{self.failure}/{self.outcome}"


class Course(NamedTuple):
    """See the module."""

    history: str
    seed: int
    branches: tuple[Branch, ...] = ()

    def __str__(self) -> str:
        return " ".join([f"{self.history}/{self.seed}", *map(str, self.branches)])

    @classmethod
    def parse(cls, text: str) -> Course:
        """What `str` has made of one."""
        (history, seed), *branches = (word.split("/") for word in text.split())
        return cls(history, int(seed), tuple(Branch(int(a), f, int(o)) for a, f, o in branches))

    def then(self, branch: Branch) -> Course:
        """One failure more."""
        return self._replace(branches=(*self.branches, branch))


@dataclass
class Tally:
    """What was done. ``failures``: course and traceback of what went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """What another process has done."""
        self.counts += other.counts
        self.failures += other.failures


class _Complaints(logging.Handler):
    """Keeps what a child logs that it should not."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.levelname} {record.name}: {record.getMessage()}"
        if not EXPECTED.search(line):
            self.lines.append(line)


class Forks:
    """Children of this process, at most ``jobs`` at a time; a child has one at a time.

    ``root``: an empty directory for their files.
    """

    def __init__(self, root: Path, jobs: int) -> None:
        self.root, self.jobs = root, jobs
        self._number = 0
        self.tally = Tally()
        self._running: list[tuple[int, int, Course]] = []
        self._report = -1
        self._complaints = _Complaints()

    def fork(self, world: World, course: Course) -> bool:
        """True in a new child, False here. ``world`` is that of the child from now on."""
        while len(self._running) >= self.jobs:
            self._reap()
        self._number += 1
        root = self.root / str(self._number)
        world.copy(root)  # before the fork: what it is a copy of goes on
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            # A thread that is left from another test has no lock that is wanted here.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child:
            os.close(writing)
            self._running.append((child, reading, course))
            return False
        gc.disable()  # it is gone soon; and what the parent has is not to be touched
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(CHILD_SECONDS_MAX)
        os.close(reading)
        for _, other, _ in self._running:
            os.close(other)
        if self._report >= 0:
            os.close(self._report)
        self._running, self._report, self.jobs = [], writing, 1
        self.tally = Tally()
        self.root = root
        world.move(root)
        logging.getLogger().handlers = [self._complaints]
        self._complaints.lines.clear()
        return True

    def _reap(self) -> None:
        child, reading, course = self._running.pop(0)
        with open(reading, "rb") as pipe:
            report = pipe.read()
        _, status = os.waitpid(child, 0)
        if status or not report:
            self.tally.failures.append((str(course), f"its process ended with status {status}"))
            return
        self.tally.add(pickle.loads(report))

    def join(self) -> Tally:
        """Wait for all of them."""
        while self._running:
            self._reap()
        return self.tally

    def end(self, course: Course) -> NoReturn:
        """A child tells what it has done, and is gone."""
        tally = self.join()
        if self._complaints.lines:
            tally.failures.append((str(course), "\n".join(self._complaints.lines)))
        shutil.rmtree(self.root, ignore_errors=True)
        with open(self._report, "wb") as pipe:
            pickle.dump(tally, pipe)
        os._exit(0)


Choose = Callable[[int], Iterable[Branch]]


@dataclass
class Explorer:
    """Crashes during some work of a world.

    ``choose``: the failures that are to happen at an operation, by its number. ``then``: what comes
    after one, in a child. Without ``forks`` only the first that is chosen happens, here.
    """

    world: World
    course: Course
    choose: Choose
    then: Callable[[World, Course], None]
    forks: Forks | None
    _base: int = 0
    _taken: Course | None = None

    def run(self, work: Callable[[], None], *, after_failure: bool = False) -> bool:
        """Do the work; False: it was ended by a failure (and ``then`` is done).

        ``after_failure``: count operations from the next failure on.
        """
        world = self.world
        if after_failure:
            world.on_failure = self._begin
        else:
            self._begin()
        try:
            work()
            if self._taken is not None:
                raise AssertionError("the crash was handled")
        except BaseException as error:
            if self._taken is None:
                raise
            self._end(error)
            return False
        finally:
            world.on_operation = world.on_failure = lambda: None
        return True

    def _begin(self) -> None:
        self._base = self.world.sim.operations
        self.world.on_operation = self._before

    def _before(self) -> None:
        world = self.world
        for branch in self.choose(world.sim.operations - self._base):
            course = self.course.then(branch)
            if self.forks is None or self.forks.fork(world, course):
                self._taken = course
                world.course = str(self._taken)
                world.on_operation = world.on_failure = lambda: None
                world.sim.random.seed(str(self._taken))
                world.sim.crash_at = world.sim.operations
                world.failures.append(f"{branch}: {world.sim.log[-1]}")
                return

    def _end(self, error: BaseException) -> None:
        course = self._taken
        assert course is not None
        if self.forks is None:
            if not isinstance(error, Crash):
                raise error
            self.then(self.world, course)
            return
        try:
            if not isinstance(error, Crash):
                raise error
            self.then(self.world, course)
        except BaseException as wrong:
            what = "".join(traceback.format_exception(wrong, chain=False))
            self.forks.tally.failures.append((self.world.course, what))
        self.forks.end(course)
