"""No space for the journal: writes wait, and nobody is told ENOSPC.

A client that is told "no space left" gives up on its file system, and the administrator of a guest
can do nothing about it. So a write for which there is no space waits until there is some, as at the
journal's limit (`tail`), whatever the policy for the limit is.

**What waits.** Requests stay in the receive buffers of their connections, which are stalled. Only a
batch that was built already when its append was refused is kept here: there is at most one, for
from then on nothing is admitted any more. It is appended before anything else is: its edges were
filled with what the blocks held when it was built. Its requests were never answered, so nobody can
count on them; reads and flushes go on, also those of its own connection, up to the next change.

**When it is tried again**: now and then, and only while the curator says that the journal has room
(`Tail.has_room`); it may need what little space there is to make some. Every refusal is counted
where the curator sees it (`Frontier.redo_refused`), and with the policy ``shrink`` it gives up
history.

**How it ends otherwise.** A client that hangs up takes its batch with it, not executed (`loop` says
why). So does a clean stop: what was never acknowledged is not worth waiting for. A poisoned journal
answers it with an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from journal.errors import JournalFull, Poisoned

if TYPE_CHECKING:
    from cdp.recorder.batch import Batch
    from cdp.recorder.connection import Connection
    from cdp.recorder.engine import Recorder

log = logging.getLogger(__name__)

SECOND: Final = 1_000_000_000
# A refused append costs next to nothing; whoever frees space will not be kept waiting.
RETRY_NS: Final = SECOND // 10
# What comes and goes is logged once in so long a time.
SAID_NS: Final = 60 * SECOND


@dataclass(slots=True)
class Kept:
    """A batch that was built and could not be appended, with contents of its own."""

    connection: Connection
    batch: Batch

    @property
    def cookies(self) -> list[bytes]:
        """Of all its requests."""
        return self.batch.cookies + self.batch.fua


class NoSpace:
    """See the module. Times are ns of CLOCK_BOOTTIME.

    ``since``: when writes began to wait for room in the journal, or for space; 0: none do.
    ``why``: the error, if it is space. ``ending``: a clean stop has begun.
    """

    def __init__(self, recorder: Recorder, now: Callable[[], int]) -> None:
        self._recorder, self._now = recorder, now
        self._kept: Kept | None = None
        self._again = 0
        self._said_at = -SAID_NS
        self.ending = False
        self.since = 0
        self.why: str | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing is admitted until the next try."""
        return self._recorder.tail.no_space

    @property
    def seconds(self) -> float:
        """For how long writes have waited; 0.0: none do."""
        return (self._now() - self.since) / SECOND if self.since else 0.0

    # ---------------------------------------------------------------------------------- refusals
    def refused(self, error: JournalFull) -> None:
        """An append of clients' changes found no space: none is admitted until the next try."""
        now = self._now()
        self._recorder.frontier.redo_refused += 1
        self._again = now + RETRY_NS
        self.since, self.why = self.since or now, str(error)
        self._recorder.tail.set_space(there=False)
        if now - self._said_at > SAID_NS:
            self._said_at = now
            log.warning("writes wait: %s", error)

    def keep(self, connection: Connection, batch: Batch, error: JournalFull) -> None:
        """The same of a batch that was built; it is taken over, and the caller's is empty."""
        assert self._kept is None
        if self.ending:
            batch.clear()
            return
        kept = self._kept = Kept(connection, batch.take_over())
        connection.held = len(kept.cookies)
        connection.in_flight += connection.held
        self.refused(error)

    # ------------------------------------------------------------------------------- other tries
    def try_again(self, gone: Callable[[Connection], bool]) -> bool:
        """If it is time: append what is kept, or let others try. Whether anything may go on.

        ``gone`` tells of a client that has hung up, whose batch is given up then.
        """
        if not self.holds or self._now() < self._again:
            return False
        tail, kept = self._recorder.tail, self._kept
        self._recorder.advance()
        if not tail.has_room:
            return False  # it is the curator's turn; this is asked again at each look
        if kept is None:
            tail.set_space(there=True)
            return True
        if gone(kept.connection):
            return True
        try:
            self._recorder.append_batch(kept.batch, kept.connection)
        except JournalFull as error:
            self.refused(error)
            return False
        except Poisoned as error:
            self._recorder.poison(error)  # which answers it
            return True
        self._release()
        return True

    def settle(self, *, anybody: bool) -> None:
        """Note whether writes wait; ``anybody``: whether a connection is stalled, or has a batch
        here.
        """
        if anybody and self._recorder.tail.journal_bounds:
            self.since = self.since or self._now()
        else:
            self.since = 0
        if not self.holds:
            self.why = None

    # --------------------------------------------------------------------------------------- ends
    def forget(self, connection: Connection) -> int:
        """Its client has hung up: give up what is kept of it, unexecuted; how many requests."""
        if self._kept is None or self._kept.connection is not connection:
            return 0
        count = connection.held
        self._release()
        return count

    def fail(self, reason: str, code: int) -> None:
        """The journal is poisoned: nothing waits for space any more."""
        kept = self._kept
        self._release()
        if kept is not None:
            self._recorder.fail(kept.connection, kept.cookies, code, reason)

    def end(self) -> None:
        """A clean stop: what waits was never acknowledged, and is given up; so is what comes."""
        self.ending = True
        if self._kept is not None:
            self._recorder.statistics.discarded_requests += self._kept.connection.held
        self._release()

    def _release(self) -> None:
        """Nothing is kept any more, and others may try."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.connection.in_flight -= kept.connection.held
            kept.connection.held = 0
        self._recorder.tail.set_space(there=True)
