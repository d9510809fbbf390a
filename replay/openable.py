"""Which seqs can be opened: the question behind every decision to save, keep or drop something.

A point S is the disk after record S; S = 0 is the disk before the first. Openable are

* the window, every S from ``window_start`` to ``durable``, and
* single points: targets of bookmarks, pins, thinned points, sources of refs in the redo log,

but never, whatever names it, an S above ``durable``; inside a rollback, from its begin up to but
not including its commit or abort (without end while it is open); inside a gap, from its begin up to
its end; or in a hole, a range of seqs that have no record.

"Is there an openable S in [lo, hi)?" must never be answered no wrongly: something needed would be
dropped. Yes wrongly only keeps more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

Seqs = npt.NDArray[np.uint64]
Interval = tuple[int, int]

SEQ_END: Final = (1 << 64) - 1  # above every seq
NONE: Final = SEQ_END  # "there is none", in answers


class Begun(Protocol):
    """A rollback or gap: from record ``begin`` to record ``end``, None while it is open."""

    @property
    def begin(self) -> int: ...

    @property
    def end(self) -> int | None: ...


class Range(Protocol):
    """A hole: ``first`` to ``last``, both included."""

    @property
    def first(self) -> int: ...

    @property
    def last(self) -> int: ...


class Named(Protocol):
    """A bookmark, pin or thinned point."""

    @property
    def seq(self) -> int: ...


def closed_off(
    rollbacks: Iterable[Begun] = (), gaps: Iterable[Begun] = (), holes: Iterable[Range] = ()
) -> list[Interval]:
    """The half-open intervals in which nothing is openable."""
    found = [(hole.first, hole.last + 1) for hole in holes]
    for each in (*rollbacks, *gaps):
        found.append((each.begin, SEQ_END if each.end is None else each.end))
    return found


class Openable:
    """A set of openable seqs as it is at one moment; immutable.

    Questions take numbers or u64 arrays and answer with arrays of the same shape.
    """

    __slots__ = ("_ends", "_starts", "durable", "window_start")

    def __init__(
        self,
        *,
        window_start: int,
        durable: int,
        unopenable: Iterable[Interval] = (),
        points: Iterable[int] = (),
    ) -> None:
        """
        :param unopenable: half-open intervals, in any order, overlapping or not.
        :param points: single ones; those above ``durable`` or inside ``unopenable`` are left out.
        """
        self.window_start, self.durable = window_start, durable
        ranges = [(window_start, durable + 1)] if window_start <= durable else []
        ranges += [(point, point + 1) for point in points if point <= durable]
        kept = _without(_union(ranges), _union(unopenable))
        self._starts = np.array([start for start, _ in kept], np.uint64)
        self._ends = np.array([end for _, end in kept], np.uint64)

    @classmethod
    def of(
        cls,
        *,
        window_start: int,
        durable: int,
        rollbacks: Iterable[Begun] = (),
        gaps: Iterable[Begun] = (),
        holes: Iterable[Range] = (),
        named: Iterable[Named] = (),
        refs: Iterable[int] = (),
    ) -> Openable:
        """The set that a catalog's state and the redo log's refs tell.

        :param named: bookmarks, pins and thinned points.
        :param refs: the source seqs of all refs in the redo log, also of those not durable yet.
        """
        return cls(
            window_start=window_start,
            durable=durable,
            unopenable=closed_off(rollbacks, gaps, holes),
            points=(*(each.seq for each in named), *refs),
        )

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._starts)

    def wanted(self, lo: int | Seqs, hi: int | Seqs) -> npt.NDArray[np.bool_]:
        """Whether an openable S lies in [lo, hi)."""
        low, high = _column(lo), _column(hi)
        if not len(self._starts):
            return np.zeros(np.broadcast_shapes(low.shape, high.shape), np.bool_)
        at = np.searchsorted(self._ends, low, "right")
        last = len(self._starts) - 1
        start = np.maximum(self._starts[np.minimum(at, last)], low)
        return np.asarray((at <= last) & (start < high))

    def contains(self, seq: int | Seqs) -> npt.NDArray[np.bool_]:
        """Whether each is openable."""
        at = _column(seq)
        inside = np.searchsorted(self._starts, at, "right")
        return np.asarray(inside > np.searchsorted(self._ends, at, "right"))

    def first_at_or_after(self, seq: int | Seqs) -> Seqs:
        """The smallest openable one that is not below; NONE if there is none."""
        at = _column(seq)
        if not len(self._starts):
            return np.full(at.shape, NONE, np.uint64)
        place = np.searchsorted(self._ends, at, "right")
        last = len(self._starts) - 1
        found = np.maximum(self._starts[np.minimum(place, last)], at)
        return np.where(place <= last, found, np.uint64(NONE))

    def last_at_or_before(self, seq: int | Seqs) -> Seqs:
        """The largest openable one that is not above; NONE if there is none."""
        at = _column(seq)
        if not len(self._starts):
            return np.full(at.shape, NONE, np.uint64)
        place = np.searchsorted(self._starts, at, "right")
        found = np.minimum(self._ends[np.maximum(place, 1) - 1] - np.uint64(1), at)
        return np.where(place > 0, found, np.uint64(NONE))

    def ranges(self) -> Sequence[tuple[int, int]]:
        """The openable ranges (first, last), both included, ascending and apart."""
        return list(zip(self._starts.tolist(), (self._ends - np.uint64(1)).tolist(), strict=True))


def _column(value: int | Seqs) -> Seqs:
    """As u64: a mixture with signed numbers would be compared as floating point."""
    return np.asarray(value, np.uint64)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same set as intervals that are sorted and do not touch."""
    found: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _without(intervals: list[Interval], removed: list[Interval]) -> list[Interval]:
    """What is left of sorted intervals without others; both as :func:`_union` makes them."""
    found = []
    place = 0
    for start, end in intervals:
        while place < len(removed) and removed[place][1] <= start:
            place += 1
        at = place
        while at < len(removed) and removed[at][0] < end:
            if start < removed[at][0]:
                found.append((start, removed[at][0]))
            start = removed[at][1]
            at += 1
        if start < end:
            found.append((start, end))
    return found
