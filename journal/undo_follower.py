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

from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

import numpy as np

from journal.errors import Corruption
from journal.format import (
    BATCH_DTYPE,
    BATCH_HEADER,
    ENTRY,
    HEADER_PAGE,
    ROW_DTYPE,
    Kind,
    Log,
    align,
    sum_count,
)
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
    """The log at a moment: ``segments`` in order of their numbers, up to position ``published``.

    ``ends``: published ends of segments below that one, as far as they are known.
    """

    segments: tuple[SegmentInfo, ...]
    published: int
    ends: Mapping[int, int]

    def end_of(self, info: SegmentInfo) -> int:
        """Offset in a segment's file behind which nothing may be read."""
        segment, end = unpack_position(self.published)
        if info.segment == segment:
            return end
        return ENDLESS if info.segment < segment else 0

    def wanted_of(self, info: SegmentInfo) -> tuple[int, int]:
        """Last number and end offset of what a segment is known to have held, both at least."""
        segment, end = unpack_position(self.published)
        if info.segment == segment:
            return 0, end
        if info.trailer is not None:
            last = info.trailer.last_seq
        else:  # the next one says how far this one goes: the list may not have its last end
            cuts = [i.header.cut for i in self.segments if i.header.predecessor == info.segment]
            last = max(cuts, default=0)
        return min(last, info.bound), self.ends.get(info.segment, 0)


class UndoFollower:
    """A reader's view of the undo log.

    :param published: the position up to which it may be read, as of now.
    :param generation: whatever changes when a segment appeared or is about to be unlinked.
    :param listed: the catalog's list, segment -> published end, as far as it is known.
    """

    def __init__(
        self,
        storage: Storage,
        disk: bytes,
        published: Callable[[], int],
        generation: Callable[[], object] = lambda: None,
        listed: Callable[[], Mapping[int, int]] = dict,
    ) -> None:
        self._published, self._generation, self._listed = published, generation, listed
        self._lister = SegmentLister(storage, Log.UNDO, disk)
        self.cache = SegmentCache(storage)

    @classmethod
    def of(
        cls, storage: Storage, disk: bytes, frontier: Frontier,
        listed: Callable[[], Mapping[int, int]] = dict,
    ) -> UndoFollower:  # fmt: skip
        """One that goes by a disk's frontier."""
        return cls(storage, disk, lambda: frontier.undo_published, frontier.generations, listed)

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
        return UndoSnapshot(tuple(infos), published, self._listed())

    def file(self, info: SegmentInfo) -> File:
        """The segment's file, kept open for a while.

        :raises Vanished: it has been swept: take a new snapshot.
        """
        return self.cache.file(info)

    def table(self, snapshot: UndoSnapshot, info: SegmentInfo) -> Table:
        """The segment's table, as far as the snapshot may know it.

        ! If it ends before what was published of it does, a LOST row stands for what is missing: it
        is not known what that is, so readers, sweep and index must not go on without it.

        :raises Vanished: it has been swept: take a new snapshot.
        """
        end = snapshot.end_of(info)
        table = self.cache.table(info)
        if table is None:
            scanner = self.cache.scanner(info)
            if end < ENDLESS:
                scan_to(scanner, end)
            elif info.trailer is not None:
                scanner.advance(min(info.bound, info.trailer.last_seq))
            else:
                scanner.advance(info.bound)
            table = scanner.builder.table()
        table = _below(table, end).upto(info.bound)
        return table if _is_complete(table, snapshot, info) else _with_lost_end(table)

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


def _is_complete(table: Table, snapshot: UndoSnapshot, info: SegmentInfo) -> bool:
    """Whether a table goes as far as the segment is known to have gone."""
    last, end = snapshot.wanted_of(info)
    return table.last_seq >= last and min(_end_of(table), info.size) >= end


def _with_lost_end(table: Table) -> Table:
    """The table with a LOST row behind its last one."""
    rows = np.append(table.rows, np.zeros(1, ROW_DTYPE))
    batch = np.zeros(1, BATCH_DTYPE)
    batch["offset"], batch["first_seq"] = _end_of(table), table.last_seq + 1
    batch["first_row"], batch["count"] = len(table.rows), 1
    batches = np.append(table.batches, batch)
    return Table(table.segment, table.first_seq, rows, table.sums, batches)


def verify_undo(
    follower: UndoFollower, snapshot: UndoSnapshot, listed: Mapping[int, int]
) -> list[Corruption]:
    """Which listed segments are gone, unreadable, or lack what was published of them.

    A segment that is not on the list was swept, or never published: no complaint. Payloads are not
    looked at.
    """
    snapshot = snapshot._replace(ends=listed)
    infos = {info.segment: info for info in snapshot.segments}
    found = []
    for segment in sorted(listed):
        name = segment_name(Log.UNDO, segment)
        if segment not in infos:
            what = "unreadable undo segment" if name in follower.damaged else "undo segment is gone"
            found.append(Corruption(what, file=name))
            continue
        table = follower.table(snapshot, infos[segment])
        lost = np.flatnonzero(table.rows["kind"] == Kind.LOST)
        if len(lost):
            batch = table.batches[table.batch_of(int(lost[0]))]
            found.append(
                Corruption(
                    "published before-images are damaged", file=name, offset=int(batch["offset"]),
                    first_seq=table.first_seq + int(lost[0]),
                    last_seq=table.first_seq + int(lost[-1]),
                )
            )  # fmt: skip
    return found
