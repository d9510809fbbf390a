"""The writer of the redo log: appends in the caller's thread, syncs and seals in another.

A batch is appended with one gathered write, zeroes up to the end of its page behind it, the
position left at the batch's own end: an unaligned append would else have to read a page that the
cache has dropped. Behind small batches the zeroes reach further now and then, so that those that
follow change no size and allocate nothing: an append then takes half the time, and an fdatasync
need not commit anything to the file system's log. Where there was time for it a segment is all
zeroes from the start (`spares`). A segment that is full is left as it is and a new one begun
(`append`); the sync thread makes it durable, adds its footer, and syncs that (`sync`).

Threads. `append` and everything else run in one thread, the loop's; `sync` and `writeback_hint` in
one other, one call at a time. They share, under the interpreter's lock and without one of ours:

* `_unsealed`, the segments not sealed yet, oldest first, the last one open. The loop appends to the
  list, the sync thread removes from its front, and works on a copy.
* of each segment: everything is written by the loop, until its successor is in the list; from then
  on the loop only reads it. `offset` and `heads` are brought up to date before `last_seq`.
* `last_seq`, written by the loop after the record's bytes and its segment's place in `_unsealed`.
  The sync thread reads it FIRST and copies the list THEN: every record up to the number it read
  lies in a file of its copy, and was written before the fdatasync that follows. What is appended
  meanwhile has a higher number and waits for the next sync.
* `durable`, `poisoned`: written by the sync thread (`poisoned` by both, never taken back), read by
  all.
* `_files` is changed under `_lock`, for closing a file concerns both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, NoReturn

from journal.bitmaps import Bitmaps
from journal.errors import JournalFull, Poisoned
from journal.format import (
    BATCH_MAGIC,
    BATCH_SHAPES,
    CHAIN_AT,
    CONTROLS,
    FORMAT_VERSION,
    HEADER_PAGE,
    SEGMENT_ID_MAX,
    U64,
    Kind,
    Log,
    SegmentHeader,
    batch_shape,
    checksum,
    pack_segment_header,
    payload_sums,
    segment_seed,
    unpack_segment_header,
)
from journal.segment import (
    DIRECTORY,
    PAGE,
    footer_offset,
    pack_footer,
    segment_name,
    table_of_heads,
)
from journal.spares import Spares
from journal.storage import Buffer, File, Storage

WRITEBACK_BYTES: Final = 8 << 20
# How far the zeroes behind a batch below SMALL_BYTES reach beyond the end of its page. Not further:
# into a page of a large folio a small write takes longer, and each fdatasync writes them.
ZEROES_AHEAD: Final = 64 << 10
SMALL_BYTES: Final = 16 << 10
_ZEROES: Final = memoryview(bytes(ZEROES_AHEAD + PAGE))
_PAGE_MASK: Final = PAGE - 1
_PACK_SUM: Final = U64.pack_into
_NEW: Final = tuple.__new__  # skips the named tuple's own constructor
_IN_ROLLBACK: Final = {Kind.REF, *CONTROLS}
_REDO: Final = DIRECTORY[Log.REDO]


class Appended(NamedTuple):
    """Where an append went. ``payload``: offset in the segment of the first record's content."""

    first_seq: int
    last_seq: int
    segment: int
    payload: int


