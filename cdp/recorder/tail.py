"""How much may be admitted, and how clients are slowed down before it is too much.

Two things bound it: what waits to be applied, and the journal's limit. (And its file system may
have no space, see `nospace`; that is not known beforehand.)

The tail is measured in bytes of *work*: what apply must write and, at worst, save before. A
write-zeroes of 4 GiB is a small record and much work; a trim is hardly any.

Up to half of the bound nobody is slowed down. Above it the rate at which work is admitted falls
smoothly towards the rate at which it is applied, so that clients see their latency grow long before
anything stops. At the bound nothing is admitted until something has been applied, with one
exception: a single record that is larger than the bound, which is admitted alone.

**The journal's room** is what the curator says may still be appended. Of it is taken what the tail
may yet cost: at worst apply saves as many bytes as it writes. While there is more room than `span`
nobody notices; within it the rate of admission is in proportion to the room that is left, and at
half of it the rate at which room has been made lately. So writing and giving up history meet there,
and only where no room is made at all it ends: slowly, and nothing is admitted any more.

The delay is a time until which nothing is *received* from whoever caused it (`resume_at`): requests
wait in the socket, the process does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

SECOND: Final = 1_000_000_000
# Until the curator's speed is known, and when it stands still: what it is taken for is such that
# admitting at that rate fills the upper half of the tail in half this time.
FILL_SECONDS: Final = 30.0
# Where room is not known to be made, half of what is left within the span is used up in this time.
ROOM_SECONDS: Final = 1.0
DELAY_NS_MAX: Final = SECOND // 4
RATE_SAMPLE_NS: Final = SECOND // 10
# Work of one record is at least this: applying it costs something, however small it is.
RECORD_WORK_MIN: Final = 512
# Entries of the history are this much work apart at least, so that it stays short.
_GRAIN: Final = 64 << 10
# A byte of content is so much work: to be saved, and to be written.
_WORK_PER_BYTE: Final = 2
_ENDLESS: Final = 1 << 62


class _Rate:
    """How fast a number rises, per ns, smoothed."""

    def __init__(self) -> None:
        self.value = 0.0
        self._at = self._number = 0

    def sample(self, number: int, now: int) -> None:
        """The number now."""
        if not self._at:
            self._at, self._number = now, number
            return
        elapsed = now - self._at
        if elapsed >= RATE_SAMPLE_NS:
            rate = max(0, number - self._number) / elapsed
            self.value = rate if not self.value else 0.7 * self.value + 0.3 * rate
            self._at, self._number = now, number


class Tail:
    """Work above `applied`, and room in the journal. Times are ns of one monotonic clock.

    ``total`` is all work ever appended, ``done`` what of it is applied; ``total`` may rise up to
    ``limit``. ``gentle``: from this total on clients are delayed. ``noted`` is called now and then,
    when some work was added. ``span``: bytes of room within which clients are delayed.
    ``no_space``: an append found none, and nothing is admitted before the next try.
    """

    def __init__(self, bound: int, *, span: int = 1 << 20) -> None:
        self.total = self.done = 0
        self.applied = 0
        self.last_seq = 0
        self.resume_at = 0
        self.peak_work = 0
        self.note_at = 0
        self._history: deque[tuple[int, int]] = deque()  # (seq, total after it)
        self._applying, self._freeing = _Rate(), _Rate()
        self._span = _WORK_PER_BYTE * span
        self._room_end = _ENDLESS  # the total that the journal has room for
        self.no_space = False
        self.bound = self.limit = self.gentle = 0
        self.noted: Callable[[], object] = _nothing
        self.set_bound(bound)

    def set_bound(self, bound: int) -> None:
        """Change how much may wait."""
        self.bound = bound
        self._set_limit()

    def set_room(self, room: int, allowed: int, now: int) -> None:
        """How many bytes the journal has room for; ``allowed``: the sum that this comes from, which
        rises by what the curator gives up.
        """
        self._room_end = self.done + _WORK_PER_BYTE * room
        self._freeing.sample(_WORK_PER_BYTE * allowed, now)
        self._set_limit()

    def set_space(self, *, there: bool) -> None:
        """Whether the journal's file system has space, as far as is known; without, nothing is
        admitted.
        """
        self.no_space = not there
        self._set_limit()

    def _set_limit(self) -> None:
        self.limit = -1 if self.no_space else min(self.done + self.bound, self._room_end)
        self.gentle = min(self.done + self.bound // 2, self._room_end - self._span)

    @property
    def held(self) -> bool:
        """Whether the journal has no room, or no space, for anything."""
        return self.no_space or not self.has_room

    @property
    def has_room(self) -> bool:
        """Whether the curator leaves room for anything."""
        return self._room_end - self.total >= RECORD_WORK_MIN

    @property
    def journal_bounds(self) -> bool:
        """Whether it is the journal, not what waits to be applied, that bounds what is admitted."""
        return self.no_space or self._room_end <= self.done + self.bound

    @property
    def cramped(self) -> bool:
        """Whether there is so little room that clients are delayed."""
        return self._room_end - self.total < self._span

    @property
    def work(self) -> int:
        """What waits to be applied."""
        return self.total - self.done

    def start(self, applied: int, last_seq: int) -> None:
        """Where a recorder begins."""
        self.applied, self.last_seq = applied, last_seq

    def add(self, last_seq: int, work: int) -> None:
        """Records up to `last_seq` were appended. (The hot path has these lines in line.)"""
        self.last_seq = last_seq
        self.total += work
        if self.total >= self.note_at:
            self.note()

    def note(self) -> None:
        """Remember how much work there was at this seq."""
        self._history.append((self.last_seq, self.total))
        self.note_at = self.total + _GRAIN
        self.noted()
        self.peak_work = max(self.peak_work, self.total - self.done)

    def advance(self, applied: int, now: int) -> bool:
        """Take notice of `applied`; whether it has risen."""
        if applied == self.applied:
            return False
        self.applied = applied
        history = self._history
        if applied >= self.last_seq:
            self.done = self.note_at = self.total
            history.clear()
        else:
            while history and history[0][0] <= applied:
                self.done = max(self.done, history.popleft()[1])
        self._set_limit()
        self._applying.sample(self.done, now)
        return True

    def admits(self, work: int) -> bool:
        """Whether a record may be appended now."""
        return self.total + work <= self.limit or (self.applied >= self.last_seq and not self.held)

    def delay(self, work: int, now: int) -> int:
        """Called after `work` was added: until when its client is not to be heard (0: no delay)."""
        cost = max(self._cost_of_tail(work), self._cost_of_room(work))
        if not cost:
            return 0
        self.resume_at = max(self.resume_at, now) + min(int(cost), DELAY_NS_MAX)
        return self.resume_at

    def _cost_of_tail(self, work: int) -> float:
        fill = (self.total - self.done) / self.bound
        if fill <= 0.5:
            return 0
        rate = max(self._applying.value, self.bound / (FILL_SECONDS * SECOND))
        # Twice the curator's rate at three quarters, no more than its rate at the bound.
        return work / (rate * (1.0 + max(0.0, 1.0 - fill) / (fill - 0.5)))

    def _cost_of_room(self, work: int) -> float:
        left = (self._room_end - self.total) / self._span
        if left >= 1:
            return 0
        rate = max(self._freeing.value, self._span / (2 * ROOM_SECONDS * SECOND))
        return work / (rate * 2 * left) if left > 0 else DELAY_NS_MAX


def _nothing() -> None:
    pass
