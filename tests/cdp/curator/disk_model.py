"""One disk's logs with the real curator's engine, and as plain a model as can be: a list of disks.

The recorder is played by a `RedoWriter`; processes by objects that are dropped (``kill``) or made
anew. `model[seq]` is the content of every block after record seq, as one number per block; 0 is
zero.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np

from cdp.child import Child
from cdp.config import DiskConfig
from cdp.curator.engine import Engine
from cdp.curator.points import Points
from cdp.curator.start import open_engine
from cdp.viewer.__main__ import open_history
from journal.bitmaps import Bitmaps
from journal.format import BLOCK, Kind, Log, SegmentHeader, payload_sums
from journal.frontier import Frontier
from journal.redo import RedoStart, RedoWriter, create_segment
from journal.storage import RealFile
from replay.history import History
from replay.rollback import plan as plan_rollback

DISK = bytes(range(16))
BOOT = bytes(16)
SEGMENT_BYTES = 1 << 20


def content(value: int, blocks: int = 1) -> bytes:
    """Blocks that hold a value; 0 is zeroes."""
    return value.to_bytes(8, "little") * (BLOCK // 8 * blocks)


class Disk:
    """See the module."""

    def __init__(self, root: Path, *, blocks: int = 96, sparse: bool = False) -> None:
        self.root, self.blocks = root, blocks
        backing = root / "backing"
        initial = [0 if sparse else 1_000_000 + block for block in range(blocks)]
        with backing.open("wb") as file:
            if sparse:
                file.truncate(blocks * BLOCK)
            else:
                file.write(b"".join(content(value) for value in initial))
        (root / "journal").mkdir()
        self.config = DiskConfig(
            name="d", uuid=DISK.hex(), size=blocks * BLOCK, block_size=512, backing=str(backing),
            journal=str(root / "journal"), window_seconds=None, segment_bytes=SEGMENT_BYTES,
            journal_limit=1 << 40,
        )  # fmt: skip
        self.fd = os.open(backing, os.O_RDWR)
        self.child = Child("curator", root, self.config, self.fd, 0, -1)
        self.frontier = Frontier.open(root / "frontier", disk=DISK, boot_id=BOOT, create=True)
        self.frontier.epoch = 1
        self.model: list[list[int] | None] = [initial]
        self.bookmarks: dict[str, int] = {}
        self.stamp = 1000
        storage = self.child.storage()
        header = SegmentHeader(
            log=Log.REDO, disk=DISK, segment=1, identity=os.urandom(16), first_seq=1,
            predecessor=0, predecessor_chain=0, cut=0, stamp=self.stamp,
        )  # fmt: skip
        self.writer = RedoWriter(
            storage, DISK, RedoStart(create_segment(storage, header), Bitmaps(), 0),
            segment_bytes=SEGMENT_BYTES, identity=lambda: os.urandom(16),
            on_segment=self._on_segment,
        )  # fmt: skip
        storage.sync_dir("redo")
        self.engine, self.points = self._open()
        self.reader: History | None = None

    def _on_segment(self, _number: int) -> None:
        self.frontier.redo_generation += 1

    def _open(self) -> tuple[Engine, Points]:
        return open_engine(self.child, self.frontier)

    # ------------------------------------------------------------------------------ the recorder
    def _append(
        self, records: list[tuple[int, int, int, int]], payloads: list[bytes],
        disk: list[int] | None,
    ) -> int:  # fmt: skip
        self.stamp += 1000
        entries = [
            value
            for block, arg, count, kind in records
            for value in (block, arg, count, kind, 0, 0)
        ]
        sums = [total for payload in payloads for total in payload_sums(payload)]
        done = self.writer.append(
            entries, sums, payloads, sum(map(len, payloads)), stamp=self.stamp, barrier=0,
            applied=self.frontier.applied, window_start=self.frontier.window_start,
        )  # fmt: skip
        for _ in range(done.first_seq, done.last_seq):
            self.model.append(None)
        self.model.append(disk)
        return done.last_seq

    def now(self) -> list[int]:
        """The newest content."""
        return list(next(disk for disk in reversed(self.model) if disk is not None))

    def write(self, block: int, count: int) -> None:
        """One write of ``count`` blocks."""
        disk, value = self.now(), len(self.model)
        disk[block : block + count] = [value] * count
        self._append([(block, 0, count, Kind.WRITE)], [content(value, count)], disk)

    def zero(self, block: int, count: int, kind: Kind) -> None:
        """One write-zeroes or trim."""
        disk = self.now()
        disk[block : block + count] = [0] * count
        self._append([(block, 0, count, kind)], [], disk)

    def control(self, kind: Kind, body: dict[str, object]) -> int:
        """A control record; the content stays."""
        data = json.dumps(body).encode()
        padded = data.ljust(-(-len(data) // 8) * 8, b"\0")
        self.stamp += 1000
        done = self.writer.append(
            [0, len(data), 0, kind, 0, 0], payload_sums(data), [padded], len(padded),
            stamp=self.stamp, barrier=0, applied=self.frontier.applied,
            window_start=self.frontier.window_start,
        )  # fmt: skip
        self.model.append(self.now())
        return done.last_seq

    def sync(self) -> None:
        """All that was appended becomes durable."""
        self.frontier.durable = self.writer.sync()

    def bookmark(self, label: str) -> None:
        """Name the newest state."""
        self.bookmarks[label] = self.control(Kind.BOOKMARK, {"label": label})

    def rollback(self, seq: int, *, commit: bool = True) -> None:
        """Back to an openable point, as the recorder does it with a viewer's plan."""
        self.sync()
        tip = self.frontier.durable
        then, now = self.model[seq], self.now()
        assert then is not None
        self.points.pin("rollback", seq, owner="test", opened_ns=0, max_age_s=0)
        plan = plan_rollback(self.new_reader(), seq, tip)
        self.control(Kind.ROLLBACK_BEGIN, {"to_seq": seq})
        self.model[-1] = None
        for ref in plan.refs:
            self._append([(ref.start, ref.source, ref.blocks, Kind.REF)], [], None)
        self.control(Kind.ROLLBACK_COMMIT if commit else Kind.ROLLBACK_ABORT, {})
        self.model[-1] = list(then) if commit else now
        self.sync()
        self.points.unpin("rollback")

    # -------------------------------------------------------------------------------- the curator
    def step(self) -> bool:
        """One step of the engine, long after the one before."""
        self.stamp += 2_000_000_000
        busy = self.engine.step(self.stamp)
        assert self.engine.trouble is None, self.engine.trouble
        return busy

    def settle(self) -> None:
        """Steps until nothing is left to do."""
        for _ in range(10_000):
            if not self.step() and self.engine.applier.applied == self.frontier.durable:
                return
        raise AssertionError("the engine does not come to rest")

    def kill(self) -> None:
        """The curator dies, what it wrote survives in the page cache; the next one starts."""
        self.engine, self.points = self._open()

    def new_reader(self) -> History:
        """A viewer's eyes."""
        self.reader = open_history(self.child, self.frontier)
        return self.reader

    # ------------------------------------------------------------------------------------- checks
    def openable(self) -> list[int]:
        """All openable seqs, as the product says."""
        kept = self.engine.kept.openable()
        return [seq for seq in range(self.frontier.durable + 1) if bool(kept.contains(seq))]

    def check(self, rng: random.Random, *, points: int = 12) -> None:
        """Some openable points through an old and a new reader; bookmarks always."""
        seqs = self.openable()
        chosen = set(rng.sample(seqs, min(points, len(seqs)))) | set(seqs[:1]) | set(seqs[-1:])
        chosen |= {seq for seq in self.bookmarks.values() if seq <= self.frontier.durable}
        readers = [self.engine.history, self.reader or self.new_reader(), self.new_reader()]
        for seq in sorted(chosen):
            expected = self.model[seq]
            assert expected is not None, f"seq {seq} is inside a rollback, yet openable"
            for number, reader in enumerate(readers):
                got = np.frombuffer(reader.read(seq, 0, self.blocks), "<u8")[:: BLOCK // 8].tolist()
                assert got == expected, f"seq {seq}, reader {number}: {differences(got, expected)}"

    def check_backing(self) -> None:
        """After everything is applied and released the backing alone is the disk."""
        self.sync()
        while not self.engine.drain_step(self.frontier.durable, self.stamp + 10**10):
            assert self.engine.trouble is None, self.engine.trouble
        while self.engine.release_step():
            pass
        got = np.frombuffer(RealFile(self.fd).read(0, self.blocks * BLOCK), "<u8")
        assert got[:: BLOCK // 8].tolist() == self.now()


def differences(got: list[int], expected: list[int]) -> str:
    """The blocks that differ."""
    return ", ".join(
        f"block {block}: {mine}, not {its}"
        for block, (mine, its) in enumerate(zip(got, expected, strict=True))
        if mine != its
    )
