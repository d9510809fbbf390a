"""Bytes and values: sizes, round trips, and what is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from journal import format as fmt
from journal.errors import Corruption, UnknownVersion
from journal.format import BatchHeader, Kind, Log, SegmentHeader

DISK = b"0123456789abcdef"
HEADER = SegmentHeader(
    Log.REDO, DISK, 7, b"identity" * 2, first_seq=100, predecessor=6, predecessor_chain=1 << 63,
    cut=99, stamp=123, highest=99, durable=90,
)  # fmt: skip
SEED = fmt.segment_seed(HEADER)


def pack(
    entries: list[int], sums: list[int], payload: int = 0, **changes: int
) -> tuple[bytearray, int]:
    fields = {
        "segment": 7, "offset": 4096, "first_seq": 100, "stamp": 5, "barrier": 4, "durable": 3,
        "applied": 2, "window_start": 1, "previous": 9, "seed": SEED,
    }  # fmt: skip
    return fmt.pack_batch(
        disk=DISK, entries=entries, sums=sums, payload_bytes=payload, **(fields | changes)
    )


def test_segment_header_round_trip() -> None:
    page = fmt.pack_segment_header(HEADER)
    assert len(page) == fmt.HEADER_PAGE
    found, chain = fmt.unpack_segment_header(page, file="f")
    assert found == HEADER
    assert chain == fmt.checksum(page[: fmt.SEGMENT_HEADER.size])


@pytest.mark.parametrize("at", [0, 7, 8, 20, 60, 111, 112, 119])
def test_segment_header_damage_is_noticed(at: int) -> None:
    page = bytearray(fmt.pack_segment_header(HEADER))
    page[at] ^= 0x40
    with pytest.raises(Corruption):  # also of the version, which is byte 8
        fmt.unpack_segment_header(bytes(page), file="f")


def test_newer_segment_is_refused_with_the_reason() -> None:
    page = fmt.pack_segment_header(HEADER._replace(version=fmt.FORMAT_VERSION + 1))
    with pytest.raises(UnknownVersion, match="format version 2, this program knows up to 1"):
        fmt.unpack_segment_header(page, file="redo/00000007.seg")


def test_a_newer_batch_is_none() -> None:
    """The segment's header would have said so."""
    batch, _ = pack([1, 0, 1, 2, 0, 0], [])
    struct.pack_into("<I", batch, 8, fmt.FORMAT_VERSION + 1)
    assert fmt.unpack_batch_header(batch) is None


def test_no_batch() -> None:
    assert fmt.unpack_batch_header(bytes(512)) is None
    assert fmt.unpack_batch_header(b"CDPBATCH") is None


@given(
    st.lists(
        st.tuples(
            st.integers(0, (1 << 64) - 1),
            st.integers(0, (1 << 64) - 1),
            st.integers(0, (1 << 32) - 1),
            st.sampled_from(sorted(Kind)),
            st.integers(0, 255),
        ),
        max_size=40,
    ),
    st.lists(st.integers(0, (1 << 64) - 1), max_size=40),
    st.integers(0, 1 << 40),
)
def test_batch_round_trip(
    records: list[tuple[int, int, int, int, int]], sums: list[int], payload: int
) -> None:
    entries = [number for record in records for number in (*record, 0)]
    batch, chain = pack(entries, sums, payload)
    header = fmt.unpack_batch_header(batch)
    assert header == BatchHeader(
        DISK, 7, 4096, 100, 5, 4, 3, 2, 1, 9, len(records), len(sums), payload, chain
    )
    assert header.table_bytes == len(batch)
    assert header.size % fmt.ALIGN == 0
    assert 0 <= header.size - len(batch) - payload < fmt.ALIGN
    assert fmt.batch_is_whole(header, batch, SEED)
    found = list(fmt.ENTRY.iter_unpack(batch[128 : 128 + 24 * len(records)]))
    assert [record[:5] for record in found] == records


@given(st.integers(0, 128 + 24 + 8 - 1), st.integers(1, 255))
def test_any_flipped_byte_is_noticed(at: int, flip: int) -> None:
    batch, _ = pack([1, 2, 3, 4, 5, 0], [6])
    header = fmt.unpack_batch_header(batch)
    assert header is not None
    batch[at] ^= flip
    damaged = fmt.unpack_batch_header(batch)
    assert damaged is None or not fmt.batch_is_whole(damaged, batch, SEED)
    assert not fmt.batch_is_whole(header, batch, SEED) or 120 <= at < 128


