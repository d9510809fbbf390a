"""What a recovery of the undo log keeps, drops, copies and reports."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from journal.errors import Corruption, JournalFull
from journal.format import BLOCK, Kind, Log
from journal.frontier import pack_position, unpack_position
from journal.segment import SegmentLister, segment_name
from journal.undo import UndoFailed
from journal.undo_follower import UndoFollower
from tests.journal.undo_world import (
    DISK,
    World,
    image,
    images_of,
    published_in_three_segments,
    spoil,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.recover()
    return made


# ----------------------------------------------------------------------------------------- recovery
def test_nothing_is_ever_appended_to_an_old_segment(world: World) -> None:
    """! Nor a name used twice: the index names segments by their numbers."""
    world.append(image(1, 5))
    world.sync()
    before = world.path(1).read_bytes()
    for number in range(2, 5):
        world.recover()
        assert world.append(image(number, 5)).segment == number
        world.sync()
    assert world.path(1).read_bytes() == before
    assert world.images() == [image(number, 5) for number in range(1, 5)]
    world.path(4).unlink()
    del world.list[4]
    assert world.recover().next_segment == 5


def test_a_torn_end_is_dropped_and_does_not_come_back(world: World) -> None:
    """! What older segments hold from the next number on is void, whatever shows up there."""
    world.append(image(1, 5))
    world.sync()
    world.append(image(2, 6))
    world.append(image(3, 6))
    whole = world.path(1).read_bytes()
    at = world.list[1]
    world.path(1).write_bytes(whole[:at] + bytes(len(whole) - at))
    found = world.recover()
    assert (found.copied, found.damage) == (0, ())
    world.append(image(7, 7))
    world.sync()
    world.path(1).write_bytes(whole)
    assert world.images() == [image(1, 5), image(7, 7)]
    world.recover()
    assert world.images() == [image(1, 5), image(7, 7)]


@pytest.mark.parametrize("hint", [False, True])
def test_torn_content_is_told_by_its_checksum(world: World, hint: bool) -> None:
    world.append(image(1, 5))
    world.sync()
    world.append(image(2, 6))
    where = world.append(image(3, 6))
    world.append(image(4, 6))
    spoil(world.path(1), where.first_payload_offset + 5)
    found = world.recover(hint=hint)
    # Record 3's sync cannot have succeeded, so neither can that of record 4 have been published.
    assert (found.copied, found.dropped, found.damage) == (1, 2, ())
    assert world.images() == [image(1, 5), image(2, 6)]


def test_what_headers_say_is_durable_is_not_copied(world: World) -> None:
    world.append(image(1, 5))
    world.sync(note_ends=False)
    world.append(image(2, 6))
    found = world.recover(hint=False)
    assert found.copied == 1
    assert world.images() == [image(1, 5), image(2, 6)]
    follower = world.follower()
    assert [len(table.rows) for _, table in follower.tables(follower.snapshot())] == [1, 1]
    follower.close()


def test_an_unlisted_segment_is_void(world: World) -> None:
    """Nothing rests on it: it was never published. It is named, and left for its user to delete."""
    world.append(image(1, 5))
    world.sync()
    assert world.writer is not None
    world.writer.roll()
    world.append(image(2, 6))
    found = world.recover()
    assert (found.void, found.copied, found.next_segment) == ((2,), 0, 3)
    assert world.images() == [image(1, 5)]
    world.append(image(3, 7))
    world.sync()
    assert world.images() == [image(1, 5), image(3, 7)]
    assert world.verify() == []


def test_the_rest_of_a_recovery_that_was_interrupted_is_removed(world: World) -> None:
    world.append(image(1, 5))
    world.sync()
    left = world.path(2).with_name("00000002.seg.tmp")
    left.write_bytes(b"half")
    assert world.recover().next_segment == 3
    assert not left.exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["create", "write", "sync", "rename", "sync_dir"])
def test_a_recovery_that_fails_can_be_repeated(world: World, call: str, code: int) -> None:
    world.append(image(1, 5))
    world.sync()
    world.append(image(2, 6))
    world.storage.fail = lambda what, name: code if what == call else 0
    with pytest.raises(JournalFull if code == errno.ENOSPC else UndoFailed):
        world.recover()
    world.storage.fail = lambda what, name: 0
    world.recover()
    assert world.images() == [image(1, 5), image(2, 6)]


# ------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize("segment", [1, 2, 3])
@pytest.mark.parametrize("how", ["gone", "header", "cut off", "batch"])
def test_a_lost_or_damaged_segment_is_told_from_a_swept_one(
    world: World, segment: int, how: str
) -> None:
    """! By the list, which is shortened before a segment is swept."""
    published_in_three_segments(world)
    assert world.verify() == []
    path = world.path(segment)
    if how == "gone":
        path.unlink()
    elif how == "header":
        spoil(path, 40)
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:9000])
    else:
        data = bytearray(path.read_bytes())
        data[4096 + 4608 :] = bytes(len(data) - 4096 - 4608)
        path.write_bytes(data)
    assert [error.file for error in world.verify()] == [segment_name(Log.UNDO, segment)]
    found = world.recover()
    if how in {"gone", "header"}:
        assert found.lost == (segment,)
        assert [error.file for error in found.damage] == [segment_name(Log.UNDO, segment)]
    elif segment == 3:
        assert [error.file for error in found.damage] == [segment_name(Log.UNDO, 3)]
    # What is left of the others is neither cut nor hidden, now and after more was written.
    others = [image(n * 10 + k, 5) for n in range(3) if n + 1 != segment for k in range(3)]
    world.append(image(99, 9))
    world.sync()
    there = images_of(world.follower(), damaged=True)
    assert [one for one in there if one[0] // 10 != segment - 1] == [*others, image(99, 9)]
    assert [error.file for error in world.verify()] == [segment_name(Log.UNDO, segment)]
    del world.list[segment]
    if how in {"gone", "header"}:
        path.unlink(missing_ok=True)
        assert world.verify() == []


def test_damage_in_the_middle_costs_no_more_than_itself(world: World) -> None:
    """! Below what was published damage is reported and passed over, never cut."""
    for number in range(5):
        where = world.append(image(number, 5))
        if number == 2:
            bad = where.first_payload_offset - 100
    world.sync()
    spoil(world.path(1), bad)
    want = [image(number, 5) for number in (0, 1, 3, 4)]
    assert world.images() == want
    found = world.recover()
    assert [(error.file, error.first_seq) for error in found.damage] == [
        (segment_name(Log.UNDO, 1), 3)
    ]
    assert world.images() == want
    world.append(image(9, 9))
    world.sync()
    assert world.images() == [*want, image(9, 9)]


def test_what_was_published_in_this_boot_is_known_from_the_frontier(world: World) -> None:
    """! The list's ends lag behind; damage up to the published position is no torn end."""
    world.append(image(1, 5))
    where = world.append(image(2, 5))
    world.sync(note_ends=False)
    spoil(world.path(1), where.first_payload_offset - 100)
    assert [error.first_seq for error in world.verify()] == [2]
    assert [error.first_seq for error in world.recover().damage] == [2]
    assert world.images() == [image(1, 5)]


