"""Processes are started, adopted, watched, restarted; none is ever declared dead by a time-out."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from cdp.supervisor import children
from cdp.supervisor.children import Child, Hooks, Role, State
from journal.errors import Busy, CdpError, Conflict
from tests.cdp.supervisor.conftest import FakeDisk, World, fake_launcher, until

UUID = "0123456789abcdef0123456789abcdef"


class FileBacking:
    """A backing that counts how often it was opened, and keeps what it is handed."""

    def __init__(self, path: Path) -> None:
        self.path, self.opened = path, 0
        self.fd: int | None = None
        path.touch()

    def acquire(self) -> int:
        if self.fd is None:
            self.fd = os.open(self.path, os.O_RDWR)
            self.opened += 1
        return self.fd

    def offer(self, fd: int) -> None:
        if self.fd is None:
            self.fd = fd
        else:
            os.close(fd)

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Stage:
    """One disk directory, and children of it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "disk.json").write_text(json.dumps({"uuid": UUID}))
        self.directory, self.fake = directory, FakeDisk(directory)
        self.backing = FileBacking(directory / "backing.img")

    def child(self, hooks: Hooks | None = None) -> Child:
        return Child(
            Role.RECORDER,
            "disk0",
            self.directory,
            UUID,
            launcher=fake_launcher(),
            clock_offset_ns=12345,
            backing=self.backing,
            hooks=hooks,
        )

    @asynccontextmanager
    async def running(self, child: Child, *, adopts: bool = False) -> AsyncIterator[Child]:
        """Its task; the process stays at the end, as when a supervisor dies."""
        if adopts:
            assert await child.adopt()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.run)
            yield child
            nursery.cancel_scope.cancel()
        self.backing.close()


@pytest.fixture
def stage(world: World) -> Stage:
    return Stage(world.state_dir / "disks" / "disk0")


def kill(child: Child) -> None:
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether it runs; what has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def ready(child: Child) -> None:
    child.want()
    with trio.fail_after(20):
        await child.wait_ready()


# -------------------------------------------------------------------------------------------- start


async def test_it_is_started_with_what_it_needs(stage: Stage) -> None:
    async with stage.running(stage.child()) as child:
        assert str(child.state) == "stopped"
        await ready(child)
        assert child.pid is not None
        # No signal to us is one to it, and standard output is for who started us.
        assert os.getsid(child.pid) == child.pid
        assert os.readlink(f"/proc/{child.pid}/fd/1") == os.readlink("/proc/self/fd/2")
        assert stage.fake.calls()[0]["params"]["offset"] == "12345"
        held = os.readlink(f"/proc/{child.pid}/fd/{stage.backing.fd}")
        assert held == os.fspath(stage.backing.path)


async def test_it_is_ready_when_it_says_so(stage: Stage) -> None:
    stage.fake.behave("recorder", state="starting", reason="copies 5 of 9 MB")
    async with stage.running(stage.child()) as child:
        child.want()
        await until(lambda: child.reason == "copies 5 of 9 MB")
        assert str(child.state) == "starting"
        stage.fake.behave("recorder")
        with trio.fail_after(20):
            await child.wait_ready()
        assert child.reason is None


async def test_one_that_says_it_will_not_work_is_not_restarted(stage: Stage) -> None:
    stage.fake.behave("recorder", state="failed", reason="somebody else wrote: say resume")
    async with stage.running(stage.child()) as child:
        child.want()
        with trio.fail_after(20):
            await child.settled.wait()
        with pytest.raises(Conflict, match="disk0: somebody else wrote: say resume"):
            await child.wait_ready()
        with pytest.raises(Conflict, match="say resume"):
            await child.call("sync")
        assert child.restarts == 0
        stage.fake.behave("recorder")
        await until(lambda: child.is_ready)


@pytest.mark.expect_log("what answers as the recorder of disk0")
async def test_another_disks_process_is_not_taken_for_ours(stage: Stage) -> None:
    stage.fake.behave("recorder", uuid="f" * 32)
    async with stage.running(stage.child()) as child:
        child.want()
        await until(lambda: "what answers" in (child.reason or ""))
        assert not child.is_ready


# ------------------------------------------------------------------------------------------ restart


@pytest.mark.expect_log("its process was ended by SIGKILL")
async def test_a_killed_process_is_replaced(stage: Stage) -> None:
    async with stage.running(stage.child()) as child:
        await ready(child)
        first = child.pid
        kill(child)
        await until(lambda: child.is_ready and child.pid != first)
        assert child.restarts == 1
        assert stage.backing.opened == 1


@pytest.mark.expect_log("its process ended with status 9")
async def test_restarts_become_rarer(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def pause(child: Child, seconds: float) -> None:
        pauses.append(seconds)
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Child, "_pause", pause)
    monkeypatch.setattr(children, "CONNECT_SECONDS_MAX", 0.02)
    stage.fake.behave("recorder", exit=9)
    async with stage.running(stage.child()) as child:
        child.want()
        await until(lambda: len(pauses) >= 9)
        assert pauses[:9] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
        assert child.settled.is_set()
        assert "status 9" in str(child.reason)


