"""One case for each rule of the curator that was won from a concrete way to lose or falsify data.

Each was seen to fail with its rule broken. The numbers R3..R9 are those of the design; the rest is
what it says of the undo log. `check` compares everything a reader may see with a plain model.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from journal.catalog import Catalog
from journal.catalog_state import State
from journal.errors import Conflict
from journal.format import Kind
from tests.crash.curator_checks import ascending, check, check_backing
from tests.crash.curator_model import World
from tests.crash.curator_storage import BACKING, DISK, Later, values

pytestmark = [pytest.mark.crash, pytest.mark.expect_log("were acknowledged", required=False)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, 1)


# -------------------------------------------------------------------------------------- R3, apply
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


def test_r4_reclaim_waits_for_a_sync_under_way(world: World) -> None:
    """! Nothing that was begun may be unfinished."""
    world.running.work.launch = Later
    for block in range(3):
        world.write(block)
    world.fill_segments(2)
    world.sync()
    while world.apply():
        pass
    world.running.applier.begin()
    assert world.frontier.applied == 0
    world.write(0)
    world.sync()
    world.apply()
    log = world.log_of(world.reclaim)
    ascending(log, "sync backing", "unlink redo/")
    assert world.running.applier.settled
    check(world)


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


# ------------------------------------------------------------------------------------ R4, reclaim
def test_r4_no_reclaim_before_apply_reached_the_recovered_end(world: World) -> None:
    """! The backing may hold what lies above `applied`: it is nobody's home yet."""
    world.write(0)
    world.fill_segments(2)
    world.apply_all()
    world.write(0)
    world.sync()
    world.apply()
    world.kill_curator()
    assert world.frontier.applied < world.frontier.durable
    assert not world.reclaim()
    with pytest.raises(Conflict):
        world.release()
    check(world)
    world.apply_all()
    assert world.reclaim()
    check(world)


def test_r4_no_reclaim_after_a_failed_sync_before_all_is_written_again(world: World) -> None:
    """A sync of the backing that failed is as bad as a crash."""
    world.trim(0)
    world.fill_segments(2)
    world.apply_all()
    world.write(0)
    world.sync()
    world.apply()
    world.sim.faults["sync", world.sim.counts["sync"] + 1] = 5
    with pytest.raises(OSError):
        world.finish()
    assert not world.reclaim()
    world.lose_power("journal")
    world.apply_all()
    check(world)
    while world.reclaim():
        check(world)
    check_backing(world)


def test_r4_released_before_reclaimed(world: World) -> None:
    """! Without the trim nothing hides what the backing still holds."""
    world.trim(0, 2)
    world.fill_segments(2)
    world.apply_all()
    assert values(bytes(world.sim.live[BACKING].live))[:2] == [1000, 1001]
    log = world.log_of(lambda: [world.reclaim() for _ in range(2)])
    ascending(
        log, "write undo/", "sync undo/", "write backing", "sync backing", "write catalog.0",
        "unlink redo/",
    )  # fmt: skip
    check(world)
    world.lose_power("journal")
    check(world)


def test_r4_saved_and_noted_before_the_segment_goes(world: World) -> None:
    """! "Reclaimed up to" is durable before the unlink: a lost segment is told from it."""
    world.write(0)
    world.fill_segments(2)
    world.write(0)
    world.apply_all()
    (info, *_) = world.running.redo.segments()
    unlink = world.sim.unlink
    noted: list[int] = []

    def noting(name: str) -> None:
        noted.append(Catalog.open(world.routed, DISK, read_only=True).reclaimed)
        unlink(name)

    world.sim.unlink = noting  # type: ignore[method-assign]
    log = world.log_of(world.reclaim)
    assert noted == [world.running.last_seq_of(info)]
    ascending(log, "write undo/", "sync undo/", "sync_dir undo", "sync catalog.1", "unlink redo/",
              "sync_dir redo")  # fmt: skip
    check(world)
    world.lose_power()
    check(world)


def test_r4_what_a_reclaimed_version_was_held_by_is_not_held_any_more(world: World) -> None:
    world.write(0)
    world.fill_segments(2)
    world.apply_all()
    assert world.reclaim()
    world.write(0)
    world.apply_all()
    check(world)


def test_r4_not_while_a_rollback_is_planned(world: World) -> None:
    """Its plan names the sources of refs that may lie in that segment."""
    world.write(0)
    world.fill_segments(3)
    world.apply_all()
    world.running_points.pin("p", 2, owner="rollback", opened_ns=0, max_age_s=0)
    assert not world.reclaim()
    world.running_points.unpin("p")
    assert world.reclaim()


