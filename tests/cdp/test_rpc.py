"""Calls, progress, descriptors and cancellation over real sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from cdp import rpc
from cdp.rpc import Call, ConnectionLost, Handler, Reply, RpcClient, RpcServer
from journal.errors import Busy, CdpError, Conflict, InvalidInput, NotFound, NotOpenable

Fds = list[int]
Params = dict[str, Any]


@asynccontextmanager
async def serving(path: Path, **handlers: Handler) -> AsyncIterator[RpcClient]:
    """A server of these handlers, and a client of it."""
    async with trio.open_nursery() as nursery:
        await nursery.start(RpcServer().serve, path, handlers)
        async with await RpcClient.connect(path) as client:
            yield client
        nursery.cancel_scope.cancel()


def open_fds() -> set[str]:
    """What the descriptors of this process are."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue
    return found


@pytest.fixture
async def no_leak() -> Callable[[], None]:
    """Call it at the end: no descriptor is open that was not open before."""
    before = open_fds()

    def check() -> None:
        assert open_fds() - before == set()

    return check


async def echo(params: Params, fds: Fds, call: Call) -> Params:
    return {"params": params, "fds": len(fds), "method": call.method}


# ------------------------------------------------------------------------------------------- calls


async def test_call_and_result(short_tmp: Path) -> None:
    async with serving(short_tmp / "a.sock", echo=echo) as client:
        reply = await client.call("echo", {"x": [1, "ü", None]})
        assert reply.result == {"params": {"x": [1, "ü", None]}, "fds": 0, "method": "echo"}
        assert (await client.call("echo")).result["params"] == {}


@pytest.mark.parametrize("error", [InvalidInput, NotFound, Conflict, Busy, NotOpenable, CdpError])
async def test_errors_keep_their_kind(short_tmp: Path, error: type[CdpError]) -> None:
    async def fails(params: Params, fds: Fds, call: Call) -> None:
        raise error("what to do about it")

    async with serving(short_tmp / "a.sock", fails=fails) as client:
        with pytest.raises(error, match="what to do about it") as caught:
            await client.call("fails")
        assert type(caught.value) is error


@pytest.mark.expect_log("the call bug failed")
async def test_a_bug_fails_one_call_and_not_the_process(short_tmp: Path) -> None:
    async def bug(params: Params, fds: Fds, call: Call) -> None:
        raise ZeroDivisionError("oops")

    async with serving(short_tmp / "a.sock", bug=bug, echo=echo) as client:
        with pytest.raises(CdpError, match="ZeroDivisionError: oops"):
            await client.call("bug")
        assert (await client.call("echo")).result["fds"] == 0


@pytest.mark.expect_log("the answer to odd cannot be sent")
async def test_an_answer_that_is_no_json_is_an_error(short_tmp: Path) -> None:
    async def odd(params: Params, fds: Fds, call: Call) -> Params:
        return {"object": object()}

    async with serving(short_tmp / "a.sock", odd=odd) as client:
        with pytest.raises(CdpError, match="cannot be sent"):
            await client.call("odd")


async def test_unknown_call(short_tmp: Path) -> None:
    async with serving(short_tmp / "a.sock") as client:
        with pytest.raises(InvalidInput, match="knows no call 'nothing'"):
            await client.call("nothing")


async def test_calls_run_at_the_same_time_and_answers_find_them(short_tmp: Path) -> None:
    gates = {name: trio.Event() for name in "abc"}

    async def wait(params: Params, fds: Fds, call: Call) -> Params:
        await gates[params["gate"]].wait()
        return {"gate": params["gate"]}

    answers: list[str] = []
    async with serving(short_tmp / "a.sock", wait=wait, echo=echo) as client:

        async def ask(gate: str) -> None:
            answers.append((await client.call("wait", {"gate": gate})).result["gate"])

        async with trio.open_nursery() as nursery:
            for gate in gates:
                nursery.start_soon(ask, gate)
            await client.call("echo")
            for number, gate in enumerate("cab", 1):
                gates[gate].set()
                while len(answers) < number:
                    await trio.testing.wait_all_tasks_blocked()
    assert answers == ["c", "a", "b"]


async def test_more_calls_than_are_allowed_are_refused(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "CALLS_MAX", 2)

    async def forever(params: Params, fds: Fds, call: Call) -> None:
        await trio.sleep_forever()

    async with serving(short_tmp / "a.sock", forever=forever, echo=echo) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(client.call, "forever")
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(Busy, match="2 calls are in flight"):
                await client.call("echo")
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("size", [0, 1000, rpc.MESSAGE_BYTES_MAX - 100, 3_000_000])
async def test_any_size_both_ways(short_tmp: Path, size: int, no_leak: Callable[[], None]) -> None:
    async with serving(short_tmp / "a.sock", echo=echo) as client:
        reply = await client.call("echo", {"text": "x" * size})
        assert reply.result["params"] == {"text": "x" * size}
    no_leak()


async def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    async with serving(directory / "recorder.sock", echo=echo) as client:
        assert (await client.call("echo")).result["method"] == "echo"
    assert oct((directory / "recorder.sock").stat().st_mode & 0o777) == "0o600"


