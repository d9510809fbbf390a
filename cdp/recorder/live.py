"""Live reads, block status and read-ahead: what a client asks without changing anything.

Everything is looked up at one moment, after `applied` has been read and what is applied was dropped
from the overlay; the backing is read after that, never before. Replies are assembled in the
connection's reply buffer and sent together; what has to wait for a disk is answered later.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import TYPE_CHECKING, Final

from cdp.nbd.transmission import (
    block_status_chunk,
    data_chunk_header,
    error_reply,
    hole_chunk,
    ok_replies,
    read_header,
)
from cdp.nbd.wire import (
    CHUNK_OFFSET_DATA,
    CHUNK_OFFSET_HOLE,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_READ,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_OFFSET_DATA,
    NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    NBD_STATE_HOLE,
    NBD_STATE_ZERO,
    NBD_STRUCTURED_REPLY_MAGIC,
    REQUEST,
    SIMPLE_REPLY,
    NbdError,
)
from cdp.recorder.connection import REPLY_BYTES
from cdp.recorder.overlay import BACKING, ZERO
from cdp.recorder.reads import NOWAIT, Advise, Damaged, Fetch, fetch, holes
from journal.format import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cdp.nbd.transmission import Request
    from cdp.recorder.connection import Connection
    from cdp.recorder.engine import Recorder
    from cdp.recorder.overlay import Piece

# Larger reads are fetched by a thread, so that copying does not stop the loop.
INLINE_BYTES_MAX: Final = 4 << 20
# Buffers of reads that wait for a thread; above it further reads wait in their connections.
WAITING_BYTES_MAX: Final = 64 << 20
# A stretch of zeroes is told as a hole from this size on.
HOLE_BYTES_MIN: Final = 64 << 10
EXTENTS_MAX: Final = 4096
# With an overlay a status covers at most so many blocks: looking them up takes time in the loop.
STATUS_BLOCKS_MAX: Final = 1 << 16
_REPLY_HEADER_MAX: Final = CHUNK_OFFSET_HOLE.size
# The hot path: a request's header with magic, flags and type as one number; headers of replies.
PLAIN_BYTES_MAX: Final = 128 << 10
_PLAIN_REPLY_MAX: Final = REPLY_BYTES - PLAIN_BYTES_MAX - _REPLY_HEADER_MAX
_HEAD: Final = Struct(">Q8sQI")
assert _HEAD.size == REQUEST.size
_READ: Final = NBD_REQUEST_MAGIC << 32 | NBD_CMD_READ
_DATA: Final = Struct(">II8sIQ")
assert _DATA.size == CHUNK_OFFSET_DATA.size
_MAGIC: Final = NBD_STRUCTURED_REPLY_MAGIC
_DONE_DATA: Final = NBD_REPLY_FLAG_DONE << 16 | NBD_REPLY_TYPE_OFFSET_DATA
_SIMPLE: Final = Struct(">Q8s")
assert _SIMPLE.size == SIMPLE_REPLY.size
_SIMPLE_OK: Final = NBD_SIMPLE_REPLY_MAGIC << 32
_EIO: Final = int(NbdError.EIO)
_ZERO_STATE: Final = NBD_STATE_HOLE | NBD_STATE_ZERO


class LiveReads:
    """Executes READ, BLOCK_STATUS and CACHE for one recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.waiting_bytes = 0

    def execute_plain(self, connection: Connection) -> int:
        """Execute the small reads at the front of the buffer; how many.

        The hot path of reads: what is in the page cache goes from there into one reply.
        """
        recorder = self._recorder
        if connection.out or self.waiting_bytes > WAITING_BYTES_MAX or recorder.poisoned:
            return 0
        recorder.advance()
        overlay, backing, size = recorder.overlay, recorder.backing, connection.rules.size
        empty, structured = overlay.empty, connection.structured
        header = _DATA.size if structured else _SIMPLE.size
        reply = connection.reply
        if reply is None:
            reply = connection.reply = memoryview(bytearray(REPLY_BYTES))
        view, at, stop = connection.view, connection.start, connection.end - _HEAD.size
        used = count = total = 0
        while at <= stop:
            head, cookie, offset, length = _HEAD.unpack_from(view, at)
            if head != _READ or not 0 < length <= PLAIN_BYTES_MAX or offset + length > size:
                break
            if used > _PLAIN_REPLY_MAX:
                connection.send(reply[:used])
                used = 0
                if connection.out:
                    break
            at += _HEAD.size
            count += 1
            total += length
            data = used + header
            into = reply[data : data + length]
            pieces = None if empty else overlay.resolve(*_blocks(offset, length))
            if pieces is None or (len(pieces) == 1 and pieces[0][0] == BACKING):
                try:
                    done = os.preadv(backing, (into,), offset, NOWAIT)
                except OSError:
                    done = 0  # not at hand, or an error that the thread will meet, too
                if done != length:
                    whole = [_backing(offset, length)]
                    self._wait(connection, cookie, offset, length, whole)
                    continue
                if structured:
                    _DATA.pack_into(reply, used, _MAGIC, _DONE_DATA, cookie, length + 8, offset)
                else:
                    _SIMPLE.pack_into(reply, used, _SIMPLE_OK, cookie)
                used = data + length
            else:
                done = self._small(connection, cookie, offset, length, pieces, reply[used:])
                if done < 0:
                    self._wait(connection, cookie, offset, length, pieces)
                used += max(done, 0)
        if used:
            connection.send(reply[:used])
        connection.start = at
        recorder.statistics.reads += count
        recorder.statistics.read_bytes += total
        return count

    def execute(self, connection: Connection, requests: Sequence[Request]) -> None:
        """Execute valid requests; those there is no room for are deferred."""
        recorder = self._recorder
        recorder.advance()
        backing = recorder.backing
        overlay = recorder.overlay
        plain = overlay.empty
        structured = connection.structured
        header = CHUNK_OFFSET_DATA.size if structured else SIMPLE_REPLY.size
        reply = connection.reply
        if reply is None:
            reply = connection.reply = memoryview(bytearray(REPLY_BYTES))
        used = 0
        count = total = 0
        preadv = os.preadv
        for number, request in enumerate(requests):
            kind, flags, cookie, offset, length, _ = request
            if kind != NBD_CMD_READ:
                self._other(connection, request)
                continue
            if self.waiting_bytes > WAITING_BYTES_MAX or connection.blocked:
                connection.deferred.extend(requests[number:])
                break
            count += 1
            total += length
            if used + _REPLY_HEADER_MAX + length > REPLY_BYTES:
                if used:
                    connection.send(reply[:used])
                    used = 0
                if _REPLY_HEADER_MAX + length > REPLY_BYTES:
                    self._large(connection, flags, cookie, offset, length)
                    continue
            at = used + header
            into = reply[at : at + length]
            if plain:
                try:
                    if preadv(backing, (into,), offset, NOWAIT) == length:
                        reply[used:at] = read_header(cookie, offset, length, structured)
                        used = at + length
                        continue
                except OSError:
                    pass  # not at hand, or an error that the thread will meet, too
                pieces: list[Piece] = [_backing(offset, length)]
            else:
                pieces = overlay.resolve(*_blocks(offset, length))
                done = self._small(connection, cookie, offset, length, pieces, reply[used:])
                if done > 0:
                    used += done
                    continue
                if done == 0:
                    continue
            self._wait(connection, cookie, offset, length, pieces)
        if used:
            connection.send(reply[:used])
        recorder.statistics.reads += count
        recorder.statistics.read_bytes += total

    def resume(self, connection: Connection) -> bool:
        """Execute deferred reads, if there is room again; whether any were."""
        if connection.closed or connection.blocked or self.waiting_bytes > WAITING_BYTES_MAX:
            return False
        requests = list(connection.deferred)
        connection.deferred.clear()
        self.execute(connection, requests)
        return True

    def _small(
        self,
        connection: Connection,
        cookie: bytes,
        offset: int,
        length: int,
        pieces: list[Piece],
        into: memoryview,
    ) -> int:
        """Assemble a reply; its size, 0: an error was sent instead, -1: it must wait for a disk."""
        if connection.structured and len(pieces) == 1 and pieces[0][0] == ZERO:
            chunk = hole_chunk(cookie, offset, length)
            into[: len(chunk)] = chunk
            return len(chunk)
        header = read_header(cookie, offset, length, connection.structured)
        at = len(header)
        try:
            if not fetch(pieces, self._recorder.backing, offset, into[at : at + length], NOWAIT):
                return -1
        except OSError as error:
            self._failed(connection, cookie, error)
            return 0
        into[:at] = header
        return at + length

    def _large(
        self, connection: Connection, flags: int, cookie: bytes, offset: int, length: int
    ) -> None:
        """A read with a buffer of its own; long stretches of zeroes become holes."""
        overlay = self._recorder.overlay
        pieces = overlay.resolve(*_blocks(offset, length))
        if length > INLINE_BYTES_MAX:
            self._wait(connection, cookie, offset, length, pieces)
            return
        if connection.structured and not flags & NBD_CMD_FLAG_DF:
            groups = _groups(pieces, offset, length)
        else:
            groups = [(False, offset, offset + length, pieces)]
        buffer = memoryview(bytearray(length + len(groups) * _REPLY_HEADER_MAX))
        at = 0
        try:
            for number, (hole, low, high, members) in enumerate(groups):
                done = number == len(groups) - 1
                if hole:
                    head = hole_chunk(cookie, low, high - low, done)
                elif connection.structured:
                    head = data_chunk_header(cookie, low, high - low, done)
                else:
                    head = read_header(cookie, low, high - low, False)
                buffer[at : at + len(head)] = head
                at += len(head)
                if not hole:
                    into = buffer[at : at + high - low]
                    if not fetch(members, self._recorder.backing, low, into, NOWAIT):
                        self._wait(connection, cookie, offset, length, pieces)
                        return
                    at += high - low
        except OSError as error:
            self._failed(connection, cookie, error)
            return
        connection.send_own(buffer[:at])

    def _wait(
        self,
        connection: Connection,
        cookie: bytes,
        offset: int,
        length: int,
        pieces: Sequence[Piece],
    ) -> None:
        """Have a thread fetch it."""
        header = read_header(cookie, offset, length, connection.structured)
        buffer = memoryview(bytearray(len(header) + length))
        buffer[: len(header)] = header
        connection.in_flight += 1
        self.waiting_bytes += length
        self._recorder.statistics.reads_waited += 1

        def done(error: OSError | None) -> None:
            connection.in_flight -= 1
            self.waiting_bytes -= length
            if error is not None:
                self._failed(connection, cookie, error)
            else:
                connection.send_own(buffer)

        into = buffer[len(header) :]
        self._recorder.readers.submit(Fetch(pieces, self._recorder.backing, offset, into, done))

    def _failed(self, connection: Connection, cookie: bytes, error: OSError) -> None:
        statistics = self._recorder.statistics
        statistics.failed += 1
        if isinstance(error, Damaged):
            self._recorder.damage(error)
        connection.send(error_reply(cookie, _EIO, connection.structured, str(error)))

    # ------------------------------------------------------------------------- status, read-ahead
    def _other(self, connection: Connection, request: Request) -> None:
        kind, flags, cookie, offset, length, _ = request
        recorder = self._recorder
        if kind == NBD_CMD_CACHE:
            ranges = [
                (first * BLOCK, count * BLOCK)
                for what, first, count, _, _ in recorder.overlay.resolve(*_blocks(offset, length))
                if what == BACKING
            ]
            if ranges:
                recorder.readers.submit(Advise(recorder.backing, ranges))
            connection.send(ok_replies([cookie]))
            return
        assert kind == NBD_CMD_BLOCK_STATUS
        recorder.statistics.block_statuses += 1
        first, count = _blocks(offset, length)
        if not recorder.overlay.empty and count > STATUS_BLOCKS_MAX:
            count = STATUS_BLOCKS_MAX
            length = (first + count) * BLOCK - offset
        pieces = recorder.overlay.resolve(first, count)
        one = bool(flags & NBD_CMD_FLAG_REQ_ONE)
        job = Status(connection, cookie, recorder.backing, offset, length, pieces, one)
        if any(piece[0] == BACKING for piece in pieces):
            connection.in_flight += 1
            recorder.readers.submit(job)
        else:
            connection.in_flight += 1
            job.work()
            job.finish()


