"""Gaps: others may have written to the backing. What was known of it is void, and if they did, so
is everything that the logs say of the time before.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from journal.format import Kind
from tests.crash.curator_checks import check, check_backing
from tests.crash.curator_model import World
from tests.crash.curator_storage import BACKING, content, values

pytestmark = pytest.mark.expect_log("were acknowledged", required=False)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, 1, understate=True)


def history(world: World) -> None:
    """Some writes and trims, and all of it let go properly."""
    for block in range(4):
        world.write(block)
    world.trim(1, 2)
    world.bookmark()
    world.fill_segments(1)
    world.trim(3)
    world.apply_all()
    while world.release():
        pass


def backing(world: World) -> list[int]:
    return values(bytes(world.sim.live[BACKING].live))


FOREIGN = [70, 71, 72, 73, 74, 75]


def test_a_gap_in_which_nobody_wrote(world: World) -> None:
    history(world)
    world.gap()
    check(world)
    world.write(1)
    world.trim(2)
    world.apply_all()
    check(world)
    world.kill_curator()
    check(world)
    while world.reclaim():
        check(world)
    check_backing(world)


def test_both_ends_of_a_gap_are_found_in_one_scan_or_in_two(world: World) -> None:
    """A gap that stays open in the catalog would make every later point disappear."""
    history(world)
    world.gap()
    assert world.running.catalog.gaps() == []
    world.openable()
    (gap,) = world.running.catalog.gaps()
    assert gap.end == world.frontier.durable
    world.control(Kind.GAP_BEGIN, {})
    world.sync()
    world.openable()
    assert world.running.catalog.gaps()[1].end is None
    world.kill_curator()
    world.control(Kind.GAP_END, {})
    world.sync()
    assert world.frontier.durable in world.openable()
    assert world.running.catalog.gaps()[1].end == world.frontier.durable


def test_nothing_is_said_of_the_backing_from_before_a_gap(world: World) -> None:
    """! Blocks that were held or masked before are not any more: others may have written them."""
    history(world)
    world.gap(FOREIGN)
    world.act(lambda engine: engine.forget_history())
    check(world)
    for block in (0, 1, 3):
        world.write(block)
    world.apply_all()
    check(world)
    while world.release():
        pass
    assert backing(world)[2] == FOREIGN[2]


@pytest.mark.parametrize("dies", [False, True])
def test_after_a_foreign_write_the_history_before_is_void(world: World, dies: bool) -> None:
    """! The redo log's versions from before must not answer for a point after it."""
    history(world)
    world.gap(FOREIGN)
    world.write(5)
    world.sync()
    end = world.frontier.durable - 1
    world.act(lambda engine: engine.forget_history())
    assert world.openable() == [end, end + 1]
    assert world.running.catalog.bookmarks() == {}
    if dies:
        world.kill_curator()
    check(world)
    world.write(0)
    world.trim(4)
    world.apply_all()
    check(world)
    for _ in range(20):
        world.step()
    while world.reclaim():
        check(world)
    world.lose_power()
    check(world)
    check_backing(world)


def test_what_lies_before_a_gap_is_never_written_again(world: World) -> None:
    """! However understated `applied` is at a start."""
    history(world)
    world.gap(FOREIGN)
    world.act(lambda engine: engine.forget_history())
    world.write(5)
    world.sync()
    for how in ("journal", "random"):
        world.lose_power(how, applied=0.0)
        assert world.running.applier.applied < world.last_gap() - 1 or how == "random"
        world.apply_all()
        assert backing(world)[:5] == FOREIGN[:5]
        check(world)


def test_what_lies_before_a_gap_without_a_word_is_never_written_again(world: World) -> None:
    """Before anybody has said what became of the backing."""
    history(world)
    world.gap(FOREIGN)
    world.lose_power("journal", applied=0.0)
    for _ in range(10):
        world.step()
    assert backing(world) == FOREIGN


def test_a_backing_that_was_written_without_us(world: World) -> None:
    """No gap was begun: what is not applied is abandoned, for the backing as it is counts."""
    history(world)
    world.write(0)
    world.sync()
    world.stop_curator()
    durable = world.frontier.durable
    inode = world.sim.live[BACKING]
    inode.live[:] = b"".join(map(content, FOREIGN))
    world.start_curator()
    world.watch.applied = 1 << 62  # it follows writes; of these it does not know
    world.act(lambda engine: engine.forget_history())
    assert world.frontier.applied == durable
    assert world.openable() == [durable]
    world.foreign[len(world.model)] = list(FOREIGN)
    world.control(Kind.GAP_END, {"unchanged": False})
    world.sync()
    world.act(lambda engine: engine.forget_history())
    assert world.openable() == [durable + 1]
    check(world)
    world.write(0)
    world.apply_all()
    check(world)
    assert backing(world)[1:] == FOREIGN[1:]
