"""Where facts of a disk's logs are looked up, and a consistent view of which there are.

Facts come from two kinds of places with the same questions: runs (the index) and, for what no run
covers yet, the segments' own tables. `replay.history` asks them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from journal.catalog import Catalog
from journal.entries import Entries, entries_of
from journal.errors import Corruption
from journal.format import Kind
from journal.runset import RunSet
from journal.segment import SegmentInfo, Table
from journal.segment_cache import SegmentCache
from journal.storage import File
from journal.undo_follower import UndoFollower

Pair = tuple[np.ndarray, np.ndarray]
Range = tuple[int, int]  # of seqs, both included


class Facts(Protocol):
    """Versions (redo) or before-images (undo) by block; 0 in an answer means none."""

    def newest_le(self, blocks: np.ndarray, seq: int) -> Pair: ...
    def smallest_gt(self, blocks: np.ndarray, seq: int) -> Pair: ...
    def newest_le_one(self, block: int, seq: int) -> tuple[int, int]: ...
    def smallest_gt_one(self, block: int, seq: int) -> tuple[int, int]: ...
    def oldest(self, blocks: np.ndarray) -> np.ndarray: ...
    def ends_le(self, blocks: np.ndarray, seqs: np.ndarray) -> np.ndarray: ...
    def overlapping(self, first_block: int, end_block: int) -> Entries: ...
    def successors(self, blocks: np.ndarray, seqs: np.ndarray, upto: int) -> Pair: ...


class Source(NamedTuple):
    """Facts with the range of seqs (ends, in the undo log) they can speak of."""

    first_seq: int
    last_seq: int
    facts: Facts


class Generations(Protocol):
    """The part of the frontier that tells a snapshot's age."""

    @property
    def durable(self) -> int: ...
    @property
    def undo_published(self) -> int: ...
    def generations(self) -> tuple[int, int]: ...


class Told(NamedTuple):
    """What only the catalog knows of the logs.

    ``undo``: numbers of the undo segments there are. ``reclaimed``: the highest seq of the redo
    segments that were given up. ``voided``: records up to here, and images with an end up to here,
    say nothing about any point that may be opened, for others wrote to the backing afterwards.
    """

    undo: frozenset[int] = frozenset()
    reclaimed: int = 0
    voided: int = 0

    @classmethod
    def by(cls, catalog: Catalog) -> Told:
        """What a catalog says."""
        return cls(frozenset(catalog.undo()), catalog.reclaimed, catalog.voided)


class Log(Protocol):
    """A follower of one log: what is durable (redo) or published (undo), never more."""

    def segments(self) -> list[SegmentInfo]: ...
    def table(self, info: SegmentInfo) -> Table: ...
    def file(self, info: SegmentInfo) -> File: ...
    @property
    def cache(self) -> SegmentCache: ...


class UndoLog:
    """The undo log as a `Log`: what was published when its segments were listed last."""

    def __init__(self, follower: UndoFollower) -> None:
        self._follower = follower
        self._listed = follower.snapshot()

    @property
    def cache(self) -> SegmentCache:
        """What is kept of the segments."""
        return self._follower.cache

    def segments(self) -> list[SegmentInfo]:
        """List them anew."""
        self._listed = self._follower.snapshot()
        return list(self._listed.segments)

    def table(self, info: SegmentInfo) -> Table:
        """A segment's table, as far as it was published."""
        return self._follower.table(self._listed, info)

    def file(self, info: SegmentInfo) -> File:
        """A segment's file."""
        return self._follower.file(info)


@dataclasses.dataclass(slots=True)
class _Pieces:
    """The facts of one segment that is in no run: entries of consecutive rows, oldest first."""

    rows: int = 0
    entries: list[Source] = dataclasses.field(default_factory=list)


class Unindexed:
    """Keeps the entries of segments that no run covers; an open segment's grow piece by piece."""

    PIECES_MAX = 8  # then they are put together again, so that a lookup has few to ask

    def __init__(self) -> None:
        self._of: dict[int, _Pieces] = {}
        self._voided = 0

    def update(
        self, tables: Sequence[tuple[Table, np.ndarray | None, int]], voided: int = 0
    ) -> list[Source]:
        """``(table, valid rows, usable rows)`` of every such segment, oldest first; rows up to seq
        ``voided`` are left out.
        """
        if voided != self._voided:
            self._of, self._voided = {}, voided
        for gone in self._of.keys() - {table.segment for table, _, _ in tables}:
            del self._of[gone]
        result: list[Source] = []
        for table, valid, usable in tables:
            pieces = self._of.setdefault(table.segment, _Pieces())
            if usable > pieces.rows:
                first = 0 if len(pieces.entries) >= self.PIECES_MAX else pieces.rows
                part = Table(
                    table.segment, table.first_seq, table.rows[:usable], table.sums, table.batches
                )
                keep = np.zeros(usable, bool)
                keep[first:] = True if valid is None else valid[first:usable]
                keep[: max(0, voided + 1 - table.first_seq)] = False
                entries = entries_of(part, valid=keep)
                old = [] if first == 0 else pieces.entries
                pieces.entries = [*old, source_of(entries)] if len(entries) else old
                pieces.rows = usable
            result.extend(pieces.entries)
        return result


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """Which facts there are. ``redo`` by falling last seq; ``decided``: the highest seq that may
    be used.

    ``lost``: ranges of seqs whose records are not there or cannot be read; ``images_lost``: so may
    be before-images of no one knows which blocks.
    """

    generation: tuple[int, int]
    published: int
    told: Told
    lost: tuple[Range, ...]
    images_lost: Corruption | None
    floor: int
    decided: int
    redo: tuple[Source, ...]
    undo: tuple[Source, ...]
    redo_infos: dict[int, SegmentInfo]
    undo_infos: dict[int, SegmentInfo]


def source_of_runs(runs: RunSet) -> list[Source]:
    """All runs of a log as one source; nothing when there are none."""
    firsts = [run.meta.first_seq for run in runs.runs if run.meta.entries]
    return [Source(min(firsts), runs.last_seq, runs)] if firsts else []


def source_of(entries: Entries) -> Source:
    """Entries in memory as a source."""
    return Source(int(entries.seq.min()), int(entries.seq.max()), entries)


def lost_records(
    infos: Sequence[SegmentInfo], tables: Mapping[int, Table], *, reclaimed: int, durable: int
) -> list[Range]:
    """Ranges of seqs, up to ``durable``, whose records should be in the redo log and are not.

    ``tables``: of the segments that no run covers; of the others only their bounds are looked at.
    """
    found: list[Range] = []
    before = reclaimed
    for info in infos:
        _add(found, before + 1, min(info.header.cut, durable))
        table = tables.get(info.segment)
        if table is not None:
            before = table.last_seq
            missing = np.flatnonzero(table.rows["kind"] == Kind.LOST)
            edges = np.flatnonzero(np.diff(missing) > 1)
            for part in np.split(missing, edges + 1) if len(missing) else ():
                _add(found, table.first_seq + int(part[0]), table.first_seq + int(part[-1]))
        else:
            before = min(info.trailer.last_seq, info.bound) if info.trailer else info.bound
    _add(found, before + 1, durable)
    return found


def _add(found: list[Range], first: int, last: int) -> None:
    if first <= last:
        found.append((first, last))
