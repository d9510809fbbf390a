"""Files prepared for redo segments: what they hold, what becomes of them, and that none depends on
them.
"""

from __future__ import annotations

import errno

import pytest

from journal.bitmaps import Bitmaps
from journal.errors import JournalFull
from journal.format import BLOCK, Kind, Log, SegmentHeader, payload_sums
from journal.recovery import recover
from journal.redo import RedoStart, RedoWriter, create_segment
from journal.segment import segment_name
from journal.spares import Spares
from tests.crash.sim_storage import SimStorage

DISK = b"spare segments.."
SIZE = 3 << 19
CONTENT = bytes(range(256)) * 16


def writer_on(storage: SimStorage, count: int = 2) -> RedoWriter:
    head = SegmentHeader(Log.REDO, DISK, 1, b"1" * 16, 1, 0, 0, 0, 1)
    return RedoWriter(
        storage, DISK, RedoStart(create_segment(storage, head), Bitmaps(), 0), segment_bytes=SIZE,
        identity=lambda: b"i" * 16, spares=Spares(storage, SIZE, count),
    )  # fmt: skip


def write(writer: RedoWriter, count: int = 1) -> None:
    for _ in range(count):
        writer.append(
            [7, 0, 1, Kind.WRITE, 0, 0], payload_sums(CONTENT), [CONTENT], BLOCK, stamp=5,
            barrier=0, applied=0, window_start=0,
        )  # fmt: skip


def fill(writer: RedoWriter) -> None:
    """Write until a new segment has begun."""
    before = writer.segment
    while writer.segment == before:
        write(writer)


def test_a_spare_is_durable_zeroes_and_no_segment() -> None:
    storage = SimStorage(1)
    spares = Spares(storage, SIZE, 1)
    asked: list[int] = []

    def may_go_on() -> bool:
        asked.append(1)
        return True

    assert spares.prepare(may_go_on)
    assert len(asked) == 1  # after each MiB
    (name,) = storage.list("redo")
    assert not name.endswith(".seg")
    inode = storage.live[f"redo/{name}"]
    assert inode.live == inode.durable == bytes(SIZE)


def test_one_that_is_interrupted_leaves_nothing() -> None:
    storage = SimStorage(1)
    spares = Spares(storage, SIZE, 1)
    assert not spares.prepare(lambda: False)
    assert storage.list("redo") == []
    assert storage.open_files == 0
    assert spares.wanted


def test_without_space_nothing_is_left() -> None:
    storage = SimStorage(1, space=SIZE - 1)
    spares = Spares(storage, SIZE, 1)
    with pytest.raises(OSError, match="space") as caught:
        spares.prepare(lambda: True)
    assert caught.value.errno == errno.ENOSPC
    assert storage.used() == 0
    assert storage.open_files == 0


def test_one_that_cannot_be_synced_is_removed_and_poisons_nothing() -> None:
    storage = SimStorage(1)
    writer = writer_on(storage)
    storage.faults["sync", storage.counts.get("sync", 0) + 1] = errno.EIO
    with pytest.raises(OSError, match="error"):
        writer.spares.prepare(lambda: True)
    assert storage.list("redo") == ["00000001.seg"]
    write(writer)
    assert writer.sync() == 1


def test_a_new_segment_is_made_of_one_and_grows_no_more() -> None:
    storage = SimStorage(1)
    writer = writer_on(storage)
    writer.spares.prepare(lambda: True)
    fill(writer)
    name = segment_name(Log.REDO, writer.segment)
    assert len(storage.live[name].live) == SIZE
    while writer.segment_offset + 8192 <= SIZE:
        write(writer)
        assert len(storage.live[name].live) == SIZE
    fill(writer)  # and without one as ever
    assert len(storage.live[segment_name(Log.REDO, writer.segment)].live) < SIZE
    writer.sync()
    assert len(storage.live[name].live) < SIZE + BLOCK * 64  # sealed: the footer is its end
    writer.close()
    last = writer.last_seq
    recovered = recover(
        storage, DISK, durable_hint=0, applied_hint=0, stamp=9, identity=lambda: b"j" * 16
    )
    assert recovered.clean
    assert recovered.durable == last


def test_a_recovery_ends_where_the_batches_do_and_removes_what_is_left() -> None:
    storage = SimStorage(1)
    writer = writer_on(storage)
    for _ in range(2):
        writer.spares.prepare(lambda: True)
    fill(writer)
    last = writer.sync()
    assert any(name.endswith(".tmp") for name in storage.list("redo"))
    recovered = recover(
        storage, DISK, durable_hint=last, applied_hint=0, stamp=9, identity=lambda: b"j" * 16
    )
    assert recovered.start.segment.header.cut == last
    assert recovered.corruptions == []
    assert all(name.endswith(".seg") for name in storage.list("redo"))


def test_one_that_cannot_become_a_segment_leaves_nothing() -> None:
    storage = SimStorage(1)
    writer = writer_on(storage)
    writer.spares.prepare(lambda: True)
    storage.faults["rename", storage.counts.get("rename", 0) + 1] = errno.ENOSPC
    with pytest.raises(JournalFull):
        fill(writer)
    assert storage.list("redo") == ["00000001.seg"]
    fill(writer)
    assert storage.list("redo") == ["00000001.seg", "00000002.seg"]
    assert writer.sync() == writer.last_seq


def test_a_full_file_system_takes_them_back_before_it_refuses() -> None:
    storage = SimStorage(1)
    writer = writer_on(storage)
    for _ in range(2):
        writer.spares.prepare(lambda: True)
    storage.space = storage.used()
    before = writer.last_seq
    write(writer, 40)
    assert writer.last_seq == before + 40
    assert writer.spares.wanted
    storage.space = storage.used()
    with pytest.raises(JournalFull):
        write(writer, 40)


def test_a_clean_end_leaves_none() -> None:
    storage = SimStorage(1)
    writer = writer_on(storage)
    writer.spares.prepare(lambda: True)
    writer.close()
    assert storage.list("redo") == ["00000001.seg"]
    assert storage.open_files == 0
