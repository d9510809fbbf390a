"""Every request is answered exactly once, with the newest data, as the kernel's client demands.

The kernel asks for simple replies, keeps a hundred requests of all sizes in flight, and shuts the
connection down at the first reply that it does not wait for. This plays it over TCP.
"""

from __future__ import annotations

import random
import select
import socket
import struct
from pathlib import Path

import pytest

from cdp.nbd.wire import (
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
)
from tests.interop.daemon import Daemon

SIZE = 24 << 20
DEPTH = 100
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")


def free_port() -> int:
    """A port of the loopback that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def exactly(sock: socket.socket, length: int) -> bytes:
    """So many bytes."""
    parts = []
    while length:
        data = sock.recv(min(length, 1 << 20))
        assert data, "the server hung up"
        parts.append(data)
        length -= len(data)
    return b"".join(parts)


def connect(port: int, export: str) -> socket.socket:
    """Negotiate as the kernel's tools do: NBD_OPT_EXPORT_NAME, simple replies."""
    sock = socket.create_connection(("127.0.0.1", port))
    assert exactly(sock, 18)[:16] == b"NBDMAGICIHAVEOPT"
    sock.sendall(struct.pack(">I", 3))
    sock.sendall(b"IHAVEOPT" + struct.pack(">II", 1, len(export)) + export.encode())
    size, _flags = struct.unpack(">QH", exactly(sock, 10))
    assert size == SIZE
    return sock


class Client:
    """Requests in flight; no two of them touch the same bytes unless both read."""

    def __init__(self, sock: socket.socket, rng: random.Random) -> None:
        self.sock, self.rng = sock, rng
        self.disk = bytearray(SIZE)
        self.flying: dict[int, tuple[int, int, int]] = {}
        self.answered: set[int] = set()
        self.next = 0
        self.out = bytearray()

    def free(self, offset: int, length: int) -> bool:
        """Whether nothing in flight touches the range."""
        return all(
            offset + length <= at or at + size <= offset for _, at, size in self.flying.values()
        )

    def ask(self) -> None:
        """One more request."""
        rng = self.rng
        kind = rng.choices(
            (NBD_CMD_WRITE, NBD_CMD_READ, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES),
            (60, 25, 5, 6, 4),
        )[0]
        length = rng.choice((512, 512, 1024, 2560, 4096, 4096, 8192, 12_800, 65_536, 131_072))
        if kind == NBD_CMD_TRIM:
            length = rng.choice((4096, 65_536, 1 << 20))
        unit = 4096 if kind == NBD_CMD_TRIM else 512  # parts of blocks in a trim are left alone
        offset = rng.randrange((SIZE - length) // unit) * unit
        if kind == NBD_CMD_FLUSH:
            offset = length = 0
        elif not self.free(offset, length):
            return
        flags = NBD_CMD_FLAG_FUA if kind != NBD_CMD_READ and rng.random() < 0.1 else 0
        if kind == NBD_CMD_FLUSH:
            flags = 0
        self.next += 1
        self.flying[self.next] = (kind, offset, length)
        self.out += REQUEST.pack(0x25609513, flags, kind, self.next, offset, length)
        if kind == NBD_CMD_WRITE:
            data = rng.randbytes(16) * (length // 16)
            self.out += data
            self.disk[offset : offset + length] = data
        elif kind in (NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES):
            self.disk[offset : offset + length] = bytes(length)

    def hear(self) -> None:
        """One reply."""
        magic, error, cookie = REPLY.unpack(exactly(self.sock, REPLY.size))
        assert magic == 0x67446698, hex(magic)
        assert cookie not in self.answered, f"request {cookie} is answered twice"
        assert cookie in self.flying, f"a reply to {cookie}, which was never asked"
        kind, offset, length = self.flying.pop(cookie)
        self.answered.add(cookie)
        assert error == 0, (kind, offset, length, error)
        if kind == NBD_CMD_READ:
            data = exactly(self.sock, length)
            assert data == self.disk[offset : offset + length], f"read of {length} at {offset}"

    def run(self, requests: int) -> None:
        """So many requests, DEPTH of them in flight."""
        while self.next < requests or self.flying:
            while self.next < requests and len(self.flying) < DEPTH and len(self.out) < 1 << 20:
                self.ask()
            waiting = [self.sock] if self.out else []
            readable, writable, _ = select.select([self.sock], waiting, [], 60)
            assert readable or writable, f"no reply to {sorted(self.flying)[:5]}"
            if writable:
                # In pieces, so that requests are cut anywhere.
                self.sock.setblocking(False)
                sent = self.sock.send(self.out[: self.rng.choice((100, 5000, 300_000))])
                self.sock.setblocking(True)
                del self.out[:sent]
            if readable:
                self.hear()


@pytest.mark.parametrize("round_number", range(3))
def test_every_request_is_answered_once(short_tmp: Path, seed: int, round_number: int) -> None:
    rng = random.Random(f"{seed}/{round_number}")
    port = free_port()
    with Daemon(short_tmp / "state", "--nbd", f"tcp://127.0.0.1:{port}") as daemon:
        daemon.cdp("disk", "add", "d", "--size", str(SIZE))
        with connect(port, "d") as sock:
            client = Client(sock, rng)
            client.run(4000)
            client.flying = {}
        with connect(port, "d") as sock:
            again = Client(sock, rng)
            again.disk = client.disk
            again.run(500)
