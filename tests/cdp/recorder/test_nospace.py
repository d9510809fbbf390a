"""Without space for the journal writes wait; nobody is told so, and nothing comes out of order."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from cdp.config import DiskConfig
from cdp.recorder import changes, nospace, rollback
from cdp.recorder.connection import Connection
from cdp.recorder.process import Process
from cdp.rpc import RpcClient
from journal.errors import CdpError, Conflict
from journal.format import BLOCK
from tests.cdp.recorder.support import (
    DISC,
    MIB,
    WRITE,
    Client,
    FaultyStorage,
    NbdFailure,
    clients,
    new_disk,
    recorder,
    request,
    wait_until,
)

SIZE = 8 * MIB
OLD, NEW, LATE = b"o" * BLOCK, b"n" * BLOCK, b"l" * BLOCK
WAITS = "writes wait: no space"
pytestmark = pytest.mark.expect_log(WAITS, required=False)
CODES = pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])


class World:
    """A recorder whose storage refuses space while ``full`` is set."""

    def __init__(self, process: Process, storage: FaultyStorage) -> None:
        self.process, self.storage = process, storage
        self.recorder = process.recorder

    @property
    def last_seq(self) -> int:
        return self.recorder.writer.last_seq

    def fill(self, code: int = errno.ENOSPC) -> None:
        self.storage.write_error = code

    def free(self) -> None:
        self.storage.write_error = 0

    async def refused(self) -> None:
        """Until one more append was refused."""
        before = self.recorder.frontier.redo_refused
        await wait_until(lambda: self.recorder.frontier.redo_refused > before)

    async def tried_again(self) -> None:
        """Until appends have been refused that began after this call."""
        await self.refused()
        await self.refused()


@contextlib.asynccontextmanager
async def serving(config: DiskConfig, directory: Path) -> AsyncIterator[World]:
    """A recorder that looks at what waits every few milliseconds."""
    storage = FaultyStorage(Path(config.journal))
    async with recorder(directory, config, storage=storage) as process:
        yield World(process, storage)


@pytest.fixture
def config(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> DiskConfig:
    monkeypatch.setattr(nospace, "RETRY_NS", 5_000_000)
    monkeypatch.setattr(rollback, "RETRY_SECONDS", 0.005)
    return new_disk(short_tmp, SIZE, sync_age_seconds=0.04)


@pytest.fixture
async def world(short_tmp: Path, config: DiskConfig) -> AsyncIterator[World]:
    async with serving(config, short_tmp) as world:
        yield world
    assert world.process.exit_code == 0


class Waiting:
    """A request that a client has sent, and its end."""

    def __init__(self, nursery: trio.Nursery, call: Callable[..., Any], *values: Any) -> None:
        self.done = trio.Event()
        nursery.start_soon(self._run, call, values)

    async def _run(self, call: Callable[..., Any], values: tuple[Any, ...]) -> None:
        await call(*values)
        self.done.set()


def write(data: bytes, *, offset: int = 0) -> bytes:
    return request(WRITE, offset, len(data), 1, data)


# Each changes the first two blocks in its own way; what they hold afterwards.
CHANGES: dict[str, tuple[Callable[[Client], Any], bytes]] = {
    "a block": (lambda client: client.write(0, NEW), NEW + OLD),
    "with FUA": (lambda client: client.write(0, NEW, 1), NEW + OLD),
    "many blocks": (lambda client: client.write(0, NEW * 64), NEW + NEW),
    "a part": (lambda client: client.write(100, b"x" * 3996), OLD[:100] + b"x" * 3996 + OLD),
    "zeroes": (lambda client: client.zeroes(0, 8192), bytes(8192)),
    "zeroes, ragged": (lambda client: client.zeroes(100, 8000), OLD[:100] + bytes(8000) + OLD[:92]),
    "trim": (lambda client: client.trim(0, 4096), bytes(4096) + OLD),
}


@CODES
@pytest.mark.parametrize("what", CHANGES)
async def test_a_change_waits_for_space(world: World, what: str, code: int) -> None:
    change, expected = CHANGES[what]
    async with clients(world.process, "unix", "unix") as (writer, reader):
        await writer.write(0, OLD + OLD)
        world.fill(code)
        async with trio.open_nursery() as nursery:
            waiting = Waiting(nursery, change, writer)
            await world.tried_again()
            assert not waiting.done.is_set()
            assert await reader.read(0, 8192) == OLD + OLD
            await reader.flush()
            assert world.last_seq == 1
            world.free()
        assert await reader.read(0, 8192) == expected
        assert world.last_seq == 2
        assert world.recorder.statistics.failed == 0
        assert writer.connection.in_flight == 0


@pytest.mark.expect_log(WAITS)
async def test_it_is_said(world: World) -> None:
    process = world.process
    async with clients(process, "unix") as (client,):
        await client.write(0, OLD)
        status = process.status()
        assert (status["trouble"], status["held_seconds"]) == (None, 0.0)
        world.fill()
        async with trio.open_nursery() as nursery:
            Waiting(nursery, client.write, 0, NEW)
            await world.refused()
            first = process.status()
            await world.tried_again()
            status = process.status()
            assert "no space to append" in status["trouble"]
            assert "free some on the journal's file system" in status["trouble"]
            assert status["held_seconds"] > first["held_seconds"]
            assert status["throttled"]
            assert status["served"]
            world.free()
        await wait_until(lambda: not process.status()["throttled"])
        status = process.status()
        assert (status["trouble"], status["held_seconds"]) == (None, 0.0)
        assert status["throttled_seconds"] > 0
        # A second time it is another one.
        world.fill()
        async with trio.open_nursery() as nursery:
            Waiting(nursery, client.zeroes, 0, MIB)
            await world.refused()
            assert process.status()["held_seconds"] <= first["held_seconds"] + 5
            world.free()


async def test_a_new_segment_waits_too(world: World) -> None:
    data = os.urandom(MIB // 2)
    async with clients(world.process, "unix") as (client,):
        await client.write(0, data)
        world.fill(errno.EDQUOT)
        async with trio.open_nursery() as nursery:
            Waiting(nursery, client.write, MIB, data)
            await world.tried_again()
            assert "begin segment" in world.process.status()["trouble"]
            world.free()
        assert await client.read(MIB, MIB // 2) == data


async def test_the_order_of_changes_stays(world: World, seed: int) -> None:
    """Of one connection, with every size that is executed in another way; and over others."""
    rng = random.Random(seed)
    content = bytearray(SIZE)
    async with clients(world.process, "unix", "tcp") as (client, other):
        for turn in range(4):
            world.fill()
            stream = []
            for _ in range(60):
                size = rng.choice((512, 4096, 4096, 8192, 100_000, 3 * MIB))
                offset = rng.randrange((SIZE - size) // 512) * 512
                if rng.random() < 0.5:
                    offset &= -4096
                data = rng.randbytes(size)
                content[offset : offset + size] = data
                stream.append(write(data, offset=offset))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client._stream.send_all, b"".join(stream))
                await world.tried_again()
                assert await other.read(0, 4096) is not None
                world.free()
            await other.flush()
            if turn % 2:
                await client.write(0, bytes(content[:4096]))
        await wait_until(lambda: not client.connection.readable() and not client.connection.end)
        await client.flush()
        assert await client.read(0, SIZE) == content
        assert world.recorder.statistics.failed == 0


async def test_nothing_comes_before_what_was_widened(world: World) -> None:
    """! The edges of what waits hold what was there before: another's change must come after it."""
    async with clients(world.process, "unix", "unix") as (first, second):
        await first.write(0, OLD)
        world.fill()
        async with trio.open_nursery() as nursery:
            Waiting(nursery, first.write, 0, b"a" * 512)
            await world.refused()
            Waiting(nursery, second.write, 512, b"b" * 512)
            await world.tried_again()
            world.free()
        assert await first.read(0, BLOCK) == b"a" * 512 + b"b" * 512 + OLD[1024:]


