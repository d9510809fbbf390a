"""Sets of blocks that follow from the records: what is masked, what a segment wrote; and which
refs of rollbacks are versions at all.

*Masks* are the blocks whose newest version is a trim. They, and the blocks a segment wrote, go into
the segment's footer, so that a start reads one footer and the tables behind it.

A rollback is a begin, refs, and a commit or an abort; nothing but refs and controls lies between,
for the disk is not served meanwhile. Its refs are versions once the commit is there; after an
abort, and as long as neither is there, they are none, anywhere.
"""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
from pyroaring import BitMap

from journal.format import Kind
from journal.segment import ENDLESS, Table

# A record of more blocks is one range operation on a bitmap; smaller ones are expanded together.
_EXPAND_BLOCKS_MAX: Final = 64


# ----------------------------------------------------------------------------------- rollbacks
@dataclasses.dataclass(frozen=True, slots=True)
class Rollback:
    """``begin``..``end`` are the seqs of its controls; ``end`` is ENDLESS while it is open.

    ``begin`` is 0 when that record has been reclaimed.
    """

    begin: int
    end: int
    committed: bool

    @property
    def open(self) -> bool:
        """Whether neither a commit nor an abort is there."""
        return self.end == ENDLESS


class Rollbacks:
    """The rollbacks of a redo log, from tables taken in order; what they make of ref rows.

    ``known``: rollbacks whose controls are not in any table any more (the catalog has them).
    """

    def __init__(self, known: Iterable[Rollback] = ()) -> None:
        self.list: list[Rollback] = sorted(known, key=lambda rollback: rollback.begin)
        # Controls up to here have been taken in.
        self.seq = max((rollback.end for rollback in self.list if not rollback.open), default=0)

    @property
    def open(self) -> Rollback | None:
        """The rollback that is neither committed nor aborted."""
        return self.list[-1] if self.list and self.list[-1].open else None

    def advance(self, table: Table) -> None:
        """Take in a table; rows that were taken in before are passed over."""
        kind = table.rows["kind"]
        controls = np.flatnonzero((kind >= Kind.ROLLBACK_BEGIN) & (kind <= Kind.ROLLBACK_ABORT))
        for row in controls.tolist():
            seq = table.first_seq + row
            if seq > self.seq:
                self.record(int(kind[row]), seq)
        self.seq = max(self.seq, table.last_seq)

    def record(self, kind: int, seq: int) -> None:
        """Take in one control record."""
        current = self.open
        if kind == Kind.ROLLBACK_BEGIN:
            if current is not None and current.begin == seq:
                return  # it was known
            if current is not None:  # never closed: its refs are none
                self.list[-1] = Rollback(current.begin, seq, False)
            self.list.append(Rollback(seq, ENDLESS, False))
            return
        begin = current.begin if current is not None else 0
        closed = Rollback(begin, seq, kind == Kind.ROLLBACK_COMMIT)
        if current is not None:
            self.list[-1] = closed
        else:
            self.list.append(closed)

    def valid(self, table: Table) -> np.ndarray:
        """Which rows are versions (bool): all but controls, lost rows and refs that are none."""
        return self._rows(table, committed=True)

    def undecided(self, table: Table) -> np.ndarray:
        """Which rows are refs of a rollback that is still open (bool)."""
        refs: np.ndarray = table.rows["kind"] == Kind.REF
        if refs.any():
            refs &= ~(self._refs(table, committed=True) | self._refs(table, committed=False))
        return refs

    def _rows(self, table: Table, *, committed: bool) -> np.ndarray:
        kind = table.rows["kind"]
        plain: np.ndarray = (kind >= Kind.WRITE) & (kind <= Kind.TRIM)
        if (kind == Kind.REF).any():
            plain |= self._refs(table, committed=committed)
        return plain

    def _refs(self, table: Table, *, committed: bool) -> np.ndarray:
        chosen = np.zeros(len(table.rows), bool)
        for rollback in self.list:
            if rollback.committed == committed and not rollback.open:
                low = max(0, rollback.begin - table.first_seq)
                high = max(0, rollback.end - table.first_seq)
                chosen[low:high] = True
        chosen &= table.rows["kind"] == Kind.REF
        return chosen


def void_refs(tables: Sequence[Table], known: Iterable[Rollback] = ()) -> Iterator[np.ndarray]:
    """For each of consecutive tables: which rows are refs that are no versions (bool).

    That is those of aborted rollbacks, and of one that is still open (:class:`Rollbacks` tells
    them apart).
    """
    rollbacks = Rollbacks(known)
    for table in tables:
        rollbacks.advance(table)
    for table in tables:
        yield (table.rows["kind"] == Kind.REF) & ~rollbacks.valid(table)


