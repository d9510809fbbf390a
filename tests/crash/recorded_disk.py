"""A block device that remembers every write and flush, and what a power cut may leave of them.

QEMU's `blklogwrites` driver writes down what a kernel file system does to its device (qemu-nbd, an
nbdfuse file, a loop device), in the format of the kernel's dm-log-writes. A cut is a place in that
log: what lies before the last flush in front of it is on the medium; each sector written behind
that is there or not, independently, as a device with a volatile cache may have it.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.interop.devices import WAIT_SECONDS, device, wait_for

SECTOR: Final = 512
_MAGIC: Final = 0x6A736677736872
_SUPER: Final = struct.Struct("<QQQI")  # magic, version, entries, bytes of a sector
_ENTRY: Final = struct.Struct("<QQQQ")  # sector, sectors, flags, bytes of a mark
_FLUSH: Final = 1
_FUA: Final = 2
_DISCARD: Final = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """One request: ``data_at`` is where the log has its content, 0 for zeroes."""

    offset: int
    length: int
    flush: bool
    fua: bool
    data_at: int
    end: int  # of the entry in the log


class Recording:
    """A device being recorded: its first content, its log."""

    def __init__(self, image: Path) -> None:
        self.base = image.with_suffix(".base")
        self.image, self.log = image, image.with_suffix(".log")
        copy(image, self.base)

    @property
    def position(self) -> int:
        """How far the log has come: what was answered before is in front of it."""
        return self.log.stat().st_size

    @contextmanager
    def attached(self, folder: Path) -> Iterator[str]:
        """The loop device to work with."""
        self.log.touch()
        socket = folder / "recorded.sock"
        options = (
            f"driver=blklogwrites,file.driver=file,file.filename={self.image},"
            f"log.driver=file,log.filename={self.log}"
        )
        server = subprocess.Popen(
            ["qemu-nbd", "--persistent", "--shared=4", f"--socket={socket}",
             f"--pid-file={folder}/qemu-nbd.pid", "--image-opts", options],
        )  # fmt: skip
        try:
            wait_for((folder / "qemu-nbd.pid").exists, "qemu-nbd does not come up")
            with device(f"nbd+unix:///?socket={socket}", folder / "fuse") as loop:
                yield loop
        finally:
            server.terminate()
            server.wait(WAIT_SECONDS)

    def entries(self) -> list[Entry]:
        """The whole log."""
        found = []
        with self.log.open("rb") as log:
            magic, version, count, sector = _SUPER.unpack(log.read(_SUPER.size))
            assert (magic, version, sector) == (_MAGIC, 1, SECTOR)
            at = SECTOR
            for _ in range(count):
                log.seek(at)
                start, sectors, flags, _ = _ENTRY.unpack(log.read(_ENTRY.size))
                size = 0 if flags & _DISCARD else sectors * SECTOR
                data_at = at + SECTOR
                at = data_at + size
                found.append(Entry(
                    start * SECTOR, sectors * SECTOR, bool(flags & _FLUSH), bool(flags & _FUA),
                    data_at if size else 0, at,
                ))  # fmt: skip
        return found


def copy(source: Path, target: Path) -> None:
    """Sparse."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


class Cutter:
    """Makes images of the device at cuts that come in the order of the log."""

    def __init__(self, recording: Recording) -> None:
        self._entries = recording.entries()
        self._log = recording.log.open("rb")
        self._stable = recording.base.with_suffix(".stable")
        shutil.move(recording.base, self._stable)
        self._image = os.open(self._stable, os.O_RDWR)
        self._applied = 0  # entries that are in it
        # How many are on the medium for sure, after each number of entries.
        self._flushed = [0]
        for number, entry in enumerate(self._entries, 1):
            self._flushed.append(number if entry.flush else self._flushed[-1])

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """Of no more use."""
        self._log.close()
        os.close(self._image)
        self._stable.unlink()

    def at_stake(self, cut: int) -> int:
        """How many entries a cut after so many can take; 0 behind a flush."""
        return cut - self._flushed[cut]

    def first(self, position: int) -> int:
        """The number of entries in front of a position of the log."""
        return sum(entry.end <= position for entry in self._entries)

    def position(self, cut: int) -> int:
        """The position of the log up to which the device got requests."""
        return self._entries[cut - 1].end if cut else 0

    def cut(self, cut: int, target: Path, rng: random.Random) -> None:
        """An image after ``cut`` entries."""
        flushed = self._flushed[cut]
        assert flushed >= self._applied, "cuts come in order"
        for entry in self._entries[self._applied : flushed]:
            self._apply(self._image, entry)
        self._applied = flushed
        copy(self._stable, target)
        # Most cuts lose some, some lose nearly all or nearly nothing.
        kept = rng.choice((0.0, 0.1, 0.5, 0.5, 0.9, 1.0))
        image = os.open(target, os.O_RDWR)
        try:
            for entry in self._entries[flushed:cut]:
                if entry.fua or rng.random() < kept:
                    torn = not entry.fua and rng.random() < 0.2
                    self._apply(image, entry, rng if torn else None)
        finally:
            os.close(image)

    def _apply(self, image: int, entry: Entry, torn: random.Random | None = None) -> None:
        if not entry.length:
            return
        data = bytes(entry.length)
        if entry.data_at:
            self._log.seek(entry.data_at)
            data = self._log.read(entry.length)
        if torn is None:
            os.pwrite(image, data, entry.offset)
            return
        for at in range(0, entry.length, SECTOR):
            if torn.random() < 0.5:
                os.pwrite(image, data[at : at + SECTOR], entry.offset + at)
