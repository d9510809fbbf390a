"""The loop: receives from all clients of the disk, has their requests executed, sends replies.

One trio task. While there is work it does not await at all, but for a checkpoint each two
milliseconds, so that the process's other tasks run. When nothing comes any more it polls the
sockets for some tens of microseconds, as long as that has paid off lately; then, if a client waits
for a sync, it makes the checkpoint that would be due soon, and waits for a millisecond without
trio; and then it parks in trio, until a socket, the sync thread or a reader thread has
something. All sockets are in an epoll of its own, which trio waits for: a call of trio's per socket
and request would cost more than the request.

**Nothing of an older connection is executed after the first request of a newer one** was: clients
resend after reconnecting, and what lay in the old socket must not overwrite it. So a new connection
waits (`_admit`) until what was readable on the older ones when it came is executed or discarded.
Whether a client has hung up is asked before every batch, and again before what was parked is
executed (`connection` says why).
"""

from __future__ import annotations

import logging
import os
import select
import time
from typing import TYPE_CHECKING, Final

import trio

from cdp.nbd.transmission import PAYLOAD_POS, scan
from cdp.nbd.wire import NBD_CMD_READ, REQUEST, RemoteProtocolError
from journal.format import BLOCK

if TYPE_CHECKING:
    from cdp.recorder.connection import Connection
    from cdp.recorder.engine import Recorder

log = logging.getLogger(__name__)

# The time between two checkpoints of trio's: at most, and at least.
BUSY_NS: Final = 2_000_000
IDLE_NS: Final = 500_000
# Polling: how long, while it pays off, and what makes it worth another try.
SPIN_NS_MAX: Final = 40_000
SPIN_NS_MIN: Final = 5_000
SPIN_SOON_NS: Final = 80_000
DOZE_SECONDS: Final = 0.001
# Events that one poll takes in: Python allocates room for all of them, a thousand without a bound.
EVENTS_MAX: Final = 32
# Shorter delays add up until they are worth a pause.
PAUSE_NS_MIN: Final = 1_000_000
# How often `applied` is looked at while somebody waits for it.
STALL_SECONDS: Final = 0.002
# Changes that one connection may have parked, and bytes that all may.
PARKED_MAX: Final = 1024
PARKED_BYTES_MAX: Final = 64 << 20
# With several connections: turns between two looks at those that were silent.
TURNS_MAX: Final = 8
_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT
_HANGUP: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_HEADER: Final = REQUEST.size
_STRIDE: Final = REQUEST.size + BLOCK
_TYPE_AT: Final = 7  # the low byte of a request's type
# What `_step` found.
NOTHING: Final = 0
SOMETHING: Final = 1
AND_MORE: Final = 2
_BOOTTIME: Final = time.CLOCK_BOOTTIME
now_ns = time.clock_gettime_ns


