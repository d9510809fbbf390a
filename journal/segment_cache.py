"""What a follower keeps of its log's segments: open files, tables, and how far it has scanned.

All of it is bounded and may be dropped at any time; it is had again from the files. For one thread
at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Protocol

from journal.errors import Corruption
from journal.limits import FILES_OPEN_MAX, TABLE_ROWS_CACHED_MAX, TABLE_ROWS_RESTING_MAX
from journal.segment import Scanner, SegmentInfo, Table, load_footer, open_segment
from journal.storage import Buffer, File, Mapping, Storage, map_file


class Slices(Protocol):
    """A file's content, by ``[start:end]``. What lies behind its end is left out."""

    def __getitem__(self, part: slice, /) -> Buffer: ...


class _Reads:
    """That of a file which cannot be mapped, or may grow."""

    def __init__(self, file: File) -> None:
        self._file = file

    def __getitem__(self, part: slice, /) -> bytes:
        return self._file.read(part.start, part.stop - part.start)


class _Opened:
    """One file; mapped once somebody asked for that."""

    __slots__ = ("file", "mapping", "slices")

    def __init__(self, file: File) -> None:
        self.file = file
        self.mapping: Mapping | None = None
        self.slices: Slices | None = None

    def map(self, length: int) -> Slices:
        self.mapping = map_file(self.file, length)
        self.slices = _Reads(self.file) if self.mapping is None else self.mapping.view
        return self.slices

    def close(self) -> None:
        if self.mapping is not None:
            self.mapping.close()
        self.file.close()


class SegmentCache:
    """Those of one log."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._files: OrderedDict[int, _Opened] = OrderedDict()
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._scanners: dict[int, Scanner] = {}
        self._rows = 0
        self.closed = 0  # files so far: what `slices` gave before is worth nothing once it rises

    def file(self, info: SegmentInfo) -> File:
        """The segment's file, kept open for a while.

        :raises Vanished: it is gone: take a new snapshot.
        """
        return self._open(info).file

    def slices(self, info: SegmentInfo) -> Slices:
        """The same, by slices. Of a sealed segment they may lie in the mapped file: nothing but
        `Room.gather` may look at them.

        :raises Vanished: it is gone: take a new snapshot.
        """
        opened = self._open(info)
        if opened.slices is not None:
            return opened.slices
        # One that is not sealed yet would need another mapping when it has grown.
        return opened.map(info.size) if info.sealed else _Reads(opened.file)

    def table(self, info: SegmentInfo) -> Table | None:
        """What is kept, or what the footer of a sealed segment says; else it is to be scanned.

        :raises Vanished: it is gone: take a new snapshot.
        """
        table = self._tables.get(info.segment)
        if table is not None:
            self._tables.move_to_end(info.segment)
        elif info.sealed:
            try:
                table = load_footer(self.file(info), info).table
            except Corruption:
                return None  # the batches say the same; scrub reports the footer
            self.keep(info.segment, table)
        return table

    def scanner(self, info: SegmentInfo) -> Scanner:
        """The one that has scanned this segment so far."""
        scanner = self._scanners.get(info.segment)
        if scanner is None:
            scanner = self._scanners[info.segment] = Scanner(self.file(info), info)
        return scanner

    def keep(self, segment: int, table: Table) -> None:
        """Nothing will be added to this table."""
        self._scanners.pop(segment, None)
        self._tables[segment] = table
        self._rows += len(table.rows)
        self._trim(TABLE_ROWS_CACHED_MAX, 1)

    def retain(self, segments: Collection[int]) -> None:
        """Drop all others."""
        for segment in self._scanners.keys() - segments:
            del self._scanners[segment]
        for segment in self._files.keys() - segments:
            self._close(segment)
        for segment in self._tables.keys() - segments:
            self._rows -= len(self._tables.pop(segment).rows)

    def rest(self) -> None:
        """Nobody will read for a while: keep little."""
        for segment in self._files.keys() - self._scanners.keys():
            self._close(segment)
        self._trim(TABLE_ROWS_RESTING_MAX, 0)

    def _trim(self, rows: int, tables: int) -> None:
        while self._rows > rows and len(self._tables) > tables:
            self._rows -= len(self._tables.popitem(last=False)[1].rows)

    def _open(self, info: SegmentInfo) -> _Opened:
        opened = self._files.get(info.segment)
        if opened is None:
            file = open_segment(self._storage, info.name)
            opened = self._files[info.segment] = _Opened(file)
            if len(self._files) > FILES_OPEN_MAX:
                busy = self._scanners.keys() | {info.segment}
                for number in [number for number in self._files if number not in busy][:1]:
                    self._close(number)
        self._files.move_to_end(info.segment)
        return opened

    def _close(self, segment: int) -> None:
        self.closed += 1
        self._files.pop(segment).close()
