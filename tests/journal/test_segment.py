"""Tables, footers, listing, scanning past damage, verified reads."""

from __future__ import annotations

import random
import struct
from collections.abc import Set

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from journal.bitmaps import Bitmaps
from journal.errors import Corruption, Unreadable, Vanished
from journal.format import (
    BLOCK,
    HEADER_PAGE,
    Kind,
    Log,
    SegmentHeader,
    pack_batch,
    pack_segment_header,
    payload_sums,
    segment_seed,
)
from journal.redo import OpenSegment, RedoStart, RedoWriter, create_segment, seal
from journal.segment import (
    ENDLESS,
    Scanner,
    SegmentInfo,
    SegmentLister,
    Table,
    TableBuilder,
    load_footer,
    load_table,
    open_segment,
    pack_footer,
    read_blocks,
    read_body,
    read_info,
    read_leniently,
    read_rows,
    row_sums,
    segment_name,
    table_of_heads,
    unpack_trailer,
    verify_rows,
    with_bounds,
)
from tests.crash.sim_storage import SimStorage

DISK = b"segment tests :)"
NAME = "redo/00000001.seg"


def header(segment: int = 1, first_seq: int = 1, cut: int = 0, number: int = 0) -> SegmentHeader:
    identity = bytes([segment + number]) * 16
    return SegmentHeader(Log.REDO, DISK, segment, identity, first_seq, segment - 1, 0, cut, 1)


