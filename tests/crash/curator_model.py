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
from collections.abc import Callable, Sequence
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
from journal.format import BLOCK, Kind, Log, payload_sums
from journal.frontier import Frontier
from journal.hints import gather
from journal.recovery import recover
from journal.redo import RedoWriter
from journal.segment import SegmentLister
from journal.spares import Spares
from journal.storage import RealStorage
from replay.history import History
from replay.places import Places
from replay.rollback import plan as plan_rollback
from replay.work import at_once
from tests.crash.curator_storage import (
    BACKING,
    DISK,
    Backing,
    Later,
    Record,
    Routed,
    content,
    one_sided,
    read_log,
    values,
)
from tests.crash.curator_watch import Watch
from tests.crash.sim_storage import Inode, SimStorage

BOOT = bytes(16)
CATALOG_BYTES = 1 << 14


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
    foreign: dict[int, list[int]] = field(default_factory=dict)  # by seq: what others have made
    failures: list[str] = field(default_factory=list)
    pending: dict[int, int] | None = None  # sources by block, inside a rollback
    in_gap: bool = False
    crash_next: int = 0  # operations from the next failure on until there is another one
    spares: float = 0.1  # how many syncs are followed by the preparation of a segment
    course: str = ""  # how it came to be, where that is known
    on_failure: Callable[[], None] = lambda: None  # told of a failure, before what comes after it
    on_operation: Callable[[], None] = lambda: None  # asked at the beginning of each operation

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
        self._eyes: tuple[int, Places] | None = None
        self.watch = Watch(self)
        self.before_write: Callable[[int, int], None] = self.watch.before_write
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

    def _boot(self, applied: float | None = None) -> None:
        """A new boot: nothing but the storage is left, and the catalog's `applied`, understated."""
        self.lives += 1
        self.sim.before = self._before_operation
        (self.here / "index").mkdir(parents=True)
        self.routed = Routed(self.sim, self.here)
        self.child = self._child()
        self.frontier = self._open_frontier()
        self.watch.applied = -1
        if applied is not None:
            self.understate_applied(applied)
        self.start_recorder()

    @property
    def here(self) -> Path:
        """Where the index and the frontier of this boot lie."""
        return self.root / f"life-{self.lives}"

    def _child(self) -> Processes:
        config = DiskConfig(
            name="d", uuid=DISK.hex(), size=self.size, block_size=512, backing="",
            journal=str(self.here), window_seconds=None, segment_bytes=self.segment_bytes,
            journal_limit=1 << 40,
        )  # fmt: skip
        return Processes("curator", self.root, config, -1, 0, -1)

    def _open_frontier(self) -> Frontier:
        return Frontier.open(self.here / "frontier", disk=DISK, boot_id=BOOT, create=True)

    def _before_operation(self) -> None:
        self.watch.look()
        self.on_operation()

    def copy(self, root: Path) -> None:
        """Copy what lies in files to a new directory."""
        shutil.copytree(self.here, root / self.here.name)

    def move(self, root: Path) -> None:
        """Go on with such a copy: whoever has the rest in common (a process that forked) is not
        concerned any more.
        """
        self.root = root
        WORLDS[root] = self
        self.child = self._child()
        self.routed.real = RealStorage(self.here)
        self.frontier.close()
        vars(self.frontier).update(vars(self._open_frontier()))
        histories = [self.engine.history] if self.engine is not None else []
        if self._eyes is not None:
            histories.append(self._eyes[1]._history)
        for history in histories:
            for runs in (history.redo_runs, history.undo_runs):
                runs._directory = self.here / "index"

    def start_recorder(self) -> None:
        """Recovery of the redo log; what it found replaces what was appended."""
        self.acting = "recorder"
        self.stamp += 1000
        index = Path(self.child.config.journal) / "index"
        hints = gather(self.routed, index, DISK)
        hints = hints.and_frontier(self.frontier.durable, self.frontier.applied)
        recovered = recover(
            self.routed, DISK, durable_hint=hints.durable, applied_hint=hints.applied,
            segment_hint=hints.segment, reclaimed_hint=hints.reclaimed, stamp=self.stamp,
            identity=lambda: self.random.randbytes(16),
        )  # fmt: skip
        assert recovered.corruptions == []
        self._judge(recovered.durable)
        self.writer = RedoWriter(
            self.routed, DISK, recovered.start, segment_bytes=self.segment_bytes,
            identity=lambda: self.random.randbytes(16), on_segment=self._new_segment,
            on_durable=self._promised,
            spares=Spares(self.routed, self.segment_bytes, 1),
        )  # fmt: skip
        self.masks = set(recovered.masks)
        self.seen = recovered.applied
        frontier = self.frontier
        frontier.applied = max(frontier.applied, recovered.applied)
        frontier.redo_generation += 1
        frontier.durable = max(frontier.durable, recovered.durable)
        frontier.epoch += 1
        self.synced = recovered.durable
        self.watch.look()
        self.advance()
        self.acting = ""

    def _judge(self, durable: int) -> None:
        """A prefix of what was appended, with all that was promised; then only recovery's words."""
        found = read_log(self.routed, durable)
        for seq in found.keys() & self.records.keys():  # a seq once shown keeps its meaning
            assert seq > self.synced or found[seq] == self.records[seq], f"{seq}: {found[seq]}"
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
        self.pending, self.in_gap = None, False
        for seq in range(1, durable + 1):
            self._take_in(self.records.get(seq))

    def _new_segment(self, _number: int) -> None:
        self.frontier.redo_generation += 1

    def _promised(self, durable: int) -> None:
        """What the recorder is told, others may count on at once."""
        self.synced = self.frontier.durable = durable

    def start_curator(self) -> None:
        """A curator."""
        self.acting = "curator"
        catalog = Catalog.open(self.routed, DISK, file_bytes_min=CATALOG_BYTES)
        assert catalog.damage == ()
        if not catalog.sizes():
            catalog.commit((("sizes", "0"), self.size))
        launch = at_once if self.seed % 2 else Later
        self.engine, self.points = open_engine(self.child, self.frontier, catalog, launch=launch)
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
        self.on_failure()
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

    def lose_power(
        self, how: str | Callable[[str], bool] = "random", *, applied: float | None = None
    ) -> None:
        """What was not synced survives, or not, or in part.

        ``how``: "random"; or the worst for a rule of order: "journal" keeps all of the journal and
        of the backing only what was synced, "backing" the other way round; or whether a file, by
        its name, loses what is not synced. ``applied``: where between the least possible and the
        true value the catalog's is put.
        """
        self.stop_curator()
        self.writer = None
        self.frontier.close()
        shutil.rmtree(self.here)
        if not isinstance(how, str):
            self.sim = self.sim.lose(how)
        else:
            self.sim = self.sim.crash() if how == "random" else one_sided(self.sim, keep=how)
        self._plan_crash()
        self._boot(applied)
        self.start_curator()

    def understate_applied(self, part: float) -> None:
        """Put the catalog's `applied` between the least possible and the true value."""
        catalog = Catalog.open(self.routed, DISK, file_bytes_min=CATALOG_BYTES)
        lister = SegmentLister(self.routed, Log.REDO, DISK)
        high = max(catalog.applied, catalog.reclaimed)
        # The oldest segment may be one whose header is torn: what is listed may begin behind it.
        low = min(max(lister.refresh()[0].first_seq - 1, 0), high)
        choice = low + round(part * (high - low))
        while choice > low and self.model[choice] is None:
            choice -= 1
        catalog.commit(("applied", choice))
        catalog.close()

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
            self.pending = {}
        elif record.kind == Kind.REF:
            assert self.pending is not None
            for block in range(record.block, record.block + record.count):
                self.pending[block] = record.arg
        elif record.kind in (Kind.ROLLBACK_COMMIT, Kind.ROLLBACK_ABORT):
            if record.kind == Kind.ROLLBACK_COMMIT:
                assert state is not None
                assert self.pending is not None
                for block, source in self.pending.items():
                    then = self.model[source]
                    assert then is not None
                    state[block] = then[block]
            self.pending = None
        if record is not None and record.kind == Kind.GAP_BEGIN:
            self.in_gap = True
        elif record is not None and record.kind == Kind.GAP_END:
            self.in_gap = False
            state = self.foreign.get(len(self.model), state)
        closed = self.pending is not None or self.in_gap
        self.model.append(None if closed else state)

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

    def refs(self, places: Sequence[tuple[int, int]]) -> int:
        """Refs of single blocks to sources."""
        return self._append([Record(Kind.REF, block, 1, source) for block, source in places])

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
        assert self.writer.sync() == self.synced
        if self.writer.spares.wanted and self.random.random() < self.spares:
            self.writer.spares.prepare(lambda: True)
        self.acting = ""

    def say_durable(self) -> None:
        """An idle recorder says in the log itself what is durable."""
        assert self.writer is not None
        self.writer.append(
            [], [], [], 0, stamp=self.stamp, barrier=0, window_start=0,
            applied=self.frontier.applied,
        )  # fmt: skip
        self.writer.sync()

    def rollback(self, seq: int, *, commit: bool = True) -> None:
        """Back to an openable point, by a viewer's plan."""
        self.sync()
        self.acting = "curator"
        self.running_points.pin("rollback", seq, owner="rollback", opened_ns=0, max_age_s=0)
        plan = plan_rollback(self.reader(), seq, self.frontier.durable)
        self.acting = ""
        self.control(Kind.ROLLBACK_BEGIN, {"to_seq": seq})
        for ref in plan.refs:
            self._append([Record(Kind.REF, ref.start, ref.blocks, ref.source)])
        self.sync()
        self.control(Kind.ROLLBACK_COMMIT if commit else Kind.ROLLBACK_ABORT, {})
        self.sync()
        self.acting = "curator"
        self.running_points.unpin("rollback")
        self.acting = ""

    def advance(self) -> None:
        """What the recorder does with `applied`: masks of what it drops from its overlay."""
        applied = self.frontier.applied
        gap = self.last_gap()
        if self.seen < gap:
            self.masks.clear()
        for seq, record in sorted(self.valid().items()):
            if max(self.seen, gap) < seq <= applied:
                blocks = range(record.block, record.block + record.count)
                if record.kind == Kind.TRIM:
                    self.masks.update(blocks)
                else:
                    self.masks.difference_update(blocks)
        self.seen = max(self.seen, applied)

    def last_gap(self) -> int:
        """Seq of the last record of a gap: what was written before is no business of ours."""
        gaps = (Kind.GAP_BEGIN, Kind.GAP_END)
        return max((seq for seq, each in self.records.items() if each.kind in gaps), default=0)

    def gap(self, disk: list[int] | None = None) -> None:
        """The backing is let go and taken back; ``disk``: what others have made of it."""
        self.control(Kind.GAP_BEGIN, {"reason": "released"})
        self.sync()
        if disk is not None:
            data = b"".join(map(content, disk))
            inode = self.sim.live[BACKING]
            inode.live[:] = data
            inode.durable[:] = data
            inode.pending.clear()
            self.foreign[len(self.model)] = list(disk)
        self.control(Kind.GAP_END, {"unchanged": disk is None})
        self.masks.clear()
        self.sync()

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
    @property
    def running(self) -> Engine:
        """The curator's engine."""
        assert self.engine is not None
        return self.engine

    @property
    def running_points(self) -> Points:
        """What the curator says of points."""
        assert self.points is not None
        return self.points

    def act(self, work: Callable[[Engine], Any]) -> Any:
        """Something that the curator does."""
        self.acting = "curator"
        result = work(self.running)
        self.acting = ""
        return result

    def step(self) -> bool:
        """One step of the engine, long after the one before."""
        self.stamp += 2_000_000_000
        busy = bool(self.act(lambda engine: engine.step(self.stamp)))
        assert self.running.trouble is None, self.running.trouble
        return busy

    def apply(self, limit: int = 65536) -> bool:
        """One group."""
        return bool(self.act(lambda engine: engine.applier.step(limit_blocks=limit)))

    def finish(self) -> None:
        """The sync of the backing."""
        self.act(lambda engine: engine.applier.finish())

    def apply_all(self) -> None:
        """All that was written is in the backing, synced."""
        self.sync()
        while self.apply():
            pass
        self.finish()

    def fill_segments(self, count: int = 1) -> None:
        """Close so many segments with writes to the last block."""
        for _ in range(count):
            before = len(self.running.redo.segments())
            while len(self.running.redo.segments()) == before:
                self.write(self.blocks - 1)
                self.sync()

    def log_of(self, work: Callable[[], Any]) -> list[str]:
        """The operations of the storage that something takes."""
        start = len(self.sim.log)
        work()
        return self.sim.log[start:]

    def release(self) -> int:
        """A slice of what is masked."""
        return int(self.act(lambda engine: engine.release_step()))

    def reclaim(self) -> bool:
        """The oldest segment, whether the policy wants it or not; False: it cannot be now."""
        return bool(self.act(lambda engine: engine.reclaim_oldest()))

    def roll(self) -> None:
        """The undo segment being written is finished."""
        self.acting = "curator"
        self.running.work.undo.roll()
        self.running.work.publish()
        self.acting = ""

    def sweep(self) -> bool:
        """One undo segment, whether it pays or not; False: there is none."""
        closed = self.running.closed_undo()
        if not closed:
            return False
        info = self.random.choice(closed)
        self.act(lambda engine: engine.sweep(info))
        return True

    def move_window(self, seq: int) -> None:
        """The window begins at a later seq."""
        self.act(lambda engine: engine.move_window(seq))

    def pin(self, seq: int | None) -> None:
        """Keep a point for a view; None: the view is closed."""
        self.acting = "curator"
        if seq is None:
            self.running_points.unpin("view")
        else:
            self.running_points.pin("view", seq, owner="view", opened_ns=0, max_age_s=0)
        self.acting = ""

    def unbookmark(self) -> None:
        """Remove one bookmark, if there is a durable one."""
        there = [label for label, seq in self.marks.items() if seq <= self.frontier.durable]
        if there:
            label = self.random.choice(sorted(there))
            del self.marks[label]
            self.acting = "curator"
            self.running_points.unbookmark(label)
            self.acting = ""

    def openable(self) -> list[int]:
        """All openable seqs, as the product says."""
        kept = self.act(lambda engine: engine.kept.openable())
        return [seq for seq in range(self.frontier.durable + 1) if bool(kept.contains(seq))]

    def reader(self) -> History:
        """A viewer's eyes."""
        return open_history(self.child, self.frontier)

    def places(self) -> Places:
        """Those of a viewer that lives through everything but the end of a boot."""
        if self._eyes is None or self._eyes[0] != self.lives:
            self._eyes = self.lives, Places(self.reader(), chunks=64, fill_after=0)
        return self._eyes[1]

    def remembered(self, seq: int) -> list[int]:
        """The disk at a point, as that viewer sees it."""
        out = bytearray(self.blocks * BLOCK)
        blocks = np.arange(self.blocks, dtype=np.uint64)
        self.places().read_into(memoryview(out), blocks, seq)
        return values(out)


def close(history: History) -> None:
    """A reader goes."""
    for runs in (history.redo_runs, history.undo_runs):
        runs.close()