@pytest.mark.parametrize("dead", ["recorder", "both", "power"])
def test_r4_a_segment_that_a_dead_recorder_left_is_reclaimed(world: World, dead: str) -> None:
    """It has no footer and never will; the next one's header says where it ends."""
    world.write(0)
    world.write(1)
    world.sync()
    {"recorder": world.kill_recorder, "both": world.kill_both, "power": world.lose_power}[dead]()
    world.write(2)
    world.apply_all()
    for _ in range(5):
        world.step()
    *left, last = (info.segment for info in world.running.redo.segments())
    assert left
    assert world.running.redo_runs.covered == set(left)
    while world.reclaim():
        pass
    assert [info.segment for info in world.running.redo.segments()] == [last]
    check(world)
    check_backing(world)


def test_the_undo_segments_of_dead_curators_are_swept(world: World) -> None:
    for block in range(4):
        world.write(block)
        world.apply_all()
        world.kill_curator()
    assert len(world.running.closed_undo()) == 4
    world.move_window(world.frontier.durable)
    for _ in range(10):
        world.step()
    assert world.running.closed_undo() == []
    check(world)


# ------------------------------------------------------------------------------------ R5, garbage
def test_r5_the_window_moves_durably_before_anything_is_dropped(world: World) -> None:
    for _ in range(3):
        world.write(0)
        world.apply_all()
    world.kill_curator()
    log = world.log_of(lambda: world.move_window(3))
    ascending(log, "write catalog.0", "sync catalog.0", "write catalog.1", "sync catalog.1")
    log = world.log_of(world.sweep)
    ascending(log, "sync_dir undo", "write catalog.0", "sync catalog.1", "unlink undo/")
    world.lose_power("backing")
    check(world)