async def test_edges_that_are_in_what_waits(world: World) -> None:
    """A change that needs what a large one wrote just before, for which there is no space."""
    async with clients(world.process, "unix", "unix") as (client, other):
        world.fill()
        large = os.urandom(MIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                client._stream.send_all, write(large) + write(b"x" * 100, offset=MIB - 100 - BLOCK)
            )
            await world.tried_again()
            assert await other.read(0, MIB) == bytes(MIB)
            world.free()
        await wait_until(lambda: world.last_seq == 2)
        expected = bytearray(large)
        expected[MIB - 100 - BLOCK : MIB - BLOCK] = b"x" * 100
        assert await other.read(0, MIB) == expected


async def test_reads_go_on_up_to_the_next_change(world: World) -> None:
    async with clients(world.process, "unix") as (client,):
        await client.write(0, OLD)
        world.fill()
        async with trio.open_nursery() as nursery:
            Waiting(nursery, client.zeroes, 0, BLOCK)
            await world.refused()
            with trio.fail_after(5):
                assert await client.read(0, BLOCK) == OLD
                await client.flush()  # what waits was not acknowledged
            later = Waiting(nursery, client.write, BLOCK, NEW)
            await world.tried_again()
            assert not later.done.is_set()
            world.free()
        assert await client.read(0, 2 * BLOCK) == bytes(BLOCK) + NEW


