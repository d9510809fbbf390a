"""Reading the undo log beside its writer: nothing above what is published, ever.

A *snapshot* is a listing of segments together with a published position that was read before it.
All that was published lay in a segment with a name by then, so a snapshot that lacks one has lost
it to the sweep (the generation tells: take another) or to an accident (the list tells:
:func:`verify_undo`).

A segment below the published one is read whole, for all of it was synced before the next one was
put on the list; what a newer one has made void is left out. Of the published one, what lies above
the position is left out, though it be there: its sync may not have happened, or may have failed.

A follower belongs to one thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

import numpy as np

from journal.errors import Corruption
from journal.format import BATCH_HEADER, ENTRY, HEADER_PAGE, Log, align, sum_count
from journal.frontier import Frontier, unpack_position
from journal.segment import (
    ENDLESS,
    SegmentInfo,
    SegmentLister,
    Table,
    payload_sizes,
    segment_name,
    with_bounds,
)
from journal.segment_cache import SegmentCache
from journal.storage import File, Storage
from journal.undo import scan_to

_LISTINGS_MAX: Final = 1000


class UndoSnapshot(NamedTuple):
    """The log at a moment: ``segments`` in order of their numbers, up to position ``published``."""

    segments: tuple[SegmentInfo, ...]
    published: int

    def end_of(self, info: SegmentInfo) -> int:
        """Offset in a segment's file behind which nothing may be read."""
        segment, end = unpack_position(self.published)
        if info.segment == segment:
            return end
        return ENDLESS if info.segment < segment else 0


class UndoFollower:
    """A reader's view of the undo log.

    :param published: the position up to which it may be read, as of now.
    :param generation: whatever changes when a segment appeared or is about to be unlinked.
    """

    def __init__(
        self,
        storage: Storage,
        disk: bytes,
        published: Callable[[], int],
        generation: Callable[[], object] = lambda: None,
    ) -> None:
        self._published, self._generation = published, generation
        self._lister = SegmentLister(storage, Log.UNDO, disk)
        self.cache = SegmentCache(storage)

    @classmethod
    def of(cls, storage: Storage, disk: bytes, frontier: Frontier) -> UndoFollower:
        """One that goes by a disk's frontier."""
        return cls(storage, disk, lambda: frontier.undo_published, frontier.generations)

    @property
    def damaged(self) -> dict[str, Corruption]:
        """Segments whose header could not be read in the last listing, by file."""
        return dict(self._lister.damaged)

    def snapshot(self) -> UndoSnapshot:
        """List the segments; again, if meanwhile one appeared or went."""
        for _ in range(_LISTINGS_MAX):
            before = self._generation()
            published = self._published()
            highest = unpack_position(published)[0]
            # A newer one must not make void what only it holds, before it is published itself.
            infos = with_bounds(i for i in self._lister.refresh() if i.segment <= highest)
            if self._generation() == before:
                break
        self.cache.retain({info.segment for info in infos})
        return UndoSnapshot(tuple(infos), published)

    def file(self, info: SegmentInfo) -> File:
        """The segment's file, kept open for a while.

        :raises Vanished: it has been swept: take a new snapshot.
        """
        return self.cache.file(info)

    def table(self, snapshot: UndoSnapshot, info: SegmentInfo) -> Table:
        """The segment's table, as far as the snapshot may know it.

        :raises Vanished: it has been swept: take a new snapshot.
        """
        end = snapshot.end_of(info)
        table = self.cache.table(info)
        if table is None:
            if info.trailer is not None:
                info = dataclasses.replace(info, bound=min(info.bound, info.trailer.last_seq))
            scanner = self.cache.scanner(info)
            if end < ENDLESS:
                scan_to(scanner, end)
            else:
                scanner.advance(info.bound)
            table = scanner.builder.table()
        return _below(table, end).upto(info.bound)

    def tables(self, snapshot: UndoSnapshot) -> Iterator[tuple[SegmentInfo, Table]]:
        """Every segment that has records, the oldest first."""
        for info in snapshot.segments:
            table = self.table(snapshot, info)
            if len(table.rows):
                yield info, table

    def close(self) -> None:
        """Close all files."""
        self.cache.retain(())


def _below(table: Table, end: int) -> Table:
    """The table without the batches from offset ``end`` on."""
    batches = int(np.searchsorted(table.batches["offset"], min(end, 1 << 63)))
    if batches == len(table.batches):
        return table
    return table.upto(int(table.batches["first_seq"][batches]) - 1)


def _end_of(table: Table) -> int:
    """Offset of the end of a table's last batch."""
    if not len(table.batches):
        return HEADER_PAGE
    last = table.batches[-1]
    sizes = payload_sizes(table.rows[int(last["first_row"]) :])
    sums = sum(sum_count(size) for size in sizes.tolist())
    payload = int(((sizes + 7) // 8 * 8).sum())
    return int(last["offset"]) + align(
        BATCH_HEADER.size + int(last["count"]) * ENTRY.size + sums * 8 + payload
    )


def verify_undo(
    follower: UndoFollower, snapshot: UndoSnapshot, listed: Mapping[int, int]
) -> list[Corruption]:
    """Which listed segments are gone, unreadable, or end before what was published of them.

    A segment that is not on the list was swept, or never published: no complaint. Payloads are not
    looked at.
    """
    infos = {info.segment: info for info in snapshot.segments}
    position, end = unpack_position(snapshot.published)
    successors = {
        info.header.predecessor: info.header.cut for info in snapshot.segments
        if info.segment in listed
    }  # fmt: skip
    found = []
    for segment in sorted(listed):
        name = segment_name(Log.UNDO, segment)
        if segment not in infos:
            what = "unreadable undo segment" if name in follower.damaged else "undo segment is gone"
            found.append(Corruption(what, file=name))
            continue
        info = infos[segment]
        table = follower.table(snapshot, info)
        # The next segment says how far this one goes: the list may not have its last end.
        last = min(successors.get(segment, 0), info.bound)
        wanted = max(listed[segment], end if segment == position else 0)
        if table.last_seq < last or min(_end_of(table), info.size) < wanted:
            what = "published before-images are damaged"
            found.append(
                Corruption(
                    what, file=name, offset=_end_of(table), first_seq=table.last_seq + 1,
                    last_seq=max(last, table.last_seq + 1),
                )
            )  # fmt: skip
    return found
