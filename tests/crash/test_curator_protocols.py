"""One case for each rule of how the curator, the recorder and readers share a disk's files.

Each was seen to fail with its rule broken.
"""

from __future__ import annotations

from typing import Any

import pytest

from journal.errors import Corruption
from journal.format import Kind
from replay.history import History
from tests.crash.curator_checks import ascending, check
from tests.crash.curator_model import World
from tests.crash.curator_storage import values

pytestmark = [pytest.mark.crash, pytest.mark.expect_log("were acknowledged", required=False)]


# --------------------------------------------------------------------------- PROTOCOLS: `applied`
def test_applied_never_falls_while_a_recorder_lives(world: World) -> None:
    """! It has dropped its overlay up to there."""
    for block in range(3):
        world.write(block)
    world.apply_all()
    world.stop_curator()
    world.understate_applied(0.0)
    world.start_curator()
    assert world.frontier.applied == world.running.applier.applied == 3
    check(world)


# ---------------------------------------------------------------------------- PROTOCOLS: a reader
def test_a_reader_looks_again_after_it_read_the_backing(world: World) -> None:
    """! Between lookup and read the block may be saved, published and overwritten."""
    world.write(1)
    world.apply_all()
    reader = world.reader()
    reader.refresh()
    real = reader.backing
    turns = iter((True,))

    class Racing:
        def read_into(self, offset: int, buffer: memoryview) -> int:
            if next(turns, False):
                world.write(0)
                world.apply_all()
            return real.read_into(offset, buffer)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    reader.backing = Racing()
    assert values(reader.read(1, 0, world.blocks)) == world.model[1]
    assert next(turns, None) is None


def test_what_is_remembered_of_a_block_in_neither_log_ends_with_the_next_publish(
    world: World,
) -> None:
    """! The backing is overwritten as soon as what it held was saved."""
    world.write(1)
    world.apply_all()
    for _ in range(2):
        assert world.remembered(1) == world.model[1]
    world.write(0)
    world.apply_all()
    assert world.remembered(1) == world.model[1]


def test_a_remembered_block_in_neither_log_is_looked_up_again_after_the_backing_was_read(
    world: World,
) -> None:
    """! Between the question whether something was published and the read it may be."""
    world.write(1)
    world.apply_all()
    assert world.remembered(1) == world.model[1]
    history = world.places()._history
    real = history.backing
    turns = iter((True,))

    class Racing:
        def read_into(self, offset: int, buffer: memoryview) -> int:
            if next(turns, False):
                world.write(0)
                world.apply_all()
            return real.read_into(offset, buffer)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    history.backing = Racing()
    assert world.remembered(1) == world.model[1]
    assert next(turns, None) is None


def test_remembered_places_are_looked_up_again_when_their_segment_is_gone(world: World) -> None:
    """! The facts that are needed were copied; and no other place may be forgotten for it."""
    for block in range(3):
        world.write(block)
    world.fill_segments(2)
    for block in range(3):
        world.write(block)
    world.apply_all()
    seq = 3
    assert world.remembered(seq) == world.model[seq]
    places = world.places()
    while world.reclaim():
        pass
    assert seq in world.openable()
    places._history.redo.close()  # type: ignore[attr-defined]  # no file is open any more
    assert world.remembered(seq) == world.model[seq]
    world.kill_curator()
    for _ in range(3):
        world.sweep()
    places._history.undo._follower.close()  # type: ignore[attr-defined]
    assert world.remembered(seq) == world.model[seq]


def test_remembered_content_is_verified_every_time(world: World) -> None:
    """A place proves nothing about what lies there now."""
    seq = world.write(0)
    world.sync()
    assert world.remembered(seq) == world.model[seq]
    name = world.running.redo.segments()[-1].name
    data = next(each.live for path, each in world.sim.live.items() if path.endswith(name))
    at = bytes(data).index(world.records[seq].data)
    data[at] ^= 1
    with pytest.raises(Corruption, match="checksum"):
        world.remembered(seq)


def test_what_was_remembered_before_others_wrote_is_void(world: World) -> None:
    """! The point at which the history before is given up is what the backing holds then."""
    seq = world.write(0)
    world.apply_all()
    assert world.remembered(seq) == world.model[seq]
    world.gap([7] * world.blocks)
    end = world.frontier.durable
    assert world.remembered(end)[0] != 7  # the redo log's word, until somebody decides
    world.act(lambda engine: engine.forget_history())
    world.places()._history.refresh()
    assert world.remembered(end) == [7] * world.blocks


