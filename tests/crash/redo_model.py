"""The obvious model of a redo log - a dictionary of records - and a workload that feeds both.

`Driver` writes to a `RedoWriter` over a `SimStorage` and keeps, by seq, what it submitted; `check`
compares what a recovery found with it.
"""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from journal.errors import JournalFull
from journal.format import BLOCK, Kind, Log, payload_sums
from journal.recovery import Recovered, recover
from journal.redo import RedoWriter
from journal.segment import SegmentLister, load_table, open_segment, read_blocks, read_body
from journal.spares import Spares
from tests.crash.sim_storage import SimStorage

DISK = b"crash-test disk."
SEGMENT_BYTES = 32768
BLOCKS = 40


@dataclass(frozen=True)
class Record:
    """What was submitted: numbers as in the table, and the content."""

    kind: int
    block: int
    nblocks: int
    arg: int
    data: bytes
    stamp: int


@dataclass
class Driver:
    """One disk's recorder through all its lives."""

    seed: int
    storage: SimStorage
    records: dict[int, Record] = field(default_factory=dict)
    synced: int = 0  # the highest seq that any sync has promised
    applied: int = 0
    applied_claimed: int = 0
    stamp: int = 1000
    writer: RedoWriter | None = None
    rollback: int = 0
    full: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    # ------------------------------------------------------------------------------------- lives
    def recover(self, *, durable_hint: int = 0, applied_hint: int = 0) -> Recovered:
        """A start. What it makes of the records is for `check`."""
        self.stamp += 1000
        return recover(
            self.storage, DISK, durable_hint=durable_hint, applied_hint=applied_hint,
            stamp=self.stamp, identity=lambda: self.random.randbytes(16),
        )  # fmt: skip

    def go_on(self, recovered: Recovered) -> None:
        """Take over what was recovered and check, then write on."""
        self.check(recovered)
        if self.rollback:
            self.rollback = 0
        self.writer = RedoWriter(
            self.storage, DISK, recovered.start, segment_bytes=SEGMENT_BYTES,
            identity=lambda: self.random.randbytes(16), on_durable=self._promised,
            spares=Spares(self.storage, SEGMENT_BYTES, 2),
        )  # fmt: skip
        self._promised(self.writer.durable)

    def _promised(self, durable: int) -> None:
        assert durable >= self.synced
        self.synced = durable

    # ---------------------------------------------------------------------------------- the work
    def work(self, actions: int) -> None:
        """Random appends, syncs, rollbacks, moves of `applied`."""
        assert self.writer is not None
        for _ in range(actions):
            kind = self.random.random()
            if kind < 0.6:
                self.append(self.random.choice((1, 1, 2, 3, 5)))
            elif kind < 0.7 and not self.rollback:
                self.begin_rollback()
            elif self.rollback:
                self.end_rollback()
            elif kind < 0.75:
                self.append(0)
            elif kind < 0.9:
                self.sync()
                if self.random.random() < 0.5:
                    self.prepare()
            elif not self.rollback:
                self.applied = self.random.randint(self.applied, self.writer.durable)

    def sync(self) -> None:
        """A sync; now and then something is appended while it runs."""
        assert self.writer is not None
        if self.random.random() < 0.5:

            def during() -> None:
                if self.random.random() < 0.5:
                    self.append(1)

            self.storage.during_sync = during
        appended = self.writer.last_seq
        try:
            assert self.writer.sync() == appended
        finally:
            self.storage.during_sync = None

    def prepare(self) -> None:
        """A file for a later segment, unless there are enough or no space."""
        assert self.writer is not None
        if self.writer.spares.wanted:
            with contextlib.suppress(OSError):
                self.writer.spares.prepare(lambda: True)

    def append(self, count: int) -> None:
        """One batch of writes, zeroes and trims; of refs while a rollback is open."""
        batch = []
        for _ in range(count):
            nblocks = self.random.choice((1, 1, 1, 2, 3, 9))
            block = self.random.randrange(BLOCKS)
            if self.rollback:
                batch.append((Kind.REF, block, nblocks, max(1, self.synced), b""))
                continue
            kind = self.random.choice((Kind.WRITE, Kind.WRITE, Kind.WRITE, Kind.ZERO, Kind.TRIM))
            data = self.random.randbytes(nblocks * BLOCK) if kind == Kind.WRITE else b""
            batch.append((kind, block, nblocks, 0, data))
        self._submit(batch)

    def begin_rollback(self) -> None:
        self._control(Kind.ROLLBACK_BEGIN, {"to": self.synced})
        if self.rollback:
            self.append(self.random.randrange(1, 4))

    def end_rollback(self) -> None:
        commit = self.random.random() < 0.7
        self._control(Kind.ROLLBACK_COMMIT if commit else Kind.ROLLBACK_ABORT, {})

    def _control(self, kind: Kind, body: dict[str, object]) -> None:
        assert self.writer is not None
        self.stamp += 1
        data = json.dumps(body, separators=(",", ":"), sort_keys=True).encode()
        seq = self.writer.last_seq + 1
        self.records[seq] = Record(kind, 0, 0, len(data), data, self.stamp)
        try:
            self.writer.append_control(
                kind, body, stamp=self.stamp, barrier=self.synced, applied=self._claim(),
                window_start=1,
            )  # fmt: skip
        except JournalFull:
            self.full += 1
            del self.records[seq]
            return
        assert self.writer.last_seq == seq
        self.rollback = seq if kind == Kind.ROLLBACK_BEGIN else 0

    def _claim(self) -> int:
        self.applied_claimed = max(self.applied_claimed, self.applied)
        return self.applied

    def _submit(self, batch: list[tuple[Kind, int, int, int, bytes]]) -> None:
        assert self.writer is not None
        self.stamp += 1
        entries: list[int] = []
        sums: list[int] = []
        for number, (kind, block, nblocks, arg, data) in enumerate(batch):
            entries += [block, arg, nblocks, kind, 0, 0]
            sums += payload_sums(data)
            record = Record(kind, block, nblocks, arg, data, self.stamp)
            self.records[self.writer.last_seq + 1 + number] = record
        before = self.writer.last_seq
        payloads = [data for *_, data in batch if data]
        try:
            done = self.writer.append(
                entries, sums, payloads, sum(map(len, payloads)), stamp=self.stamp,
                barrier=self.synced, applied=self._claim(), window_start=1,
            )  # fmt: skip
        except JournalFull:
            self.full += 1
            assert self.writer.last_seq == before
            for seq in [seq for seq in self.records if seq > before]:
                del self.records[seq]
            return
        assert done.first_seq == before + 1
        assert done.last_seq == before + len(batch)

    # --------------------------------------------------------------------------------- the judge
    def check(self, recovered: Recovered) -> None:
        """The invariants; then what was lost is forgotten, and what recovery appended is known."""
        found = read_all(self.storage, recovered.durable)
        assert recovered.corruptions == []  # a crash is no damage
        assert recovered.durable == recovered.start.last_seq >= self.synced
        kept = recovered.start.segment.header.cut
        first = recovered.start.segment.header.first_seq
        # A gap-free prefix of what was submitted; behind it only what this recovery says, and what
        # one before it said that was interrupted (of records that left no trace it used the seqs).
        wanted = sorted(self.records.items())
        own: list[int] = []
        survivors: dict[int, Record] = {}
        for (seq, record), want in zip_longest(found.items(), wanted[: len(found)]):
            if own or (seq, record) != want:
                own.append(seq)
                assert record.kind in (Kind.CRASH, Kind.ROLLBACK_ABORT)
            else:
                survivors[seq] = record
        assert survivors.keys() >= {seq for seq in self.records if seq <= self.synced}
        assert kept >= self.synced
        self.records = {**survivors, **{seq: found[seq] for seq in own}}
        assert recovered.applied <= max(self.applied_claimed, recovered.floor - 1)
        self._check_bitmaps(recovered)
        seqs = [t.first_seq + row for _, t in recovered.tail for row in range(len(t.rows))]
        assert seqs == [seq for seq in sorted(self.records) if seq > recovered.applied]
        if recovered.lost is not None:
            assert recovered.lost.first_seq == kept + 1
            assert recovered.lost.last_seq < first

    def _check_bitmaps(self, recovered: Recovered) -> None:
        first = recovered.start.segment.header.first_seq
        assert set(recovered.masks) == masks(self.records, recovered.applied)
        assert set(recovered.start.bitmaps.masks) == masks(self.records, first - 1)


