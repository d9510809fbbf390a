"""Requests out of a buffer, and every kind of reply, byte for byte."""

from __future__ import annotations

import random

import pytest

from cdp.nbd import wire
from cdp.nbd.limits import Limits
from cdp.nbd.transmission import (
    Request,
    block_status_chunk,
    data_chunk_header,
    error_chunk,
    error_offset_chunk,
    error_reply,
    hole_chunk,
    none_chunk,
    ok_replies,
    ok_reply,
    read_header,
    scan,
    simple_error,
)
from tests.cdp.nbd.vectors import cookie, cuttings, request, write

LIMITS = Limits()
READ, WRITE, DISC = wire.NBD_CMD_READ, wire.NBD_CMD_WRITE, wire.NBD_CMD_DISC

STREAM = b"".join(
    [
        request(READ, 1, 2, flags=4, number=3),
        write(4096, b"x" * 100, flags=1, number=4),
        write(0, b"", number=5),
        request(wire.NBD_CMD_TRIM, (1 << 64) - 1, (1 << 32) - 1, number=(1 << 64) - 1),
        request(99, 7, 8, number=6),
        write(1 << 40, b"yz", number=7),
    ]
)
FOUND: list[Request] = [
    (READ, 4, cookie(3), 1, 2, 28),
    (WRITE, 1, cookie(4), 4096, 100, 56),
    (WRITE, 0, cookie(5), 0, 0, 184),
    (wire.NBD_CMD_TRIM, 0, b"\xff" * 8, (1 << 64) - 1, (1 << 32) - 1, 212),
    (99, 0, cookie(6), 7, 8, 240),
    (WRITE, 0, cookie(7), 1 << 40, 2, 268),
]


def feed(chunks: list[bytes], limits: Limits = LIMITS) -> tuple[list[tuple], str]:
    """Scans as a host does: (requests with their payloads, how it ended).

    Checks on the way that `needed` is exact: never too much, and never reached without effect.
    """
    buffer = bytearray()
    start = 0
    found: list[tuple] = []
    needed = 28
    for chunk in chunks:
        buffer += chunk
        needed -= len(chunk)
        while needed <= 0:
            try:
                result = scan(buffer, start, len(buffer), limits)
            except wire.RemoteProtocolError as error:
                return found, str(error)
            for kind, flags, name, offset, length, position in result.requests:
                payload = bytes(buffer[position : position + length]) if kind == WRITE else b""
                found.append((kind, flags, name, offset, length, payload))
                if kind == DISC:
                    return found, "disconnected"
            assert len(result.requests) <= limits.max_requests_per_scan
            assert start <= result.start <= len(buffer)
            start, needed = result.start, result.needed
            if needed == 0:
                assert result.requests
        unfinished = scan(buffer, start, len(buffer), limits)
        assert unfinished == ([], start, needed)
    return found, f"{needed} needed"


def test_all_requests_are_found_in_one_scan() -> None:
    for buffer in (bytearray(STREAM), memoryview(STREAM)):
        assert scan(buffer, 0, len(STREAM), LIMITS) == (FOUND, len(STREAM), 28)


def test_offsets_are_those_of_the_buffer() -> None:
    buffer = bytearray(b"?" * 1000 + STREAM + b"?" * 50)
    end = 1000 + len(STREAM)
    moved = [(*r[:5], r[5] + 1000) for r in FOUND]
    assert scan(buffer, 1000, end, LIMITS) == (moved, end, 28)


def test_nothing() -> None:
    assert scan(bytearray(), 0, 0, LIMITS) == ([], 0, 28)
    assert scan(bytearray(STREAM), 50, 50, LIMITS) == ([], 50, 28)


def test_cuts_change_nothing() -> None:
    expected = feed([STREAM])
    assert [r[:5] for r in expected[0]] == [r[:5] for r in FOUND]
    assert expected[0][1][5] == b"x" * 100
    for chunks in cuttings(STREAM):
        assert feed(chunks) == expected


def test_needed_of_an_incomplete_header_and_of_an_incomplete_payload() -> None:
    data = bytearray(write(0, b"p" * 1000))
    assert scan(data, 0, 0, LIMITS).needed == 28
    assert scan(data, 0, 1, LIMITS).needed == 27
    assert scan(data, 0, 27, LIMITS).needed == 1
    assert scan(data, 0, 28, LIMITS).needed == 1000
    assert scan(data, 0, 1027, LIMITS).needed == 1
    assert scan(data, 0, 1028, LIMITS).requests


def test_a_payload_that_looks_like_a_request_is_none() -> None:
    inner = request(READ, 5, 5) * 4
    result = scan(bytearray(write(0, inner)), 0, 28 + len(inner), LIMITS)
    assert len(result.requests) == 1


@pytest.mark.parametrize("magic", [0, wire.NBD_SIMPLE_REPLY_MAGIC, 0x21E41C71, 0xFFFFFFFF])
def test_a_wrong_magic_disconnects_after_what_was_complete(magic: int) -> None:
    stream = STREAM + request(READ, magic=magic)
    for chunks in cuttings(stream):
        found, end = feed(chunks)
        assert len(found) == len(FOUND)
        assert end == f"a request begins with {magic:#010x}"
    first = scan(bytearray(stream), 0, len(stream), LIMITS)
    assert first == (FOUND, len(STREAM), 0)
    with pytest.raises(wire.RemoteProtocolError):
        scan(bytearray(stream), first.start, len(stream), LIMITS)


