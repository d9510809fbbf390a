"""What the simulated world of `curator_model` stands on: its storage and its records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from journal.format import BLOCK, Kind, Log
from journal.segment import SegmentLister, load_table, open_segment, read_blocks, read_body
from journal.storage import Buffer, File, Mode, RealStorage, Storage
from replay.work import at_once
from tests.crash.sim_storage import SimStorage

DISK = b"curator crashes."
BACKING = "backing"


def content(value: int, blocks: int = 1) -> bytes:
    """Blocks that hold a value; 0 is zeroes."""
    return value.to_bytes(8, "little") * (BLOCK // 8 * blocks)


def values(data: bytes | bytearray) -> list[int]:
    """The value of every block; -1 for one that is torn."""
    words = np.frombuffer(data, "<u8").reshape(-1, BLOCK // 8)
    whole = (words == words[:, :1]).all(axis=1)
    return [int(row[0]) if good else -1 for row, good in zip(words, whole, strict=True)]


@dataclass(frozen=True)
class Record:
    """As in the table; ``data``: content or body."""

    kind: int
    block: int = 0
    count: int = 0
    arg: int = 0
    data: bytes = b""


class Routed:
    """The simulated storage, but ``index/`` in a real directory."""

    def __init__(self, sim: SimStorage, root: Path) -> None:
        self.sim, self.real = sim, RealStorage(root)

    def _of(self, name: str) -> Storage:
        return self.real if name == "index" or name.startswith("index/") else self.sim

    def open(self, name: str, mode: Mode) -> File:
        return self._of(name).open(name, mode)

    def rename(self, old: str, new: str) -> None:
        self._of(old).rename(old, new)

    def unlink(self, name: str) -> None:
        self._of(name).unlink(name)

    def list(self, directory: str) -> list[str]:
        return self._of(directory).list(directory)

    def sync_dir(self, directory: str) -> None:
        self._of(directory).sync_dir(directory)


class Backing:
    """The simulated backing; blocks of zeroes are its holes. ``before_write``: asked first."""

    def __init__(self, file: File, before_write: Callable[[int, int], None]) -> None:
        self._file, self._before_write = file, before_write

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._before_write(offset, sum(map(len, buffers)))
        self._file.write(offset, buffers)

    def zero(self, offset: int, length: int) -> None:
        self._before_write(offset, length)
        self._file.zero(offset, length)

    def extents(self, start: int = 0) -> Iterator[tuple[int, int]]:
        data = self._file.read(0, self._file.size())
        for at in range(start // BLOCK * BLOCK, len(data), BLOCK):
            if any(data[at : at + BLOCK]):
                yield at, min(BLOCK, len(data) - at)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def one_sided(sim: SimStorage, *, keep: str) -> SimStorage:
    """A power loss that loses nothing of the one side, and all that is not synced of the other."""
    return sim.lose(lambda name: (name == BACKING) == (keep == "journal"))


def read_log(storage: Storage, durable: int) -> dict[int, Record]:
    """Every record of the redo log, verified."""
    found: dict[int, Record] = {}
    for info in SegmentLister(storage, Log.REDO, DISK).refresh():
        file = open_segment(storage, info.name)
        table = load_table(file, info, upto=durable)
        for row, entry in enumerate(table.rows):
            kind, count = int(entry["kind"]), int(entry["nblocks"])
            data = b""
            if kind == Kind.WRITE:
                data = read_blocks(file, table, row, 0, count, name=info.name)
            elif kind >= 16:
                data = read_body(file, table, row, name=info.name)
            found[table.first_seq + row] = Record(
                kind, int(entry["block"]), count, int(entry["arg"]), data
            )
        file.close()
    return dict(sorted(found.items()))


class Later:
    """A sync that ends at once, which nobody is told before it was asked for some times."""

    def __init__(self, sync: Callable[[], None]) -> None:
        self._flight, self.asked = at_once(sync), 0

    def done(self) -> bool:
        self.asked += 1
        return self.asked > 2

    def result(self) -> None:
        self._flight.result()
