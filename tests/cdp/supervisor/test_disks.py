"""Disks are added, changed, released and removed; what is impossible leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio

from cdp.config import load_disk
from cdp.supervisor import removal
from cdp.supervisor.control import DaemonControl
from cdp.supervisor.daemon import Daemon
from journal.errors import Busy, CdpError, Conflict, InvalidInput, NotFound
from tests.cdp.supervisor.conftest import World, until

WithDisks = Callable[..., AbstractAsyncContextManager[tuple[Daemon, DaemonControl]]]
MIB = 1 << 20


def silent(report: dict[str, Any]) -> None:
    """Progress nobody looks at."""


# ------------------------------------------------------------------------------------------- adding


async def test_a_disk_with_nothing_but_a_size(world: World, with_disks: WithDisks) -> None:
    async with with_disks() as (daemon, control):
        disk = await control.add_disk({"name": "disk0", "size": 10 * MIB})
        directory = world.state_dir / "disks" / "disk0"
        backing = directory / "backing.img"
        assert disk["state"] == "served"
        assert disk["size"] == 10 * MIB == backing.stat().st_size
        assert backing.stat().st_blocks == 0
        assert disk["uri"] == f"nbd+unix:///disk0?socket={world.state_dir}/nbd.sock"
        assert disk["window_configured"] is None
        assert load_disk(directory) == daemon.disks["disk0"].config
        assert {path.name for path in (directory / "journal").iterdir()} == {
            *("redo", "undo", "index"),
        }
        entries = world.disk().params("curator", "note_clock")
        assert entries == [{"entries": [list(each) for each in daemon.clock.wall.entries]}]


async def test_a_disk_on_a_file_with_all_options(
    short_tmp: Path, world: World, with_disks: WithDisks
) -> None:
    backing, journal = short_tmp / "vm.img", short_tmp / "deep" / "journal"
    backing.write_bytes(bytes(3 * MIB))
    async with with_disks() as (daemon, control):
        await control.add_disk(
            {
                "name": "vm",
                "backing": str(backing),
                "journal": str(journal),
                "window": 3600.0,
                "journal_limit": 1 << 30,
                "overflow": "throttle",
                "segment_bytes": 4 * MIB,
            }
        )
        config = daemon.disks["vm"].config
        assert (config.size, config.window_seconds, config.overflow) == (3 * MIB, 3600, "throttle")
        assert (config.segment_bytes, config.journal_limit) == (4 * MIB, 1 << 30)
        assert not config.backing_is_own
        assert journal.is_dir()


@pytest.mark.parametrize(
    ("limit", "segment"),
    [(16 * MIB, MIB), (4 * MIB, MIB), (100 * MIB, 6 * MIB), (1 << 40, 64 * MIB)],
)
async def test_segments_are_small_against_the_limit(
    with_disks: WithDisks, limit: int, segment: int
) -> None:
    async with with_disks() as (daemon, control):
        await control.add_disk({"name": "small", "size": MIB, "journal_limit": limit})
        assert daemon.disks["small"].config.segment_bytes == segment


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        ({"name": "no size"}, InvalidInput, "cannot name a disk"),
        ({"name": "x"}, InvalidInput, "say the --size"),
        ({"name": "x", "size": 1000}, InvalidInput, "multiple"),
        ({"name": "x", "size": 1 << 60}, InvalidInput, "16 TiB"),
        ({"name": "x", "backing": "/nowhere/at/all"}, InvalidInput, "does not exist"),
        ({"name": "x", "backing": "relative"}, InvalidInput, "must be absolute"),
        ({"name": "x", "backing": "/"}, InvalidInput, "neither a file nor a block device"),
        ({"name": "x", "backing": "{tmp}/small", "size": 2 * MIB}, InvalidInput, "are needed"),
        ({"name": "x", "backing": "{tmp}/odd"}, InvalidInput, "say how many of them"),
        ({"name": "x", "backing": "{tmp}/held"}, Busy, "in use by another program"),
        ({"name": "x", "backing": "{tmp}/used"}, Conflict, "is the backing of disk0"),
        ({"name": "x", "backing": "{tmp}/link"}, Conflict, "is the backing of disk0"),
        ({"name": "x", "size": MIB, "journal": "{tmp}/full"}, Conflict, "is not empty"),
        ({"name": "x", "size": MIB, "journal": "{state}/disks"}, Conflict, "journal of disk0"),
        ({"name": "x", "size": MIB, "overflow": "gap"}, InvalidInput, "not there yet"),
        ({"name": "x", "size": MIB, "overflow": "never"}, InvalidInput, "one of shrink"),
        ({"name": "x", "size": MIB, "segment_bytes": 5}, InvalidInput, "segment size"),
        ({"name": "disk0", "size": MIB}, Conflict, "already"),
    ],
)
async def test_what_cannot_be_is_refused_and_leaves_nothing(
    short_tmp: Path,
    world: World,
    with_disks: WithDisks,
    body: dict[str, Any],
    error: type[CdpError],
    said: str,
) -> None:
    for name in ("small", "held", "used"):
        (short_tmp / name).write_bytes(bytes(MIB))
    (short_tmp / "odd").write_bytes(bytes(1000))
    (short_tmp / "link").symlink_to(short_tmp / "used")
    (short_tmp / "full").mkdir()
    (short_tmp / "full" / "file").touch()
    places = {"tmp": short_tmp, "state": world.state_dir}
    body = {k: v.format(**places) if isinstance(v, str) else v for k, v in body.items()}
    async with with_disks() as (daemon, control):
        await control.add_disk({"name": "disk0", "backing": str(short_tmp / "used")})
        await until(lambda: daemon.disks["disk0"].viewer.is_ready)
        before = sorted(world.state_dir.rglob("*"))
        with open(short_tmp / "held") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(error, match=said) as caught:
                await control.add_disk(body)
        assert "\n" not in str(caught.value)
        assert [path for path in sorted(world.state_dir.rglob("*")) if path not in before] == []
        assert list(daemon.disks) == ["disk0"]


async def test_a_failure_half_way_leaves_nothing(
    world: World, with_disks: WithDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(directory: Path, config: object) -> None:
        raise OSError(28, "No space left on device")

    async with with_disks() as (_, control):
        monkeypatch.setattr("cdp.supervisor.disks.save_disk", fail)
        with pytest.raises(OSError, match="No space"):
            await control.add_disk({"name": "disk0", "size": MIB})
        assert list((world.state_dir / "disks").iterdir()) == []


async def test_a_disk_that_does_not_work_says_so(world: World, with_disks: WithDisks) -> None:
    directory = world.state_dir / "disks" / "disk0"
    directory.mkdir(parents=True)
    world.disk().behave("recorder", state="failed", reason="format version 9")
    async with with_disks() as (_, control):
        with pytest.raises(Conflict, match=r"format version 9.*cdp disk remove disk0"):
            await control.add_disk({"name": "disk0", "size": MIB})
        assert (await control.disk("disk0"))["state"] == "failed"


async def test_unknown_disks(with_disks: WithDisks) -> None:
    async with with_disks("a", "b") as (_, control):
        with pytest.raises(NotFound, match="no disk 'c' is protected; there are: a, b"):
            await control.disk("c")


# -------------------------------------------------------------------------------------------- start


async def test_disks_are_there_after_a_restart(world: World, with_disks: WithDisks) -> None:
    async with with_disks("a", "b"):
        pass
    ready: list[str] = []
    async with trio.open_nursery() as nursery:
        daemon = Daemon(world.options())
        nursery.start_soon(daemon.run, ready.append)
        await until(lambda: bool(ready))
        daemon.stopping.set()
    assert ready == ["ready: a is served; b is served"]


@pytest.mark.expect_log("bad is not served")
async def test_a_broken_configuration_stops_nobody_else(
    world: World, with_disks: WithDisks
) -> None:
    bad = world.state_dir / "disks" / "bad"
    bad.mkdir(parents=True)
    (bad / "disk.json").write_text("{")
    async with with_disks("good") as (_, control):
        assert (await control.disk("good"))["state"] == "served"
        with pytest.raises(Conflict, match=r"bad is not usable: .*disk\.json"):
            await control.disk("bad")
        status = await control.status()
        assert list(status["broken"]) == ["bad"]
        checks = (await control.doctor())["checks"]
        assert [each["disk"] for each in checks if each["level"] == "fail"] == ["bad"]


@pytest.mark.expect_log("cannot be opened|does not exist")
async def test_a_backing_that_is_not_there_is_waited_for(
    short_tmp: Path, world: World, with_disks: WithDisks
) -> None:
    backing = short_tmp / "vm.img"
    backing.write_bytes(bytes(MIB))
    async with with_disks() as (_, control):
        await control.add_disk({"name": "vm", "backing": str(backing)})
    backing.rename(short_tmp / "away")
    async with with_disks() as (daemon, control):
        facts = await control.disk("vm")
        assert facts["state"] == "starting"
        assert "does not exist" in facts["reason"]
        (short_tmp / "away").rename(backing)
        await until(lambda: daemon.disks["vm"].recorder.is_ready)


@pytest.mark.expect_log("are needed: enlarge it")
async def test_a_backing_that_became_too_small_is_not_used(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0"):
        pass
    os.truncate(world.state_dir / "disks" / "disk0" / "backing.img", 4096)
    started = len(world.pids())
    async with with_disks() as (_, control):
        disk = await control.disk("disk0")
        assert not disk["served"]
        assert "has 4096 bytes, 1048576 are needed: enlarge it" in disk["reason"]
        assert len(world.pids()) == started


async def test_the_backing_is_guarded_while_a_recorder_lives(
    short_tmp: Path, with_disks: WithDisks, world: World
) -> None:
    """Also while there is no supervisor, and by one descriptor only."""
    backing = short_tmp / "vm.img"
    backing.write_bytes(bytes(MIB))

    def is_locked() -> bool:
        with open(backing) as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    async with with_disks(clean=False) as (daemon, control):
        await control.add_disk({"name": "vm", "backing": str(backing)})
        await until(lambda: daemon.disks["vm"].viewer.is_ready)
        assert is_locked()
    assert is_locked()
    async with with_disks():
        assert is_locked()
    assert not is_locked()


@pytest.mark.expect_log("has 2097152 bytes since a resize")
async def test_an_interrupted_resize_is_noted_down(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0"):
        pass
    status = {"served": True, "size": 2 * MIB}
    world.disk().behave("recorder", answers={"status": status})
    async with with_disks() as (daemon, _):
        assert daemon.disks["disk0"].config.size == 2 * MIB


# ------------------------------------------------------------------------------------------- change


async def test_settings_are_kept_and_told_to_who_needs_them(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0") as (daemon, control):
        disk = await control.set(
            "disk0", {"window": "2d", "tail": 256 * MIB, "sync-age": 0.5, "journal-limit": "20GiB"}
        )
        assert disk["window_configured"] == 2 * 86_400
        told = world.disk().params("recorder", "set")
        assert told == [{"tail_bytes": 256 * MIB, "sync_age_seconds": 0.5}]
        told = world.disk().params("curator", "set")
        assert told == [
            {"window_seconds": 2 * 86_400.0, "journal_limit": 20 << 30, "tail_bytes": 256 << 20}
        ]
        saved = load_disk(world.state_dir / "disks" / "disk0")
        assert saved == daemon.disks["disk0"].config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"windov": 1}, "there is no setting 'windov'"),
        ({"segment": 1 << 26}, "there is no setting 'segment'"),
        ({"window": "soon"}, "window: "),
        ({"tail": None}, "tail cannot be 'none'"),
        ({"tail": True}, "no number"),
        ({"sync-age": float("nan")}, "no number"),
        ({"journal-limit": 5}, "journal limit"),
        ({"overflow": 1}, "one of shrink"),
    ],
)
async def test_wrong_settings_change_nothing(
    world: World, with_disks: WithDisks, values: dict[str, Any], said: str
) -> None:
    async with with_disks("disk0") as (daemon, control):
        before = daemon.disks["disk0"].config
        with pytest.raises(InvalidInput, match=said):
            await control.set("disk0", {**values, "sync-age": values.get("sync-age", 0.5)})
        assert daemon.disks["disk0"].config == before
        assert world.disk().params("recorder", "set") == []


async def test_resize(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (_, control):
        assert (await control.resize("disk0", 5 * MIB))["size"] == 5 * MIB
        backing = world.state_dir / "disks" / "disk0" / "backing.img"
        assert backing.stat().st_size == 5 * MIB
        assert world.disk().params("recorder", "resize") == [{"size": 5 * MIB}]
        world.disk().behave("recorder", answers={"status": {"connections": 1}})
        with pytest.raises(Conflict, match=r"in use by 1 connection\(s\), which know its size"):
            await control.resize("disk0", MIB)
        world.disk().behave("recorder")
        await control.resize("disk0", MIB)
        assert backing.stat().st_size == 5 * MIB


async def test_operations_of_one_disk_exclude_each_other(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0") as (daemon, control):
        with daemon.disks["disk0"].exclusive("rolling back"):
            with pytest.raises(Busy, match="disk0 is busy: rolling back"):
                await control.resize("disk0", 2 * MIB)
        await control.resize("disk0", 2 * MIB)


# ------------------------------------------------------------------------------- releasing, taking


async def test_release_and_resume(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (_, control):
        assert (await control.release("disk0", silent)) == {"applied_seq": 100}
        told = [call["method"] for call in world.disk().calls() if call["role"] != "viewer"]
        order = ["drain", "release_masked", "gap_begin", "stop", "stop"]
        assert [method for method in told if method in order] == order
        facts = await control.disk("disk0")
        assert (facts["state"], facts["pids"]) == ("released", {})
        with pytest.raises(Conflict, match="cdp disk resume"):
            await control.drain("disk0", silent)
        with open(world.state_dir / "disks" / "disk0" / "backing.img") as backing:
            fcntl.flock(backing, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with pytest.raises(Busy, match="in use by another program"):
                await control.resume("disk0", True, False)
            assert (await control.disk("disk0"))["state"] == "released"
        facts = await control.resume("disk0", True, False)
        assert facts["state"] == "served"
        assert world.disk().params("recorder", "gap_end") == [{"unchanged": True}]
        assert world.disk().params("curator", "forget_history") == []


async def test_a_released_disk_stays_released(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (_, control):
        await control.release("disk0", silent)
    started = len(world.pids())
    async with with_disks() as (daemon, control):
        assert daemon.disks["disk0"].headline() == "disk0 is released"
        assert len(world.pids()) == started
        await control.resume("disk0", False, True)
        assert len(world.disk().params("curator", "forget_history")) == 1


async def test_a_disk_is_released_until_its_gap_has_an_end(
    world: World, with_disks: WithDisks
) -> None:
    """Else what is written afterwards would lie inside the gap, and be openable never."""
    async with with_disks("disk0") as (_, control):
        await control.release("disk0", silent)
        world.disk().behave("recorder", refuse={"gap_end": ["conflict", "not now"]})
        with pytest.raises(Conflict, match="not now"):
            await control.resume("disk0", True, False)
        facts = await control.disk("disk0")
        assert (facts["state"], facts["pids"]) == ("released", {})
        world.disk().behave("recorder")
        assert (await control.resume("disk0", True, False))["state"] == "served"


def is_locked(path: Path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


async def test_what_a_supervisor_that_died_on_the_way_left_running_is_stopped(
    world: World, with_disks: WithDisks
) -> None:
    """It is written down as released before the gap begins, and until the gap has an end."""
    async with with_disks("disk0", clean=False) as (daemon, _):
        children = daemon.disks["disk0"].children.values()
        await until(lambda: all(child.is_ready for child in children))
        daemon.disks["disk0"].change(released=True)
    async with with_disks() as (daemon, control):
        children = daemon.disks["disk0"].children.values()
        await until(lambda: [each["method"] for each in world.disk().calls()].count("stop") == 3)
        await until(lambda: not any(child.pid for child in children))
        assert (await control.disk("disk0"))["state"] == "released"
        await until(lambda: not is_locked(world.state_dir / "disks" / "disk0" / "backing.img"))
        assert (await control.resume("disk0", True, False))["state"] == "served"


@pytest.mark.parametrize(("unchanged", "give_up"), [(False, False), (True, True)])
async def test_somebody_must_know_what_happened(
    with_disks: WithDisks, unchanged: bool, give_up: bool
) -> None:
    async with with_disks("disk0") as (_, control):
        with pytest.raises(InvalidInput, match="say either"):
            await control.resume("disk0", unchanged, give_up)


async def test_history_is_not_given_up_by_mistake(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (_, control):
        with pytest.raises(Conflict, match="neither released nor waiting"):
            await control.resume("disk0", False, True)
        assert world.disk().params("curator", "forget_history") == []


async def test_after_a_foreign_write_the_administrator_decides(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0"):
        pass
    world.disk().behave("curator", state="failed", reason="somebody wrote: say resume")
    async with with_disks() as (daemon, control):
        disk = daemon.disks["disk0"]
        assert disk.headline() == "disk0 is not served: somebody wrote: say resume"
        assert (await control.disk("disk0"))["state"] == "failed"

        async def accepted() -> None:
            await until(lambda: bool(world.disk().params("curator", "accept_backing")))
            world.disk().behave("curator")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accepted)
            facts = await control.resume("disk0", False, True)
        assert facts["state"] == "served"
        assert world.disk().params("curator", "accept_backing") == [{"unchanged": False}]
        assert world.disk().params("recorder", "gap_end") == []


async def test_a_disk_in_use_is_not_released(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (_, control):
        await control.open_view("disk0", "seq:5", False)
        with pytest.raises(Conflict, match=r"0 connection\(s\) and 1 view\(s\)"):
            await control.release("disk0", silent)
        assert (await control.disk("disk0"))["state"] == "served"


# ----------------------------------------------------------------------------------------- removing


async def test_remove_keeps_the_content_and_deletes_the_history(
    short_tmp: Path, world: World, with_disks: WithDisks
) -> None:
    backing, journal = short_tmp / "vm.img", short_tmp / "journal"
    backing.write_bytes(bytes(MIB))
    async with with_disks() as (daemon, control):
        await control.add_disk({"name": "vm", "backing": str(backing), "journal": str(journal)})
        (journal / "redo" / "00000001.seg").touch()
        for name in ("catalog.0", "reserve", "reserve.tmp"):
            (journal / name).touch()
        (journal / "of-somebody-else").touch()
        for name in ("calls.log", "pids"):
            (world.state_dir / "disks" / "vm" / name).rename(short_tmp / name)
        result = await control.remove_disk("vm", False, False, silent)
        assert result == {"disk": "vm", "backing": str(backing)}
        assert list(daemon.disks) == []
    assert backing.exists()
    assert [path.name for path in journal.iterdir()] == ["of-somebody-else"]


@pytest.mark.parametrize("purge", [False, True])
async def test_the_own_backing_is_only_deleted_when_told(
    world: World, with_disks: WithDisks, purge: bool
) -> None:
    async with with_disks("disk0") as (_, control):
        await control.remove_disk("disk0", False, purge, silent)
        backing = world.state_dir / "disks" / "disk0" / "backing.img"
        assert backing.exists() is not purge
        if not purge:
            with pytest.raises(Conflict, match="name it with --backing"):
                await control.add_disk({"name": "disk0", "size": MIB})
            disk = await control.add_disk({"name": "disk0", "backing": str(backing)})
            assert disk["state"] == "served"


async def test_everything_is_applied_and_released_before(
    world: World, with_disks: WithDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "finish", lambda directory: None)
    async with with_disks("disk0") as (_, control):
        await control.remove_disk("disk0", False, False, silent)
        told = [call["method"] for call in world.disk().calls() if call["role"] != "viewer"]
        order = ["disconnect", "drain", "release_masked", "stop", "stop"]
        assert [method for method in told if method in order] == order
        assert removal.is_marked(world.state_dir / "disks" / "disk0")


async def test_a_disk_in_use_is_only_removed_by_force(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (daemon, control):
        await control.open_view("disk0", "seq:5", False)
        with pytest.raises(Conflict, match="in use"):
            await control.remove_disk("disk0", False, False, silent)
        await control.remove_disk("disk0", True, False, silent)
        assert list(daemon.disks) == []


@pytest.mark.expect_log("although not everything is applied")
async def test_a_disk_that_cannot_be_drained_is_only_removed_by_force(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0") as (daemon, control):
        world.disk().behave("curator", refuse={"drain": ["invalid", "apply is held: EIO"]})
        with pytest.raises(Conflict, match="apply is held: EIO; with --force"):
            await control.remove_disk("disk0", False, False, silent)
        assert list(daemon.disks) == ["disk0"]
        await control.remove_disk("disk0", True, False, silent)
        assert list(daemon.disks) == []


@pytest.mark.expect_log("is being removed: that is finished now")
async def test_an_interrupted_removal_is_finished_at_the_next_start(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0"):
        pass
    directory = world.state_dir / "disks" / "disk0"
    removal.mark(directory, purge=True)
    async with with_disks() as (daemon, _):
        assert list(daemon.disks) == []
        assert not (directory / "backing.img").exists()
        assert not (directory / "journal").exists()
        assert not (directory / removal.MARKER).exists()


def test_a_removal_may_be_finished_twice(tmp_path: Path) -> None:
    directory, journal = tmp_path / "disk0", tmp_path / "journal"
    directory.mkdir()
    (journal / "redo").mkdir(parents=True)
    config = {
        "name": "disk0",
        "uuid": "0" * 32,
        "size": 512,
        "block_size": 512,
        "backing": str(tmp_path / "backing"),
        "journal": str(journal),
    }
    for _ in range(2):
        directory.mkdir(exist_ok=True)
        (directory / removal.MARKER).write_text(json.dumps(config))
        removal.finish(directory)
        assert not directory.exists()
        assert not journal.exists()
    assert os.listdir(tmp_path) == []
