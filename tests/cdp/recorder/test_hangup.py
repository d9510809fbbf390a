"""A client that hangs up may have sent the same requests again: late old ones must not be executed.

Seen with unix and TCP sockets: what lies in a socket is read for as long as it lasts, and only then
comes the end of the stream. Meanwhile the client has reconnected, sent its write again, and written
something newer to the same place. Each rule is tested twice, once with the rule taken out: then the
old write must win, or the test would prove nothing.

Everything a client does here happens without letting the recorder run in between, so what it finds
is exactly what the test has put there.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from cdp.recorder import changes, loop
from cdp.recorder.connection import Connection
from cdp.recorder.process import Process
from tests.cdp.recorder.support import (
    DISC,
    MIB,
    WRITE,
    Client,
    clients,
    new_disk,
    recorder,
    request,
    wait_until,
)

OLD, NEW = b"o" * 4096, b"n" * 4096
FAMILIES = pytest.mark.parametrize("family", ["unix", "tcp"])
RULE = pytest.mark.parametrize("rule", [True, False], ids=["rule", "without"])


@pytest.fixture
async def process(short_tmp: Path) -> AsyncIterator[Process]:
    async with recorder(short_tmp, new_disk(short_tmp, 8 * MIB)) as process:
        yield process


def write(data: bytes, *, offset: int = 0) -> bytes:
    return request(WRITE, offset, len(data), 1, data)


async def settle(process: Process) -> None:
    """Until the recorder has found everything that lies in its sockets."""
    for _ in range(50):
        await trio.sleep(0.001)


async def arrived(connection: Connection, count: int) -> None:
    """Until so many bytes lie in the socket, without letting the recorder run."""
    end = time.monotonic() + 2
    while connection.readable() < count:
        assert time.monotonic() < end


@FAMILIES
@RULE
async def test_what_a_client_left_is_not_executed(
    process: Process, family: str, rule: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rule:
        monkeypatch.setattr(Connection, "hung_up", lambda _self: False)
    async with clients(process, family, family) as (first, second):
        await first.write(4096, OLD)
        await second.write(4096, OLD)
        # The recorder will find the second one's write first; the old one lies in the other socket
        # of a client that has hung up meanwhile.
        second.send_nowait(write(NEW))
        first.send_nowait(write(OLD))
        await arrived(first.connection, 4124)
        first.close()
        await settle(process)
        assert await second.read(0, 4096) == (NEW if rule else OLD)
        assert first.connection.closed
        if rule:
            assert process.recorder.statistics.discarded_requests == 1


@FAMILIES
async def test_a_stream_that_ends_in_a_disconnect_is_executed(
    process: Process, family: str
) -> None:
    async with clients(process, family, family) as (first, second):
        await first.write(4096, OLD)
        first.send_nowait(write(NEW) + write(OLD, offset=8192) + request(DISC, 0, 0, 0))
        await arrived(first.connection, 2 * 4124 + 28)
        first.close()
        await wait_until(lambda: first.connection.closed)
        assert await second.read(0, 12288) == NEW + OLD + OLD
        assert process.recorder.statistics.discarded_connections == 0


@FAMILIES
async def test_half_a_request_before_the_end_is_none(process: Process, family: str) -> None:
    async with clients(process, family, family) as (first, second):
        await first.write(4096, OLD)
        first.send_nowait(write(NEW)[:2000])
        first.close()
        await settle(process)
        assert await second.read(0, 8192) == bytes(4096) + OLD
        assert first.connection.closed


@FAMILIES
@RULE
async def test_older_connections_come_before_a_new_one(
    process: Process, family: str, rule: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rule:
        attach = loop.Loop.attach

        def without(self: loop.Loop, connection: Connection) -> None:
            attach(self, connection)
            connection.behind.clear()

        monkeypatch.setattr(loop.Loop, "attach", without)
    async with clients(process, family) as (old,):
        await old.write(4096, OLD)
        old.send_nowait(write(OLD))
        await arrived(old.connection, 4124)
        # The old connection is alive, as far as anybody can tell; the client has given it up.
        new = Client(process, family, leftover=write(NEW))
        async with trio.open_nursery() as nursery:
            await nursery.start(new.receive)
            assert await new.read(0, 4096) == (NEW if rule else OLD)
            nursery.cancel_scope.cancel()
        new.close()


@FAMILIES
async def test_a_new_connection_does_not_wait_for_one_that_says_nothing(
    process: Process, family: str
) -> None:
    async with clients(process, family) as (old,):
        await old.write(0, OLD)
        old.send_nowait(write(NEW)[:1000])  # and never the rest
        async with clients(process, family) as (new,):
            with trio.fail_after(2):
                assert await new.read(0, 4096) == OLD


class Gate:
    """Lets reads of old content wait, as for a slow disk, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: list[Any] = []
        monkeypatch.setattr(changes, "fetch", lambda *_: False)

    def install(self, process: Process) -> None:
        readers = process.recorder.readers
        self._submit = readers.submit
        readers.submit = self.jobs.append  # type: ignore[method-assign, assignment]

    def open(self) -> None:
        for job in self.jobs:
            self._submit(job)
        self.jobs.clear()


