"""The transmission phase: requests out of a receive buffer, replies into bytes.

This is the hot path, so it works on batches and offsets. `scan` finds every complete request in a
part of the caller's buffer and describes each by a plain tuple; a payload is never copied, the
tuple says where it lies. Tuples, because an event class costs more than the rest of the parsing
(a frozen dataclass doubles it).

What a request asks is not judged here: that is `validate`. Only two things end a connection here,
because there is no way to find the next request after them: a wrong magic number, and a WRITE that
announces more than `limits.max_payload`.

Replies: `ok_replies` answers a whole batch in one call. Where data follow, the functions return the
header only, and the caller gathers headers and data into one send.
Source: proto.md, "Transmission", "Structured reply chunk message", "Structured reply types".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import pack
from typing import Final, NamedTuple, TypeAlias

from cdp.nbd.limits import Limits
from cdp.nbd.wire import (
    CHUNK,
    CHUNK_OFFSET_DATA,
    CHUNK_OFFSET_HOLE,
    COOKIE_SIZE,
    ERROR_PAYLOAD,
    EXTENT,
    NBD_CMD_DISC,
    NBD_CMD_WRITE,
    NBD_MAX_EXTENTS,
    NBD_MAX_STRING,
    NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_ERROR,
    NBD_REPLY_TYPE_ERROR_OFFSET,
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

# (type, flags, cookie, offset, length, payload_pos): cookie is 8 opaque bytes, offset and length
# are bytes of the export, payload_pos is where a WRITE's data begin in the scanned buffer (for
# other types: where the next request begins, of no use).
Request: TypeAlias = tuple[int, int, bytes, int, int, int]
TYPE: Final = 0
FLAGS: Final = 1
COOKIE: Final = 2
OFFSET: Final = 3
LENGTH: Final = 4
PAYLOAD_POS: Final = 5

_HEADER_SIZE: Final = REQUEST.size


class ScanResult(NamedTuple):
    """What `scan` found: `requests` in order, `start` where to go on, and `needed`.

    `needed` > 0: bytes that must still arrive before another request is complete. A caller grows
    its buffer to that only as data really arrive: they are merely announced.
    `needed` == 0: there may be more in the buffer (the scan reached its limit, a DISC, or something
    that will raise): execute these requests, then scan again before receiving. Not after a DISC,
    which is then the last request: nothing may follow it.
    """

    requests: list[Request]
    start: int
    needed: int


def scan(buffer: bytearray | memoryview, start: int, end: int, limits: Limits) -> ScanResult:
    """All complete requests in `buffer[start:end]`, at most `limits.max_requests_per_scan`.

    Nothing is copied and nothing kept: the same bytes give the same answer, in however many pieces
    they arrive. A DISC ends the scan, since nothing may follow it: what comes after is not
    looked at, and the caller closes once earlier requests are answered.

    Raises RemoteProtocolError (disconnect) on a wrong magic number or a WRITE longer than
    `limits.max_payload`. Requests complete before that are returned first, and the next
    scan raises: a client's earlier requests do not depend on how its bytes were cut.
    """
    requests: list[Request] = []
    append = requests.append
    unpack_from = REQUEST.unpack_from
    max_payload = limits.max_payload
    last = end - _HEADER_SIZE
    position = start
    for _ in range(limits.max_requests_per_scan):
        if position > last:
            return ScanResult(requests, position, _HEADER_SIZE - (end - position))
        magic, flags, kind, cookie, offset, length = unpack_from(buffer, position)
        if magic != NBD_REQUEST_MAGIC:
            if requests:
                break
            raise RemoteProtocolError(f"a request begins with {magic:#010x}")
        payload = position + _HEADER_SIZE
        if kind == NBD_CMD_WRITE:
            if length > max_payload:
                if requests:
                    break
                raise RemoteProtocolError(f"a write of {length} bytes, over {max_payload}")
            following = payload + length
            if following > end:
                return ScanResult(requests, position, following - end)
            append((kind, flags, cookie, offset, length, payload))
            position = following
        else:
            append((kind, flags, cookie, offset, length, payload))
            position = payload
            if kind == NBD_CMD_DISC:
                break
    return ScanResult(requests, position, 0)


# --------------------------------------------------------------------------------- simple replies

_OK_PREFIX: Final = pack(">II", NBD_SIMPLE_REPLY_MAGIC, 0)


def ok_reply(cookie: bytes) -> bytes:
    """A simple reply without error; also the header of one to a READ: its data must follow."""
    return _OK_PREFIX + cookie


def ok_replies(cookies: Sequence[bytes]) -> bytes:
    """The simple replies of a batch that succeeded, in one piece.

    For requests without data in the reply; right whether or not structured replies were negotiated
    (proto.md, "Simple reply message"), except for READ and BLOCK_STATUS. 0.05 us each.
    """
    if not cookies:
        return b""
    return _OK_PREFIX + _OK_PREFIX.join(cookies)


def simple_error(cookie: bytes, error: int) -> bytes:
    """A simple reply with `error`, an NbdError. No data follow."""
    assert error, "a reply with error 0 is a success"
    return SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, error, cookie)


# ----------------------------------------------------------------------------- structured replies
# `done` marks the last chunk of a reply. A content chunk may carry it only when no error can occur
# any more while it is being sent.


def none_chunk(cookie: bytes) -> bytes:
    """The end of a reply: success unless an error chunk went before. Always the last chunk."""
    return CHUNK.pack(
        NBD_STRUCTURED_REPLY_MAGIC, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, cookie, 0
    )


def data_chunk_header(cookie: bytes, offset: int, length: int, done: bool = True) -> bytes:
    """Header of `length` bytes (at least 1) of data at `offset` of the export; they must follow."""
    assert length > 0, "a chunk of data may not be empty"
    return CHUNK_OFFSET_DATA.pack(
        NBD_STRUCTURED_REPLY_MAGIC,
        NBD_REPLY_FLAG_DONE if done else 0,
        NBD_REPLY_TYPE_OFFSET_DATA,
        cookie,
        length + 8,
        offset,
    )


def hole_chunk(cookie: bytes, offset: int, length: int, done: bool = True) -> bytes:
    """`length` bytes (at least 1) at `offset` of the export read as zeroes. Never with DF set,
    unless it is the whole answer."""
    assert length > 0, "a hole may not be empty"
    return CHUNK_OFFSET_HOLE.pack(
        NBD_STRUCTURED_REPLY_MAGIC,
        NBD_REPLY_FLAG_DONE if done else 0,
        NBD_REPLY_TYPE_OFFSET_HOLE,
        cookie,
        12,
        offset,
        length,
    )


def _message(text: str) -> bytes:
    """`text` as a string of the protocol: shortened at a character to what a reply may carry."""
    encoded = text.replace("\0", " ").encode(errors="replace")[:NBD_MAX_STRING]
    return encoded.decode(errors="ignore").encode()


def error_chunk(cookie: bytes, error: int, message: str = "", done: bool = True) -> bytes:
    """The request failed with `error`, an NbdError; nothing is known about parts of it."""
    assert error, "an error chunk with error 0"
    text = _message(message)
    return (
        CHUNK.pack(
            NBD_STRUCTURED_REPLY_MAGIC,
            NBD_REPLY_FLAG_DONE if done else 0,
            NBD_REPLY_TYPE_ERROR,
            cookie,
            ERROR_PAYLOAD.size + len(text),
        )
        + ERROR_PAYLOAD.pack(error, len(text))
        + text
    )


def error_offset_chunk(
    cookie: bytes, error: int, offset: int, message: str = "", done: bool = True
) -> bytes:
    """The request failed with `error`, an NbdError, at `offset` of the export, which must lie
    inside the request. A content chunk that covers `offset` must have been sent before."""
    assert error, "an error chunk with error 0"
    text = _message(message)
    return (
        CHUNK.pack(
            NBD_STRUCTURED_REPLY_MAGIC,
            NBD_REPLY_FLAG_DONE if done else 0,
            NBD_REPLY_TYPE_ERROR_OFFSET,
            cookie,
            ERROR_PAYLOAD.size + len(text) + UINT64.size,
        )
        + ERROR_PAYLOAD.pack(error, len(text))
        + text
        + UINT64.pack(offset)
    )


def block_status_chunk(
    cookie: bytes, context: int, extents: Iterable[tuple[int, int]], done: bool = True
) -> bytes:
    """The extents (length, status flags), from the request's offset on, of one metadata context.

    At least one and at most 2**20, none empty. A reply has exactly one such chunk per selected
    context. The lengths of all but the last must sum to less than was asked for; with REQ_ONE there
    is one extent, not longer than that.
    """
    numbers = [number for extent in extents for number in extent]
    count = len(numbers) // 2
    assert 1 <= count <= NBD_MAX_EXTENTS, f"{count} extents in one chunk"
    assert all(numbers[::2]), "an extent may not be empty"
    return (
        CHUNK.pack(
            NBD_STRUCTURED_REPLY_MAGIC,
            NBD_REPLY_FLAG_DONE if done else 0,
            NBD_REPLY_TYPE_BLOCK_STATUS,
            cookie,
            UINT32.size + count * EXTENT.size,
        )
        + UINT32.pack(context)
        + pack(f">{2 * count}I", *numbers)
    )


# ------------------------------------------------------------------------------ what a caller does


def error_reply(cookie: bytes, error: int, structured: bool, message: str = "") -> bytes:
    """The whole reply to a request that failed with `error` (an NbdError) before any chunk of it.

    With structured replies a READ must be answered by them even so, and other commands should be:
    only they carry `message` to whoever looks for the reason.
    """
    if structured:
        return error_chunk(cookie, error, message)
    return simple_error(cookie, error)


def read_header(cookie: bytes, offset: int, length: int, structured: bool) -> bytes:
    """Header of the reply to a READ whose `length` bytes are at hand and follow it, in one chunk
    (also right for DF)."""
    if structured:
        return data_chunk_header(cookie, offset, length)
    return _OK_PREFIX + cookie


assert len(_OK_PREFIX) + COOKIE_SIZE == SIMPLE_REPLY.size
