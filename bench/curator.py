"""The curator alone: index and apply of random 4 KiB records, first touch of a full disk, reclaim.

    python bench/curator.py [--records 2000000] [--disk-gib 8] [--directory DIR]

Prints records per second of each kind of work. The redo log is written first, as the recorder
writes it; then the engine works through it as fast as it can. Beside it stands what the device
gives for the same writes to the backing alone, without log, index and before-images: where that is
below the target, so is the machine.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bench.report import Report, machine, parser, scratch
from cdp.child import Child
from cdp.config import DiskConfig
from cdp.curator.engine import GROUP_BLOCKS, Engine
from cdp.curator.service import beside
from cdp.curator.start import open_engine
from journal.bitmaps import Bitmaps
from journal.format import BLOCK, Kind, Log, SegmentHeader, payload_sums
from journal.frontier import Frontier
from journal.redo import RedoStart, RedoWriter, create_segment
from journal.storage import RealStorage
from replay import reclaim

DISK = bytes(16)
BATCH = 32
SEGMENT_BYTES = 64 << 20
ALONE_GROUPS = 2


class Bench:
    """One scratch disk."""

    def __init__(self, root: Path, disk_bytes: int) -> None:
        self.root, self.disk_bytes = root, disk_bytes
        (root / "journal").mkdir(parents=True)
        self.backing = root / "backing"
        self.config = DiskConfig(
            name="bench", uuid=DISK.hex(), size=disk_bytes, block_size=512,
            backing=str(self.backing), journal=str(root / "journal"), window_seconds=None,
            segment_bytes=SEGMENT_BYTES, journal_limit=1 << 50,
        )  # fmt: skip
        self.frontier = Frontier.open(root / "frontier", disk=DISK, boot_id=bytes(16), create=True)
        self.frontier.epoch = 1

    def prepare_backing(self, *, full: bool) -> None:
        """A sparse file, or one written in 4 KiB pieces (the page cache is as use leaves it)."""
        with self.backing.open("wb") as file:
            file.truncate(self.disk_bytes)
        if full:
            piece = os.urandom(BLOCK)
            fd = os.open(self.backing, os.O_RDWR)
            for at in range(0, self.disk_bytes, BLOCK):
                os.pwrite(fd, piece, at)
            os.fsync(fd)
            os.close(fd)

    def write_redo(self, records: int, seed: int) -> float:
        """Records of one random block each, in batches of 32; seconds it took."""
        storage = RealStorage(self.root / "journal")
        header = SegmentHeader(
            log=Log.REDO, disk=DISK, segment=1, identity=os.urandom(16), first_seq=1,
            predecessor=0, predecessor_chain=0, cut=0, stamp=1,
        )  # fmt: skip
        writer = RedoWriter(
            storage, DISK, RedoStart(create_segment(storage, header), Bitmaps(), 0),
            segment_bytes=SEGMENT_BYTES, identity=lambda: os.urandom(16),
        )  # fmt: skip
        blocks = self.blocks(records, seed)
        pool = os.urandom(1 << 20)
        started = time.monotonic()
        for first in range(0, records, BATCH):
            part = blocks[first : first + BATCH]
            payloads = []
            for block in part:
                at = (block * 977) % ((1 << 20) - BLOCK)
                payloads.append(pool[at : at + BLOCK])
            writer.append(
                [v for block in part for v in (block, 0, 1, Kind.WRITE, 0, 0)],
                [payload_sums(payload)[0] for payload in payloads],
                payloads, len(payloads) * BLOCK, stamp=first + 2, barrier=0, applied=0,
                window_start=0,
            )  # fmt: skip
            if first % (BATCH * 512) == 0:
                writer.sync()
        self.frontier.durable = writer.sync()
        return time.monotonic() - started

    def blocks(self, records: int, seed: int) -> list[int]:
        """The block of each record."""
        rng = np.random.default_rng(seed)
        drawn: list[int] = rng.integers(0, self.disk_bytes // BLOCK, records).tolist()
        return drawn

    def writes_alone(self, records: int, seed: int, *, full: bool) -> float:
        """Records per second of nothing but the writes that apply must do, for the first groups:
        sorted, 4 KiB each, a sync for each group. It is the device's and the file system's part.
        """
        path = self.backing if full else self.root / "alone"
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, self.disk_bytes)
        piece, blocks = os.urandom(BLOCK), self.blocks(records, seed)[: ALONE_GROUPS * GROUP_BLOCKS]
        started = time.monotonic()
        for first in range(0, len(blocks), GROUP_BLOCKS):
            for block in sorted(set(blocks[first : first + GROUP_BLOCKS])):
                os.pwrite(fd, piece, block * BLOCK)
            os.fdatasync(fd)
        took = time.monotonic() - started
        os.close(fd)
        if not full:
            path.unlink()
        return len(blocks) / took

    def open(self) -> Engine:
        """The engine on it."""
        fd = os.open(self.backing, os.O_RDWR)
        child = Child("curator", self.root, self.config, fd, 0, -1)
        return open_engine(child, self.frontier, launch=beside())[0]


def apply_rate(
    report: Report, root: Path, records: int, disk_bytes: int, *, full: bool, seed: int
) -> Engine:
    """Index and apply everything."""
    bench = Bench(root, disk_bytes)
    bench.prepare_backing(full=full)
    wrote = bench.write_redo(records, seed)
    alone = bench.writes_alone(records, seed, full=full)
    engine = bench.open()
    started, cpu = time.monotonic(), time.process_time()
    while engine.step(time.monotonic_ns(), urgent=True) or engine.applier.applied < records:
        pass
    took, cpu = time.monotonic() - started, time.process_time() - cpu
    name = "first touch of a full disk" if full else "a new sparse disk"
    report.at_least(
        f"index and apply, {name}", records / took, 80_000 if full else 200_000, " records/s",
        detail=f"{took:.1f} s; {records / took / alone:.2f} x the same writes alone, "
        f"{alone:,.0f}/s; cpu {cpu / records * 1e6:.1f} us each; the log was written at "
        f"{records / wrote:,.0f} records/s",
    )  # fmt: skip
    return engine


def reclaim_rate(report: Report, engine: Engine, points: int, seed: int) -> None:
    """Plan of reclaim of the oldest segments against all others, bookmarks all over history."""
    rng = random.Random(seed)
    durable = engine.frontier.durable
    ops = [
        (("bookmarks", f"b{number}"), {"seq": seq, "stamp": 1, "record_seq": seq,
                                       "requested": "crash", "consistency": "crash"})
        for number, seq in enumerate(sorted(rng.sample(range(1, durable), points)))
    ]  # fmt: skip
    engine.catalog.commit(*ops, ("window_start", durable // 2))
    openable = engine.kept.openable()
    count, started, needed = 0, time.monotonic(), 0
    for info in engine.redo.segments()[:8]:
        table = engine.redo.table(info)
        valid = np.ones(len(table.rows), bool)
        for part in reclaim.plan(engine.work, table, valid, engine.applier.applied, openable):
            needed += int(part.need.counts.sum())
        count += len(table.rows)
    took = time.monotonic() - started
    report.at_least(
        f"plan of reclaim, {points} points", count / took, 500_000, " records/s",
        detail=f"of {durable:,} records; {needed / count:.0%} to be saved",
    )  # fmt: skip


def main() -> None:
    """See the module."""
    arguments = parser(__doc__)
    arguments.add_argument("--records", type=int, default=2_000_000)
    arguments.add_argument("--disk-gib", type=float, default=8)
    arguments.add_argument("--seed", type=int, default=1)
    chosen = arguments.parse_args()
    size = int(chosen.disk_gib * (1 << 30)) // BLOCK * BLOCK
    report = Report(
        f"curator alone: {chosen.records:,} records, disk {size >> 20} MiB", chosen.rows
    )
    for full in (False, True):
        with scratch(chosen.directory) as directory:
            if not full:
                report.say(machine(directory))
            root = directory / "disk"
            engine = apply_rate(report, root, chosen.records, size, full=full, seed=chosen.seed)
            if not full:
                reclaim_rate(report, engine, 1000, chosen.seed)


if __name__ == "__main__":
    main()
