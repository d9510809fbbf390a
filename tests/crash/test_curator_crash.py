"""The curator over a storage that crashes: at every operation of a history, of every kind.

A power loss takes any part of what is not synced, of the journal and of the backing alike; the
death of the curator, or of the recorder, or of both, takes what they knew, while the page cache
stays. Afterwards, and after more of that, every openable point, the live disk and every
before-image equal a plain model. `CDP_TEST_SEED` replays a run, `CDP_CRASH_STRIDE=1` crashes at
every operation instead of a seeded part of them.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdp.curator import known
from replay import apply, images, plan, ranges, reclaim, release, sweep, work
from tests.crash.curator_checks import check, check_backing, check_emptied, check_index
from tests.crash.curator_model import World
from tests.crash.sim_storage import Crash

pytestmark = [
    pytest.mark.crash,
    pytest.mark.expect_log("were acknowledged|history before seq", required=False),
]

Failure = Callable[[World, random.Random], None]

# A run crashes at every so many-th operation, beginning anywhere; 1 (minutes) is all of them.
STRIDE = int(os.environ.get("CDP_CRASH_STRIDE", "4"))


def places(seed: int, count: int) -> range:
    """The operations of ``count`` at which this run crashes."""
    return range(1 + seed % STRIDE, count + 1, STRIDE)


def act(world: World, rng: random.Random) -> None:
    """One random act of a client, the administrator or the curator."""
    block = rng.randrange(world.blocks)
    count = min(rng.choice((1, 1, 1, 2, 4)), world.blocks - block)
    match rng.choices(
        ("write", "batch", "zero", "trim", "sync", "apply", "finish", "step", "release",
         "reclaim", "sweep", "bookmark", "unbookmark", "window", "rollback", "abort"),
        (30, 4, 5, 12, 14, 14, 8, 6, 4, 8, 3, 3, 1, 4, 2, 1),
    )[0]:  # fmt: skip
        case "write":
            world.write(block, count)
        case "batch":
            places = [(rng.randrange(world.blocks), 1) for _ in range(rng.choice((2, 3)))]
            world.write_batch(places)
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
        case "sweep":
            world.sweep()
        case "bookmark":
            world.bookmark()
        case "unbookmark":
            world.unbookmark()
        case "window":
            points = world.openable()
            world.move_window(rng.choice(points[-len(points) // 2 :]))
        case "rollback" | "abort" as what:
            world.rollback(rng.choice(world.openable()), commit=what == "rollback")


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


@pytest.fixture
def roots(tmp_path: Path) -> Iterator[Iterator[Path]]:
    """New directories; in memory if possible, for LMDB syncs what it writes."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    root = Path(tempfile.mkdtemp(prefix="cdp-crash-", dir=memory if usable else tmp_path))

    def directories() -> Iterator[Path]:
        for number in itertools.count():
            path = root / str(number)
            path.mkdir()
            yield path
            shutil.rmtree(path)

    try:
        yield directories()
    finally:
        shutil.rmtree(root)


def operations(root: Path, seed: int, acts: int) -> int:
    """How many operations a story without a crash takes."""
    world = make(root, seed)
    start = world.sim.operations
    story(world, str(seed), acts)
    count = world.sim.operations - start
    check(world)
    world.close()
    return count


def crashed(root: Path, seed: int, acts: int, at: int) -> World:
    """A world whose story was interrupted at an operation."""
    world = make(root, seed)
    world.sim.crash_at = world.sim.operations + at
    with pytest.raises(Crash):
        story(world, str(seed), acts)
    world.failures.append(f"seed {seed}, operation {at}: {world.sim.log[-1]}")
    return world


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("failure", [power, power_journal, power_backing, curator, both, recorder])
def test_a_failure_at_every_operation(
    roots: Iterator[Path], seed: int, number: int, failure: Failure
) -> None:
    seed, acts = seed + number, 45
    for at in places(seed, operations(next(roots), seed, acts)):
        rng = random.Random(f"{seed}/{at}")
        world = crashed(next(roots), seed, acts, at)
        fail(world, failure, rng)
        check(world)
        story(world, f"{seed}/{at}", 4)
        check(world)
        check_backing(world)
        world.close()


@pytest.mark.parametrize("number", range(6))
def test_failures_in_a_row(roots: Iterator[Path], seed: int, number: int) -> None:
    """Also in the middle of the recovery from the one before."""
    seed, acts = seed + number, 45
    for at in places(seed, operations(next(roots), seed, acts)):
        rng = random.Random(f"{seed}/{at}")
        world = crashed(next(roots), seed, acts, at)
        for _ in range(4):
            world.crash_next = rng.randrange(1, 60)
            try:
                fail(world, rng.choice(ALL), rng)
                check(world)
                story(world, f"{seed}/{rng.random()}", 8)
            except Crash:
                continue
        world.crash_next = 0
        world.lose_power()
        check(world)
        check_backing(world)
        world.close()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is done in slices has many of them, and large is what has two blocks."""
    for module in (work, apply, reclaim):
        monkeypatch.setattr(module, "BUFFER_BLOCKS", 2)
    monkeypatch.setattr(reclaim, "SLICE_BLOCKS", 3)
    monkeypatch.setattr(reclaim, "LARGE_BLOCKS", 2)
    monkeypatch.setattr(reclaim, "REGION_BLOCKS", 4)
    monkeypatch.setattr(release, "SLICE_BLOCKS", 2)
    monkeypatch.setattr(sweep, "LARGE_BLOCKS", 2)
    monkeypatch.setattr(images, "BATCH_IMAGES", 2)
    monkeypatch.setattr(apply, "GROUP_ROWS", 3)
    monkeypatch.setattr(plan, "LARGE_ZERO_BLOCKS", 2)
    monkeypatch.setattr(ranges, "REGION_BLOCKS", 3)
    monkeypatch.setattr(known, "FOOTERS_MAX", 1)


@pytest.mark.parametrize("number", range(4))
def test_a_disk_through_all_its_lives(roots: Iterator[Path], seed: int, number: int) -> None:
    """Longer stories; at the end both logs shrink to nothing, and the index can be made anew."""
    live_through(next(roots), f"{seed}/{number}", short=512 * (number % 2) * 3)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.usefixtures("small_pieces")
def test_a_disk_whose_work_is_done_in_pieces(roots: Iterator[Path], seed: int, number: int) -> None:
    live_through(next(roots), f"{seed}/{number}", blocks=9)


def live_through(root: Path, seed: str, **options: int) -> None:
    rng = random.Random(seed)
    world = make(root, rng.randrange(1 << 32), **options)
    for turn in range(12):
        story(world, f"{seed}/{turn}", 25)
        check(world)
        fail(world, rng.choice(ALL), rng)
        check(world)
    check_index(world)
    check(world)
    check_backing(world)
    check(world)
    check_emptied(world)
    world.close()
