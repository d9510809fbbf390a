"""One NBD connection to a view: requests in batches, reads of a batch resolved together.

Simpler than the recorder's loop, since nothing here is durable: a FLUSH of a writable view promises
nothing that survives the view. Reads are done in the loop; a view is not in anybody's write path.
Content is read to where it is sent from; the socket is asked first and waited for only if need be.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Mapping
from typing import Final

import trio

from cdp.nbd.export import Negotiated
from cdp.nbd.limits import DEFAULT_LIMITS, Limits
from cdp.nbd.transmission import (
    Request,
    block_status_chunk,
    error_reply,
    none_chunk,
    ok_replies,
    read_header,
    scan,
)
from cdp.nbd.validate import ExportRules, validate
from cdp.nbd.wire import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NbdError,
    RemoteProtocolError,
    errno_to_nbd,
)
from cdp.sockets import tune
from cdp.viewer.views import View
from journal.errors import Corruption, JournalError

log = logging.getLogger(__name__)

BUFFER_BYTES: Final = 256 << 10
# Resolved and sent at once: enough that what a batch costs does not count, and so little that the
# client works on one part while the next is read.
READ_BATCH_BYTES: Final = 256 << 10
# Done between two checkpoints, each of which costs as much as ten blocks. A request counts as some
# bytes at least.
TURN_BYTES: Final = 1 << 20
REQUEST_BYTES: Final = 8 << 10
CONTENT_BYTES: Final = 1 << 20  # kept for content; more is taken when it is needed
PARTS_MAX: Final = 1024  # of one sendmsg
EXTENTS_MAX: Final = 4096
EXTENT_BYTES_MAX: Final = 0x80000000


class Connection:
    """Serves one client until it goes. Closes nothing but its own stream."""

    def __init__(
        self,
        view: View,
        sock: socket.socket,
        negotiated: Negotiated,
        leftover: bytes,
        *,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._view, self._sock, self._limits = view, sock, limits
        self._structured = negotiated.structured_replies
        self._contexts: Mapping[int, str] = negotiated.meta_contexts
        self._rules = ExportRules(negotiated)
        self._buffer = bytearray(max(BUFFER_BYTES, len(leftover)))
        self._buffer[: len(leftover)] = leftover
        self._start, self._end = 0, len(leftover)
        self._content = memoryview(bytearray(CONTENT_BYTES))
        self._turn = 0  # bytes since the last checkpoint
        self._used = 0  # of it, by replies that were not sent yet
        sock.setblocking(False)
        tune(sock)

    async def run(self) -> None:
        """Until the client disconnects, hangs up or breaks the protocol."""
        needed = 0 if self._end else 1
        while True:
            if needed and not await self._receive(needed):
                return
            try:
                requests, self._start, needed = scan(
                    self._buffer, self._start, self._end, self._limits
                )
            except RemoteProtocolError as error:
                log.info("view %s: client disconnected: %s", self._view.name, error)
                return
            done = bool(requests) and requests[-1][0] == NBD_CMD_DISC
            await self._execute(requests[:-1] if done else requests)
            if done:
                return

    async def _receive(self, needed: int) -> bool:
        """At least one more byte; False when the client is gone."""
        if self._start:
            self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
            self._end -= self._start
            self._start = 0
        if self._end == len(self._buffer):  # grows only as data really arrive
            self._buffer.extend(bytes(min(len(self._buffer), needed)))
        with memoryview(self._buffer) as view, view[self._end :] as free:
            while True:
                try:
                    count = self._sock.recv_into(free)
                    break
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._sock)
                except OSError:
                    return False
        self._end += count
        return count > 0

    async def _execute(self, requests: list[Request]) -> None:
        out: list[bytes | memoryview] = []
        reads: list[Request] = []
        pending = 0
        for request in requests:
            if self._turn >= TURN_BYTES:
                self._turn = 0
                await trio.lowlevel.checkpoint()
            self._turn += max(request[4], REQUEST_BYTES)
            error = validate(request, self._rules)
            if error:
                out.append(error_reply(request[2], error, self._structured))
            elif request[0] == NBD_CMD_READ:
                reads.append(request)
                pending += request[4]
                if pending >= READ_BATCH_BYTES:
                    self._read(reads, out)
                    await self._send(out)
                    out, reads, pending = [], [], 0
            else:
                self._read(reads, out)
                reads, pending = [], 0
                self._other(request, out)
        self._read(reads, out)
        await self._send(out)

    def _read(self, reads: list[Request], out: list[bytes | memoryview]) -> None:
        if not reads:
            return
        try:
            pieces = self._view.read_batch(
                [(offset, length) for _, _, _, offset, length, _ in reads], self._room
            )
        except (OSError, JournalError) as error:
            if len(reads) == 1:
                self._failed(reads[0], error, out)
                return
            for request in reads:  # one damaged block fails one request, not its neighbours
                self._read([request], out)
            return
        for (_, _, cookie, offset, length, _), piece in zip(reads, pieces, strict=True):
            out.append(read_header(cookie, offset, length, self._structured))
            out.append(piece)

    def _failed(
        self, request: Request, error: OSError | JournalError, out: list[bytes | memoryview]
    ) -> None:
        code = (
            errno_to_nbd(error.errno or errno.EIO) if isinstance(error, OSError) else NbdError.EIO
        )
        if isinstance(error, Corruption) or code == NbdError.EIO:
            log.warning("view %s: %s", self._view.name, error)
        out.append(error_reply(request[2], int(code), self._structured, str(error)))

    def _other(self, request: Request, out: list[bytes | memoryview]) -> None:
        kind, flags, cookie, offset, length, payload = request
        try:
            match kind:
                case c if c == NBD_CMD_WRITE:
                    self._view.write(offset, bytes(self._buffer[payload : payload + length]))
                case c if c in (NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM):
                    self._view.zero(offset, length)
                case c if c == NBD_CMD_BLOCK_STATUS:
                    self._block_status(flags, cookie, offset, length, out)
                    return
                case c if c in (NBD_CMD_FLUSH, NBD_CMD_CACHE):
                    pass
                case _:
                    raise OSError(errno.EINVAL, "unknown command")
        except (OSError, JournalError) as error:
            self._failed(request, error, out)
            return
        out.append(none_chunk(cookie) if self._structured else ok_replies([cookie]))

    def _block_status(
        self, flags: int, cookie: bytes, offset: int, length: int, out: list[bytes | memoryview]
    ) -> None:
        length = min(length, EXTENT_BYTES_MAX)
        extents = self._view.allocation(offset, length)[:EXTENTS_MAX]
        if flags & NBD_CMD_FLAG_REQ_ONE:
            extents = extents[:1]
        last = len(self._contexts) - 1
        for at, context in enumerate(self._contexts):
            out.append(block_status_chunk(cookie, context, extents, done=at == last))

    def _room(self, length: int) -> memoryview:
        """Memory for content, until the next `_send`."""
        start, end = self._used, self._used + length
        if end > len(self._content):
            return memoryview(bytearray(length))
        self._used = end
        return self._content[start:end]

    async def _send(self, out: list[bytes | memoryview]) -> None:
        """All of it; the client is gone when that fails, which the next receive finds out."""
        parts = out
        try:
            while parts:
                try:
                    sent = self._sock.sendmsg(parts[:PARTS_MAX])
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._sock)
                else:
                    parts = _behind(parts, sent)
        except OSError:
            return
        finally:
            self._used = 0


def _behind(parts: list[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """What is left of parts of which so many bytes were sent."""
    for number, part in enumerate(parts):
        if sent < len(part):
            return [memoryview(part)[sent:], *parts[number + 1 :]]
        sent -= len(part)
    return []
