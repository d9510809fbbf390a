"""What a segment says about its records: its table, and the footer that a sealed one carries.

A *table* has one row per record (ROW_DTYPE), the checksums of all payloads, one row per batch
(BATCH_DTYPE). A sealed segment carries it in its footer; of an open one, or one whose end was lost,
it is put together from the batches. Both ways give the same table.
"""

from __future__ import annotations

import dataclasses
from array import array
from typing import Final

import numpy as np
from pyroaring import BitMap

from journal.format import (
    BATCH_DTYPE,
    BATCH_HEADER,
    BLOCK,
    ENTRY,
    ENTRY_DTYPE,
    FOOTER_HEADER,
    FOOTER_MAGIC,
    FORMAT_VERSION,
    ROW_DTYPE,
    SUM_LARGE,
    SUM_SMALL,
    TRAILER,
    TRAILER_MAGIC,
    U64,
    BatchHeader,
    Kind,
    checksum,
)
from journal.storage import Buffer

PAGE: Final = 4096
ENDLESS: Final = (1 << 64) - 1  # a bound that bounds nothing


class Table:
    """What a segment says about its records. Row ``i`` is record ``first_seq + i``."""

    __slots__ = ("batches", "first_seq", "rows", "segment", "sums")

    def __init__(
        self, segment: int, first_seq: int, rows: np.ndarray, sums: np.ndarray, batches: np.ndarray
    ) -> None:
        self.segment = segment
        self.first_seq = first_seq
        self.rows = rows
        self.sums = sums
        self.batches = batches

    @property
    def last_seq(self) -> int:
        """Seq of the last record; ``first_seq - 1`` when there is none."""
        return self.first_seq + len(self.rows) - 1

    def upto(self, seq: int) -> Table:
        """The same table without records above ``seq``."""
        count = max(0, min(len(self.rows), seq - self.first_seq + 1))
        if count == len(self.rows):
            return self
        batches = self.batches[self.batches["first_seq"] <= seq].copy()
        if len(batches):
            kept = count - int(batches["first_row"][-1])
            batches["count"][-1] = min(int(batches["count"][-1]), kept)
        return Table(self.segment, self.first_seq, self.rows[:count], self.sums, batches)

    def above(self, seq: int) -> Table:
        """The same table without records up to ``seq``."""
        drop = max(0, min(len(self.rows), seq + 1 - self.first_seq))
        if not drop:
            return self
        ends = self.batches["first_row"].astype(np.int64) + self.batches["count"]
        batches = self.batches[(ends > drop) | (self.batches["first_seq"] > seq)].copy()
        if len(batches) and batches["first_row"][0] < drop:
            skipped = drop - int(batches["first_row"][0])
            batches["count"][0] -= skipped
            batches["first_seq"][0] += skipped
            batches["first_row"][0] += skipped
        batches["first_row"] -= drop
        return Table(self.segment, self.first_seq + drop, self.rows[drop:], self.sums, batches)

    def batch_of(self, row: int) -> int:
        """Number of the batch that holds a row."""
        return int(np.searchsorted(self.batches["first_row"], row, "right")) - 1

    def stamps(self) -> np.ndarray:
        """The stamp of every row (u64)."""
        return np.repeat(self.batches["stamp"], self.batches["count"])


