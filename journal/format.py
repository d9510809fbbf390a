"""The journal's bytes: structures, constants and their conversion, pure functions only.

FORMAT.md beside this file explains every field and argues why a reader can trust what it finds.
Both logs, redo and undo, are segments of the same shape: a header page, batches, and (once sealed)
a footer. All numbers are little-endian; sizes are asserted beside each structure.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from journal.errors import Corruption, UnknownVersion

FORMAT_VERSION = 1
BLOCK = 4096  # granularity of versions, in bytes
ALIGN = 512  # batch headers begin at multiples of this
HEADER_PAGE = 4096  # a segment's header takes the first page
SUM_SMALL = 4096  # payloads below SUM_LARGE carry a checksum per SUM_SMALL bytes
SUM_LARGE = 65536  # larger ones one per SUM_LARGE bytes
BLOCKS_MAX = 1 << 32  # bitmaps of blocks hold 32-bit numbers: a disk has at most 16 TiB
SEGMENT_ID_MAX = 1 << 28  # fits the location word of the index

SEGMENT_MAGIC = b"CDPSEGMT"
BATCH_MAGIC = b"CDPBATCH"
FOOTER_MAGIC = b"CDPFOOTR"
TRAILER_MAGIC = b"CDPTRAIL"


class Log(enum.IntEnum):
    """Which log a segment belongs to."""

    REDO = 1
    UNDO = 2


class Kind(enum.IntEnum):
    """What a record is. Numbers are part of the format and never reused."""

    LOST = 0  # only in tables read back: a record whose batch is damaged; never in a file
    WRITE = 1  # blocks, payload = their content
    ZERO = 2  # blocks became zero
    TRIM = 3  # blocks were discarded: masked, read as zero
    REF = 4  # blocks became what they were at seq ``arg``
    BOOKMARK = 16  # body: label, target, consistency ...
    ROLLBACK_BEGIN = 17  # body: target seq, id, disks
    ROLLBACK_COMMIT = 18
    ROLLBACK_ABORT = 19
    GAP_BEGIN = 20  # body: reason
    GAP_END = 21
    RESIZE = 22  # body: size in bytes
    CRASH = 23  # body: bounds of what may have been lost
    CLOCK = 24  # body: wall-clock minus stamp, from this stamp on
    UNBOOKMARK = 25  # body: label
    IMAGE = 32  # undo log: blocks' content just before seq ``arg``
    IMAGE_ZERO = 33  # undo log: they were zero just before seq ``arg``


VERSIONS = frozenset({Kind.WRITE, Kind.ZERO, Kind.TRIM, Kind.REF})
CONTROLS = frozenset(k for k in Kind if 16 <= k < 32)
CARRY_BLOCKS = frozenset({Kind.WRITE, Kind.IMAGE})  # payload = nblocks * BLOCK bytes

SEGMENT_HEADER = struct.Struct("<8sII16sQ16sQQQQQQQ")
assert SEGMENT_HEADER.size == 112
BATCH_HEADER = struct.Struct("<8sII16sQQQQQQQQQIIQQ")
assert BATCH_HEADER.size == 128
ENTRY = struct.Struct("<QQIBBH")
assert ENTRY.size == 24
FOOTER_HEADER = struct.Struct("<8sIIIIQQQQIIQ")
assert FOOTER_HEADER.size == 72
TRAILER = struct.Struct("<8sQQQQQQQ")
assert TRAILER.size == 64
U64 = struct.Struct("<Q")

# A batch's table as it lies in the file.
ENTRY_DTYPE = np.dtype(
    {
        "names": ["block", "arg", "nblocks", "kind", "flags"],
        "formats": ["<u8", "<u8", "<u4", "u1", "u1"],
        "offsets": [0, 8, 16, 20, 21],
        "itemsize": ENTRY.size,
    }
)
# The same with what a reader would otherwise derive: where the payload lies in the segment's file
# and the first of its checksums. Row i of a segment's table is record first_seq + i.
ROW_DTYPE = np.dtype(
    {
        "names": ["block", "arg", "nblocks", "kind", "flags", "payload", "sum"],
        "formats": ["<u8", "<u8", "<u4", "u1", "u1", "<u8", "<u4"],
        "offsets": [0, 8, 16, 20, 21, 24, 32],
        "itemsize": 40,
    }
)
BATCH_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("first_seq", "<u8"),
        ("stamp", "<u8"),
        ("barrier", "<u8"),
        ("chain", "<u8"),
        ("first_row", "<u4"),
        ("count", "<u4"),
    ]
)
assert BATCH_DTYPE.itemsize == 48

checksum = xxhash.xxh3_64_intdigest


class SegmentHeader(NamedTuple):
    """First page of a segment.

    ``cut``: records of older segments above this seq are void. ``highest``: the highest seq that
    any older file holds, void or not. ``durable``: what was known to be durable when it was made.
    """

    log: int
    disk: bytes
    segment: int
    identity: bytes
    first_seq: int
    predecessor: int
    predecessor_chain: int
    cut: int
    stamp: int
    highest: int = 0
    durable: int = 0
    version: int = FORMAT_VERSION


class BatchHeader(NamedTuple):
    """One append. ``durable``, ``applied`` and ``window_start`` as known when it was made."""

    disk: bytes
    segment: int
    offset: int
    first_seq: int
    stamp: int
    barrier: int
    durable: int
    applied: int
    window_start: int
    previous: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs
    sums: int
    payload_bytes: int
    chain: int

    @property
    def table_bytes(self) -> int:
        """Bytes of header, entries and checksums together."""
        return BATCH_HEADER.size + self.count * ENTRY.size + self.sums * 8

    @property
    def size(self) -> int:
        """Bytes from this header to where the next one begins."""
        return align(self.table_bytes + self.payload_bytes)


def align(size: int) -> int:
    """``size`` rounded up to a multiple of ALIGN."""
    return -(-size // ALIGN) * ALIGN


def sum_unit(nbytes: int) -> int:
    """Bytes that one checksum of a payload of ``nbytes`` covers."""
    return SUM_SMALL if nbytes < SUM_LARGE else SUM_LARGE


def sum_count(nbytes: int) -> int:
    """How many checksums a payload of ``nbytes`` carries."""
    return -(-nbytes // sum_unit(nbytes))


def payload_sums(payload: bytes | bytearray | memoryview) -> list[int]:
    """The checksums of one payload, in order."""
    nbytes = len(payload)
    unit = sum_unit(nbytes)
    if nbytes <= unit:
        return [checksum(payload)] if nbytes else []
    view = memoryview(payload)
    return [checksum(view[at : at + unit]) for at in range(0, nbytes, unit)]


def payload_bytes(kind: int, nblocks: int, arg: int) -> int:
    """Bytes of content that a record carries (without padding)."""
    if kind in CARRY_BLOCKS:
        return nblocks * BLOCK
    return arg if kind in CONTROLS else 0


def pack_segment_header(header: SegmentHeader) -> bytes:
    """The header page, HEADER_PAGE bytes; its checksum starts the segment's chain."""
    body = SEGMENT_HEADER.pack(
        SEGMENT_MAGIC,
        header.version,
        header.log,
        header.disk,
        header.segment,
        header.identity,
        header.first_seq,
        header.predecessor,
        header.predecessor_chain,
        header.cut,
        header.stamp,
        header.highest,
        header.durable,
    )
    return (body + U64.pack(checksum(body))).ljust(HEADER_PAGE, b"\0")


