"""One case for each rule of reclaim, release and sweep (R4, R9), see `test_rules_apply`."""

from __future__ import annotations

import pytest

from journal.catalog import Catalog
from journal.errors import Conflict
from journal.segment import SegmentInfo
from tests.crash.curator_checks import ascending, check, check_backing
from tests.crash.curator_model import World
from tests.crash.curator_storage import BACKING, DISK, Later, values
from tests.crash.sim_storage import Crash

pytestmark = [pytest.mark.crash, pytest.mark.expect_log("were acknowledged", required=False)]


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


def test_r6_a_ref_counts_until_its_segment_is_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! The catalog says "reclaimed" before the file goes. A crash in between leaves the file, and
    its refs are what points are made of: what they need must not be swept.
    """
    world.write(0)
    world.write(0)
    world.bookmark()  # keeps what block 0 held before the rollback
    world.fill_segments(1)
    world.rollback(1)
    committed = world.frontier.durable
    world.fill_segments(2)
    world.apply_all()

    def oldest() -> SegmentInfo:
        return world.running.history.redo.segments()[0]

    while oldest().bound < committed:
        assert world.reclaim()
    world.move_window(committed + 1)

    def crash(_name: str) -> None:
        raise Crash

    there = oldest()
    with monkeypatch.context() as patched:
        patched.setattr(world.running.work.storage, "unlink", crash)
        with pytest.raises(Crash):
            world.running.reclaim_oldest()
    world.kill_both()
    assert world.running.catalog.reclaimed >= committed
    assert oldest().segment == there.segment
    world.apply_all()
    world.roll()
    for _ in range(3):
        world.sweep()
    check(world)
