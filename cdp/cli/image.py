"""Writing a disk's content to where an administrator wants it: an image file or a block device.

The content comes over NBD, with its holes. In a file what is zero stays a hole; on a device it is
zeroed by calls that guarantee zeroes, since a device has content of its own. A file appears under
its name only when all of it is on stable storage; until then it is ``NAME.partial``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, Self

from cdp.cli.output import CliError

READ_BYTES = 1 << 20
READS_IN_FLIGHT = 16
STATUS_BYTES = 1 << 30  # asked for at a time, so that a fragmented disk needs no list of all of it
ZERO_UNIT = 1 << 16  # smaller zeroes inside data are written
STATE_ZERO = 2  # of base:allocation: reads as zero
BLKZEROOUT = 0x127F

_ZEROES = bytes(READ_BYTES)


class Source(Protocol):
    """What is copied: an NBD client."""

    size: int
    max_payload: int

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Extents (length, flags) of exactly this range; ValueError if the server has none."""

    def read_many(
        self, requests: Iterable[tuple[int, int]], depth: int
    ) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of each (offset, length), in that order."""


class Sink(Protocol):
    """Where it goes."""

    def write(self, offset: int, data: memoryview) -> None:
        """Data that is not all zero."""

    def zero(self, offset: int, length: int) -> None:
        """Zeroes."""


def copy(source: Source, sink: Sink, progress: Callable[[int], None]) -> None:
    """Copy all of ``source``.

    :param progress: called with the number of bytes that are done.
    """
    for start in range(0, source.size, STATUS_BYTES):
        end = min(start + STATUS_BYTES, source.size)
        requests = []
        for offset, length, zero in _extents(source, start, end):
            if zero:
                sink.zero(offset, length)
            else:
                requests += _cut(offset, length, min(READ_BYTES, source.max_payload))
        for offset, data in source.read_many(requests, READS_IN_FLIGHT):
            _write(sink, offset, data)
            progress(offset + len(data))
        progress(end)


def _extents(source: Source, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, reads as zero) from start to end."""
    try:
        extents = source.block_status(start, end - start)
    except ValueError:
        extents = [(end - start, 0)]  # the server does not say; zeroes are seen when they are read
    for length, flags in extents:
        yield start, length, bool(flags & STATE_ZERO)
        start += length


def _cut(offset: int, length: int, most: int) -> list[tuple[int, int]]:
    end = offset + length
    return [(at, min(most, end - at)) for at in range(offset, end, most)]


def _write(sink: Sink, offset: int, data: bytes) -> None:
    """Data and the zeroes in it, in as few calls as there are changes between them."""
    view = memoryview(data)
    begin, zero = 0, None
    for at in range(0, len(view), ZERO_UNIT):
        unit = view[at : at + ZERO_UNIT]
        is_zero = unit == _ZEROES[: len(unit)]
        if zero is not None and is_zero != zero:
            _put(sink, offset + begin, view[begin:at], zero)
            begin = at
        zero = is_zero
    if zero is not None:
        _put(sink, offset + begin, view[begin:], zero)


def _put(sink: Sink, offset: int, view: memoryview, zero: bool) -> None:
    if zero:
        sink.zero(offset, len(view))
    else:
        sink.write(offset, view)


def _write_all(fd: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


# ------------------------------------------------------------------------------------------- files
class Partial:
    """A file in the making: ``PATH.partial``, which becomes PATH by :meth:`finish`.

    Left by an error, it is deleted. Nothing is ever written over PATH itself.

    :raises CliError: PATH or its .partial exists, and it is not said that it may be replaced.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        self.path, self._force = path, force
        self.partial = path.with_name(path.name + ".partial")
        if not path.parent.is_dir():
            raise CliError(f"{path.parent} is no directory: create it first")
        if path.is_dir():
            raise CliError(f"{path} is a directory: name a file in it")
        for there in (path, self.partial):
            if not force and (there.exists() or there.is_symlink()):
                raise CliError(f"{there} exists: name another file, or say --force to replace it")
        if path.is_file():
            _refuse_locked(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.partial.unlink(missing_ok=True)

    def create(self) -> int:
        """A descriptor of the empty .partial."""
        self.partial.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(self.partial, flags, 0o600)

    def finish(self) -> None:
        """Make it durable and give it its name."""
        fd = os.open(self.partial, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self._rename()
        fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _rename(self) -> None:
        if self._force:
            os.replace(self.partial, self.path)
            return
        try:
            # A link fails when somebody made such a file meanwhile; a rename would replace it.
            os.link(self.partial, self.path)
        except FileExistsError:
            raise CliError(f"{self.path} has appeared meanwhile: it was not replaced") from None
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}:
                raise
            os.rename(self.partial, self.path)  # a file system without links
        else:
            os.unlink(self.partial)


def _refuse_locked(path: Path) -> None:
    """:raises CliError: somebody has locked the file, as a daemon locks a protected disk's."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CliError(f"{path} is in use: name another file") from None
    finally:
        os.close(fd)


class SparseFile:
    """A new file; what is zero stays a hole."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        os.ftruncate(fd, size)

    def write(self, offset: int, data: memoryview) -> None:
        """Data that is not all zero."""
        _write_all(self._fd, offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Zeroes: there are no others in a new file."""


# ----------------------------------------------------------------------------------------- devices
def is_device(path: Path) -> bool:
    """Whether ``path`` is a block device; False when there is nothing."""
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except FileNotFoundError:
        return False


class BlockDevice:
    """A block device that nobody else uses.

    :raises CliError: it is in use (mounted, protected, part of another device).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Without O_CREAT, O_EXCL means: fail if the kernel or another such open holds it.
            self._fd = os.open(path, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise CliError(f"{path} is in use: unmount it, or stop what uses it, first") from None
        self.size = os.lseek(self._fd, 0, os.SEEK_END)
        self._by_kernel = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def check_room(self, size: int) -> None:
        """:raises CliError: it has less than ``size`` bytes."""
        if self.size < size:
            raise CliError(
                f"{self.path} has {self.size} bytes, the disk had {size}: name a larger device"
            )

    def write(self, offset: int, data: memoryview) -> None:
        """Data that is not all zero."""
        _write_all(self._fd, offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Zeroes, by the device if it can, else written."""
        if self._by_kernel:
            try:
                # Of whole sectors only; what the kernel refuses is written.
                fcntl.ioctl(self._fd, BLKZEROOUT, struct.pack("=QQ", offset, length))
                return
            except OSError:
                self._by_kernel = False
        for at, size in _cut(offset, length, READ_BYTES):
            _write_all(self._fd, at, memoryview(_ZEROES)[:size])

    def sync(self) -> None:
        """On return everything written is on stable storage."""
        os.fsync(self._fd)
