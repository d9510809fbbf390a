"""A small synchronous NBD client, for our own commands, the demo and tests.

The only module of this package that opens a socket. One connection, one thread; commands wait for
their answer, except in `read_many`, which keeps several reads in flight. Fixed newstyle, with or
without structured replies. A server is trusted no further than our memory goes: what does not fit
a request raises RemoteProtocolError, and nothing is allocated because a server announces it.

Errors: NbdServerError (the server answered a command with an error; the connection goes on),
NbdNegotiationError (it refused an option), RemoteProtocolError (it broke the protocol), OSError
(the socket; TimeoutError with a time-out). After the last two the connection is of no more use.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader
from typing import Final, Self, cast

from cdp.nbd.export import Negotiated
from cdp.nbd.haggle import Haggler, NbdNegotiationError
from cdp.nbd.uri import NbdUri, format_uri, parse_uri
from cdp.nbd.wire import (
    CHUNK,
    COOKIE_SIZE,
    ERROR_PAYLOAD,
    EXTENT,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_MAX_EXTENTS,
    NBD_MAX_STRING,
    NBD_META_BASE_ALLOCATION,
    NBD_PORTABLE_PAYLOAD,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_FLAG_ERROR,
    NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REPLY_TYPE_OFFSET_HOLE,
    NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC,
    REQUEST,
    SIMPLE_REPLY,
    UINT32,
    UINT64,
    RemoteProtocolError,
)

__all__ = [
    "NbdClient",
    "NbdNegotiationError",
    "NbdServerError",
    "NbdUri",
    "format_uri",
    "list_exports",
    "parse_uri",
]

# Commands without payload are cut at this length: well inside 32 bits, and a power of two.
_LONG_REQUEST: Final = 1 << 31
_ERROR_CHUNK_MAX: Final = ERROR_PAYLOAD.size + NBD_MAX_STRING + UINT64.size
_STATUS_CHUNK_MAX: Final = UINT32.size + NBD_MAX_EXTENTS * EXTENT.size
_READ_BUFFER: Final = 1 << 16


class NbdServerError(Exception):
    """The server answered a command with an error.

    `errno` is the number from the wire (an NbdError, unless the server is odd), `message` the
    server's words, often empty.
    """

    def __init__(self, errno: int, message: str = "") -> None:
        # 32 bits from the wire: os.strerror raises above a C int.
        words = os.strerror(errno) if errno < 4096 else "no error number known here"
        super().__init__(f"[Errno {errno}] {message or words}")
        self.errno = errno
        self.message = message


class _Pending:
    """A command in flight and what has been received of its reply."""

    __slots__ = ("covered", "data", "done", "error", "extents", "kind", "length", "offset")

    def __init__(self, kind: int, offset: int, length: int) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.data: bytes | bytearray = b""
        self.covered: list[tuple[int, int]] = []
        self.extents: dict[int, list[tuple[int, int]]] = {}
        self.error: NbdServerError | None = None
        self.done = False

    def cover(self, offset: int, length: int) -> None:
        """A content chunk describes `length` bytes at `offset`: inside the request, and new."""
        begin = offset - self.offset
        if self.kind != NBD_CMD_READ or length < 1 or begin < 0 or begin + length > self.length:
            raise RemoteProtocolError(f"a chunk of {length} bytes at {offset} was not asked for")
        self.covered.append((begin, begin + length))
        if sum(stop - start for start, stop in self.covered) > self.length:
            raise RemoteProtocolError(f"chunks overlap in the read at {self.offset}")

    def finish(self) -> None:
        """The last chunk is there: without an error the content must be complete."""
        self.done = True
        if self.error is not None:
            return
        if self.kind == NBD_CMD_READ:
            position = 0
            for start, stop in sorted(self.covered):
                if start != position:
                    break
                position = stop
            if position != self.length:
                raise RemoteProtocolError(f"the read at {self.offset} was answered in part")
        if self.kind == NBD_CMD_BLOCK_STATUS and not self.extents:
            raise RemoteProtocolError("a block status without an extent")


class _SocketStream:
    """Exact reads, buffered for headers, and gathered sends."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        # Typeshed knows this only as IOBase.
        file = connection.makefile("rb", buffering=_READ_BUFFER)
        self._file = cast(BufferedReader, file)

    def read_exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise ConnectionResetError("the NBD server hung up")
        return data

    def read_into(self, view: memoryview) -> None:
        while view:
            count = self._file.readinto(view)
            if not count:
                raise ConnectionResetError("the NBD server hung up")
            view = view[count:]

    def send(self, *parts: bytes | memoryview) -> None:
        sent = self._socket.sendmsg(parts)
        for part in parts:
            if sent < len(part):
                self._socket.sendall(memoryview(part)[sent:])
            sent = max(0, sent - len(part))

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def _open(address: NbdUri, timeout: float | None) -> _SocketStream:
    if address.socket_path is not None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(address.socket_path)
        except BaseException:
            connection.close()
            raise
    else:
        assert address.host is not None
        connection = socket.create_connection((address.host, address.port), timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _SocketStream(connection)


def _address(target: str | os.PathLike[str]) -> NbdUri:
    text = os.fspath(target)
    return parse_uri(text) if "://" in text else NbdUri(socket_path=text)


def list_exports(
    target: str | os.PathLike[str], *, timeout: float | None = None
) -> list[tuple[str, str]]:
    """(name, description) of every export at `target`, a URI or the path of a unix socket."""
    stream = _open(_address(target), timeout)
    try:
        haggler = Haggler(stream)
        exports = haggler.list_exports()
        haggler.abort()
        return exports
    finally:
        stream.close()


class NbdClient:
    """A connection to one export. Offsets and lengths are bytes; use it in a `with` statement.

    `size` is the export's, `flags` its transmission flags, `negotiated` everything agreed on.
    Reads, writes and other commands longer than the server takes are cut into several; such
    a command is not atomic.
    """

    def __init__(self, stream: _SocketStream, negotiated: Negotiated, description: str) -> None:
        self._stream = stream
        self._pending: dict[bytes, _Pending] = {}
        self._next_cookie = 0
        self._usable = True
        self.negotiated = negotiated
        self.description = description
        self.size = negotiated.size
        self.flags = negotiated.flags
        self.max_payload = min(negotiated.max_payload, NBD_PORTABLE_PAYLOAD)

    @classmethod
    def connect(
        cls,
        target: str | os.PathLike[str],
        export: str | None = None,
        *,
        structured: bool = True,
        meta_contexts: Sequence[str] = (NBD_META_BASE_ALLOCATION,),
        timeout: float | None = None,
    ) -> Self:
        """Opens an export at `target`, a URI or the path of a unix socket.

        Without `export` it is the one the URI names, or the default one (""). `timeout` in seconds
        bounds each wait for the server, None waits for ever.
        """
        address = _address(target)
        name = address.export if export is None else export
        stream = _open(address, timeout)
        try:
            haggler = Haggler(stream)
            if structured and haggler.ask_structured_replies() and meta_contexts:
                haggler.select_contexts(name, meta_contexts)
            negotiated = haggler.go(name)
        except BaseException:
            stream.close()
            raise
        return cls(stream, negotiated, haggler.description)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Says good-bye (DISC) if the connection still works, and closes it. Repeatable."""
        if self._usable:
            self._usable = False
            try:
                self._stream.send(self._header(NBD_CMD_DISC, 0, 0, 0)[1])
            except OSError:
                pass  # The server went first; there is nothing left to say.
        self._stream.close()

    # ------------------------------------------------------------------------------- commands

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`."""
        pieces = [
            bytes(self._command(NBD_CMD_READ, 0, begin, size).data)
            for begin, size in _cut(offset, length, self.max_payload)
        ]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, offset: int, data: bytes | bytearray | memoryview, fua: bool = False) -> None:
        """Writes `data` at `offset`; with `fua` they are on stable storage on return."""
        view = memoryview(data).cast("B")
        flags = NBD_CMD_FLAG_FUA if fua else 0
        for begin, size in _cut(offset, len(view), self.max_payload):
            part = view[begin - offset : begin - offset + size]
            self._command(NBD_CMD_WRITE, flags, begin, size, part)

    def flush(self) -> None:
        """On return, all writes answered before are on stable storage."""
        self._command(NBD_CMD_FLUSH, 0, 0, 0)

    def trim(self, offset: int, length: int, fua: bool = False) -> None:
        """The content of this range is of no more interest, and undefined until written."""
        self._long_command(NBD_CMD_TRIM, NBD_CMD_FLAG_FUA if fua else 0, offset, length)

    def cache(self, offset: int, length: int) -> None:
        """This range will be read soon."""
        self._long_command(NBD_CMD_CACHE, 0, offset, length)

    def write_zeroes(
        self,
        offset: int,
        length: int,
        no_hole: bool = False,
        fast: bool = False,
        fua: bool = False,
    ) -> None:
        """Zeroes a range: `no_hole` keeps it allocated, `fast` fails (ENOTSUP) unless quick."""
        flags = (
            (NBD_CMD_FLAG_NO_HOLE if no_hole else 0)
            | (NBD_CMD_FLAG_FAST_ZERO if fast else 0)
            | (NBD_CMD_FLAG_FUA if fua else 0)
        )
        self._long_command(NBD_CMD_WRITE_ZEROES, flags, offset, length)

    def block_status(
        self, offset: int, length: int, context: str = NBD_META_BASE_ALLOCATION
    ) -> list[tuple[int, int]]:
        """The extents (length, status flags) of exactly this range; equal neighbours are merged.

        ValueError if the server does not offer `context`, or it was not selected in `connect`.
        """
        contexts = {name: number for number, name in self.negotiated.meta_contexts.items()}
        if context not in contexts:
            raise ValueError(f"metadata context {context!r} was not negotiated")
        extents: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            size = min(end - offset, _LONG_REQUEST)
            reply = self._command(NBD_CMD_BLOCK_STATUS, 0, offset, size)
            if contexts[context] not in reply.extents:
                raise RemoteProtocolError(f"no extent of {context!r} in a block status")
            for extent_length, status in reply.extents[contexts[context]]:
                extent_length = min(extent_length, end - offset)
                if extent_length and extents and extents[-1][1] == status:
                    extents[-1] = (extents[-1][0] + extent_length, status)
                elif extent_length:
                    extents.append((extent_length, status))
                offset += extent_length
        return extents

    def read_many(
        self, requests: Iterable[tuple[int, int]], depth: int = 16, ordered: bool = True
    ) -> Iterator[tuple[int, bytes]]:
        """Reads (offset, length) pairs with up to `depth` in flight; yields (offset, data).

        In the order of `requests`, or, unless `ordered`, as they arrive. ValueError for a
        length that is not in 1..max_payload. A failed read raises NbdServerError and ends it. It
        may be left early; do not start other commands before.
        """
        if depth < 1:
            raise ValueError("at least one read must be in flight")
        flying: deque[_Pending] = deque()
        for offset, length in requests:
            if not 1 <= length <= self.max_payload:
                raise ValueError(f"a read of {length} bytes, not of 1 to {self.max_payload}")
            if len(flying) == depth:
                yield self._land(flying, ordered)
            flying.append(self._submit(NBD_CMD_READ, 0, offset, length))
        while flying:
            yield self._land(flying, ordered)

    def _land(self, flying: deque[_Pending], ordered: bool) -> tuple[int, bytes]:
        """Takes the first, or the first complete, read off `flying`."""
        while True:
            for pending in flying:
                if pending.done:
                    flying.remove(pending)
                    if pending.error is not None:
                        raise pending.error
                    return pending.offset, bytes(pending.data)
                if ordered:
                    break
            self._receive()

    # --------------------------------------------------------------------- requests and replies

    def _header(self, kind: int, flags: int, offset: int, length: int) -> tuple[bytes, bytes]:
        """A fresh cookie, and the header of a request that carries it."""
        cookie = self._next_cookie.to_bytes(COOKIE_SIZE, "big")
        self._next_cookie += 1
        return cookie, REQUEST.pack(NBD_REQUEST_MAGIC, flags, kind, cookie, offset, length)

    def _submit(
        self, kind: int, flags: int, offset: int, length: int, payload: memoryview | None = None
    ) -> _Pending:
        if not self._usable:
            raise ConnectionError("the connection to the NBD server is closed")
        cookie, header = self._header(kind, flags, offset, length)
        try:
            if payload is None:
                self._stream.send(header)
            else:
                self._stream.send(header, payload)
        except OSError:
            self._usable = False
            raise
        pending = self._pending[cookie] = _Pending(kind, offset, length)
        return pending

    def _command(
        self, kind: int, flags: int, offset: int, length: int, payload: memoryview | None = None
    ) -> _Pending:
        """One command from request to reply. Reads that `read_many` left behind come first: a
        server that is stuck sending them would not take a payload."""
        while self._pending:
            self._receive()
        pending = self._submit(kind, flags, offset, length, payload)
        while not pending.done:
            self._receive()
        if pending.error is not None:
            raise pending.error
        return pending

    def _long_command(self, kind: int, flags: int, offset: int, length: int) -> None:
        for begin, size in _cut(offset, length, _LONG_REQUEST):
            self._command(kind, flags, begin, size)

    def _receive(self) -> None:
        """Takes in one reply or one chunk of one."""
        try:
            self._receive_message()
        except (OSError, RemoteProtocolError):
            self._usable = False
            raise

    def _receive_message(self) -> None:
        header = self._stream.read_exactly(SIMPLE_REPLY.size)
        (magic,) = UINT32.unpack_from(header)
        if magic == NBD_SIMPLE_REPLY_MAGIC:
            _, error, cookie = SIMPLE_REPLY.unpack(header)
            self._on_simple_reply(self._pending_of(cookie), error)
        elif magic == NBD_STRUCTURED_REPLY_MAGIC and self.negotiated.structured_replies:
            header += self._stream.read_exactly(CHUNK.size - SIMPLE_REPLY.size)
            _, flags, kind, cookie, length = CHUNK.unpack(header)
            pending = self._pending_of(cookie)
            self._on_chunk(pending, kind, length)
            if flags & NBD_REPLY_FLAG_DONE:
                pending.finish()
        else:
            raise RemoteProtocolError(f"a reply begins with {magic:#010x}")
        # At most `depth` entries, and the cookie at hand is the only one that can have finished.
        if self._pending[cookie].done:
            del self._pending[cookie]

    def _pending_of(self, cookie: bytes) -> _Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise RemoteProtocolError(f"a reply to cookie {cookie.hex()}, which is not in flight")
        return pending

    def _on_simple_reply(self, pending: _Pending, error: int) -> None:
        if pending.kind == NBD_CMD_READ and self.negotiated.structured_replies:
            raise RemoteProtocolError("a simple reply to a read, with structured replies")
        if error:
            pending.error = NbdServerError(error)
        elif pending.kind == NBD_CMD_READ:
            pending.data = self._stream.read_exactly(pending.length)
            pending.cover(pending.offset, pending.length)
        pending.finish()

    def _on_chunk(self, pending: _Pending, kind: int, length: int) -> None:
        if kind == NBD_REPLY_TYPE_OFFSET_DATA and length > UINT64.size:
            (offset,) = UINT64.unpack(self._stream.read_exactly(UINT64.size))
            self._receive_content(pending, offset, length - UINT64.size)
        elif kind == NBD_REPLY_TYPE_OFFSET_HOLE and length == UINT64.size + UINT32.size:
            (offset,) = UINT64.unpack(self._stream.read_exactly(UINT64.size))
            (size,) = UINT32.unpack(self._stream.read_exactly(UINT32.size))
            pending.cover(offset, size)
            if not pending.data:
                pending.data = bytearray(pending.length)
        elif kind == NBD_REPLY_TYPE_BLOCK_STATUS and UINT32.size < length <= _STATUS_CHUNK_MAX:
            self._receive_extents(pending, length)
        elif kind & NBD_REPLY_TYPE_FLAG_ERROR and ERROR_PAYLOAD.size <= length <= _ERROR_CHUNK_MAX:
            payload = self._stream.read_exactly(length)
            error, size = ERROR_PAYLOAD.unpack_from(payload)
            text = payload[ERROR_PAYLOAD.size :][:size].decode(errors="replace")
            if pending.error is None:
                pending.error = NbdServerError(error, text)
        elif kind != NBD_REPLY_TYPE_NONE or length:
            raise RemoteProtocolError(f"a chunk of type {kind} with {length} bytes")

    def _receive_content(self, pending: _Pending, offset: int, length: int) -> None:
        pending.cover(offset, length)
        if length == pending.length:
            pending.data = self._stream.read_exactly(length)
            return
        if not pending.data:
            pending.data = bytearray(pending.length)
        begin = offset - pending.offset
        self._stream.read_into(memoryview(pending.data)[begin : begin + length])

    def _receive_extents(self, pending: _Pending, length: int) -> None:
        payload = self._stream.read_exactly(length)
        (context,) = UINT32.unpack_from(payload)
        known = context in self.negotiated.meta_contexts and context not in pending.extents
        if pending.kind != NBD_CMD_BLOCK_STATUS or not known or length % EXTENT.size != UINT32.size:
            raise RemoteProtocolError(f"a block status of {length} bytes for context {context}")
        extents = [(size, flags) for size, flags in EXTENT.iter_unpack(payload[UINT32.size :])]
        if not all(size for size, _ in extents):
            raise RemoteProtocolError("an empty extent in a block status")
        pending.extents[context] = extents


def _cut(offset: int, length: int, most: int) -> list[tuple[int, int]]:
    """(offset, length) of the pieces, none longer than `most`; one even if the length is zero,
    so that the server has its say."""
    if length == 0:
        return [(offset, 0)]
    return [
        (begin, min(most, offset + length - begin))
        for begin in range(offset, offset + length, most)
    ]