class Builder:
    """A segment with batches of records, and what was put in."""

    def __init__(self, storage: SimStorage, head: SegmentHeader | None = None) -> None:
        self.segment: OpenSegment = create_segment(storage, head or header())
        self.storage = storage
        self.contents: dict[int, bytes] = {}
        self.random = random.Random(1)
        self.writer = RedoWriter(
            storage, DISK,
            RedoStart(self.segment, Bitmaps(), self.segment.header.first_seq - 1),
            segment_bytes=1 << 30, identity=lambda: b"i" * 16,
        )  # fmt: skip

    def batch(self, *sizes: int, stamp: int = 10) -> None:
        """Writes of so many blocks each; a size of 0 is a control record."""
        entries, sums, payloads = [], [], []
        for number, size in enumerate(sizes):
            seq = self.writer.last_seq + 1 + number
            data = self.random.randbytes(size * BLOCK or 21)
            self.contents[seq] = data
            kind, arg = (Kind.WRITE, 0) if size else (Kind.BOOKMARK, 21)
            entries += [seq * 10, arg, size, kind, 0, 0]
            sums += payload_sums(data)
            payloads.append(data.ljust(-(-len(data) // 8) * 8, b"\0"))
        self.writer.append(
            entries, sums, payloads, sum(map(len, payloads)), stamp=stamp,
            barrier=0, applied=0, window_start=0,
        )  # fmt: skip

    def info(self) -> SegmentInfo:
        file = self.storage.open(NAME, "read")
        try:
            return read_info(file, NAME, Log.REDO, DISK)
        finally:
            file.close()

    def damage(self, offset: int, length: int = 1) -> None:
        content = self.storage.live[NAME].live
        for at in range(offset, offset + length):
            content[at] ^= 0x5A


@pytest.fixture
def storage() -> SimStorage:
    return SimStorage(0)


@pytest.fixture
def built(storage: SimStorage) -> Builder:
    builder = Builder(storage)
    builder.batch(1, 2, 0)
    builder.batch()
    builder.batch(20, 1, stamp=11)
    builder.batch(0, 0, 1, stamp=12)
    return builder


def check_contents(builder: Builder, table: Table, missing: Set[int] = frozenset()) -> None:
    file = open_segment(builder.storage, NAME)
    for row, entry in enumerate(table.rows):
        seq = table.first_seq + row
        if seq in missing:
            assert entry["kind"] == Kind.LOST
            continue
        want = builder.contents[seq]
        if entry["kind"] == Kind.BOOKMARK:
            assert read_body(file, table, row, name=NAME) == want
        else:
            blocks = int(entry["nblocks"])
            assert read_blocks(file, table, row, 0, blocks, name=NAME) == want
            assert entry["block"] == seq * 10
    file.close()


# --------------------------------------------------------------------------------------- tables


def test_scan_finds_what_was_written(built: Builder) -> None:
    table = load_table(open_segment(built.storage, NAME), built.info())
    assert (table.first_seq, table.last_seq) == (1, 8)
    assert table.batches["count"].tolist() == [3, 0, 2, 3]
    assert table.batches["first_seq"].tolist() == [1, 4, 4, 6]
    assert table.stamps().tolist() == [10, 10, 10, 11, 11, 12, 12, 12]
    assert [table.batch_of(row) for row in range(8)] == [0, 0, 0, 2, 2, 3, 3, 3]
    check_contents(built, table)


def test_footer_and_batches_say_the_same(built: Builder) -> None:
    scanned = load_table(open_segment(built.storage, NAME), built.info())
    seal(built.segment, Bitmaps(BitMap([3])))
    info = built.info()
    assert info.sealed
    assert info.trailer is not None
    assert (info.trailer.first_seq, info.trailer.last_seq) == (1, 8)
    assert info.trailer.chain == built.segment.chain
    footer = load_footer(open_segment(built.storage, NAME), info)
    for name in ("rows", "sums", "batches"):
        assert np.array_equal(getattr(footer.table, name), getattr(scanned, name))
    assert footer.masks == BitMap([3])
    assert footer.written == BitMap([10, 20, 21, *range(40, 60), 50, 80])
    check_contents(built, footer.table)


def test_layout_of_footer_and_trailer(built: Builder) -> None:
    """The offsets that FORMAT.md names, read from bytes."""
    at = built.segment.offset
    size = seal(built.segment, Bitmaps(BitMap([3]), rollback=6))
    content = bytes(built.storage.live[NAME].live)
    assert len(content) == size
    assert size % 4096 == 0
    seed = segment_seed(header())
    trailer = content[-64:]
    assert trailer[:8] == b"CDPTRAIL"
    offset, length, total, first, last, chain, own = struct.unpack_from("<7Q", trailer, 8)
    assert (offset, first, last, chain) == (at, 1, 8, built.segment.chain)
    assert own == xxhash.xxh3_64_intdigest(trailer[:56], seed)
    footer = content[offset : offset + length]
    assert total == xxhash.xxh3_64_intdigest(footer, seed)
    assert not any(content[offset + length : -64])
    assert footer[:8] == b"CDPFOOTR"
    version, rows, sums, batches = struct.unpack_from("<4I", footer, 8)
    assert (version, rows, batches) == (1, 8, 4)
    assert struct.unpack_from("<4Q", footer, 24) == (1, 8, 10, 12)
    written, masked, rollback = struct.unpack_from("<IIQ", footer, 56)
    assert rollback == 6
    assert length == 72 + rows * 40 + sums * 8 + batches * 48 + written + masked
    block, arg, nblocks, kind, flags, payload, number = struct.unpack_from("<QQIBB2xQI", footer, 72)
    assert (block, arg, nblocks, kind, flags, number) == (10, 0, 1, Kind.WRITE, 0, 0)
    assert content[payload : payload + BLOCK] == built.contents[1]
    assert list(struct.unpack_from("<Q", footer, 72 + rows * 40)) == payload_sums(built.contents[1])
    place = 72 + rows * 40 + sums * 8
    assert struct.unpack_from("<4Q", footer, place) == (HEADER_PAGE, 1, 10, 0)
    assert struct.unpack_from("<II", footer, place + 40) == (0, 3)
    maps = footer[place + batches * 48 :]
    assert BitMap.deserialize(maps[:written]) == BitMap([10, 20, 21, *range(40, 60), 50, 80])
    assert BitMap.deserialize(maps[written:]) == BitMap([3])


def test_footer_of_an_empty_segment(storage: SimStorage) -> None:
    builder = Builder(storage)
    seal(builder.segment, Bitmaps())
    info = builder.info()
    assert info.trailer is not None
    assert (info.trailer.first_seq, info.trailer.last_seq) == (1, 0)
    assert load_footer(open_segment(storage, NAME), info).table.last_seq == 0


def test_a_damaged_footer_is_not_believed_and_not_needed(built: Builder) -> None:
    seal(built.segment, Bitmaps())
    info = built.info()
    assert info.trailer is not None
    built.damage(info.trailer.footer_offset + 100)
    file = open_segment(built.storage, NAME)
    with pytest.raises(Corruption, match="damaged footer"):
        load_footer(file, info)
    check_contents(built, load_table(file, info))


def test_a_damaged_trailer_makes_it_unsealed(built: Builder) -> None:
    size = seal(built.segment, Bitmaps())
    built.damage(size - 20)
    info = built.info()
    assert not info.sealed
    check_contents(built, load_table(open_segment(built.storage, NAME), info))


def test_client_data_cannot_pass_for_a_trailer(storage: SimStorage) -> None:
    """! A client's disk may hold journals; a write of theirs may be the last thing in our file."""
    builder = Builder(storage)
    seed = segment_seed(header(number=1))
    inner = pack_footer(
        TableBuilder(1, 1).table(), BitMap(), BitMap(), offset=8192, chain=5, seed=seed
    )
    assert len(inner) == BLOCK
    assert unpack_trailer(inner, seed) is not None
    # 124 records of one block make header and table 4096 bytes: the payloads end a page.
    builder.batch(*[1] * 124)
    content = storage.live[NAME].live
    assert content.endswith(builder.contents[124])
    content[-BLOCK:] = inner
    assert not builder.info().sealed


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=8), st.data())
def test_cuts_of_a_table(sizes: list[list[int]], data: st.DataObject) -> None:
    builder = Builder(SimStorage(0))
    for batch in sizes:
        builder.batch(*batch)
    table = load_table(open_segment(builder.storage, NAME), builder.info())
    last = builder.writer.last_seq
    low = data.draw(st.integers(0, last))
    high = data.draw(st.integers(low, last + 2))
    part = table.above(low).upto(high)
    assert part.first_seq == low + 1
    assert part.last_seq == max(low, min(high, last))
    assert part.batches["count"].sum() == len(part.rows)
    starts = np.cumsum(part.batches["count"]) - part.batches["count"]
    assert part.batches["first_row"].tolist() == starts.tolist()
    seqs = part.first_seq + part.batches["first_row"]
    assert part.batches["first_seq"].tolist() == seqs.tolist()
    check_contents(builder, part)


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=8))
def test_a_table_grows_as_batches_come(sizes: list[list[int]]) -> None:
    storage = SimStorage(0)
    builder = Builder(storage)
    info = builder.info()
    scanner = Scanner(open_segment(storage, NAME), info)
    for batch in sizes:
        builder.batch(*batch)
        table = scanner.advance(ENDLESS)
        whole = Scanner(open_segment(storage, NAME), info).advance(ENDLESS)
        for name in ("rows", "sums", "batches"):
            assert np.array_equal(getattr(table, name), getattr(whole, name))


