"""The machine fails: devices with errors, devices that hang, read-only file systems, limits.

Real ones: nbdkit's error and pause filters below a loop device, file systems that are shut down,
resource limits. Each time: what is affected says so, everything else goes on, nothing acknowledged
and flushed is lost, and the daemon can be stopped.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from cdp.nbd.client import NbdClient, NbdNegotiationError, NbdServerError
from tests.interop.commands import Commands, eventually
from tests.interop.daemon import Daemon
from tests.interop.devices import call, mounted
from tests.interop.faulty_device import Faulty, faulty

MIB = 1 << 20
SIZE = 4 * MIB
CHUNK = 16 << 10
GONE = (OSError, NbdServerError, NbdNegotiationError, EOFError)


@pytest.fixture
def may_mount(not_here: Callable[[str], Any]) -> None:
    """Mounting needs root, FUSE and loop devices."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        not_here("mounting needs root and /dev/fuse")


pytestmark = [
    pytest.mark.usefixtures("may_mount"),
    pytest.mark.needs_tool("nbdkit", "nbdfuse", "losetup", "mkfs.ext4", "mkfs.xfs", "xfs_io"),
]


class Content:
    """What the disk has to hold."""

    def __init__(self, daemon: Daemon, rng: random.Random, name: str = "d") -> None:
        self._daemon, self._rng, self.name = daemon, rng, name
        self.disk = bytearray(SIZE)

    def write(self, client: NbdClient, count: int) -> None:
        """Chunks anywhere."""
        for _ in range(count):
            at = self._rng.randrange(SIZE // CHUNK) * CHUNK
            data = self._rng.randbytes(CHUNK)
            client.write(at, data)
            self.disk[at : at + CHUNK] = data

    def connect(self) -> NbdClient:
        """A client."""
        return NbdClient.connect(self._daemon.uri(self.name), timeout=60)

    def check(self) -> None:
        """It holds that."""
        with self.connect() as client:
            assert client.read(0, SIZE) == self.disk


def test_a_backing_that_cannot_be_written(short_tmp: Path, seed: int) -> None:
    """Writes are acknowledged and read back; it is said; afterwards all is written again."""
    with faulty(short_tmp / "dev", SIZE) as dev, Daemon(short_tmp / "state") as daemon:
        cdp, content = Commands(daemon.directory), Content(daemon, random.Random(seed))
        cdp("disk", "add", "d", "--backing", dev.loop)
        with content.connect() as client:
            content.write(client, 50)
            client.flush()
            cdp("disk", "drain", "d")
            dev.fails("pwrite")
            content.write(client, 50)
            client.flush()
            eventually(lambda: cdp.disk("d")["state"] == "degraded", lambda: cdp.disk("d"))
            assert "backing" in cdp.disk("d")["reason"]
            content.write(client, 50)
            client.flush()
            content.check()
            dev.fails()
            eventually(lambda: cdp.disk("d")["state"] == "served", lambda: cdp.disk("d"))
            content.check()
        cdp("disk", "release", "d")
        cdp("disk", "remove", "d", "--yes")
        call("blockdev", "--flushbufs", dev.loop)
        assert dev.image.read_bytes() == content.disk


def test_a_backing_that_cannot_be_read(short_tmp: Path, seed: int) -> None:
    """Reads of it are errors, reads of the journal are not; nothing is overwritten unsaved."""
    rng = random.Random(seed)
    old = rng.randbytes(SIZE)
    with faulty(short_tmp / "dev", SIZE) as dev, Daemon(short_tmp / "state") as daemon:
        cdp, content = Commands(daemon.directory), Content(daemon, rng)
        dev.image.write_bytes(old)
        content.disk[:] = old
        cdp("disk", "add", "d", "--backing", dev.loop)
        dev.fails("pread")
        call("blockdev", "--flushbufs", dev.loop)
        with content.connect() as client:
            content.write(client, 20)
            client.flush()
            untouched = next(
                at
                for at in range(0, SIZE, CHUNK)
                if content.disk[at : at + CHUNK] == old[at : at + CHUNK]
            )
            with pytest.raises(NbdServerError) as caught:
                client.read(untouched, CHUNK)
            assert caught.value.errno == errno.EIO
            eventually(lambda: cdp.disk("d")["state"] == "degraded", lambda: cdp.disk("d"))
            dev.fails()
            assert client.read(untouched, CHUNK) == old[untouched : untouched + CHUNK]
            eventually(lambda: cdp.disk("d")["state"] == "served", lambda: cdp.disk("d"))
        content.check()
        with NbdClient.connect(daemon.uri("d@seq:0"), timeout=60) as view:
            assert view.read(0, SIZE) == old


def abort_ext4(dev: Faulty, place: Path) -> None:
    """As after an error in its metadata."""
    subprocess.run(["mount", "-o", "remount,abort", str(place)], check=False, capture_output=True)


def shut_down_xfs(dev: Faulty, place: Path) -> None:
    """As after an error of its log."""
    call("xfs_io", "-x", "-c", "shutdown", str(place))


def fail_writes(dev: Faulty, place: Path) -> None:
    """The device."""
    dev.fails("pwrite")


@pytest.mark.parametrize(
    ("kind", "fail"),
    [("ext4", fail_writes), ("ext4", abort_ext4), ("xfs", fail_writes), ("xfs", shut_down_xfs)],
)
def test_a_journal_that_cannot_be_written(
    short_tmp: Path, seed: int, kind: str, fail: Callable[[Faulty, Path], None]
) -> None:
    """The disk is poisoned and says so, others go on; remounted, it has all that was flushed."""
    rng, place = random.Random(seed), short_tmp / "mnt"
    with (
        faulty(short_tmp / "dev", 400 * MIB, kind) as dev,
        Daemon(short_tmp / "state") as daemon,
    ):
        cdp = Commands(daemon.directory)
        content, other = Content(daemon, rng), Content(daemon, rng, "other")
        with mounted(dev.loop, place):
            cdp("disk", "add", "d", "--size", str(SIZE), "--journal", str(place / "journal"))
            cdp("disk", "add", "other", "--size", str(SIZE))
            with content.connect() as client:
                content.write(client, 50)
                client.flush()
                before = bytes(content.disk)
                fail(dev, place)
                with pytest.raises((NbdServerError, OSError)) as caught:
                    for _ in range(200):
                        content.write(client, 1)
                        client.flush()
                assert getattr(caught.value, "errno", errno.EIO) == errno.EIO
            eventually(
                lambda: cdp.disk("d")["state"] not in ("served", "degraded"), lambda: cdp.disk("d")
            )
            assert cdp.disk("d")["poisoned"], cdp.disk("d")
            with other.connect() as client:
                other.write(client, 20)
                client.flush()
            other.check()
            daemon.stop()
            dev.fails()
        with mounted(dev.loop, place):
            daemon.start()
            eventually(lambda: cdp.disk("d")["state"] == "served", lambda: cdp.disk("d"))
            with content.connect() as client:
                assert client.read(0, SIZE) == before
            content.disk[:] = before
            with content.connect() as client:
                content.write(client, 10)
                client.flush()
            content.check()
            assert daemon.stop() == 0
    assert "did not survive" not in daemon.said()


def test_a_journal_whose_device_hangs(short_tmp: Path, seed: int) -> None:
    """Its flushes wait, as long as it takes; status answers, other disks do not notice."""
    rng, place = random.Random(seed), short_tmp / "mnt"
    with (
        faulty(short_tmp / "dev", 64 * MIB, "ext4") as dev,
        mounted(dev.loop, place),
        Daemon(short_tmp / "state") as daemon,
    ):
        cdp = Commands(daemon.directory)
        content, other = Content(daemon, rng), Content(daemon, rng, "other")
        cdp("disk", "add", "d", "--size", str(SIZE), "--journal", str(place / "journal"))
        cdp("disk", "add", "other", "--size", str(SIZE))
        with content.connect() as client, other.connect() as unaffected:
            content.write(client, 20)
            client.flush()
            dev.hangs(True)
            content.write(client, 5)
            eventually(lambda: cdp.disk("d")["lag_bytes"], lambda: cdp.disk("d"))
            other.write(unaffected, 20)
            unaffected.flush()
            other.check()
            assert cdp.disk("other")["state"] == "served"
            dev.hangs(False)
            client.flush()
        content.check()
        cdp("disk", "remove", "d", "--yes")


def test_more_files_are_allowed_than_the_shell_says(short_tmp: Path, seed: int) -> None:
    """The soft limit is raised."""
    daemon = Daemon(short_tmp / "state")
    daemon.prefix = ["prlimit", "--nofile=64:2048"]
    with daemon:
        cdp, content = Commands(daemon.directory), Content(daemon, random.Random(seed))
        cdp("disk", "add", "d", "--size", str(SIZE))
        with ExitStack() as stack:
            clients = [stack.enter_context(content.connect()) for _ in range(100)]
            for client in clients:
                content.write(client, 1)
            clients[0].flush()
        content.check()
        assert daemon.stop() == 0


@pytest.mark.parametrize("limit", ["--nofile=0:", "--as=1:"])
def test_a_recorder_that_gets_no_more_files_or_memory(
    short_tmp: Path, seed: int, limit: str
) -> None:
    """Whatever becomes of it then, nothing acknowledged is lost, and afterwards it goes on."""
    with Daemon(short_tmp / "state") as daemon:
        cdp, content = Commands(daemon.directory), Content(daemon, random.Random(seed))
        cdp("disk", "add", "d", "--size", str(SIZE), "--segment-bytes", "1M")
        with content.connect() as client:
            content.write(client, 20)
            call("prlimit", f"--pid={daemon.children()['d/recorder']}", limit)
            with ExitStack() as stack, pytest.raises(GONE):
                for _ in range(200):
                    other = stack.enter_context(NbdClient.connect(daemon.uri("d"), timeout=5))
                    other.read(0, CHUNK)
            with suppress(*GONE):
                client.flush()
        call(
            "prlimit",
            f"--pid={daemon.children()['d/recorder']}",
            "--nofile=1024:",
            "--as=unlimited:",
        )
        eventually(lambda: cdp.disk("d")["state"] == "served", lambda: cdp.disk("d"))
        content.check()
        with content.connect() as client:
            content.write(client, 20)
            client.flush()
        content.check()
        assert daemon.stop() == 0
