"""A recorder as tasks of a test, a client that speaks to it, and a stand-in for the curator."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import trio

from cdp.config import DiskConfig
from cdp.nbd.export import Negotiated
from cdp.nbd.wire import (
    NBD_CMD_DISC,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    REQUEST,
    SIMPLE_REPLY,
)
from cdp.recorder.control import EXPORT_FLAGS
from cdp.recorder.process import Process
from cdp.recorder.standalone import child_of, make_disk
from journal.bitmaps import Rollbacks
from journal.follower import RedoFollower
from journal.format import BLOCK, Kind
from journal.segment import TEMPORARY, read_blocks
from journal.storage import Buffer, Mode, RealFile, RealStorage, Storage

READ, WRITE, DISC, FLUSH = NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_DISC, NBD_CMD_FLUSH
TRIM, ZEROES = NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES
MIB = 1 << 20


def new_disk(directory: Path, size: int, **values: Any) -> DiskConfig:
    """A disk with small segments."""
    return make_disk(directory, size, **{"segment_bytes": MIB, "sync_age_seconds": 0.2, **values})


async def wait_until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    """Until it is true; for what has no event to wait for."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


@contextlib.asynccontextmanager
async def recorder(
    directory: Path, config: DiskConfig, *, storage: Storage | None = None
) -> AsyncIterator[Process]:
    """The recorder of a disk, ready; stopped cleanly at the end unless it has ended already."""
    child = child_of(directory, config)
    process = Process(child, own_process=False)
    if storage is not None:
        process.storage = storage
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(process.run)
            await process.settled.wait()
            try:
                yield process
            finally:
                process.stop()
                with trio.CancelScope(shield=True):
                    await process.ended.wait()
                    nursery.cancel_scope.cancel()
    finally:
        os.close(child.backing_fd)


def negotiated(size: int, *, structured: bool = False, **values: Any) -> Negotiated:
    """What a handshake would have agreed on."""
    contexts = {1: "base:allocation"} if structured else {}
    fields: dict[str, Any] = {
        "export_name": "disk0",
        "requested_name": "",
        "size": size,
        "flags": EXPORT_FLAGS,
        "structured_replies": structured,
        "meta_contexts": contexts,
        "min_block": 1,
        "preferred_block": BLOCK,
        "max_payload": 32 * MIB,
        "block_size_requested": False,
        **values,
    }
    return Negotiated(**fields)


def request(
    kind: int, offset: int, length: int, cookie: int, payload: bytes = b"", flags: int = 0
) -> bytes:
    """One request as it goes over the wire."""
    return (
        REQUEST.pack(NBD_REQUEST_MAGIC, flags, kind, struct.pack(">Q", cookie), offset, length)
        + payload
    )


def socket_pair(family: str) -> tuple[socket.socket, socket.socket]:
    """(client's end, server's end) of a connection."""
    if family == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, server


class NbdFailure(Exception):
    """A request was answered with an error."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Client:
    """Many requests at once over one connection, with simple replies."""

    def __init__(self, process: Process, family: str = "unix", *, leftover: bytes = b"") -> None:
        plain, server = socket_pair(family)
        plain.setblocking(False)
        self.plain = plain
        given = negotiated(process.recorder.size)
        self.connection = process.attach(server, given, leftover=leftover)
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(plain))
        self._send_lock = trio.Lock()
        self._next = 1 << 32
        self._pending: dict[int, tuple[trio.Event, int]] = {}
        self._answers: dict[int, tuple[int, bytes]] = {}
        self.gone = trio.Event()

    async def receive(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Takes in replies until the connection ends."""
        task_status.started()
        data = bytearray()
        try:
            while more := await self._stream.receive_some(1 << 20):
                data += more
                while len(data) >= SIMPLE_REPLY.size:
                    magic, error, raw = SIMPLE_REPLY.unpack_from(data)
                    assert magic == NBD_SIMPLE_REPLY_MAGIC
                    cookie = struct.unpack(">Q", raw)[0]
                    # What a test sent by itself (`send_nowait`) is no READ, and nobody waits.
                    event, length = self._pending.get(cookie, (trio.Event(), 0))
                    size = SIMPLE_REPLY.size + (0 if error else length)
                    if len(data) < size:
                        break
                    self._answers[cookie] = error, bytes(data[SIMPLE_REPLY.size : size])
                    del data[:size]
                    self._pending.pop(cookie, None)
                    event.set()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.gone.set()
        for event, _ in self._pending.values():
            event.set()

    async def call(
        self, kind: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0
    ) -> bytes:
        """One request; the data of a READ.

        :raises NbdFailure: it was answered with an error.
        :raises trio.BrokenResourceError: it was not answered.
        """
        self._next += 1
        cookie = self._next
        event = trio.Event()
        self._pending[cookie] = event, length if kind == READ else 0
        async with self._send_lock:
            await self._stream.send_all(
                request(kind, offset, length or len(payload), cookie, payload, flags)
            )
        await event.wait()
        if cookie not in self._answers:
            raise trio.BrokenResourceError
        error, data = self._answers.pop(cookie)
        if error:
            raise NbdFailure(error)
        return data

    async def read(self, offset: int, length: int) -> bytes:
        return await self.call(READ, offset, length)

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        await self.call(WRITE, offset, len(data), data, flags)

    async def zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.call(ZEROES, offset, length, b"", flags)

    async def trim(self, offset: int, length: int) -> None:
        await self.call(TRIM, offset, length)

    async def flush(self) -> None:
        await self.call(FLUSH)

    def send_nowait(self, data: bytes) -> None:
        """Into the socket, without letting any other task run."""
        assert self.plain.send(data) == len(data)

    def close(self) -> None:
        """Hang up without a word, without letting any other task run."""
        self.plain.close()

    async def disconnect(self) -> None:
        """As a well-behaved client does."""
        async with self._send_lock:
            await self._stream.send_all(request(DISC, 0, 0, 0))
        await self.gone.wait()


