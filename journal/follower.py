"""Follows the redo log: its segments, tables and files, never a record above what is durable.

A seq that was shown once never changes its meaning, so nobody but the recorder looks at a record
above `durable` (a crash may take it away and give its place to another). The open segment is
scanned from where the last look ended. For one thread at a time.

A recovery of the recorder makes records void that an older listing does not know to be, and then
`durable` rises above their seqs. It raises the generation before that. So what has become durable
since the last listing is only shown of segments as long as no generation has changed; and a segment
is shown up to the bound of the newest listing, whatever the caller's is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from journal.errors import Corruption, Vanished
from journal.format import Log
from journal.segment import SegmentInfo, SegmentLister, Table
from journal.segment_cache import SegmentCache
from journal.storage import File, Storage

_LISTINGS_MAX: Final = 1000


class Durable(Protocol):
    """What a follower needs of the frontier."""

    @property
    def durable(self) -> int: ...

    def generations(self) -> tuple[int, int]: ...


class RedoFollower:
    """A reader's view of the redo log."""

    def __init__(self, storage: Storage, disk: bytes, frontier: Durable) -> None:
        self._frontier = frontier
        self._lister = SegmentLister(storage, Log.REDO, disk)
        self.cache = SegmentCache(storage)
        self._bounds: dict[int, int] = {}
        self._listed: tuple[tuple[int, int], int] | None = None  # generations, durable
        self.bytes = 0  # of all files in the last listing, also those nobody may look into yet

    @property
    def damaged(self) -> dict[str, Corruption]:
        """Segments whose header could not be read in the last listing, by file."""
        return dict(self._lister.damaged)

    def segments(self) -> list[SegmentInfo]:
        """All segments with a record that is durable, and the one being written, oldest first.

        Listed again when meanwhile one appeared or was about to go. One whose records are all void
        (cut by a newer one) is left out.
        """
        for _ in range(_LISTINGS_MAX):
            before = self._frontier.generations()
            durable = self._frontier.durable
            infos = self._lister.refresh()
            if self._frontier.generations() == before:
                break
        else:
            raise Vanished("the redo log's segments change faster than they can be listed")
        self._listed = before, durable
        self._bounds = {info.segment: info.bound for info in infos}
        self.bytes = sum(info.size for info in infos)
        self.cache.retain({info.segment for info in infos})
        return [
            info for info in infos if info.first_seq <= info.bound and info.first_seq <= durable + 1
        ]

    def file(self, info: SegmentInfo) -> File:
        """The segment's file, kept open for a while.

        :raises Vanished: it was reclaimed: take a new snapshot.
        """
        return self.cache.file(info)

    def table(self, info: SegmentInfo) -> Table:
        """The segment's records up to what is durable and to the segment's bound.

        Of a listing that is out of date: up to what was durable then.
        :raises Vanished: it was reclaimed: take a new snapshot.
        """
        durable = self._frontier.durable  # before the generations: they rise first
        if self._listed is not None and self._frontier.generations() != self._listed[0]:
            durable = min(durable, self._listed[1])
        bound = min(info.bound, self._bounds.get(info.segment, info.bound))
        upto = min(durable, bound)
        table = self.cache.table(info)
        if table is None:
            table = self.cache.scanner(info).advance(upto)
            if upto == bound:  # nothing will ever be appended to it that counts
                self.cache.keep(info.segment, table)
        return table.upto(upto)

    def tables(self, first_seq: int, last_seq: int) -> Iterator[tuple[SegmentInfo, Table]]:
        """Every segment with a record in the range, oldest first, its table cut at ``last_seq``."""
        for info in self.segments():
            if info.first_seq > last_seq:
                return
            table = self.table(info).upto(last_seq)
            if len(table.rows) and table.last_seq >= first_seq:
                yield info, table

    def locate(self, seq: int) -> tuple[SegmentInfo, Table, int] | None:
        """Where a record is: its segment, that one's table, and the row; None where none is.

        None above what is durable, below the oldest segment, and in a hole that a crash left.
        :raises Vanished: it is being reclaimed: take a new snapshot.
        """
        for info in reversed(self.segments()):
            if info.first_seq <= seq <= info.bound:
                table = self.table(info)
                return (info, table, seq - info.first_seq) if seq <= table.last_seq else None
        return None

    def close(self) -> None:
        """Close all files."""
        self.cache.retain(())
