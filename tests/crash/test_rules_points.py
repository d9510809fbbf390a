"""One case for each rule of what is openable, and of rollbacks (R5, R6), see `test_rules_apply`."""

from __future__ import annotations

from typing import Any

import pytest

from journal.catalog import Catalog
from journal.catalog_state import State
from journal.format import Kind
from tests.crash.curator_checks import ascending, check, check_backing
from tests.crash.curator_model import World
from tests.crash.curator_storage import BACKING, values

pytestmark = [pytest.mark.crash, pytest.mark.expect_log("were acknowledged", required=False)]


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
