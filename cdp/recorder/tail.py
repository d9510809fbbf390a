"""How much may wait to be applied, and how clients are slowed down before it is too much.

The tail is measured in bytes of *work*: what apply must write and, at worst, save before. A
write-zeroes of 4 GiB is a small record and much work; a trim is hardly any.

Up to half of the bound nobody is slowed down. Above it the rate at which work is admitted falls
smoothly towards the rate at which it is applied, so that clients see their latency grow long before
anything stops. At the bound nothing is admitted until something has been applied, with one
exception: a single record that is larger than the bound, which is admitted alone.

The delay is a time until which nothing is *received* from whoever caused it (`resume_at`): requests
wait in the socket, the process does not.
"""

from __future__ import annotations

from collections import deque
from typing import Final

SECOND: Final = 1_000_000_000
# Until the curator's speed is known, and when it stands still: what it is taken for is such that
# admitting at that rate fills the upper half of the tail in half this time.
FILL_SECONDS: Final = 30.0
DELAY_NS_MAX: Final = SECOND // 4
RATE_SAMPLE_NS: Final = SECOND // 10
# Work of one record is at least this: applying it costs something, however small it is.
RECORD_WORK_MIN: Final = 512
# Entries of the history are this much work apart at least, so that it stays short.
_GRAIN: Final = 64 << 10


class Tail:
    """Work above `applied`. Times are nanoseconds of one monotonic clock.

    ``total`` is all work ever appended, ``done`` what of it is applied; ``total`` may rise up to
    ``limit``. ``gentle``: from this total on clients are delayed.
    """

    def __init__(self, bound: int) -> None:
        self.total = self.done = 0
        self.applied = 0
        self.last_seq = 0
        self.resume_at = 0
        self.peak_work = 0
        self.note_at = 0
        self._history: deque[tuple[int, int]] = deque()  # (seq, total after it)
        self._rate = 0.0  # work applied per ns
        self._sample_at = 0
        self._sample_work = 0
        self.bound = self.limit = self.gentle = 0
        self.held = False
        self.set_bound(bound)

    def set_bound(self, bound: int) -> None:
        """Change how much may wait."""
        self.bound = bound
        self._set_limit()

    def hold(self, held: bool) -> None:
        """Admit nothing at all, or as usual: the curator asks for it while the journal is full."""
        self.held = held
        self._set_limit()

    def _set_limit(self) -> None:
        self.limit = -1 if self.held else self.done + self.bound
        self.gentle = self.done + self.bound // 2

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
        self._sample(now)
        return True

    def _sample(self, now: int) -> None:
        if not self._sample_at:
            self._sample_at, self._sample_work = now, self.done
            return
        elapsed = now - self._sample_at
        if elapsed >= RATE_SAMPLE_NS:
            rate = (self.done - self._sample_work) / elapsed
            self._rate = rate if not self._rate else 0.7 * self._rate + 0.3 * rate
            self._sample_at, self._sample_work = now, self.done

    def admits(self, work: int) -> bool:
        """Whether a record may be appended now."""
        return self.total + work <= self.limit or (self.applied >= self.last_seq and not self.held)

    def delay(self, work: int, now: int) -> int:
        """Called after `work` was added: until when its client is not to be heard (0: no delay)."""
        fill = (self.total - self.done) / self.bound
        if fill <= 0.5:
            return 0
        rate = max(self._rate, self.bound / (FILL_SECONDS * SECOND))
        # Twice the curator's rate at three quarters, no more than its rate at the bound.
        allowed = rate * (1.0 + max(0.0, 1.0 - fill) / (fill - 0.5))
        cost = min(int(work / allowed), DELAY_NS_MAX)
        self.resume_at = max(self.resume_at, now) + cost
        return self.resume_at