# ------------------------------------------------------------------------------------- bitmaps
def blocks_of(starts: np.ndarray, counts: np.ndarray) -> BitMap:
    """All blocks of the ranges."""
    large = counts > _EXPAND_BLOCKS_MAX
    small = ~large
    first, count = starts[small].astype(np.uint32), counts[small].astype(np.int64)
    if len(count) and int(count.max()) > 1:
        within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        first = np.repeat(first, count) + within.astype(np.uint32)
    # From an array.array it is six times faster than from numpy's.
    result = BitMap(array.array("I", first.tobytes()))
    for start, length in zip(starts[large].tolist(), counts[large].tolist(), strict=True):
        result.add_range(start, start + length)
    return result


@dataclasses.dataclass(slots=True)
class Bitmaps:
    """Masks as they develop over tables taken in order.

    ``rollback``: seq of the begin of a rollback that is open at this place, or 0; ``pending`` are
    its refs so far, (start, nblocks) columns: they count from the commit on.
    """

    masks: BitMap = dataclasses.field(default_factory=BitMap)
    rollback: int = 0
    pending: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    def copy(self) -> Bitmaps:
        """One that can be advanced on its own."""
        return Bitmaps(self.masks.copy(), self.rollback, list(self.pending))

    def advance(self, table: Table) -> BitMap:
        """Move the masks over a table; the blocks that it wrote (versions that are no trim).

        Refs of a rollback count in the table that holds them if it also holds the commit: which
        blocks were written errs towards too few only.
        """
        rows = table.rows
        kind = rows["kind"]
        written = BitMap()
        special = np.flatnonzero(
            ((kind >= Kind.ROLLBACK_BEGIN) & (kind <= Kind.GAP_END)) | (kind == Kind.REF)
        )
        if not len(special):
            self._versions(rows, written)
            return written
        inside = 0  # how many of the pending refs are from this table
        done = 0
        for at in special.tolist():
            if at < done:
                continue  # a ref of a stretch that was taken as a whole
            if at > done:
                self._versions(rows[done:at], written)
            done = at + 1
            if kind[at] == Kind.REF:
                end = _end_of_refs(kind, at)
                self.pending.append((rows["block"][at:end], rows["nblocks"][at:end]))
                inside += 1
                done = end
            elif kind[at] == Kind.ROLLBACK_BEGIN:
                self.rollback, self.pending, inside = table.first_seq + at, [], 0
            elif kind[at] in (Kind.ROLLBACK_COMMIT, Kind.ROLLBACK_ABORT):
                if kind[at] == Kind.ROLLBACK_COMMIT:
                    self._commit(inside, written)
                self.rollback, self.pending, inside = 0, [], 0
            else:  # what was written in a gap is not known: nothing before it holds any more
                self.masks.clear()
                written.clear()
        self._versions(rows[done:], written)
        return written

    def _commit(self, inside: int, written: BitMap) -> None:
        for number, (starts, counts) in enumerate(self.pending):
            blocks = blocks_of(starts, counts)
            self.masks -= blocks
            if number >= len(self.pending) - inside:
                written |= blocks

    def _versions(self, rows: np.ndarray, written: BitMap) -> None:
        """Rows without refs or rollback controls, in order."""
        kind = rows["kind"]
        content = (kind == Kind.WRITE) | (kind == Kind.ZERO)
        blocks = blocks_of(rows["block"][content], rows["nblocks"][content])
        written |= blocks
        trims = np.flatnonzero(kind == Kind.TRIM)
        if not len(trims):
            if self.masks:
                self.masks -= blocks
            return
        self._ordered(rows[content | (kind == Kind.TRIM)])

    def _ordered(self, rows: np.ndarray) -> None:
        """Content and trims mixed: large records one by one, what lies between them together."""
        large = np.flatnonzero(rows["nblocks"] > _EXPAND_BLOCKS_MAX).tolist()
        done = 0
        for at in [*large, len(rows)]:
            self._newest(rows[done:at])
            if at < len(rows):
                start, count = int(rows["block"][at]), int(rows["nblocks"][at])
                if rows["kind"][at] == Kind.TRIM:
                    self.masks.add_range(start, start + count)
                else:
                    self.masks.remove_range(start, start + count)
            done = at + 1

    def _newest(self, rows: np.ndarray) -> None:
        """Small records in order: the newest of each block decides."""
        if not len(rows):
            return
        count = rows["nblocks"].astype(np.int64)
        number = np.repeat(np.arange(len(rows)), count)
        within = np.arange(len(number)) - np.repeat(np.cumsum(count) - count, count)
        blocks = (rows["block"][number] + within.astype(np.uint64)).astype(np.uint32)
        order = np.argsort(blocks, kind="stable")
        blocks, trim = blocks[order], (rows["kind"] == Kind.TRIM)[number[order]]
        last = np.append(blocks[1:] != blocks[:-1], True)
        self.masks -= BitMap(array.array("I", blocks[last & ~trim].tobytes()))
        self.masks |= BitMap(array.array("I", blocks[last & trim].tobytes()))


def _end_of_refs(kind: np.ndarray, start: int) -> int:
    """Where the stretch of refs beginning at ``start`` ends."""
    others = np.flatnonzero(kind[start:] != Kind.REF)
    return start + int(others[0]) if len(others) else len(kind)