async def test_what_a_dead_process_left_is_replaced(short_tmp: Path) -> None:
    path = short_tmp / "a.sock"
    async with serving(path, echo=echo):
        pass
    with pytest.raises(ConnectionRefusedError):
        await RpcClient.connect(path)
    async with serving(path, echo=echo) as client:
        assert (await client.call("echo")).result["fds"] == 0


# ---------------------------------------------------------------------------------------- progress


async def test_progress_is_in_order_and_before_the_result(short_tmp: Path) -> None:
    heard: list[int] = []
    more = trio.Event()

    async def work(params: Params, fds: Fds, call: Call) -> Params:
        for number in range(3):
            call.progress({"done": number})
            while heard[-1:] != [number]:
                await trio.testing.wait_all_tasks_blocked()
        more.set()
        return {"done": 3}

    async with serving(short_tmp / "a.sock", work=work) as client:

        def on_progress(progress: Params) -> None:
            assert not more.is_set()
            heard.append(progress["done"])

        assert (await client.call("work", on_progress=on_progress)).result == {"done": 3}
    assert heard == [0, 1, 2]


async def test_who_does_not_listen_gets_the_latest_and_holds_nobody_up(short_tmp: Path) -> None:
    heard: list[int] = []
    go_on = trio.Event()
    worked = trio.Event()

    async def work(params: Params, fds: Fds, call: Call) -> Params:
        for number in range(10_000):
            call.progress({"done": number})
            if number == 0:
                while not heard:
                    await trio.testing.wait_all_tasks_blocked()
        worked.set()
        await go_on.wait()
        return {}

    async def on_progress(progress: Params) -> None:
        heard.append(progress["done"])
        await worked.wait()
        if progress["done"] == 9_999:
            go_on.set()

    async with serving(short_tmp / "a.sock", work=work) as client:
        await client.call("work", on_progress=on_progress)
    assert heard == [0, 9_999]


async def test_events_reach_every_client(short_tmp: Path) -> None:
    path, server = short_tmp / "a.sock", RpcServer()
    heard: list[Params] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, {"echo": echo})
        for _ in range(2):
            client = await RpcClient.connect(path, on_event=heard.append)
            await client.call("echo")
        server.notify("poisoned", reason="a sync failed")
        while len(heard) < 2:
            await trio.testing.wait_all_tasks_blocked()
        assert heard == 2 * [{"event": "poisoned", "reason": "a sync failed"}]
        nursery.cancel_scope.cancel()


# ------------------------------------------------------------------------------------- descriptors


def pipe_with(text: bytes) -> int:
    """The reading end of a pipe that holds `text`."""
    reading, writing = os.pipe()
    os.write(writing, text)
    os.close(writing)
    return reading


async def test_descriptors_go_both_ways(short_tmp: Path, no_leak: Callable[[], None]) -> None:
    async def swap(params: Params, fds: Fds, call: Call) -> Reply:
        texts = [os.read(fd, 100).decode() for fd in fds]
        return Reply({"texts": texts}, [pipe_with(b"from the server")], owned=True)

    async with serving(short_tmp / "a.sock", swap=swap) as client:
        mine = [pipe_with(b"one"), pipe_with(b"two")]
        reply = await client.call("swap", fds=mine)
        assert reply.result == {"texts": ["one", "two"]}
        (fd,) = reply.fds
        assert os.read(fd, 100) == b"from the server"
        assert not os.get_inheritable(fd)
        rpc.close_all([fd, *mine])
    no_leak()


async def test_a_handler_keeps_what_it_takes(short_tmp: Path) -> None:
    kept: list[int] = []

    async def keep_first(params: Params, fds: Fds, call: Call) -> None:
        kept.append(fds.pop(0))

    async with serving(short_tmp / "a.sock", keep_first=keep_first) as client:
        mine = [pipe_with(b"one"), pipe_with(b"two")]
        await client.call("keep_first", fds=mine)
        rpc.close_all(mine)
    assert os.read(kept[0], 100) == b"one"
    rpc.close_all(kept)


async def test_descriptors_sent_back_are_still_open(
    short_tmp: Path, no_leak: Callable[[], None]
) -> None:
    async def back(params: Params, fds: Fds, call: Call) -> Reply:
        return Reply({}, fds)

    async with serving(short_tmp / "a.sock", back=back) as client:
        mine = pipe_with(b"there and back")
        reply = await client.call("back", fds=[mine])
        assert os.read(reply.fds[0], 100) == b"there and back"
        rpc.close_all([mine, *reply.fds])
    no_leak()


