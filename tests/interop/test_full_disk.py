"""File systems that fill up: clients wait, nothing acknowledged is lost, room is enough."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from cdp.nbd.client import NbdClient, NbdServerError
from cdp.supervisor import main
from tests.interop.commands import Commands, eventually
from tests.interop.daemon import Daemon

MIB = 1 << 20
SIZE = 4 * MIB
CHUNK = 64 << 10
FILE_SYSTEM = 40 * MIB
SECONDS = 60.0
# A file system of the kernel's on a loop device: how it is made, and its least size.
MAKE = {
    "ext4": (["mkfs.ext4", "-q", "-F"], FILE_SYSTEM),
    "xfs": (["mkfs.xfs", "-q", "-f"], 300 * MIB),
}


@contextmanager
def mounted(place: Path, *words: str) -> Iterator[Path]:
    """A file system, mounted on a new directory; a skip, or a failure in CI, if that cannot be."""
    place.mkdir()
    subprocess.run(["mount", *words, str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def may_mount(not_here: Callable[[str], Any]) -> None:
    """Mounting needs root and loop devices."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        not_here("mounting needs root and loop devices")


@pytest.fixture
def small(short_tmp: Path, may_mount: None) -> Iterator[Path]:
    """A small file system."""
    with mounted(short_tmp / "small", "-t", "tmpfs", "-o", f"size={FILE_SYSTEM}", "none") as place:
        yield place


@contextmanager
def on_a_loop_device(kind: str, folder: Path) -> Iterator[Path]:
    """A small file system of the kernel's."""
    make, size = MAKE[kind]
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*make, image], check=True)
    with mounted(folder / "small", "-o", "loop", str(image)) as place:
        yield place