async def test_a_successor_waits_for_the_lock_and_not_for_a_time(stage: Stage) -> None:
    """A predecessor that hangs in the kernel keeps its lock, though nothing of it answers."""
    with open(stage.directory / "recorder.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        async with stage.running(stage.child()) as child:
            child.want()
            await until((stage.directory / "pids").exists)
            assert stage.fake.calls() == []
            assert str(child.state) == "starting"
            fcntl.flock(lock, fcntl.LOCK_UN)
            with trio.fail_after(20):
                await child.wait_ready()
            assert len((stage.directory / "pids").read_text().split()) == 1


# ----------------------------------------------------------------------------------------- adoption


async def test_a_living_process_is_adopted_with_the_backing(stage: Stage) -> None:
    async with stage.running(stage.child()) as child:
        await ready(child)
        first = child.pid
    child = stage.child()
    child.want()
    async with stage.running(child, adopts=True):
        await ready(child)
        assert child.pid == first
        assert stage.backing.opened == 1
        assert stage.backing.fd is not None
        assert os.fstat(stage.backing.fd).st_ino == stage.backing.path.stat().st_ino
        assert child.restarts == 0


@pytest.mark.expect_log("its process has ended")
async def test_an_adopted_process_is_watched_as_well(stage: Stage) -> None:
    async with stage.running(stage.child()) as child:
        await ready(child)
        first = child.pid
    child = stage.child()
    child.want()
    async with stage.running(child, adopts=True):
        await ready(child)
        kill(child)
        await until(lambda: child.is_ready and child.pid != first)
        assert child.restarts == 1


async def test_there_is_nobody_to_adopt(stage: Stage) -> None:
    assert not await stage.child().adopt()


# --------------------------------------------------------------------------------------------- stop


async def test_a_clean_stop(stage: Stage) -> None:
    async with stage.running(stage.child()) as child:
        await ready(child)
        pid = child.pid
        with trio.fail_after(20):
            await child.stop({"drain": True})
        assert str(child.state) == "stopped"
        assert stage.fake.params("recorder", "stop") == [{"drain": True}]
        with pytest.raises(Conflict, match="recorder is stopped"):
            await child.call("sync")
        await ready(child)
        assert child.pid != pid
        assert child.restarts == 0


async def test_one_that_never_came_up_is_stopped(stage: Stage) -> None:
    """It waits for a predecessor, which is waited for as well."""
    with open(stage.directory / "recorder.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        async with stage.running(stage.child()) as child, trio.open_nursery() as nursery:
            child.want()
            await until((stage.directory / "pids").exists)
            nursery.start_soon(child.stop)
            pid = int((stage.directory / "pids").read_text())
            await until(lambda: not is_alive(pid))
            assert str(child.state) == "starting"
            fcntl.flock(lock, fcntl.LOCK_UN)
    assert stage.fake.calls() == []


@pytest.mark.expect_log("not today")
async def test_one_that_we_gave_up_on_is_stopped_as_well(stage: Stage) -> None:
    """Seen with a curator whose start was refused by ours: it went on after a clean stop."""

    async def refuse(child: Child, hello: dict[str, Any]) -> None:
        raise Conflict("not today")

    async with stage.running(stage.child(Hooks(ready=refuse))) as child:
        child.want()
        await until(lambda: child.reason == "not today")
        pid = child.pid
        with trio.fail_after(20):
            await child.stop()
    assert stage.fake.methods("recorder")[-1] == "stop"
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_one_that_a_dead_supervisor_just_started_is_not_left(stage: Stage) -> None:
    """Seen with a viewer: not there yet to be adopted, and there when the backing was let go."""
    async with stage.running(stage.child()) as child:
        child.want()
        await until(lambda: bool(stage.fake.calls()))
    async with stage.running(stage.child()) as child:
        child.want()
        with trio.fail_after(20):
            await child.stop()
    # Its lock is free a moment before it is gone.
    for pid in map(int, (stage.directory / "pids").read_text().split()):
        await until(lambda pid=pid: not is_alive(pid))  # type: ignore[misc]


async def test_one_that_does_not_want_to_stop_goes_on(stage: Stage) -> None:
    async with stage.running(stage.child()) as child:
        await ready(child)
        stage.fake.behave("recorder", refuse={"stop": ["conflict", "apply is held"]})
        with pytest.raises(Conflict, match="apply is held"):
            await child.stop()
        assert child.is_ready
        stage.fake.behave("recorder")
        await child.stop()


# -------------------------------------------------------------------------------------------- calls


@pytest.mark.expect_log("its process ended with status 3")
async def test_a_call_that_may_be_repeated_survives_a_restart(stage: Stage) -> None:
    async with stage.running(stage.child()) as child:
        await ready(child)
        stage.fake.behave("recorder", die_on="sync")
        async with trio.open_nursery() as nursery:
            result: dict[str, Any] = {}

            async def ask() -> None:
                result.update((await child.call("sync", again=True)).result)

            nursery.start_soon(ask)
            await until(lambda: "sync" in stage.fake.methods("recorder"))
            stage.fake.behave("recorder")
        assert result["durable"] == 100


@pytest.mark.expect_log("its process ended with status 3", required=False)
async def test_a_call_that_may_not_be_repeated_is_lost_with_its_process(stage: Stage) -> None:
    async with stage.running(stage.child()) as child:
        await ready(child)
        stage.fake.behave("recorder", die_on="sync")
        with pytest.raises(CdpError, match="ended before it answered sync"):
            await child.call("sync")


async def test_a_call_waits_for_a_process_that_is_coming_up(stage: Stage) -> None:
    async with stage.running(stage.child()) as child:
        child.want()
        await until(lambda: child.state is State.STARTING)
        assert (await child.call("sync")).result["durable"] == 100


async def test_a_call_does_not_wait_for_ever(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "CALL_PATIENCE_SECONDS", 0.05)
    stage.fake.behave("recorder", state="starting", reason="copies")
    async with stage.running(stage.child()) as child:
        child.want()
        with pytest.raises(Busy, match="recorder is starting"):
            await child.call("sync")
