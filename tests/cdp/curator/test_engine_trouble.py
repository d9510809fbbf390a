"""What the engine does about errors: hold, say so once, go on with the rest; never falsify, never
spin.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from cdp.curator import engine as engine_module
from journal import reserve
from journal.catalog import Catalog, CatalogFailed
from journal.errors import Corruption
from journal.format import HEADER_PAGE, Kind
from journal.run_format import IndexFull
from journal.runset import RunSet
from journal.undo import UndoFailed
from tests.crash.curator_checks import check, check_backing
from tests.crash.curator_model import World
from tests.crash.curator_storage import BACKING, DISK, values

SECOND = 1_000_000_000


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, 1)


def step(world: World, seconds: float = 2) -> bool:
    """One step of the engine, so much later; trouble is allowed."""
    world.stamp += int(seconds * SECOND)
    return bool(world.act(lambda engine: engine.step(world.stamp)))


def rest(world: World, limit: int = 60) -> None:
    """Steps until there is nothing to do: it must come to rest, trouble or not."""
    for _ in range(limit):
        if not step(world):
            return
    raise AssertionError(f"still busy: {world.running.trouble}")


def flip(world: World, name: str, offset: int) -> None:
    """One bit of a file is not what it was, on the disk and in the cache."""
    inode = world.sim.live[name]
    inode.live[offset] ^= 1
    if offset < len(inode.durable):
        inode.durable[offset] ^= 1


# ------------------------------------------------------------------------------------ the backing
@pytest.mark.expect_log("apply is held: apply waits")
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_write_of_the_backing_that_fails_is_repeated(world: World, code: int) -> None:
    """! Also when it fails half-way: what was overwritten must not be saved as what was before."""
    for block in (0, 2, 4):
        world.write(block)
    world.sync()
    for failing in range(3):
        left = iter(range(failing))

        def fails(*_: int, left: object = left) -> None:
            if next(left, None) is None:  # type: ignore[call-overload]
                raise OSError(code, "simulated")

        world.running.work.backing._before_write = fails  # type: ignore[attr-defined]
        step(world)
        assert world.running.held is not None
        assert world.frontier.applied == 0
        assert not step(world, 0.1)
        assert not step(world, 0.1)  # not at once
        check(world)
    world.running.work.backing._before_write = lambda *_: None  # type: ignore[attr-defined]
    rest(world)
    assert world.running.trouble is None
    check(world)
    check_backing(world)


@pytest.mark.expect_log("apply is held: apply waits")
def test_after_a_failed_sync_of_the_backing_all_is_written_again(world: World) -> None:
    """! A later sync that succeeds proves nothing about those pages."""
    world.zero(0)
    world.write(1)
    world.sync()
    assert world.apply()
    world.sim.live[BACKING].pending.clear()  # the kernel calls them clean
    sync = world.running.work.backing.sync
    turns = iter((True,))

    def fails_once() -> None:
        if next(turns, False):
            raise OSError(errno.EIO, "simulated")
        sync()

    world.running.work.backing.sync = fails_once  # type: ignore[method-assign]
    assert not step(world)
    assert world.frontier.applied == 0
    rest(world)
    assert world.frontier.applied == 2
    world.lose_power("journal")
    check(world)
    assert values(bytes(world.sim.live[BACKING].live))[:2] == [0, 2]


@pytest.mark.expect_log("apply is held: apply waits")
def test_a_stop_while_the_backing_fails_leaves_no_fingerprint(world: World) -> None:
    """! The page cache still shows what never reached the device; the next start reads the latter,
    which would be taken for a write of somebody else.
    """
    world.write(1)
    world.sync()
    assert world.apply()

    def fails() -> None:
        raise OSError(errno.EIO, "simulated")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(world.running.work.backing, "sync", fails)
        assert not step(world)
    backing = world.sim.live[BACKING]
    backing.pending.clear()  # the kernel calls the pages clean, and drops them later
    world.act(lambda engine: engine.close())
    world.stop_curator()
    backing.live[:] = backing.durable
    catalog = Catalog.open(world.routed, DISK, read_only=True)
    assert catalog.fingerprint is None
    assert not catalog.clean
    world.start_curator()
    rest(world)
    assert world.frontier.applied == 1
    check(world)
    check_backing(world)


def test_another_error_ends_the_process(world: World) -> None:
    world.write(0)
    world.sync()

    def fails(*_: int) -> None:
        raise OSError(errno.ENOMEM, "simulated")

    world.running.work.backing._before_write = fails  # type: ignore[attr-defined]
    with pytest.raises(OSError):
        step(world)


# ----------------------------------------------------------------------------------- the undo log
def test_a_failed_sync_of_the_undo_log_ends_the_process(world: World) -> None:
    """The next one copies what is in doubt; this one cannot know it."""
    world.write(0)
    world.sync()
    world.sim.faults["sync", world.sim.counts["sync"] + 1] = errno.EIO
    with pytest.raises(UndoFailed):
        step(world)
    assert values(bytes(world.sim.live[BACKING].live))[0] == 1000
    world.sim.faults.clear()
    world.kill_curator()
    rest(world)
    check(world)
    world.lose_power()
    check(world)


def test_a_failed_catalog_ends_the_process(world: World) -> None:
    world.write(0)
    world.sync()
    assert world.apply()
    world.sim.faults["sync", world.sim.counts["sync"] + 2] = errno.EIO
    with pytest.raises(CatalogFailed):
        world.finish()
    world.sim.faults.clear()
    world.kill_curator()
    rest(world)
    check(world)


@pytest.mark.expect_log("apply is held: no space|history before seq", required=False)
def test_without_space_history_is_given_up_step_by_step(world: World) -> None:
    """! Only as much as is needed: what was given up first has to show."""
    for number in range(40):
        world.write(number % world.blocks)
        world.sync()
        step(world)
    rest(world)
    assert len(world.running.redo.segments()) > 8
    world.sim.space = world.sim.used() + 8192
    seen = set()
    for number in range(12):
        if world.sim.space - world.sim.used() > 20000:
            world.write(number % world.blocks)
            world.sync()
        step(world, 0.3)
        seen.add(world.running.catalog.window_start)
    assert max(seen) < world.frontier.durable
    assert len(seen) <= 4
    world.sim.space = 1 << 40
    rest(world)
    assert world.running.held is None
    check(world)
    check_backing(world)


def test_a_reserve_that_cannot_be_made_does_not_keep_a_curator_from_coming_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bool:
        raise OSError(errno.EIO, "no reserve")

    world.stop_curator()
    with monkeypatch.context() as patch:
        patch.setattr(reserve, "make", broken)
        world.start_curator()
    world.write(0)
    rest(world)
    check(world)


@pytest.mark.expect_log("is held", required=False)
def test_without_space_and_nothing_to_give_up_it_waits(world: World) -> None:
    world.running.policy.overflow = "throttle"
    reserve.release(world.routed)
    world.write(0)
    world.sync()
    world.sim.space = world.sim.used()
    for _ in range(5):
        assert not step(world)
    assert "no space" in str(world.running.held)
    assert world.running.catalog.window_start == 0
    assert world.running.throttled
    check(world)
    world.sim.space = 1 << 40
    rest(world)
    assert (world.running.throttled, world.running.trouble) == (False, None)
    check(world)


@pytest.mark.expect_log("is held: no space|what was kept in reserve")
def test_the_reserve_is_used_after_the_recorder_was_held(world: World) -> None:
    """! Else what is given away for making space would be used up by the next writes."""
    world.running.policy.overflow = "throttle"
    step(world)
    reserved = len(world.sim.live["reserve"].live)
    assert reserved > world.running.policy.segment_bytes
    world.write(0)
    world.sync()
    world.sim.space = world.sim.used()
    assert world.frontier.redo_bytes_max > 1
    step(world)
    assert world.running.full
    assert world.frontier.redo_bytes_max == 1
    assert "reserve" in world.sim.live
    step(world)
    assert "reserve" not in world.sim.live
    rest(world)
    assert world.frontier.applied == world.frontier.durable
    assert (world.running.full, world.running.held) == (False, None)
    check(world)
    check_backing(world)
    world.sim.space = 1 << 40
    rest(world)
    assert len(world.sim.live["reserve"].live) == reserved


@pytest.mark.expect_log("file system is full|history before seq|is held: no space|kept in reserve")
def test_the_reserve_is_used_before_all_history_is_given_up(world: World) -> None:
    """! To give up a segment needs a little space when a bookmark needs something of it. Without
    that history was given up to the end, and nothing came of it: writers waited for ever.
    """
    for block in range(world.blocks):
        world.write(block)
    world.bookmark()
    for number in range(40):
        world.write(number % world.blocks)
        world.sync()
        step(world)
    rest(world)
    segments = len(world.running.redo.segments())
    assert "reserve" in world.sim.live
    world.sim.space = world.sim.used()
    world.running.space.available = lambda: world.sim.space - world.sim.used()
    world.frontier.redo_refused += 1
    for _ in range(30):
        if "reserve" in world.sim.live:
            world.sim.space = world.sim.used()  # others take what else becomes free
        step(world, 0.15)
    assert len(world.running.redo.segments()) < segments
    assert world.frontier.redo_bytes_max > world.frontier.redo_bytes
    assert world.running.catalog.window_start < world.frontier.durable
    check(world)


@pytest.mark.expect_log("file system is full|history before seq")
def test_history_goes_when_the_recorder_was_refused_space(world: World) -> None:
    """Policy `shrink`; and without a refusal none goes, however full the file system is."""
    world.running.space.available = lambda: 0
    world.fill_segments(8)
    rest(world)
    assert world.running.catalog.window_start == 0
    assert not world.running.space.confined
    world.frontier.redo_refused += 1
    rest(world)
    assert world.running.catalog.window_start > 0
    assert len(world.running.redo.segments()) < 8
    assert "free some there" in str(world.running.trouble)
    check(world)
    world.running.space.available = lambda: 1 << 30
    rest(world)
    assert world.running.trouble is None
    assert world.frontier.redo_bytes_max > 1 << 39


# ----------------------------------------------------------------------------------------- damage
def place_of(world: World, seq: int) -> tuple[str, int]:
    """File of a record and offset of its payload."""
    located = world.running.redo.locate(seq)
    assert located is not None
    info, table, row = located
    return info.name, int(table.rows["payload"][row])


@pytest.mark.expect_log("checksum mismatch")
def test_apply_stops_at_a_damaged_record(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """! Everything before it is applied, nothing is written from it, and it is said once."""
    world.write(0)
    world.write(1, 2)
    bad = world.write(3)
    world.write(4)
    world.sync()
    flip(world, *place_of(world, bad))
    rest(world)
    for _ in range(5):
        assert not step(world)
    assert world.frontier.applied == bad - 1
    assert "checksum mismatch" in str(world.running.held)
    assert values(bytes(world.sim.live[BACKING].live))[3] == 1003
    assert len(world.running.catalog.damaged()) == 1
    assert len([each for each in caplog.records if each.levelname == "ERROR"]) == 1
    reader = world.reader()
    assert values(reader.read(bad - 1, 0, 6)) == world.model[bad - 1]
    with pytest.raises(Corruption):
        reader.read(bad, 3, 1)
    # Other work goes on.
    world.move_window(1)
    assert world.running.catalog.window_start == 1


@pytest.mark.expect_log("checksum mismatch")
def test_a_damaged_large_record_is_found(tmp_path: Path) -> None:
    world = World(tmp_path, 1, blocks=64, segment_bytes=1 << 20)
    bad = world.write(0, 40)
    world.sync()
    name, offset = place_of(world, bad)
    flip(world, name, offset + 35 * 4096)
    rest(world)
    assert world.frontier.applied == 0
    assert values(bytes(world.sim.live[BACKING].live))[32] == 1032


@pytest.mark.expect_log("records are damaged or gone")
def test_apply_stops_at_a_record_that_is_lost(tmp_path: Path) -> None:
    """! Nobody knows which blocks it was about: what comes after may be older than it."""
    world = World(tmp_path, 1, segment_bytes=1 << 20)
    world.write(0)
    world.sync()
    bad = world.write(1)
    world.sync()
    world.write(2)
    world.sync()
    start = world.running.redo.segments()[0]
    batches = world.running.redo.table(start).batches
    flip(world, start.name, int(batches["offset"][1]) + 40)
    world.kill_curator()
    for _ in range(5):
        step(world)
    assert not step(world)
    assert world.frontier.applied == bad - 1
    reader = world.reader()
    assert values(reader.read(1, 0, 6)) == world.model[1]
    assert values(reader.read(3, 2, 1)) == [3]
    with pytest.raises(Corruption):
        reader.read(3, 0, 2)
    with pytest.raises(Corruption):
        reader.read(bad, 0, 1)
    assert not reader.zeroes(0, 6, 3).any()


@pytest.mark.expect_log("checksum mismatch|is held")
def test_reclaim_stops_at_what_is_damaged_until_nobody_needs_it(world: World) -> None:
    bad = world.write(0)
    world.bookmark()  # the point needs it
    world.fill_segments(2)
    world.write(0)
    world.fill_segments(4)
    world.apply_all()
    name, offset = place_of(world, bad)
    flip(world, name, offset)
    world.running.policy.journal_limit = 1
    world.running.policy.overflow = "throttle"
    world.move_window(world.frontier.durable)
    for _ in range(10):
        step(world)
    assert not step(world)
    assert name in world.sim.live
    assert world.running.throttled
    world.write(1)
    world.sync()
    for _ in range(3):
        step(world)
    assert world.frontier.applied == world.frontier.durable  # apply goes on
    world.unbookmark()
    rest(world)
    assert name not in world.sim.live
    check(world)


def test_a_sweep_stops_at_what_is_damaged(world: World) -> None:
    world.write(0)
    world.write(1)
    world.apply_all()
    kept = world.bookmark()
    world.write(0)
    world.apply_all()
    world.running.work.undo.roll()
    world.running.work.publish()
    world.running.history.refresh()
    (info,) = world.running.closed_undo()
    table = world.running.history.undo.table(info)
    flip(world, info.name, int(table.rows["payload"][0]))
    with pytest.raises(Corruption):
        world.act(lambda engine: engine.sweep(info))
    assert info.name in world.sim.live
    assert values(world.reader().read(kept, 0, 6)) == world.model[kept]
    with pytest.raises(Corruption):
        world.reader().read(0, 0, 1)
    rest(world)


@pytest.mark.expect_log("before-images are damaged or gone|undo segment is gone", required=False)
def test_a_lost_undo_segment_is_an_error_and_not_an_older_image(world: World) -> None:
    """! Points that need none of it are still exact; apply stops where it would have to guess."""
    for block in range(3):
        world.write(block)
    world.apply_all()
    for block in range(3):
        world.write(block)
    world.sync()
    world.apply()  # not synced: it will be repeated
    (name,) = (name for name in world.sim.live if name.startswith("undo/"))
    world.stop_curator()
    del world.sim.live[name], world.sim.durable[name]
    world.sim.name_changes.clear()
    world.start_curator()
    reader = world.reader()
    with pytest.raises(Corruption):
        reader.read(0, 0, 1)
    assert values(reader.read(3, 0, 3)) == [1, 2, 3]  # the redo log has them
    with pytest.raises(Corruption):
        reader.read(3, 0, 6)
    step(world)
    world.act(lambda engine: engine.forget_history())
    rest(world)
    check(world)
    check_backing(world)


@pytest.mark.expect_log("undo segment is gone|before-images are damaged", required=False)
def test_apply_does_not_save_what_may_have_been_saved(world: World) -> None:
    """! An image that was lost is not to be replaced by what the backing holds now."""
    for block in range(3):
        world.write(block)
    world.sync()
    world.apply()
    (name,) = (name for name in world.sim.live if name.startswith("undo/"))
    world.stop_curator()
    del world.sim.live[name], world.sim.durable[name]
    world.sim.name_changes.clear()
    world.start_curator()
    for _ in range(4):
        step(world)
    assert world.frontier.applied == 0
    assert world.running.held is not None
    assert not [name for name in world.sim.live if name.startswith("undo/")]
    world.act(lambda engine: engine.forget_history())
    rest(world)


def test_a_damaged_run_is_made_anew(world: World) -> None:
    world.fill_segments(3)
    world.apply_all()
    rest(world)
    runs = world.running.redo_runs
    run = runs.runs[0]
    path = world.root / f"life-{world.lives}" / "index" / run.name
    data = bytearray(path.read_bytes())
    for at in range(3 * 4096, len(data), 64):
        data[at] ^= 0xFF
    path.write_bytes(data)
    covered = runs.covered
    check(world)
    rest(world)
    assert runs.covered == covered
    check(world)
    assert world.running.trouble is None


# ------------------------------------------------------------------------------------- the others
@pytest.mark.expect_log("the index is held: no space for the index")
def test_an_index_that_is_full_stops_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise IndexFull("no space for the index")

    with monkeypatch.context() as patch:
        patch.setattr(RunSet, "add", full)
        world.fill_segments(3)
        for _ in range(5):
            step(world)
        assert world.frontier.applied == world.frontier.durable
        assert world.running.held is None
        assert "no space" in str(world.running.trouble)
        check(world)
    step(world, 61)
    rest(world)
    assert world.running.trouble is None
    assert world.running.redo_runs.covered
    check(world)


def test_a_backlog_starves_neither_the_index_nor_housekeeping(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "APPLY_RECORDS", 1)
    monkeypatch.setattr(engine_module, "GROUP_BLOCKS", 1)
    world.running.policy.window_ns = 20 * SECOND
    for number in range(60):
        for _ in range(2):
            world.write(number % world.blocks)
        world.sync()
        step(world, 1)
        assert world.frontier.durable > world.running.applier.done
    assert world.running.redo_runs.covered
    assert world.running.catalog.window_start > 0


def test_apply_begins_before_a_small_tail_is_full(world: World) -> None:
    """Clients are delayed from half of it on: not before there is work they could wait for."""
    engine, policy = world.running, world.running.policy
    policy.tail_bytes = 64 << 20
    world.write(1)
    world.sync()
    engine.step(world.stamp)
    before = engine.applier.done
    world.write(2)
    world.sync()
    engine.step(world.stamp)
    assert engine.applier.done == before  # it is little, and young
    world.frontier.redo_bytes += policy.tail_bytes // 4
    engine.step(world.stamp)
    assert engine.applier.done == world.frontier.durable


@pytest.mark.parametrize("overflow", ["throttle", "block", "gap"])
def test_only_the_policy_shrink_gives_up_history(world: World, overflow: str) -> None:
    """! The administrator chose to stop the application rather."""
    world.running.policy.overflow = overflow
    world.fill_segments(6)
    rest(world)
    world.running.policy.journal_limit = 1
    rest(world)
    assert world.running.catalog.window_start == 0
    status = world.running_points.status()
    assert status["throttled"]
    assert not status["degraded"]  # all is applied
    assert f"limit and overflow={overflow} keeps" in status["trouble"]
    assert world.frontier.redo_bytes_max == 1  # nothing may be appended
    world.running.policy.journal_limit = 1 << 40
    rest(world)
    status = world.running_points.status()
    assert not status["throttled"]
    assert status["trouble"] is None
    assert world.frontier.redo_bytes_max > 1 << 39


def test_the_window_follows_time_with_few_commits(world: World) -> None:
    world.running.policy.window_ns = 1000 * SECOND
    moves = []
    for number in range(200):
        world.write(number % world.blocks)
        world.sync()
        step(world, 9)
        moves.append(world.running.catalog.window_start)
    assert moves[-1] > 0
    changes = len(set(moves))
    segments = len(world.running.redo.segments()) + world.running.counters.reclaimed_segments
    assert changes <= 1800 // 10 + segments
    # A window's start is never younger than the window says, and not much older.
    batches = [world.running.redo.table(info).batches for info in world.running.redo.segments()]
    stamps = {int(b["first_seq"]): int(b["stamp"]) for table in batches for b in table}
    age = world.stamp - stamps[moves[-1] + 1]
    assert 970 * SECOND <= age <= 1030 * SECOND


def test_small_moves_of_the_window_wait(tmp_path: Path) -> None:
    world = World(tmp_path, 1, segment_bytes=1 << 20)
    world.running.policy.window_ns = 1000 * SECOND
    for number in range(100):
        world.write(number % world.blocks)
        world.sync()
        world.stamp += 20 * SECOND
    step(world)
    before = world.running.catalog.number
    start = world.running.catalog.window_start
    for _ in range(9):
        step(world, 1)
    assert world.running.catalog.window_start == start
    assert world.running.catalog.number <= before + 3
    for _ in range(30):
        step(world, 1)
    assert world.running.catalog.window_start > start


@pytest.mark.expect_log("pin v of a view is too old and dropped")
def test_a_pin_that_nobody_can_use_expires(world: World) -> None:
    gone: list[bool] = []
    world.running._keeper._viewer_gone = lambda: bool(gone)
    points = world.running_points
    points.pin("v", 0, owner="view", opened_ns=world.stamp, max_age_s=100)
    points.pin("w", 0, owner="view", opened_ns=world.stamp, max_age_s=0)
    step(world, 10_000)
    assert set(world.running.catalog.pins()) == {"v", "w"}  # somebody may be reading it
    gone.append(True)
    step(world)
    assert set(world.running.catalog.pins()) == {"w"}


def test_an_open_rollback_keeps_nobody_busy(world: World) -> None:
    world.write(0)
    world.control(Kind.ROLLBACK_BEGIN, {"to_seq": 0})
    world.refs([(0, 0)])
    world.sync()
    rest(world)
    assert not world.act(lambda engine: engine.drain_step(world.frontier.durable, world.stamp))
    assert not step(world)
    assert world.running.trouble is None


def test_reading_a_table_of_a_segment_without_a_footer_costs_no_header(world: World) -> None:
    """A segment whose header cannot be read is lost, not passed over."""
    world.write(0)
    world.fill_segments(1)
    world.write(1)
    world.fill_segments(1)
    world.sync()
    infos = world.running.redo.segments()
    flip(world, infos[1].name, HEADER_PAGE // 64)
    reader = world.reader()
    with pytest.raises(Corruption):
        reader.read(world.frontier.durable, 0, 2)
