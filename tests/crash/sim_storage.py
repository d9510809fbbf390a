"""A `journal.storage.Storage` in memory that crashes: unsynced changes survive, or not, or in part.

*Live* is what the program sees (the page cache), *durable* what has been synced. At a crash each
change since then - a write, a size, a name - is applied, dropped, torn at sectors of 512 bytes, or
its sectors are garbage, chosen by the seed and in any order. A process death alone loses nothing.

Operations that change something are counted; the one with number ``crash_at`` does not return: half
of it may have happened. Faults: an errno raised at the k-th operation of a kind, pages that cannot
be read, space that runs out, and syncs that fail, after which the kernel calls the pages clean:
they are neither durable nor dirty, and may leave the cache.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from journal.storage import Buffer, Mode

SECTOR = 512
PAGE = 4096
ENDLESS = 1 << 62


class Crash(BaseException):
    """The power is gone. Not an Exception: nothing may handle it."""


@dataclass
class Inode:
    """A file's content: live, durable, and the changes in between, in order."""

    live: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)


class SimStorage:
    """See the module. ``live`` and ``durable`` map names to inodes; ``renames`` are atomic."""

    def __init__(self, seed: int, *, crash_at: int = 0, space: int = ENDLESS) -> None:
        self.random = random.Random(seed)
        self.live: dict[str, Inode] = {}
        self.durable: dict[str, Inode] = {}
        self.name_changes: list[tuple[str, str, Inode | None]] = []
        self.operations = 0
        self.crash_at = crash_at
        self.space = space
        self.log: list[str] = []
        self.faults: dict[tuple[str, int], int] = {}  # (operation, its number) -> errno
        self.counts: dict[str, int] = {}
        self.bad_pages: set[tuple[str, int]] = set()
        self.open_files = 0
        self.during_sync: Callable[[], None] | None = None
        self.before: Callable[[], None] | None = None  # asked at the beginning of each operation

    # ------------------------------------------------------------------------------- bookkeeping
    def step(self, operation: str, name: str) -> bool:
        """Count an operation; raises what was planned for it. True: crash in the middle of it."""
        self.operations += 1
        self.log.append(f"{operation} {name}")
        count = self.counts[operation] = self.counts.get(operation, 0) + 1
        code = self.faults.get((operation, count))
        if code is not None:
            raise OSError(code, os.strerror(code), name)
        if self.before is not None:
            self.before()
        return self.operations == self.crash_at

    def used(self) -> int:
        """Bytes that live files take."""
        return sum(len(inode.live) for inode in self.live.values())

    def crash(self) -> SimStorage:
        """The storage as it is found after the power came back; this one must not be used again."""
        after = SimStorage(self.random.getrandbits(32), space=self.space)
        names = dict(self.durable)
        for _, name, inode in self.name_changes:
            # Each change of a name survives or not by itself; a rename is one change.
            if self.random.random() < 0.5:
                _set(names, name, inode)
        images: dict[int, Inode] = {}
        for name, inode in names.items():
            if id(inode) not in images:
                content = self._surviving(inode)
                images[id(inode)] = Inode(bytearray(content), bytearray(content))
            after.live[name] = images[id(inode)]
            after.durable[name] = images[id(inode)]
        return after

    def lose(self, lost: Callable[[str], bool]) -> SimStorage:
        """A power loss that takes all that is not synced of some files, and nothing of the others.

        ``lost``: whether a file, by its name, is one of the first.
        """
        after = SimStorage(self.random.getrandbits(32), space=self.space)
        names = {name: inode for name, inode in self.live.items() if not lost(name)}
        names |= {name: inode for name, inode in self.durable.items() if lost(name)}
        images: dict[int, Inode] = {}
        for name, inode in names.items():
            if id(inode) not in images:
                content = inode.durable if lost(name) else inode.live
                images[id(inode)] = Inode(bytearray(content), bytearray(content))
            after.live[name] = after.durable[name] = images[id(inode)]
        return after

    def kill(self, *, evict: bool = False) -> SimStorage:
        """The storage after the process died: the page cache is still there.

        With ``evict``, pages that are clean have left it: they are read from the disk again.
        """
        after = SimStorage(self.random.getrandbits(32), space=self.space)
        after.live, after.durable = self.live, self.durable
        after.name_changes = self.name_changes
        after.bad_pages = self.bad_pages
        if evict:
            for inode in {id(inode): inode for inode in self.live.values()}.values():
                content = bytearray(inode.durable)
                for kind, offset, data in inode.pending:
                    _change(content, kind, offset, data)
                inode.live[:] = content
        return after

    def _surviving(self, inode: Inode) -> bytes:
        content = bytearray(inode.durable)
        pending = list(inode.pending)
        if self.random.random() < 0.5:  # order is nobody's promise
            self.random.shuffle(pending)
        for kind, offset, data in pending:
            fate = self.random.random()
            if fate < 0.35:
                continue
            if kind == "size" or fate < 0.75:
                _change(content, kind, offset, data)
            else:
                self._tear(content, offset, data, garbage=fate > 0.9)
        return bytes(content)

    def _tear(self, content: bytearray, offset: int, data: bytes, *, garbage: bool) -> None:
        start = offset
        while start < offset + len(data):
            end = min((start // SECTOR + 1) * SECTOR, offset + len(data))
            fate = self.random.random()
            if fate < 0.5:
                _put(content, start, data[start - offset : end - offset])
            elif garbage and fate < 0.75:
                _put(content, start, self.random.randbytes(end - start))
            start = end

    # ----------------------------------------------------------------------------- the interface
    def open(self, name: str, mode: Mode) -> SimFile:
        if mode == "create":
            if name in self.live:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
            crash = self.step("create", name)
            inode = Inode()
            self._change_name("create", name, inode)
            if crash:
                raise Crash
        elif name not in self.live:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        self.open_files += 1
        return SimFile(self, name, self.live[name], writable=mode != "read")

    def rename(self, old: str, new: str) -> None:
        if old not in self.live:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), old)
        crash = self.step("rename", f"{old} {new}")
        inode = self.live[old]
        self.name_changes.append(("rename", f"{old}\0{new}", inode))
        _set(self.live, f"{old}\0{new}", inode)
        if crash:
            raise Crash

    def unlink(self, name: str) -> None:
        if name not in self.live:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        crash = self.step("unlink", name)
        self._change_name("unlink", name, None)
        if crash:
            raise Crash

    def list(self, directory: str) -> list[str]:
        prefix = f"{directory}/" if directory else ""
        below = {name[len(prefix) :] for name in self.live if name.startswith(prefix)}
        return sorted({name.split("/")[0] for name in below})

    def sync_dir(self, directory: str) -> None:
        try:
            crash = self.step("sync_dir", directory)
        except OSError:
            self._settle(directory, 0.5)  # as of pages: called clean, and some of it is not there
            raise
        if crash and self.random.random() < 0.5:
            raise Crash
        self._settle(directory, 1.0)
        if crash:
            raise Crash

    def _settle(self, directory: str, share: float) -> None:
        """Names in a directory are not dirty any more: so large a share of them is durable."""
        rest = []
        for change in self.name_changes:
            if _directory(change[1].split("\0")[0]) != directory:
                rest.append(change)
            elif share == 1.0 or self.random.random() < share:
                _set(self.durable, change[1], change[2])
        self.name_changes = rest

    def _change_name(self, kind: str, name: str, inode: Inode | None) -> None:
        self.name_changes.append((kind, name, inode))
        _set(self.live, name, inode)


