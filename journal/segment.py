"""Segments of either log: their names, listing, scanning, and verified reads of payloads.

Reading never writes. A file that is gone raises `Vanished`: the reader's snapshot is too old.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from pyroaring import BitMap

from journal.errors import Corruption, UnknownVersion, Unreadable, Vanished
from journal.format import (
    ALIGN,
    BATCH_DTYPE,
    BATCH_HEADER,
    BATCH_MAGIC,
    BLOCK,
    ENTRY,
    FOOTER_HEADER,
    FORMAT_VERSION,
    HEADER_PAGE,
    ROW_DTYPE,
    SUM_LARGE,
    SUM_SMALL,
    TRAILER,
    BatchHeader,
    Log,
    SegmentHeader,
    align,
    batch_is_whole,
    checksum,
    payload_bytes,
    segment_seed,
    sum_count,
    sum_unit,
    unpack_batch_header,
    unpack_segment_header,
)
from journal.storage import File, Storage
from journal.table import (
    ENDLESS,
    PAGE,
    Footer,
    Table,
    TableBuilder,
    Trailer,
    derive_rows,
    pack_footer,
    payload_sizes,
    table_of_heads,
    unpack_trailer,
)

__all__ = [  # what lies in `table` is part of a segment as well: one place to import it from
    "DIRECTORY", "ENDLESS", "PAGE", "SUFFIX", "TEMPORARY", "Break", "Footer", "Scanner",
    "SegmentInfo", "SegmentLister", "Table", "TableBuilder", "Trailer", "candidates", "derive_rows",
    "footer_offset", "load_footer", "load_table", "open_segment", "pack_footer",
    "payload_sizes", "read_blocks", "read_body", "read_info", "read_leniently", "read_rows",
    "row_sums", "segment_name",
    "sums_of", "table_of_heads", "unpack_trailer", "verify_rows", "with_bounds",
]  # fmt: skip

DIRECTORY: Final = {Log.REDO: "redo", Log.UNDO: "undo"}
SUFFIX: Final = ".seg"
TEMPORARY: Final = ".tmp"
_SCAN_BYTES: Final = 1 << 16
_SEARCH_BYTES: Final = 1 << 20


def segment_name(log: Log, segment: int) -> str:
    """Name of a segment's file below the journal directory."""
    return f"{DIRECTORY[log]}/{segment:08d}{SUFFIX}"


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentInfo:
    """One segment's file as listed. ``bound``: records above it are void (by a newer cut)."""

    name: str
    header: SegmentHeader
    chain: int
    size: int
    trailer: Trailer | None
    bound: int

    @property
    def segment(self) -> int:
        """The segment's number."""
        return self.header.segment

    @property
    def first_seq(self) -> int:
        """Seq of its first record (its next one while it is empty)."""
        return self.header.first_seq

    @property
    def sealed(self) -> bool:
        """Whether it carries a footer (nothing will be appended to it)."""
        return self.trailer is not None


def load_footer(file: File, info: SegmentInfo) -> Footer:
    """The footer of a sealed segment.

    :raises Corruption: it does not carry the checksum that the trailer names.
    """
    assert info.trailer is not None
    trailer, seed = info.trailer, segment_seed(info.header)
    # What the device cannot read is damage, as all else: the batches are asked instead.
    body = read_leniently(file, trailer.footer_offset, trailer.footer_bytes)
    if len(body) != trailer.footer_bytes or checksum(body, seed) != trailer.footer_sum:
        raise Corruption(
            "damaged footer", file=info.name, offset=trailer.footer_offset,
            first_seq=trailer.first_seq, last_seq=trailer.last_seq,
        )  # fmt: skip
    fields = FOOTER_HEADER.unpack_from(body)
    if fields[1] > FORMAT_VERSION:
        raise UnknownVersion(info.name, fields[1], FORMAT_VERSION)
    _, _, nrows, nsums, nbatches, first_seq = fields[:6]
    at = FOOTER_HEADER.size
    rows = np.frombuffer(body, ROW_DTYPE, nrows, at)
    at += nrows * ROW_DTYPE.itemsize
    sums = np.frombuffer(body, "<u8", nsums, at)
    at += nsums * 8
    batches = np.frombuffer(body, BATCH_DTYPE, nbatches, at)
    at += nbatches * BATCH_DTYPE.itemsize
    written = BitMap.deserialize(body[at : at + fields[9]])
    masks = BitMap.deserialize(body[at + fields[9] : at + fields[9] + fields[10]])
    table = Table(info.segment, first_seq, rows, sums, batches)
    return Footer(table, written, masks, fields[11])


# ---------------------------------------------------------------------------------------- listing
def open_segment(storage: Storage, name: str) -> File:
    """Open for reading.

    :raises Vanished: it is not there (any more).
    """
    try:
        return storage.open(name, "read")
    except FileNotFoundError:
        raise Vanished(f"{name} is gone: take a new snapshot") from None


