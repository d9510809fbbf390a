"""Recovery of the redo log at a recorder's start: survey (reads), classify (decides), apply
(writes).

The survey is in `survey.py`, the decisions in `recovery_plan.py`, RECOVERY.md explains both. In
short: D is the highest seq known to have been durable. What lies at or below it is never cut: what
is wrong there is damage, and reported. What lies above it is kept up to the first break, and
copied, for pages whose sync may have failed must not be trusted to be synced by another; the old
file is never written again. Nothing is ever appended behind a cut: a new segment with a new
identity is begun.

Both new segments are written under temporary names and renamed when they are durable, the names
made durable before anything else is done. So whatever interrupts this, a new survey finds the old
state or the new one, and files that are superseded or temporary are removed by the next run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from pyroaring import BitMap

from journal.bitmaps import Bitmaps
from journal.errors import Corruption, JournalError, JournalFull, Poisoned
from journal.format import (
    ENTRY_DTYPE,
    HEADER_PAGE,
    Kind,
    Log,
    SegmentHeader,
    align,
    pack_batch,
)
from journal.recovery_plan import Plan, classify
from journal.redo import OpenSegment, RedoStart, RedoWriter, create_segment, is_full, seal
from journal.segment import (
    DIRECTORY,
    PAGE,
    TEMPORARY,
    Footer,
    SegmentInfo,
    SegmentLister,
    Table,
    load_footer,
    load_table,
    open_segment,
    read_body,
    read_rows,
    segment_name,
    sums_of,
)
from journal.storage import File, Storage
from journal.survey import Survey, survey

__all__ = ["Lost", "OpenRollback", "Plan", "Recovered", "apply", "classify", "recover", "survey"]

_REDO: Final = DIRECTORY[Log.REDO]


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """Seqs that were given to records which did not survive, and when those were made at most.

    The range is what can be proven; more may have been lost that left no trace.
    """

    first_seq: int
    last_seq: int
    stamp_from: int
    stamp_to: int


@dataclasses.dataclass(frozen=True, slots=True)
class OpenRollback:
    """A rollback without commit or abort that concerns several disks: the supervisor decides."""

    begin_seq: int
    body: dict[str, object]


@dataclasses.dataclass(frozen=True, slots=True)
class Recovered:
    """A redo log that can be written again.

    Everything up to ``durable`` is on stable storage; ``tail``: all records above ``applied``,
    ``masks`` as of ``applied``. ``clean``: the last stop was one, nothing can have been lost.
    ``open_rollback``: left for the supervisor; ``start`` knows it. ``corruptions`` with seqs above
    ``applied`` concern blocks whose newest content is not known.
    """

    start: RedoStart
    applied: int
    durable: int
    window_start: int
    floor: int
    tail: list[tuple[SegmentInfo, Table]]
    masks: BitMap
    highest_stamp: int
    clean: bool
    lost: Lost | None
    corruptions: list[Corruption]
    size: int | None
    open_rollback: OpenRollback | None
    copied_bytes: int


@dataclasses.dataclass(slots=True)
class _Recovery:
    """One run of :func:`apply`; the fields are what its steps hand on."""

    storage: Storage
    disk: bytes
    found: Survey
    plan: Plan
    stamp: int
    identity: Callable[[], bytes]
    copy_limit: int
    bitmaps: Bitmaps = dataclasses.field(default_factory=Bitmaps)
    masks: BitMap = dataclasses.field(default_factory=BitMap)
    copied_bytes: int = 0
    in_work: str = ""

    def run(self) -> Recovered:
        for name in self.plan.temporary:
            self.storage.unlink(name)
        self._follow_bitmaps()
        number, before = self.plan.number, (self.plan.predecessor, self.plan.predecessor_chain)
        if self.plan.copy_from:
            before = self._copy(number)
            number += 1
        start, rollback = self._begin(number, *before)
        if self.plan.remove:
            for name in self.plan.remove:
                self.storage.unlink(name)
            self.storage.sync_dir(_REDO)
        return self._result(start, rollback)

    # -- what is kept
    def _table(self, info: SegmentInfo) -> Table:
        """A kept segment's table."""
        for item in self.found.loaded:
            if item.info.segment == info.segment:
                return item.table
        file = open_segment(self.storage, info.name)
        try:
            return load_table(file, info)
        finally:
            file.close()

    def _follow_bitmaps(self) -> None:
        """``masks`` as of ``applied``, ``bitmaps`` as of the last record that is not copied."""
        applied = self.found.applied
        infos = [info for info in self.found.infos if info.name not in self.plan.remove]
        for at in range(len(infos) - 1, -1, -1):
            footer = self._usable_footer(infos[at], applied)
            if footer is not None:
                self.bitmaps = Bitmaps(footer.masks)
                infos = infos[at + 1 :]
                break
        tables = [self._table(info).upto(self.plan.cut) for info in infos]
        for table in tables:
            self.bitmaps.advance(table.upto(applied))
        self.masks = self.bitmaps.masks.copy()
        for table in tables:
            self.bitmaps.advance(table.above(applied))

    def _usable_footer(self, info: SegmentInfo, applied: int) -> Footer | None:
        """A footer wholly at or below ``applied`` that no open rollback makes ambiguous."""
        if info.trailer is None or info.trailer.last_seq > min(applied, info.bound):
            return None
        file = open_segment(self.storage, info.name)
        try:
            footer = load_footer(file, info)
        except Corruption:
            return None
        finally:
            file.close()
        return footer if not footer.rollback else None

    # -- the copy of what lies above D
    def _copy(self, number: int) -> tuple[int, int]:
        """Copy the records above D; number and last chain of the new segment."""
        plan = self.plan
        parts = [
            (item, item.table.above(plan.copy_from - 1).upto(plan.end))
            for item in self.found.loaded
            if item.table.last_seq >= plan.copy_from and item.table.first_seq <= plan.end
        ]
        name = segment_name(Log.REDO, number)
        stamps = [int(table.batches["stamp"][0]) for _, table in parts if len(table.batches)]
        header = SegmentHeader(
            Log.REDO, self.disk, number, self.identity(), first_seq=plan.copy_from,
            predecessor=plan.predecessor, predecessor_chain=plan.predecessor_chain,
            cut=plan.cut, stamp=min(stamps), highest=plan.highest, durable=plan.durable,
        )  # fmt: skip
        self.in_work = name
        segment = create_segment(self.storage, header, name=name + TEMPORARY)
        try:
            next_seq, unsynced = plan.copy_from, 0
            for item, table in parts:
                file = open_segment(self.storage, item.info.name)
                try:
                    for batch in table.batches:
                        assert int(batch["first_seq"]) == next_seq
                        unsynced += self._copy_batch(segment, file, table, batch, item.info.name)
                        next_seq += int(batch["count"])
                        if unsynced > self.copy_limit:
                            segment.file.sync()
                            unsynced = 0
                finally:
                    file.close()
            assert next_seq == plan.end + 1
            segment.file.sync()
            seal(segment, self.bitmaps)
            segment.file.sync()
        finally:
            segment.file.close()
        self._give_name(name)
        self.copied_bytes = segment.offset - HEADER_PAGE
        return number, segment.chain

    def _copy_batch(
        self, segment: OpenSegment, file: File, table: Table, batch: np.void, name: str
    ) -> int:
        """One batch, read, verified, written; its size."""
        first, count = int(batch["first_row"]), int(batch["count"])
        payload = read_rows(file, table, first, count, name=name)
        rows = table.rows[first : first + count]
        columns = [rows[field].astype(np.uint64) for field in ENTRY_DTYPE.names or ()]
        entries = np.column_stack([*columns, np.zeros(count, np.uint64)]).ravel().tolist()
        sums = sums_of(table, first, count).tolist()
        head, chain = pack_batch(
            disk=self.disk, segment=segment.number, offset=segment.offset,
            first_seq=int(batch["first_seq"]), stamp=int(batch["stamp"]),
            barrier=int(batch["barrier"]), durable=self.plan.durable, applied=self.found.applied,
            window_start=self.found.window_start, previous=segment.chain, entries=entries,
            sums=sums, payload_bytes=len(payload), seed=segment.seed,
        )  # fmt: skip
        size = align(len(head) + len(payload))
        padding = bytes(-(segment.offset + len(head) + len(payload)) % PAGE)
        segment.file.write(segment.offset, [head, payload, padding])
        segment.heads += head
        segment.sizes.append(len(head))
        segment.chain = chain
        segment.offset += size
        return size

    def _give_name(self, name: str) -> None:
        """Only now does it exist: content first, then the name, then everything else."""
        self.storage.rename(name + TEMPORARY, name)
        self.in_work = ""
        self.storage.sync_dir(_REDO)

    # -- the new segment
    def _begin(
        self, number: int, predecessor: int, chain: int
    ) -> tuple[RedoStart, OpenRollback | None]:
        """The segment that will be appended to, with what this recovery has to say in it."""
        plan = self.plan
        name = segment_name(Log.REDO, number)
        header = SegmentHeader(
            Log.REDO, self.disk, number, self.identity(), first_seq=plan.highest + 1,
            predecessor=predecessor, predecessor_chain=chain, cut=plan.end, stamp=self.stamp,
            highest=plan.highest, durable=plan.highest,
        )  # fmt: skip
        rollback = self._rollback()
        stamp, barrier = self._last_kept()
        self.in_work = name
        segment = create_segment(self.storage, header, name=name + TEMPORARY)
        writer = RedoWriter(
            self.storage, self.disk,
            RedoStart(segment, self.bitmaps, plan.highest, self.bitmaps.rollback),
            segment_bytes=1 << 40, identity=self.identity,
        )  # fmt: skip
        marks = {
            "stamp": self.stamp, "barrier": barrier, "applied": self.found.applied,
            "window_start": self.found.window_start,
        }  # fmt: skip
        try:
            if not plan.clean:
                body = {
                    "kept": plan.end, "highest_seen": plan.highest,
                    "stamp_from": stamp, "stamp_to": self.stamp,
                }  # fmt: skip
                writer.append_control(Kind.CRASH, body, **marks)
            if self.bitmaps.rollback and rollback is None:
                body = {"begin": self.bitmaps.rollback}
                writer.append_control(Kind.ROLLBACK_ABORT, body, **marks)
            writer.sync()
            self._give_name(name)
        except BaseException:
            segment.file.close()
            raise
        return writer.start_again(), rollback

    def _rollback(self) -> OpenRollback | None:
        """The rollback that is open at the end, if it is not this disk's alone."""
        begin = self.bitmaps.rollback
        if not begin:
            return None
        for info in reversed(self.found.infos):
            if info.first_seq <= begin <= info.bound:
                body = self._body(info, self._table(info), begin)
                if body is not None and len(body.get("disks") or ()) <= 1:
                    return None
                return OpenRollback(begin, body or {})
        return OpenRollback(begin, {})

    def _last_kept(self) -> tuple[int, int]:
        """Stamp and barrier of the last batch that was kept (the newest table is always loaded)."""
        for item in reversed(self.found.loaded):
            kept = item.table.batches[item.table.batches["first_seq"] <= self.plan.end]
            if len(kept):
                return int(kept["stamp"][-1]), int(kept["barrier"].max())
        return 0, 0

    def _body(self, info: SegmentInfo, table: Table, seq: int) -> dict[str, Any] | None:
        """A control record's body, or None when it cannot be read."""
        if not table.first_seq <= seq <= table.last_seq:
            return None
        file = open_segment(self.storage, info.name)
        try:
            body = json.loads(read_body(file, table, seq - table.first_seq, name=info.name))
        except (Corruption, ValueError):
            return None
        finally:
            file.close()
        return body if isinstance(body, dict) else None

    # -- the answer
    def _result(self, start: RedoStart, rollback: OpenRollback | None) -> Recovered:
        found, plan = self.found, self.plan
        lister = SegmentLister(self.storage, Log.REDO, self.disk)
        infos = lister.refresh()
        tail = []
        size = None
        for info in infos:
            if info.trailer is not None and info.trailer.last_seq <= found.applied:
                continue
            if info.bound <= found.applied:
                continue
            table = self._table(info).upto(min(info.bound, start.last_seq))
            table = table.above(found.applied)
            if len(table.rows):
                tail.append((info, table))
            for row in np.flatnonzero(table.rows["kind"] == Kind.RESIZE).tolist():
                body = self._body(info, table, table.first_seq + row)
                if body is not None and isinstance(body.get("size"), int):
                    size = body["size"]
        stamp, _ = self._last_kept()
        lost = None
        if plan.highest > plan.end:
            lost = Lost(plan.end + 1, plan.highest, stamp, self.stamp)
        return Recovered(
            start=start, applied=found.applied, durable=start.last_seq,
            window_start=found.window_start, floor=infos[0].first_seq, tail=tail,
            masks=self.masks, highest_stamp=max(found.stamp, self.stamp), clean=plan.clean,
            lost=lost, corruptions=list(plan.corruptions), size=size, open_rollback=rollback,
            copied_bytes=self.copied_bytes,
        )  # fmt: skip


