"""When records were written: from a stamp to a seq and back, histograms, and candidate points.

Works on the batches' stamps in the redo segments' tables; of what was reclaimed only the catalog's
points (bookmarks, thinned) still have a time of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from journal.format import BLOCK, Kind
from journal.segment import SegmentInfo, Table
from replay.openable import Openable
from replay.target import Bookmark, ClockTable, KeptPoint


class Tables(Protocol):
    """A follower of the redo log, see `journal.follower`."""

    def segments(self) -> list[SegmentInfo]: ...
    def table(self, info: SegmentInfo) -> Table: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """What was written in [start, end) of stamps (ns)."""

    start: int
    end: int
    records: int
    bytes: int
    barriers: int
    first_seq: int
    last_seq: int


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A point to choose from. ``kind``: ``bookmark``, ``barrier`` (a client was told "flushed") or
    ``write``.

    ``records`` and ``bytes``: what was written since the candidate before.
    """

    seq: int
    stamp: int
    kind: str
    label: str | None
    records: int
    bytes: int


class JournalTimeline:
    """One consistent state of a disk's points, as `replay.target.resolve` asks for it."""

    def __init__(
        self,
        *,
        tables: Tables,
        durable_seq: int,
        window_start_seq: int,
        openable: Openable,
        kept_points: Sequence[KeptPoint],
        bookmarks: Mapping[str, Bookmark],
        clock: ClockTable,
        start_stamp: int,
    ) -> None:
        """``start_stamp``: when protection started; the stamp of seq 0."""
        self._tables = tables
        self._infos = tables.segments()
        self.durable_seq = durable_seq
        self.window_start_seq: int | None = window_start_seq
        self.openable = openable
        self.openable_ranges = openable.ranges()
        self.kept_points = kept_points
        self.bookmarks = bookmarks
        self.clock = clock
        self._start_stamp = start_stamp

    @property
    def floor(self) -> int:
        """The first seq that the redo log still has."""
        return self._infos[0].first_seq if self._infos else self.durable_seq + 1

    def seq_at_stamp(self, stamp_ns: int) -> int | None:
        """The last record stamped at or before; None: before all that is still known."""
        for info in reversed(self._infos):
            if info.header.stamp > stamp_ns and info.first_seq > 1:
                continue
            batches = self._tables.table(info).batches
            at = int(np.searchsorted(batches["stamp"], stamp_ns, "right"))
            if at:
                last = batches[at - 1]
                return min(int(last["first_seq"]) + int(last["count"]) - 1, self.durable_seq)
        if self.floor == 1:
            return 0 if stamp_ns >= self._start_stamp else None
        return None

    def stamp_of(self, seq: int) -> int:
        """The stamp of a record; of what was reclaimed, the nearest known one before it."""
        for info in reversed(self._infos):
            if info.first_seq <= seq:
                batches = self._tables.table(info).batches
                at = int(np.searchsorted(batches["first_seq"], seq, "right"))
                return int(batches["stamp"][at - 1]) if at else info.header.stamp
        return self._start_stamp

    def _between(self, first_seq: int, last_seq: int) -> Iterator[Table]:
        for info in self._infos:
            if info.first_seq > last_seq:
                return
            table = self._tables.table(info).upto(last_seq)
            if table.last_seq >= first_seq and len(table.rows):
                yield table

    def buckets(self, start: int, end: int, count: int) -> list[Bucket]:
        """A histogram over [start, end) of stamps (ns), ``count`` buckets."""
        # From zero: a stamp is too large a number for floating point.
        edges = start + np.linspace(0, end - start, count + 1).astype(np.int64)
        records, volume, barriers = (np.zeros(count, np.int64) for _ in range(3))
        first, last = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for table in self._between(0, self.durable_seq):
            stamps = table.batches["stamp"].astype(np.int64)
            if not len(stamps) or stamps[-1] < start or stamps[0] >= end:
                continue
            place = np.searchsorted(edges, stamps, "right") - 1
            inside = (place >= 0) & (place < count)
            work = _bytes_of_batches(table)
            np.add.at(records, place[inside], table.batches["count"][inside].astype(np.int64))
            np.add.at(volume, place[inside], work[inside])
            new = np.diff(table.batches["barrier"].astype(np.int64), prepend=-1) > 0
            np.add.at(barriers, place[inside & new], 1)
            for at in np.flatnonzero(inside).tolist():
                number, batch = int(place[at]), table.batches[at]
                first[number] = first[number] or int(batch["first_seq"])
                last[number] = int(batch["first_seq"]) + int(batch["count"]) - 1
        return [
            Bucket(int(edges[i]), int(edges[i + 1]), int(records[i]), int(volume[i]),
                   int(barriers[i]), int(first[i]), int(last[i]))
            for i in range(count)
        ]  # fmt: skip

    def candidates(self, first_seq: int, last_seq: int, limit: int) -> list[Candidate]:
        """Openable points in a range of seqs worth offering, ascending, at most about ``limit``.

        All bookmarks; then barriers, then ends of batches, thinned out evenly where there are more.
        """
        named = [
            Candidate(mark.seq, mark.stamp_ns, "bookmark", label, 0, 0)
            for label, mark in self.bookmarks.items()
            if first_seq <= mark.seq <= last_seq
        ]
        seqs, stamps, rows, volume, barrier = self._batch_ends(first_seq, last_seq)
        room = max(0, limit - len(named))
        chosen: list[Candidate] = []
        marks = np.flatnonzero(barrier)
        writes = np.flatnonzero(~barrier)
        picked = _evenly(marks, room)
        picked = np.sort(np.concatenate([picked, _evenly(writes, room - len(picked))]))
        before_rows = before_bytes = 0
        total_rows, total_bytes = np.cumsum(rows), np.cumsum(volume)
        for at in picked.tolist():
            if not self.openable.contains(int(seqs[at])):
                continue
            chosen.append(
                Candidate(
                    int(seqs[at]), int(stamps[at]), "barrier" if barrier[at] else "write", None,
                    int(total_rows[at]) - before_rows, int(total_bytes[at]) - before_bytes,
                )
            )  # fmt: skip
            before_rows, before_bytes = int(total_rows[at]), int(total_bytes[at])
        return sorted([*chosen, *named], key=lambda point: (point.seq, point.label or ""))

    def _batch_ends(self, first_seq: int, last_seq: int) -> tuple[np.ndarray, ...]:
        """Of each batch with changes that ends in the range: last seq, stamp, changes, bytes,
        whether a barrier."""
        columns: list[tuple[np.ndarray, ...]] = []
        barriers: list[np.ndarray] = []
        for table in self._between(first_seq, last_seq):
            batches = table.batches
            ends = batches["first_seq"].astype(np.int64) + batches["count"] - 1
            work = _bytes_of_batches(table)
            changes = _sums_of_batches(table, _changes(table.rows))
            inside = (ends >= first_seq) & (ends <= last_seq) & (changes > 0)
            columns.append((ends[inside], batches["stamp"][inside], changes[inside], work[inside]))
            barriers.append(batches["barrier"])
        if not columns:
            return (*tuple(np.zeros(0, np.int64) for _ in range(4)), np.zeros(0, bool))
        ends, stamps, rows, volume = (np.concatenate(part) for part in zip(*columns, strict=True))
        flushed = np.unique(np.concatenate(barriers)).astype(np.int64)
        return ends, stamps, rows, volume, np.isin(ends, flushed)


