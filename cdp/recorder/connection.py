"""One client: its socket, receive buffer, queued replies, and whether it is still there.

Non-blocking calls only; who waits, and for what, is the loop's business.

**A client that has hung up may have sent the same requests again, elsewhere.** What it left in this
socket must then not be executed any more: a late old write would overwrite a newer one. So before
anything is executed the socket is asked whether the peer has hung up (`hung_up`), which `recv` does
not tell as long as data are left to read. The exception is a stream that ends in a disconnect
request (`read_farewell`): such a client knew what it did, and takes its requests for accepted.
"""

from __future__ import annotations

import array
import fcntl
import select
import socket
import termios
from collections import deque
from typing import TYPE_CHECKING, Final

from cdp.nbd.export import Negotiated
from cdp.nbd.limits import Limits
from cdp.nbd.transmission import TYPE, scan
from cdp.nbd.validate import ExportRules
from cdp.nbd.wire import (
    NBD_CMD_DISC,
    NBD_CMD_WRITE,
    NBD_FLAG_READ_ONLY,
    NBD_META_BASE_ALLOCATION,
    NBD_REQUEST_MAGIC,
    REQUEST,
    RemoteProtocolError,
)
from cdp.sockets import tune
from journal.format import BLOCK

if TYPE_CHECKING:
    from cdp.nbd.transmission import Request

BUFFER_BYTES: Final = 1 << 20
REPLY_BYTES: Final = 1 << 20
# Replies that a client has not taken; above this it is not heard.
OUT_BYTES_MAX: Final = 4 << 20


