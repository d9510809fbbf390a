"""The curator on what is large: huge trims and zeroes, a huge sparse disk, many bookmarks.

The bounds are generous: they tell a number of blocks from a number of records.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cdp.child import Child
from cdp.config import DiskConfig
from cdp.curator.start import open_engine
from cdp.viewer.__main__ import open_history
from journal.bitmaps import Bitmaps
from journal.catalog_state import Bookmark, put
from journal.format import BLOCK, Kind, Log, SegmentHeader, payload_sums
from journal.frontier import Frontier
from journal.redo import RedoStart, RedoWriter, create_segment

DISK = bytes(16)
GIB = 1 << 30
SECOND = 1_000_000_000
RECORD_BLOCKS = (4 * GIB - BLOCK) // BLOCK  # as much as a request of 32 bits can name


class Big:
    """A sparse disk with real files and an engine."""

    def __init__(self, root: Path, size: int, segment_bytes: int = 1 << 20) -> None:
        self.size, self.blocks = size, -(-size // BLOCK)
        backing = root / "backing"
        with backing.open("wb") as file:
            file.truncate(size)
        (root / "journal").mkdir()
        config = DiskConfig(
            name="d", uuid=DISK.hex(), size=size, block_size=512, backing=str(backing),
            journal=str(root / "journal"), window_seconds=None, segment_bytes=segment_bytes,
            journal_limit=1 << 40,
        )  # fmt: skip
        self.fd = os.open(backing, os.O_RDWR)
        self.child = Child("curator", root, config, self.fd, 0, -1)
        self.frontier = Frontier.open(root / "frontier", disk=DISK, boot_id=DISK, create=True)
        self.frontier.epoch = 1
        header = SegmentHeader(
            log=Log.REDO, disk=DISK, segment=1, identity=os.urandom(16), first_seq=1,
            predecessor=0, predecessor_chain=0, cut=0, stamp=1,
        )  # fmt: skip
        storage = self.child.storage()
        self.writer = RedoWriter(
            storage, DISK, RedoStart(create_segment(storage, header), Bitmaps(), 0),
            segment_bytes=segment_bytes, identity=lambda: os.urandom(16),
            on_segment=self._on_segment,
        )  # fmt: skip
        self.stamp = 1000
        self.engine, self.points = open_engine(self.child, self.frontier)

    def _on_segment(self, _number: int) -> None:
        self.frontier.redo_generation += 1

    def append(self, *records: tuple[int, int, Kind]) -> int:
        """One batch of (block, count, kind); a write is of its own seq."""
        self.stamp += 1000
        entries: list[int] = []
        payloads = []
        seq = self.writer.last_seq
        for block, count, kind in records:
            seq += 1
            entries += (block, 0, count, kind, 0, 0)
            if kind == Kind.WRITE:
                payloads.append(seq.to_bytes(8, "little") * (BLOCK // 8 * count))
        sums = [one for payload in payloads for one in payload_sums(payload)]
        done = self.writer.append(
            entries, sums, payloads, sum(map(len, payloads)), stamp=self.stamp, barrier=0,
            applied=0, window_start=0,
        )  # fmt: skip
        return done.last_seq

    def settle(self) -> None:
        """Everything is durable, applied, and indexed."""
        self.frontier.durable = self.writer.sync()
        for _ in range(10_000):
            self.stamp += 2 * SECOND
            busy = self.engine.step(self.stamp)
            assert self.engine.trouble is None, self.engine.trouble
            if not busy and self.engine.applier.applied == self.frontier.durable:
                return
        raise AssertionError("the engine does not come to rest")

    def reclaim_all(self) -> None:
        """Every closed redo segment goes."""
        while self.engine.reclaim_oldest():
            pass

    def values(self, seq: int, first: int, count: int = 1) -> list[int]:
        """The values of some blocks at a point."""
        history = open_history(self.child, self.frontier)
        data = history.read(seq, first, count)
        for runs in (history.redo_runs, history.undo_runs):
            runs.close()
        return np.frombuffer(data, "<u8")[:: BLOCK // 8].tolist()

    def close(self) -> None:
        for runs in (self.engine.redo_runs, self.engine.undo_runs):
            runs.close()
        os.close(self.fd)


@pytest.fixture
def cheap() -> Iterator[None]:
    """Neither time nor memory of a number of blocks."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 << 10
    assert time.process_time() - start < 40


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_huge_trims_and_zeroes_on_a_huge_sparse_disk(tmp_path: Path) -> None:
    disk = Big(tmp_path, 64 * GIB)
    blocks = disk.blocks
    spots = [7, RECORD_BLOCKS // 2, blocks // 3, blocks - 2]
    first = disk.append(*((spot, 1, Kind.WRITE) for spot in spots))
    for _ in range(3):
        for start in range(0, blocks, RECORD_BLOCKS):
            disk.append((start, min(RECORD_BLOCKS, blocks - start), Kind.TRIM))
    trimmed = disk.append((spots[1], 1, Kind.WRITE))
    for start in range(0, blocks, RECORD_BLOCKS):
        disk.append((start, min(RECORD_BLOCKS, blocks - start), Kind.ZERO))
    zeroed = disk.append((spots[2], 1, Kind.WRITE))
    for start in range(0, blocks, RECORD_BLOCKS):
        disk.append((start, min(RECORD_BLOCKS, blocks - start), Kind.TRIM))
    again = disk.writer.last_seq
    while disk.writer.segment < 2:
        disk.append((9, 15, Kind.WRITE))
    last = disk.writer.last_seq
    disk.settle()
    seqs = {spot: first - len(spots) + 1 + at for at, spot in enumerate(spots)}

    def check() -> None:
        for spot in spots:
            assert disk.values(0, spot) == [0]
            assert disk.values(first, spot) == [seqs[spot]]
        assert disk.values(trimmed, spots[0], 2) == [0, 0]
        assert disk.values(trimmed, spots[1], 2) == [trimmed, 0]
        assert disk.values(zeroed, spots[1] - 1, 3) == [0, 0, 0]
        assert disk.values(zeroed, spots[2], 2) == [zeroed, 0]
        assert disk.values(again, spots[2], 2) == [0, 0]
        assert disk.values(last, 8, 2) == [0, last]

    check()
    disk.reclaim_all()
    assert len(disk.engine.redo.segments()) == 1
    check()
    disk.settle()
    check()
    assert os.stat(tmp_path / "backing").st_blocks * 512 < 1 << 20
    for info in disk.engine.closed_undo():
        disk.engine.sweep(info)
    check()
    disk.engine.move_window(last)
    disk.settle()
    assert disk.values(last, 8, 2) == [0, last]
    disk.close()


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_one_huge_zero_over_old_data(tmp_path: Path) -> None:
    """Its old content is saved, as much as there is; the holes between cost nothing."""
    disk = Big(tmp_path, 64 * GIB, segment_bytes=8 << 20)
    places = range(5, RECORD_BLOCKS, RECORD_BLOCKS // 500)
    for place in places:
        disk.append((place, 2, Kind.WRITE))
    disk.settle()
    wrote = disk.writer.last_seq
    for info in disk.engine.redo.segments()[:-1]:
        assert disk.engine.reclaim_oldest(), info
    disk.append((0, RECORD_BLOCKS, Kind.ZERO))
    disk.settle()
    for at in (0, 250, 499):
        assert disk.values(wrote, places[at], 3) == [at + 1, at + 1, 0]
        assert disk.values(wrote + 1, places[at], 3) == [0, 0, 0]
    disk.close()


@pytest.mark.usefixtures("cheap")
def test_many_bookmarks_far_behind_the_window(tmp_path: Path) -> None:
    disk = Big(tmp_path, 1 * GIB, segment_bytes=4 << 20)
    for number in range(200):
        disk.append(*((block * 64 + number % 64, 1, Kind.WRITE) for block in range(20)))
    disk.settle()
    seqs = range(1, 3000, 1)
    disk.engine.catalog.commit(
        *(put(Bookmark(f"b{seq}", seq, seq, seq, "crash", "crash")) for seq in seqs)
    )
    disk.engine.move_window(disk.frontier.durable)
    for number in range(200):
        disk.append(*((block * 64 + number % 64, 1, Kind.WRITE) for block in range(20)))
        if number % 20 == 19:
            disk.settle()
    disk.reclaim_all()
    for seq in (1, 777, 2999):
        batch, block = divmod(seq - 1, 20)
        assert disk.values(seq, block * 64 + batch % 64) == [seq]
    disk.close()


@pytest.mark.parametrize("size", [512, BLOCK + 512, 5 * BLOCK - 1024])
def test_the_smallest_disks(tmp_path: Path, size: int) -> None:
    """Their last block is short; nothing is written behind the end of the backing."""
    disk = Big(tmp_path, size)
    last = disk.blocks - 1
    for _ in range(2):
        disk.append((0, disk.blocks, Kind.WRITE))
        disk.append((last, 1, Kind.TRIM))
        disk.append((last, 1, Kind.WRITE))
        disk.append((last, 1, Kind.ZERO))
        disk.append((0, disk.blocks, Kind.TRIM))
        disk.append((last, 1, Kind.WRITE))
    while disk.writer.segment < 2:
        disk.append((0, 1, Kind.WRITE))
    disk.settle()
    while disk.engine.release_step():
        pass
    disk.reclaim_all()
    assert os.fstat(disk.fd).st_size == size
    expected = {0: 0, 1: 1, 2: 0, 3: 3, 4: 0, 5: 0, 6: 6}
    for seq, value in expected.items():
        assert disk.values(seq, last) == [value]
    disk.close()