def masks(records: dict[int, Record], upto: int) -> set[int]:
    """Blocks whose newest version is a trim, by the rules in the plainest way."""
    state: set[int] = set()
    refs: list[Record] = []
    for seq in sorted(seq for seq in records if seq <= upto):
        record = records[seq]
        blocks = range(record.block, record.block + record.nblocks)
        if record.kind == Kind.TRIM:
            state.update(blocks)
        elif record.kind in (Kind.WRITE, Kind.ZERO):
            state.difference_update(blocks)
        elif record.kind == Kind.REF:
            refs.append(record)
        elif record.kind in (Kind.ROLLBACK_BEGIN, Kind.ROLLBACK_COMMIT, Kind.ROLLBACK_ABORT):
            if record.kind == Kind.ROLLBACK_COMMIT:
                for ref in refs:
                    state.difference_update(range(ref.block, ref.block + ref.nblocks))
            refs = []
    return state


def read_all(storage: SimStorage, durable: int) -> dict[int, Record]:
    """Every record a reader finds, verified."""
    found: dict[int, Record] = {}
    lister = SegmentLister(storage, Log.REDO, DISK)
    for info in lister.refresh():
        file = open_segment(storage, info.name)
        table = load_table(file, info, upto=durable)
        stamps = table.stamps()
        for row, entry in enumerate(table.rows):
            seq = table.first_seq + row
            kind, nblocks = int(entry["kind"]), int(entry["nblocks"])
            if kind == Kind.WRITE:
                data = read_blocks(file, table, row, 0, nblocks, name=info.name)
            else:
                data = read_body(file, table, row, name=info.name) if kind >= 16 else b""
            assert seq not in found, f"seq {seq} is in two segments"
            found[seq] = Record(
                kind, int(entry["block"]), nblocks, int(entry["arg"]), data, int(stamps[row])
            )
        assert np.all(np.diff(stamps.astype(np.int64)) >= 0)
        file.close()
    assert not lister.damaged
    return dict(sorted(found.items()))
