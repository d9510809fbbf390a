"""The client's side of option haggling, for tests of the front door."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Self

import trio

from cdp.nbd import wire

UNIT = struct.Struct(">I")


class Refused(Exception):
    """The server answered with an error: its code and its words."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Peer:
    """A connection that has got its greeting."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = bytearray()

    @classmethod
    async def unix(cls, path: Path) -> Self:
        """Connects to DIR/nbd.sock."""
        return await cls._greeted(await trio.open_unix_socket(os.fspath(path)))

    @classmethod
    async def tcp(cls, host: str, port: int) -> Self:
        """Connects to a TCP listener."""
        return await cls._greeted(await trio.open_tcp_stream(host, port))

    @classmethod
    async def _greeted(cls, stream: trio.SocketStream) -> Self:
        peer = cls(stream)
        try:
            await peer.read(18)
            await stream.send_all(UNIT.pack(3))
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return peer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stream.aclose()

    async def read(self, count: int) -> bytes:
        """Exactly `count` bytes; EOFError when there are not so many."""
        while len(self.buffer) < count:
            data = await self.stream.receive_some(65536)
            if not data:
                raise EOFError
            self.buffer += data
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        return data

    async def ask(self, option: int, data: bytes = b"", *, more: bytes = b"") -> None:
        """Sends an option, and more behind it."""
        head = wire.OPTION.pack(wire.NBD_OPTS_MAGIC, option, len(data))
        await self.stream.send_all(head + data + more)

    async def replies(self) -> list[tuple[int, bytes]]:
        """All replies to an option: (type, data), without the ACK. Refused for an error."""
        found: list[tuple[int, bytes]] = []
        while True:
            _, _, kind, length = wire.OPTION_REPLY.unpack(await self.read(wire.OPTION_REPLY.size))
            data = await self.read(length)
            if kind == wire.NBD_REP_ACK:
                return found
            if kind & wire.NBD_REP_FLAG_ERROR:
                raise Refused(kind, data.decode())
            found.append((kind, data))

    async def go(
        self, name: str, *, option: int = wire.NBD_OPT_GO, more: bytes = b""
    ) -> tuple[int, int]:
        """GO, or INFO: size and transmission flags."""
        raw = name.encode()
        request = UNIT.pack(len(raw)) + raw + struct.pack(">H", 0)
        await self.ask(option, request, more=more)
        info = next(data for kind, data in await self.replies() if kind == wire.NBD_REP_INFO)
        _, size, flags = wire.INFO_EXPORT.unpack(info)
        return size, flags

    async def info(self, name: str) -> tuple[int, int]:
        """INFO: the same, and the haggling goes on."""
        return await self.go(name, option=wire.NBD_OPT_INFO)

    async def list(self) -> list[str]:
        """LIST: names."""
        await self.ask(wire.NBD_OPT_LIST)
        names = []
        for _, data in await self.replies():
            (length,) = UNIT.unpack_from(data)
            names.append(data[4 : 4 + length].decode())
        return names


def port_of(uri: str) -> int:
    """The port in an NBD URI."""
    return int(uri.rstrip("/").rpartition(":")[2])


def reset(peer: Peer) -> None:
    """Makes closing the connection an RST."""
    peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