@pytest.mark.parametrize("family", ["unix", "tcp"])
@pytest.mark.parametrize(
    "left",
    [write(NEW), write(b"n" * 100, offset=50), write(NEW * 4)],
    ids=["a block", "a part", "many blocks"],
)
async def test_a_hang_up_takes_what_waits_with_it(world: World, family: str, left: bytes) -> None:
    async with clients(world.process, family, "unix") as (client, other):
        await client.write(0, OLD)
        world.fill()
        client.send_nowait(left)
        await world.tried_again()
        client.close()
        await wait_until(lambda: client.connection.closed)
        await wait_until(lambda: world.process.status()["held_seconds"] == 0)
        assert world.process.status()["trouble"] is None
        world.free()
        await other.write(BLOCK, LATE)
        assert await other.read(0, 2 * BLOCK) == OLD + LATE
        assert world.last_seq == 2
        assert world.recorder.statistics.discarded_requests == 1


@pytest.mark.parametrize("rule", [True, False], ids=["rule", "without"])
async def test_whether_it_hung_up_is_asked_before_it_is_executed(
    world: World, rule: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """! It has hung up and there is space, both since the recorder ran last."""
    if not rule:
        monkeypatch.setattr(Connection, "hung_up", lambda _self: False)
    async with clients(world.process, "unix", "unix") as (client, other):
        await client.write(0, OLD)
        world.fill()
        client.send_nowait(write(NEW * 2))
        await world.tried_again()
        no_space = world.recorder.no_space
        client.close()
        world.free()
        no_space._again = 0
        no_space.try_again(world.process.loop._gone)  # before the loop hears of the hang-up
        assert await other.read(0, BLOCK) == (OLD if rule else NEW)


async def test_a_disconnect_right_behind_is_waited_for(world: World) -> None:
    """What a client sent before it took its leave is executed, also when it has gone meanwhile."""
    async with clients(world.process, "unix", "unix") as (client, other):
        world.fill()
        client.send_nowait(write(NEW * 2) + request(DISC, 0, 0, 0))
        await world.tried_again()
        client.close()
        await world.tried_again()
        assert not client.connection.closed
        world.free()
        await wait_until(lambda: client.connection.closed)
        assert await other.read(0, BLOCK) == NEW


async def test_a_new_connection_comes_after_what_waits(world: World) -> None:
    """! The client has given up the old one without closing it, and sends its write again."""
    async with clients(world.process, "unix") as (old,):
        await old.write(0, OLD)
        world.fill()
        old.send_nowait(write(OLD * 2))
        await world.refused()
        new = Client(world.process, "unix", leftover=write(NEW * 2))
        async with trio.open_nursery() as nursery:
            await nursery.start(new.receive)
            await world.tried_again()
            assert old.connection.held == 1
            assert not old.connection.stalled
            assert not new.connection.admitted
            world.free()
            assert await new.read(0, 2 * BLOCK) == NEW * 2
            nursery.cancel_scope.cancel()
        assert world.last_seq == 3
        new.close()


async def test_parked_changes_wait_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []
    submit = world.recorder.readers.submit
    monkeypatch.setattr(changes, "fetch", lambda *_: False)
    monkeypatch.setattr(world.recorder.readers, "submit", jobs.append)
    async with clients(world.process, "unix", "unix") as (first, second):
        async with trio.open_nursery() as nursery:
            Waiting(nursery, first.write, 100, b"a" * 200)
            await wait_until(lambda: jobs)
            Waiting(nursery, second.write, 200, b"b" * 200)
            await wait_until(lambda: second.connection.parked)
            monkeypatch.undo()
            world.fill()
            submit(jobs[0])
            await world.tried_again()
            assert (first.connection.held, second.connection.parked) == (1, 1)
            world.free()
        expected = bytes(100) + b"a" * 100 + b"b" * 200 + bytes(112)
        assert await first.read(0, 512) == expected


async def test_the_curator_comes_first(world: World) -> None:
    """While it says that there is no room, nothing is tried: it may need what little there is."""
    frontier = world.recorder.frontier
    async with clients(world.process, "unix") as (client,):
        await client.write(0, OLD)
        world.fill()
        async with trio.open_nursery() as nursery:
            waiting = Waiting(nursery, client.write, 0, NEW * 2)
            await world.refused()
            frontier.redo_bytes_max = world.recorder.count_bytes()
            await wait_until(lambda: world.recorder.advance() or world.recorder.tail.held)
            refused = frontier.redo_refused
            world.free()
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                await trio.sleep(0.01)
                assert not waiting.done.is_set()
            assert frontier.redo_refused == refused
            assert world.process.status()["held_seconds"] > 0.4
            frontier.redo_bytes_max += MIB
        assert await client.read(0, BLOCK) == NEW


async def test_writes_that_wait_for_room_are_held_as_well(world: World) -> None:
    frontier = world.recorder.frontier
    async with clients(world.process, "unix") as (client,):
        await client.write(0, OLD)
        frontier.redo_bytes_max = world.recorder.count_bytes()
        world.recorder.advance()
        async with trio.open_nursery() as nursery:
            Waiting(nursery, client.write, 0, NEW)
            await wait_until(lambda: world.process.status()["held_seconds"] > 0)
            assert world.process.status()["trouble"] is None  # the curator says what it is
            frontier.redo_bytes_max += MIB
        await wait_until(lambda: world.process.status()["held_seconds"] == 0)


async def test_administrators_are_told(world: World, short_tmp: Path) -> None:
    """In one line; whoever waits is not cut off for something that finds no space, either."""
    async with clients(world.process, "unix") as (client,):
        await client.write(0, OLD)
        async with await RpcClient.connect(world.process.child.socket) as rpc:
            world.fill()
            before = world.recorder.frontier.redo_refused
            with pytest.raises(CdpError, match=r"^no space to append .*: free some"):
                await rpc.call("bookmark", {"label": "full"})
            assert world.recorder.frontier.redo_refused == before + 1  # the curator may make some
            async with trio.open_nursery() as nursery:
                Waiting(nursery, client.write, 0, NEW)
                await world.refused()
                prepare = {"id": "r", "to_seq": 0, "tip_seq": 1, "disconnect": True}
                for method, params in (
                    ("rollback_prepare", prepare),
                    ("resize", {"size": 2 * SIZE}),
                    ("gap_begin", {}),
                ):
                    says = "^writes to disk0 wait: no space .* free some"
                    with pytest.raises(Conflict, match=says):
                        await rpc.call(method, params)
                assert not client.connection.closed
                world.free()
            await rpc.call("bookmark", {"label": "again"})


@pytest.mark.parametrize("end", ["abort", "commit", "stop"])
async def test_a_rollback_is_closed_when_there_is_space(
    world: World, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = world.process
    async with clients(process, "unix") as (client,):
        await client.write(0, OLD)
        await client.disconnect()
    append_refs = world.recorder.append_refs

    def full_meanwhile(entries: list[int]) -> int:
        if end == "abort":
            world.fill()
        return append_refs(entries)

    monkeypatch.setattr(world.recorder, "append_refs", full_meanwhile)
    plan = os.memfd_create("plan", os.MFD_CLOEXEC)
    os.write(plan, struct.pack("=QQQ", 0, 1, 0))
    async with await RpcClient.connect(process.child.socket) as rpc:
        prepare = {"id": "r", "to_seq": 0, "tip_seq": 1}
        if end == "abort":
            with pytest.raises(CdpError, match=r"^no space to append .*: free some"):
                await rpc.call("rollback_prepare", prepare, [plan])
        else:
            await rpc.call("rollback_prepare", prepare, [plan])
            world.fill()
        os.close(plan)
        async with trio.open_nursery() as nursery:
            if end == "stop":
                with pytest.raises(CdpError, match="no space"):
                    nursery.start_soon(stop_soon, world)
                    await rpc.call("rollback_abort", {"id": "r"})
                return
            waiting = Waiting(nursery, rpc.call, f"rollback_{end}", {"id": "r"})
            await world.tried_again()
            says = "it is being rolled back, and that waits: no space"
            assert says in (process.not_served() or "")
            assert not waiting.done.is_set()
            world.free()
    if end == "abort":
        async with clients(process, "unix") as (client,):
            assert await client.read(0, BLOCK) == OLD
    else:
        assert process.not_served() == "it is being rolled back: served again when that is applied"


async def stop_soon(world: World) -> None:
    await world.refused()
    world.process.stop()


async def test_a_stop_does_not_wait_for_space(short_tmp: Path, config: DiskConfig) -> None:
    async with serving(config, short_tmp) as world:
        process = world.process
        async with clients(process, "unix", "unix", "unix") as (first, second, third):
            await first.write(0, OLD)
            world.fill()
            for number, each in enumerate((first, second)):
                each.send_nowait(write(NEW * (2 - number)))
            third.send_nowait(write(NEW[:100], offset=BLOCK + 10))
            await world.tried_again()
            with trio.fail_after(2):
                process.stop()
                await process.ended.wait()
            assert process.exit_code == 0
            for each in (first, second, third):
                await each.gone.wait()
    async with recorder(short_tmp, config) as process:
        async with clients(process, "unix") as (client,):
            assert await client.read(0, 2 * BLOCK) == OLD + bytes(BLOCK)


@pytest.mark.expect_log("CRITICAL .*could not append")
async def test_what_waits_is_answered_when_the_journal_is_poisoned(
    short_tmp: Path, config: DiskConfig
) -> None:
    async with serving(config, short_tmp) as world:
        async with clients(world.process, "unix", "unix") as (first, second):
            world.fill()
            failed = 0

            async def fails(client: Client, data: bytes) -> None:
                nonlocal failed
                with pytest.raises(NbdFailure) as caught:
                    await client.write(0, data)
                assert caught.value.code == 5
                failed += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fails, first, NEW * 2)
                nursery.start_soon(fails, second, NEW)
                await world.tried_again()
                world.storage.write_error = errno.EIO
            assert failed == 2
    assert world.process.exit_code == 1