def test_a_batch_of_another_identity_is_not_whole() -> None:
    """! What a client writes, or a segment's earlier life, must not pass for a batch."""
    batch, _ = pack([1, 0, 1, 2, 0, 0], [])
    header = fmt.unpack_batch_header(batch)
    assert header is not None
    other = fmt.segment_seed(HEADER._replace(identity=b"someone else 123"))
    assert fmt.batch_is_whole(header, batch, SEED)
    assert not fmt.batch_is_whole(header, batch, other)
    assert not fmt.batch_is_whole(header, batch, 0)


def test_a_short_table_is_not_whole() -> None:
    batch, _ = pack([1, 0, 1, 2, 0, 0], [5])
    header = fmt.unpack_batch_header(batch)
    assert header is not None
    assert not fmt.batch_is_whole(header, batch[:-1], SEED)


@pytest.mark.parametrize(
    ("nbytes", "unit", "count"),
    [
        (0, 4096, 0), (1, 4096, 1), (4096, 4096, 1), (8192, 4096, 2), (65535, 4096, 16),
        (65536, 65536, 1), (65537, 65536, 2), (1 << 20, 65536, 16),
    ],
)  # fmt: skip
def test_checksums_of_a_payload(nbytes: int, unit: int, count: int) -> None:
    payload = bytes(range(256)) * (nbytes // 256 + 1)
    payload = payload[:nbytes]
    assert fmt.sum_unit(nbytes) == unit
    assert fmt.sum_count(nbytes) == count
    sums = fmt.payload_sums(payload)
    assert sums == [fmt.checksum(payload[at : at + unit]) for at in range(0, nbytes, unit)]


def test_kinds_are_what_they_were() -> None:
    """Numbers in files: they are never reused or changed."""
    assert {kind.name: kind.value for kind in Kind} == {
        "LOST": 0, "WRITE": 1, "ZERO": 2, "TRIM": 3, "REF": 4, "BOOKMARK": 16,
        "ROLLBACK_BEGIN": 17, "ROLLBACK_COMMIT": 18, "ROLLBACK_ABORT": 19, "GAP_BEGIN": 20,
        "GAP_END": 21, "RESIZE": 22, "CRASH": 23, "CLOCK": 24, "UNBOOKMARK": 25, "IMAGE": 32,
        "IMAGE_ZERO": 33,
    }  # fmt: skip


def test_payload_bytes_follow_from_kind() -> None:
    assert fmt.payload_bytes(Kind.WRITE, 3, 0) == 3 * fmt.BLOCK
    assert fmt.payload_bytes(Kind.IMAGE, 1, 99) == fmt.BLOCK
    assert fmt.payload_bytes(Kind.BOOKMARK, 0, 77) == 77
    for kind in (Kind.ZERO, Kind.TRIM, Kind.REF, Kind.IMAGE_ZERO):
        assert fmt.payload_bytes(kind, 5, 99) == 0


def test_layout_of_the_format_document() -> None:
    """The offsets that FORMAT.md names, read from bytes."""
    page = fmt.pack_segment_header(HEADER)
    assert page[:8] == b"CDPSEGMT"
    assert struct.unpack_from("<II", page, 8) == (1, 1)
    assert page[16:32] == DISK
    assert struct.unpack_from("<Q", page, 32) == (7,)
    assert page[40:56] == HEADER.identity
    assert struct.unpack_from("<7Q", page, 56) == (100, 6, 1 << 63, 99, 123, 99, 90)
    assert struct.unpack_from("<Q", page, 112) == (fmt.checksum(page[:112]),)
    batch, chain = pack([11, 12, 13, 1, 15, 0], [16], 8192)
    assert batch[:8] == b"CDPBATCH"
    assert struct.unpack_from("<II", batch, 8) == (1, 1)
    assert batch[16:32] == DISK
    assert struct.unpack_from("<9Q", batch, 32) == (7, 4096, 100, 5, 4, 3, 2, 1, 9)
    assert struct.unpack_from("<IIQQ", batch, 104) == (1, 0, 8192, chain)
    assert struct.unpack_from("<QQIBBHQ", batch, 128) == (11, 12, 13, 1, 15, 0, 16)
    zeroed = bytes(batch[:120]) + bytes(8) + bytes(batch[128:])
    assert chain == fmt.checksum(zeroed, SEED)