def read_info(file: File, name: str, log: Log, disk: bytes) -> SegmentInfo:
    """Header and trailer of one segment; its ``bound`` is not known from itself.

    :raises Corruption: no readable header, or one of another disk or log.
    """
    header, chain = unpack_segment_header(file.read(0, HEADER_PAGE), file=name)
    if header.disk != disk or header.log != log or name != segment_name(log, header.segment):
        raise Corruption("segment of another disk, log or place", file=name)
    size = file.size()
    tail = b""
    if size >= HEADER_PAGE + PAGE:  # a page that cannot be read is no trailer: see the batches
        tail = read_leniently(file, size - TRAILER.size, TRAILER.size)
    trailer = unpack_trailer(tail, segment_seed(header))
    return SegmentInfo(name, header, chain, size, trailer, ENDLESS)


class SegmentLister:
    """Lists a log's segments; what can no longer change of a file is read once."""

    def __init__(self, storage: Storage, log: Log, disk: bytes) -> None:
        self._storage, self._log, self._disk = storage, log, disk
        self._known: dict[str, SegmentInfo] = {}
        self.damaged: dict[str, Corruption] = {}

    def refresh(self) -> list[SegmentInfo]:
        """All segments in order of their numbers, bounds filled in.

        A segment with an unreadable header is left out and noted in ``damaged``. Temporary names
        are not segments. A file that vanishes meanwhile is left out: callers that must not miss one
        compare the frontier's generation before and after.
        """
        names = [
            f"{DIRECTORY[self._log]}/{name}"
            for name in self._storage.list(DIRECTORY[self._log])
            if name.endswith(SUFFIX)
        ]
        for gone in self._known.keys() - set(names):
            del self._known[gone]
        self.damaged.clear()
        for name in names:
            known = self._known.get(name)
            if known is not None and known.sealed:
                continue
            try:
                file = open_segment(self._storage, name)
            except Vanished:
                self._known.pop(name, None)
                continue
            try:
                self._known[name] = read_info(file, name, self._log, self._disk)
            except Corruption as error:
                self.damaged[name] = error
                self._known.pop(name, None)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                self.damaged[name] = Unreadable("unreadable header", file=name)
                self._known.pop(name, None)
            finally:
                file.close()
        return with_bounds(self._known.values())


def with_bounds(infos: Iterable[SegmentInfo]) -> list[SegmentInfo]:
    """Sorted by number, each bounded by the smallest cut of the newer ones.

    Where seqs overlap the newer segment wins: it was copied from the older one by a recovery.
    """
    result: list[SegmentInfo] = []
    bound = ENDLESS
    for info in sorted(infos, key=lambda info: info.segment, reverse=True):
        result.append(info if info.bound == bound else dataclasses.replace(info, bound=bound))
        bound = min(bound, info.header.cut)
    return result[::-1]


# ----------------------------------------------------------------------------------------- scanning
@dataclasses.dataclass(frozen=True, slots=True)
class Break:
    """A place where a segment's chain of batches does not go on, but batches follow behind it.

    Damage where the records up to ``next_seq`` were durable; else the tail of a crash, whose writes
    reached the disk in any order. Records ``last_seq + 1 .. next_seq - 1`` are lost.
    """

    offset: int
    last_seq: int
    next_offset: int
    next_seq: int


