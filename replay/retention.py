"""What to give up next, and when: pure decisions of the curator's housekeeping.

Retention only decides which points are openable; R4 and R5 do the rest. **Reclaim late**: a segment
whose versions are mostly superseded costs little to reclaim, one at the window's edge is copied
nearly whole. So a part of the redo log is kept behind the window's start before its oldest segment
is reclaimed.

At the limit the order is: sweep undo segments that are mostly garbage; reclaim what lies behind the
window's start; only then, and only if the policy says so (``shrink``), move the window's start, far
enough that the next segments lie well behind it. Bookmarks and pins are never given up here: when
only they are left, or when the policy is another, the disk throttles. What is not applied yet can
be given up as soon as it is: until then there is nothing to do but to wait.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Sequence

LAG_PART = 0.25  # of the redo log's bytes kept behind the window's start
# Of the limit, from where on space is made, and where that stops; and at least so many segments
# below: what arrives while one is given up must find room. Half of the limit is always used.
HIGH = 0.92
HIGH_SEGMENTS = 3
LOW = 0.85
LOW_SEGMENTS = 4
USED_PART = 0.5
SWEEP_GARBAGE = 0.5  # of an undo segment: worth a sweep
SWEEP_GARBAGE_PRESSED = 0.25
SWEEP_GARBAGE_LEAST = 0.02


class Action(enum.Enum):
    """The next housekeeping step."""

    NOTHING = "nothing"
    RECLAIM = "reclaim"  # the oldest redo segment
    SWEEP = "sweep"  # undo segments, most garbage first
    SHRINK = "shrink"  # move the window's start to ``seq``
    WAIT = "wait"  # until more is applied
    THROTTLE = "throttle"  # nothing is left to give up


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A redo segment: its seqs, its bytes, whether nothing will be appended to it any more."""

    first_seq: int
    last_seq: int
    size: int
    closed: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Bytes per kind of file; ``limit`` over everything, ``segment`` the size of a full one."""

    redo: int
    undo: int
    other: int
    limit: int
    segment: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.redo + self.undo + self.other

    @property
    def room(self) -> int:
        """What may still be added; less than nothing above the limit."""
        return self.limit - self.total

    def above(self, part: float, segments: int) -> bool:
        """Whether more than this part of the limit is used, and all but so many segments."""
        mark = min(self.limit * part, self.limit - segments * self.segment)
        return self.total > max(mark, self.limit * USED_PART)

    @property
    def high(self) -> bool:
        """Whether it is time to make space."""
        return self.above(HIGH, HIGH_SEGMENTS)


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and for SHRINK the new first seq of the window."""

    action: Action
    seq: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Situation:
    """What a decision rests on.

    ``segments``: of the redo log, oldest first; up to ``durable``. ``undo_garbage``: the largest
    garbage part of an undo segment that can be swept, 0 when there is none. ``full``: the file
    system has no space, whatever the limit says. ``freeing``: freeing has begun and not yet reached
    LOW. ``stuck``: the oldest segment cannot be reclaimed as things are. ``may_shrink``: the policy
    allows to give up history.
    """

    usage: Usage
    segments: Sequence[Segment]
    applied: int
    durable: int
    window_start: int
    undo_garbage: float = 0.0
    full: bool = False
    freeing: bool = False
    stuck: bool = False
    may_shrink: bool = True


def decide(now: Situation) -> Decision:
    """The next step."""
    usage, window_start = now.usage, now.window_start
    pressed = now.full or (usage.above(LOW, LOW_SEGMENTS) if now.freeing else usage.high)
    shrink = _shrink_to(now) if pressed and now.may_shrink else window_start
    if now.undo_garbage >= (SWEEP_GARBAGE_PRESSED if pressed else SWEEP_GARBAGE):
        return Decision(Action.SWEEP)
    oldest = now.segments[0] if now.segments else None
    if (
        oldest is not None and oldest.closed and not now.stuck
        and oldest.last_seq <= now.applied and oldest.last_seq <= window_start
    ):  # fmt: skip
        behind = sum(each.size for each in now.segments if each.last_seq <= window_start)
        if behind > max(2 * oldest.size, int(usage.redo * LAG_PART)):
            return Decision(Action.RECLAIM)
        # Rather than to copy what lies at the window's edge, the edge is moved on, if it may be.
        if pressed and (shrink == window_start or behind > usage.redo * LAG_PART / 2):
            return Decision(Action.RECLAIM)
    if not pressed:
        return Decision(Action.NOTHING)
    if shrink > window_start:
        return Decision(Action.SHRINK, shrink)
    if now.undo_garbage > SWEEP_GARBAGE_LEAST:
        return Decision(Action.SWEEP)
    return Decision(Action.WAIT if now.applied < now.durable and not now.full else Action.THROTTLE)


def _shrink_to(now: Situation) -> int:
    """First seq of the segment behind LAG_PART of the redo log's bytes, at least one segment on."""
    passed = 0
    for segment, following in itertools.pairwise(now.segments):
        if not segment.closed or segment.last_seq > now.applied:
            break
        passed += segment.size
        if passed >= now.usage.redo * LAG_PART and following.first_seq > now.window_start:
            return min(following.first_seq, now.applied)
    # The redo log is short: what fills the limit is the undo log, or the unapplied tail. Half of
    # what is applied of the window goes.
    return now.window_start + (max(now.applied, now.window_start) - now.window_start + 1) // 2