class SimFile:
    """An open file of a `SimStorage`."""

    def __init__(self, storage: SimStorage, name: str, inode: Inode, *, writable: bool) -> None:
        self._storage, self._name, self._inode = storage, name, inode
        self._writable = writable
        self._closed = False

    def _check(self, *, writing: bool = False) -> None:
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self._name)
        if writing and not self._writable:
            raise OSError(errno.EBADF, "opened for reading", self._name)

    def read(self, offset: int, length: int) -> bytes:
        self._check()
        for page in range(offset // PAGE, -(-(offset + length) // PAGE)):
            if (self._name, page) in self._storage.bad_pages:
                raise OSError(errno.EIO, os.strerror(errno.EIO), self._name)
        return bytes(self._inode.live[offset : offset + length])

    def read_into(self, offset: int, buffer: memoryview) -> int:
        data = self.read(offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check(writing=True)
        data = b"".join(buffers)
        if not data:
            return
        crash = self._storage.step("write", self._name)
        grows = max(0, offset + len(data) - len(self._inode.live))
        endless = self._storage.space == ENDLESS
        room = grows if endless or not grows else self._storage.space - self._storage.used()
        if grows > room:
            # Like the kernel: what fits is written before the error is reported.
            self._put(offset, data[: max(0, len(self._inode.live) + room - offset)])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._name)
        if crash:
            self._put(offset, data[: self._storage.random.randrange(len(data) + 1)])
            raise Crash
        self._put(offset, data)

    def _put(self, offset: int, data: bytes) -> None:
        if not data:
            return
        _put(self._inode.live, offset, data)
        # The kernel writes pages back one by one.
        start = offset
        while start < offset + len(data):
            end = min((start // PAGE + 1) * PAGE, offset + len(data))
            self._inode.pending.append(("write", start, data[start - offset : end - offset]))
            start = end

    def zero(self, offset: int, length: int) -> None:
        if length > 0:
            self.write(offset, [bytes(length)])

    def allocate(self, size: int) -> None:
        self._check(writing=True)
        crash = self._storage.step("allocate", self._name)
        _resize(self._inode.live, size)
        self._inode.pending.append(("size", size, b""))
        if crash:
            raise Crash

    def sync(self) -> None:
        self._check()
        inode = self._inode
        try:
            crash = self._storage.step("sync", self._name)
        except OSError:
            # The pages are called clean now, and are not on the disk, but for those that got there.
            for change in inode.pending:
                if self._storage.random.random() < 0.5:
                    _change(inode.durable, *change)
            inode.pending.clear()
            raise
        if crash and self._storage.random.random() < 0.5:
            raise Crash
        # What is written while a sync runs may miss it.
        covered = list(inode.pending)
        if self._storage.during_sync is not None:
            self._storage.during_sync()
        for change in covered:
            _change(inode.durable, *change)
        del inode.pending[: len(covered)]
        if crash:
            raise Crash

    def size(self) -> int:
        self._check()
        return len(self._inode.live)

    def extents(self, start: int = 0) -> Iterator[tuple[int, int]]:
        self._check()
        if start < len(self._inode.live):
            yield start, len(self._inode.live) - start

    def writeback(self, offset: int, length: int) -> None:
        """Some of it gets there, none of it is promised."""
        self._check()

    def close(self) -> None:
        self._check()
        self._closed = True
        self._storage.open_files -= 1

    def fileno(self) -> int:
        raise OSError(errno.EBADF, "a simulated file has no descriptor", self._name)


def _directory(name: str) -> str:
    return name.rpartition("/")[0]


def _set(names: dict[str, Inode], name: str, inode: Inode | None) -> None:
    """A change of a name; of a rename, the old and the new one, with a NUL in between."""
    old, _, new = name.partition("\0")
    if new:
        assert inode is not None
        names.pop(old, None)
        names[new] = inode
    elif inode is None:
        names.pop(name, None)
    else:
        names[name] = inode


def _change(content: bytearray, kind: str, offset: int, data: bytes) -> None:
    if kind == "size":
        _resize(content, offset)
    else:
        _put(content, offset, data)


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _resize(content: bytearray, size: int) -> None:
    if len(content) > size:
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))
