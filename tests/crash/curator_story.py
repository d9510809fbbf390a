"""What happens to a disk in a simulated world: stories of work, and failures.

The same seed tells the same story, whatever became of what was done before.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdp.curator import known
from journal.format import BLOCK
from replay import apply, images, plan, ranges, reclaim, release, sweep, work
from tests.crash.curator_model import World

Failure = Callable[[World, random.Random], None]


SHARES = {
    "write": 30, "batch": 4, "zero": 5, "trim": 12, "sync": 14, "apply": 14, "finish": 8,
    "step": 6, "release": 4, "reclaim": 8, "sweep": 3, "bookmark": 3, "unbookmark": 1, "pin": 1,
    "unpin": 1, "window": 4, "rollback": 2, "abort": 1,
}  # fmt: skip

# All there is, in an order in which everything finds something to do.
TOUR = (
    "trim", "write", "sync", "apply", "write", "batch", "sync", "finish", "write", "zero",
    "bookmark", "write", "sync", "apply", "finish", "pin", "write", "trim", "write", "sync",
    "apply", "release", "finish", "write", "write", "sync", "rollback", "write", "sync", "apply",
    "finish", "step", "step", "release", "reclaim", "write", "sync", "window", "finish",
    "reclaim", "unpin", "reclaim", "roll", "write", "sync", "apply", "sweep", "unbookmark",
    "abort", "window", "trim", "write", "sync", "apply", "finish", "release", "reclaim",
    "reclaim", "roll", "sweep", "window", "step", "write", "sync", "sweep", "sweep", "write",
    "sync", "apply", "finish",
)  # fmt: skip


def perform(world: World, what: str, rng: random.Random) -> None:
    """One act of a client, the administrator or the curator."""
    block = rng.randrange(world.blocks)
    count = min(rng.choice((1, 1, 1, 2, 4)), world.blocks - block)
    match what:
        case "write":
            world.write(block, count)
        case "batch":
            world.write_batch([(rng.randrange(world.blocks), 1) for _ in range(rng.choice((2, 3)))])
        case "zero":
            world.zero(block, count)
        case "trim":
            world.trim(block, count)
        case "sync":
            world.sync()
        case "apply":
            world.apply(rng.choice((1, 2, 3, 65536)))
        case "finish":
            world.finish()
        case "step":
            world.step()
        case "release":
            if world.act(lambda engine: engine.applier.settled):
                world.release()
        case "reclaim":
            world.reclaim()
        case "roll":
            world.roll()
        case "sweep":
            world.sweep()
        case "bookmark":
            world.bookmark()
        case "unbookmark":
            world.unbookmark()
        case "pin" | "unpin":
            world.pin(rng.choice(world.openable()) if what == "pin" else None)
        case "window":
            points = world.openable()
            world.move_window(rng.choice(points[-len(points) // 2 :]))
        case "rollback" | "abort":
            points = world.openable()
            others = [seq for seq in points if world.model[seq] != world.now()]
            world.rollback(rng.choice(others or points), commit=what == "rollback")
        case _:
            raise AssertionError(what)


def act(world: World, rng: random.Random) -> None:
    """A random one."""
    perform(world, rng.choices(tuple(SHARES), tuple(SHARES.values()))[0], rng)


def tour(world: World, seed: str) -> None:
    """All there is; the seed chooses blocks and points. A segment is prepared at each sync."""
    rng = random.Random(seed)
    world.spares = 1.0
    for what in TOUR:
        perform(world, what, rng)


def story(world: World, seed: str, acts: int) -> None:
    """The same acts for the same seed, whatever became of them before."""
    rng = random.Random(seed)
    for _ in range(acts):
        act(world, rng)


def curator(world: World, _rng: random.Random) -> None:
    world.kill_curator()


def recorder(world: World, _rng: random.Random) -> None:
    world.kill_recorder()


def both(world: World, _rng: random.Random) -> None:
    world.kill_both()


def power(world: World, _rng: random.Random) -> None:
    world.lose_power()


def power_journal(world: World, _rng: random.Random) -> None:
    world.lose_power("journal")


def power_backing(world: World, _rng: random.Random) -> None:
    world.lose_power("backing")


def understated(world: World, rng: random.Random) -> None:
    world.lose_power(applied=rng.choice((0.0, 0.5, rng.random())))


ALL: list[Failure] = [power, power_journal, power_backing, understated, curator, recorder, both]


def fail(world: World, failure: Failure, rng: random.Random) -> None:
    """One failure; a process that was in the middle of something goes with it."""
    if failure is curator and world.acting == "recorder":
        failure = recorder
    elif failure is recorder and world.acting == "curator":
        failure = curator
    if failure in (curator, recorder) and (world.engine is None or world.writer is None):
        failure = both
    world.failures.append(failure.__name__)
    failure(world, rng)


def make(root: Path, seed: int, **options: bool | int) -> World:
    options.setdefault("understate", seed % 2 == 1)
    options.setdefault("sparse", seed % 3 == 2)
    return World(root, seed, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def small_buffers(blocks: int) -> Iterator[None]:
    """A curator's buffer has so many blocks: to make the usual one takes longer than its start."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (work, apply, reclaim):
            patch.setattr(module, "BUFFER_BLOCKS", blocks)
        patch.setattr(work, "BUFFER_BYTES", blocks * BLOCK)
        yield


@contextlib.contextmanager
def in_pieces() -> Iterator[None]:
    """Whatever is done in slices has many of them, and large is what has two blocks."""
    with pytest.MonkeyPatch.context() as patch, small_buffers(2):
        patch.setattr(reclaim, "SLICE_BLOCKS", 3)
        patch.setattr(reclaim, "LARGE_BLOCKS", 2)
        patch.setattr(reclaim, "REGION_BLOCKS", 4)
        patch.setattr(release, "SLICE_BLOCKS", 2)
        patch.setattr(sweep, "LARGE_BLOCKS", 2)
        patch.setattr(images, "BATCH_IMAGES", 2)
        patch.setattr(apply, "GROUP_ROWS", 3)
        patch.setattr(plan, "LARGE_ZERO_BLOCKS", 2)
        patch.setattr(ranges, "REGION_BLOCKS", 3)
        patch.setattr(known, "FOOTERS_MAX", 1)
        yield
