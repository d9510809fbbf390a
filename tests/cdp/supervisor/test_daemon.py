"""From the command line to a clean stop; status, metrics and the clock's care."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

import pytest
import trio

from cdp.api.metrics import render
from cdp.clock import SECOND_NS, Sources
from cdp.supervisor import control as controls
from cdp.supervisor import daemon as daemons
from cdp.supervisor.control import DaemonControl
from cdp.supervisor.daemon import Daemon
from cdp.supervisor.lock import StateLock
from cdp.supervisor.main import parse_arguments
from journal.errors import Busy, InvalidInput
from tests.cdp.supervisor.conftest import World, until

WithDisks = Callable[..., AbstractAsyncContextManager[tuple[Daemon, DaemonControl]]]
CDPD = (sys.executable, "-m", "cdp.supervisor.main")


@contextmanager
def cdpd(state_dir: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A real daemon without disks; the test stops it."""
    process = subprocess.Popen(
        [*CDPD, "--state-dir", os.fspath(state_dir), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ready_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_that_it_is_ready_and_stops_cleanly(
    short_tmp: Path, number: signal.Signals
) -> None:
    with cdpd(short_tmp / "state") as process:
        assert ready_line(process) == "cdpd: ready\n"
        mode = (short_tmp / "state" / "control.sock").stat().st_mode
        assert oct(mode & 0o777) == "0o600"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (0, "")
        assert err.rstrip().endswith("stopped")
        assert not (short_tmp / "state" / "control.sock").exists()


def test_a_second_one_is_refused_in_one_line(short_tmp: Path) -> None:
    state = short_tmp / "state"
    with cdpd(state) as first:
        ready_line(first)
        with cdpd(state) as second:
            out, err = second.communicate(timeout=20)
        assert (second.returncode, out) == (1, "")
        assert err == (
            f"cdpd: a cdpd is running for {state} already (process {first.pid}): "
            "use it, or stop it first\n"
        )
        assert first.poll() is None


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--config", "/nowhere.toml"], 1, "cdpd: /nowhere.toml cannot be read"),
        (["--nbd", "unix:///x"], 1, "write tcp://HOST:PORT"),
        (["--nbd", "tcp://0.0.0.0:0"], 1, "say --allow-remote-without-tls"),
        (["--http", "[::]:0"], 1, "say --allow-remote-without-tls"),
        (["--http", "9464"], 1, "is no address"),
        (["--nbd", "tcp://127.0.0.1:99999"], 1, "is no address"),
        (["--bogus"], 2, "usage: cdpd"),
    ],
)
def test_what_cannot_be_started(
    short_tmp: Path, options: list[str], status: int, said: str
) -> None:
    with cdpd(short_tmp / "state", *options) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (status, "")
    assert said in err
    if status == 1:
        assert len(err.splitlines()) == 1


def test_an_address_in_use(short_tmp: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with cdpd(short_tmp / "state", "--nbd", f"tcp://127.0.0.1:{port}") as process:
            _, err = process.communicate(timeout=20)
    assert "another program does" in err


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cdp.toml"
    path.write_text('nbd = "tcp://127.0.0.1:1"\nhttp = "127.0.0.1:2"\n')
    options = parse_arguments(
        ["--state-dir", "relative", "--config", str(path), "--http", "127.0.0.1:3"]
    )
    assert options.state_dir == Path.cwd() / "relative"
    assert options.nbd == ("tcp://127.0.0.1:1",)
    assert options.http == "127.0.0.1:3"
    assert not options.allow_remote_without_tls


# -------------------------------------------------------------------------------------------- lock


def test_the_lock_is_free_when_its_process_is_gone(tmp_path: Path) -> None:
    lock = StateLock.take(tmp_path)
    with pytest.raises(Busy, match=str(os.getpid())):
        StateLock.take(tmp_path)
    lock.close()
    StateLock.take(tmp_path).close()


def test_a_state_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="cannot be used: Not a directory"):
        StateLock.take(tmp_path / "file" / "below")


async def test_a_start_that_fails_leaves_the_lock_and_sockets_free(world: World) -> None:
    with pytest.raises(InvalidInput):
        Daemon(world.options(nbd=("tcp://0.0.0.0:0",)))
    StateLock.take(world.state_dir).close()


# -------------------------------------------------------------------------------------------- life


