"""The seam to the file system: everything durable of a disk goes through here, nothing else does.

A crash simulator can stand in for it: ten calls that change or make something durable or visible
(`Storage.open`, `rename`, `unlink`, `list`, `sync_dir`; `File.read`, `write`, `zero`, `allocate`,
`sync`), and a few that only ask or advise (`File.size`, `extents`, `writeback`, `close`).

What is promised: after `File.sync` returned, the file's content and size are on stable storage as
far as the kernel and the device tell the truth; after `sync_dir`, so are the names in that
directory. POSIX says nothing of what survives otherwise: between two syncs any subset of what was
done may, in any order. A `sync` that failed is never repeated on the same data: the kernel may have
marked those pages clean.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol

Buffer = bytes | bytearray | memoryview
Mode = Literal["read", "write", "create"]

IOV_MAX: Final = 1024
_BLKZEROOUT: Final = 0x127F
_BLKGETSIZE64: Final = 0x80081272
_FALLOC_KEEP_SIZE: Final = 0x01
_FALLOC_PUNCH_HOLE: Final = 0x02
_FALLOC_ZERO_RANGE: Final = 0x10
_ZEROES: Final = bytes(1 << 20)


class File(Protocol):
    """An open file or device. Offsets and lengths in bytes; every call may raise OSError."""

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer``; how many bytes there were, fewer only at the end of the file."""
        ...

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers one after the other, or raise."""
        ...

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeroes, by calls that guarantee it."""
        ...

    def allocate(self, size: int) -> None:
        """Make the file ``size`` bytes long (longer: a hole; shorter: cut off)."""
        ...

    def sync(self) -> None:
        """fdatasync."""
        ...

    def size(self) -> int:
        """Bytes of the file or device."""
        ...

    def extents(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """(offset, length) of what may hold data from ``start`` on; the rest reads as zeroes.

        Of a device: everything.
        """
        ...

    def close(self) -> None:
        """Close it; nothing is made durable by that."""
        ...

    def writeback(self, offset: int, length: int) -> None:
        """Let the kernel begin to write the range; promises nothing, fails silently."""
        ...

    def fileno(self) -> int:
        """The descriptor, for calls that only read or advise (preadv2 with RWF_NOWAIT)."""
        ...


class Storage(Protocol):
    """A directory tree. Names are relative to its root, with ``/``."""

    def open(self, name: str, mode: Mode) -> File:
        """Open for reading, for writing, or create anew (FileExistsError if it is there)."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Atomically give ``old`` the name ``new``, replacing what has it."""
        ...

    def unlink(self, name: str) -> None:
        """Remove a name."""
        ...

    def list(self, directory: str) -> list[str]:
        """Names in a directory, sorted; empty if it is not there."""
        ...

    def sync_dir(self, directory: str) -> None:
        """Make the names in a directory durable."""
        ...


_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_SYNC_FILE_RANGE_WRITE: Final = 2
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> bool:
    """Whether the file system could do it; other errors are raised."""
    if _libc.fallocate(descriptor, mode, offset, length) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code))


class RealFile:
    """A file or block device of the kernel."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor
        self._device = stat.S_ISBLK(os.fstat(descriptor).st_mode)

    @property
    def is_device(self) -> bool:
        """Whether it is a block device."""
        return self._device

    def fileno(self) -> int:
        return self._fd

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) == length or not data:
            return data
        parts = [data]
        got = len(data)
        while got < length:
            data = os.pread(self._fd, length - got, offset + got)
            if not data:
                break
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        got = os.preadv(self._fd, (buffer,), offset)
        while 0 < got < len(buffer):
            more = os.preadv(self._fd, (buffer[got:],), offset + got)
            if not more:
                break
            got += more
        return got

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if len(buffers) == 1:  # the curator's scattered blocks
            only = buffers[0]
            done = os.pwrite(self._fd, only, offset)
            if done != len(only):
                self._write_rest(offset + done, memoryview(only)[done:])
            return
        if len(buffers) <= IOV_MAX:
            done = os.pwritev(self._fd, buffers, offset)
            if done != sum(map(len, buffers)):
                self._write_rest(offset + done, b"".join(buffers)[done:])
            return
        for first in range(0, len(buffers), IOV_MAX):
            part = buffers[first : first + IOV_MAX]
            total = sum(map(len, part))
            done = os.pwritev(self._fd, part, offset)
            if done != total:
                self._write_rest(offset + done, b"".join(part)[done:])
            offset += total

    def _write_rest(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            if done == 0:
                raise OSError(errno.EIO, "nothing could be written")
            offset += done
            view = view[done:]

    def zero(self, offset: int, length: int) -> None:
        if length <= 0:
            return
        if self._device:
            if offset % 512 == 0 and length % 512 == 0:
                try:
                    fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))
                    return
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                        raise
        elif offset + length <= os.fstat(self._fd).st_size:
            for mode in (_FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, _FALLOC_ZERO_RANGE):
                if _fallocate(self._fd, mode, offset, length):
                    return
        end = offset + length
        while offset < end:
            step = min(len(_ZEROES), end - offset)
            self.write(offset, [memoryview(_ZEROES)[:step]])
            offset += step

    def allocate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def writeback(self, offset: int, length: int) -> None:
        if _sync_file_range is not None:
            _sync_file_range(self._fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def size(self) -> int:
        if self._device:
            answer = fcntl.ioctl(self._fd, _BLKGETSIZE64, bytes(8))
            return int(struct.unpack("=Q", answer)[0])
        return os.fstat(self._fd).st_size

    def extents(self, start: int = 0) -> Iterator[tuple[int, int]]:
        size = self.size()
        at = start
        while at < size and not self._device:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                break  # the file system cannot tell: everything may be data
            at = os.lseek(self._fd, start, os.SEEK_HOLE)
            yield start, at - start
        if at < size:
            yield at, size - at

    def close(self) -> None:
        """May be repeated: the number is not closed a second time, it may be another file's."""
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)