class Scanner:
    """Reads the batches of one segment in order, from where it stopped the last time.

    After :meth:`advance`, ``offset`` is where the next batch would begin, ``chain`` the checksum it
    must name, ``builder`` the table so far, ``durable`` / ``applied`` / ``window_start`` the
    highest that any header stated, ``breaks`` the places that were passed over. It stops at the
    first place that is no batch of this segment continuing the chain, unless records behind it are
    known to exist: then the next batch is looked for, at multiples of ALIGN.
    """

    def __init__(self, file: File, info: SegmentInfo) -> None:
        self.file, self.info = file, info
        self.offset = HEADER_PAGE
        self.chain = info.chain
        self.builder = TableBuilder(info.segment, info.first_seq)
        self.durable = self.applied = self.window_start = self.barrier = 0
        self.stamp = info.header.stamp
        self.breaks: list[Break] = []
        self._window = b""
        self._window_at = 0
        self._seed = segment_seed(info.header)

    def _bytes(self, offset: int, length: int, *, fresh: bool = False) -> memoryview:
        end = self._window_at + len(self._window)
        if fresh or offset < self._window_at or offset + length > end:
            self._window = read_leniently(self.file, offset, max(length, _SCAN_BYTES))
            self._window_at = offset
        start = offset - self._window_at
        return memoryview(self._window)[start : start + length]

    def advance(self, upto: int, *, known: int | None = None) -> Table:
        """Take in batches whose first seq is at most ``upto``; the table of what was found.

        ``known``: the highest seq that is known to be in the log (default: ``upto``, if that is a
        bound); damage before it is passed over, with LOST rows for what is missing.
        """
        if known is None:
            known = 0 if upto == ENDLESS else upto
        fresh = True  # what was beyond the end the last time may have been written since
        while self.builder.next_seq <= upto:
            found = self._batch_at(self.offset, fresh=fresh)
            fresh = False
            if found is None or not self._continues(found[0]):
                if self.builder.next_seq > known or not self._pass_over():
                    break
                fresh = True
                continue
            header, table = found
            self.builder.add(header, table)
            self.chain = header.chain
            self.offset += header.size
            self.stamp = max(self.stamp, header.stamp)
            self.durable = max(self.durable, header.durable)
            self.applied = max(self.applied, header.applied)
            self.window_start = max(self.window_start, header.window_start)
            self.barrier = max(self.barrier, header.barrier)
        return self.builder.table().upto(upto)

    def _batch_at(self, offset: int, *, fresh: bool) -> tuple[BatchHeader, memoryview] | None:
        """A whole batch of this segment that belongs at this place, or None."""
        head = self._bytes(offset, BATCH_HEADER.size, fresh=fresh)
        header = unpack_batch_header(head)
        if (
            header is None
            or header.offset != offset
            or header.segment != self.info.segment
            or header.disk != self.info.header.disk
            or header.table_bytes > self.file.size() - offset
        ):
            return None
        table = self._bytes(offset, header.table_bytes)
        return (header, table) if batch_is_whole(header, table, self._seed) else None

    def _continues(self, header: BatchHeader) -> bool:
        return header.previous == self.chain and header.first_seq == self.builder.next_seq

    def _pass_over(self) -> bool:
        """Whether a batch was found behind the break at ``offset``; then that is where we are."""
        # From the break each time: what is appended later may lie within the file's present size.
        for offset in candidates(self.file, self.offset, self.file.size()):
            found = self._batch_at(offset, fresh=False)
            if found is None:
                continue
            header = found[0]
            missing = header.first_seq - self.builder.next_seq
            if not 0 <= missing <= (offset - self.offset) // ENTRY.size:
                continue
            self.breaks.append(
                Break(self.offset, self.builder.next_seq - 1, offset, header.first_seq)
            )
            if missing:
                self.builder.add_lost(missing, self.offset, self.stamp, self.barrier)
            self.offset, self.chain = offset, header.previous
            return True
        return False