@pytest.mark.parametrize("segment", [1, 2])
def test_a_segment_that_ends_before_the_next_one_begins_is_damaged(
    world: World, segment: int
) -> None:
    """! The list's ends lag behind, the published position is elsewhere: the next segment tells."""
    assert world.writer is not None
    for number in range(3):
        world.append(image(number, 5))
        world.append(image(number + 10, 5))
        world.sync(note_ends=False)
        world.writer.roll()
    world.sync(note_ends=False)
    assert world.list == {1: 0, 2: 0, 3: 0}
    assert world.verify() == []
    path = world.path(segment)
    path.write_bytes(path.read_bytes()[:9000][: 4096 + 4608])
    assert [error.file for error in world.verify()] == [segment_name(Log.UNDO, segment)]


def test_damaged_content_is_an_error_to_its_reader(world: World) -> None:
    """! A bad checksum is an error, never "the next one"."""
    where = world.append(image(1, 5), image(2, 5))
    world.sync()
    spoil(world.path(1), where.first_payload_offset + BLOCK + 7)
    with pytest.raises(Corruption, match="checksum mismatch"):
        world.images()


def test_a_damaged_footer_costs_nothing(world: World) -> None:
    published_in_three_segments(world)
    want = world.images()
    info = SegmentLister(world.storage, Log.UNDO, DISK).refresh()[0]
    assert info.trailer is not None
    spoil(world.path(1), info.trailer.footer_offset + 80)
    assert world.images() == want
    assert world.verify() == []


@pytest.mark.parametrize("remembered", ["by the frontier", "by the catalog"])
def test_a_sweep_of_the_newest_is_no_loss_and_its_number_is_not_used_again(
    world: World, remembered: str
) -> None:
    """! The index names segments by their numbers: old entries would point into a new segment."""
    published_in_three_segments(world)
    assert world.writer is not None
    world.writer.roll()
    world.sync()
    del world.list[3]
    world.path(3).unlink()
    if remembered == "by the frontier":
        world.highest = 0
    found = world.recover(hint=remembered == "by the frontier")
    assert (found.lost, found.damage, found.next_segment) == ((), (), 4)
    assert world.verify() == []
    assert len(world.images()) == 6
    if remembered == "by the frontier":
        assert found.published >= pack_position(3, 4096), "it never falls"


# ---------------------------------------------------- found by damaging every place (tests/crash)
def _listed(world: World) -> UndoFollower:
    return UndoFollower(world.storage, DISK, lambda: world.published, listed=lambda: world.list)


def _lost(follower: UndoFollower) -> list[int]:
    """Segments with rows of which it is only known that they are lost."""
    snapshot = follower.snapshot()
    tables = [(info.segment, follower.table(snapshot, info)) for info in snapshot.segments]
    return [number for number, table in tables if (table.rows["kind"] == Kind.LOST).any()]


def test_readers_miss_the_newest_segment_when_it_is_lost(world: World) -> None:
    """! What was published ended before it then, so its images were not missed: points that needed
    them were given what the backing holds now.
    """
    published_in_three_segments(world)
    data = bytearray(world.path(3).read_bytes())
    data[60] ^= 1
    world.path(3).write_bytes(data)
    for hint in (False, True):
        assert world.recover(hint=hint).lost == (3,)
        assert unpack_position(world.published)[0] >= 3


@pytest.mark.parametrize("segment", [2, 3])
@pytest.mark.parametrize("again", [False, True])
def test_a_published_end_that_is_damaged_is_missed(world: World, segment: int, again: bool) -> None:
    """! Its last batch, and nothing behind: it looked like one that ends before."""
    published_in_three_segments(world)
    data = bytearray(world.path(segment).read_bytes())
    (info,) = (i for i in _listed(world).snapshot().segments if i.segment == segment)
    follower = _listed(world)
    last = follower.table(follower.snapshot(), info).batches[-1]
    for at in (int(last["offset"]) + 8, info.size - 20):  # and it is not sealed
        data[at] ^= 1
    world.path(segment).write_bytes(data)
    if again:
        world.recover(hint=False)
    assert _lost(_listed(world)) == [segment]
    world.append(image(99, 9))
    world.sync()
    assert _lost(_listed(world)) == [segment]