class Written:
    """Chunks of a disk, and what was acknowledged of them; all of them on one connection.

    ``pending`` was sent and not answered.
    """

    def __init__(self, uri: str, seed: int) -> None:
        self.uri, self._rng = uri, random.Random(seed)
        self.disk = bytearray(SIZE)
        self.pending: tuple[int, bytes] | None = None

    def write(self, count: int) -> None:
        """Write so many chunks and flush."""
        with NbdClient.connect(self.uri, timeout=SECONDS) as client:
            for _ in range(count):
                self.write_one(client)
            client.flush()

    def write_one(self, client: NbdClient) -> None:
        """Write a chunk and wait for the answer."""
        offset = self._rng.randrange(SIZE // CHUNK) * CHUNK
        data = self._rng.randbytes(CHUNK)
        self.pending = offset, data
        client.write(offset, data)
        self.disk[offset : offset + CHUNK] = data
        self.pending = None

    def check(self) -> None:
        """All that was acknowledged is there, and nothing else; each chunk is old or new."""
        with NbdClient.connect(self.uri, timeout=SECONDS) as client:
            found = client.read(0, SIZE)
        if self.pending is not None:
            offset, data = self.pending
            if found[offset : offset + CHUNK] == data:
                self.disk[offset : offset + CHUNK] = data
            self.pending = None
        assert found == self.disk


class Writing:
    """Writes on, in a thread, until `stop`, or its connection ends. ``error``: with what.

    ``count``: chunks that were acknowledged.
    """

    def __init__(self, written: Written) -> None:
        self._written = written
        self._stopping = False
        self.count = 0
        self.error: Exception | None = None
        self._client = NbdClient.connect(written.uri, timeout=SECONDS)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._written.write_one(self._client)
                self.count += 1
        except (OSError, EOFError, NbdServerError) as error:
            self.error = error

    def wait_held(self, cdp: Commands) -> None:
        """Until nothing is answered any more, for lack of space."""

        def held() -> bool:
            disk = cdp.disk("d")
            return disk["held_seconds"] > 1 and disk["state"] == "throttled"

        eventually(held, lambda: (cdp.disk("d"), self.count, self.error))
        assert self.error is None
        reason = cdp.disk("d")["reason"]
        assert "writes have waited for" in reason
        assert "space" in reason

    def go_on(self) -> None:
        """Until more is answered."""
        before = self.count
        eventually(lambda: self.count > before + 10, lambda: (self.count, self.error))
        assert self.error is None


@contextmanager
def ballast(place: Path, name: str = "ballast", *, least: int = CHUNK) -> Iterator[None]:
    """Somebody else fills the file system, until not even ``least`` bytes fit."""
    path = place / name
    with path.open("wb", buffering=0) as file:
        for chunk in (MIB, CHUNK, least):
            with pytest.raises(OSError, match="No space left"):
                while file.write(b"x" * chunk):
                    pass
    try:
        yield
    finally:
        path.unlink()


def test_everything_is_on_a_file_system_that_fills_up(
    small: Path, short_tmp: Path, seed: int
) -> None:
    with Daemon(small / "state") as daemon:
        cdp = Commands(daemon.directory)
        words = ["--size", str(SIZE), "--segment-bytes", "1M", "--overflow", "throttle"]
        cdp("disk", "add", "d", *words)
        elsewhere = ["--journal", str(short_tmp / "j"), "--backing", str(short_tmp / "b")]
        (short_tmp / "b").write_bytes(bytes(SIZE))
        cdp("disk", "add", "other", *elsewhere)
        written, other = (Written(daemon.uri(name), seed) for name in ("d", "other"))
        written.write(30)
        cdp("bookmark", "add", "d", "start")
        start = bytes(written.disk)

        with Writing(written) as writing:
            with ballast(small):
                writing.wait_held(cdp)
                other.write(20)
                # The curator gives it away when it needs it; now is as good as any other time.
                (Path(cdp.disk("d")["journal"]) / "reserve").unlink(missing_ok=True)
                says = "No space left on device|no space"
                with ballast(small, "crumbs", least=512):
                    cdp.refused("disk", "set", "d", "window=2d", says=says)
                    cdp.refused("disk", "add", "new", "--size", "1M", says=says)
                    rollback = ["rollback", "d", "--to", "start", "--yes", "--disconnect"]
                    cdp.refused(*rollback, says="no space|no room")
                assert {disk["name"] for disk in cdp.json("disk", "list")} == {"d", "other"}
                assert cdp.disk("other")["state"] == "served"
            writing.go_on()
        written.check()
        cdp("disk", "drain", "d")
        eventually(lambda: cdp.disk("d")["state"] == "served", lambda: cdp.disk("d"))

        with ballast(small), Writing(written) as writing:
            writing.wait_held(cdp)
            assert daemon.stop() == 0, daemon.said()
        daemon.start()
        written.check()
        other.check()
        with NbdClient.connect(daemon.uri("d@start"), timeout=SECONDS) as view:
            assert view.read(0, SIZE) == start
        assert daemon.stop() == 0


@pytest.mark.usefixtures("may_mount")
@pytest.mark.needs_tool("losetup", "mkfs.ext4", "mkfs.xfs")
def test_whoever_waits_goes_on_when_there_is_space(short_tmp: Path, seed: int) -> None:
    """And what was acknowledged before outlives everybody's death meanwhile."""
    kind = sorted(MAKE)[seed % len(MAKE)]
    with on_a_loop_device(kind, short_tmp) as place, Daemon(short_tmp / "state") as daemon:
        cdp = Commands(daemon.directory)
        words = ["--size", str(SIZE), "--segment-bytes", "1M", "--overflow", "block"]
        cdp("disk", "add", "d", *words, "--journal", str(place / "journal"))
        written = Written(daemon.uri("d"), seed)
        written.write(30)
        with NbdClient.connect(daemon.uri("d"), timeout=SECONDS) as reader:
            before = reader.read(0, SIZE)
            assert before == written.disk
            with Writing(written) as writing:
                with ballast(place, least=4096):
                    writing.wait_held(cdp)
                    reader.flush()
                    pending = written.pending
                    assert pending is not None
                    assert reader.read(0, SIZE) == written.disk
                writing.go_on()
                assert written.pending != pending
        written.check()
        with ballast(place, least=4096):
            with Writing(written) as writing:
                writing.wait_held(cdp)
                daemon.kill_all()
        daemon.start()
        written.check()
        with Writing(written) as writing:
            writing.go_on()
        written.check()
        assert "did not survive" not in daemon.said()
        assert daemon.stop() == 0


def test_a_crash_on_a_full_file_system(small: Path, short_tmp: Path, seed: int) -> None:
    """What is kept in reserve brings the disk up again: recovered, applied, readable."""
    with Daemon(short_tmp / "state") as daemon:
        cdp = Commands(daemon.directory)
        words = ["--size", str(SIZE), "--segment-bytes", "1M", "--overflow", "throttle"]
        cdp("disk", "add", "d", *words, "--journal", str(small / "journal"))
        written = Written(daemon.uri("d"), seed)
        written.write(40)
        cdp("bookmark", "add", "d", "start")
        start = bytes(written.disk)
        written.write(100)
        cdp("disk", "drain", "d")
        reserve = small / "journal" / "reserve"
        eventually(
            lambda: reserve.exists() and reserve.stat().st_size > MIB,
            lambda: list((small / "journal").iterdir()),
        )
        with ballast(small):
            with Writing(written) as writing:
                writing.wait_held(cdp)
                daemon.kill_all()
            daemon.start()
            written.check()
            with NbdClient.connect(daemon.uri("d@start"), timeout=SECONDS) as view:
                assert view.read(0, SIZE) == start
        written.write(10)
        written.check()
        eventually(reserve.exists, "it is not made again")
        assert "did not survive" not in daemon.said()


def test_a_start_without_space_is_refused(
    small: Path, seed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "_set_up_logging", lambda: None)
    monkeypatch.setattr("cdp.supervisor.main.sdnotify.SystemdNotifier", lambda: None)
    with ballast(small):
        assert main.main(["--state-dir", str(small / "state")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    with Daemon(small / "state") as daemon:
        Commands(daemon.directory)("disk", "add", "d", "--size", str(SIZE))
        written = Written(daemon.uri("d"), seed)
        written.write(10)
        written.check()


def test_the_journals_file_system_is_smaller_than_its_limit(
    small: Path, short_tmp: Path, daemon: Daemon, seed: int
) -> None:
    """Policy `shrink`: the oldest history goes, a bookmark far back stays exact."""
    cdp = Commands(daemon.directory)
    words = ["--size", str(SIZE), "--segment-bytes", "1M", "--journal-limit", "1G"]
    cdp("disk", "add", "d", *words, "--journal", str(small / "journal"))
    written = Written(daemon.uri("d"), seed)
    written.write(40)
    cdp("bookmark", "add", "d", "far-back")
    start = bytes(written.disk)
    for _ in range(12):
        written.write(100)
    written.check()
    for name in ("far-back", "now"):
        with NbdClient.connect(daemon.uri(f"d@{name}"), timeout=SECONDS) as view:
            assert view.read(0, SIZE) == (start if name == "far-back" else written.disk)
    assert cdp.disk("d")["window_start_seq"] > 40
    assert daemon.stop() == 0
    daemon.start()
    written.check()
