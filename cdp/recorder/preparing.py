"""When redo segments are prepared ahead (`journal.spares`): in quiet times, where there is plenty.

Only a disk that has filled a segment gets any. They count as a part of the journal, so they are few
against its limit; and when the journal or its file system has little room left they are given back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from cdp.recorder.engine import now_ns

if TYPE_CHECKING:
    from cdp.recorder.engine import Recorder

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 0.5
# After each MiB of zeroes, while clients write (or did, so lately), and while they do not.
PAUSE_SECONDS: Final = 0.01
IDLE_PAUSE_SECONDS: Final = 0.001
ACTIVE_NS: Final = 100_000_000
# At most so many, and so little of the journal's limit.
SPARES_MAX: Final = 4
SPARES_PART: Final = 32
# It is quiet while so little of the bound waits to be applied.
QUIET_PART: Final = 8
# Room in segments from which on one is made, and below which they are given back. (Space is made,
# in a small journal, when there are three; clients are slowed down from two on.)
ROOM_SEGMENTS: Final = 4
ROOM_SEGMENTS_MIN: Final = 2
# The same of the file system, which is others' too.
SPACE_SEGMENTS: Final = 64
SPACE_SEGMENTS_MIN: Final = 32


def count_for(journal_limit: int, segment_bytes: int) -> int:
    """How many files a journal of this limit may have prepared."""
    return min(SPARES_MAX, journal_limit // (SPARES_PART * segment_bytes))


class Preparing:
    """See the module. ``available``: bytes that the file system has left."""

    def __init__(self, recorder: Recorder, available: Callable[[], int]) -> None:
        self._recorder, self._available = recorder, available
        self._spares = recorder.writer.spares
        self._first_segment = recorder.writer.segment
        self._stopping = False

    async def run(self) -> None:
        """Until it is cancelled, after `stop`: what is being made ends first."""
        while self._spares.count:
            await trio.sleep(LOOK_SECONDS)
            while await trio.to_thread.run_sync(self.step):
                pass

    def stop(self) -> None:
        """Make no more."""
        self._stopping = True

    def step(self) -> bool:
        """Make one, or give all back, or nothing; whether one was made. Blocks."""
        try:
            if self._is_cramped():
                self._spares.discard()
            elif self._spares.wanted and self._is_wanted():
                return self._spares.prepare(self._pause)
        except OSError as error:
            # Nothing depends on it. What is wrong shows where it matters.
            log.info("no segment could be prepared: %s", error.strerror)
            self._spares.discard()
        return False

    def _room(self) -> int | None:
        """What the journal has room for, in segments; None: nobody has said so far."""
        frontier = self._recorder.frontier
        allowed = frontier.redo_bytes_max
        if not allowed:
            return None
        return (allowed - frontier.redo_bytes) // self._spares.segment_bytes

    def _space(self) -> int:
        return self._available() // self._spares.segment_bytes

    def _is_cramped(self) -> bool:
        room = self._room()
        return room is not None and (room < ROOM_SEGMENTS_MIN or self._space() < SPACE_SEGMENTS_MIN)

    def _is_wanted(self) -> bool:
        room = self._room()
        return (
            self._recorder.writer.segment > self._first_segment
            and room is not None
            and room > ROOM_SEGMENTS
            and self._space() > SPACE_SEGMENTS
            and self._may_go_on()
        )

    def _pause(self) -> bool:
        active = now_ns(time.CLOCK_BOOTTIME) - self._recorder.active_at < ACTIVE_NS
        time.sleep(PAUSE_SECONDS if active else IDLE_PAUSE_SECONDS)
        return self._may_go_on()

    def _may_go_on(self) -> bool:
        recorder = self._recorder
        quiet = recorder.tail.work * QUIET_PART <= recorder.tail.bound
        # While writes wait there is no space, whatever the file system says (btrfs does not know).
        return (
            quiet
            and not recorder.no_space.since
            and recorder.poisoned is None
            and not self._stopping
        )
