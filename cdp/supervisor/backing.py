"""The backing of a disk: created, checked, and opened exclusively, once for all its processes.

The lock belongs to what is opened, not to who opened it: O_EXCL of a block device and flock of a
file last until the last copy of the descriptor is closed, in whatever process. So a disk whose
recorder outlived the supervisor stays guarded, and the next supervisor gets the descriptor back
from it instead of opening the backing a second time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cdp.config import check_size, sync_directory
from journal.errors import Busy, CdpError, Conflict, InvalidInput

_BLKGETSIZE64: Final = 0x80081272
_BLKSSZGET: Final = 0x1268
DEFAULT_BLOCK_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class BackingFacts:
    """What there is. `identity` is equal for two names of the same file or device."""

    is_device: bool
    size: int
    block_size: int
    identity: tuple[str, int, int]


def inspect(path: Path) -> BackingFacts:
    """What lies at `path`, without opening it for writing.

    :raises InvalidInput: nothing does, or nothing that can hold a disk.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _cannot_open(path, error) from error
    try:
        return _facts(path, fd)
    finally:
        os.close(fd)


def is_at(path: Path, fd: int) -> bool:
    """Whether what was opened is what lies at ``path`` now.

    :raises InvalidInput: nothing does.
    """
    return inspect(path).identity == _facts(path, fd).identity


def _facts(path: Path, fd: int) -> BackingFacts:
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        identity = ("file", status.st_dev, status.st_ino)
        return BackingFacts(False, status.st_size, DEFAULT_BLOCK_BYTES, identity)
    if not stat.S_ISBLK(status.st_mode):
        raise InvalidInput(f"{path} is neither a file nor a block device: name one of these")
    size = struct.unpack("=Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
    block_size = struct.unpack("=i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
    return BackingFacts(True, size, block_size, ("device", status.st_rdev, 0))


def create(path: Path, size: int) -> None:
    """Creates a sparse file, durably.

    :raises Conflict: there is a file of that name.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise Conflict(
            f"{path} is left of an earlier disk: name it with --backing to use its content, "
            "or delete it"
        ) from None
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
    except OSError as error:
        path.unlink()
        raise InvalidInput(f"{path} cannot have {size} bytes: {error.strerror}") from error
    finally:
        os.close(fd)
    sync_directory(path.parent)


def open_exclusively(path: Path) -> int:
    """Opens for reading and writing, and keeps everybody who asks from using it meanwhile.

    :raises Busy: it is mounted, or somebody else holds it.
    :raises InvalidInput: it cannot be opened at all.
    """
    try:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
        if stat.S_ISBLK(os.stat(path).st_mode):
            flags |= os.O_EXCL
        fd = os.open(path, flags)
    except OSError as error:
        raise _cannot_open(path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _facts(path, fd)
        # It was only there so that opening a FIFO would not wait.
        os.set_blocking(fd, True)
    except BlockingIOError:
        os.close(fd)
        raise Busy(f"{path} is in use by another program: stop that first") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _cannot_open(path: Path, error: OSError) -> CdpError:
    if error.errno == errno.EBUSY:
        return Busy(f"{path} is in use, mounted perhaps: unmount it, or stop what holds it")
    if error.errno == errno.ENOENT:
        return InvalidInput(f"{path} does not exist: create it, or leave out --backing")
    return InvalidInput(f"{path} cannot be opened: {error.strerror}")


def check_fits(path: Path, facts: BackingFacts, size: int | None) -> int:
    """The size of the disk on this backing: what was asked for, or all there is.

    :raises InvalidInput: it is too small, or its size is no size of a disk.
    """
    if size is None:
        if not facts.size:
            raise InvalidInput(f"{path} is empty: say how large the disk is, without --backing")
        if facts.size % facts.block_size and not facts.is_device:
            raise InvalidInput(
                f"{path} has {facts.size} bytes, no multiple of {facts.block_size}: "
                "say how many of them with --size"
            )
        return check_size(facts.size, facts.block_size)
    check_size(size, facts.block_size)
    if facts.size < size:
        raise InvalidInput(
            f"{path} has {facts.size} bytes, {size} are needed: enlarge it, or use a smaller --size"
        )
    return size


def grow(path: Path, size: int) -> None:
    """Makes a file at least `size` bytes long, durably; a device must be so already.

    :raises InvalidInput: a device is too small, or there is no space.
    """
    facts = inspect(path)
    if facts.size >= size:
        return
    if facts.is_device:
        raise InvalidInput(f"{path} has {facts.size} bytes, {size} are needed: enlarge it first")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
    except OSError as error:
        raise InvalidInput(f"{path} cannot have {size} bytes: {error.strerror}") from error
    finally:
        os.close(fd)
