"""Views: pinned before they are open, unpinned after they are closed, whoever dies in between."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from cdp.config import DaemonConfig, LimitsConfig
from cdp.supervisor.control import DaemonControl
from cdp.supervisor.daemon import Daemon
from journal.errors import Busy, CdpError, NotFound
from tests.cdp.supervisor.conftest import World, until
from tests.cdp.supervisor.nbd_peer import Peer

WithDisks = Callable[..., AbstractAsyncContextManager[tuple[Daemon, DaemonControl]]]


async def test_open_list_close(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (_, control):
        view = await control.open_view("disk0", "seq:5", True)
        assert (view["disk"], view["seq"], view["writable"]) == ("disk0", 5, True)
        uri = f"nbd+unix:///disk0@view:{view['id']}?socket={world.state_dir}/nbd.sock"
        assert view["uri"] == uri
        assert [each["id"] for each in (await control.views())["views"]] == [view["id"]]
        assert world.disk().pins() == {view["id"]}
        (params,) = world.disk().params("viewer", "open")
        assert params["writable"]
        assert params["overlay_limit"] == 10 << 30
        await control.close_view(view["id"])
        assert (await control.views())["views"] == []
        assert world.disk().pins() == set()
        with pytest.raises(NotFound, match="cdp view list"):
            await control.close_view(view["id"])


async def test_no_pin_is_left_when_the_viewer_refuses(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (daemon, control):
        world.disk().behave("viewer", refuse={"open": ["internal", "no memory"]})
        with pytest.raises(CdpError, match="no memory"):
            await control.open_view("disk0", "seq:5", False)
        assert world.disk().pins() == set()
        assert daemon.views.all() == []


async def test_there_is_a_limit_for_administrators_and_one_for_clients(
    world: World, with_disks: WithDisks
) -> None:
    world.config = DaemonConfig(limits=LimitsConfig(views=1))
    async with with_disks("disk0") as (_, control):
        await control.open_view("disk0", "seq:5", False)
        with pytest.raises(Busy, match="1 views are open"):
            await control.open_view("disk0", "seq:5", False)
        async with await Peer.unix(world.state_dir / "nbd.sock") as peer:
            await peer.go("disk0@seq:6")


async def test_a_view_that_is_too_old_is_closed(
    world: World, with_disks: WithDisks, expect_log: Callable[..., None]
) -> None:
    expect_log("is closed: it is too old")
    world.config = DaemonConfig(limits=LimitsConfig(view_age="1ms"))
    async with with_disks("disk0") as (daemon, control):
        await control.open_view("disk0", "seq:5", False)
        await until(lambda: daemon.views.all() == [])
        assert world.disk().pins() == set()


async def test_a_viewer_is_there_before_it_is_needed(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (daemon, _):
        viewer = daemon.disks["disk0"].viewer
        await until(lambda: viewer.is_ready)
        score = Path(f"/proc/{viewer.pid}/oom_score_adj").read_text()
        assert int(score) == 500
    assert world.disk().methods("viewer") == ["started", "list", "stop"]


@pytest.mark.expect_log("the viewer of disk0: its process was ended by SIGKILL")
@pytest.mark.expect_log("ended with its viewer: what was written to it is gone")
async def test_views_survive_their_viewer_except_what_was_written(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0") as (daemon, control):
        kept = await control.open_view("disk0", "seq:5", False)
        await control.open_view("disk0", "seq:6", True)
        pid = daemon.disks["disk0"].viewer.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: len(daemon.views.all()) == 1)
        await until(lambda: daemon.disks["disk0"].viewer.is_ready)
        await until(lambda: world.disk().pins() == {kept["id"]})
        async with await Peer.unix(world.state_dir / "nbd.sock") as peer:
            await peer.go(f"disk0@view:{kept['id']}")
            assert await peer.read(14) == b"viewer has it\n"


async def test_views_are_known_to_the_next_supervisor(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0", clean=False) as (_, control):
        mine = await control.open_view("disk0", "seq:5", True)
        peer = await Peer.unix(world.state_dir / "nbd.sock")
        await peer.go("disk0@seq:6")
        assert await peer.read(14) == b"viewer has it\n"
        await until(lambda: len(world.disk().params("viewer", "attach")) == 1)
    async with peer, with_disks() as (daemon, control):
        await until(lambda: len(daemon.views.all()) == 2)
        known = {each["id"]: each for each in (await control.views())["views"]}
        assert known[mine["id"]]["writable"]
        assert not known[mine["id"]]["ephemeral"]
        await peer.stream.aclose()
        await until(lambda: world.disk().pins() == {mine["id"]})


async def test_pins_of_views_that_nobody_has_are_dropped(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0"):
        pass
    (world.disk().directory / "pins.json").write_text(
        '{"a": {"id": "a", "seq": 1, "owner": "view"}, '
        '"b": {"id": "b", "seq": 1, "owner": "connection"}, '
        '"c": {"id": "c", "seq": 1, "owner": "rollback"}, '
        '"d": {"id": "d", "seq": 1, "owner": "of somebody else"}}'
    )
    async with with_disks():
        await until(lambda: world.disk().pins() == {"d"})


async def test_a_clean_stop_leaves_no_pins(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (_, control):
        await control.open_view("disk0", "seq:5", False)
    assert world.disk().pins() == set()
