"""A connection to a view, beside others in one loop."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

import trio

from cdp.nbd.export import Negotiated
from cdp.nbd.wire import (
    NBD_CMD_DISC,
    NBD_CMD_READ,
    NBD_FLAG_HAS_FLAGS,
    NBD_REQUEST_MAGIC,
    REQUEST,
)
from cdp.viewer.connection import TURN_BYTES, Connection
from cdp.viewer.views import View

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Zeroes:
    """A view that costs nothing."""

    name, size = "zeroes", 1 << 30

    def read_batch(
        self, requests: list[tuple[int, int]], room: Callable[[int], memoryview]
    ) -> list[memoryview]:
        return [room(length) for _, length in requests]


class Swallowing(socket.socket):
    """Takes whatever is sent, at once, so that a connection never has to wait."""

    swallowed = 0

    def sendmsg(self, parts: Iterable[ReadableBuffer], *_: object) -> int:
        total = sum(len(memoryview(part)) for part in parts)
        self.swallowed += total
        return total


def request(kind: int, length: int = 0) -> bytes:
    return REQUEST.pack(NBD_REQUEST_MAGIC, 0, kind, b"a cookie", 0, length)


def negotiated() -> Negotiated:
    return Negotiated(
        export_name="z", requested_name="z", size=Zeroes.size, flags=NBD_FLAG_HAS_FLAGS,
        structured_replies=False, meta_contexts={}, min_block=1, preferred_block=4096,
        max_payload=32 << 20, block_size_requested=False,
    )  # fmt: skip


async def test_others_have_their_turn() -> None:
    """! A client that always has another request must not have the loop for itself."""
    length, count = 64 << 10, 512
    requests = count * request(NBD_CMD_READ, length) + request(NBD_CMD_DISC)
    ours, theirs = socket.socketpair()
    turns = 0

    async def neighbour() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    with theirs, Swallowing(fileno=ours.detach()) as sock:
        connection = Connection(cast(View, Zeroes()), sock, negotiated(), requests)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(neighbour)
            await connection.run()
            nursery.cancel_scope.cancel()
        assert sock.swallowed >= count * length
    assert turns >= count * length // TURN_BYTES // 2  # the order of tasks is at random