def unpack_segment_header(page: bytes, *, file: str) -> tuple[SegmentHeader, int]:
    """The header and its checksum.

    :raises Corruption: wrong magic or checksum.
    :raises UnknownVersion: written by a newer format.
    """
    if len(page) < SEGMENT_HEADER.size + 8 or page[:8] != SEGMENT_MAGIC:
        raise Corruption("no segment header", file=file)
    body = page[: SEGMENT_HEADER.size]
    fields = SEGMENT_HEADER.unpack(body)
    (own,) = U64.unpack_from(page, SEGMENT_HEADER.size)
    # The checksum lies at the same place in all versions: damage is told from a newer one.
    if own != checksum(body):
        raise Corruption("damaged segment header", file=file)
    if fields[1] > FORMAT_VERSION:
        raise UnknownVersion(file, fields[1], FORMAT_VERSION)
    return SegmentHeader._make((*fields[2:13], fields[1])), own


def segment_seed(header: SegmentHeader) -> int:
    """What the checksums of a segment's batches and of its footer are seeded with.

    A part of the random identity: bytes that a client wrote (its disk may well hold journals of its
    own), or a batch of another segment's life, cannot pass for a batch or a trailer of this one,
    not even where the next batch behind a damaged place is looked for.
    """
    return int.from_bytes(header.identity[:8], "little")


