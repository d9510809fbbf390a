"""The undo log: segments of before-images, written and recovered by the curator, followed by
readers.

**Words.** An *image* is (block, end, content): what the block held just before seq ``end``; one
record may cover a range of blocks. Records have *numbers*, 1, 2, 3 ..., in the order in which they
were appended; the numbers mean nothing to anybody but this file. A *position* is a place between
two batches, (segment, end offset), packed into one word (`frontier.pack_position`). **Published**
is the position up to which the log may be read. The *list* is the catalog's table of undo segments.

**What may be relied upon.** The backing is overwritten only after `UndoWriter.sync` has returned
and the position was published, so whatever the backing has lost lies at or below a published
position. `sync` syncs every segment that it has not synced since its last append, the older first,
also a finished one, and the one being written also when nothing was appended, then the directory.
Before a segment's first publish it is put on the list, durably. So a published image lies on stable
storage in a segment that is on the list; a listed segment that is not there, or whose batches end
before what was published, was lost or damaged, and not reclaimed.

**A failed sync poisons** the writer for good: the kernel may call those pages clean, and a later
sync of them proves nothing. What is in such a segment above its last synced position, or in one
whose curator died, counts as "not known to be durable" for ever: `undo_recovery.recover_undo` reads
it, verifies it, and writes it to a new segment, under a temporary name, synced, renamed, the
directory synced; only then do decisions ("nothing to save, it is there already") rest on it.
Nothing is ever appended to an old segment.

**Where numbers overlap, the newer segment wins.** Every segment's header names as ``cut`` the
number before its own first: whatever older segments hold above it is void. So what a recovery has
copied is read from the copy, and what it has dropped does not come back.

A header of a batch carries, as ``durable``, the highest number known to be synced when it was made.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from pyroaring import BitMap

from journal.bitmaps import blocks_of
from journal.errors import JournalError, JournalFull
from journal.format import (
    BATCH_HEADER,
    ENTRY,
    HEADER_PAGE,
    SEGMENT_HEADER,
    SEGMENT_ID_MAX,
    U64,
    Log,
    SegmentHeader,
    align,
    pack_batch,
    pack_segment_header,
    segment_seed,
)
from journal.frontier import pack_position
from journal.limits import BATCH_PAYLOAD_BYTES_MAX
from journal.segment import (
    DIRECTORY,
    ENDLESS,
    PAGE,
    Scanner,
    TableBuilder,
    footer_offset,
    pack_footer,
    segment_name,
)
from journal.storage import Buffer, File, Storage

_UNDO: Final = DIRECTORY[Log.UNDO]
_WRITEBACK_BYTES: Final = 1 << 20
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class UndoFailed(JournalError):
    """A write or sync of the undo log failed: the curator stops, the next one recovers the log."""


class Appended(NamedTuple):
    """Where an append went; ``first_payload_offset`` is the place of its first payload byte."""

    first_number: int
    last_number: int
    segment: int
    first_payload_offset: int


class UndoSegment:
    """A segment that is being written: all there is to know to append to it and to seal it."""

    def __init__(self, storage: Storage, name: str, header: SegmentHeader) -> None:
        self.number = header.segment
        self.name = name
        page = pack_segment_header(header)
        (self.chain,) = U64.unpack_from(page, SEGMENT_HEADER.size)
        self.offset = HEADER_PAGE
        self.builder = TableBuilder(header.segment, header.first_seq)
        self.listed = False
        self._disk, self._seed = header.disk, segment_seed(header)
        self.file: File = storage.open(name, "create")
        try:
            self.file.write(0, [page])
        except OSError:
            self.file.close()
            storage.unlink(name)
            raise

    @property
    def next_number(self) -> int:
        """Number of the next record."""
        return self.builder.next_seq

    def append(
        self,
        entries: Sequence[int],
        sums: Sequence[int],
        payloads: Sequence[Buffer],
        payload_bytes: int,
        durable: int,
    ) -> None:
        """Write one batch; nothing has changed here when that raises."""
        count = len(entries) // 6
        head, chain = pack_batch(
            disk=self._disk, segment=self.number, offset=self.offset, first_seq=self.next_number,
            stamp=0, barrier=0, durable=durable, applied=0, window_start=0, previous=self.chain,
            entries=entries, sums=sums, payload_bytes=payload_bytes, seed=self._seed,
        )  # fmt: skip
        size = align(len(head) + payload_bytes)
        # Zeroes up to the page's end: an unaligned append would else have to read a page that the
        # cache has dropped.
        padding = bytes(-(self.offset + len(head) + payload_bytes) % PAGE)
        self.file.write(self.offset, [head, *payloads, padding])
        if size >= _WRITEBACK_BYTES:
            self.file.writeback(self.offset, size)  # then the next sync finds little to do
        middle = BATCH_HEADER.size + count * ENTRY.size
        self.builder.add_parts(
            self.offset, self.next_number, 0, 0, chain, count, head[BATCH_HEADER.size : middle],
            head[middle:],
        )  # fmt: skip
        self.offset += size
        self.chain = chain

    def write_footer(self) -> None:
        """Seal it: for what is durable, or will be before anybody sees the file."""
        table = self.builder.table()
        offset = footer_offset(self.offset)
        footer = pack_footer(
            table,
            blocks_of(table.rows["block"], table.rows["nblocks"]),
            BitMap(),
            offset=offset,
            chain=self.chain,
            seed=self._seed,
        )
        self.file.write(offset, [footer])


def scan_to(scanner: Scanner, end: int) -> None:
    """Take in all that continues the chain, and whatever is whole up to offset ``end``.

    What lies below ``end`` is known to have been durable: damage there is passed over.
    """
    scanner.advance(ENDLESS)
    while (offset := scanner.offset) < end:
        scanner.advance(ENDLESS, known=scanner.builder.next_seq)
        if scanner.offset == offset:
            break


class UndoWriter:
    """Appends before-images; one thread of the curator uses it.

    ``published`` is the position up to which all is synced and on the list: store it into the
    frontier after each `sync`. ``durable``: the highest number synced. ``failed``: set by the first
    failure.

    :param next_segment: above the number of every file there is or was since the last recovery.
    :param next_number: of the next record; what older segments hold from it on becomes void.
    :param listed: puts a segment on the list, durably, before it returns.
    :param predecessor: the newest segment there is, for `verify_undo`.
    :param published: where the last recovery ended.
    """

    def __init__(
        self,
        storage: Storage,
        disk: bytes,
        *,
        next_segment: int,
        next_number: int,
        segment_bytes: int,
        identity: Callable[[], bytes],
        listed: Callable[[int], None],
        predecessor: int = 0,
        published: int = 0,
    ) -> None:
        assert 0 < next_segment < SEGMENT_ID_MAX
        assert next_number > 0
        self._storage, self._disk = storage, disk
        self._next_segment, self._next_number = next_segment, next_number
        self._segment_bytes, self._identity, self._listed = segment_bytes, identity, listed
        self._open: UndoSegment | None = None
        self._finished: list[UndoSegment] = []  # neither synced nor sealed yet
        self._last = (predecessor, 0)  # number and chain of the newest segment
        self._ends: dict[int, int] = {}
        self.durable = next_number - 1
        self.published = published
        self.failed: UndoFailed | None = None

    @property
    def segment(self) -> int:
        """Number of the segment being written; 0 when there is none."""
        return self._open.number if self._open else 0

    @property
    def next_number(self) -> int:
        """Number of the next record."""
        return self._next_number

    def append(
        self,
        entries: Sequence[int],
        sums: Sequence[int],
        payloads: Sequence[Buffer],
        payload_bytes: int,
    ) -> Appended:
        """Append one batch of images, which nobody sees before the next `sync`.

        ``entries`` is flat: block, end, nblocks, kind (IMAGE or IMAGE_ZERO), 0, 0 for each record;
        ``payloads`` together are ``payload_bytes`` long.

        :raises JournalFull: no space; nothing was appended, and the same may be tried again.
        :raises UndoFailed: now, or by an earlier call.
        """
        self._check()
        count = len(entries) // 6
        assert count > 0
        assert len(entries) == 6 * count
        assert payload_bytes <= BATCH_PAYLOAD_BYTES_MAX
        table_bytes = BATCH_HEADER.size + count * ENTRY.size + len(sums) * 8
        size = align(table_bytes + payload_bytes)
        if (
            self._open is not None
            and self._open.offset > HEADER_PAGE
            and self._open.offset + size > self._segment_bytes
        ):
            self.roll()
        segment = self._open or self._create()
        offset, first = segment.offset, self._next_number
        try:
            segment.append(entries, sums, payloads, payload_bytes, self.durable)
        except OSError as error:
            raise self._refuse(error) from error
        self._next_number += count
        return Appended(first, first + count - 1, segment.number, offset + table_bytes)

    def _create(self) -> UndoSegment:
        number = self._next_segment
        self._next_segment += 1
        name = segment_name(Log.UNDO, number)
        header = SegmentHeader(
            log=Log.UNDO, disk=self._disk, segment=number, identity=self._identity(),
            first_seq=self._next_number, predecessor=self._last[0],
            predecessor_chain=self._last[1], cut=self._next_number - 1, stamp=0,
            durable=self.durable,
        )  # fmt: skip
        try:
            self._open = UndoSegment(self._storage, name, header)
        except OSError as error:
            raise self._refuse(error) from error
        return self._open

    def roll(self) -> None:
        """Finish the segment being written; the next sync seals it."""
        if self._open is not None and self._open.offset > HEADER_PAGE:
            self._finished.append(self._open)
            self._last = (self._open.number, self._open.chain)
            self._open = None

    def sync(self) -> int:
        """Make all durable, put new segments on the list, seal finished ones; returns
        ``published``.

        :raises UndoFailed: now, or by an earlier call; nothing more has been published.
        """
        self._check()
        segments = [*self._finished, *([self._open] if self._open else [])]
        try:
            for segment in segments:
                segment.file.sync()
            if segments or self._storage.list(_UNDO):
                self._storage.sync_dir(_UNDO)
        except OSError as error:
            raise self._fail(error) from error
        self.durable = self._next_number - 1
        for segment in segments:
            if not segment.listed:
                self._listed(segment.number)
                segment.listed = True
            self._ends[segment.number] = segment.offset
        if segments:
            self.published = pack_position(segments[-1].number, segments[-1].offset)
        while self._finished:
            self._seal(self._finished.pop(0))
        return self.published

    def take_ends(self) -> dict[int, int]:
        """Published ends that have changed since the last call, for the catalog's next commit."""
        ends, self._ends = self._ends, {}
        return ends

    def close(self) -> None:
        """Sync, seal and close everything."""
        self.roll()
        self.sync()
        if self._open is not None:
            self._open.file.close()
            self._open = None

    def abandon(self) -> None:
        """Close the files and nothing else: for a curator that stops because something failed."""
        for segment in [*self._finished, *([self._open] if self._open else [])]:
            segment.file.close()
        self._finished, self._open = [], None

    def _seal(self, segment: UndoSegment) -> None:
        """Only what is durable gets a footer: it says that nothing in the segment is in doubt."""
        try:
            segment.write_footer()
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise self._fail(error) from error
            segment.file.close()  # without a footer it says the same, less conveniently
            return
        try:
            segment.file.sync()
        except OSError as error:
            raise self._fail(error) from error
        segment.file.close()

    def _check(self) -> None:
        if self.failed is not None:
            raise self.failed

    def _refuse(self, error: OSError) -> JournalError:
        if error.errno in _NO_SPACE:
            return JournalFull(
                "no space for before-images: nothing is applied until there is some on the "
                "journal's device"
            )
        return self._fail(error)

    def _fail(self, error: OSError) -> UndoFailed:
        self.failed = UndoFailed(
            f"the undo log could not be made durable ({error}): look at the journal's device; "
            "the curator takes it up again when it is restarted"
        )
        return self.failed
