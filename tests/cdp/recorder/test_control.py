"""The recorder's calls, over its socket."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from cdp.recorder import rollback
from cdp.recorder.process import Process
from cdp.rpc import RpcClient
from journal.errors import Busy, CdpError, Conflict, InvalidInput
from journal.follower import RedoFollower
from journal.format import Kind
from tests.cdp.recorder.support import (
    MIB,
    WRITE,
    Applier,
    clients,
    negotiated,
    new_disk,
    recorder,
    request,
)

SIZE = 1 * MIB
Logged = Callable[..., None]


@contextlib.asynccontextmanager
async def called(directory: Path, **values: Any) -> AsyncIterator[tuple[Process, RpcClient]]:
    config = new_disk(directory, SIZE, **values)
    async with recorder(directory, config) as process:
        async with await RpcClient.connect(process.child.socket) as client:
            yield process, client


def jsonable(**values: Any) -> dict[str, Any]:
    agreed = dataclasses.asdict(negotiated(SIZE, **values))
    agreed["meta_contexts"] = {str(key): name for key, name in agreed["meta_contexts"].items()}
    return agreed


def plan(*triples: tuple[int, int, int]) -> int:
    fd = os.memfd_create("plan", os.MFD_CLOEXEC)
    os.write(fd, b"".join(struct.pack("=QQQ", *triple) for triple in triples))
    return fd


async def prepare(
    client: RpcClient, triples: list[tuple[int, int, int]], **params: Any
) -> dict[str, Any]:
    fd = plan(*triples)
    try:
        return (await client.call("rollback_prepare", {"id": "r1", **params}, [fd])).result
    finally:
        os.close(fd)


def kinds(process: Process) -> list[str]:
    """Kinds of all durable records, in order."""
    follower = RedoFollower(process.storage, process.config.id_bytes, process.recorder.frontier)
    found: list[str] = []
    for _, table in follower.tables(1, process.recorder.frontier.durable):
        found += [Kind(kind).name for kind in table.rows["kind"].tolist()]
    follower.close()
    return found


async def test_hello_names_the_process_and_hands_the_backing_back(short_tmp: Path) -> None:
    async with called(short_tmp) as (process, client):
        reply = await client.call("hello")
        assert reply.result["role"] == "recorder"
        assert reply.result["pid"] == os.getpid()
        assert reply.result["uuid"] == process.config.uuid
        assert reply.result["protocol"] == 1
        assert reply.result["state"] == "ready"
        (fd,) = reply.fds
        assert os.path.samestat(os.fstat(fd), os.stat(process.config.backing))
        os.close(fd)


async def test_attach_serves_a_negotiated_socket(short_tmp: Path) -> None:
    async with called(short_tmp) as (_, client):
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                export = (await client.call("export")).result
                assert export["size"] == SIZE
                assert export["served"]
                leftover = request(WRITE, 0, 4, 77, b"left")
                params = {
                    "negotiated": jsonable(),
                    "leftover": base64.b64encode(leftover).decode(),
                    "peer": "a test",
                }
                await client.call("attach", params, [theirs.fileno()])
            ours.setblocking(False)
            with trio.fail_after(2):
                await trio.lowlevel.wait_readable(ours)
            assert ours.recv(100)[8:] == struct.pack(">Q", 77)
            status = (await client.call("status")).result
            assert status["connections"] == 1
            assert status["writes"] == 1
            assert status["written_bytes"] == 4
            assert (await client.call("disconnect")).result == {"connections": 1}
            await trio.lowlevel.wait_readable(ours)
            assert ours.recv(100) == b""


async def test_attach_without_sense(short_tmp: Path) -> None:
    async with called(short_tmp) as (_, client):
        with pytest.raises(InvalidInput):
            await client.call("attach", {"negotiated": jsonable()})
        ours, theirs = socket.socketpair()
        with ours, theirs:
            with pytest.raises(InvalidInput):
                await client.call("attach", {"negotiated": {}}, [theirs.fileno()])


async def test_status_is_complete_and_plain(short_tmp: Path) -> None:
    async with called(short_tmp) as (process, client):
        async with clients(process, "unix") as (nbd,):
            await nbd.write(0, bytes(4096))
            await nbd.read(0, 4096)
            await nbd.flush()
            await nbd.trim(0, 4096)
            await nbd.zeroes(0, 4096)
            status = (await client.call("status")).result
        wanted = {
            "last_seq": 3, "durable": 1, "applied": 0, "connections": 1, "reads": 1, "writes": 1,
            "read_bytes": 4096, "written_bytes": 4096, "flushes": 1, "trims": 1, "zeroes": 1,
            "poisoned": False, "served": True, "throttled_seconds": 0.0,
            "protocol_errors": {"refused": 0},
        }  # fmt: skip
        assert {key: status[key] for key in wanted} == wanted
        assert status["lag_bytes"] > 0
        assert 0 <= status["lag_seconds"] < 5
        assert status["tail_bytes"] > 0
        for name in ("fsync_buckets", "write_buckets"):
            buckets = status[name]["buckets"]
            assert [bound for bound, _ in buckets] == sorted(bound for bound, _ in buckets)
            assert buckets[-1][1] <= status[name]["count"]
        assert status["write_buckets"]["count"] == 3
        assert status["fsync_buckets"]["count"] >= 1


async def test_sync_promises_durability_and_that_time_goes_on(short_tmp: Path) -> None:
    async with called(short_tmp) as (process, client):
        async with clients(process, "unix") as (nbd,):
            await nbd.write(0, bytes(4096))
            result = (await client.call("sync")).result
            assert result["durable"] == 1 == process.recorder.frontier.durable
            await nbd.write(0, bytes(4096))
            assert process.recorder.last_stamp > result["stamp"]
        process.recorder.ceiling = 1
        with pytest.raises(CdpError, match="ceiling"):
            await client.call("sync")


async def test_bookmarks_are_durable_when_answered(short_tmp: Path) -> None:
    async with called(short_tmp) as (process, client):
        params = {"label": "before", "requested": "application", "consistency": "crash"}
        result = (await client.call("bookmark", params)).result
        assert result["seq"] == 1 == process.recorder.frontier.durable
        assert kinds(process) == ["BOOKMARK"]
        with pytest.raises(InvalidInput):
            await client.call("bookmark", {})


async def test_set_and_resize(short_tmp: Path) -> None:
    async with called(short_tmp) as (process, client):
        await client.call("set", {"tail_bytes": 123 << 20, "sync_age_seconds": 0.5})
        assert process.recorder.tail.bound == 123 << 20
        assert process.sync_age == 0.5
        async with clients(process, "unix") as (nbd,):
            os.truncate(process.config.backing, 2 * SIZE)
            await client.call("resize", {"size": 2 * SIZE})
            await nbd.write(2 * SIZE - 4096, b"x" * 4096)
            assert await nbd.read(2 * SIZE - 8192, 8192) == bytes(4096) + b"x" * 4096
            with pytest.raises(InvalidInput):
                await client.call("resize", {"size": 1000})
        config = process.config
    async with recorder(short_tmp, config) as process:  # an old configuration
        assert process.recorder.size == 2 * SIZE


# --------------------------------------------------------------------------------------- rollback
async def written(process: Process, *contents: bytes) -> None:
    async with clients(process, "unix") as (nbd,):
        for content in contents:
            await nbd.write(0, content * 4096)
            await nbd.write(8192, content * 8192)
        await nbd.flush()
        await nbd.disconnect()


async def test_rollback(short_tmp: Path) -> None:
    async with called(short_tmp) as (process, client):
        await written(process, b"a", b"b", b"c")
        applier = Applier(process, keep_history=True)
        applier.step()
        result = await prepare(client, [(0, 1, 2), (2, 2, 2)], to_seq=2, tip_seq=6)
        assert result == {"begin_seq": 7, "last_seq": 9}
        assert process.recorder.frontier.durable == 9
        waiting = (await client.call("hello")).result["open_rollback"]
        assert waiting == {"id": "r1", "begin_seq": 7}
        assert not (await client.call("status")).result["served"]
        with pytest.raises(Busy, match="rolled back"):
            await client.call("attach", {"negotiated": jsonable()})
        assert (await client.call("rollback_commit", {"id": "r1"})).result == {"commit_seq": 10}
        # Asked again, after an answer that was lost.
        assert (await client.call("rollback_commit", {"id": "r1"})).result == {"commit_seq": 10}
        assert "open_rollback" not in (await client.call("hello")).result
        assert process.not_served() is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.call, "rollback_wait", {"id": "r1"})
            await trio.sleep(0.05)
            assert nursery.child_tasks
            applier.step()
        assert process.not_served() is None
        async with clients(process, "unix") as (nbd,):
            expected = b"a" * 4096 + bytes(4096) + b"a" * 8192
            assert await nbd.read(0, 16384) == expected
        assert kinds(process)[6:] == ["ROLLBACK_BEGIN", "REF", "REF", "ROLLBACK_COMMIT"]
        applier.close()


async def test_what_was_written_since_the_plan_goes_back_too(short_tmp: Path) -> None:
    async with called(short_tmp) as (process, client):
        await written(process, b"a", b"b")
        applier = Applier(process, keep_history=True)
        applier.step()
        async with clients(process, "unix") as (nbd,):
            await nbd.write(40960, b"z" * 8192)  # after the plan's tip
            await nbd.trim(0, 4096)
            with pytest.raises(Conflict, match="in use"):
                await prepare(client, [(0, 1, 2)], to_seq=2, tip_seq=4)
            await prepare(client, [(0, 1, 2), (2, 2, 2)], to_seq=2, tip_seq=4, disconnect=True)
            with trio.fail_after(2):
                await nbd.gone.wait()
        await client.call("rollback_commit", {"id": "r1"})
        applier.step()
        async with clients(process, "unix") as (nbd,):
            expected = b"a" * 4096 + bytes(4096) + b"a" * 8192 + bytes(SIZE - 16384)
            assert await nbd.read(0, SIZE) == expected
        # The mask of the trim is gone with it.
        assert not process.recorder.overlay.masks
        applier.close()


async def test_an_aborted_rollback_changes_nothing(short_tmp: Path) -> None:
    async with called(short_tmp) as (process, client):
        await written(process, b"a", b"b")
        applier = Applier(process, keep_history=True)
        await prepare(client, [(0, 1, 2)], to_seq=2, tip_seq=4)
        await client.call("rollback_abort", {"id": "r1"})
        with pytest.raises(Conflict):
            await client.call("rollback_commit", {"id": "r1"})
        assert process.not_served() is None
        applier.step()
        async with clients(process, "unix") as (nbd,):
            assert await nbd.read(0, 4096) == b"b" * 4096
        applier.close()


async def test_a_restart_waits_for_the_word_of_several_disks(
    short_tmp: Path, expect_log: Logged
) -> None:
    expect_log("waits for the end of a rollback")
    async with called(short_tmp) as (process, client):
        await written(process, b"a", b"b")
        applier = Applier(process, keep_history=True)
        applier.step()
        history = applier.history
        await prepare(client, [(0, 1, 2)], to_seq=2, tip_seq=4, disks=["disk0", "disk1"])
        config = process.config
        applier.close()
    async with recorder(short_tmp, config) as process:
        async with await RpcClient.connect(process.child.socket) as client:
            hello = await client.call("hello")
            assert hello.result["open_rollback"]["id"] == "r1"
            assert process.not_served() is not None
            await client.call("rollback_commit", {"id": "r1"})
            assert process.not_served() is not None
            applier = Applier(process, keep_history=True)
            applier.history |= history
            applier.step()
            assert process.not_served() is None
            async with clients(process, "unix") as (nbd,):
                assert await nbd.read(0, 4096) == b"a" * 4096
            applier.close()
            for fd in hello.fds:
                os.close(fd)


async def test_a_rollback_of_one_disk_is_aborted_by_a_restart(short_tmp: Path) -> None:
    async with called(short_tmp) as (process, client):
        await written(process, b"a", b"b")
        await prepare(client, [(0, 1, 2)], to_seq=2, tip_seq=4, disks=["disk0"])
        config = process.config
    async with recorder(short_tmp, config) as process:
        assert process.not_served() is None
        async with clients(process, "unix") as (nbd,):
            assert await nbd.read(0, 4096) == b"b" * 4096


async def test_unapplied_refs_keep_a_disk_from_being_served_after_a_restart(
    short_tmp: Path,
) -> None:
    async with called(short_tmp) as (process, client):
        await written(process, b"a", b"b")
        applier = Applier(process, keep_history=True)
        applier.step()
        history = applier.history
        await prepare(client, [(0, 1, 2)], to_seq=2, tip_seq=4)
        await client.call("rollback_commit", {"id": "r1"})
        config = process.config
        applier.close()
    async with recorder(short_tmp, config) as process:
        assert "rolled back" in str(process.not_served())
        applier = Applier(process, keep_history=True)
        applier.history |= history
        applier.step()
        assert process.not_served() is None
        applier.close()


async def test_plans_that_are_none(short_tmp: Path) -> None:
    async with called(short_tmp) as (process, client):
        for triples in ([(0, 0, 1)], [(256, 1, 1)], [(255, 2, 1)], [(1 << 63, 1 << 63, 1)]):
            with pytest.raises(InvalidInput):
                await prepare(client, triples, to_seq=0, tip_seq=0)
        assert process.not_served() is None
        assert process.recorder.writer.last_seq == 0


def test_a_large_plan_is_appended_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback, "REFS_PER_BATCH", 4)
    triples = np.array(
        [(number, 1, 7) for number in range(10)],
        [("start", "<u8"), ("nblocks", "<u8"), ("source", "<u8")],
    )
    pieces = list(rollback.entries_of(triples, [(100, 5)], 3))
    assert [len(piece) // 6 for piece in pieces] == [4, 4, 3]
    assert pieces[2][-6:] == [100, 3, 5, int(Kind.REF), 0, 0]


# -------------------------------------------------------------------------------------------- gap
async def test_a_gap_is_a_time_in_which_nobody_is_served(short_tmp: Path) -> None:
    async with called(short_tmp) as (process, client):
        async with clients(process, "unix") as (nbd,):
            await nbd.write(0, b"a" * 4096)
            await nbd.trim(4096, 4096)
            await nbd.flush()
            await nbd.disconnect()
        with pytest.raises(Conflict, match="drain"):
            await client.call("gap_begin", {"reason": "release"})
        assert process.not_served() is None
        applier = Applier(process)
        applier.step()
        await client.call("gap_begin", {"reason": "release"})
        assert "hands of others" in str(process.not_served())
        os.pwrite(process.backing, b"somebody else", 4096)
        await client.call("gap_end", {})
        async with clients(process, "unix") as (nbd,):
            assert (await nbd.read(4096, 13)) == b"somebody else"
        applier.close()


async def test_stop_ends_cleanly(short_tmp: Path) -> None:
    config = new_disk(short_tmp, SIZE)
    async with recorder(short_tmp, config) as process:
        async with clients(process, "unix") as (nbd,):
            await nbd.write(0, b"a" * 4096)
            async with await RpcClient.connect(process.child.socket) as client:
                reply = await client.call("stop")
            assert reply.result["durable"] == 1
            with trio.fail_after(2):
                await nbd.gone.wait()
    assert process.exit_code == 0
    assert process.recorder.frontier.durable == 1
    async with recorder(short_tmp, config) as process:
        assert process.started is not None
        assert process.started.clean
