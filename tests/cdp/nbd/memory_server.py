"""A threaded NBD server over a bytearray: the codec in the smallest host it can have.

It shows the two loops a host writes (haggling, transmission), and is what the codec is tried on
with real clients. Kept honest on purpose: one thread per connection, no batching beyond a scan's.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cdp.nbd.export import ExportInfo, Negotiated
from cdp.nbd.handshake import Closed, Established, ExportQuery, ListQuery, ServerHandshake
from cdp.nbd.limits import Limits
from cdp.nbd.transmission import (
    COOKIE,
    TYPE,
    Request,
    block_status_chunk,
    data_chunk_header,
    error_reply,
    hole_chunk,
    ok_replies,
    read_header,
    scan,
)
from cdp.nbd.validate import ExportRules, validate
from cdp.nbd.wire import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_READ,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_REP_ERR_UNKNOWN,
    NBD_STATE_HOLE,
    NBD_STATE_ZERO,
    RemoteProtocolError,
)

READ_FLAGS = NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_DF | NBD_FLAG_SEND_CACHE
ALL_FLAGS = (
    READ_FLAGS
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_SEND_FAST_ZERO
    | NBD_FLAG_CAN_MULTI_CONN
)
BLOCK = 4096


@dataclass
class MemoryExport:
    """`content` under the description `info`; `fail` lists (begin, end, errno) of bad ranges."""

    info: ExportInfo
    content: bytearray
    fail: list[tuple[int, int, int]] = field(default_factory=list)


def memory_export(name: str, size: int, flags: int = ALL_FLAGS, **details) -> MemoryExport:
    details.setdefault("meta_contexts", ("base:allocation",))
    return MemoryExport(ExportInfo(name, size, flags, **details), bytearray(size))


def extents(content: bytearray, offset: int, length: int) -> list[tuple[int, int]]:
    """base:allocation of a range: whole blocks of zeroes count as holes."""
    found: list[tuple[int, int]] = []
    position = offset
    while position < offset + length:
        end = min(offset + length, (position // BLOCK + 1) * BLOCK)
        is_zero = not any(content[position:end])
        status = NBD_STATE_HOLE | NBD_STATE_ZERO if is_zero else 0
        if found and found[-1][1] == status:
            found[-1] = (found[-1][0] + end - position, status)
        else:
            found.append((end - position, status))
        position = end
    return found


class MemoryServer:
    """Serves `exports` on a unix socket at `path`, or on a TCP port, until closed."""

    def __init__(
        self, exports: list[MemoryExport], path: Path | None = None, limits: Limits | None = None
    ) -> None:
        self.exports = {export.info.name: export for export in exports}
        self.limits = limits or Limits()
        self.negotiated: list[Negotiated] = []
        self.closed: list[Closed] = []
        self.commands: list[Request] = []
        self.errors: list[BaseException] = []
        if path is not None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.port = self._listener.getsockname()[1]
        self._listener.listen()
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # Closing a listener does not wake a thread in accept(); shutting it down does.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads[1:]:
            thread.join()
        if exc_info[0] is None and self.errors:
            raise self.errors[0]

    def settle(self) -> None:
        """Waits until the server has noticed that its clients are gone."""
        for thread in self._threads[1:]:
            thread.join(10)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                established = self._haggle(connection)
                if established is not None:
                    self.negotiated.append(established.negotiated)
                    Transmission(self, connection, established).run()
        except (ConnectionError, RemoteProtocolError):
            pass  # The client's affair.
        except BaseException as error:
            self.errors.append(error)

    def _haggle(self, connection: socket.socket) -> Established | None:
        handshake = ServerHandshake(self.limits)
        while True:
            events = handshake.events_received()
            for event in events:
                match event:
                    case ListQuery():
                        listed = [(e.info.name, e.info.description) for e in self.exports.values()]
                        handshake.answer_list(listed)
                    case ExportQuery(name, _) if name in self.exports:
                        handshake.answer_export(self.exports[name].info)
                    case ExportQuery():
                        handshake.refuse_export(NBD_REP_ERR_UNKNOWN, "there is no such export")
                    case Closed():
                        # Noted before sending: a client that gave up may be gone already.
                        self.closed.append(event)
            # Not even an empty piece can be sent to a client that has gone.
            if output := b"".join(handshake.data_to_send()):
                connection.sendall(output)
            match events:
                case [*_, Established() as established]:
                    return established
                case [*_, Closed()]:
                    return None
                case []:
                    data = connection.recv(1 << 16)
                    if data:
                        handshake.receive_data(data)
                    else:
                        handshake.receive_eof()


class Transmission:
    """One connection after haggling."""

    def __init__(
        self, server: MemoryServer, connection: socket.socket, established: Established
    ) -> None:
        self.server = server
        self.connection = connection
        self.negotiated = established.negotiated
        self.export = server.exports[established.negotiated.export_name]
        self.rules = ExportRules(established.negotiated)
        self.leftover = established.leftover

    def run(self) -> None:
        buffer = bytearray(1 << 18)
        end = len(self.leftover)
        buffer[:end] = self.leftover
        while True:
            result = scan(buffer, 0, end, self.server.limits)
            replies, disconnect = self.execute(result.requests, buffer)
            if replies:
                self.connection.sendall(replies)
            if disconnect:
                return
            rest = end - result.start
            buffer[:rest] = buffer[result.start : end]
            end = rest
            if not result.needed:
                continue
            if end == len(buffer):
                # Full of what has really arrived: only now is there reason to grow.
                buffer += bytes(min(len(buffer), result.needed))
            count = self.connection.recv_into(memoryview(buffer)[end:])
            if not count:
                return
            end += count

    def execute(self, requests: list[Request], buffer: bytearray) -> tuple[bytes, bool]:
        replies: list[bytes] = []
        for request in requests:
            self.server.commands.append(request)
            if request[TYPE] == NBD_CMD_DISC:
                return b"".join(replies), True
            error = validate(request, self.rules) or self.bad(request)
            if error:
                reply = error_reply(
                    request[COOKIE], error, self.negotiated.structured_replies, "not today"
                )
                replies.append(reply)
            else:
                replies.append(self.perform(request, buffer))
        return b"".join(replies), False

    def bad(self, request: Request) -> int:
        _, _, _, offset, length, _ = request
        for begin, end, error in self.export.fail:
            if offset < end and begin < offset + length:
                return error
        return 0

    def perform(self, request: Request, buffer: bytearray) -> bytes:
        kind, flags, cookie, offset, length, position = request
        content = self.export.content
        if kind == NBD_CMD_READ:
            return self.read(cookie, flags, offset, length)
        if kind == NBD_CMD_BLOCK_STATUS:
            found = extents(content, offset, length)
            if flags & NBD_CMD_FLAG_REQ_ONE:
                found = found[:1]
            ids = list(self.negotiated.meta_contexts)
            chunks = [block_status_chunk(cookie, n, found, done=n == ids[-1]) for n in ids]
            return b"".join(chunks)
        if kind == NBD_CMD_WRITE:
            content[offset : offset + length] = buffer[position : position + length]
        elif kind == NBD_CMD_WRITE_ZEROES:
            content[offset : offset + length] = bytes(length)
        return ok_replies([cookie])

    def read(self, cookie: bytes, flags: int, offset: int, length: int) -> bytes:
        content = self.export.content
        if not self.negotiated.structured_replies or flags & NBD_CMD_FLAG_DF:
            header = read_header(cookie, offset, length, self.negotiated.structured_replies)
            return header + content[offset : offset + length]
        chunks: list[bytes] = []
        end = offset + length
        for size, status in extents(content, offset, length):
            done = offset + size == end
            if status:
                chunks.append(hole_chunk(cookie, offset, size, done))
            else:
                chunks.append(data_chunk_header(cookie, offset, size, done))
                chunks.append(bytes(content[offset : offset + size]))
            offset += size
        return b"".join(chunks)


def read_only(name: str, size: int, fill: Callable[[int], int] = lambda i: i % 251) -> MemoryExport:
    export = memory_export(name, size, READ_FLAGS | NBD_FLAG_READ_ONLY)
    export.content[:] = bytes(map(fill, range(size)))
    return export
