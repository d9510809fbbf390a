"""One disk whose logs and backing lie on a simulated storage, and the obvious model: a list of
disks.

`World` plays the recorder with a `RedoWriter` and journal's recovery, and runs the real engine. It
may lose the power, the curator, or the recorder, between any two operations of the storage; `check`
then compares everything a reader may see with the model: ``model[seq]`` is the content of every
block after record ``seq``, one number per block, or None where there is no such point.

LMDB writes its files by itself, so the index lies in a real directory; being a cache, it is removed
when the power goes.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cdp.child import Child
from cdp.config import DiskConfig
from cdp.curator.engine import Engine
from cdp.curator.points import Points
from cdp.curator.start import open_engine
from cdp.viewer.__main__ import open_history
from journal.catalog import Catalog
from journal.entries import unpack_loc
from journal.format import BLOCK, Kind, Log, payload_sums
from journal.frontier import Frontier
from journal.recovery import recover
from journal.redo import RedoWriter
from journal.segment import SegmentLister, load_table, open_segment, read_blocks, read_body
from journal.storage import Buffer, File, Mode, RealStorage, Storage
from replay import reclaim, release
from replay.history import History
from replay.rollback import plan as plan_rollback
from tests.crash.sim_storage import Crash, Inode, SimStorage

DISK = b"curator crashes."
BOOT = bytes(16)
BACKING = "backing"
CATALOG_BYTES = 1 << 14


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


class Processes(Child):
    """What a process of the disk is given, here by the `World`."""

    def storage(self) -> Routed:  # type: ignore[override]
        return WORLDS[self.directory].routed

    def backing(self) -> Backing:  # type: ignore[override]
        return WORLDS[self.directory].open_backing()


WORLDS: dict[Path, World] = {}


@dataclass
class World:
    """See the module. ``failures``: what has happened, for messages."""

    root: Path
    seed: int
    blocks: int = 6
    segment_bytes: int = 16384
    sparse: bool = False
    short: int = 0  # bytes that the last block lacks
    understate: bool = False  # batch headers say nothing of `applied`
    records: dict[int, Record] = field(default_factory=dict)
    model: list[list[int] | None] = field(default_factory=list)
    synced: int = 0
    stamp: int = 1000
    lives: int = 0
    acting: str = ""
    marks: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    crash_next: int = 0  # operations from the next failure on until there is another one

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        WORLDS.clear()
        WORLDS[self.root] = self
        first = [0 if self.sparse else 1000 + block for block in range(self.blocks)]
        self.model = [first]
        self.sim = SimStorage(self.seed)
        data = b"".join(map(content, first))
        data = data[: len(data) - self.short]
        self.sim.live[BACKING] = self.sim.durable[BACKING] = Inode(bytearray(data), bytearray(data))
        self.engine: Engine | None = None
        self.points: Points | None = None
        self.writer: RedoWriter | None = None
        self.before_write: Callable[[int, int], None] = lambda offset, length: None
        self._boot()
        self.start_curator()

    # ----------------------------------------------------------------------------- coming and going
    def open_backing(self) -> Backing:
        """The backing as the curator holds it."""
        return Backing(self.sim.open(BACKING, "write"), self.before_write)

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.blocks * BLOCK - self.short

    def _boot(self) -> None:
        """A new boot: nothing but the storage is left."""
        self.lives += 1
        here = self.root / f"life-{self.lives}"
        (here / "index").mkdir(parents=True)
        self.routed = Routed(self.sim, here)
        config = DiskConfig(
            name="d", uuid=DISK.hex(), size=self.size, block_size=512, backing="",
            journal=str(here), window_seconds=None, segment_bytes=self.segment_bytes,
            journal_limit=1 << 40,
        )  # fmt: skip
        self.child = Processes("curator", self.root, config, -1, 0, -1)
        self.frontier = Frontier.open(here / "frontier", disk=DISK, boot_id=BOOT, create=True)
        self.start_recorder()

    def start_recorder(self) -> None:
        """Recovery of the redo log; what it found replaces what was appended."""
        self.acting = "recorder"
        self.stamp += 1000
        recovered = recover(
            self.routed, DISK, durable_hint=self.frontier.durable,
            applied_hint=self.frontier.applied, stamp=self.stamp,
            identity=lambda: self.random.randbytes(16),
        )  # fmt: skip
        assert recovered.corruptions == []
        self._judge(recovered.durable)
        self.writer = RedoWriter(
            self.routed, DISK, recovered.start, segment_bytes=self.segment_bytes,
            identity=lambda: self.random.randbytes(16), on_segment=self._new_segment,
        )  # fmt: skip
        self.masks = set(recovered.masks)
        self.seen = recovered.applied
        frontier = self.frontier
        frontier.applied = max(frontier.applied, recovered.applied)
        frontier.durable = max(frontier.durable, recovered.durable)
        frontier.redo_generation += 1
        frontier.epoch += 1
        self.synced = recovered.durable
        self.advance()
        self.acting = ""

    def _judge(self, durable: int) -> None:
        """A prefix of what was appended, with all that was promised; then only recovery's words."""
        found = read_log(self.routed, durable)
        own = False
        reclaimed = Catalog.open(self.routed, DISK, read_only=True).reclaimed
        kept = {seq: record for seq, record in self.records.items() if seq <= reclaimed}
        for seq, record in found.items():
            if own or self.records.get(seq) != record:
                own = True
                assert record.kind in (Kind.CRASH, Kind.ROLLBACK_ABORT), f"{seq}: {record}"
            kept[seq] = record
        missing = [seq for seq in self.records if seq <= self.synced and seq not in kept]
        assert not missing, f"lost though durable: {missing}"
        self.records = kept
        self.model = [self.model[0]]
        self._pending: dict[int, int] | None = None
        for seq in range(1, durable + 1):
            self._take_in(self.records.get(seq))

    def _new_segment(self, _number: int) -> None:
        self.frontier.redo_generation += 1

    def start_curator(self, *, applied: int | None = None) -> None:
        """A curator; ``applied`` understates what the catalog says."""
        self.acting = "curator"
        catalog = Catalog.open(self.routed, DISK, file_bytes_min=CATALOG_BYTES)
        assert catalog.damage == ()
        if not catalog.sizes():
            catalog.commit((("sizes", "0"), self.size))
        if applied is not None:
            catalog.commit(("applied", applied))
        self.engine, self.points = open_engine(self.child, self.frontier, catalog)
        self.acting = ""

    def stop_curator(self) -> None:
        """Its process is gone; the page cache keeps what it wrote."""
        self.acting = ""
        if self.engine is not None:
            for runs in (self.engine.redo_runs, self.engine.undo_runs):
                runs.close()
        self.engine = self.points = None
        self._plan_crash()

    def _plan_crash(self) -> None:
        self.sim.crash_at = self.sim.operations + self.crash_next if self.crash_next else 0

    def kill_curator(self) -> None:
        """The curator's process dies, and the next one starts."""
        self.stop_curator()
        self.start_curator()

    def kill_recorder(self) -> None:
        """The recorder's process dies, and the next one starts."""
        self.acting = ""
        self.writer = None
        self._plan_crash()
        self.start_recorder()

    def kill_both(self) -> None:
        """All processes die, the host goes on."""
        self.stop_curator()
        self.kill_recorder()
        self.start_curator()

    def lose_power(self, how: str = "random", *, applied: float | None = None) -> None:
        """What was not synced survives, or not, or in part.

        ``how``: "random"; or the worst for a rule of order: "journal" loses all that is not synced
        of the journal and nothing of the backing, "backing" the other way round. ``applied``:
        where between the least possible and the true value the catalog's is put.
        """
        self.stop_curator()
        self.writer = None
        self.frontier.close()
        shutil.rmtree(self.root / f"life-{self.lives}")
        self.sim = self.sim.crash() if how == "random" else one_sided(self.sim, keep=how)
        self._plan_crash()
        self._boot()
        self.start_curator(applied=None if applied is None else self._understated(applied))

    def _understated(self, part: float) -> int:
        catalog = Catalog.open(self.routed, DISK, read_only=True)
        lister = SegmentLister(self.routed, Log.REDO, DISK)
        low = max(lister.refresh()[0].first_seq - 1, 0)
        high = max(catalog.applied, low)
        choice = low + round(part * (high - low))
        while choice > low and self.model[choice] is None:
            choice -= 1
        return choice

    def close(self) -> None:
        """The end of a test."""
        self.stop_curator()
        self.frontier.close()

    # ------------------------------------------------------------------------------ the recorder
    def _take_in(self, record: Record | None) -> None:
        """One more record in the model; None: a hole."""
        now = self.now()
        state: list[int] | None = list(now)
        if record is None:
            state = None
        elif record.kind in (Kind.WRITE, Kind.ZERO, Kind.TRIM):
            assert state is not None
            value = int.from_bytes(record.data[:8], "little")
            state[record.block : record.block + record.count] = [value] * record.count
        elif record.kind == Kind.ROLLBACK_BEGIN:
            self._pending = {}
        elif record.kind == Kind.REF:
            assert self._pending is not None
            for block in range(record.block, record.block + record.count):
                self._pending[block] = record.arg
        elif record.kind in (Kind.ROLLBACK_COMMIT, Kind.ROLLBACK_ABORT):
            if record.kind == Kind.ROLLBACK_COMMIT:
                assert state is not None
                assert self._pending is not None
                for block, source in self._pending.items():
                    then = self.model[source]
                    assert then is not None
                    state[block] = then[block]
            self._pending = None
        self.model.append(None if self._pending is not None else state)

    def now(self) -> list[int]:
        """The newest content."""
        return list(next(disk for disk in reversed(self.model) if disk is not None))

    def _append(self, records: Sequence[Record], *, control: bool = False) -> int:
        assert self.writer is not None
        self.acting = "recorder"
        self.stamp += 1000
        payloads = [record.data for record in records if record.data and record.kind != Kind.ZERO]
        padded = [data.ljust(-(-len(data) // 8) * 8, b"\0") for data in payloads]
        for number, record in enumerate(records):  # it may be there although append does not return
            self.records[self.writer.last_seq + 1 + number] = record
        marks = {
            "stamp": self.stamp, "barrier": 0, "window_start": 0,
            "applied": 0 if self.understate else self.frontier.applied,
        }  # fmt: skip
        if control:
            body = json.loads(records[0].data)
            seq = self.writer.append_control(Kind(records[0].kind), body, **marks)
        else:
            entries = [
                number for each in records
                for number in (each.block, each.arg, each.count, each.kind, 0, 0)
            ]  # fmt: skip
            sums = [one for data in payloads for one in payload_sums(data)]
            done = self.writer.append(entries, sums, padded, sum(map(len, padded)), **marks)
            seq = done.last_seq
        for record in records:
            self._take_in(record)
        assert len(self.model) == seq + 1
        self.acting = ""
        return seq

    def write(self, block: int, count: int = 1) -> int:
        """One write, of a value that no other has; its seq."""
        return self._append([self._write(block, count, len(self.model))])

    def write_batch(self, places: Sequence[tuple[int, int]]) -> int:
        """Several writes in one batch."""
        return self._append(
            [self._write(block, count, len(self.model) + number)
             for number, (block, count) in enumerate(places)]
        )  # fmt: skip

    @staticmethod
    def _write(block: int, count: int, value: int) -> Record:
        return Record(Kind.WRITE, block, count, 0, content(value, count))

    def zero(self, block: int, count: int = 1) -> int:
        """One write-zeroes."""
        return self._append([Record(Kind.ZERO, block, count)])

    def trim(self, block: int, count: int = 1) -> int:
        """One trim."""
        return self._append([Record(Kind.TRIM, block, count)])

    def control(self, kind: Kind, body: dict[str, object]) -> int:
        """A control record."""
        data = json.dumps(body, separators=(",", ":"), sort_keys=True).encode()
        return self._append([Record(kind, 0, 0, len(data), data)], control=True)

    def bookmark(self) -> int:
        """Name the newest state."""
        label = f"m{len(self.model)}"
        self.marks[label] = self.control(Kind.BOOKMARK, {"label": label})
        return self.marks[label]

    def sync(self) -> None:
        """What was appended becomes durable."""
        assert self.writer is not None
        self.acting = "recorder"
        self.synced = self.frontier.durable = self.writer.sync()
        self.acting = ""

    def rollback(self, seq: int, *, commit: bool = True) -> None:
        """Back to an openable point, by a viewer's plan."""
        assert self.points is not None
        self.sync()
        self.acting = "curator"
        self.points.pin("rollback", seq, owner="rollback", opened_ns=0, max_age_s=0)
        plan = plan_rollback(self.reader(), seq, self.frontier.durable)
        self.acting = ""
        self.control(Kind.ROLLBACK_BEGIN, {"to_seq": seq})
        for ref in plan.refs:
            self._append([Record(Kind.REF, ref.start, ref.blocks, ref.source)])
        self.sync()
        self.control(Kind.ROLLBACK_COMMIT if commit else Kind.ROLLBACK_ABORT, {})
        self.sync()
        self.acting = "curator"
        self.points.unpin("rollback")
        self.acting = ""

    def advance(self) -> None:
        """What the recorder does with `applied`: masks of what it drops from its overlay."""
        applied = self.frontier.applied
        for seq, record in sorted(self.valid().items()):
            if self.seen < seq <= applied:
                blocks = range(record.block, record.block + record.count)
                if record.kind == Kind.TRIM:
                    self.masks.update(blocks)
                else:
                    self.masks.difference_update(blocks)
        self.seen = max(self.seen, applied)

    def valid(self) -> dict[int, Record]:
        """The records that are versions."""
        found: dict[int, Record] = {}
        refs: dict[int, Record] = {}
        for seq, record in sorted(self.records.items()):
            if record.kind == Kind.REF:
                refs[seq] = record
            elif record.kind in (Kind.ROLLBACK_BEGIN, Kind.ROLLBACK_COMMIT, Kind.ROLLBACK_ABORT):
                if record.kind == Kind.ROLLBACK_COMMIT:
                    found |= refs
                refs = {}
            elif record.kind < 16:
                found[seq] = record
        return found

    # -------------------------------------------------------------------------------- the curator
    def act(self, work: Callable[[Engine], Any]) -> Any:
        """Something that the curator does."""
        assert self.engine is not None
        self.acting = "curator"
        result = work(self.engine)
        self.acting = ""
        return result

    def step(self) -> bool:
        """One step of the engine, long after the one before."""
        self.stamp += 2_000_000_000
        busy = bool(self.act(lambda engine: engine.step(self.stamp)))
        assert self.engine is not None
        assert self.engine.trouble is None, self.engine.trouble
        return busy

    def apply(self, limit: int = 65536) -> bool:
        """One group."""
        return bool(self.act(lambda engine: engine.applier.step(limit_blocks=limit)))

    def finish(self) -> None:
        """The sync of the backing."""
        self.act(lambda engine: engine.applier.finish())

    def release(self) -> int:
        """A slice of what is masked."""
        return int(self.act(lambda engine: engine.release_step()))

    def reclaim(self) -> bool:
        """The oldest segment, whether the policy wants it or not; False: it cannot be now."""
        return bool(self.act(lambda engine: engine.reclaim_oldest()))

    def sweep(self) -> bool:
        """One undo segment, whether it pays or not; False: there is none."""
        assert self.engine is not None
        closed = self.engine.closed_undo()
        if not closed:
            return False
        info = self.random.choice(closed)
        self.act(lambda engine: engine.sweep(info))
        return True

    def move_window(self, seq: int) -> None:
        """The window begins at a later seq."""
        self.act(lambda engine: engine.move_window(seq))

    def unbookmark(self) -> None:
        """Remove one bookmark, if there is a durable one."""
        assert self.points is not None
        there = [label for label, seq in self.marks.items() if seq <= self.frontier.durable]
        if there:
            label = self.random.choice(sorted(there))
            del self.marks[label]
            self.acting = "curator"
            self.points.unbookmark(label)
            self.acting = ""

    def reader(self) -> History:
        """A viewer's eyes."""
        return open_history(self.child, self.frontier)

    # ------------------------------------------------------------------------------------- checks
    def openable(self) -> list[int]:
        """All openable seqs, as the product says."""
        kept = self.act(lambda engine: engine.kept.openable())
        return [seq for seq in range(self.frontier.durable + 1) if bool(kept.contains(seq))]

    def check(self, *, ours: bool = True) -> None:
        """Every openable point, the live disk, and every before-image."""
        assert self.engine is not None
        points = self.openable()
        for seq in points:
            assert self.model[seq] is not None, f"seq {seq} is no point, yet openable"
        window = self.engine.catalog.window_start
        for seq in range(window, self.frontier.durable + 1):
            assert self.model[seq] is None or seq in points, f"seq {seq} is in the window"
        self.marks = {
            label: seq for label, seq in self.marks.items()
            if self.records.get(seq, Record(0)).kind == Kind.BOOKMARK
        }  # fmt: skip
        there = self.engine.catalog.bookmarks()
        assert all(seq in points for label, seq in self.marks.items() if label in there)
        reader = self.reader()
        for history in (reader, *([self.engine.history] if ours else [])):
            for seq in points:
                self._expect(f"seq {seq}", values(history.read(seq, 0, self.blocks)), seq)
        self._check_images(reader)
        self._check_live()
        close(reader)

    def _expect(self, what: str, got: list[int], seq: int) -> None:
        expected = self.model[seq]
        assert expected is not None
        padded = self._padded(expected)
        assert got in (padded, expected), (
            f"{what}: {got}, not {expected} (applied {self.frontier.applied}, durable "
            f"{self.frontier.durable}, after {self.failures})"
        )

    def _padded(self, disk: list[int]) -> list[int]:
        """A short last block has zeroes behind it: it counts as torn."""
        return [*disk[:-1], -1 if disk[-1] else 0] if self.short else disk

    def _check_images(self, reader: History) -> None:
        """Each tells the truth: what the block held just before its end."""
        for info in reader.refresh().undo_infos.values():
            table = reader.undo.table(info)
            for row, entry in enumerate(table.rows):
                end, count = int(entry["arg"]), int(entry["nblocks"])
                assert entry["kind"] in (Kind.IMAGE, Kind.IMAGE_ZERO)
                assert end <= self.frontier.durable
                got = [0] * count
                if entry["kind"] == Kind.IMAGE:
                    file = reader.undo.file(info)
                    got = values(read_blocks(file, table, row, 0, count, name=info.name))
                before = next(d for d in reversed(self.model[:end]) if d is not None)
                for block, value in zip(range(int(entry["block"]), self.blocks), got, strict=False):
                    true = self._padded(before)[block]
                    assert value in (true, before[block]), (
                        f"image of block {block} before {end}: {value}, was {before[block]} "
                        f"(after {self.failures})"
                    )

    def _check_live(self) -> None:
        """The unapplied tail, else zero if masked, else the backing."""
        self.advance()
        tail = {seq: record for seq, record in self.valid().items() if seq > self.seen}
        if self._pending is not None or any(r.kind == Kind.REF for r in tail.values()):
            return  # it is not served
        backing = self.sim.live[BACKING].live
        got = values(bytes(backing).ljust(self.blocks * BLOCK, b"\0"))
        for block in self.masks:
            got[block] = 0
        for _, record in sorted(tail.items()):
            value = int.from_bytes(record.data[:8], "little")
            got[record.block : record.block + record.count] = [value] * record.count
        expected = self.now()
        assert got in (expected, self._padded(expected)), (
            f"live: {got}, not {expected} (applied {self.seen}, masks {self.masks}, "
            f"after {self.failures})"
        )

    def check_backing(self) -> None:
        """After everything is applied and released the backing alone is the disk."""
        self.sync()
        for _ in range(1000):
            if self.act(lambda e: e.drain_step(self.frontier.durable, self.stamp)):
                break
            assert self.engine is not None
            assert self.engine.trouble is None, self.engine.trouble
        else:
            raise AssertionError("does not drain")
        while self.release():
            pass
        got = values(bytes(self.sim.live[BACKING].live).ljust(self.blocks * BLOCK, b"\0"))
        assert got in (self.now(), self._padded(self.now()))

    def check_emptied(self) -> None:
        """With the window at the end and nothing kept both logs shrink to nothing."""
        assert self.engine is not None
        assert self.points is not None
        for label in list(self.engine.catalog.bookmarks()):
            self.points.unbookmark(label)
        for pin in list(self.engine.catalog.pins()):
            self.points.unpin(pin)
        self.move_window(self.frontier.durable)
        for _ in range(1000):
            if not self.reclaim():
                break
        self.engine.policy.journal_limit = 1
        for _ in range(200):
            self.stamp += 2_000_000_000
            self.act(lambda engine: engine.step(self.stamp))
        assert len(self.engine.redo.segments()) == 1
        left = self.reader()
        rows = [len(left.undo.table(i).rows) for i in left.refresh().undo_infos.values()]
        close(left)
        assert sum(rows) == 0, rows
        self.check()
        got = values(bytes(self.sim.live[BACKING].live).ljust(self.blocks * BLOCK, b"\0"))
        assert got in (self.now(), self._padded(self.now()))

    def check_index(self) -> None:
        """The index made bit by bit equals one made from the tables at once."""
        self.sync()
        self.kill_curator()  # so that every undo segment is closed
        for _ in range(300):
            self.step()
        before = self._entries()
        self.stop_curator()
        shutil.rmtree(self.root / f"life-{self.lives}" / "index")
        (self.root / f"life-{self.lives}" / "index").mkdir()
        self.start_curator()
        for _ in range(300):
            self.step()
        after = self._entries()
        for mine, new in zip(before, after, strict=True):
            common = mine.keys() & new.keys()
            assert {number: mine[number] for number in common} == {
                number: new[number] for number in common
            }
        assert before[0].keys() == after[0].keys()

    def _entries(self) -> list[dict[int, set[tuple[int, int, int]]]]:
        """Of both logs what their runs say, by segment."""
        assert self.engine is not None
        snapshot = self.engine.history.refresh()
        found: list[dict[int, set[tuple[int, int, int]]]] = []
        for runs, infos in (
            (self.engine.redo_runs, snapshot.redo_infos),
            (self.engine.undo_runs, snapshot.undo_infos),
        ):
            entries: dict[int, set[tuple[int, int, int]]] = {
                segment: set() for segment in runs.covered & infos.keys()
            }
            for part in runs.versions_in(0, (1 << 64) - 1):
                columns = (part.key.tolist(), part.seq.tolist(), part.loc.tolist())
                for each in zip(*columns, strict=True):
                    segment = unpack_loc(each[2])[1]
                    if segment in entries:
                        entries[segment].add(each)
            found.append(entries)
        return found


def close(history: History) -> None:
    """A reader goes."""
    for runs in (history.redo_runs, history.undo_runs):
        runs.close()


def one_sided(sim: SimStorage, *, keep: str) -> SimStorage:
    """A power loss that loses nothing of the one side, and all that is not synced of the other."""
    after = SimStorage(sim.random.getrandbits(32))
    journal = keep == "journal"
    names = dict(sim.live) if journal else dict(sim.durable)
    made: dict[int, Inode] = {}
    for name, inode in names.items():
        kept = inode.live if (name == BACKING) != journal else inode.durable
        if id(inode) not in made:
            made[id(inode)] = Inode(bytearray(kept), bytearray(kept))
        after.live[name] = after.durable[name] = made[id(inode)]
    return after


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


__all__ = ["Crash", "Record", "World", "reclaim", "release"]