async def test_a_stop_does_not_wait_for_disks_that_do_not_come_up(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0"):
        pass
    world.disk().behave("recorder", state="starting", reason="copies")
    lines: list[str] = []
    async with trio.open_nursery() as nursery:
        daemon = Daemon(world.options())
        nursery.start_soon(daemon.run, lines.append)
        await until(lambda: daemon.disks["disk0"].recorder.reason == "copies")
        daemon.stopping.set()
    assert lines == []
    assert world.disk().methods("recorder")[-1] == "stop"


async def test_a_clean_stop_applies_everything_and_leaves_nobody(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("a", "b"):
        pass
    for name in "ab":
        told = [call["role"] for call in world.disk(name).calls() if call["method"] == "stop"]
        assert told in (["viewer", "recorder", "curator"], ["recorder", "curator"])
        assert world.disk(name).params("curator", "stop") == [{"drain": True}]
    for pid in world.pids():
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


@pytest.mark.expect_log("before everything is applied: apply is held: EIO")
@pytest.mark.expect_log("is left running: apply is held: EIO")
async def test_what_cannot_be_applied_does_not_keep_the_host_from_going_down(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0"):
        world.disk().behave("curator", refuse={"stop": ["invalid", "apply is held: EIO"]})
    assert world.disk().params("curator", "stop") == [{"drain": True}, {"drain": False}]


async def test_ceiling_and_steps_reach_the_disks(
    world: World, with_disks: WithDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemons, "CLOCK_SECONDS", 0.01)
    ahead = 0
    real = Sources()
    sources = Sources(real.boottime_ns, lambda: real.wall_ns() + ahead, real.boot_id)
    async with with_disks("disk0", sources=sources) as (daemon, _):
        published: list[int] = []
        disk = daemon.disks["disk0"]
        monkeypatch.setattr(
            type(disk), "publish_ceiling", lambda self: published.append(daemon.clock.ceiling_ns)
        )
        monkeypatch.setattr(
            "cdp.clock.CEILING_RENEW_NS", 2 * 3600 * SECOND_NS
        )  # as if half an hour had passed
        await until(lambda: bool(published))
        monkeypatch.setattr("cdp.clock.CEILING_RENEW_NS", 0)
        ahead = 100 * SECOND_NS
        await until(lambda: len(world.disk().params("curator", "note_clock")) == 2)
        entries = world.disk().params("curator", "note_clock")[-1]["entries"]
        assert abs(entries[-1][1] - entries[-2][1] - 100 * SECOND_NS) < SECOND_NS
    stored = json.loads((world.state_dir / "host.json").read_text())
    assert stored["ceiling_ns"] - daemon.clock.now() < 10 * SECOND_NS


# ------------------------------------------------------------------------------------------ status


async def test_status(world: World, with_disks: WithDisks) -> None:
    curator = {
        "applied": 90,
        "durable": 100,
        "floor": 7,
        "window_start": 8,
        "window_start_stamp": 1,
        "oldest_unapplied_stamp": 1,
        "journal_bytes": 123,
        "bookmarks": 3,
    }
    async with with_disks("disk0") as (daemon, control):
        now = daemon.clock.now()
        curator["window_start_stamp"] = curator["oldest_unapplied_stamp"] = now - 5 * SECOND_NS
        world.disk().behave("curator", answers={"status": curator})
        status = await control.status()
        assert status["pid"] == os.getpid()
        assert status["nbd"] == [f"nbd+unix:///?socket={world.state_dir}/nbd.sock"]
        (disk,) = status["disks"]
        assert disk["state"] == "served"
        assert (disk["durable_seq"], disk["applied_seq"], disk["floor_seq"]) == (100, 90, 7)
        assert (disk["window_start_seq"], disk["journal_bytes"]) == (8, 123)
        assert 5 <= disk["window_seconds"] < 30
        assert 5 <= disk["apply_lag_seconds"] < 30
        assert disk["restarts"] == {"recorder": 0, "curator": 0, "viewer": 0}
        assert {"recorder", "curator"} <= set(disk["pids"])
        assert {"overflow", "lag_bytes", "connections", "views", "uuid"} <= disk.keys()


@pytest.mark.parametrize(
    ("recorder", "curator", "state"),
    [
        ({"served": True}, {}, "served"),
        ({"served": True, "throttled": True}, {}, "throttled"),
        ({"served": True}, {"throttled": True}, "throttled"),
        ({"served": True}, {"degraded": True, "trouble": "EIO"}, "degraded"),
        ({"served": False, "poisoned": True}, {}, "poisoned"),
        ({"served": False, "reason": "it is being rolled back"}, {}, "rolling-back"),
        ({"served": False, "reason": "writes were lost"}, {}, "failed"),
    ],
)
async def test_states(
    world: World,
    with_disks: WithDisks,
    recorder: dict[str, object],
    curator: dict[str, object],
    state: str,
) -> None:
    async with with_disks("disk0") as (_, control):
        world.disk().behave("recorder", answers={"status": recorder})
        world.disk().behave("curator", answers={"status": curator})
        disk = await control.disk("disk0")
        assert disk["state"] == state
        assert disk["reason"] == (recorder.get("reason") or curator.get("trouble"))


async def test_writes_that_wait_for_space_outrank_what_else_is_wrong(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0") as (daemon, control):
        curator = {"degraded": True, "trouble": "apply is held: no space"}
        world.disk().behave("curator", answers={"status": curator})
        recorder = {"served": True, "held_seconds": 12.3, "trouble": "no space to append"}
        world.disk().behave("recorder", answers={"status": recorder})
        disk = await control.disk("disk0")
        assert (disk["state"], disk["degraded"], disk["served"]) == ("throttled", True, True)
        assert disk["held_seconds"] == 12.3
        assert disk["reason"] == "writes have waited for 12 s: no space to append"
        facts = await control.metrics()
        assert 'cdp_disk_held_seconds{disk="disk0"} 12.3' in render(facts).decode()
        # What became of the curator comes after what the recorder knows.
        daemon.disks["disk0"].curator.reason = "its process ended"
        assert (await control.disk("disk0"))["reason"] == disk["reason"]
        daemon.disks["disk0"].curator.reason = None
        # The curator has no room for them, and says why; for a moment only it is nothing special.
        world.disk().behave("recorder", answers={"status": recorder | {"trouble": None}})
        disk = await control.disk("disk0")
        assert disk["reason"] == "writes have waited for 12 s: apply is held: no space"
        shortly = {"served": True, "held_seconds": 0.3}
        world.disk().behave("recorder", answers={"status": shortly})
        assert (await control.disk("disk0"))["reason"] == "apply is held: no space"


async def test_a_stuck_process_costs_a_scrape_a_moment_and_shows(
    world: World, with_disks: WithDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "STATUS_SECONDS", 0.2)
    monkeypatch.setattr(daemons, "REFRESH_SECONDS", 3600.0)
    async with with_disks("disk0", clean=False) as (_, control):
        world.disk().behave("recorder", answers={"status": {"served": True, "writes": 7}})
        await control.metrics()
        world.disk().behave("recorder", hang_on="status")
        with trio.fail_after(10):
            facts = await control.metrics()
        assert facts.disks[0].recorder["writes"] == 7
        assert facts.disks[0].status_age_seconds >= 0.2
        assert 'cdp_disk_writes_total{disk="disk0"} 7.0' in render(facts).decode()


async def test_points_and_timeline_confirm_what_was_just_written(
    world: World, with_disks: WithDisks
) -> None:
    async with with_disks("disk0") as (_, control):
        await control.timeline("disk0", 10, "@5", "seq:7")
        (params,) = world.disk().params("curator", "timeline")
        assert params["from_ns"] == 5 * SECOND_NS
        assert params["to_ns"] == 10**18 + 7
        await control.points("disk0", None, None, 50)
        (params,) = world.disk().params("curator", "points")
        assert (params["from"], params["to"], params["limit"]) == ("seq:0", "now", 50)
        assert world.disk().methods("recorder").count("sync") == 2


async def test_doctor(world: World, with_disks: WithDisks) -> None:
    async with with_disks("disk0") as (_, control):
        levels = {each["name"]: each["level"] for each in (await control.doctor())["checks"]}
        assert {name: level for name, level in levels.items() if level == "fail"} == {}
        assert {"state-dir", "recorder", "curator", "served", "backing", "journal"} <= set(levels)
        image = world.state_dir / "disks" / "disk0" / "backing.img"
        image.rename(world.state_dir / "moved")
        image.write_bytes(bytes(1 << 20))
        (said,) = (each for each in (await control.doctor())["checks"] if each["name"] == "backing")
        assert said["level"] == "fail"
        assert f"{image} was replaced" in said["message"]
        image.unlink()
        os.chmod(world.state_dir, 0o777)
        world.disk().behave("recorder", answers={"status": {"served": False, "poisoned": True}})
        checks = (await control.doctor())["checks"]
        found = {each["name"] for each in checks if each["level"] != "ok"}
        assert {"state-dir", "served", "journal-sync", "backing"} <= found
        assert all("\n" not in each["message"] for each in checks)