def test_scan_stops_at_the_bound(built: Builder) -> None:
    scanner = Scanner(open_segment(built.storage, NAME), built.info())
    assert scanner.advance(4).last_seq == 4  # inside a batch
    assert scanner.advance(3).last_seq == 3
    assert scanner.advance(ENDLESS).last_seq == 8


def test_an_empty_builder_has_a_table() -> None:
    table = TableBuilder(3, 7).table()
    assert (table.first_seq, table.last_seq) == (7, 6)


# --------------------------------------------------------------------------------------- damage


def offsets(built: Builder) -> list[int]:
    segment = built.segment
    table = table_of_heads(segment.number, 1, segment.heads, segment.sizes)
    return table.batches["offset"].tolist()


def test_batches_behind_a_damaged_one_are_found(built: Builder) -> None:
    """! Damage below what is durable takes what it hit, not everything behind it."""
    built.damage(offsets(built)[2] + 40)
    scanner = Scanner(open_segment(built.storage, NAME), built.info())
    table = scanner.advance(8)
    assert table.last_seq == 8
    check_contents(built, table, missing={4, 5})
    (broken,) = scanner.breaks
    assert (broken.offset, broken.last_seq, broken.next_seq) == (offsets(built)[2], 3, 6)
    assert table.stamps().tolist() == [10, 10, 10, 10, 10, 12, 12, 12]


def test_nothing_behind_a_break_is_believed_above_what_is_durable(built: Builder) -> None:
    built.damage(offsets(built)[2] + 40)
    scanner = Scanner(open_segment(built.storage, NAME), built.info())
    assert scanner.advance(ENDLESS).last_seq == 3
    assert scanner.advance(ENDLESS, known=3).last_seq == 3
    assert scanner.advance(3).last_seq == 3
    assert not scanner.breaks


def test_several_damaged_places(built: Builder) -> None:
    built.damage(offsets(built)[0] + 8)
    built.damage(offsets(built)[2], 600)
    scanner = Scanner(open_segment(built.storage, NAME), built.info())
    table = scanner.advance(8)
    check_contents(built, table, missing={1, 2, 3, 4, 5})
    assert [(b.last_seq, b.next_seq) for b in scanner.breaks] == [(0, 4), (3, 6)]


