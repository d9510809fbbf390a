"""What every process of a disk does at its start: arguments, its lock for life, the shared page.

A child is started as ``python -m cdp.ROLE --disk-dir DIR --fd N --clock-offset NS``: N is the
descriptor of the backing, opened and locked by the supervisor. It has a session of its own and
outlives its supervisor; the lock on ``DIR/ROLE.lock`` is held until the kernel has ended its last
thread, so a successor waits for it and never for a time-out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from cdp.clock import boot_id_bytes, boottime_ns
from cdp.config import DiskConfig, load_disk
from journal.frontier import Frontier, FrontierMissing
from journal.storage import RealFile, RealStorage

SHARED_MEMORY: Final = Path("/dev/shm")
WAIT_SECONDS: Final = 0.02


def available_bytes(directory: Path) -> int:
    """What the file system has left for us. (A quota may allow less.)"""
    numbers = os.statvfs(directory)
    blocks = numbers.f_bfree if os.geteuid() == 0 else numbers.f_bavail
    return blocks * numbers.f_frsize


@dataclasses.dataclass(frozen=True, slots=True)
class Child:
    """A process of one disk. ``stamp()``: the host's clock (ns)."""

    role: str
    directory: Path
    config: DiskConfig
    backing_fd: int
    clock_offset_ns: int
    lock_fd: int

    @property
    def socket(self) -> Path:
        """Where it answers calls."""
        return self.directory / f"{self.role}.sock"

    @property
    def disk(self) -> bytes:
        """The disk's identity."""
        return self.config.id_bytes

    def stamp(self) -> int:
        """Now, on the host's clock (ns)."""
        return boottime_ns() + self.clock_offset_ns

    def storage(self) -> RealStorage:
        """The journal directory."""
        return RealStorage(Path(self.config.journal))

    def available_bytes(self) -> int:
        """What the journal's file system has left for us."""
        return available_bytes(Path(self.config.journal))

    def backing(self) -> RealFile:
        """The backing; its descriptor is the one handed down."""
        return RealFile(self.backing_fd)

    def frontier(self, *, create: bool, read_only: bool = False) -> Frontier:
        """The disk's shared page."""
        return Frontier.open(
            frontier_path(self.directory, self.config), disk=self.disk,
            boot_id=boot_id_bytes(), create=create, read_only=read_only,
        )  # fmt: skip


def frontier_path(directory: Path, config: DiskConfig) -> Path:
    """On tmpfs where there is one; the page is worth nothing after a reboot anyway."""
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK):
        return SHARED_MEMORY / f"cdp-{config.uuid}.frontier"
    return directory / "frontier"


def start(
    role: str, arguments: list[str] | None = None, *, waiting: Callable[[], None] | None = None
) -> Child:
    """Parse the arguments, load the disk's configuration, take the role's lock (waiting for it)."""
    parser = argparse.ArgumentParser(prog=f"cdp.{role}")
    parser.add_argument("--disk-dir", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--clock-offset", type=int, required=True)
    chosen = parser.parse_args(arguments)
    os.set_inheritable(chosen.fd, False)
    lock = os.open(chosen.disk_dir / f"{role}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is not None:
            waiting()
        fcntl.flock(lock, fcntl.LOCK_EX)
    return Child(
        role, chosen.disk_dir, load_disk(chosen.disk_dir), chosen.fd, chosen.clock_offset, lock
    )


def is_free(directory: Path, role: str) -> bool:
    """Whether no process has a role of this disk at the moment."""
    lock = os.open(directory / f"{role}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


async def wait_for_recorder(child: Child, *, read_only: bool) -> Frontier:
    """The disk's shared page, once a recorder of this boot has come up."""
    frontier: Frontier | None = None
    while True:
        if frontier is None:
            with contextlib.suppress(FrontierMissing):
                frontier = child.frontier(create=False, read_only=read_only)
        if frontier is not None and frontier.epoch:
            return frontier
        await trio.sleep(WAIT_SECONDS)
