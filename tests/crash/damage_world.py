"""A small but complete journal, frozen, and copies of it that are damaged in one place.

`freeze` plays a history (several segments of both logs, a copy made by a recovery, runs of the
index, two copies of the catalog, a tail that is not applied) and keeps every byte. A `Patient` is a
copy with some bytes changed. It is looked at by whoever was there when it happened (`alive`), or by
processes that all start anew (`start`).
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cdp.child import Child
from cdp.config import DiskConfig
from cdp.curator.engine import Engine
from cdp.curator.start import open_engine
from cdp.viewer.__main__ import open_history
from journal.catalog import Catalog
from journal.errors import Corruption
from journal.follower import RedoFollower
from journal.format import BLOCK, Kind, Log
from journal.frontier import PAGE_BYTES, Frontier
from journal.hints import gather
from journal.recovery import Recovered, recover
from journal.runset import RunSet
from journal.segment import read_blocks
from journal.undo_follower import UndoFollower
from replay.facts import Told
from replay.history import History
from replay.scrub import Scrub
from tests.crash.curator_model import BOOT, CATALOG_BYTES, World, close
from tests.crash.curator_storage import BACKING, DISK, Backing, Record, Routed, values
from tests.crash.sim_storage import Inode, SimStorage

BLOCKS = 24
SEGMENT_BYTES = 32768
STEPS = 8  # of a curator that has come up: apply, index, housekeeping


@dataclass(frozen=True)
class Frozen:
    """Everything of a journal, and what is true of it. ``index``: the runs' files, in ``root``."""

    root: Path
    files: dict[str, bytes]
    index: tuple[str, ...]
    page: bytes
    model: tuple[tuple[int, ...] | None, ...]
    versions: dict[int, Record]
    points: tuple[int, ...]
    bookmarks: frozenset[str]
    durable: int
    stamp: int

    def content(self, name: str) -> bytes:
        """Of a file, by its name in the journal."""
        if name.startswith("index/"):
            return (self.root / name).read_bytes()
        return self.files[name]

    def version(self, block: int, seq: int) -> int:
        """Seq of the record that made the block what it was at a point; 0: none did."""
        return max(
            (each for each, record in self.versions.items()
             if each <= seq and record.block <= block < record.block + record.count),
            default=0,
        )  # fmt: skip


def history(world: World) -> None:
    """A life of everything that can be in a journal."""
    for block in range(0, 20, 2):
        world.write(block, 2)
    world.apply_all()
    world.bookmark()
    world.write_batch([(0, 1), (5, 2), (9, 1)])
    world.write(4, 17)  # above 64 KiB: checksums of large pieces
    world.zero(2, 3)
    world.trim(12, 4)
    world.apply_all()
    for _ in range(6):
        world.step()
    world.kill_recorder()
    world.write(1, 1)
    world.write_batch([(block, 1) for block in range(16, 24)])
    world.apply_all()
    world.rollback(world.openable()[-6])
    world.apply_all()
    world.kill_curator()
    for _ in range(3):
        world.step()
    for block in (3, 7, 11):
        world.write(block, 1)
        world.sync()
    world.apply_all()
    while world.release():
        pass
    world.reclaim()
    world.reclaim()
    world.bookmark()
    for block in (2, 6, 13, 3):
        world.write(block, 1)
    world.apply_all()
    for _ in range(20):
        world.step()
    world.rollback(world.openable()[-3])
    world.apply_all()
    # The tail: durable, said so in the log, and not applied.
    world.write_batch([(8, 1), (9, 1)])
    world.trim(17, 1)
    world.zero(18, 1)
    world.write(0, 3)
    world.sync()
    world.say_durable()


def freeze(root: Path, seed: int) -> Frozen:
    """Play the history of a seed, and keep what there is of it."""
    (root / "life").mkdir(parents=True)
    world = World(
        root / "life", seed, blocks=BLOCKS, segment_bytes=SEGMENT_BYTES, sparse=bool(seed % 2)
    )
    history(world)
    here = Path(world.child.config.journal)
    shutil.copytree(here / "index", root / "index")
    world.frontier.applied = world.running.applier.applied
    frozen = Frozen(
        root=root,
        files={name: bytes(inode.live) for name, inode in world.sim.live.items()},
        index=tuple(sorted(os.listdir(root / "index"))),
        page=world.frontier.path.read_bytes(),
        model=tuple(None if disk is None else tuple(disk) for disk in world.model),
        versions=world.valid(),
        points=tuple(world.openable()),
        bookmarks=frozenset(world.running.catalog.bookmarks()),
        durable=world.frontier.durable,
        stamp=world.stamp,
    )
    world.close()
    return frozen