class Connection:
    """State of one connection.

    ``view[start:end]`` is what was received and not executed. ``in_flight`` counts requests that
    were taken out of the buffer and are not answered; ``parked`` those that are not executed, too.
    ``held``: those of them for which there was no space (`nospace`).
    ``stalled``: whole requests are in the buffer and wait for room. ``closing``: a disconnect
    request was executed; what is in flight is finished first. ``broken``: nothing can be sent any
    more. ``polled``: the last seq when it was last known not to have hung up. ``backlog`` takes in
    whoever has replies that its socket did not take.
    """

    __slots__ = (
        "_hangup",
        "_recv_into",
        "_writable",
        "admitted",
        "allocation_context",
        "backlog",
        "behind",
        "broken",
        "capacity",
        "closed",
        "closing",
        "deferred",
        "end",
        "events",
        "farewell",
        "fd",
        "held",
        "in_flight",
        "limits",
        "number",
        "out",
        "out_bytes",
        "parked",
        "peak",
        "peer",
        "plain_end",
        "polled",
        "received",
        "reply",
        "resume_at",
        "rules",
        "sock",
        "stalled",
        "start",
        "structured",
        "urgent",
        "view",
    )  # fmt: skip

    def __init__(
        self,
        sock: socket.socket,
        negotiated: Negotiated,
        *,
        leftover: bytes = b"",
        peer: str = "",
        number: int = 0,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        sock.setblocking(False)
        tune(sock)
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.number = number
        self.rules = ExportRules(negotiated)
        self.limits = Limits(max_payload=negotiated.max_payload)
        self.structured = negotiated.structured_replies
        self._writable = not negotiated.flags & NBD_FLAG_READ_ONLY
        self.plain_end = -1
        self.resize(negotiated.size)
        self.allocation_context: int | None = next(
            (n for n, name in negotiated.meta_contexts.items() if name == NBD_META_BASE_ALLOCATION),
            None,
        )
        self.capacity = max(buffer_bytes, len(leftover))
        self.view = memoryview(bytearray(self.capacity))
        self.view[: len(leftover)] = leftover
        self.start, self.end = 0, len(leftover)
        self.received = len(leftover)
        self.peak = 0
        self.reply: memoryview | None = None
        self.out: deque[bytes | memoryview] = deque()
        self.out_bytes = 0
        self.in_flight = 0
        self.parked = 0  # of those, requests that are not executed yet
        self.held = 0
        self.deferred: deque[Request] = deque()  # reads, until there is room for their replies
        self.stalled = False
        self.resume_at = 0
        self.closing = self.closed = self.broken = self.farewell = False
        self.admitted = False
        self.polled = -1
        self.urgent = False
        self.behind: dict[Connection, int] = {}
        self.backlog: set[Connection] = set()
        self.events = 0
        self._recv_into = sock.recv_into
        self._hangup = select.poll()
        self._hangup.register(self.fd, select.POLLRDHUP)

    def __repr__(self) -> str:
        return f"<connection {self.number} of {self.peer or 'a client'}>"

    def resize(self, size: int) -> None:
        """The disk has this size, whatever it was when the client came."""
        if size != self.rules.size:
            self.rules.resize(size)
        # Up to where a plain write of one block may begin.
        self.plain_end = size - BLOCK if self._writable else -1

    # -------------------------------------------------------------------------------- receiving
    def receive(self) -> int:
        """Bytes received; 0: none now; -1: the stream has ended."""
        end = self.end
        if end == self.capacity:
            self._make_room()
            end = self.end
        try:
            count = self._recv_into(self.view[end:] if end else self.view)
        except BlockingIOError:
            return 0
        except OSError:
            return -1
        if not count:
            return -1
        self.end = end + count
        self.received += count
        return count

    def _make_room(self) -> None:
        """Move what is left to the front; if it fills the buffer, take one of twice the size.

        So the buffer grows only behind data that has really arrived.
        """
        start, length = self.start, self.end - self.start
        self.peak = max(self.peak, length)
        if start:
            self.view[:length] = self.view[start : self.end]
        else:
            # Never more than one request of the largest size needs.
            self.capacity = max(
                length + 1, min(2 * self.capacity, self.limits.max_payload + BUFFER_BYTES)
            )
            larger = memoryview(bytearray(self.capacity))
            larger[:length] = self.view[:length]
            self.view = larger
        self.start, self.end = 0, length

    def executed(self, start: int) -> None:
        """What lies before ``start`` has been taken out of the buffer."""
        if start == self.end:
            self.start = self.end = 0
        else:
            self.start = start

    def wants(self, needed: int) -> None:
        """``needed`` more bytes complete the next request: have it begin where it fits, cheaply."""
        start, length = self.start, self.end - self.start
        if start and (length <= 4096 or self.end + needed > self.capacity):
            self.view[:length] = self.view[start : self.end]
            self.start, self.end = 0, length

    def shrink(self) -> None:
        """Give back a large buffer that is not needed (called now and then)."""
        if self.capacity > BUFFER_BYTES and not self.end and self.peak <= BUFFER_BYTES:
            self.capacity = BUFFER_BYTES
            self.view = memoryview(bytearray(self.capacity))
        self.peak = self.end - self.start

    def readable(self) -> int:
        """Bytes that wait in the socket."""
        count = array.array("i", [0])
        try:
            fcntl.ioctl(self.fd, termios.FIONREAD, count)
        except OSError:
            return 0
        return count[0]

    # ---------------------------------------------------------------------------------- hang-up
    def hung_up(self) -> bool:
        """Whether the peer has closed its end, or the connection is broken."""
        return bool(self._hangup.poll(0))

    def read_farewell(self) -> bool:
        """After a hang-up: read all that is left; whether the stream ends in a disconnect request.

        What is left is what the kernel has in its buffers, so this is bounded.
        """
        while True:
            count = self.receive()
            if count < 0:
                break
            if count == 0:  # a half-closed peer: all it ever sent before has been read
                break
        self.farewell = self._ends_in_disconnect()
        return self.farewell

    def _ends_in_disconnect(self) -> bool:
        at, last = self.start, None
        while True:
            try:
                found = scan(self.view, at, self.end, self.limits)
            except RemoteProtocolError:
                return False
            at = found.start
            if found.requests:
                last = found.requests[-1]
                if last[TYPE] == NBD_CMD_DISC:
                    return at == self.end
            if found.needed:
                return False

    def unexecuted(self) -> int:
        """About how many whole requests are in the buffer (for a log line)."""
        at, count = self.start, 0
        while at + REQUEST.size <= self.end:
            magic, _, kind, _, _, length = REQUEST.unpack_from(self.view, at)
            if magic != NBD_REQUEST_MAGIC:
                break
            at += REQUEST.size + (length if kind == NBD_CMD_WRITE else 0)
            count += at <= self.end
        return count

    # ---------------------------------------------------------------------------------- sending
    def send(self, data: bytes | memoryview) -> None:
        """Send, or keep what the socket does not take (a copy of it).

        When nothing can be sent any more the data are dropped: the other direction will show that
        the peer has hung up, and what to do about the rest of its requests.
        """
        if self.broken:
            return
        size = len(data)
        if self.out:
            self._keep(data, 0)
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.broken = True
            return
        if sent < size:
            self._keep(data, sent)

    def send_own(self, data: memoryview) -> None:
        """The same for a buffer that nobody will change: what is kept is not copied."""
        if self.out or len(data) < REPLY_BYTES:
            self.send(data)
            return
        if not self.broken:
            self.out.append(data)
            self.out_bytes += len(data)
            self.flush_out()
            if self.out:
                self.backlog.add(self)

    def _keep(self, data: bytes | memoryview, sent: int) -> None:
        rest = bytes(data[sent:])
        self.out.append(rest)
        self.out_bytes += len(rest)
        self.backlog.add(self)

    def flush_out(self) -> None:
        """Send what was kept, as far as the socket takes it."""
        while self.out and not self.closed:
            data = self.out[0]
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                return
            except OSError:
                self.broken = True
                self.out.clear()
                self.out_bytes = 0
                return
            self.out_bytes -= sent
            if sent < len(data):
                self.out[0] = memoryview(data)[sent:]
                return
            self.out.popleft()

    @property
    def blocked(self) -> bool:
        """Whether the client must take replies before it is heard again."""
        return self.out_bytes > OUT_BYTES_MAX

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if not self.closed:
            self.closed = self.broken = True
            self.out.clear()
            self.out_bytes = 0
            self.deferred.clear()
            self.behind.clear()
            self.sock.close()