def test_r5_the_checks_see_a_window_that_was_not_durable(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The case above is able to fail."""
    for _ in range(3):
        world.write(0)
        world.apply_all()
    world.kill_curator()

    def commit(catalog: Catalog, *ops: Any) -> None:
        state: State = catalog._state
        state["window_start"] = dict(ops).get("window_start", state.get("window_start", 0))

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "commit", commit)
        world.move_window(3)
    world.sweep()
    world.lose_power("backing")
    with pytest.raises(AssertionError):
        check(world)


def test_r5_a_view_is_a_pin_that_the_curator_committed(world: World) -> None:
    for _ in range(3):
        world.write(0)
        world.apply_all()
    log = world.log_of(
        lambda: world.running_points.pin("v", 1, owner="view", opened_ns=0, max_age_s=0),
    )
    ascending(log, "write catalog.0", "sync catalog.0", "write catalog.1", "sync catalog.1")
    world.move_window(3)
    world.kill_curator()
    for _ in range(5):
        world.sweep()
        check(world)
    assert 1 in world.openable()
    check(world)


def test_a_swept_segment_never_comes_back_on_the_list(world: World) -> None:
    """The ends of segments are committed later than the segment may have gone."""
    world.write(0)
    world.sync()
    world.apply()
    world.move_window(world.frontier.durable)
    world.running.work.undo.roll()
    world.running.work.publish()
    assert world.sweep()
    world.finish()
    assert world.running.catalog.undo() == {}
    world.lose_power()
    check(world)


# ----------------------------------------------------------------------------------- R6, rollback
def test_r6_aborted_refs_are_void(world: World) -> None:
    """! Whoever looks: apply, a reader of tables, a reader of runs, one that starts anew."""
    for block in range(3):
        world.write(block)
    world.apply_all()
    world.rollback(0, commit=False)
    check(world)
    world.fill_segments()
    for _ in range(10):
        world.step()
    check(world)
    world.kill_curator()
    check(world)
    while world.reclaim():
        check(world)
    check_backing(world)


def test_r6_a_recovery_aborts_what_was_not_committed(world: World) -> None:
    for block in range(3):
        world.write(block)
    world.apply_all()
    world.control(Kind.ROLLBACK_BEGIN, {"to_seq": 0})
    world.refs([(block, 0) for block in range(3)])
    world.sync()
    world.lose_power()
    check(world)
    check_backing(world)


def test_r6_sources_of_refs_stay_openable(world: World) -> None:
    """Also of a rollback that is not closed yet, and when nothing else keeps them."""
    for _ in range(2):
        for block in range(3):
            world.write(block)
    world.apply_all()
    world.control(Kind.ROLLBACK_BEGIN, {"to_seq": 2})
    world.refs([(block, 2) for block in range(3)])
    world.sync()
    world.move_window(world.frontier.durable)
    assert world.openable() == [2]
    world.kill_curator()
    for _ in range(5):
        world.sweep()
        check(world)
    world.control(Kind.ROLLBACK_COMMIT, {})
    world.sync()
    world.apply_all()
    check(world)
    check_backing(world)


def test_r6_masks_are_right_when_a_segment_ends_inside_a_rollback(world: World) -> None:
    """! A footer's masks know nothing of refs whose commit follows: release would zero them."""
    world.trim(0, 3)
    world.fill_segments()
    world.sync()
    world.running_points.pin("p", 0, owner="rollback", opened_ns=0, max_age_s=0)
    world.control(Kind.ROLLBACK_BEGIN, {"to_seq": 0})
    world.refs([(block, 0) for block in range(3)])
    before = len(world.running.redo.segments())
    while len(world.running.redo.segments()) < before + 2:
        world.refs([(5, 0)])
        world.sync()
    world.control(Kind.ROLLBACK_COMMIT, {})
    world.apply_all()
    world.running_points.unpin("p")
    world.kill_curator()
    assert not set(world.running.work.blocks.masked) & {0, 1, 2}
    world.release()
    check(world)
    assert values(bytes(world.sim.live[BACKING].live))[:3] == [1000, 1001, 1002]


def test_r6_refs_in_a_table_whose_commit_is_in_a_run(world: World) -> None:
    """A run may be thrown away at any time; what follows it must not be lost sight of."""
    for block in range(3):
        world.write(block)
    world.apply_all()
    world.running_points.pin("p", 0, owner="rollback", opened_ns=0, max_age_s=0)
    world.control(Kind.ROLLBACK_BEGIN, {"to_seq": 0})
    world.refs([(block, 0) for block in range(3)])
    refs = world.running.redo.segments()[-1].segment
    while world.writer is not None and world.writer.segment == refs:
        world.refs([(5, 0)])
    world.control(Kind.ROLLBACK_COMMIT, {})
    world.fill_segments(2)
    world.apply_all()
    for _ in range(10):
        world.step()
    world.write(1)
    world.sync()
    runs = world.running.redo_runs
    run = next(run for run in runs.runs if refs in run.meta.segments)
    assert len(runs.runs) > 1
    runs._unlink(run.name)
    world.running.history.refresh()
    assert refs not in runs.covered
    check(world)


# ------------------------------------------------------------------------------------ R9, release
def test_r9_saved_synced_published_before_zeroed(world: World) -> None:
    world.trim(0, 2)
    world.apply_all()
    log = world.log_of(world.release)
    ascending(log, "write undo/", "sync undo/", "sync_dir undo", "write backing", "sync backing")
    check(world)
    world.lose_power("backing")
    check(world)


def test_r9_decisions_know_every_image_that_was_published(world: World) -> None:
    """! A release right behind an apply must find the images that the apply has just saved."""
    world.write(0)
    world.trim(0)
    world.apply_all()
    world.release()
    check(world)
    world.kill_curator()
    check(world)


def test_r9_what_was_zero_is_not_when_it_was_written_again(world: World) -> None:
    world.trim(0)
    world.apply_all()
    world.release()
    world.write(0)
    world.trim(0)
    world.sync()
    while world.apply(1):  # the write and the trim in groups of their own
        pass
    world.finish()
    world.fill_segments(2)
    world.apply_all()
    while world.reclaim():
        check(world)
    assert values(bytes(world.sim.live[BACKING].live))[0] == 0
    check(world)


def test_r9_a_block_is_known_to_be_zero_only_after_a_sync(world: World) -> None:
    world.trim(0)
    world.fill_segments(2)
    world.apply_all()
    sync = world.running.work.backing.sync
    calls = iter((True,))

    def fails_once() -> None:
        if next(calls, False):
            lost = world.sim.live[BACKING]
            lost.pending.clear()  # called clean, and not on the disk
            raise OSError(5, "simulated")
        sync()

    world.running.work.backing.sync = fails_once  # type: ignore[method-assign]
    with pytest.raises(OSError):
        world.release()
    world.release()
    while world.reclaim():
        pass
    world.lose_power("journal")
    check(world)


def test_r6_sources_of_an_aborted_rollback_are_not_openable_for_one_before_it(
    world: World,
) -> None:
    """! Nothing was saved for them since: a curator that starts anew must not offer them again."""
    for block in range(3):
        world.write(block)
    world.apply_all()
    world.rollback(2)
    aborted = world.write(3)
    world.control(Kind.ROLLBACK_BEGIN, {"to_seq": aborted})
    world.refs([(0, aborted)])
    world.control(Kind.ROLLBACK_ABORT, {})
    world.sync()
    world.apply_all()
    world.move_window(world.frontier.durable)
    assert aborted not in world.openable()
    world.write(3)
    world.apply_all()
    world.kill_curator()
    assert 2 in world.openable()
    assert aborted not in world.openable()
    check(world)
