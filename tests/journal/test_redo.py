"""The redo writer: what is durable when, what happens when something fails, two threads at once."""

from __future__ import annotations

import errno
import itertools
import json
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from pyroaring import BitMap

from journal.bitmaps import Bitmaps
from journal.errors import JournalFull, Poisoned
from journal.format import (
    BLOCK,
    HEADER_PAGE,
    Kind,
    Log,
    SegmentHeader,
    pack_batch,
    payload_sums,
    segment_seed,
)
from journal.recovery import recover
from journal.redo import (
    WRITEBACK_BYTES,
    ZEROES_AHEAD,
    Appended,
    RedoStart,
    RedoWriter,
    create_segment,
)
from journal.segment import (
    PAGE,
    SegmentLister,
    load_footer,
    load_table,
    open_segment,
    read_blocks,
    read_body,
    segment_name,
)
from journal.storage import Buffer, RealStorage, Storage
from tests.crash.sim_storage import SimStorage

DISK = b"redo writer test"
MARKS = {"barrier": 0, "applied": 0, "window_start": 0}
Hook = Callable[[int], None]


def identities() -> Callable[[], bytes]:
    numbers = itertools.count(1)
    return lambda: next(numbers).to_bytes(16, "little")


def writer_on(
    storage: Storage,
    *,
    segment_bytes: int = 32768,
    on_segment: Hook | None = None,
    on_durable: Hook | None = None,
) -> RedoWriter:
    started = recover(storage, DISK, durable_hint=0, applied_hint=0, stamp=1, identity=identities())
    return RedoWriter(
        storage, DISK, started.start, segment_bytes=segment_bytes, identity=identities(),
        on_segment=on_segment, on_durable=on_durable,
    )  # fmt: skip


def write(writer: RedoWriter, *blocks: int, stamp: int = 10, fill: int = 7) -> Appended:
    """One batch of one-block writes."""
    data = bytes([fill]) * BLOCK
    entries = [number for block in blocks for number in (block, 0, 1, Kind.WRITE, 0, 0)]
    return writer.append(
        entries, payload_sums(data) * len(blocks), [data] * len(blocks), BLOCK * len(blocks),
        stamp=stamp, **MARKS,
    )  # fmt: skip


def change(writer: RedoWriter, kind: Kind, block: int, nblocks: int, arg: int = 0) -> Appended:
    """A record without content."""
    return writer.append([block, arg, nblocks, kind, 0, 0], [], [], 0, stamp=10, **MARKS)


@pytest.fixture
def storage() -> SimStorage:
    return SimStorage(0)


# ------------------------------------------------------------------------------------ appending