class RealStorage:
    """A directory of the kernel's file systems."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, name: str, mode: Mode) -> RealFile:
        path = self.root / name
        flags = os.O_CLOEXEC | (os.O_RDONLY if mode == "read" else os.O_RDWR)
        if mode == "create":
            flags |= os.O_CREAT | os.O_EXCL
            path.parent.mkdir(parents=True, exist_ok=True)
        return RealFile(os.open(path, flags, 0o600))

    def rename(self, old: str, new: str) -> None:
        os.rename(self.root / old, self.root / new)

    def unlink(self, name: str) -> None:
        os.unlink(self.root / name)

    def list(self, directory: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / directory))
        except FileNotFoundError:
            return []

    def sync_dir(self, directory: str) -> None:
        descriptor = os.open(self.root / directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ------------------------------------------------------------------------------ scattered reads
class Mapping:
    """A file as memory: ``view``, for `Room.gather` alone.

    Who looks at a page that the device cannot read, or that lies behind the end of a file which was
    cut, is killed (SIGBUS). The kernel is not, when it copies: it says so.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.view = memoryview(memory)

    def close(self) -> None:
        """Whoever still has the view gets a ValueError from it; a part of it stays good."""
        self.view.release()
        with contextlib.suppress(BufferError):
            self._memory.close()


def map_file(file: File, length: int) -> Mapping | None:
    """The first ``length`` bytes of a file, or None where that cannot be had."""
    try:
        memory = mmap.mmap(
            file.fileno(), length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ
        )  # fmt: skip
        memory.madvise(mmap.MADV_RANDOM)  # as with reads: what lies around is not wanted
    except (OSError, ValueError):
        return None
    return Mapping(memory)


class Room:
    """Memory that pieces of files are gathered to: ``view``, and its ``blocks`` of ``unit`` bytes.

    It is the memory of a file of its own, so that one call can copy pieces of mapped files to it
    without anybody here looking at them.
    """

    def __init__(self, units: int, unit: int) -> None:
        self._units, self._unit = units, unit
        self._make()
        _rooms.add(self)

    def _make(self) -> None:
        size = self._units * self._unit
        self._fd = os.memfd_create("room", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        os.posix_fallocate(self._fd, 0, size)  # or a lack of memory would be a SIGBUS
        self.view = memoryview(mmap.mmap(self._fd, size))
        self.blocks = [self.view[at : at + self._unit] for at in range(0, size, self._unit)]

    def gather(self, parts: Sequence[Buffer], total: int) -> bool:
        """Copy the parts (IOV_MAX at most), ``total`` bytes, one behind the other, to the begin.

        Whether all of it could be read. What could not is to be read otherwise, by whoever wants to
        know why.
        """
        try:
            return os.pwritev(self._fd, parts, 0) == total
        except OSError:
            return False


_rooms: Final[weakref.WeakSet[Room]] = weakref.WeakSet()


def _part_from_parent() -> None:
    for room in list(_rooms):
        room._make()


# The memory of a file stays one and the same after a fork: two processes would gather to it.
os.register_at_fork(after_in_child=_part_from_parent)