@contextlib.asynccontextmanager
async def clients(process: Process, *families: str) -> AsyncIterator[list[Client]]:
    """Connected clients whose replies are being received."""
    async with trio.open_nursery() as nursery:
        found = [Client(process, family) for family in families]
        for client in found:
            await nursery.start(client.receive)
        try:
            yield found
        finally:
            nursery.cancel_scope.cancel()
            for client in found:
                client.close()


class FaultyFile(RealFile):
    """A file whose writes and syncs fail when its storage says so."""

    storage: FaultyStorage

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self.storage.write_error:
            raise OSError(self.storage.write_error, os.strerror(self.storage.write_error))
        super().write(offset, buffers)

    def sync(self) -> None:
        self.storage.syncs += 1
        if self.storage.sync_error:
            raise OSError(self.storage.sync_error, os.strerror(self.storage.sync_error))
        super().sync()


class FaultyStorage(RealStorage):
    """The journal's directory, failing on demand."""

    write_error = 0
    sync_error = 0
    syncs = 0

    def open(self, name: str, mode: Mode) -> RealFile:
        if mode == "create" and self.write_error and not name.endswith(TEMPORARY):
            raise OSError(self.write_error, os.strerror(self.write_error))
        plain = super().open(name, mode)
        file = FaultyFile(os.dup(plain.fileno()))
        plain.close()
        file.storage = self
        return file


class Applier:
    """The curator's stand-in: really copies what is durable to the backing.

    ``history``: the disk's content after each seq that it applied, for refs (small disks only).
    """

    def __init__(self, process: Process, *, keep_history: bool = False) -> None:
        self._process = process
        self._frontier = process.recorder.frontier
        self._follower = RedoFollower(process.storage, process.config.id_bytes, self._frontier)
        self._rollbacks = Rollbacks()
        self._keep = keep_history
        self.history: dict[int, bytes] = {}
        self.size = process.recorder.size
        if keep_history:
            self.history[self._frontier.applied] = self._content()

    def _content(self) -> bytes:
        return os.pread(self._process.backing, self.size, 0)

    def step(self, upto: int | None = None) -> int:
        """Apply everything durable, or up to a seq; how far it is now."""
        frontier = self._frontier
        applied = frontier.applied
        goal = min(upto or frontier.durable, frontier.durable)
        if goal <= applied:
            return applied
        tables = list(self._follower.tables(1, frontier.durable))
        for _, table in tables:
            self._rollbacks.advance(table)
        for info, table in tables:
            valid = self._rollbacks.valid(table)
            for row in np.flatnonzero(valid).tolist():
                seq = table.first_seq + row
                if applied < seq <= goal:
                    self._apply(info, table, row, seq)
        os.fdatasync(self._process.backing)
        frontier.applied = goal
        return goal

    def _apply(self, info: Any, table: Any, row: int, seq: int) -> None:
        entry = table.rows[row]
        kind, start, count = int(entry["kind"]), int(entry["block"]), int(entry["nblocks"])
        length = min(count * BLOCK, self.size - start * BLOCK)
        data = None
        if kind == Kind.WRITE:
            data = read_blocks(self._follower.file(info), table, row, 0, count, name=info.name)
        elif kind == Kind.ZERO:
            data = bytes(length)
        elif kind == Kind.REF:
            data = self.history[int(entry["arg"])][start * BLOCK :]
        if data is not None:
            os.pwrite(self._process.backing, data[:length], start * BLOCK)
        if self._keep:
            self.history[seq] = self._content()

    def close(self) -> None:
        self._follower.close()