def read_leniently(file: File, offset: int, length: int) -> bytes:
    """Like ``file.read``, with zeroes for pages that the device cannot read."""
    try:
        return file.read(offset, length)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    parts = []
    end = min(offset + length, file.size())
    while offset < end:
        step = min(end, (offset // PAGE + 1) * PAGE) - offset
        try:
            parts.append(file.read(offset, step))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            parts.append(bytes(step))
        offset += step
    return b"".join(parts)


def candidates(file: File, start: int, end: int) -> Iterator[int]:
    """Offsets from ``start`` on, multiples of ALIGN, where a batch's magic stands."""
    while start < end:
        window = read_leniently(file, start, min(_SEARCH_BYTES, end - start))
        if not window:
            return
        at = window.find(BATCH_MAGIC)
        while at >= 0:
            if (start + at) % ALIGN == 0:
                yield start + at
            at = window.find(BATCH_MAGIC, at + 1)
        start += len(window) // ALIGN * ALIGN or len(window)


def load_table(file: File, info: SegmentInfo, *, upto: int = ENDLESS) -> Table:
    """A segment's table, from the footer when it is whole, else from the batches.

    Only records up to ``upto`` and the segment's bound. Those must be known to be in the log
    (durable): damaged batches before are passed over, their records are LOST rows.
    """
    upto = min(upto, info.bound)
    if info.trailer is not None:
        try:
            return load_footer(file, info).table.upto(upto)
        except Corruption:
            # The batches say the same; scrub reports the footer.
            return Scanner(file, info).advance(min(upto, info.trailer.last_seq))
    return Scanner(file, info).advance(upto)


# ----------------------------------------------------------------------------------------- payloads
def read_blocks(file: File, table: Table, row: int, first: int, count: int, *, name: str) -> bytes:
    """``count`` blocks of a row's content from its ``first`` block on, verified.

    :raises Corruption: a checksum does not match, or the file is too short.
    """
    entry = table.rows[row]
    nbytes = payload_bytes(int(entry["kind"]), int(entry["nblocks"]), int(entry["arg"]))
    return _read_verified(file, table, row, nbytes, first * BLOCK, count * BLOCK, name)


def read_body(file: File, table: Table, row: int, *, name: str) -> bytes:
    """The body of a control record, verified.

    :raises Corruption: a checksum does not match, or the file is too short.
    """
    length = int(table.rows[row]["arg"])
    return _read_verified(file, table, row, length, 0, length, name)


def _read_verified(
    file: File, table: Table, row: int, nbytes: int, start: int, length: int, name: str
) -> bytes:
    if not length:
        return b""
    unit = sum_unit(nbytes)
    low, high = start // unit * unit, min(nbytes, -(-(start + length) // unit) * unit)
    offset = int(table.rows[row]["payload"]) + low
    data = file.read(offset, high - low)
    sums = table.sums[int(table.rows[row]["sum"]) :]
    view = memoryview(data)
    for number in range(low // unit, -(-high // unit)):
        piece = view[number * unit - low : min((number + 1) * unit, nbytes) - low]
        whole = min((number + 1) * unit, nbytes) - number * unit
        if len(piece) != whole or checksum(piece) != int(sums[number]):
            raise Corruption(
                "checksum mismatch", file=name, offset=offset + number * unit - low,
                first_seq=table.first_seq + row, last_seq=table.first_seq + row,
            )  # fmt: skip
    return data if (low, high) == (start, start + length) else data[start - low :][:length]


def _first_bad(view: memoryview, start: int, rows: np.ndarray, sums: np.ndarray) -> int:
    """Which of consecutive rows is the first whose payload lacks its checksums; -1 if none does.

    ``view`` is the file's content from offset ``start`` on, ``sums`` those of the table.
    """
    sizes = payload_sizes(rows)
    unit = np.where(sizes < SUM_LARGE, SUM_SMALL, SUM_LARGE)
    counts = (sizes + unit - 1) // unit
    number = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(number)) - np.repeat(np.cumsum(counts) - counts, counts)
    payload = rows["payload"].astype(np.int64) - start
    low = payload[number] + within * unit[number]
    high = np.minimum(low + unit[number], (payload + sizes)[number])
    wanted = sums[int(rows["sum"][0]) :][: len(number)].tolist()
    found = [checksum(view[at:end]) for at, end in zip(low.tolist(), high.tolist(), strict=True)]
    if found == wanted and (not len(high) or int(high[-1]) <= len(view)):
        return -1
    for at, (got, want) in enumerate(zip(found, wanted, strict=False)):
        if got != want or int(high[at]) > len(view):
            return int(number[at])
    return int(number[len(wanted)])


def _payload_range(rows: np.ndarray) -> tuple[int, int]:
    """Where the payloads of consecutive rows of one batch begin, and how long they are."""
    start = int(rows["payload"][0])
    last = int(payload_sizes(rows[-1:])[0])
    return start, int(rows["payload"][-1]) - start + -(-last // 8) * 8


def read_rows(file: File, table: Table, first: int, count: int, *, name: str) -> bytes:
    """The payloads of consecutive rows of one batch as they lie there, padding included, verified.

    :raises Corruption: a checksum does not match, or the file is too short.
    """
    if not count:
        return b""
    rows = table.rows[first : first + count]
    start, length = _payload_range(rows)
    data = file.read(start, length)
    bad = _first_bad(memoryview(data), start, rows, table.sums)
    if bad >= 0 or len(data) < length:
        seq = table.first_seq + first + max(bad, 0)
        raise Corruption(
            "checksum mismatch", file=name, offset=int(rows["payload"][max(bad, 0)]),
            first_seq=seq, last_seq=seq,
        )  # fmt: skip
    return data


def verify_rows(file: File, table: Table) -> int:
    """How many of the rows, from the first on, have a payload that carries its checksums.

    A page that the device cannot read counts as damaged.
    """
    for batch in table.batches:
        first, count = int(batch["first_row"]), int(batch["count"])
        if not count:
            continue
        rows = table.rows[first : first + count]
        start, length = _payload_range(rows)
        data = read_leniently(file, start, length)
        bad = _first_bad(memoryview(data), start, rows, table.sums)
        if bad >= 0:
            return first + bad
    return len(table.rows)


def sums_of(table: Table, first: int, count: int) -> np.ndarray:
    """The checksums of consecutive rows' payloads (u64)."""
    if not count:
        return table.sums[:0]
    last = table.rows[first + count - 1]
    nbytes = payload_bytes(int(last["kind"]), int(last["nblocks"]), int(last["arg"]))
    return table.sums[int(table.rows["sum"][first]) : int(last["sum"]) + sum_count(nbytes)]


def row_sums(table: Table, row: int) -> np.ndarray:
    """The checksums of one row's payload (u64)."""
    return sums_of(table, row, 1)


def footer_offset(offset: int) -> int:
    """Where a footer begins when the batches end at ``offset``."""
    return align(offset)