@pytest.mark.expect_log("the call bug failed", required=False)
@pytest.mark.parametrize("method", ["refuse", "bug", "unknown", "forever"])
async def test_no_descriptor_is_left_whatever_happens(
    short_tmp: Path, method: str, no_leak: Callable[[], None]
) -> None:
    async def refuse(params: Params, fds: Fds, call: Call) -> None:
        raise Conflict("not now")

    async def bug(params: Params, fds: Fds, call: Call) -> None:
        raise KeyError("x")

    async def forever(params: Params, fds: Fds, call: Call) -> None:
        await trio.sleep_forever()

    handlers: dict[str, Handler] = {"refuse": refuse, "bug": bug, "forever": forever}
    async with serving(short_tmp / "a.sock", **handlers) as client:
        mine = pipe_with(b"x")
        with trio.move_on_after(0.05):
            with pytest.raises(CdpError):
                await client.call(method, fds=[mine])
        os.close(mine)
    no_leak()


async def test_an_answer_after_the_caller_left_is_closed(
    short_tmp: Path, no_leak: Callable[[], None]
) -> None:
    ended = trio.Event()

    async def late(params: Params, fds: Fds, call: Call) -> Reply:
        # As if its answer had been on its way already when the caller gave up.
        with trio.CancelScope(shield=True):
            await ended.wait()
        return Reply({}, [pipe_with(b"x")], owned=True)

    async with serving(short_tmp / "a.sock", late=late, echo=echo) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.call, "late")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        ended.set()
        await client.call("echo")
        await trio.testing.wait_all_tasks_blocked()
    no_leak()


# ------------------------------------------------------------------------------------ cancellation


async def test_a_cancelled_call_is_cancelled_at_the_other_end(short_tmp: Path) -> None:
    cancelled = trio.Event()

    async def forever(params: Params, fds: Fds, call: Call) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with serving(short_tmp / "a.sock", forever=forever, echo=echo) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.call, "forever")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await cancelled.wait()
        assert (await client.call("echo")).result["fds"] == 0


async def test_calls_are_cancelled_when_the_client_goes(short_tmp: Path) -> None:
    cancelled = trio.Event()

    async def forever(params: Params, fds: Fds, call: Call) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with serving(short_tmp / "a.sock", forever=forever) as client:

        async def call() -> None:
            with pytest.raises(ConnectionLost, match="ended before it answered forever"):
                await client.call("forever")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            client.close()
        await cancelled.wait()


async def test_a_shielded_handler_ends_although_its_client_has_gone(short_tmp: Path) -> None:
    began, go_on, done = trio.Event(), trio.Event(), trio.Event()

    async def commit(params: Params, fds: Fds, call: Call) -> None:
        began.set()
        with trio.CancelScope(shield=True):
            await go_on.wait()
            done.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(RpcServer().serve, short_tmp / "a.sock", {"commit": commit})
        client = await RpcClient.connect(short_tmp / "a.sock")
        async with trio.open_nursery() as calling:
            calling.start_soon(client.call, "commit")
            await began.wait()
            calling.cancel_scope.cancel()
        client.close()
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        await done.wait()
        nursery.cancel_scope.cancel()


async def test_the_client_notices_that_the_server_has_gone(short_tmp: Path) -> None:
    async def forever(params: Params, fds: Fds, call: Call) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(RpcServer().serve, short_tmp / "a.sock", {"forever": forever})
        client = await RpcClient.connect(short_tmp / "a.sock", name="the recorder of disk0")

        async def call() -> None:
            with pytest.raises(ConnectionLost, match="the recorder of disk0 ended before"):
                await client.call("forever")

        async with trio.open_nursery() as calling:
            calling.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            await client.closed.wait()
        with pytest.raises(ConnectionLost, match="is gone"):
            await client.call("forever")


# ---------------------------------------------------------------------------------- broken messages


@pytest.mark.parametrize(
    "message",
    [
        b"not json",
        b"[]",
        b'{"id": "x", "method": "echo"}',
        b'{"id": 1, "method": 7}',
        b'{"id": 1, "method": "echo", "params": []}',
        b'{"spilled": 12}',
        b'{"spilled": -1}',
        b"x" * (rpc.MESSAGE_BYTES_MAX + 2),
    ],
)
@pytest.mark.expect_log("a client was cut off")
async def test_a_client_that_talks_nonsense_is_cut_off_and_others_are_not(
    short_tmp: Path, message: bytes, no_leak: Callable[[], None]
) -> None:
    path = short_tmp / "a.sock"
    async with serving(path, echo=echo) as client:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as strange:
            strange.connect(os.fspath(path))
            mine = pipe_with(b"x")
            socket.send_fds(strange, [message], [] if b"spilled" in message else [mine])
            os.close(mine)
            await trio.lowlevel.wait_readable(strange)
            assert strange.recv(100) == b""
        assert (await client.call("echo")).result["fds"] == 0
    no_leak()


@pytest.mark.expect_log("a client was cut off")
async def test_the_same_number_twice_is_cut_off(short_tmp: Path) -> None:
    async def forever(params: Params, fds: Fds, call: Call) -> None:
        await trio.sleep_forever()

    path = short_tmp / "a.sock"
    async with serving(path, forever=forever):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as strange:
            strange.connect(os.fspath(path))
            for _ in range(2):
                strange.send(b'{"id": 1, "method": "forever"}')
            await trio.lowlevel.wait_readable(strange)
            assert strange.recv(100) == b""