class TableBuilder:
    """Puts a table together from batches, in order; numpy is touched only by :meth:`table`."""

    def __init__(self, segment: int, first_seq: int) -> None:
        self.segment = segment
        self.first_seq = first_seq
        self.next_seq = first_seq
        self._entries: list[Buffer] = []
        self._sums: list[Buffer] = []
        self._batches: list[tuple[int, int, int, int, int, int, int]] = []
        self._rows = 0
        nothing = [np.zeros(0, dtype) for dtype in (ROW_DTYPE, np.dtype("<u8"), BATCH_DTYPE)]
        self._table = Table(segment, first_seq, nothing[0], nothing[1], nothing[2])

    def add(self, header: BatchHeader, table: bytes | memoryview) -> None:
        """Take in one batch; ``table`` begins with the batch's header."""
        middle = BATCH_HEADER.size + header.count * ENTRY.size
        self.add_parts(
            header.offset, header.first_seq, header.stamp, header.barrier, header.chain,
            header.count, bytes(table[BATCH_HEADER.size : middle]),
            bytes(table[middle : header.table_bytes]),
        )  # fmt: skip

    def add_parts(
        self, offset: int, first_seq: int, stamp: int, barrier: int, chain: int, count: int,
        entries: Buffer, sums: Buffer,
    ) -> None:  # fmt: skip
        """The same from its parts, as the writer has them."""
        self._entries.append(entries)
        self._sums.append(sums)
        self._batches.append((offset, first_seq, stamp, barrier, chain, self._rows, count))
        self._rows += count
        self.next_seq = first_seq + count

    def add_lost(self, count: int, offset: int, stamp: int, barrier: int) -> None:
        """Rows for records whose batches cannot be read; ``offset`` is where the damage begins."""
        self.add_parts(
            offset, self.next_seq, stamp, barrier, 0, count, bytes(count * ENTRY.size), b""
        )

    def table(self) -> Table:
        """The table of all batches so far; only what is new since the last call is put together."""
        if self._batches:
            old = self._table
            entries = np.frombuffer(b"".join(self._entries), ENTRY_DTYPE)
            sums = np.frombuffer(b"".join(self._sums), "<u8")
            batches = np.array(self._batches, BATCH_DTYPE)
            rows = derive_rows(entries, batches, len(old.rows), len(old.sums))
            self._table = Table(
                self.segment,
                self.first_seq,
                np.concatenate([old.rows, rows]) if len(old.rows) else rows,
                np.concatenate([old.sums, sums]) if len(old.sums) else sums,
                np.concatenate([old.batches, batches]) if len(old.batches) else batches,
            )
            self._entries, self._sums, self._batches = [], [], []
        return self._table


def table_of_heads(segment: int, first_seq: int, heads: Buffer, sizes: array[int]) -> Table:
    """The table of all batches, from what their writer kept: ``heads`` has their headers, entries
    and checksums, one behind the other, ``sizes`` (32-bit) says how many bytes each.

    For the recorder's sync thread: some calls on everything at once, which let go of the
    interpreter's lock. One call for each batch keeps the loop, which wants it, from answering.
    """
    words = np.frombuffer(heads, "<u8")
    lengths = np.frombuffer(sizes, np.uint32).astype(np.int64) // 8
    starts = np.cumsum(lengths) - lengths
    counts = (words[starts + 1] >> np.uint64(32)).astype(np.int64)
    batches = np.empty(len(starts), BATCH_DTYPE)
    for name, word in (
        ("offset", 5),
        ("first_seq", 6),
        ("stamp", 7),
        ("barrier", 8),
        ("chain", 15),
    ):
        batches[name] = words[starts + word]
    batches["count"], batches["first_row"] = counts, np.cumsum(counts) - counts
    entries, after = ENTRY.size // 8 * counts, starts + BATCH_HEADER.size // 8
    rows = _gather(words, after, entries).view(ENTRY_DTYPE)
    sums = _gather(words, after + entries, starts + lengths - after - entries)
    return Table(segment, first_seq, derive_rows(rows, batches), sums, batches)


