"""What programs on a protected disk need that outlives kills of `cdpd`: a client that comes back.

The kernel's file system is on a loop device on nbdfuse, as everywhere (`tests.interop.devices`),
but between nbdfuse and `cdpd` is QEMU, which connects again and resends when its server is gone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cdp.clock import SECOND_NS, STEP_NS_MIN
from tests.interop.commands import Commands, eventually
from tests.interop.daemon import Daemon
from tests.interop.devices import MAKE, WAIT_SECONDS, call, device, mounted, wait_for

FULL = bool(os.environ.get("CDP_CRASH_FULL"))
VICTIMS = ("recorder", "curator", "supervisor", "all")
RECONNECT_SECONDS = 90
TRIES = 50
# How far a program's reading of the wall clock may be from what a stamp is taken for.
SLACK_NS = STEP_NS_MIN


@contextmanager
def reconnecting(daemon: Daemon, name: str, folder: Path) -> Iterator[str]:
    """The URI of a disk that stays usable while `cdpd` is killed and started again."""
    socket = folder / "qemu.sock"
    source = {
        "driver": "raw",
        "file.driver": "nbd",
        "file.server.type": "unix",
        "file.server.path": daemon.directory / "nbd.sock",
        "file.export": name,
        "file.reconnect-delay": RECONNECT_SECONDS,
    }
    process = subprocess.Popen(
        ["qemu-nbd", "--persistent", "--shared=4", "--discard=unmap", f"--socket={socket}",
         "--image-opts", ",".join(f"{key}={value}" for key, value in source.items())]
    )  # fmt: skip
    try:
        wait_for(socket.exists, "qemu-nbd does not come up")
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


@contextmanager
def file_system(daemon: Daemon, name: str, folder: Path) -> Iterator[Path]:
    """A new ext4 on a disk, mounted through the client that comes back."""
    with reconnecting(daemon, name, folder) as uri, device(uri, folder / "fuse") as loop:
        call(*MAKE["ext4"], loop)
        with mounted(loop, folder / "mnt") as root:
            yield root


def victims(rng: random.Random, count: int) -> list[str]:
    """So many of VICTIMS; all at once comes first."""
    order = ["all", *rng.sample(VICTIMS[:-1], len(VICTIMS) - 1)]
    return (order * (count // len(order) + 1))[:count]


def kill(daemon: Daemon, name: str, victim: str) -> None:
    """SIGKILL of one of VICTIMS; what nobody else starts again is started."""
    if victim == "all":
        daemon.kill_all()
        daemon.start()
    elif victim == "supervisor":
        daemon.kill()
        daemon.start()
    else:
        role = f"{name}/{victim}"
        os.kill(eventually(lambda: daemon.children().get(role), f"no {role}"), signal.SIGKILL)


def bounds(at_ns: int, begun: Sequence[int], committed: Sequence[int]) -> tuple[int, int]:
    """How many transactions a point of this time has at least and at most, in wall-clock ns.

    `begun` and `committed`: when each began and was reported as committed, one after the other.
    """
    return bisect_left(committed, at_ns - SLACK_NS), bisect_right(begun, at_ns + SLACK_NS)


class Past:
    """Points of a disk, of those since now."""

    def __init__(self, daemon: Daemon, name: str, folder: Path, rng: random.Random) -> None:
        self._cdp, self._name, self._folder, self._rng = (
            Commands(daemon.directory), name, folder, rng,
        )  # fmt: skip
        self._cdp("bookmark", "add", name, "ready")
        (mark,) = self._cdp.json("bookmark", "list", name)
        self._first = (int(mark["seq"]), int(mark["time"] * SECOND_NS) + SLACK_NS)
        self.opened = self.refused = 0

    @contextmanager
    def random(self) -> Iterator[tuple[Path, int]]:
        """The file system as of a random point, and that point's time (wall clock, ns).

        Half of the points are named by seq, half by time. A point that is refused because it was
        given up, or lies in a hole that a crash left, is replaced by another one.
        """
        for _ in range(TRIES):
            spec, at_ns = self._choose()
            words = ("view", "open", self._name, "--at", spec, "--writable", "--json")
            ran = self._cdp.run(*words)
            if ran.status == 0:
                with self._mounted(ran.out, at_ns) as found:
                    yield found
                return
            assert "openable" in ran.err, ran.err
            self.refused += 1
        raise AssertionError(f"{TRIES} points one after the other were refused: {ran.err}")

    @contextmanager
    def now(self) -> Iterator[Path]:
        """The file system as it is at this moment."""
        out = self._cdp("view", "open", self._name, "--at", "now", "--writable", "--json")
        with self._mounted(out, None) as (root, _):
            yield root

    def _choose(self) -> tuple[str, int | None]:
        status = eventually(self._known, "cdpd does not say what can be opened")
        seqs = range(max(self._first[0], status["window_start_seq"]), status["durable_seq"] + 1)
        if self._rng.random() < 0.5:
            return f"seq:{self._rng.choice(seqs)}", None
        first_ns = max(self._first[1], int(status["window_start"] * SECOND_NS))
        at_ns = self._rng.randrange(first_ns, time.time_ns())
        return f"@{at_ns // SECOND_NS}.{at_ns % SECOND_NS:09d}", at_ns

    def _known(self) -> dict[str, Any] | None:
        status = self._cdp.disk(self._name)
        return None if status["window_start"] is None else status

    @contextmanager
    def _mounted(self, opened: str, at_ns: int | None) -> Iterator[tuple[Path, int]]:
        view: dict[str, Any] = json.loads(opened)
        place = self._folder / "past"
        place.mkdir(exist_ok=True)
        try:
            with device(view["uri"], place / "fuse") as loop, mounted(loop, place / "mnt") as root:
                self.opened += 1
                try:
                    yield root, at_ns or int(view["time"] * SECOND_NS)
                except BaseException as error:
                    error.add_note(f"seen at {view}")
                    raise
        finally:
            self._cdp("view", "close", view["id"])
