"""Kernel block devices on an NBD export (nbdfuse, a loop device), and file systems on them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
def loop_device(file: Path, *, read_only: bool = False) -> Iterator[str]:
    """A loop device on a file."""
    ro = ["--read-only"] if read_only else []
    loop = call("losetup", "--find", "--show", *ro, str(file)).strip()
    try:
        yield loop
    finally:
        call("losetup", "--detach", loop)
        wait_for(lambda: not Path(f"/sys/block/{loop[5:]}/loop").exists(), "loop stays")


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
        with loop_device(file, read_only=read_only) as loop:
            yield loop
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