def is_full(error: OSError) -> bool:
    """Whether it is about space: nothing is broken, and what failed may be tried again."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass(slots=True)
class OpenSegment:
    """A segment being written, or waiting for its footer. ``offset``: where the next batch goes.

    ``heads`` and ``sizes``: see `segment.table_of_heads`.
    """

    header: SegmentHeader
    file: File
    chain: int
    offset: int = HEADER_PAGE
    heads: bytearray = dataclasses.field(default_factory=bytearray)
    sizes: array[int] = dataclasses.field(default_factory=lambda: array("I"))
    number: int = 0
    seed: int = 0
    written_back: int = HEADER_PAGE
    zeroed: int = HEADER_PAGE

    def __post_init__(self) -> None:
        self.number, self.seed = self.header.segment, segment_seed(self.header)


@dataclasses.dataclass(slots=True)
class RedoStart:
    """Where a writer goes on: the open segment, and the bitmaps as they stand where it begins.

    Everything up to ``last_seq`` is durable. ``rollback``: seq of the begin of one that is open.
    """

    segment: OpenSegment
    bitmaps: Bitmaps
    last_seq: int
    rollback: int = 0


def create_segment(storage: Storage, header: SegmentHeader, *, name: str = "") -> OpenSegment:
    """A new file with its header; neither it nor its name is durable yet.

    On an error nothing is left behind, if that can be helped.
    """
    assert 0 < header.segment < SEGMENT_ID_MAX
    name = name or segment_name(Log(header.log), header.segment)
    file = storage.open(name, "create")
    page = pack_segment_header(header)
    try:
        file.write(0, [page])
    except OSError:
        file.close()
        storage.unlink(name)
        raise
    return OpenSegment(header, file, unpack_segment_header(page, file=name)[1])


def use_spare(storage: Storage, header: SegmentHeader, spare: File, *, name: str) -> OpenSegment:
    """The same of a file of zeroes that has the name ``name`` now; on an error it is removed."""
    segment = segment_name(Log.REDO, header.segment)
    page = pack_segment_header(header)
    try:
        spare.write(0, [page])
        storage.rename(name, segment)
        zeroed = spare.size()
    except OSError:
        spare.close()
        with contextlib.suppress(OSError):  # the next recovery does it
            storage.unlink(name)
        raise
    chain = unpack_segment_header(page, file=segment)[1]
    return OpenSegment(header, spare, chain, zeroed=zeroed)


def seal(segment: OpenSegment, bitmaps: Bitmaps) -> int:
    """Write the footer of a segment whose batches are durable; ``bitmaps`` move over it.

    The caller syncs the file. Returns the file's size. The order is what lets a reader trust a
    footer: where one is whole, every record of the segment was durable before it was written.
    """
    table = table_of_heads(
        segment.number, segment.header.first_seq, segment.heads, segment.sizes
    )  # fmt: skip
    moved = bitmaps.copy()
    written = moved.advance(table)
    at = footer_offset(segment.offset)
    footer = pack_footer(
        table, written, moved.masks, offset=at, chain=segment.chain, seed=segment.seed,
        rollback=moved.rollback,
    )  # fmt: skip
    segment.file.allocate(at)  # the trailer is what the file ends with: no zeroes behind it
    segment.file.write(at, [footer])
    bitmaps.masks, bitmaps.rollback, bitmaps.pending = moved.masks, moved.rollback, moved.pending
    return at + len(footer)


class RedoWriter:
    """Appends records to a disk's redo log.

    *Appended*: in the page cache; a reader of this process sees it, a crash of the host may take
    it. *Durable*: everything up to ``durable``, which is what had been appended when the last
    successful sync was **called**. *Poisoned*: a sync failed, or a write did for another reason
    than lack of space; nothing can be appended or synced any more, and nothing may be acknowledged,
    until a recovery has copied what lies above ``durable``.

    ``on_segment(number)`` is called in `append` when a new segment's name has appeared, before a
    record is in it; ``on_durable(seq)`` in `sync`, in the sync thread, as soon as ``durable`` has
    risen and before segments are sealed.
    """

    def __init__(
        self,
        storage: Storage,
        disk: bytes,
        start: RedoStart,
        *,
        segment_bytes: int,
        identity: Callable[[], bytes],
        on_segment: Callable[[int], None] | None = None,
        on_durable: Callable[[int], None] | None = None,
        spares: Spares | None = None,
    ) -> None:
        assert len(disk) == 16
        assert segment_bytes % PAGE == 0
        assert segment_bytes > HEADER_PAGE
        self._storage, self._disk, self._identity = storage, disk, identity
        self._segment_bytes = segment_bytes
        self._on_segment, self._on_durable = on_segment, on_durable
        self.spares = Spares(storage, segment_bytes, 0) if spares is None else spares
        self._bitmaps = start.bitmaps  # the sync thread's, at the front of _unsealed
        self._open = start.segment
        self._unsealed = [start.segment]
        self._files = {start.segment.number: start.segment.file}
        self._lock = threading.Lock()
        self._keep_from = 0
        self._names_durable = start.segment.number
        self._rollback = start.rollback
        self._appended_bytes = self._durable_bytes = 0
        self._first_stamp = self._syncing_stamp = 0
        self.poisoned: Poisoned | None = None
        self.last_seq = start.last_seq
        self.durable = start.last_seq

    @property
    def appended_bytes(self) -> int:
        """What this writer has appended."""
        return self._appended_bytes

    @property
    def segment_bytes(self) -> int:
        """How large a segment becomes."""
        return self._segment_bytes

    # ------------------------------------------------------------------------ the loop's thread
    def append(
        self,
        entries: Sequence[int],
        sums: Sequence[int],
        payloads: Sequence[Buffer],
        payload_bytes: int,
        *,
        stamp: int,
        barrier: int,
        applied: int,
        window_start: int,
    ) -> Appended:
        """Append one batch with a single write.

        ``entries`` is flat, six numbers a record (see `format.pack_batch`); ``sums`` the checksums
        of all payloads (`format.payload_sums`); each payload is padded to a multiple of 8 bytes,
        ``payload_bytes`` their total. No entries: an empty batch, which carries the watermarks.

        :raises JournalFull: no space; nothing was appended, the same may be tried again.
        :raises Poisoned: the journal must be recovered first.
        """
        if self.poisoned is not None:
            raise self.poisoned
        if self._rollback:
            assert not entries or set(entries[3::6]) <= _IN_ROLLBACK, "only refs until it is closed"
        # Written out here instead of calling `format.pack_batch`, for speed; a test compares them.
        count = len(entries) // 6
        nsums = len(sums)
        table_bytes = 128 + 24 * count + 8 * nsums
        used = table_bytes + payload_bytes
        size = (used + 511) & -512
        segment = self._open
        offset = segment.offset
        if offset + size > self._segment_bytes and self.last_seq >= segment.header.first_seq:
            segment = self._roll(stamp)
            offset = HEADER_PAGE
        first = self.last_seq + 1
        head = bytearray(table_bytes)
        (BATCH_SHAPES.get((count, nsums)) or batch_shape(count, nsums)).pack_into(
            head, 0,
            BATCH_MAGIC, FORMAT_VERSION, count, self._disk, segment.number, offset, first, stamp,
            barrier, self.durable, applied, window_start, segment.chain, nsums, 0, payload_bytes, 0,
            *entries, *sums,
        )  # fmt: skip
        chain = checksum(head, segment.seed)
        _PACK_SUM(head, CHAIN_AT, chain)
        end = offset + used
        zeroes = -end & _PAGE_MASK
        if used < SMALL_BYTES and end > segment.zeroed:
            zeroes = max(zeroes, min(zeroes + ZEROES_AHEAD, self._segment_bytes - end))
            segment.zeroed = end + zeroes
        try:
            self._write(segment, offset, [head, *payloads, _ZEROES[:zeroes]], end)
        except OSError as error:
            self._failed(error, f"append to segment {segment.number}")
        segment.heads += head
        segment.sizes.append(table_bytes)
        segment.chain = chain
        segment.offset = offset + size
        self._appended_bytes += size
        self.last_seq = last = first + count - 1
        # After last_seq: a sync that takes the old stamp away then also covers this record.
        if not self._first_stamp:
            self._first_stamp = stamp
        if self.poisoned is not None:
            raise self.poisoned
        return _NEW(Appended, (first, last, segment.number, offset + table_bytes))

    def append_control(
        self,
        kind: Kind,
        body: Mapping[str, object],
        *,
        stamp: int,
        barrier: int,
        applied: int,
        window_start: int,
        block: int = 0,
        flags: int = 0,
    ) -> int:
        """Append a record that is no version, its body as JSON; its seq."""
        assert 16 <= kind < 32
        data = json.dumps(body, separators=(",", ":"), sort_keys=True).encode()
        padded = data.ljust(-(-len(data) // 8) * 8, b"\0")
        done = self.append(
            [block, len(data), 0, kind, flags, 0], payload_sums(data), [padded], len(padded),
            stamp=stamp, barrier=barrier, applied=applied, window_start=window_start,
        )  # fmt: skip
        if kind == Kind.ROLLBACK_BEGIN:
            self._rollback = done.first_seq
        elif kind in (Kind.ROLLBACK_COMMIT, Kind.ROLLBACK_ABORT):
            self._rollback = 0
        return done.first_seq

    def _roll(self, stamp: int) -> OpenSegment:
        """Begin a new segment: what is cheap of it; the old one is sealed by the next sync."""
        old = self._open
        header = SegmentHeader(
            Log.REDO, self._disk, old.number + 1, self._identity(),
            first_seq=self.last_seq + 1, predecessor=old.number, predecessor_chain=old.chain,
            cut=self.last_seq, stamp=stamp, highest=self.last_seq, durable=self.durable,
        )  # fmt: skip
        spare = self.spares.take()
        try:
            if spare is None:
                new = create_segment(self._storage, header)
            else:
                new = use_spare(self._storage, header, spare[1], name=spare[0])
        except OSError as error:
            self._failed(error, f"begin segment {header.segment}")
        with self._lock:
            self._files[new.number] = new.file
        self._unsealed.append(new)
        self._open = new
        if self._on_segment is not None:
            self._on_segment(new.number)
        return new

    def _write(self, segment: OpenSegment, offset: int, buffers: list[Buffer], end: int) -> None:
        """Write a batch up to ``end``, and zeroes. Nothing is left of it when there is no space,
        also not when the spares are given up, and the zeroes that are there only for speed.
        """
        while True:
            try:
                return segment.file.write(offset, buffers)
            except OSError as error:
                if not is_full(error):
                    raise
                self._take_back(segment)
                needed = -end & _PAGE_MASK
                if not self.spares.discard():
                    if len(buffers[-1]) <= needed:
                        raise
                    buffers[-1] = _ZEROES[:needed]

    def _take_back(self, segment: OpenSegment) -> None:
        """Remove what was written of a batch: it was refused, and a recovery that found it would
        take it for one that was lost. Also, what little space there is stays free.
        """
        end = segment.offset + (-segment.offset & _PAGE_MASK)
        with contextlib.suppress(OSError):  # it is said already what is wrong
            if segment.file.size() > end:
                segment.file.allocate(end)
            segment.zeroed = end
            if end > segment.offset:
                segment.file.write(segment.offset, [_ZEROES[: end - segment.offset]])

    def _failed(self, error: OSError, what: str) -> NoReturn:
        """Lack of space is the caller's to handle; everything else ends this writer's life."""
        if is_full(error):
            raise JournalFull(
                f"no space to {what}: free some on the journal's file system"
            ) from error
        self._poison(error, what)

    def _poison(self, error: OSError, what: str) -> NoReturn:
        poisoned = Poisoned(
            f"could not {what} ({error.strerror or error}): nothing is acknowledged until the disk "
            "has been started again"
        )
        if self.poisoned is None:
            self.poisoned = poisoned
        raise poisoned from error

    @property
    def segment(self) -> int:
        """Number of the open segment."""
        return self._open.number

    @property
    def segment_offset(self) -> int:
        """Where the next batch would begin in it."""
        return self._open.offset

    @property
    def rollback(self) -> int:
        """Seq of the begin of the rollback that is open, or 0."""
        return self._rollback

    @property
    def unsynced_bytes(self) -> int:
        """Bytes appended and not durable."""
        return self._appended_bytes - self._durable_bytes

    @property
    def oldest_unsynced_stamp(self) -> int:
        """Stamp of the oldest batch that may not be durable (never too young), or 0."""
        if self.last_seq == self.durable:
            return 0
        return self._syncing_stamp or self._first_stamp

    def file(self, segment: int) -> File:
        """A segment's file, for reads of records that this writer, or recovery, still has open."""
        file = self._files.get(segment)
        if file is None:
            file = self._storage.open(segment_name(Log.REDO, segment), "read")
            with self._lock:
                self._files[segment] = file
        return file

    def forget_below(self, segment: int) -> None:
        """No read of an older segment is in flight or will come: their files may be closed."""
        with self._lock:
            self._keep_from = max(self._keep_from, segment)
            unsealed = {kept.number for kept in self._unsealed}
            for number in [n for n in self._files if n < segment and n not in unsealed]:
                self._files.pop(number).close()

    def close(self, *, seal_open: bool = True) -> None:
        """Sync, seal the open segment (a clean stop), close all files.

        With ``seal_open=False``, or once poisoned, the files are only closed.
        """
        try:
            if seal_open and self.poisoned is None:
                self.sync()
                if self._unsealed == [self._open]:
                    self._seal(self._open, last=True)
        finally:
            with self._lock:
                for file in self._files.values():
                    file.close()
                self._files.clear()
            self.spares.discard()

    def start_again(self) -> RedoStart:
        """What another writer needs to go on here; this one must not be used any more.

        Only while nothing has been sealed and all is durable: recovery hands over so.
        """
        assert self.poisoned is None
        assert self.last_seq == self.durable
        assert self._unsealed == [self._open]
        return RedoStart(self._open, self._bitmaps, self.last_seq, self._rollback)

    # -------------------------------------------------------------------------- the sync thread
    def sync(self) -> int:
        """Make durable what has been appended before this call; seal segments that are full.

        :raises Poisoned: a sync failed, now or earlier.
        """
        if self.poisoned is not None:
            raise self.poisoned
        # The order of these lines is the argument in the module's head.
        self._syncing_stamp = self._syncing_stamp or self._first_stamp
        self._first_stamp = 0
        appended = self._appended_bytes
        last = self.last_seq
        segments = list(self._unsealed)
        newest = segments[-1].number
        try:
            for segment in segments:
                segment.file.sync()
            if newest != self._names_durable:
                self._storage.sync_dir(_REDO)
                self._names_durable = newest
        except OSError as error:
            self._poison(error, "make the redo log durable")
        if self.poisoned is not None:  # an append failed meanwhile
            raise self.poisoned
        # Every file from the oldest unsealed one to the successor of the last full one is durable
        # with its header and name: only now may `durable` pass a segment's end.
        self._durable_bytes = appended
        self.durable = last
        self._syncing_stamp = 0
        if self._on_durable is not None:
            self._on_durable(last)
        for segment in segments[:-1]:
            if not self._seal(segment):
                break
        return last

    def _seal(self, segment: OpenSegment, *, last: bool = False) -> bool:
        """Footer of the oldest unsealed segment, all of which is durable; False without space."""
        assert segment is self._unsealed[0]
        try:
            seal(segment, self._bitmaps)
        except OSError as error:
            if is_full(error):
                return False  # tried again after the next sync; until then its batches tell all
            self._poison(error, f"seal segment {segment.number}")
        try:
            segment.file.sync()
        except OSError as error:
            self._poison(error, f"make the footer of segment {segment.number} durable")
        segment.heads, segment.sizes = bytearray(), array("I")
        if not last:
            with self._lock:
                del self._unsealed[0]
                if segment.number < self._keep_from:
                    self._files.pop(segment.number).close()
        return True

    def writeback_hint(self) -> None:
        """Let the kernel start writing when much is dirty: the sync then takes less long."""
        for segment in list(self._unsealed):
            offset = segment.offset
            if offset - segment.written_back >= WRITEBACK_BYTES:
                segment.file.writeback(segment.written_back, offset - segment.written_back)
                segment.written_back = offset