def test_what_comes_behind_damage_at_the_end_is_found_within_the_same_size(
    built: Builder,
) -> None:
    """The rest of a segment may be zeroes from the start: its size tells nothing."""
    built.segment.file.write(built.segment.offset, [bytes(1 << 16)])
    damaged = offsets(built)[3]
    built.damage(damaged)
    scanner = Scanner(open_segment(built.storage, NAME), built.info())
    assert scanner.advance(8).last_seq == 5
    built.batch(1)
    check_contents(built, scanner.advance(9), missing={6, 7, 8})


def test_damage_at_the_end_finds_nothing_and_stops(built: Builder) -> None:
    built.damage(offsets(built)[3] + 130)
    scanner = Scanner(open_segment(built.storage, NAME), built.info())
    assert scanner.advance(8).last_seq == 5
    assert scanner.advance(8).last_seq == 5


def test_a_batch_in_a_payload_is_not_found(built: Builder) -> None:
    """! Where the next batch is looked for, client data goes by: it must not be taken for one."""
    storage = built.storage
    other = create_segment(storage, header(number=9), name="redo/other")
    writer = RedoWriter(
        storage, DISK, RedoStart(other, Bitmaps(), 3), segment_bytes=1 << 30,
        identity=lambda: b"i" * 16,
    )  # fmt: skip
    start = offsets(built)[2]
    # The same disk, segment, offset and seq as the forged place needs; only the identity differs.
    other.offset = start + 4096
    writer.append([1, 0, 1, 2, 0, 0], [], [], 0, stamp=11, barrier=0, applied=0, window_start=0)
    forged = storage.live["redo/other"].live[start + 4096 : start + 4608]
    storage.live[NAME].live[start + 4096 : start + 4608] = forged
    built.damage(start + 40)
    table = Scanner(open_segment(storage, NAME), built.info()).advance(8)
    check_contents(built, table, missing={4, 5})


def test_a_seq_that_cannot_be_is_not_believed(built: Builder) -> None:
    """A record takes at least 24 bytes: no more can be missing than fit what was passed over."""
    offset = offsets(built)[2]
    built.damage(offset + 40)
    place = offset + 1024
    batch, _ = pack_batch(
        disk=DISK, segment=1, offset=place, first_seq=1 << 40, stamp=1, barrier=0, durable=0,
        applied=0, window_start=0, previous=0, entries=[1, 0, 1, 2, 0, 0], sums=[],
        payload_bytes=0, seed=segment_seed(header()),
    )  # fmt: skip
    built.storage.live[NAME].live[place : place + len(batch)] = batch
    table = Scanner(open_segment(built.storage, NAME), built.info()).advance(8)
    check_contents(built, table, missing={4, 5})


@given(st.integers(HEADER_PAGE, HEADER_PAGE + 40 * 4096), st.integers(1, 5000))
def test_damage_anywhere_never_yields_a_wrong_record(offset: int, length: int) -> None:
    storage = SimStorage(0)
    builder = Builder(storage)
    for sizes in ((1, 2, 0), (), (3, 1), (0, 0, 1), (17,), (1,)):
        builder.batch(*sizes)
    size = len(storage.live[NAME].live)
    offset = min(offset, size - 1)
    builder.damage(offset, min(length, size - offset))
    file = open_segment(storage, NAME)
    table = Scanner(file, builder.info()).advance(builder.writer.last_seq)
    for row, entry in enumerate(table.rows):
        seq = table.first_seq + row
        if entry["kind"] == Kind.LOST:
            continue
        try:
            if entry["kind"] == Kind.BOOKMARK:
                found = read_body(file, table, row, name=NAME)
            else:
                found = read_blocks(file, table, row, 0, int(entry["nblocks"]), name=NAME)
        except Corruption:
            continue
        assert found == builder.contents[seq]