@FAMILIES
@RULE
async def test_a_parked_request_is_looked_at_again(
    process: Process, family: str, rule: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.install(process)
    async with clients(process, family, family) as (first, second):
        # Ragged at both ends: parked, with blocks 0 and 2 locked. Block 1 is free for others.
        first.send_nowait(write(b"o" * 8000, offset=100))
        await wait_until(lambda: gate.jobs)
        first.close()
        if not rule:
            monkeypatch.setattr(Connection, "hung_up", lambda _self: False)
            monkeypatch.setattr(process.loop, "_close", lambda _connection: None)
            process.loop._hot.clear()
        await second.write(4096, NEW)
        gate.open()
        await settle(process)
        assert await second.read(4096, 4096) == (NEW if rule else b"o" * 4004 + bytes(92))[:4096]
    monkeypatch.undo()


@FAMILIES
async def test_a_new_connection_waits_for_a_parked_request(
    process: Process, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.install(process)
    async with clients(process, family) as (old,):
        old.send_nowait(write(b"o" * 8000, offset=100))
        await wait_until(lambda: gate.jobs)
        new = Client(process, family, leftover=write(NEW, offset=4096))
        await settle(process)
        assert not new.connection.admitted
        gate.open()
        async with trio.open_nursery() as nursery:
            await nursery.start(new.receive)
            assert await new.read(4096, 4096) == NEW
            nursery.cancel_scope.cancel()
        new.close()


@FAMILIES
async def test_a_stalled_request_of_a_client_that_hangs_up_is_discarded(
    process: Process, family: str
) -> None:
    recorder = process.recorder
    async with clients(process, family, family) as (first, second):
        await second.write(0, OLD)
        recorder.tail.set_bound(8192)  # full with that one write
        first.send_nowait(write(NEW))
        await wait_until(lambda: first.connection.stalled)
        first.close()
        await settle(process)
        assert first.connection.closed
        assert recorder.writer.last_seq == 1
        assert recorder.statistics.discarded_requests == 1
        recorder.tail.set_bound(1 << 30)
        assert await second.read(0, 4096) == OLD


async def test_replies_nobody_takes_are_no_reason_not_to_execute(process: Process) -> None:
    """A disconnect right behind the last request; the client is gone before it is answered."""
    async with clients(process, "unix", "unix") as (first, second):
        await first.write(0, OLD)
        first.send_nowait(b"".join(write(NEW, offset=n * 4096) for n in range(8)))
        first.send_nowait(request(DISC, 0, 0, 0))
        first.close()
        await wait_until(lambda: first.connection.closed)
        assert await second.read(0, 32768) == NEW * 8
