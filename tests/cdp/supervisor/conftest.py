"""A daemon as tasks of the test, with processes that only pretend to serve disks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from cdp.config import DaemonConfig
from cdp.supervisor.children import Launcher, Role
from cdp.supervisor.control import DaemonControl
from cdp.supervisor.daemon import Daemon, Options
from cdp.supervisor.disks import AddRequest

FAKE_CHILD = Path(__file__).with_name("fake_child.py")
WAIT_SECONDS = 20.0


def fake_launcher() -> Launcher:
    """Starts fake children."""
    command = (sys.executable, "-I", os.fspath(FAKE_CHILD))
    return Launcher({role: (*command, str(role)) for role in Role})


class FakeDisk:
    """What a test does to, and sees of, the fake processes of one disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def behave(self, role: str, **behaviour: Any) -> None:
        """From its next call on, also of a process that is not started yet."""
        path = self.directory / f"{role}.behaviour"
        path.with_suffix(".new").write_text(json.dumps(behaviour))
        path.with_suffix(".new").rename(path)

    def calls(self, role: str | None = None) -> list[dict[str, Any]]:
        """Calls so far, without `hello` and `status`."""
        try:
            lines = (self.directory / "calls.log").read_text().splitlines()
        except FileNotFoundError:
            return []
        entries = [json.loads(line) for line in lines]
        return [entry for entry in entries if role in (None, entry["role"])]

    def methods(self, role: str) -> list[str]:
        """Just their names."""
        return [entry["method"] for entry in self.calls(role)]

    def params(self, role: str, method: str) -> list[dict[str, Any]]:
        """The parameters of all calls of one method."""
        return [entry["params"] for entry in self.calls(role) if entry["method"] == method]

    def pins(self) -> set[str]:
        """What is pinned."""
        try:
            return set(json.loads((self.directory / "pins.json").read_text()))
        except FileNotFoundError:
            return set()


class World:
    """A state directory, and the daemons that come and go on it."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.config = DaemonConfig()

    def disk(self, name: str = "disk0") -> FakeDisk:
        """The fake processes of a disk."""
        return FakeDisk(self.state_dir / "disks" / name)

    def options(self, **values: Any) -> Options:
        """A daemon with fake children."""
        return Options(
            state_dir=self.state_dir, config=self.config, launcher=fake_launcher(), **values
        )

    @asynccontextmanager
    async def daemon(self, *, clean: bool = True, **values: Any) -> AsyncIterator[Daemon]:
        """A daemon that is ready; at the end it stops cleanly, or just dies."""
        ready = trio.Event()
        async with trio.open_nursery() as nursery:
            daemon = Daemon(self.options(**values))
            nursery.start_soon(daemon.run, lambda line: ready.set())
            with trio.fail_after(WAIT_SECONDS):
                await ready.wait()
            yield daemon
            if clean:
                daemon.stopping.set()
            else:
                nursery.cancel_scope.cancel()

    def pids(self) -> list[int]:
        """All fake processes that were ever started here."""
        found = []
        for path in self.state_dir.glob("disks/*/pids"):
            found += [int(line) for line in path.read_text().split()]
        return found


@pytest.fixture
def world(short_tmp: Path) -> Iterator[World]:
    """An empty state directory; no process of it is left."""
    world = World(short_tmp / "state")
    yield world
    for pid in world.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


@pytest.fixture
def with_disks(
    world: World,
) -> Callable[..., AbstractAsyncContextManager[tuple[Daemon, DaemonControl]]]:
    """`with_disks("a", "b")`: a daemon with these disks, of 1 MiB each."""

    @asynccontextmanager
    async def run(*names: str, **values: Any) -> AsyncIterator[tuple[Daemon, DaemonControl]]:
        async with world.daemon(**values) as daemon:
            for name in names:
                if name not in daemon.disks:
                    await daemon.disks.add(AddRequest(name, size=1 << 20))
            yield daemon, DaemonControl(daemon)

    return run


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what another process does; there is nothing else to wait for."""
    with trio.fail_after(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)
