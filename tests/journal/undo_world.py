"""An undo log on real files, with what its curator keeps beside it, and readers of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from journal.errors import Corruption
from journal.format import BLOCK, Kind, Log, payload_sums
from journal.segment import read_blocks, segment_name
from journal.storage import Buffer, File, Mode, RealStorage
from journal.undo import UndoWriter
from journal.undo_follower import UndoFollower, verify_undo
from journal.undo_recovery import recover_undo

DISK = b"d" * 16
Image = tuple[int, int, bytes]  # block, end, content


def image(block: int, end: int, nblocks: int = 1) -> Image:
    return block, end, bytes([end & 0xFF, block & 0xFF]) * (BLOCK // 2 * nblocks)


def batch_of(*images: Image) -> tuple[list[int], list[int], list[bytes], int]:
    entries, sums, payloads = [], [], []
    for block, end, content in images:
        zero = not any(content)
        kind = Kind.IMAGE_ZERO if zero else Kind.IMAGE
        entries += [block, end, len(content) // BLOCK, kind, 0, 0]
        if not zero:
            sums += payload_sums(content)
            payloads.append(content)
    return entries, sums, payloads, sum(map(len, payloads))


class Noting(RealStorage):
    """Notes the calls that make something durable, and fails those that it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.done: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], int] = lambda call, name: 0

    def note(self, call: str, name: str) -> None:
        code = self.fail(call, name)
        self.done.append((call, name))
        if code:
            raise OSError(code, "told to fail")

    def open(self, name: str, mode: Mode) -> File:  # type: ignore[override]
        if mode == "create":
            self.note("create", name)
        return NotingFile(super().open(name, mode), self, name)

    def rename(self, old: str, new: str) -> None:
        self.note("rename", new)
        super().rename(old, new)

    def unlink(self, name: str) -> None:
        self.note("unlink", name)
        super().unlink(name)

    def sync_dir(self, directory: str) -> None:
        self.note("sync_dir", directory)
        super().sync_dir(directory)


class NotingFile:
    def __init__(self, file: File, storage: Noting, name: str) -> None:
        self._file, self._storage, self._name = file, storage, name

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._storage.note("write", self._name)
        self._file.write(offset, buffers)

    def sync(self) -> None:
        self._storage.note("sync", self._name)
        self._file.sync()


class World:
    """An undo log with the catalog's list and the published position beside it."""

    def __init__(self, where: Path) -> None:
        self.storage = Noting(where)
        self.list: dict[int, int] = {}
        self.published = 0
        self.highest = 0
        self.identities = 0
        self.writer: UndoWriter | None = None

    def identity(self) -> bytes:
        self.identities += 1
        return self.identities.to_bytes(16, "little")

    def listed(self, segment: int) -> None:
        self.storage.note("list", segment_name(Log.UNDO, segment))
        self.list[segment] = 0
        self.highest = max(self.highest, segment)

    def recover(self, *, hint: bool = True):
        found = recover_undo(
            self.storage,
            DISK,
            self.list,
            identity=self.identity,
            highest=self.highest,
            published_hint=self.published if hint else 0,
        )
        self.list |= found.ends
        self.highest = max(self.highest, *found.ends, 0)
        self.published = found.published
        self.writer = UndoWriter(
            self.storage,
            DISK,
            next_segment=found.next_segment,
            next_number=found.next_number,
            segment_bytes=64 << 10,
            identity=self.identity,
            listed=self.listed,
            predecessor=found.predecessor,
            published=found.published,
        )
        return found

    def append(self, *images: Image):
        assert self.writer is not None
        return self.writer.append(*batch_of(*images))

    def sync(self, *, note_ends: bool = True) -> None:
        assert self.writer is not None
        self.published = self.writer.sync()
        if note_ends:
            self.list |= self.writer.take_ends()

    def follower(self) -> UndoFollower:
        return UndoFollower(RealStorage(self.storage.root), DISK, lambda: self.published)

    def images(self) -> list[Image]:
        return images_of(self.follower())

    def verify(self) -> list[Corruption]:
        follower = self.follower()
        return verify_undo(follower, follower.snapshot(), self.list)

    def path(self, segment: int) -> Path:
        return self.storage.root / segment_name(Log.UNDO, segment)


def images_of(follower: UndoFollower, *, damaged: bool = False) -> list[Image]:
    """All images that a follower shows, in order, verified; ``damaged``: without damaged ones."""
    found = []
    snapshot = follower.snapshot()
    for info, table in follower.tables(snapshot):
        for row, entry in enumerate(table.rows):
            block, end, nblocks = (int(entry[name]) for name in ("block", "arg", "nblocks"))
            if entry["kind"] == Kind.LOST:
                continue
            if entry["kind"] == Kind.IMAGE_ZERO:
                content = bytes(nblocks * BLOCK)
            else:
                file = follower.file(info)
                try:
                    content = read_blocks(file, table, row, 0, nblocks, name=info.name)
                except Corruption:
                    if damaged:
                        continue
                    raise
            found.append((block, end, content))
    follower.close()
    return found


def spoil(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def published_in_three_segments(world: World) -> None:
    assert world.writer is not None
    for segment in range(3):
        for number in range(3):
            world.append(image(segment * 10 + number, 5))
        world.sync()
        if segment < 2:
            world.writer.roll()