CHAIN_AT = BATCH_HEADER.size - 8  # the checksum is the header's last field
# Header, table and checksums of a batch as one structure, by the numbers of records and checksums.
BATCH_SHAPES: dict[tuple[int, int], struct.Struct] = {}
_SHAPES_MAX = 4096


def batch_shape(count: int, sums: int) -> struct.Struct:
    """What BATCH_SHAPES has, or a new one."""
    shape = BATCH_SHAPES.get((count, sums))
    if shape is None:
        shape = struct.Struct(f"{BATCH_HEADER.format}{'QQIBBH' * count}{sums}Q")
        if len(BATCH_SHAPES) < _SHAPES_MAX and count <= 1024:
            BATCH_SHAPES[count, sums] = shape
    return shape


def pack_batch(
    *,
    disk: bytes,
    segment: int,
    offset: int,
    first_seq: int,
    stamp: int,
    barrier: int,
    durable: int,
    applied: int,
    window_start: int,
    previous: int,
    entries: Sequence[int],
    sums: Sequence[int],
    payload_bytes: int,
    seed: int,
) -> tuple[bytearray, int]:
    """Header and table of a batch, and its checksum (the next link of the chain).

    ``entries`` is flat: block, arg, nblocks, kind, flags, 0 for each record. ``seed`` is the
    segment's (:func:`segment_seed`).
    """
    count = len(entries) // 6
    nsums = len(sums)
    batch = bytearray(BATCH_HEADER.size + ENTRY.size * count + 8 * nsums)
    batch_shape(count, nsums).pack_into(
        batch,
        0,
        BATCH_MAGIC,
        FORMAT_VERSION,
        count,
        disk,
        segment,
        offset,
        first_seq,
        stamp,
        barrier,
        durable,
        applied,
        window_start,
        previous,
        nsums,
        0,
        payload_bytes,
        0,
        *entries,
        *sums,
    )
    chain = checksum(batch, seed)
    U64.pack_into(batch, CHAIN_AT, chain)
    return batch, chain


def unpack_batch_header(data: bytes | bytearray | memoryview) -> BatchHeader | None:
    """The header at the start of ``data``, or None when there is no batch (wrong magic).

    The checksum is not looked at: see :func:`batch_is_whole`. A segment's own header tells whether
    it is of a newer format; a batch that says so in one of ours is damaged.
    """
    if len(data) < BATCH_HEADER.size or bytes(data[:8]) != BATCH_MAGIC:
        return None
    fields = BATCH_HEADER.unpack_from(data)
    if fields[1] > FORMAT_VERSION:
        return None
    (_, _, count, disk, segment, own, first, stamp, barrier, durable, applied, window, previous) = (
        fields[:13]
    )
    sums, _, payload, chain = fields[13:]
    return BatchHeader(
        disk, segment, own, first, stamp, barrier, durable, applied, window, previous,
        count, sums, payload, chain,
    )  # fmt: skip


def batch_is_whole(header: BatchHeader, table: bytes | bytearray | memoryview, seed: int) -> bool:
    """Whether header and table (``header.table_bytes`` bytes) carry the right checksum."""
    view = memoryview(table)[: header.table_bytes]
    if len(view) < header.table_bytes:
        return False
    state = xxhash.xxh3_64(view[:CHAIN_AT], seed=seed)
    state.update(b"\0\0\0\0\0\0\0\0")
    state.update(view[BATCH_HEADER.size :])
    return state.intdigest() == header.chain