class _Hands(Child):
    """What a process of the disk is given."""

    def storage(self) -> Routed:  # type: ignore[override]
        return _PATIENTS[self.directory].routed

    def backing(self) -> Backing:  # type: ignore[override]
        sim = _PATIENTS[self.directory].sim
        return Backing(sim.open(BACKING, "write"), lambda offset, length: None)


_PATIENTS: dict[Path, Patient] = {}


@dataclass
class Seen:
    """What a reader got: the points that are openable, what could not be read, what was wrong."""

    points: set[int] = field(default_factory=set)
    refused: set[tuple[int, int]] = field(default_factory=set)  # seq, block
    wrong: list[str] = field(default_factory=list)


class Patient:
    """A copy of a frozen journal. ``damage``: file -> its content instead; None: it is gone."""

    def __init__(self, frozen: Frozen, root: Path, damage: dict[str, bytes | None]) -> None:
        self.frozen, self.root = frozen, root
        (root / "index").mkdir(parents=True)
        for name in frozen.index:
            content = damage.get(f"index/{name}", b"")
            if content:
                (root / "index" / name).write_bytes(content)
            elif content is not None:
                os.link(frozen.root / "index" / name, root / "index" / name)
        self.sim = SimStorage(0)
        for name, data in frozen.files.items():
            new = damage.get(name, data)
            if new is not None:
                inode = Inode(bytearray(new), bytearray(new))
                self.sim.live[name] = self.sim.durable[name] = inode
        self.routed = Routed(self.sim, root)
        config = DiskConfig(
            name="d", uuid=DISK.hex(), size=BLOCKS * BLOCK, block_size=512, backing="",
            journal=str(root), window_seconds=None, segment_bytes=SEGMENT_BYTES,
            journal_limit=1 << 40,
        )  # fmt: skip
        self.child = _Hands("curator", root, config, -1, 0, -1)
        _PATIENTS[root] = self
        self.page = damage.get("frontier", frozen.page) or b""
        self.frontier: Frontier | None = None
        self.engine: Engine | None = None
        self.recovered: Recovered | None = None
        self.stamp = frozen.stamp
        self.random = random.Random(0)

    # ----------------------------------------------------------------------------- coming and going
    def alive(self) -> None:
        """All processes live: the page is as it was."""
        assert len(self.page) == PAGE_BYTES
        (self.root / "frontier").write_bytes(self.page)
        self.frontier = self._page(create=False)

    def _page(self, *, create: bool) -> Frontier:
        return Frontier.open(self.root / "frontier", disk=DISK, boot_id=BOOT, create=create)

    def start(self) -> None:
        """A new boot: the recorder recovers, then the curator comes up and works."""
        self.start_recorder()
        self.start_curator()

    def restart(self) -> None:
        """The same once more."""
        self._stop()
        (self.root / "frontier").unlink()
        self.start()

    def start_recorder(self) -> None:
        """As `cdp.recorder.start` does."""
        self.stamp += 1000
        frontier = self.frontier = self._page(create=True)
        hints = gather(self.routed, self.root / "index", DISK)
        found = self.recovered = recover(
            self.routed, DISK, durable_hint=hints.durable, applied_hint=hints.applied,
            segment_hint=hints.segment, reclaimed_hint=hints.reclaimed, stamp=self.stamp,
            identity=lambda: self.random.randbytes(16),
        )  # fmt: skip
        frontier.applied, frontier.durable = found.applied, found.durable
        frontier.redo_generation += 1
        frontier.epoch += 1

    def start_curator(self) -> None:
        """The curator."""
        assert self.frontier is not None
        catalog = Catalog.open(self.routed, DISK, file_bytes_min=CATALOG_BYTES)
        self.notes = catalog.notes
        self.engine, self.points = open_engine(self.child, self.frontier, catalog)

    def work(self) -> None:
        """What a curator does in its first seconds."""
        assert self.engine is not None
        for _ in range(STEPS):
            self.stamp += 2_000_000_000
            self.engine.step(self.stamp)

    def _stop(self) -> None:
        if self.engine is not None:
            for runs in (self.engine.redo_runs, self.engine.undo_runs):
                runs.close()
            self.engine.catalog.close()
            self.engine = None
        if self.frontier is not None:
            self.frontier.close()
            self.frontier = None

    def close(self) -> None:
        """The end of it."""
        self._stop()
        del _PATIENTS[self.root]
        shutil.rmtree(self.root)

    # ------------------------------------------------------------------------------------- looking
    def openable(self) -> set[int]:
        """What the product calls openable, of what was before."""
        assert self.engine is not None
        kept = self.engine.kept.openable()
        return {seq for seq in self.frozen.points if kept.contains(seq)}

    def look(self, points: set[int]) -> Seen:
        """Read every block at every one of the points."""
        assert self.frontier is not None
        reader = open_history(self.child, self.frontier)
        try:
            seen = Seen(points)
            for seq in sorted(points):
                self._read(reader, seq, seen)
            return seen
        finally:
            close(reader)

    def _read(self, reader: History, seq: int, seen: Seen) -> None:
        expected = self.frozen.model[seq]
        assert expected is not None
        got = self._values(reader, seq, 0, BLOCKS)
        seen.refused |= {(seq, block) for block, value in enumerate(got) if value is None}
        pairs = zip(got, expected, strict=True)
        if any(value not in (None, wanted) for value, wanted in pairs):
            seen.wrong.append(f"seq {seq}: {got}, not {list(expected)}")

    def _values(self, reader: History, seq: int, first: int, count: int) -> list[int | None]:
        """Of some blocks; None: an error. Halved until it is known for which."""
        try:
            return list(values(reader.read(seq, first, count)))
        except (Corruption, OSError):
            if count == 1:
                return [None]
        half = count // 2
        left = self._values(reader, seq, first, half)
        return left + self._values(reader, seq, first + half, count - half)

    def scrub(self) -> Scrub:
        """What a scrub says; it takes nothing from those who read."""
        assert self.frontier is not None
        frontier = self.frontier
        catalog = Catalog.open(self.routed, DISK, read_only=True)
        runs = [
            RunSet(self.routed, self.root / "index", log=log, disk=DISK, read_only=True)
            for log in (Log.REDO, Log.UNDO)
        ]
        redo = RedoFollower(self.routed, DISK, frontier)
        undo = UndoFollower.of(self.routed, DISK, frontier, catalog.undo)
        scrub = Scrub(
            redo=redo, undo=undo, runs=runs, durable=lambda: frontier.durable,
            catalog=lambda: (Told.by(catalog), catalog.undo()),
        )  # fmt: skip
        for _ in scrub.steps():
            pass
        for each in runs:
            each.close()
        redo.close()
        undo.close()
        return scrub

    def live(self) -> Iterator[tuple[int, int | None]]:
        """(block, value) of the disk as its clients see it right after a start; None: an error.

        Nothing when the disk is not served: something is lost above `applied`.
        """
        found = self.recovered
        assert found is not None
        if any(each.last_seq > found.applied for each in found.corruptions):
            return
        backing = bytes(self.sim.live[BACKING].live).ljust(BLOCKS * BLOCK, b"\0")
        now: list[int | None] = list(values(backing))
        for block in found.masks:
            now[block] = 0
        for info, table in found.tail:
            file = self.routed.open(info.name, "read")
            for row in np.flatnonzero(table.rows["kind"] < 16).tolist():
                entry = table.rows[row]
                block, count = int(entry["block"]), int(entry["nblocks"])
                if entry["kind"] in (Kind.ZERO, Kind.TRIM):
                    now[block : block + count] = [0] * count
                elif entry["kind"] == Kind.WRITE:
                    for each in range(count):
                        try:
                            data = read_blocks(file, table, row, each, 1, name=info.name)
                            now[block + each] = values(data)[0]
                        except (Corruption, OSError):
                            now[block + each] = None
            file.close()
        yield from enumerate(now)
