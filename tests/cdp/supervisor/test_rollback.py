"""Of several disks all are rolled back or none, whoever dies and whenever."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio

from cdp.config import write_json
from cdp.supervisor import rollback
from cdp.supervisor.control import DaemonControl
from cdp.supervisor.daemon import Daemon
from cdp.supervisor.rollback import Intent
from journal.errors import Busy, CdpError, Conflict, InvalidInput
from tests.cdp.supervisor.conftest import FakeDisk, World, until

WithDisks = Callable[..., AbstractAsyncContextManager[tuple[Daemon, DaemonControl]]]
Json = dict[str, Any]


def silent(report: Json) -> None:
    """Progress nobody looks at."""


def intents(world: World) -> list[str]:
    return [path.name for path in (world.state_dir / "rollbacks").iterdir()]


def closed_with(disk: FakeDisk) -> list[str]:
    """How its recorder was told that rollbacks end."""
    told = {"rollback_commit": "commit", "rollback_abort": "abort"}
    return [told[method] for method in disk.methods("recorder") if method in told]


async def go(control: DaemonControl, *names: str, to: str = "-10s", **values: Any) -> Json:
    given = {"dry_run": False, "disconnect": False, **values}
    return await control.rollback(list(names), to, given["dry_run"], given["disconnect"], silent)


# ---------------------------------------------------------------------------------------- one disk


async def test_one_disk(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (_, control):
        result = await go(control, "disk0")
        assert result == {
            "rollbacks": [
                {
                    "disk": "disk0",
                    "to_seq": 42,
                    "to_time": (10**18 + 42) / 1e9,
                    "begin_seq": 101,
                    "commit_seq": 103,
                    "extents": 1,
                    "bytes": 4096,
                    "undo_with": "seq:100",
                }
            ]
        }
        told = [call["method"] for call in world.disk().calls()]
        order = ["pin", "plan_rollback", "rollback_prepare", "rollback_commit", "rollback_wait"]
        assert [method for method in told if method in [*order, "unpin"]] == [*order, "unpin"]
        (prepare,) = [c for c in world.disk().calls() if c["method"] == "rollback_prepare"]
        assert prepare["fds"] == 1
        assert prepare["params"]["tip_seq"] == 100
        assert prepare["params"]["disks"] == ["disk0"]
        assert world.disk().pins() == set()
        assert intents(world) == []


async def test_a_dry_run_changes_nothing(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (_, control):
        (plan,) = (await go(control, "disk0", dry_run=True))["plans"]
        assert (plan["to_seq"], plan["extents"], plan["bytes"]) == (42, 1, 4096)
        assert plan["seconds_estimate"] >= 0.5
        assert "rollback_prepare" not in world.disk().methods("recorder")
        assert world.disk().pins() == set()


async def test_a_disk_in_use_is_refused_before_anything_is_planned(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0") as (_, control):
        world.disk().behave("recorder", answers={"status": {"connections": 2}})
        with pytest.raises(Conflict, match=r"in use by 2 connection\(s\).*--disconnect"):
            await go(control, "disk0")
        assert "plan_rollback" not in world.disk().methods("viewer")
        await go(control, "disk0", disconnect=True)
        assert world.disk().params("recorder", "rollback_prepare")[0]["disconnect"]


@pytest.mark.parametrize(
    ("names", "to", "said"),
    [
        ([], "-1m", "name the disk"),
        (["disk0", "disk0"], "-1m", "name each disk once"),
        (["disk0", "disk1"], "seq:5", "is a record of one disk"),
        (["disk0"], "10 parsecs", "no point in time"),
    ],
)
async def test_what_means_nothing(
    with_disks: WithDisks, names: list[str], to: str, said: str
) -> None:
    async with with_disks("disk0", "disk1") as (_, control):
        with pytest.raises(InvalidInput, match=said):
            await go(control, *names, to=to)


# ----------------------------------------------------------------------------------- several disks


async def test_several_disks_go_to_the_same_instant(world: World, with_disks: WithDisks) -> None:
    async with with_disks("a", "b") as (_, control):
        await go(control, "a", "b")
        specs = {d: world.disk(d).params("curator", "resolve")[0]["spec"] for d in "ab"}
        assert specs["a"] == specs["b"]
        assert specs["a"].startswith("@")
        assert closed_with(world.disk("a")) == closed_with(world.disk("b")) == ["commit"]


async def test_nobody_commits_before_all_have_prepared(world: World, with_disks: WithDisks) -> None:
    async with with_disks("a", "b") as (_, control):
        world.disk("b").behave(
            "recorder", refuse={"rollback_prepare": ["conflict", "b has no space"]}
        )
        with pytest.raises(Conflict, match="b has no space"):
            await go(control, "a", "b")
        assert closed_with(world.disk("a")) == ["abort"]
        assert "commit" not in closed_with(world.disk("b"))
        assert intents(world) == []
        assert world.disk("a").pins() == set()
        world.disk("b").behave("recorder")
        await go(control, "a", "b")


async def test_a_recorder_that_does_not_prepare_in_time_costs_nobody_anything(
    world: World, with_disks: WithDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollback, "PREPARE_SECONDS_MAX", 0.5)
    monkeypatch.setattr(rollback, "ABORT_SECONDS_MAX", 0.5)
    async with with_disks("a", "b", clean=False) as (_, control):
        world.disk("b").behave("recorder", hang_on="rollback_prepare")
        with pytest.raises(Busy, match="nothing was rolled back"):
            await go(control, "a", "b")
        assert closed_with(world.disk("a")) == ["abort"]


@pytest.mark.expect_log("its process ended with status 3")
@pytest.mark.expect_log("ended before it answered rollback_commit")
@pytest.mark.expect_log("is committed: it was decided")
async def test_a_recorder_that_dies_at_the_commit_commits_when_it_is_back(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("a", "b") as (_, control):
        world.disk("b").behave("recorder", die_on="rollback_commit")

        async def recover() -> None:
            await until(lambda: closed_with(world.disk("b")) == ["commit"])
            world.disk("b").behave("recorder")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(recover)
            result = await go(control, "a", "b")
        assert [each["commit_seq"] for each in result["rollbacks"]] == [103, 103]
        assert closed_with(world.disk("b")) == ["commit", "commit"]
        assert intents(world) == []


@pytest.mark.expect_log("its process ended with status 3", required=False)
@pytest.mark.expect_log("ended before it answered rollback_commit")
@pytest.mark.expect_log("is committed: it was decided", required=False)
async def test_who_waits_is_told_when_a_disk_follows_later(
    world: World, with_disks: WithDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollback, "COMMIT_SECONDS_MAX", 0.3)
    async with with_disks("a", "b", clean=False) as (_, control):
        world.disk("b").behave("recorder", die_on="rollback_commit")
        with pytest.raises(Conflict, match="is decided, and follows on b"):
            await go(control, "a", "b")
        assert len(intents(world)) == 1
        assert closed_with(world.disk("a")) == ["commit"]


# ---------------------------------------------------------------------------- a supervisor's death


@pytest.mark.expect_log("is aborted: it was not decided")
async def test_what_was_not_decided_is_aborted_by_the_next_supervisor(
    world: World, with_disks: WithDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if it had been killed: no time to say anything to anybody.
    monkeypatch.setattr(rollback, "ABORT_SECONDS_MAX", 0.0)
    async with with_disks("a", "b", clean=False) as (_, control):
        world.disk("b").behave("recorder", hang_on="rollback_prepare")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(go, control, "a", "b")
            await until((world.disk("a").directory / "open_rollback.json").exists)
            nursery.cancel_scope.cancel()
    assert closed_with(world.disk("a")) == []
    world.disk("b").behave("recorder")
    for pid in {call["pid"] for call in world.disk("b").calls("recorder")}:
        os.kill(pid, signal.SIGKILL)
    async with with_disks():
        await until(lambda: closed_with(world.disk("a")) == ["abort"])
        assert closed_with(world.disk("b")) == []


@pytest.mark.expect_log("will be finished")
@pytest.mark.expect_log("is committed: it was decided", required=False)
@pytest.mark.parametrize("prepared", ["ab", "b", ""])
async def test_what_was_decided_is_committed_by_the_next_supervisor(
    world: World, with_disks: WithDisks, prepared: str
) -> None:
    """Also when some have committed already, or all: then only the intent was left."""
    async with with_disks("a", "b"):
        pass
    for name in prepared:
        path = world.disk(name).directory / "open_rollback.json"
        path.write_text(json.dumps({"id": "feed"}))
    write_json(world.state_dir / "rollbacks" / "feed.json", Intent("feed", ["a", "b"]))
    async with with_disks():
        await until(lambda: intents(world) == [])
        for name in "ab":
            assert closed_with(world.disk(name)) == (["commit"] if name in prepared else [])


@pytest.mark.expect_log("will be finished")
async def test_an_intent_for_disks_that_are_gone_is_forgotten(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks():
        pass
    write_json(world.state_dir / "rollbacks" / "feed.json", Intent("feed", ["gone"]))
    async with with_disks():
        assert intents(world) == []


async def test_an_intent_that_cannot_be_read_stops_the_start(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks():
        pass
    (world.state_dir / "rollbacks" / "feed.json").write_text("{")
    with pytest.raises(CdpError, match=r"feed\.json is not what cdpd wrote"):
        Daemon(world.options())
    (world.state_dir / "rollbacks" / "feed.json").unlink()
    async with with_disks():
        pass


async def test_an_intent_is_not_left_when_it_cannot_be_written(
    world: World, with_disks: WithDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: object, value: object) -> None:
        raise OSError(28, "No space left on device")

    async with with_disks("a", "b") as (_, control):
        monkeypatch.setattr(rollback, "write_json", fail)
        with pytest.raises(OSError, match="No space"):
            await go(control, "a", "b")
        assert closed_with(world.disk("a")) == closed_with(world.disk("b")) == ["abort"]
