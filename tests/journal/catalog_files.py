"""A catalog on real files that can be damaged, and a storage that fails on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from journal.catalog import Catalog
from journal.catalog_copies import COPIES, unpack_entry
from journal.storage import Buffer, File, Mode, RealStorage

DISK = b"d" * 16
SMALL = 8192  # bytes of a copy, so that few commits fill it


def open_it(where: Path, **more) -> Catalog:
    return Catalog.open(RealStorage(where), DISK, file_bytes_min=SMALL, **more)


def both(where: Path) -> list[Path]:
    return [where / name for name in COPIES]


def flip(path: Path, at: int, length: int = 1) -> None:
    data = bytearray(path.read_bytes())
    for place in range(at, at + length):
        data[place] ^= 0xFF
    path.write_bytes(data)


def entries_of(path: Path) -> list[int]:
    """Offsets of a copy's entries."""
    data = path.read_bytes()
    found, at = [], 0
    while (entry := unpack_entry(data, at, disk=DISK, file="")) is not None:
        found.append(at)
        at = entry[1]
    return found


class Faulty(RealStorage):
    """Counts writes and syncs of files by name, and fails those that it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.done: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], int] = lambda call, name: 0
        self.files: list[FaultyFile] = []

    def note(self, call: str, name: str) -> None:
        code = self.fail(call, name)
        self.done.append((call, name))
        if code:
            raise OSError(code, "told to fail")

    def open(self, name: str, mode: Mode) -> File:  # type: ignore[override]
        self.note("open " + mode, name)
        self.files.append(FaultyFile(super().open(name, mode), self, name))
        return self.files[-1]

    def rename(self, old: str, new: str) -> None:
        self.note("rename", new)
        super().rename(old, new)
        for file in self.files:
            if file.name == old:
                file.name = new

    def sync_dir(self, directory: str) -> None:
        self.note("sync_dir", directory)
        super().sync_dir(directory)


class FaultyFile:
    def __init__(self, file: File, storage: Faulty, name: str) -> None:
        self._file, self._storage, self.name = file, storage, name

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._storage.note("write", self.name)
        self._file.write(offset, buffers)

    def sync(self) -> None:
        self._storage.note("sync", self.name)
        self._file.sync()


def filled(where: Path, commits: int = 5) -> dict:
    known = open_it(where)
    for number in range(1, commits + 1):
        known.commit(("applied", number), (("verdicts", str(number)), {"n": number}))
    known.close()
    return known.state()