def test_a_reader_begins_again_when_a_segment_of_its_snapshot_is_gone(world: World) -> None:
    """! Never "skip": the next fact would be an older one."""
    for block in range(3):
        world.write(block)
    world.fill_segments(2)
    for block in range(3):
        world.write(block)
    world.apply_all()
    reader = world.reader()
    reader.refresh()
    reader.redo.close()  # type: ignore[attr-defined]  # no file is open any more
    tables = dict(reader.redo.cache._tables)
    seq = 3
    while world.reclaim():
        pass
    assert seq in world.openable()
    reader.redo.cache._tables.update(tables)
    assert values(reader.read(seq, 0, world.blocks)) == world.model[seq]
    # And an image that is swept meanwhile: it was copied.
    world.kill_curator()
    reader.refresh()
    reader.undo._follower.close()  # type: ignore[attr-defined]
    for _ in range(3):
        world.sweep()
    assert values(reader.read(seq, 0, world.blocks)) == world.model[seq]


def test_a_ref_that_is_reclaimed_while_it_is_followed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! What was read at its source may be from after the source's facts were dropped."""
    for block in range(3):
        world.write(block)
    world.apply_all()
    world.rollback(0)
    there = world.frontier.durable
    world.kill_recorder()  # the refs' segment is closed
    world.write(0)
    world.apply_all()
    world.kill_curator()
    world.move_window(there)
    reader = world.reader()
    resolve = History._resolve
    depth = iter(range(10))

    def racing(self: History, *arguments: Any) -> None:
        if self is reader and next(depth) == 1:
            # The source is nobody's any more.
            while world.reclaim():
                pass
            world.kill_curator()
            for _ in range(3):
                world.sweep()
        resolve(self, *arguments)

    monkeypatch.setattr(History, "_resolve", racing)
    assert values(reader.read(there, 0, world.blocks)) == world.model[there]
    assert world.running.redo.segments()[0].first_seq > there


# -------------------------------------------------------------------------- PROTOCOLS: the undo log
def test_a_segment_is_listed_before_its_first_publish(world: World) -> None:
    """! Only so a lost one is told from one that never counted."""
    world.write(0)
    world.sync()
    log = world.log_of(world.apply)
    ascending(log, "sync undo/", "sync_dir undo", "write catalog.0", "sync catalog.1",
              "write backing")  # fmt: skip
    assert list(world.running.catalog.undo()) == [1]
    assert world.running.catalog.undo_highest == 1


def test_a_number_is_never_used_twice(world: World) -> None:
    """The index names segments by their numbers."""
    world.write(0)
    world.apply_all()
    world.kill_curator()
    world.move_window(world.frontier.durable)
    for _ in range(3):
        world.sweep()
    assert world.running.catalog.undo() == {}
    world.lose_power()
    world.write(1)
    world.apply_all()
    assert list(world.running.catalog.undo()) == [2]


def test_a_sweep_copies_syncs_publishes_and_only_then_drops(world: World) -> None:
    for block in range(2):
        world.write(block)
        world.apply_all()
    world.running.work.undo.roll()
    world.running.work.publish()
    world.running.history.refresh()
    (info,) = world.running.closed_undo()
    log = world.log_of(lambda: world.act(lambda engine: engine.sweep(info)))
    ascending(
        log, "write undo/00000002", "sync undo/00000002", "sync_dir undo", "write catalog.0",
        "sync catalog.1", "unlink undo/00000001", "sync_dir undo",
    )  # fmt: skip
    check(world)
    world.lose_power()
    check(world)


def test_what_a_dead_curator_left_is_durable_before_the_next_overwrite(world: World) -> None:
    """! "Nothing to save, it is there already" must not rest on pages whose sync failed."""
    world.write(0)
    world.sync()
    world.apply()
    world.running.work.undo.append([1, 2, 1, Kind.IMAGE_ZERO, 0, 0], [], [], 0)
    world.kill_curator()
    world.lose_power("backing")
    reader = world.reader()
    rows = [len(reader.undo.table(info).rows) for info in reader.undo.segments()]
    assert rows == [1, 1]