def test_append_writes_what_pack_batch_packs(storage: SimStorage) -> None:
    """It packs by itself, for speed."""
    writer = writer_on(storage)
    write(writer, 1)
    segment = writer._open
    previous, offset = segment.chain, writer.segment_offset
    contents = [b"a" * BLOCK, b"b" * 2 * BLOCK]
    sums = [checksum for data in contents for checksum in payload_sums(data)]
    entries = [5, 0, 1, Kind.WRITE, 0, 0, 9, 0, 2, Kind.WRITE, 3, 0, 4, 0, 100, Kind.TRIM, 0, 0]
    done = writer.append(
        entries, sums, contents, 3 * BLOCK, stamp=77, barrier=1, applied=2, window_start=3
    )
    batch, chain = pack_batch(
        disk=DISK, segment=1, offset=offset, first_seq=2, stamp=77, barrier=1, durable=0,
        applied=2, window_start=3, previous=previous, entries=entries, sums=sums,
        payload_bytes=3 * BLOCK, seed=segment_seed(segment.header),
    )  # fmt: skip
    assert done == Appended(2, 4, 1, offset + len(batch))
    assert isinstance(done, Appended)
    end = offset + len(batch) + 3 * BLOCK
    content = storage.live[segment_name(Log.REDO, 1)].live
    assert content[offset:end] == bytes(batch) + b"".join(contents)
    assert segment.chain == chain
    assert writer.segment_offset == -(-end // 512) * 512
    # Zeroes at least up to the end of the page, so that the next append need not read it.
    assert len(content) % 4096 == 0
    assert not any(content[end:])
    assert len(content) <= end + PAGE + ZEROES_AHEAD


def test_small_appends_find_zeroes_that_are_there_already(storage: SimStorage) -> None:
    """They change no size, so that a sync is one of data; sealing leaves none behind the footer."""
    writer = writer_on(storage, segment_bytes=1 << 20)
    sizes = set()
    for block in range(12):
        write(writer, block)
        sizes.add(len(storage.live[segment_name(Log.REDO, 1)].live))
    assert len(sizes) == 1
    for block in range(24):
        write(writer, block)
        assert len(storage.live[segment_name(Log.REDO, 1)].live) >= writer.segment_offset
    writer.close()
    info = SegmentLister(storage, Log.REDO, DISK).refresh()[0]
    assert info.trailer is not None
    assert info.size < writer.segment_offset + PAGE + 4096
    assert load_table(open_segment(storage, info.name), info).last_seq == 36


def test_zeroes_do_not_pass_the_end_of_a_segment(storage: SimStorage) -> None:
    writer = writer_on(storage, segment_bytes=32768)
    write(writer, 1)
    assert len(storage.live[segment_name(Log.REDO, 1)].live) == 32768


def test_control_records(storage: SimStorage) -> None:
    writer = writer_on(storage)
    seq = writer.append_control(Kind.BOOKMARK, {"label": "x", "b": 1}, stamp=5, **MARKS)
    assert seq == writer.last_seq == 1
    info = SegmentLister(storage, Log.REDO, DISK).refresh()[0]
    file = open_segment(storage, info.name)
    table = load_table(file, info, upto=1)
    assert table.rows["kind"].tolist() == [Kind.BOOKMARK]
    assert json.loads(read_body(file, table, 0, name=info.name)) == {"label": "x", "b": 1}


def test_an_empty_batch_carries_the_watermark(storage: SimStorage) -> None:
    writer = writer_on(storage)
    write(writer, 1, 2)
    writer.sync()
    done = writer.append([], [], [], 0, stamp=20, barrier=2, applied=1, window_start=1)
    assert (done.first_seq, done.last_seq) == (3, 2)
    writer.sync()
    found = recover(
        storage.crash(), DISK, durable_hint=0, applied_hint=0, stamp=30, identity=identities()
    )
    assert found.applied == 1
    assert found.window_start == 1
    assert found.copied_bytes == 0  # the empty batch says that both records are durable


def test_a_full_segment_is_followed_by_another(storage: SimStorage) -> None:
    begun: list[tuple[int, int]] = []
    writer = writer_on(storage, on_segment=lambda n: begun.append((n, writer.last_seq)))
    segments = [write(writer, n, n + 1).segment for n in range(12)]
    assert segments == sorted(segments)
    assert segments[-1] == writer.segment == len(begun) + 1
    infos = SegmentLister(storage, Log.REDO, DISK).refresh()
    for before, info in itertools.pairwise(infos):
        assert info.header.predecessor == before.segment
        assert info.header.cut == info.first_seq - 1 == info.header.highest == before.bound
        file = open_segment(storage, before.name)
        table = load_table(file, before)
        assert table.last_seq == before.bound
        assert info.header.predecessor_chain == int(table.batches["chain"][-1])
        assert before.size <= 32768
    # Readers are told of a segment's name before a record is in it.
    assert begun == [(info.segment, info.first_seq - 1) for info in infos[1:]]


def test_a_record_larger_than_a_segment_gets_its_own(storage: SimStorage) -> None:
    writer = writer_on(storage)
    write(writer, 1)
    data = random.Random(0).randbytes(20 * BLOCK)
    done = writer.append(
        [0, 0, 20, Kind.WRITE, 0, 0], payload_sums(data), [data], len(data), stamp=5, **MARKS
    )
    assert done == Appended(2, 2, 2, HEADER_PAGE + 128 + 24 + 16)
    assert write(writer, 3).segment == 3
    writer.sync()
    info = SegmentLister(storage, Log.REDO, DISK).refresh()[1]
    file = open_segment(storage, info.name)
    assert read_blocks(file, load_table(file, info), 0, 0, 20, name=info.name) == data


def test_empty_batches_alone_do_not_fill_segments(storage: SimStorage) -> None:
    """Every segment but the newest holds a record: recovery can tell them by their seqs."""
    writer = writer_on(storage, segment_bytes=8192)
    for _ in range(30):
        writer.append([], [], [], 0, stamp=5, **MARKS)
    assert writer.segment == 1


# ---------------------------------------------------------------------------------- durability


def test_durable_is_what_was_appended_before_the_sync_was_called(storage: SimStorage) -> None:
    """! What is appended while fdatasync runs may miss it."""
    writer = writer_on(storage)
    write(writer, 1, 2)

    def during() -> None:
        storage.during_sync = None
        write(writer, 3)

    storage.during_sync = during
    assert writer.sync() == 2
    assert writer.durable == 2
    assert writer.last_seq == 3
    assert writer.unsynced_bytes > 0
    assert writer.sync() == 3
    assert writer.unsynced_bytes == 0


def test_durable_does_not_pass_a_segments_end_before_its_successor_is_there(
    storage: SimStorage,
) -> None:
    """! Segment synced, then successor's content and name: only then may durable rise past it."""
    risen: list[tuple[int, list[str]]] = []
    writer = writer_on(storage, on_durable=lambda seq: risen.append((seq, list(storage.log))))
    write(writer, *range(6))
    before = len(storage.log)
    write(writer, *range(3))
    assert writer.segment == 2
    writer.sync()
    ((seq, log),) = risen
    assert seq == 9
    done = log[before:]
    one, two = "sync redo/00000001.seg.tmp", "sync redo/00000002.seg"
    assert done[-3:] == [one, two, "sync_dir redo"]
    # Seals come after; the footer is durable by a sync of its own.
    assert storage.log[len(log) :] == [
        "allocate redo/00000001.seg.tmp", "write redo/00000001.seg.tmp", one
    ]  # fmt: skip


@pytest.mark.parametrize("failing", [("sync", 1), ("sync", 2), ("sync_dir", 1), ("sync", 3)])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_the_first_failed_sync_poisons(
    storage: SimStorage, failing: tuple[str, int], code: int
) -> None:
    """! The third sync here is that of a footer."""
    writer = writer_on(storage)
    write(writer, *range(6))
    write(writer, *range(3))
    call, number = failing
    storage.faults[call, storage.counts[call] + number] = code
    with pytest.raises(Poisoned, match="nothing is acknowledged"):
        writer.sync()
    assert writer.durable == (9 if failing == ("sync", 3) else 0)
    storage.faults.clear()
    for _ in range(2):
        with pytest.raises(Poisoned):
            writer.sync()
        with pytest.raises(Poisoned):
            write(writer, 1)
    with pytest.raises(Poisoned):
        writer.append_control(Kind.CLOCK, {}, stamp=9, **MARKS)
    assert writer.last_seq == 9
    writer.close()


def test_an_append_that_fails_for_another_reason_than_space_poisons(storage: SimStorage) -> None:
    writer = writer_on(storage)
    storage.faults["write", storage.counts["write"] + 1] = errno.EIO
    with pytest.raises(Poisoned):
        write(writer, 1)
    with pytest.raises(Poisoned):
        writer.sync()


def test_an_append_during_a_sync_that_fails_is_not_acknowledged(
    storage: SimStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writer_on(storage)
    write(writer, 1)

    file = writer.file(1)
    original = file.write

    def poisoned_meanwhile(offset: int, buffers: Sequence[Buffer]) -> None:
        original(offset, buffers)
        writer.poisoned = Poisoned("failed in the other thread")

    monkeypatch.setattr(file, "write", poisoned_meanwhile)
    with pytest.raises(Poisoned):
        write(writer, 2)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("place", ["batch", "create", "header"])
def test_no_space_appends_nothing(storage: SimStorage, code: int, place: str) -> None:
    writer = writer_on(storage)
    write(writer, *range(6))
    count = 3 if place != "batch" else 0
    call = "create" if place == "create" else "write"
    storage.faults[call, storage.counts[call] + 1] = code
    chain, offset, segment = writer._open.chain, writer.segment_offset, writer.segment
    with pytest.raises(JournalFull, match="free some"):
        write(writer, *range(count))
    assert (writer._open.chain, writer.segment_offset) == (chain, offset)
    assert writer.segment == segment
    assert writer.last_seq == 6
    assert storage.list("redo") == ["00000001.seg"]
    assert write(writer, 1, 2).first_seq == 7
    assert writer.sync() == 8
    found = recover(
        storage.crash(), DISK, durable_hint=0, applied_hint=0, stamp=30, identity=identities()
    )
    assert found.start.segment.header.cut == 8


@pytest.mark.parametrize("left", [0, 100, 3000, 4096, 9000])
def test_what_was_refused_leaves_nothing_behind(storage: SimStorage, left: int) -> None:
    """! A part of a batch was written: a recovery would say that an acknowledged one was lost."""
    writer = writer_on(storage, segment_bytes=1 << 20)
    write(writer, 1, 2)
    writer.sync()
    storage.space = storage.used() + left
    before = storage.used()
    with pytest.raises(JournalFull):
        write(writer, *range(40))  # more than the zeroes that are there already
    assert storage.used() <= before
    storage.space = 1 << 40
    found = recover(
        storage.kill(), DISK, durable_hint=2, applied_hint=0, stamp=30, identity=identities()
    )
    assert found.lost is None
    assert write(writer, 1, 2).first_seq == 3


@pytest.mark.parametrize("code", [0, errno.EDQUOT])
def test_zeroes_ahead_are_given_up_before_a_batch_is_refused(
    storage: SimStorage, code: int
) -> None:
    writer = writer_on(storage, segment_bytes=1 << 20)
    room = 3 * 4096
    storage.space = storage.used() + room
    if code:
        storage.faults["write", storage.counts["write"] + 1] = code
    for seq in (1, 2):
        assert write(writer, seq).first_seq == seq
    with pytest.raises(JournalFull):
        write(writer, 3, 4)
    storage.space = 1 << 40
    assert write(writer, 3).first_seq == 3
    assert writer.sync() == 3
    found = recover(
        storage.crash(), DISK, durable_hint=3, applied_hint=0, stamp=30, identity=identities()
    )
    assert (found.lost, found.start.segment.header.cut) == (None, 3)


def test_a_footer_without_space_is_written_later(storage: SimStorage) -> None:
    writer = writer_on(storage)
    write(writer, *range(6))
    write(writer, *range(3))
    storage.faults["write", storage.counts["write"] + 1] = errno.ENOSPC
    assert writer.sync() == 9
    assert not SegmentLister(storage, Log.REDO, DISK).refresh()[0].sealed
    assert writer.sync() == 9
    assert SegmentLister(storage, Log.REDO, DISK).refresh()[0].sealed


def test_oldest_unsynced_stamp(storage: SimStorage) -> None:
    writer = writer_on(storage)
    assert writer.oldest_unsynced_stamp == 0
    write(writer, 1, stamp=10)
    write(writer, 2, stamp=20)
    assert writer.oldest_unsynced_stamp == 10

    def during() -> None:
        storage.during_sync = None
        write(writer, 3, stamp=30)
        assert writer.oldest_unsynced_stamp == 10  # the sync has not succeeded yet

    storage.during_sync = during
    writer.sync()
    assert writer.oldest_unsynced_stamp == 30
    writer.sync()
    assert writer.oldest_unsynced_stamp == 0


def test_writeback_is_asked_for_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = RealStorage(tmp_path)
    writer = writer_on(storage, segment_bytes=64 << 20)
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(
        type(writer.file(1)), "writeback", lambda _, offset, length: calls.append((offset, length))
    )
    for _ in range(3):
        for _ in range(WRITEBACK_BYTES // (32 * BLOCK) // 2):
            write(writer, *range(32))
        writer.writeback_hint()
    ((offset, length),) = calls
    assert offset == HEADER_PAGE
    assert WRITEBACK_BYTES <= length < 2 * WRITEBACK_BYTES
    writer.close(seal_open=False)


# --------------------------------------------------------------------------------------- files


def test_files_stay_open_until_forgotten(storage: SimStorage) -> None:
    writer = writer_on(storage)
    for number in range(20):
        write(writer, number, number)
    before = storage.open_files
    assert before == writer.segment
    writer.forget_below(3)
    assert storage.open_files == before  # none is sealed yet: the sync needs them
    writer.sync()
    assert storage.open_files == before - 2
    first = writer.file(1)  # an older one may be asked for again
    assert first.read(0, 8) == b"CDPSEGMT"
    writer.forget_below(writer.segment)
    assert storage.open_files == 1
    assert writer.file(writer.segment).size() > 0
    writer.close()
    assert storage.open_files == 0


def test_a_clean_stop_seals(storage: SimStorage) -> None:
    writer = writer_on(storage)
    write(writer, 1, 2)
    writer.close()
    (info,) = SegmentLister(storage, Log.REDO, DISK).refresh()
    assert info.sealed
    found = recover(
        storage.crash(), DISK, durable_hint=2, applied_hint=0, stamp=30, identity=identities()
    )
    assert found.clean
    assert found.durable == 2


def test_close_without_sealing(storage: SimStorage) -> None:
    writer = writer_on(storage)
    write(writer, 1, 2)
    writer.close(seal_open=False)
    assert not SegmentLister(storage, Log.REDO, DISK).refresh()[0].sealed
    assert storage.open_files == 0


# ------------------------------------------------------------------------------- two real threads


@pytest.mark.slow
def test_a_loop_and_a_sync_thread(tmp_path: Path) -> None:
    """Whatever the interleaving: what `durable` says is in files that were synced, chain whole."""
    storage = RealStorage(tmp_path)
    writer = writer_on(storage, segment_bytes=1 << 18)
    stop = threading.Event()
    seen: list[int] = []

    def sync() -> None:
        while not stop.is_set():
            seen.append(writer.sync())

    thread = threading.Thread(target=sync)
    thread.start()
    last = 0
    for number in range(3000):
        last = write(writer, *range(number % 7), stamp=number + 1, fill=number % 256).last_seq
        if number % 100 == 0:
            writer.forget_below(writer.segment - 1)
        assert writer.durable <= last
        assert writer.unsynced_bytes >= 0
    stop.set()
    thread.join()
    assert seen == sorted(seen)
    writer.close()
    infos = SegmentLister(storage, Log.REDO, DISK).refresh()
    assert all(info.sealed for info in infos)
    found = 0
    for info in infos:
        file = open_segment(storage, info.name)
        footer = load_footer(file, info)
        assert footer.table.first_seq == found + 1
        assert footer.written == BitMap(footer.table.rows["block"].tolist())
        found = footer.table.last_seq
        file.close()
    assert found == last


# ----------------------------------------------------------------------------- bitmaps of footers


def test_footers_carry_masks_and_what_was_written(storage: SimStorage) -> None:
    writer = writer_on(storage)
    change(writer, Kind.TRIM, 0, 10)
    change(writer, Kind.ZERO, 3, 2)
    for _ in range(4):
        write(writer, 20, 21)
    change(writer, Kind.TRIM, 20, 1)
    for _ in range(4):
        write(writer, 5, 6)
    writer.close()
    infos = SegmentLister(storage, Log.REDO, DISK).refresh()
    footers = [load_footer(open_segment(storage, info.name), info) for info in infos]
    assert len(footers) == 3
    assert footers[0].masks == BitMap([0, 1, 2, 5, 6, 7, 8, 9])
    assert footers[0].written == BitMap([3, 4, 20, 21])
    assert footers[-1].masks == BitMap([0, 1, 2, 7, 8, 9, 20])


def test_refs_count_from_the_commit_on(storage: SimStorage) -> None:
    """! Neither footers nor masks take refs of a rollback that is not closed."""
    writer = writer_on(storage, segment_bytes=8192)
    change(writer, Kind.TRIM, 0, 10)
    begin = writer.append_control(Kind.ROLLBACK_BEGIN, {}, stamp=5, **MARKS)
    assert writer.rollback == begin
    change(writer, Kind.REF, 0, 4, arg=1)
    for _ in range(8):
        change(writer, Kind.REF, 100, 1, arg=1)
    writer.sync()
    writer.append_control(Kind.ROLLBACK_COMMIT, {}, stamp=5, **MARKS)
    assert writer.rollback == 0
    writer.close()
    infos = SegmentLister(storage, Log.REDO, DISK).refresh()
    footers = [load_footer(open_segment(storage, info.name), info) for info in infos]
    assert [footer.rollback for footer in footers] == [begin] * (len(footers) - 1) + [0]
    assert [footer.masks for footer in footers[:-1]] == [BitMap(range(10))] * (len(footers) - 1)
    assert not any(footer.written for footer in footers[:-1])
    assert footers[-1].masks == BitMap(range(4, 10))


def test_a_start_can_be_handed_on(storage: SimStorage) -> None:
    head = SegmentHeader(Log.REDO, DISK, 1, b"i" * 16, 1, 0, 0, 0, 1)
    start = RedoStart(create_segment(storage, head), Bitmaps(), 0)
    writer = RedoWriter(storage, DISK, start, segment_bytes=32768, identity=identities())
    change(writer, Kind.TRIM, 3, 1)
    writer.sync()
    second = RedoWriter(
        storage, DISK, writer.start_again(), segment_bytes=32768, identity=identities()
    )
    write(second, 1)
    second.close()
    (info,) = SegmentLister(storage, Log.REDO, DISK).refresh()
    assert load_footer(open_segment(storage, info.name), info).masks == BitMap([3])
