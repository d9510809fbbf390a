"""Kernel file systems on an export (nbdfuse, a loop device): fill, destroy, roll back, compare."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.interop.daemon import Daemon

SIZE = 384 << 20
FILES = 120
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
CHECK = {
    "ext4": ["e2fsck", "-f", "-n"],
    "xfs": ["xfs_repair", "-n"],
    "btrfs": ["btrfs", "check", "--readonly"],
}
WAIT_SECONDS = 20.0


def call(*command: str) -> str:
    """Run a tool that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def wait_for(holds: Callable[[], bool], what: str) -> None:
    """Until something holds that another process brings about."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline, what
        os.sched_yield()


@contextmanager
def device(uri: str, folder: Path, *, read_only: bool = False) -> Iterator[str]:
    """A loop device of the kernel on an NBD export."""
    folder.mkdir(exist_ok=True)
    file = folder / "disk"
    file.touch()
    options = ["--readonly"] if read_only else []
    fuse = subprocess.Popen(["nbdfuse", *options, str(file), uri])
    try:
        wait_for(lambda: file.stat().st_size > 0, "nbdfuse does not come up")
        ro = ["--read-only"] if read_only else []
        loop = call("losetup", "--find", "--show", *ro, str(file)).strip()
        try:
            yield loop
        finally:
            call("losetup", "--detach", loop)
            wait_for(lambda: not Path(f"/sys/block/{loop[5:]}/loop").exists(), "loop stays")
    finally:
        call("fusermount3", "-u", str(file))
        fuse.wait(WAIT_SECONDS)


@contextmanager
def mounted(loop: str, place: Path, *options: str) -> Iterator[Path]:
    """The file system on a device."""
    place.mkdir(exist_ok=True)
    call("mount", *options, loop, str(place))
    try:
        yield place
    finally:
        call("umount", str(place))


def sums(root: Path) -> dict[str, str]:
    """Every file's checksum."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def may_mount(not_here: Callable[[str], Any]) -> None:
    """Mounting needs root, FUSE and loop devices."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        not_here("mounting needs root and /dev/fuse")


@pytest.mark.usefixtures("may_mount")
@pytest.mark.needs_tool("nbdfuse", "losetup", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs")
@pytest.mark.parametrize("kind", sorted(MAKE))
def test_a_destroyed_file_system_comes_back(
    daemon: Daemon, tmp_path: Path, seed: int, kind: str
) -> None:
    rng = random.Random(seed)
    daemon.cdp("disk", "add", "d", "--size", str(SIZE))
    with device(daemon.uri("d"), tmp_path / "fuse") as loop:
        call(*MAKE[kind], loop)
        with mounted(loop, tmp_path / "mnt") as root:
            for number in range(FILES):
                path = root / f"dir-{number % 7}" / f"file-{number}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(rng.randbytes(rng.choice((100, 5000, 70_000, 900_000))))
            before = sums(root)
    daemon.cdp("bookmark", "add", "d", "good")
    with device(daemon.uri("d"), tmp_path / "fuse") as loop:
        with mounted(loop, tmp_path / "mnt") as root:
            for path in sorted(root.rglob("file-*"))[::2]:
                path.write_bytes(rng.randbytes(path.stat().st_size))
            for path in sorted(root.rglob("file-*"))[1::2]:
                path.unlink()
            call("fstrim", str(root))
        with open(loop, "r+b", buffering=0) as raw:
            raw.seek(1 << 20)
            raw.write(rng.randbytes(4 << 20))
            os.fsync(raw.fileno())
    daemon.cdp("rollback", "d", "--to", "good", "--yes")
    with device(daemon.uri("d"), tmp_path / "fuse") as loop:
        call(*CHECK[kind], loop)
        with mounted(loop, tmp_path / "mnt") as root:
            assert sums(root) == before
    out = tmp_path / "good.img"
    daemon.cdp("restore", "d", "--to", "good", "--output", str(out))
    call(*CHECK[kind], str(out))