def _gather(words: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Stretches of an array, one behind the other."""
    moves = starts - (np.cumsum(lengths) - lengths)
    found: np.ndarray = words[np.repeat(moves, lengths) + np.arange(lengths.sum())]
    return found


def derive_rows(
    entries: np.ndarray, batches: np.ndarray, rows_before: int = 0, sums_before: int = 0
) -> np.ndarray:
    """Rows (ROW_DTYPE) from entries as in the file: where each payload is, its first sum.

    ``rows_before`` and ``sums_before``: how many the table has before the first of these batches.
    """
    rows = np.zeros(len(entries), ROW_DTYPE)
    for name in ENTRY_DTYPE.names or ():
        rows[name] = entries[name]
    if not len(entries):
        return rows
    size = payload_sizes(rows)
    unit = np.where(size < SUM_LARGE, SUM_SMALL, SUM_LARGE)
    sums = (size + unit - 1) // unit
    room = (size + 7) // 8 * 8
    sum_starts, starts = np.cumsum(sums) - sums, np.cumsum(room) - room
    occupied = batches["count"] > 0
    firsts = batches["first_row"][occupied].astype(np.int64) - rows_before
    counts = batches["count"][occupied].astype(np.int64)
    batch_sums = np.add.reduceat(sums, firsts)
    first_payload = (
        batches["offset"][occupied].astype(np.int64)
        + BATCH_HEADER.size
        + counts * ENTRY.size
        + batch_sums * 8
    )
    rows["payload"] = starts + np.repeat(first_payload - starts[firsts], counts)
    rows["sum"] = sum_starts + sums_before
    return rows


def payload_sizes(rows: np.ndarray) -> np.ndarray:
    """Bytes of content that each row carries, without padding (i64)."""
    kind = rows["kind"]
    carries = (kind == Kind.WRITE) | (kind == Kind.IMAGE)
    control = (kind >= 16) & (kind < 32)
    size = np.where(carries, rows["nblocks"].astype(np.int64) * BLOCK, 0)
    return np.where(control, rows["arg"].astype(np.int64), size)


# ------------------------------------------------------------------------------------------ footers
@dataclasses.dataclass(frozen=True, slots=True)
class Footer:
    """A sealed segment's table and the bitmaps as they stood at its end.

    ``written``: blocks with a version in this segment that is no trim. ``masks``: blocks whose
    newest version up to the segment's end is a trim. Refs of a rollback that was still open are in
    neither; ``rollback`` is the seq of its begin, 0 if none was open.
    """

    table: Table
    written: BitMap
    masks: BitMap
    rollback: int = 0


def pack_footer(
    table: Table, written: BitMap, masks: BitMap, *, offset: int, chain: int, seed: int,
    rollback: int = 0,
) -> bytes:  # fmt: skip
    """Footer, padding and trailer; ``offset`` (a multiple of ALIGN) is where it will begin.

    The result ends at a multiple of PAGE, so that the trailer is the last 64 bytes of the file.
    """
    maps = [written.serialize(), masks.serialize()]
    stamps = table.batches["stamp"]
    head = FOOTER_HEADER.pack(
        FOOTER_MAGIC, FORMAT_VERSION, len(table.rows), len(table.sums), len(table.batches),
        table.first_seq, table.last_seq,
        int(stamps[0]) if len(stamps) else 0, int(stamps[-1]) if len(stamps) else 0,
        len(maps[0]), len(maps[1]), rollback,
    )  # fmt: skip
    body = b"".join(
        [head, table.rows.tobytes(), table.sums.tobytes(), table.batches.tobytes(), *maps]
    )
    trailer = TRAILER.pack(
        TRAILER_MAGIC, offset, len(body), checksum(body, seed),
        table.first_seq, table.last_seq, chain, 0,
    )[:-8]  # fmt: skip
    trailer += U64.pack(checksum(trailer, seed))
    end = -(-(offset + len(body) + TRAILER.size) // PAGE) * PAGE
    return body.ljust(end - offset - TRAILER.size, b"\0") + trailer


def unpack_trailer(data: bytes, seed: int) -> Trailer | None:
    """The trailer in the last 64 bytes of a segment, or None when it is not sealed (or damaged).

    An open segment may end in bytes that a client wrote: only the seed tells them apart.
    """
    if len(data) < TRAILER.size:
        return None
    data = data[-TRAILER.size :]
    if data[:8] != TRAILER_MAGIC or checksum(data[:-8], seed) != U64.unpack_from(data, 56)[0]:
        return None
    return Trailer(*TRAILER.unpack(data)[1:7])


@dataclasses.dataclass(frozen=True, slots=True)
class Trailer:
    """The last 64 bytes of a sealed segment: where its footer lies and how its chain ended."""

    footer_offset: int
    footer_bytes: int
    footer_sum: int
    first_seq: int
    last_seq: int
    chain: int
