"""`scan` against the plainest parser there is, on any bytes in any pieces."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from cdp.nbd import wire
from cdp.nbd.limits import Limits
from cdp.nbd.transmission import block_status_chunk, error_offset_chunk, hole_chunk, scan
from tests.cdp.nbd.test_transmission import feed
from tests.cdp.nbd.vectors import random_cuts, request, write

LIMITS = Limits(max_payload=500, max_requests_per_scan=3)

writes = st.builds(write, st.integers(0, (1 << 64) - 1), st.binary(max_size=520))
others = st.builds(
    request,
    st.integers(0, 0xFFFF),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 32) - 1),
    flags=st.integers(0, 0xFFFF),
    number=st.integers(0, (1 << 64) - 1),
)
streams = st.lists(st.one_of(writes, others, others, st.binary(max_size=30)), max_size=10).map(
    b"".join
)


def plainly(data: bytes, max_payload: int) -> tuple[list[tuple], str]:
    """One request at a time, by slicing, with no state but what is left."""
    found: list[tuple] = []
    while len(data) >= 28:
        magic, flags, kind, name, offset, length = wire.REQUEST.unpack(data[:28])
        data = data[28:]
        if magic != wire.NBD_REQUEST_MAGIC:
            return found, f"a request begins with {magic:#010x}"
        payload = b""
        if kind == wire.NBD_CMD_WRITE:
            if length > max_payload:
                return found, f"a write of {length} bytes, over {max_payload}"
            if len(data) < length:
                return found, f"{length - len(data)} needed"
            payload, data = data[:length], data[length:]
        found.append((kind, flags, name, offset, length, payload))
        if kind == wire.NBD_CMD_DISC:
            return found, "disconnected"
    return found, f"{28 - len(data)} needed"


@given(streams, st.randoms(use_true_random=False))
def test_scan_is_the_plain_parser(stream: bytes, rng: random.Random) -> None:
    expected = plainly(stream, LIMITS.max_payload)
    assert feed([stream], LIMITS) == expected
    assert feed(random_cuts(stream, rng), LIMITS) == expected


@given(st.binary(max_size=300), st.integers(0, 300), st.integers(0, 300))
def test_any_part_of_any_buffer(data: bytes, a: int, b: int) -> None:
    start, end = sorted((min(a, len(data)), min(b, len(data))))
    try:
        result = scan(bytearray(data), start, end, LIMITS)
    except wire.RemoteProtocolError:
        return
    assert start <= result.start <= end
    for kind, _, _, _, length, position in result.requests:
        assert kind != wire.NBD_CMD_WRITE or start < position <= position + length <= end


@given(
    st.binary(min_size=8, max_size=8),
    st.lists(st.tuples(st.integers(1, (1 << 32) - 1), st.integers(0, (1 << 32) - 1)), min_size=1),
    st.integers(0, (1 << 64) - 1),
    st.text(),
)
def test_every_chunk_says_its_own_length(
    name: bytes, extents: list[tuple[int, int]], offset: int, text: str
) -> None:
    for chunk in (
        block_status_chunk(name, 1, extents),
        hole_chunk(name, offset, extents[0][0]),
        error_offset_chunk(name, 5, offset, text),
    ):
        magic, flags, _, of, length = wire.CHUNK.unpack_from(chunk)
        assert (magic, flags, of) == (wire.NBD_STRUCTURED_REPLY_MAGIC, 1, name)
        assert len(chunk) == wire.CHUNK.size + length
    assert error_offset_chunk(name, 5, offset, text).endswith(wire.UINT64.pack(offset))
