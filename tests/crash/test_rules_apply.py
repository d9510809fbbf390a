"""One case for each rule of apply (R3) that was won from a concrete way to lose or falsify data.

Each was seen to fail with its rule broken. The numbers R3..R9 are those of the design. `check`
compares everything a reader may see with a plain model.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from journal.format import Kind
from tests.crash.curator_checks import ascending, check, check_backing
from tests.crash.curator_model import World
from tests.crash.curator_storage import BACKING, Later, values

pytestmark = [pytest.mark.crash, pytest.mark.expect_log("were acknowledged", required=False)]


def test_r3_saved_synced_published_before_the_first_overwrite(world: World) -> None:
    world.write(0)
    world.sync()
    published: list[int] = []
    world.running.work.backing._before_write = (  # type: ignore[attr-defined]
        lambda *_: published.append(world.frontier.undo_published)
    )
    log = world.log_of(world.apply)
    ascending(log, "write undo/", "sync undo/", "sync_dir undo", "write backing")
    assert published == [world.running.work.undo.published]
    assert published[0] > 0
    log = world.log_of(world.finish)
    ascending(log, "sync backing", "write catalog.0", "sync catalog.1")
    assert world.frontier.applied == world.running.catalog.applied == 1


def test_r3_the_undo_log_is_synced_also_when_nothing_was_saved(world: World) -> None:
    """! What lies there already may not be durable."""
    world.write(0)
    world.apply_all()
    world.write(0)  # held: nothing to save
    world.sync()
    log = world.log_of(world.apply)
    assert not [line for line in log if line.startswith("write undo/")]
    ascending(log, "sync undo/", "sync_dir undo", "write backing")


def test_r3_the_first_saved_wins(world: World) -> None:
    """A group that is repeated must not save what it has written itself the first time."""
    world.write(0)
    world.write(1)
    world.sync()
    world.apply()
    world.kill_curator()  # the backing is overwritten, `applied` has not moved
    assert world.frontier.applied == 0
    world.apply()
    check(world)
    world.lose_power()
    check(world)


def test_r3_the_first_saved_wins_after_a_crash_in_the_middle(world: World) -> None:
    for block in (0, 2, 4):
        world.write(block)
    world.sync()
    left = iter(range(2))

    class Killed(BaseException):
        pass

    def second(*_: int) -> None:
        if next(left, None) is None:
            raise Killed

    world.running.work.backing._before_write = second  # type: ignore[attr-defined]
    with pytest.raises(Killed):
        world.apply()
    world.kill_curator()
    world.apply_all()
    check(world)


@pytest.mark.parametrize("trim_first", [False, True])
def test_r3_a_repeat_finds_its_images_though_a_trim_came_between(
    world: World, trim_first: bool
) -> None:
    if trim_first:
        world.trim(0)
    world.write(0)
    world.trim(0)
    world.write(0)
    world.sync()
    while world.apply(1):
        world.kill_curator()
        check(world)
        if not world.apply(65536):
            break
    world.kill_curator()
    world.apply_all()
    check(world)


def test_r3_applied_moves_only_after_a_sync_of_the_backing(world: World) -> None:
    world.write(0)
    world.sync()
    world.apply()
    assert world.frontier.applied == world.running.catalog.applied == 0
    world.lose_power("journal")  # nothing of the backing survives
    check(world)
    assert values(bytes(world.sim.live[BACKING].live))[0] == 1000


def test_r3_a_sync_is_good_for_what_was_overwritten_before_it_began(world: World) -> None:
    """! What was written beside it may be lost."""
    world.running.work.launch = Later
    world.write(0)
    world.sync()
    world.apply()
    assert world.running.applier.begin()
    world.write(1)
    world.sync()
    world.apply()
    assert not world.running.applier.begin()  # one at a time
    assert world.frontier.applied == 0
    world.running.applier.look(wait=True)
    assert world.frontier.applied == world.running.catalog.applied == 1
    world.lose_power("journal")  # nothing of the backing survives that was not synced
    check(world)
    check_backing(world)


def test_r3_after_a_failed_sync_what_was_written_beside_it_is_written_again(world: World) -> None:
    """! Its pages may be those that failed."""
    world.write(0)
    world.sync()
    world.apply()

    def failing(_sync: Callable[[], None]) -> Later:
        def fail() -> None:
            raise OSError(errno.EIO, "sync")

        return Later(fail)

    world.running.work.launch = failing
    world.running.applier.begin()
    world.running.work.launch = Later
    world.write(1)
    world.sync()
    world.apply()
    with pytest.raises(OSError, match="sync"):
        world.running.applier.look(wait=True)
    assert world.running.applier.done == world.frontier.applied == 0
    world.lose_power("journal")
    check(world)
    check_backing(world)


def test_r3_applied_never_lies_inside_a_rollback(world: World) -> None:
    """Masks and the rest are made from `applied` on; nobody looks for a rollback begun before."""
    world.trim(0, 4)
    world.sync()
    for block in range(world.blocks):
        world.write(block)
    world.apply_all()
    world.trim(1, 3)
    world.rollback(1)
    begin = max(seq for seq, each in world.records.items() if each.kind == Kind.ROLLBACK_BEGIN)
    shown = set()
    while world.apply(1):
        world.finish()
        shown.add(world.frontier.applied)
        world.kill_curator()
        check(world)
        world.apply(1)
        world.kill_recorder()
        check(world)
        for _ in range(3):
            world.apply(1)
    world.finish()
    shown.add(world.frontier.applied)
    assert not [seq for seq in shown if begin <= seq < world.frontier.durable]
    assert world.frontier.applied == world.frontier.durable
    check(world)


def test_r3_nothing_of_an_open_rollback_is_applied_or_indexed(world: World) -> None:
    """! Refs that are not decided are no versions anywhere, and in no run."""
    for block in range(3):
        world.write(block)
    world.apply_all()
    world.control(Kind.ROLLBACK_BEGIN, {"to_seq": 0})
    begin = len(world.model) - 1
    world.refs([(block, 0) for block in range(3)])
    before = len(world.running.redo.segments())
    while len(world.running.redo.segments()) < before + 2:
        world.refs([(4, 0)])
        world.sync()
    for _ in range(20):
        world.step()
    assert world.frontier.applied == begin - 1
    assert world.running.redo_runs.last_seq < begin
    closed = [info for info in world.running.redo.segments() if world.running.is_closed(info)]
    assert [info for info in closed if info.segment not in world.running.redo_runs.covered]
    check(world)
    world.kill_curator()
    check(world)
    world.control(Kind.ROLLBACK_ABORT, {})
    world.sync()
    check(world)
    for _ in range(20):
        world.step()
    assert world.frontier.applied == world.frontier.durable
    check(world)
    check_backing(world)