class Status:
    """A block status: what of a range is known to be zero. The file system is asked in a thread."""

    oldest_segment: int | None = None

    def __init__(
        self,
        connection: Connection,
        cookie: bytes,
        backing: int,
        offset: int,
        length: int,
        pieces: Sequence[Piece],
        one: bool,
    ) -> None:
        self._connection, self._cookie = connection, cookie
        self._backing, self._offset, self._length = backing, offset, length
        self._pieces, self._one = pieces, one
        self._extents: list[tuple[int, int]] = []

    def work(self) -> None:
        limit = 1 if self._one else EXTENTS_MAX
        extents: list[tuple[int, int]] = []
        for length, state in self._states():
            if extents and extents[-1][1] == state:
                extents[-1] = (extents[-1][0] + length, state)
            elif len(extents) == limit:
                break
            else:
                extents.append((length, state))
        self._extents = extents

    def _states(self) -> Iterable[tuple[int, int]]:
        offset, end = self._offset, self._offset + self._length
        for kind, first, count, _, _ in self._pieces:
            low, high = max(first * BLOCK, offset), min((first + count) * BLOCK, end)
            if kind == ZERO:
                yield high - low, _ZERO_STATE
            elif kind == BACKING:
                try:
                    for length, hole in holes(self._backing, low, high):
                        yield length, _ZERO_STATE if hole else 0
                        low += length
                except OSError:
                    yield high - low, 0  # "may hold data" is always right
            else:
                yield high - low, 0

    def finish(self) -> None:
        connection = self._connection
        connection.in_flight -= 1
        context = connection.allocation_context
        assert context is not None
        connection.send(block_status_chunk(self._cookie, context, self._extents))


def _blocks(offset: int, length: int) -> tuple[int, int]:
    first = offset // BLOCK
    return first, (offset + length - 1) // BLOCK + 1 - first


def _backing(offset: int, length: int) -> Piece:
    first, count = _blocks(offset, length)
    return (BACKING, first, count, None, None)


def _groups(
    pieces: Sequence[Piece], offset: int, length: int
) -> list[tuple[bool, int, int, list[Piece]]]:
    """Pieces grouped into chunks of a reply: (whether a hole, from, to, pieces)."""
    end = offset + length
    groups: list[tuple[bool, int, int, list[Piece]]] = []
    for piece in pieces:
        low, high = max(piece[1] * BLOCK, offset), min((piece[1] + piece[2]) * BLOCK, end)
        hole = piece[0] == ZERO and high - low >= HOLE_BYTES_MIN
        if groups and not hole and not groups[-1][0]:
            _, start, _, members = groups[-1]
            members.append(piece)
            groups[-1] = (False, start, high, members)
        else:
            groups.append((hole, low, high, [piece]))
    return groups