def test_a_page_that_cannot_be_read_counts_as_damaged(built: Builder) -> None:
    built.storage.bad_pages.add((NAME, offsets(built)[2] // 4096))
    table = Scanner(open_segment(built.storage, NAME), built.info()).advance(8)
    assert table.last_seq == 8
    assert table.rows["kind"][3:5].tolist() == [Kind.LOST, Kind.LOST]


def test_lenient_reads(storage: SimStorage) -> None:
    storage.open("f", "create").write(0, [b"a" * 10000])
    storage.bad_pages.add(("f", 1))
    file = storage.open("f", "read")
    assert read_leniently(file, 4000, 5000) == b"a" * 96 + bytes(4096) + b"a" * 808
    assert read_leniently(file, 9000, 5000) == b"a" * 1000


# ------------------------------------------------------------------------------- verified reads


def test_reads_verify_what_they_touch_and_only_that(built: Builder) -> None:
    """A record of 20 blocks has one checksum per 64 KiB: blocks 0-15 and 16-19."""
    file = open_segment(built.storage, NAME)
    table = load_table(file, built.info())
    payload = int(table.rows["payload"][3])
    want = built.contents[4]
    for first, count in ((0, 20), (0, 1), (15, 2), (19, 1), (3, 7)):
        got = read_blocks(file, table, 3, first, count, name=NAME)
        assert got == want[first * BLOCK : (first + count) * BLOCK]
    built.damage(payload + 17 * BLOCK)
    assert read_blocks(file, table, 3, 0, 16, name=NAME) == want[: 16 * BLOCK]
    with pytest.raises(Corruption, match="checksum mismatch") as caught:
        read_blocks(file, table, 3, 19, 1, name=NAME)
    assert (caught.value.first_seq, caught.value.last_seq) == (4, 4)
    assert caught.value.offset == payload + 16 * BLOCK
    assert row_sums(table, 3).tolist() == payload_sums(want)


def test_rows_of_a_batch_are_read_and_verified(built: Builder) -> None:
    file = open_segment(built.storage, NAME)
    table = load_table(file, built.info())
    assert verify_rows(file, table) == 8
    whole = read_rows(file, table, 0, 3, name=NAME)
    assert whole == built.contents[1] + built.contents[2] + built.contents[3].ljust(24, b"\0")
    built.damage(int(table.rows["payload"][1]) + 4097)
    with pytest.raises(Corruption) as caught:
        read_rows(file, table, 0, 3, name=NAME)
    assert caught.value.first_seq == 2
    assert verify_rows(file, table) == 1
    built.storage.bad_pages.add((NAME, int(table.rows["payload"][0]) // 4096))
    assert verify_rows(file, table) == 0


def test_a_short_file_is_corrupt(built: Builder) -> None:
    file = open_segment(built.storage, NAME)
    table = load_table(file, built.info())
    del built.storage.live[NAME].live[int(table.rows["payload"][7]) + 100 :]
    with pytest.raises(Corruption):
        read_blocks(file, table, 7, 0, 1, name=NAME)
    with pytest.raises(Corruption):
        read_rows(file, table, 5, 3, name=NAME)


# -------------------------------------------------------------------------------------- listing


def test_listing(storage: SimStorage) -> None:
    for number, first, cut in ((1, 1, 0), (2, 10, 9), (3, 15, 14), (4, 12, 11), (5, 30, 20)):
        create_segment(storage, header(number, first, cut))
    create_segment(storage, header(9), name="redo/00000006.seg.tmp")
    storage.open("redo/00000007.seg", "create").write(0, [bytes(4096)])
    storage.open("redo/notes.txt", "create")
    lister = SegmentLister(storage, Log.REDO, DISK)
    infos = lister.refresh()
    # Where seqs overlap the newer segment wins: 4 was copied, by a recovery, from 2 and 3.
    assert [(info.segment, info.bound) for info in infos] == [
        (1, 9), (2, 11), (3, 11), (4, 20), (5, ENDLESS),
    ]  # fmt: skip
    assert list(lister.damaged) == ["redo/00000007.seg"]
    storage.unlink("redo/00000001.seg")
    storage.bad_pages.add(("redo/00000005.seg", 0))
    assert [info.segment for info in lister.refresh()] == [2, 3, 4]
    assert isinstance(lister.damaged["redo/00000005.seg"], Unreadable)
    assert with_bounds([]) == []


def test_a_segment_of_another_disk_or_place_is_damage(storage: SimStorage) -> None:
    create_segment(storage, header(1)._replace(disk=b"another disk....")).file.close()
    create_segment(storage, header(2), name=segment_name(Log.REDO, 3)).file.close()
    create_segment(storage, header(4)._replace(log=Log.UNDO), name=segment_name(Log.REDO, 4))
    lister = SegmentLister(storage, Log.REDO, DISK)
    assert lister.refresh() == []
    assert len(lister.damaged) == 3


def test_a_file_that_is_gone_has_vanished(storage: SimStorage) -> None:
    with pytest.raises(Vanished):
        open_segment(storage, "redo/00000001.seg")


def test_a_torn_header_is_damage(storage: SimStorage) -> None:
    page = pack_segment_header(header())
    storage.open(NAME, "create").write(0, [page[:100]])
    lister = SegmentLister(storage, Log.REDO, DISK)
    assert lister.refresh() == []
    assert NAME in lister.damaged
