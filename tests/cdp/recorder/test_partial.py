"""Ragged edges, whole blocks, locks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdp.recorder.connection import Connection
from cdp.recorder.partial import (
    Locks,
    Parked,
    ragged_edges,
    touched_blocks,
    whole_blocks,
    widen,
)
from tests.cdp.recorder.support import negotiated, socket_pair

BLOCK = 4096
SIZE = 10 * BLOCK + 1536  # the last block is a short one


@given(st.integers(0, SIZE - 1), st.data())
def test_blocks_of_a_range(offset: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, SIZE - offset))
    inside = [
        block
        for block in range(11)
        if offset <= block * BLOCK and min((block + 1) * BLOCK, SIZE) <= offset + length
    ]
    touched = [
        block
        for block in range(11)
        if block * BLOCK < offset + length and offset < (block + 1) * BLOCK
    ]
    first, count = whole_blocks(offset, length, SIZE)
    assert list(range(first, first + count)) == inside
    first, count = touched_blocks(offset, length)
    assert list(range(first, first + count)) == touched
    assert ragged_edges(offset, length, SIZE) == [b for b in touched if b not in inside]


@given(st.integers(0, 5 * BLOCK), st.binary(min_size=1, max_size=3 * BLOCK), st.booleans())
def test_widening_keeps_what_is_around(offset: int, payload: bytes, zero: bool) -> None:
    old = bytes(range(256)) * 16 * 12
    edges = ragged_edges(offset, len(payload), len(old))
    found = {block: old[block * BLOCK : (block + 1) * BLOCK] for block in edges}
    whole = widen(offset, None if zero else payload, len(payload), dict(found))
    first, count = touched_blocks(offset, len(payload))
    expected = bytearray(old)
    expected[offset : offset + len(payload)] = bytes(len(payload)) if zero else payload
    assert whole == expected[first * BLOCK : (first + count) * BLOCK]


@pytest.fixture
def connection() -> Connection:
    client, server = socket_pair("unix")
    client.close()
    found = Connection(server, negotiated(SIZE))
    server.close()
    return found


def test_locks_are_held_until_their_turn_has_come(connection: Connection) -> None:
    locks = Locks()
    first, second, third = (
        Parked(connection, 1, 0, bytes(8), 0, 100, b"x" * 100) for _ in range(3)
    )
    locks.lock(first, [1, 2])
    locks.lock(second, [5])
    locks.wait(third)
    assert locks.locked(0, 2)
    assert not locks.locked(3, 2)
    assert locks.bytes == 300
    locks.release(second)
    # It is ready, and still nobody may slip in before it.
    assert locks.locked(5, 1)
    assert locks.take_ready() is second
    assert not locks.locked(5, 1)
    assert locks.take_ready() is third
    locks.wait(third)  # it needs block 1
    assert locks.take_ready() is None
    locks.release(first)
    assert locks.take_ready() is first
    assert locks.take_ready() is third
    assert not locks
    assert locks.bytes == 0
    assert connection.parked == 3


def test_who_is_gone_does_not_wait(connection: Connection) -> None:
    locks = Locks()
    holder, waiter = (Parked(connection, 1, 0, bytes(8), 0, 9, b"x" * 9) for _ in range(2))
    locks.lock(holder, [1])
    locks.wait(waiter)
    assert locks.forget(connection) == 1
    assert locks.bytes == 9
    locks.release(holder)
    assert locks.take_ready() is holder
    assert locks.take_ready() is None
