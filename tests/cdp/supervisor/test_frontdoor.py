"""NBD clients are negotiated with and handed over, whatever they do and however long it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
import trio.testing

from cdp.config import DaemonConfig, LimitsConfig
from cdp.nbd import wire
from cdp.supervisor import frontdoor
from cdp.supervisor.control import DaemonControl
from cdp.supervisor.daemon import Daemon
from tests.cdp.supervisor.conftest import World, until
from tests.cdp.supervisor.nbd_peer import Peer, Refused, port_of, reset

WithDisks = Callable[..., AbstractAsyncContextManager[tuple[Daemon, DaemonControl]]]
MULTI_CONN = wire.NBD_FLAG_CAN_MULTI_CONN
READ_ONLY = wire.NBD_FLAG_READ_ONLY


@pytest.fixture
def connect(world: World) -> Callable[[], Any]:
    """`await connect()`: a greeted connection to the unix socket."""
    return lambda: Peer.unix(world.state_dir / "nbd.sock")


async def test_a_disk_goes_to_its_recorder_with_all_that_was_read(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0") as (daemon, _), await connect() as peer:
        size, flags = await peer.go("disk0", more=b"first request")
        assert size == 1 << 20
        assert flags & MULTI_CONN
        assert await peer.read(16) == b"recorder has it\n"
        (params,) = world.disk().params("recorder", "attach")
        assert params["leftover"] == "Zmlyc3QgcmVxdWVzdA=="
        assert params["negotiated"]["export_name"] == "disk0"
        assert "process" in params["peer"]
        await until(lambda: daemon.front_door.here == 0)
        await peer.stream.send_all(b"still there?")
        assert await peer.read(12) == b"still there?"


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("nothing", wire.NBD_REP_ERR_UNKNOWN, "no disk 'nothing' is protected; there are"),
        ("", wire.NBD_REP_ERR_UNKNOWN, "no disk ''"),
        ("disk0@", wire.NBD_REP_ERR_INVALID, "names no point"),
        ("disk0@10 parsecs", wire.NBD_REP_ERR_INVALID, "no point in time"),
        ("disk0@seq:x", wire.NBD_REP_ERR_INVALID, "record's number"),
        ("disk0@nightly", wire.NBD_REP_ERR_UNKNOWN, "no bookmark:nightly"),
        ("disk0@view:beef", wire.NBD_REP_ERR_UNKNOWN, "no view 'beef'"),
        ("disk0@@0", wire.NBD_REP_ERR_UNKNOWN, "too old"),
    ],
)
async def test_what_there_is_not_is_refused_with_words_and_haggling_goes_on(
    world: World,
    with_disks: WithDisks,
    connect: Callable[[], Any],
    name: str,
    code: int,
    said: str,
) -> None:
    async with with_disks("disk0", "disk1"), await connect() as peer:
        if said == "too old":
            refuse = {"resolve": ["not_openable", "that is too old"]}
            world.disk().behave("curator", refuse=refuse)
        with pytest.raises(Refused, match=said) as caught:
            await peer.go(name)
        assert caught.value.code == code
        assert await peer.go("disk1") == (1 << 20, 0x1 | 0x4 | 0x100)


async def test_the_only_disk_is_the_default_export(
    with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0"), await connect() as peer:
        await peer.go("")
        assert await peer.read(16) == b"recorder has it\n"


async def test_list_shows_disks_and_bookmarks(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0", "disk1") as (_, control), await connect() as peer:
        await control.release("disk1", lambda report: None)
        assert await peer.list() == ["disk0", "disk0@good"]


async def test_go_waits_until_the_recorder_is_ready(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0"):
        pass
    world.disk().behave("recorder", state="starting", reason="copies its tail")
    async with trio.open_nursery() as nursery:
        daemon = Daemon(world.options())
        nursery.start_soon(daemon.run, lambda line: None)
        async with await connect() as peer:
            sizes: list[int] = []

            async def go() -> None:
                sizes.append((await peer.go("disk0"))[0])

            async with trio.open_nursery() as waiting:
                waiting.start_soon(go)
                await until(lambda: daemon.front_door.here == 1)
                await until(lambda: daemon.disks["disk0"].recorder.reason == "copies its tail")
                # Who waits for us is no stranger: others can still negotiate.
                await until(lambda: daemon.front_door.strangers == 0)
                assert sizes == []
                world.disk().behave("recorder")
            assert sizes == [1 << 20]
        daemon.stopping.set()


async def test_nobody_is_let_in_before_the_backing_was_looked_at(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0"):
        pass
    world.disk().behave("curator", state="failed", reason="somebody wrote: say resume")
    async with with_disks(), await connect() as peer:
        with pytest.raises(Refused, match="somebody wrote: say resume"):
            await peer.go("disk0")
        assert await peer.list() == []


async def test_a_recorder_that_does_not_serve_is_not_waited_for_long(
    world: World,
    with_disks: WithDisks,
    connect: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frontdoor, "SERVED_SECONDS_MAX", 0.2)
    held = {"export": {"size": 1 << 20, "flags": 1, "served": False, "reason": "lost something"}}
    async with with_disks("disk0"), await connect() as peer:
        world.disk().behave("recorder", answers=held)
        with pytest.raises(Refused, match="disk0 is not served: lost something"):
            await peer.go("disk0")


async def test_a_client_that_leaves_while_it_waits_is_noticed(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0") as (daemon, _):
        held = {"export": {"size": 1, "flags": 1, "served": False, "reason": "later"}}
        world.disk().behave("recorder", answers=held)
        async with await connect() as peer:
            name = b"disk0"
            data = len(name).to_bytes(4, "big") + name + b"\0\0"
            await peer.ask(wire.NBD_OPT_GO, data)
            await until(lambda: "export" in world.disk().methods("recorder"))
        await until(lambda: daemon.front_door.here == 0)
        assert daemon.front_door.errors == {"hangup": 1}


@pytest.mark.expect_log("was cut off")
async def test_a_recorder_that_dies_at_the_hand_over_costs_one_connection(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0") as (daemon, _):
        world.disk().behave("recorder", refuse={"attach": ["busy", "not now"]})
        async with await connect() as peer:
            await peer.go("disk0")
            with pytest.raises(EOFError):
                await peer.read(1)
        world.disk().behave("recorder")
        async with await connect() as peer:
            await peer.go("disk0")
            assert await peer.read(16) == b"recorder has it\n"
        assert daemon.front_door.errors == {"handover": 1}


# -------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize(
    ("spec", "stable"),
    [
        ("seq:5", True),
        ("good", True),
        ("bookmark:good", True),
        ("now", False),
        ("-10s", False),
        ("@1700000000", False),
    ],
)
async def test_only_points_that_stay_offer_several_connections(
    world: World,
    with_disks: WithDisks,
    connect: Callable[[], Any],
    spec: str,
    stable: bool,
) -> None:
    async with with_disks("disk0"), await connect() as peer:
        _, flags = await peer.go(f"disk0@{spec}")
        assert flags & READ_ONLY
        assert bool(flags & MULTI_CONN) is stable
        assert await peer.read(14) == b"viewer has it\n"


async def test_a_time_is_confirmed_by_the_recorder_first(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0"), await connect() as peer:
        await peer.go("disk0@-10s")
        told = [call["method"] for call in world.disk().calls()]
        assert told.index("sync") < told.index("resolve") < told.index("pin") < told.index("open")


async def test_info_and_go_mean_the_same_moment(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0"), await connect() as peer:
        assert await peer.info("disk0@-10s") == await peer.go("disk0@-10s")
        assert world.disk().methods("curator").count("resolve") == 1


async def test_a_view_lives_as_long_as_its_connections(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0") as (daemon, _):
        async with await connect() as first, await connect() as second:
            for peer in (first, second):
                await peer.go("disk0@seq:5")
                assert await peer.read(14) == b"viewer has it\n"
            assert len(daemon.views.all()) == 1
            assert len(world.disk().pins()) == 1
        await until(lambda: daemon.views.all() == [])
        assert world.disk().pins() == set()
        assert world.disk().methods("viewer").count("close") == 1


async def test_a_view_that_was_only_looked_at_ends_with_its_connection(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0") as (daemon, _):
        async with await connect() as peer:
            for seq in range(frontdoor.VIEWS_PER_CONNECTION + 2):
                await peer.info(f"disk0@seq:{seq}")
        await until(lambda: daemon.views.all() == [])
        assert world.disk().pins() == set()


async def test_an_open_view_is_an_export_by_its_id(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0", "disk1") as (_, control):
        view = await control.open_view("disk0", "seq:5", True)
        async with await connect() as peer:
            with pytest.raises(Refused, match="is one of disk0, not of disk1"):
                await peer.go(f"disk1@view:{view['id']}")
            _, flags = await peer.go(f"disk0@view:{view['id']}")
            assert flags & MULTI_CONN
            assert not flags & READ_ONLY
            assert await peer.read(14) == b"viewer has it\n"
        assert len((await control.views())["views"]) == 1


# ------------------------------------------------------------------------------------------- limits


async def test_who_does_not_say_what_he_wants_is_cut_off(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    world.config = DaemonConfig(limits=LimitsConfig(handshake_seconds=0.1))
    async with with_disks("disk0") as (daemon, _), await connect() as peer:
        with pytest.raises(EOFError):
            await peer.read(1)
        await until(lambda: daemon.front_door.errors == {"timeout": 1})


async def test_strangers_are_limited_and_clients_too(
    world: World, with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    world.config = DaemonConfig(limits=LimitsConfig(nbd_handshakes=2, nbd_connections=3))
    async with with_disks("disk0") as (daemon, control):
        async with await connect(), await connect() as peer:
            with pytest.raises(EOFError):
                await connect()
            await peer.go("disk0")
            await until(lambda: daemon.front_door.here == 1)
            async with await connect() as third:
                await third.go("disk0")
                await until(lambda: daemon.front_door.here == 1)
                await control.status()
                assert daemon.front_door.connections() == 3
                with pytest.raises(EOFError):
                    await connect()
        assert daemon.front_door.errors["limit"] == 2


@pytest.mark.parametrize("sent", [b"\xff" * 64, b"\0\0\0\3" + b"\0" * 16])
async def test_nonsense_is_counted(
    world: World, with_disks: WithDisks, connect: Callable[[], Any], sent: bytes
) -> None:
    async with with_disks("disk0") as (daemon, _), await connect() as peer:
        await peer.stream.send_all(sent)
        with pytest.raises(EOFError):
            await peer.read(1)
        assert daemon.front_door.errors["handshake"] == 1


async def test_who_just_leaves_is_no_error(
    with_disks: WithDisks, connect: Callable[[], Any]
) -> None:
    async with with_disks("disk0") as (daemon, _):
        async with await connect() as peer:
            await peer.ask(wire.NBD_OPT_ABORT)
        async with await connect():
            pass
        await until(lambda: daemon.front_door.here == 0)
        assert not daemon.front_door.errors


async def test_tcp(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0", nbd=("tcp://127.0.0.1:0",)) as (daemon, _):
        port = port_of(daemon.listeners.nbd_uris[1])
        async with await Peer.tcp("127.0.0.1", port) as peer:
            await peer.go("disk0")
            assert await peer.read(16) == b"recorder has it\n"
        async with await Peer.tcp("127.0.0.1", port) as peer:
            reset(peer)
        (params,) = world.disk().params("recorder", "attach")
        assert params["peer"].startswith("127.0.0.1 port")
        assert json.dumps(params["negotiated"])
        await until(lambda: daemon.front_door.here == 0)