def _written(rows: np.ndarray) -> np.ndarray:
    """Bytes of content that each row brought (i64); trims and zeroes none."""
    return np.where(rows["kind"] == Kind.WRITE, rows["nblocks"].astype(np.int64) * BLOCK, 0)


def _changes(rows: np.ndarray) -> np.ndarray:
    """1 for each row that makes the disk another one: clients' writes, a rollback's commit."""
    kind = rows["kind"]
    wrote = (kind >= Kind.WRITE) & (kind <= Kind.REF)
    return np.asarray(wrote | (kind == Kind.ROLLBACK_COMMIT), np.int64)


def _bytes_of_batches(table: Table) -> np.ndarray:
    """Bytes of content that each batch brought (i64)."""
    return _sums_of_batches(table, _written(table.rows))


def _sums_of_batches(table: Table, values: np.ndarray) -> np.ndarray:
    """Per batch the sum of its rows' values; one without records, as idle disks have, has 0."""
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])
    first = table.batches["first_row"].astype(np.int64)
    return np.asarray(total[first + table.batches["count"]] - total[first])


def _evenly(places: np.ndarray, count: int) -> np.ndarray:
    if count <= 0:
        return places[:0]
    if len(places) <= count:
        return places
    return places[np.linspace(0, len(places) - 1, count).astype(np.int64)]
