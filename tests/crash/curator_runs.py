"""Crashes at every operation of a history, in the recovery that follows, and at random.

What is to happen is a `Plan`; what did happen is judged in the same way for all of them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.crash.curator_checks import (
    EYES,
    check,
    check_again,
    check_backing,
    check_emptied,
    check_index,
)
from tests.crash.curator_forks import Branch, Choose, Course, Explorer, Forks
from tests.crash.curator_model import World
from tests.crash.curator_story import (
    ALL,
    fail,
    in_pieces,
    make,
    perform,
    small_buffers,
    story,
    tour,
)
from tests.crash.sim_storage import Crash

FAILURES = {failure.__name__: failure for failure in ALL}
HISTORIES: dict[str, Callable[[World, str], None]] = {
    "tour": tour,
    "story": lambda world, seed: story(world, seed, 45),
    "short": lambda world, seed: story(world, seed, 10 + zlib.crc32(seed.encode()) % 20),
    "pieces": lambda world, seed: story(world, seed, 30),  # see `in_pieces`
}
RECOVERY_OPERATIONS = 60  # about as many as a recovery has, with what is done behind it

# What is done right behind a recovery, before all is applied.
BEHIND = (
    (),
    ("reclaim", "release", "sweep"),
    ("apply", "reclaim", "release", "finish"),
    ("write", "trim", "sync", "apply", "release", "reclaim"),
)

Plan = Callable[[Course], Choose]


def nothing(_at: int) -> Iterable[Branch]:
    """No failure."""
    return ()


def every(failures: Iterable[str], *, depth: int, keep: Callable[[Course, int], bool]) -> Plan:
    """All of these failures at each operation, and in each recovery down to a depth.

    ``keep``: whether those at an operation are wanted.
    """
    kinds = tuple(failures)

    def plan(course: Course) -> Choose:
        if len(course.branches) >= depth:
            return nothing
        return lambda at: [Branch(at, each) for each in kinds] if keep(course, at) else ()

    return plan


def at_random(share: float) -> Plan:
    """A random failure at a share of the operations, with some more in what follows."""

    def plan(course: Course) -> Choose:
        rng = random.Random(f"{course} next")
        depth = len(course.branches)
        if depth == 0:
            return lambda at: [
                Branch(at, rng.choice(tuple(FAILURES)), number)
                for number in range(int(share) + (rng.random() < share % 1))
            ]
        if depth > 4 or rng.random() < 0.4:
            return nothing
        where = rng.randrange(1, RECOVERY_OPERATIONS)
        what = rng.choice(tuple(FAILURES))
        return lambda at: [Branch(at, what)] if at == where else ()

    return plan


def follow(wanted: Course) -> Plan:
    """Exactly these failures."""

    def plan(course: Course) -> Choose:
        depth = len(course.branches)
        if depth == len(wanted.branches):
            return nothing
        branch = wanted.branches[depth]
        return lambda at: [branch] if at == branch.at else ()

    return plan


@dataclass
class Run:
    """One history, with all that is planned for it.

    ``quick``: not all points are looked at each time.
    How often, behind the last recovery, the history goes on, to a last loss of power (``more``);
    there is another recovery (``again``); the index is made anew, and the logs emptied.
    """

    plan: Plan
    forks: Forks | None
    forking: int = 2  # down to which depth the parent of a failure goes on without it
    quick: bool = False
    more: float = 0.05
    again: float = 0.2
    emptied: float = 0.02
    judged: int = 0

    def begin(self, root: Path, course: Course) -> World:
        """The world of a history, which is lived through."""
        pieces = course.history == "pieces"
        with in_pieces() if pieces else small_buffers(64):
            world = make(root, course.seed, blocks=9 if pieces else 6)
            explorer = Explorer(world, course, self.plan(course), self.recover, self.forks)
            if explorer.run(lambda: HISTORIES[course.history](world, str(course.seed))):
                check(world)
                world.close()
        return world

    def recover(self, world: World, course: Course) -> None:
        """What comes after a failure."""
        rng = random.Random(str(course))
        failure = FAILURES[course.branches[-1].failure]
        forks = self.forks if self.forking > len(course.branches) else None
        explorer = Explorer(world, course, self.plan(course), self.recover, forks)

        def recovery() -> None:
            fail(world, failure, rng)
            self._check(world, course, "first")
            # Nothing may rest on it that apply catches up before anything else is done.
            for what in rng.choice(BEHIND):
                perform(world, what, rng)
            world.apply_all()

        if explorer.run(recovery, after_failure=True):
            self.judge(world, course, rng)

    def judge(self, world: World, course: Course, rng: random.Random) -> None:
        """The invariants."""
        self.judged += 1
        if self.forks is not None:
            self.forks.tally.counts[f"failures {len(course.branches)}"] += 1
        self._check(world, course, "applied")
        if rng.random() < self.more:
            story(world, f"{course} more", 6)
            world.lose_power()
            self._check(world, course, "more")
        check_backing(world)
        if rng.random() < self.again:
            check_again(world)
            self._check(world, course, "again")
        if rng.random() < self.emptied:
            check_index(world)
            self._check(world, course, "index")
            check_emptied(world)
        world.close()

    def _check(self, world: World, course: Course, when: str) -> None:
        """Random numbers of its own: what is done must not depend on how much is looked at."""
        rng = random.Random(f"{course} {when}")
        check(world, eyes=(rng.choice(EYES),), some=rng if self.quick else None)


def replay(root: Path, text: str) -> None:
    """Do again, in this process, what a course tells.

    :raises Crash: it is from another state of the tree: there is no such operation.
    """
    course = Course.parse(text)
    run = Run(follow(course), None)
    run.begin(root, course._replace(branches=()))
    if not run.judged:
        raise Crash(f"nothing fails in {text}")
