"""One moment on several disks, or on none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from cdp.supervisor.control import DaemonControl
from cdp.supervisor.daemon import Daemon
from journal.errors import CdpError, Conflict, InvalidInput, NotFound
from tests.cdp.supervisor.conftest import World

WithDisks = Callable[..., AbstractAsyncContextManager[tuple[Daemon, DaemonControl]]]


async def test_one_disk_is_bookmarked_where_it_is(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (_, control):
        (mark,) = (await control.add_bookmarks(["disk0"], "nightly", "filesystem"))["bookmarks"]
        assert (mark["disk"], mark["label"], mark["seq"]) == ("disk0", "nightly", 101)
        assert (mark["requested"], mark["consistency"]) == ("filesystem", "crash")
        assert world.disk().params("recorder", "bookmark") == [
            {"label": "nightly", "requested": "filesystem", "consistency": "crash"}
        ]


async def test_several_disks_are_bookmarked_at_one_instant(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("a", "b") as (daemon, control):
        before = daemon.clock.now()
        marks = (await control.add_bookmarks(["a", "b"], "nightly", "crash"))["bookmarks"]
        stamps = set()
        for name in "ab":
            told = [call["method"] for call in world.disk(name).calls()]
            assert told.index("sync") < told.index("resolve") < told.index("bookmark")
            (asked,) = world.disk(name).params("curator", "resolve")
            (params,) = world.disk(name).params("recorder", "bookmark")
            assert params["target"] == 42
            assert params["target_stamp"] == asked["stamp"]
            stamps.add(asked["stamp"])
        (stamp,) = stamps
        assert before <= stamp <= daemon.clock.now()
        assert len({mark["time"] for mark in marks}) == 1


async def test_a_recorder_with_another_clock_is_noticed(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("a", "b") as (_, control):
        world.disk("b").behave("recorder", answers={"sync": {"durable": 1, "stamp": 5}})
        with pytest.raises(CdpError, match="recorder of b has another clock"):
            await control.add_bookmarks(["a", "b"], "nightly", "crash")
        assert world.disk("a").params("recorder", "bookmark") == []


async def test_when_one_fails_none_is_left(world: World, with_disks: WithDisks) -> None:
    async with with_disks("a", "b") as (_, control):
        world.disk("b").behave("recorder", refuse={"bookmark": ["conflict", "poisoned"]})
        with pytest.raises(Conflict, match="poisoned"):
            await control.add_bookmarks(["a", "b"], "nightly", "crash")
        assert world.disk("a").params("curator", "unbookmark") == [{"label": "nightly"}]
        assert world.disk("b").params("curator", "unbookmark") == []


@pytest.mark.parametrize(
    ("names", "label", "consistency", "error", "said"),
    [
        (["a"], "good", "crash", Conflict, "a has a bookmark 'good' already"),
        (["a"], "now", "crash", InvalidInput, "label"),
        (["a"], "2026-01-01", "crash", InvalidInput, "label"),
        (["a"], "ok", "perfect", InvalidInput, "choose crash, filesystem, application"),
        (["a", "a"], "ok", "crash", InvalidInput, "name each disk once"),
        ([], "ok", "crash", InvalidInput, "name each disk once"),
        (["a", "c"], "ok", "crash", NotFound, "no disk 'c'"),
    ],
)
async def test_what_is_refused(
    world: World,
    with_disks: WithDisks,
    names: list[str],
    label: str,
    consistency: str,
    error: type[CdpError],
    said: str,
) -> None:
    async with with_disks("a") as (_, control):
        with pytest.raises(error, match=said):
            await control.add_bookmarks(names, label, consistency)
        assert world.disk("a").params("recorder", "bookmark") == []


async def test_list_and_remove(world: World, with_disks: WithDisks) -> None:
    async with with_disks("a") as (_, control):
        (mark,) = (await control.bookmarks("a"))["bookmarks"]
        assert mark["label"] == "good"
        assert await control.remove_bookmark("a", "good") == {}
        assert world.disk("a").params("curator", "unbookmark") == [{"label": "good"}]