def apply(
    storage: Storage,
    disk: bytes,
    found: Survey,
    plan: Plan,
    *,
    stamp: int,
    identity: Callable[[], bytes],
    copy_limit: int,
) -> Recovered:
    """Carry out a plan. Interrupted at any step, it leaves what a new survey understands.

    :raises JournalFull: no space for the copy or the new segment; nothing is lost by the attempt.
    :raises Poisoned: a write or a sync failed; nothing may be served.
    """
    work = _Recovery(storage, disk, found, plan, stamp, identity, copy_limit)
    try:
        return work.run()
    except (OSError, JournalError) as error:
        if work.in_work:
            try:
                storage.unlink(work.in_work + TEMPORARY)
            except OSError:
                pass  # the next recovery removes it
        if isinstance(error, JournalError):
            raise
        if is_full(error):
            raise JournalFull(
                "no space to recover the redo log: free some on the journal's file system"
            ) from error
        raise Poisoned(f"could not make the recovered redo log durable ({error})") from error


def recover(
    storage: Storage,
    disk: bytes,
    *,
    durable_hint: int,
    applied_hint: int,
    stamp: int,
    identity: Callable[[], bytes],
    copy_limit: int = 256 << 20,
    segment_hint: int = 0,
    reclaimed_hint: int | None = None,
) -> Recovered:
    """Survey, classify, apply. The caller holds the recorder's lock of this disk.

    The hints are what others know (`hints.gather`): the highest seq that was durable, `applied`,
    the highest segment number ever used, up to where records were given up. ``stamp``:
    now, above every stamp in the journal. ``copy_limit``: bytes of the copy that wait for a sync.
    """
    found = survey(
        storage, disk, durable_hint=durable_hint, applied_hint=applied_hint,
        segment_hint=segment_hint, reclaimed_hint=reclaimed_hint,
    )  # fmt: skip
    return apply(
        storage, disk, found, classify(found), stamp=stamp, identity=identity,
        copy_limit=copy_limit,
    )  # fmt: skip