class Loop:
    """Serves the connections of one recorder.

    ``troubled`` are those for which something has to be done besides receiving and executing:
    replies to be sent, a pause to end, a stall, a close.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.connections: dict[int, Connection] = {}
        self.stopping = False
        self._epoll = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wakeup, _IN)
        self._hot: list[Connection] = []
        self._waiting: list[Connection] = []
        self._troubled: set[Connection] = set()
        self._parked = False
        self._attention = False
        self._spin_ns = SPIN_NS_MAX
        self._checkpoint_at = 0
        self._throttled_since = 0
        self._turns = 0
        self._number = 0

    # ------------------------------------------------------------------------- from other tasks
    def notify(self) -> None:
        """There is something besides requests: look at it soon. Callable from any thread."""
        self._attention = True
        # The loop sets the flag `_parked` before it looks at the other one for the last time.
        if self._parked:
            os.eventfd_write(self._wakeup, 1)

    def attach(self, connection: Connection) -> None:
        """Serve a new connection, after what is readable on the older ones."""
        self._number += 1
        connection.number = self._number
        self.recorder.statistics.connections_total += 1
        for old in list(self.connections.values()):
            if not old.farewell and old.hung_up() and not self._may_go_on(old):
                continue
            connection.behind[old] = old.received + old.readable()
            old.urgent = True
            self._troubled.add(old)
        self.connections[connection.fd] = connection
        connection.backlog = self._troubled
        connection.events = select.EPOLLRDHUP
        self._epoll.register(connection.fd, connection.events)
        self._waiting.append(connection)
        self.notify()

    def hear_nobody(self) -> None:
        """Receive nothing any more; connections are closed once their replies are sent. What waits
        for space is given up.
        """
        self.recorder.no_space.end()
        for connection in list(self.connections.values()):
            if connection.admitted:
                connection.closing = True
                connection.stalled = False
                self._troubled.add(connection)
            else:
                self._close(connection)
        self.notify()

    def close_all(self) -> None:
        """Close every connection; what they have in their buffers is not executed."""
        for connection in list(self.connections.values()):
            self._close(connection)

    def stop(self) -> None:
        """End `run`."""
        self.stopping = True
        self.notify()

    # -------------------------------------------------------------------------------------- run
    async def run(self) -> None:
        """Serve until `stop`; connections are closed then."""
        try:
            while not self.stopping:
                if self._turn() or self._spin():
                    if now_ns(_BOOTTIME) < self._checkpoint_at:
                        continue
                    await trio.lowlevel.checkpoint()
                elif self._may_yield():
                    await trio.lowlevel.checkpoint()
                elif self._doze():
                    continue
                else:
                    await self._park()
                self._checkpoint_at = now_ns(_BOOTTIME) + BUSY_NS
        finally:
            self.close_all()
            self._epoll.close()
            os.close(self._wakeup)
            self._parked = False

    def _turn(self) -> bool:
        """One look at everything that may have work; whether any had."""
        progress = False
        if self._attention or self._troubled or self._waiting:
            progress = self._attend()
        hot = self._hot
        if hot:
            self._hot = []
            for connection in hot:
                found = self._step(connection)
                if found:
                    progress = True
                    if found == AND_MORE:
                        self._hot.append(connection)
            if len(self.connections) > 1:
                self._turns += 1
                if self._turns >= TURNS_MAX:
                    self._turns = 0
                    self._poll()
        return progress

    def _attend(self) -> bool:
        """What threads have finished, who is in trouble, who is new; whether anything moved."""
        recorder = self.recorder
        self._attention = progress = False
        if recorder.syncer.finished:
            recorder.collect_sync()
            progress = True
            # Who is told that it is durable often goes on at once.
            self._spin_ns = SPIN_NS_MAX
        no_space = recorder.no_space
        if no_space.holds:
            progress |= no_space.try_again(self._gone)
        if recorder.readers.done:
            recorder.readers.finish_done()
            progress = True
        if recorder.changes.locks.ready and not no_space.holds:
            progress |= recorder.changes.resume_parked(self._gone)
            if recorder.changes.locks.ready and not no_space.holds:
                self._attention = True  # those there was no room for are tried again
        if self._waiting:
            progress |= self._admit()
        if self._troubled or self._throttled_since:
            progress |= self._chores()
        if no_space.since or self._troubled:
            no_space.settle(anybody=any(each.stalled or each.held for each in self._troubled))
        return progress

    def _spin(self) -> bool:
        """Poll for a moment; whether something came.

        A client that is alone is served right here: of one that waits for each reply before its
        next request, all that is done between poll and reply, and back to the poll, is latency.
        """
        poll = self._epoll.poll
        alone, expected = self._alone()
        end = now_ns(_BOOTTIME) + self._spin_ns if self.connections else 0
        while True:
            events = poll(0, EVENTS_MAX)
            if events:
                self._spin_ns = SPIN_NS_MAX
                if events != expected or alone is None:
                    self._take(events)
                    return True
                alone.polled = self.recorder.writer.last_seq
                found = self._step(alone)
                if found == AND_MORE:
                    self._hot.append(alone)
                now = now_ns(_BOOTTIME)
                if (
                    found != SOMETHING
                    or self._attention
                    or self._troubled
                    or self._waiting
                    or now >= self._checkpoint_at
                ):
                    return True
                end = now + SPIN_NS_MAX
            elif self._attention:
                self._spin_ns = SPIN_NS_MAX
                return True
            elif now_ns(_BOOTTIME) >= end:
                break
        self._spin_ns //= 2
        if self._spin_ns < SPIN_NS_MIN:
            self._spin_ns = 0
        return False

    def _alone(self) -> tuple[Connection | None, list[tuple[int, int]]]:
        """The only connection, if there is one, and what a poll says when it has sent something."""
        if len(self.connections) != 1:
            return None, []
        (connection,) = self.connections.values()
        return connection, [(connection.fd, _IN)]

    def _may_yield(self) -> bool:
        """While a client waits for a sync: whether the checkpoint after that is better made now."""
        if not self.recorder.waits:
            return False
        return now_ns(_BOOTTIME) > self._checkpoint_at - BUSY_NS + IDLE_NS

    def _doze(self) -> bool:
        """While a client waits for a sync: wait for a millisecond without trio.

        Trio takes as long to wake us as a request takes. Whether something came.
        """
        if not self.recorder.waits or self.stopping:
            return False
        self._parked = True
        try:
            began = now_ns(_BOOTTIME)
            timeout = self._timeout(began)
            if self._attention or (timeout is not None and timeout < DOZE_SECONDS):
                return False
            events = self._epoll.poll(DOZE_SECONDS, EVENTS_MAX)
        finally:
            self._parked = False
        if not events:
            return False
        if now_ns(_BOOTTIME) - began < SPIN_SOON_NS:
            self._spin_ns = SPIN_NS_MAX
        self._take(events)
        return True

    async def _park(self) -> None:
        self._parked = True
        try:
            parked_at = now_ns(_BOOTTIME)
            timeout = self._timeout(parked_at)
            if self.stopping or (self._attention and timeout is None):
                await trio.lowlevel.checkpoint()
            elif timeout is None:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            else:
                with trio.move_on_after(timeout):
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
        finally:
            self._parked = False
        if self._poll() and now_ns(_BOOTTIME) - parked_at < SPIN_SOON_NS:
            self._spin_ns = SPIN_NS_MAX

    def _timeout(self, now: int) -> float | None:
        """Seconds until something must be looked at again, None: nothing."""
        waits = not self.recorder.no_space.holds  # else the process's ticker draws our attention
        timeout = STALL_SECONDS if waits and self.recorder.changes.locks.ready else None
        for connection in self._troubled:
            if connection.stalled and not connection.resume_at:
                if not waits:
                    continue
                wait = STALL_SECONDS
            elif connection.resume_at:
                wait = max(0.0, (connection.resume_at - now) / 1e9)
            else:
                continue
            timeout = wait if timeout is None else min(timeout, wait)
        return timeout

    def _poll(self) -> bool:
        """Take in what the sockets have to say; whether anything."""
        events = self._epoll.poll(0, EVENTS_MAX)
        if not events:
            return False
        self._take(events)
        return True

    def _take(self, events: list[tuple[int, int]]) -> None:
        """What a poll found."""
        last_seq = self.recorder.writer.last_seq
        for fd, what in events:
            connection = self.connections.get(fd)
            if connection is None:
                if fd == self._wakeup:
                    self._drain_wakeup()
                continue
            if what == _IN:
                # Has not hung up: so it need not be asked before the next append.
                connection.polled = last_seq
                if connection not in self._hot:
                    self._hot.append(connection)
                continue
            if what & _OUT:
                connection.flush_out()
                self._troubled.add(connection)
            if what & _HANGUP and not self._receives(connection):
                self._may_go_on(connection)
            elif what & (_IN | _HANGUP) and connection not in self._hot:
                self._hot.append(connection)

    def _drain_wakeup(self) -> None:
        try:
            os.eventfd_read(self._wakeup)
        except BlockingIOError:
            pass

    # ------------------------------------------------------------------------------- connections
    def _receives(self, connection: Connection) -> bool:
        """Whether the connection may be heard now."""
        return (
            connection.admitted
            and not connection.stalled
            and not connection.resume_at
            and not connection.closing
            and not connection.farewell
            and connection.parked < PARKED_MAX
            and self.recorder.changes.locks.bytes < PARKED_BYTES_MAX
            and (connection.urgent or not (connection.blocked or connection.deferred))
        )

    def _step(self, connection: Connection) -> int:
        """Receive and execute; whether there was anything, and whether more is to be expected."""
        if connection.closed or (connection in self._troubled and not self._receives(connection)):
            return NOTHING
        count = connection.receive()
        if count <= 0:
            if count == 0:
                return NOTHING
            if connection.held:
                self._discard(connection)
            else:
                self._close(connection)
            return SOMETHING
        last_seq = self.recorder.writer.last_seq
        if connection.polled == last_seq or not connection.hung_up():
            connection.polled = last_seq
            if connection.view[connection.start + _TYPE_AT] == NBD_CMD_READ:
                executed = self.recorder.reads.execute_plain(connection)
            else:
                executed = self.recorder.execute_plain(connection)
            if connection.start == connection.end and not connection.resume_at:
                connection.start = connection.end = 0
                return AND_MORE if executed > 1 else SOMETHING
        self._process(connection)
        return AND_MORE if count > _STRIDE or connection.end else SOMETHING

    def _process(self, connection: Connection) -> None:
        """Execute the complete requests in the buffer."""
        recorder = self.recorder
        while not connection.closed:
            try:
                requests, start, needed = scan(
                    connection.view, connection.start, connection.end, connection.limits
                )
            except RemoteProtocolError as error:
                self._protocol_error(connection, error)
                return
            if not requests:
                connection.executed(start)
                connection.wants(needed)
                break
            if (
                connection.polled != recorder.writer.last_seq
                and not connection.farewell
                and connection.hung_up()
            ):
                if not self._may_go_on(connection):
                    return
                connection.stalled = False
                continue  # more was received, and what was scanned may have moved
            taken = recorder.execute(connection, requests)
            if taken < len(requests):
                connection.executed(requests[taken][PAYLOAD_POS] - _HEADER)
                connection.stalled = True
                break
            connection.executed(start)
            if needed or connection.closing:
                connection.wants(needed)
                break
            if connection.resume_at:
                connection.stalled = True
                break
        if connection.resume_at and connection.resume_at - now_ns(_BOOTTIME) < PAUSE_NS_MIN:
            connection.resume_at = 0
        if (
            connection.stalled
            or connection.resume_at
            or connection.closing
            or connection.deferred
            or connection.parked
            or connection.held
            or connection.broken
        ):
            self._troubled.add(connection)

    def _may_go_on(self, connection: Connection) -> bool:
        """After a hang-up: whether its requests are to be executed. If not they are discarded.

        If they are, and nobody is at it, the connection counts as stalled until they have been.
        """
        if connection.farewell or connection.closing:
            self._unregister(connection)
            return True
        if connection.read_farewell():
            self._unregister(connection)
            connection.stalled = True
            return True
        self._discard(connection)
        return False

    def _gone(self, connection: Connection) -> bool:
        """Whether a client has hung up and what it left is discarded."""
        if connection.closed:
            return True
        if connection.farewell or not connection.hung_up():
            return False
        return not self._may_go_on(connection)

    def _discard(self, connection: Connection) -> None:
        statistics = self.recorder.statistics
        lost = connection.unexecuted() + self.recorder.changes.locks.forget(connection)
        lost += self.recorder.no_space.forget(connection)
        if lost:
            log.info(
                "%r hung up: %d requests that it left, unanswered, are not executed",
                connection, lost,
            )  # fmt: skip
        statistics.discarded_requests += lost
        statistics.discarded_connections += 1
        self._close(connection)

    def _protocol_error(self, connection: Connection, error: RemoteProtocolError) -> None:
        log.info("%r is cut off: %s", connection, error)
        self.recorder.statistics.protocol_error("transmission")
        self._close(connection)

    def _unregister(self, connection: Connection) -> None:
        if connection.events:
            self._epoll.unregister(connection.fd)
            connection.events = 0
        self._troubled.add(connection)

    def _close(self, connection: Connection) -> None:
        if connection.closed:
            return
        if connection.events:
            self._epoll.unregister(connection.fd)
            connection.events = 0
        self.recorder.changes.locks.forget(connection)
        self.recorder.no_space.forget(connection)
        self.connections.pop(connection.fd, None)
        self._troubled.discard(connection)
        if connection in self._waiting:
            self._waiting.remove(connection)
        connection.close()

    # -------------------------------------------------------------------------------- admission
    def _admit(self) -> bool:
        """Begin with new connections that nothing older is in front of any more."""
        progress = False
        for connection in list(self._waiting):
            for old, target in list(connection.behind.items()):
                if old.closed or (
                    old.admitted
                    and not old.stalled
                    and not old.parked
                    and not old.held
                    and (old.received >= target or old.closing)
                ):
                    del connection.behind[old]
            if connection.behind or connection.closed:
                continue
            self._waiting.remove(connection)
            connection.admitted = True
            connection.stalled = False
            progress = True
            self._process(connection)
            if not connection.closed:
                self._troubled.add(connection)
        if not self._waiting:
            for connection in self.connections.values():
                connection.urgent = False
        return progress

    # ----------------------------------------------------------------------------------- chores
    def _chores(self) -> bool:
        """What is to be done for connections besides receiving."""
        recorder = self.recorder
        now = now_ns(_BOOTTIME)
        progress = False
        throttled = False
        recorder.advance()
        for connection in list(self._troubled):
            if connection.closed:
                self._troubled.discard(connection)
                continue
            if connection.deferred and recorder.reads.resume(connection):
                progress = True
            if connection.resume_at and connection.resume_at <= now:
                connection.resume_at = 0
                progress = True
            if (
                connection.stalled
                and connection.admitted
                and not connection.resume_at
                and not recorder.no_space.holds
            ):
                connection.stalled = False
                before = connection.start
                self._process(connection)
                progress |= connection.start != before
            throttled |= connection.stalled or bool(connection.resume_at or connection.held)
            self._settle(connection)
        self._count_throttled(throttled, now)
        return progress

    def _settle(self, connection: Connection) -> None:
        """Close it if it is done; else wait for the right events, and forget what is over."""
        if connection.closed:
            self._troubled.discard(connection)
            return
        if connection.broken and not (connection.closing or connection.farewell):
            self._may_go_on(connection)
            return
        left = connection.in_flight or connection.out or connection.deferred
        if connection.closing and not left:
            self._close(connection)
            return
        receives = self._receives(connection)
        events = (_IN if receives else 0) | (_OUT if connection.out else 0)
        if connection.events and events | select.EPOLLRDHUP != connection.events:
            connection.events = events | select.EPOLLRDHUP
            self._epoll.modify(connection.fd, connection.events)
        if receives and not connection.out and not connection.held:
            self._troubled.discard(connection)
            if connection not in self._hot:
                self._hot.append(connection)

    def _count_throttled(self, throttled: bool, now: int) -> None:
        if self._throttled_since:
            self.recorder.statistics.throttled_ns += now - self._throttled_since
        self._throttled_since = now if throttled else 0
