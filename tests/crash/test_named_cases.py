"""Crashes that are known to be dangerous, each by itself.

What the explorations of `test_every_point` meet by chance, or not, is here for certain. (Late
writes of a dead connection: `tests/cdp/recorder/test_hangup.py`. SIGKILL of real processes:
`tests/interop/test_kill.py`, `tests/cdp/recorder/test_restart.py`.)
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from journal.errors import Corruption, Poisoned
from journal.format import Kind
from journal.undo import UndoFailed
from tests.crash.curator_checks import check, check_again, check_backing, check_emptied
from tests.crash.curator_model import World
from tests.crash.curator_storage import BACKING, values
from tests.crash.sim_storage import Crash

pytestmark = [pytest.mark.crash, pytest.mark.expect_log("were acknowledged", required=False)]

OUTCOMES = range(6)  # of what is left to chance


def stop_at(world: World, operation: str, number: int = 1) -> None:
    """The next operation of this name, or a later one, does not happen any more."""
    left = itertools.count(1)

    def stop() -> None:
        if world.sim.log[-1].startswith(operation) and next(left) == number:
            world.on_operation = lambda: None
            raise Crash

    world.on_operation = stop


# ------------------------------------------------------------------------------------ the redo log
def survive_only_the_last_append(world: World, before: int) -> None:
    """Of what is not synced of the segment being written only what came after ``before`` gets to
    the disk.
    """
    name = max(name for name in world.sim.live if name.startswith("redo/") and "tmp" not in name)
    inode = world.sim.live[name]
    for _, offset, data in inode.pending[before:]:
        end = offset + len(data)
        inode.durable.extend(bytes(max(0, end - len(inode.durable))))
        inode.durable[offset:end] = data
    inode.pending.clear()


def pending_of_redo(world: World) -> int:
    name = max(name for name in world.sim.live if name.startswith("redo/") and "tmp" not in name)
    return len(world.sim.live[name].pending)


@pytest.mark.parametrize("crashes", [2, 3])
def test_a_stale_batch_behind_a_cut_never_comes_back(tmp_path: Path, crashes: int) -> None:
    """! Appended behind the cut, its seq would fit, and so would its chain."""
    world = World(tmp_path, 1, segment_bytes=1 << 16)
    world.write(0)
    world.sync()
    world.write(1)
    before = pending_of_redo(world)
    stale = world.write(2)
    survive_only_the_last_append(world, before)
    for _ in range(crashes):
        world.lose_power(lambda _name: True)
        check(world)
        assert world.records[1].kind == Kind.WRITE
        assert stale not in world.records or world.records[stale].kind != Kind.WRITE
        assert world.now()[1:3] == [1001, 1002]
        new = world.write(3)
        assert new > stale
        world.sync()
        check(world)
    check_backing(world)
    check_again(world)


def a_segment_ends(world: World) -> None:
    """An append that begins the next segment, with what was appended before not synced."""
    before = world.writer.segment if world.writer else 0
    while world.writer is not None and world.writer.segment == before:
        world.write(len(world.model) % world.blocks)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("end", ["power", "both", "recorder"])
def test_a_crash_in_the_flush_at_a_segment_switch(tmp_path: Path, end: str, prepared: bool) -> None:
    """`durable` passes the end of a segment only when all of both, and their names, are there."""
    at = 0
    while True:
        at += 1
        world = World(tmp_path / f"{at}", at, segment_bytes=1 << 15, spares=float(prepared))
        world.write(0)
        world.sync()
        a_segment_ends(world)
        world.sim.crash_at = world.sim.operations + at
        try:
            world.sync()
        except Crash:
            pass
        else:
            assert at > 4, "two files, their directory, and a footer"
            world.close()
            return
        {"power": world.lose_power, "both": world.kill_both, "recorder": world.kill_recorder}[end]()
        check(world)
        a_segment_ends(world)
        world.lose_power()
        check(world)
        check_backing(world)
        world.close()


@pytest.mark.parametrize("evict", [False, True], ids=["cached", "evicted"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_crash_after_a_failed_sync_of_the_redo_log(
    tmp_path: Path, outcome: int, evict: bool
) -> None:
    """! Its pages are called clean: syncing them again would prove nothing."""
    world = World(tmp_path, outcome)
    world.write(0)
    world.sync()
    for block in range(1, 4):
        world.write(block)
    world.sim.faults["sync", world.sim.counts["sync"] + 1] = errno.EIO
    with pytest.raises(Poisoned):
        world.sync()
    world.sim.faults.clear()
    if evict:
        world.sim.kill(evict=True)
    world.kill_recorder()
    survived = world.now()
    check(world)
    world.lose_power("backing")  # whatever is not synced of the journal now was never promised
    assert world.now() == survived
    check(world)
    check_backing(world)


# ------------------------------------------------------------------------- the curator's two places
@pytest.mark.parametrize("operation", ["write catalog.0", "sync catalog.0", "write catalog.1",
                                       "sync catalog.1"])  # fmt: skip
@pytest.mark.parametrize("outcome", OUTCOMES[:2])
def test_a_curator_is_killed_between_applied_and_its_entry_in_the_catalog(
    tmp_path: Path, operation: str, outcome: int
) -> None:
    """! The recorder lives on, and has dropped what was said to be applied: that stays so."""
    world = World(tmp_path, outcome)
    world.write(0)
    world.apply_all()
    world.write(0)
    world.trim(1)
    world.sync()
    world.apply()
    shown = world.frontier.applied
    stop_at(world, operation)
    with pytest.raises(Crash):
        world.finish()
    world.kill_curator()
    assert world.frontier.applied >= shown
    check(world)
    world.write(1)
    world.apply_all()
    check(world)
    world.lose_power()
    check(world)
    check_backing(world)


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_the_catalog_is_behind_what_a_recorder_was_shown(tmp_path: Path, part: float) -> None:
    """! Groups are applied again, under a recorder that looks at the backing for them."""
    world = World(tmp_path, 1)
    for block in (0, 1, 0):
        world.write(block)
    world.apply_all()
    world.advance()  # the recorder drops its overlay
    world.stop_curator()
    world.understate_applied(part)
    world.start_curator()
    assert world.frontier.applied == 3
    world.write(0)
    world.sync()
    check(world)
    world.kill_recorder()
    world.apply_all()
    check(world)
    check_backing(world)


# ------------------------------------------------------------------------------------- the undo log
@pytest.mark.parametrize("evict", [False, True], ids=["cached", "evicted"])
@pytest.mark.parametrize("job", ["apply", "release", "reclaim"])
@pytest.mark.parametrize("outcome", OUTCOMES[:3])
def test_a_failed_sync_of_the_undo_log(tmp_path: Path, outcome: int, job: str, evict: bool) -> None:
    """! What it was about is copied, or saved again: "it is there already" must not rest on it."""
    world = World(tmp_path, outcome)
    world.write(0)
    world.trim(1)
    world.write(0)
    world.fill_segments()
    world.apply_all()
    world.write(2)
    world.sync()
    if job != "apply":
        world.apply_all()
    if job == "reclaim":
        while world.release():
            pass
    work: Callable[[], object] = getattr(world, job)
    fail_the_next_sync_of(world, "undo/")
    with pytest.raises(UndoFailed):
        work()
    world.sim.faults.clear()
    world.on_operation = lambda: None
    if evict:
        world.sim.kill(evict=True)
    world.kill_curator()
    check(world)
    world.apply_all()
    work()
    world.lose_power(lambda name: name.startswith("undo/"))
    check(world)
    check_backing(world)


def fail_the_next_sync_of(world: World, prefix: str) -> None:
    """EIO at the next sync of a file whose name begins so."""

    def plan() -> None:
        operation, _, name = world.sim.log[-1].partition(" ")
        if operation == "sync" and name.startswith(prefix):
            world.on_operation = lambda: None
            raise OSError(errno.EIO, "simulated", name)

    world.on_operation = plan


def lose(world: World, name: str) -> None:
    """A file is gone, now and after any crash."""
    for names in (world.sim.live, world.sim.durable):
        names.pop(name, None)


def right_or_refused(world: World) -> tuple[int, int]:
    """Every block at every point is what it was, or an error: how many were read, and refused."""
    right = refused = 0
    reader = world.reader()
    for seq, block in itertools.product(world.openable(), range(world.blocks)):
        disk = world.model[seq]
        assert disk is not None
        try:
            assert values(reader.read(seq, block, 1)) == [disk[block]], f"{block} at {seq}"
            right += 1
        except Corruption:
            refused += 1
    return right, refused


def history_in_three_segments(world: World) -> None:
    """Of either log: all of it is applied."""
    for _ in range(3):
        for block in range(3):
            world.write(block)
            world.apply_all()
        world.fill_segments()
        world.kill_curator()
    world.apply_all()


@pytest.mark.expect_log("gone|damaged", required=False)
@pytest.mark.parametrize("number", range(3))
def test_a_segment_of_the_undo_log_is_lost(tmp_path: Path, number: int) -> None:
    """What needs it is refused, by whoever looks; the rest is exact, and the disk is whole."""
    world = World(tmp_path, 1)
    history_in_three_segments(world)
    while world.reclaim():
        pass
    names = sorted(name for name in world.sim.live if name.startswith("undo/"))
    lose(world, names[number])
    world.kill_curator()
    assert min(right_or_refused(world)) > 0
    assert values(bytes(world.sim.live[BACKING].live)) == world.now()


@pytest.mark.expect_log("gone|damaged", required=False)
@pytest.mark.parametrize("number", range(3))
def test_a_segment_of_the_redo_log_is_lost(tmp_path: Path, number: int) -> None:
    """What needs it is refused, by whoever looks; the rest is exact, and the disk is whole."""
    world = World(tmp_path, 1)
    history_in_three_segments(world)
    names = sorted(name for name in world.sim.live if name.startswith("redo/"))
    lose(world, names[number])
    world.kill_curator()
    assert min(right_or_refused(world)) > 0
    assert values(bytes(world.sim.live[BACKING].live)) == world.now()


# ------------------------------------------------------------------------------- prepared segments
@pytest.mark.parametrize("end", ["kill_recorder", "kill_both", "lose_power"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_recorder_dies_with_prepared_segments(tmp_path: Path, outcome: int, end: str) -> None:
    """Those in use keep what was flushed; the others are nobody's, and go."""
    world = World(tmp_path, outcome, spares=1.0)
    world.write(0)
    world.sync()
    a_segment_ends(world)  # it is made of a prepared one, whose new name is not durable
    assert world.writer is not None
    world.writer.spares.count = 3
    while world.writer.spares.wanted:
        world.writer.spares.prepare(lambda: True)
    if outcome % 2:
        world.sync()
    {"kill_recorder": world.kill_recorder, "kill_both": world.kill_both,
     "lose_power": world.lose_power}[end]()  # fmt: skip
    assert not [name for name in world.sim.live if "spare" in name]
    check(world)
    world.write(1)
    world.sync()
    world.lose_power()
    check(world)
    check_emptied(world)