def test_a_write_over_the_limit_disconnects_at_its_header() -> None:
    limits = Limits(max_payload=1000)
    assert feed([write(0, bytes(1000))], limits)[1] == "28 needed"
    for chunks in cuttings(STREAM + request(WRITE, 0, 1001)):
        found, end = feed(chunks, limits)
        assert len(found) == len(FOUND)
        assert end == "a write of 1001 bytes, over 1000"
    assert feed([request(READ, 0, 1001)], limits)[1] == "28 needed"


def test_nothing_is_scanned_behind_a_disconnect() -> None:
    stream = STREAM + request(DISC) + b"garbage that is never looked at, longer than a header"
    for chunks in cuttings(stream):
        found, end = feed(chunks)
        assert end == "disconnected"
        assert len(found) == len(FOUND) + 1


def test_a_scan_ends_at_its_limit_and_says_that_there_may_be_more() -> None:
    limits = Limits(max_requests_per_scan=4)
    buffer = bytearray(STREAM)
    first = scan(buffer, 0, len(buffer), limits)
    assert first == (FOUND[:4], FOUND[3][5], 0)
    second = scan(buffer, first.start, len(buffer), limits)
    assert second == (FOUND[4:], len(buffer), 28)
    for chunks in cuttings(STREAM):
        assert feed(chunks, limits) == feed([STREAM])


def test_a_scan_allocates_nothing_for_what_is_announced() -> None:
    """The largest write allowed, announced by a header alone: a number comes back, no memory."""
    result = scan(bytearray(request(WRITE, 0, LIMITS.max_payload)), 0, 28, LIMITS)
    assert result == ([], 0, LIMITS.max_payload)


# ---------------------------------------------------------------------------------------- replies

COOKIE = b"\1\2\3\4\5\6\7\x08"


def test_simple_replies() -> None:
    assert ok_reply(COOKIE) == bytes.fromhex("67446698 00000000 0102030405060708")
    assert simple_error(COOKIE, 28) == bytes.fromhex("67446698 0000001c 0102030405060708")


def test_a_batch_of_replies_is_its_replies_one_after_another() -> None:
    rng = random.Random(1)
    for count in (0, 1, 2, 32, 1024):
        cookies = [rng.randbytes(8) for _ in range(count)]
        assert ok_replies(cookies) == b"".join(ok_reply(c) for c in cookies)


def test_structured_chunks() -> None:
    start = "668e33ef 0001 {} 0102030405060708 "
    more = "668e33ef 0000 {} 0102030405060708 "
    cases = [
        (none_chunk(COOKIE), start.format("0000") + "00000000"),
        (data_chunk_header(COOKIE, 16, 512), start.format("0001") + "00000208 0000000000000010"),
        (
            data_chunk_header(COOKIE, 16, 512, done=False),
            more.format("0001") + "00000208 0000000000000010",
        ),
        (
            hole_chunk(COOKIE, 1 << 40, 0xFFFFFFFF, done=False),
            more.format("0002") + "0000000c 0000010000000000 ffffffff",
        ),
        (error_chunk(COOKIE, 5), start.format("8001") + "00000006 00000005 0000"),
        (error_chunk(COOKIE, 5, "ab"), start.format("8001") + "00000008 00000005 0002 6162"),
        (
            error_offset_chunk(COOKIE, 5, 4096, "ab", done=False),
            more.format("8002") + "00000010 00000005 0002 6162 0000000000001000",
        ),
        (
            block_status_chunk(COOKIE, 7, [(4096, 3), (512, 0)]),
            start.format("0005") + "00000014 00000007 00001000 00000003 00000200 00000000",
        ),
    ]
    for chunk, expected in cases:
        assert chunk == bytes.fromhex(expected)


def test_messages_are_strings_of_the_protocol() -> None:
    chunk = error_chunk(COOKIE, 5, "a\0b" + "é" * 4000 + "\ud800")
    _, size = wire.ERROR_PAYLOAD.unpack_from(chunk, wire.CHUNK.size)
    message = chunk[wire.CHUNK.size + wire.ERROR_PAYLOAD.size :]
    assert len(message) == size <= wire.NBD_MAX_STRING
    assert message.decode() == "a b" + "é" * 2046


def test_which_reply_to_use() -> None:
    assert error_reply(COOKIE, 22, structured=False, message="lost") == simple_error(COOKIE, 22)
    assert error_reply(COOKIE, 22, structured=True, message="x") == error_chunk(COOKIE, 22, "x")
    assert read_header(COOKIE, 5, 6, structured=False) == ok_reply(COOKIE)
    assert read_header(COOKIE, 5, 6, structured=True) == data_chunk_header(COOKIE, 5, 6)


def test_our_own_mistakes_are_asserted() -> None:
    for mistake in (
        lambda: simple_error(COOKIE, 0),
        lambda: error_chunk(COOKIE, 0),
        lambda: error_offset_chunk(COOKIE, 0, 0),
        lambda: data_chunk_header(COOKIE, 0, 0),
        lambda: hole_chunk(COOKIE, 0, 0),
        lambda: block_status_chunk(COOKIE, 1, []),
        lambda: block_status_chunk(COOKIE, 1, [(1, 0), (0, 0)]),
    ):
        with pytest.raises(AssertionError):
            mistake()
