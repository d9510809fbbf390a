"""Rolling back, the recorder's part: begin, refs, commit.

The disk is not served from the begin until the refs are applied. The plan, ranges and the seqs they
go back to, was made by the viewer while the disk was served. What was written since then is the
*remainder*: blocks with a version above the plan's tip go back to the target as well, whatever the
plan says of them. So a plan is never too old, and clients that wrote to the last moment do no harm.

Of several disks none commits before all have prepared: a recorder that finds a prepared rollback at
its start waits for the supervisor's word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import trio
from pyroaring import BitMap

from journal.bitmaps import blocks_of
from journal.errors import Conflict, InvalidInput, JournalFull
from journal.format import Kind

if TYPE_CHECKING:
    from cdp.recorder.engine import Recorder
    from journal.follower import RedoFollower

# Refs of one append, and appends between two checkpoints of the loop.
REFS_PER_BATCH: Final = 4096
_NBLOCKS_MAX: Final = (1 << 32) - 1
_TRIPLE: Final = np.dtype([("start", "<u8"), ("nblocks", "<u8"), ("source", "<u8")])
# What closes a rollback is tried again so often while there is no space for it.
RETRY_SECONDS: Final = 0.2
# A commit may be asked for twice: so many ids of the past are remembered.
REMEMBERED_MAX: Final = 16

Ranges = list[tuple[int, int]]


@dataclass(slots=True)
class Open:
    """A rollback that is prepared and not closed. ``refs``: ranges that it changes."""

    id: str
    begin_seq: int
    last_seq: int
    refs: Ranges


def read_plan(fd: int, blocks: int) -> np.ndarray:
    """The triples in a memory file, checked.

    :raises InvalidInput: they are no plan for a disk of so many blocks.
    """
    size = os.fstat(fd).st_size
    if size % _TRIPLE.itemsize:
        raise InvalidInput(f"a plan of {size} bytes: versions differ")
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        done = os.preadv(fd, [view[at:]], at)
        if not done:
            raise InvalidInput("the plan is cut off")
        at += done
    plan = np.frombuffer(data, _TRIPLE)
    limit = np.uint64(blocks)
    good = (plan["start"] < limit) & (plan["nblocks"] >= 1) & (plan["nblocks"] <= limit)
    if not (good & (plan["start"] + plan["nblocks"] <= limit)).all():
        raise InvalidInput("the plan names blocks that the disk does not have")
    return plan


def changed_since(follower: RedoFollower, tip_seq: int, last_seq: int) -> Ranges:
    """Ranges of blocks with a version above the tip. Reads tables; for a thread."""
    changed = BitMap()
    if last_seq > tip_seq:
        for _, table in follower.tables(tip_seq + 1, last_seq):
            rows = table.above(tip_seq).rows
            kind = rows["kind"]
            versions = rows[(kind >= Kind.WRITE) & (kind <= Kind.REF)]
            changed |= blocks_of(versions["block"], versions["nblocks"])
    return list(ranges_of(changed))


def ranges_of(blocks: BitMap) -> Iterator[tuple[int, int]]:
    """Stretches of consecutive blocks: (first, number)."""
    numbers = np.frombuffer(blocks.to_array(), np.uint32).astype(np.int64)
    if not len(numbers):
        return
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    firsts = np.concatenate([[0], breaks])
    ends = np.concatenate([breaks, [len(numbers)]])
    for low, high in zip(firsts.tolist(), ends.tolist(), strict=True):
        yield int(numbers[low]), high - low


def entries_of(plan: np.ndarray, remainder: Ranges, to_seq: int) -> Iterator[list[int]]:
    """Flat entries of the refs, in pieces of one append each."""
    flat: list[int] = []
    for start, nblocks, source in plan.tolist():
        while nblocks:
            part = min(nblocks, _NBLOCKS_MAX)
            flat += (start, source, part, int(Kind.REF), 0, 0)
            start, nblocks = start + part, nblocks - part
            if len(flat) >= 6 * REFS_PER_BATCH:
                yield flat
                flat = []
    for start, nblocks in remainder:
        flat += (start, to_seq, nblocks, int(Kind.REF), 0, 0)
        if len(flat) >= 6 * REFS_PER_BATCH:
            yield flat
            flat = []
    if flat:
        yield flat


class Rollbacks:
    """The rollback of one disk, if any. ``unapplied``: served again once `applied` is there.
    ``trouble``: why it cannot be closed.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.open: Open | None = None
        self.unapplied = 0
        self.trouble: str | None = None
        self._closing = trio.Lock()
        self._committed: dict[str, int] = {}

    @property
    def serving(self) -> bool:
        """Whether nothing of a rollback keeps the disk from being served."""
        if self.open is not None:
            return False
        if self.unapplied and self._recorder.frontier.applied >= self.unapplied:
            self.unapplied = 0
        return not self.unapplied

    async def prepare(
        self, identity: str, to_seq: int, plan: np.ndarray, remainder: Ranges, disks: list[str]
    ) -> Open:
        """Append begin and refs and make them durable; nobody is served meanwhile.

        :raises JournalFull: there is no space; if it is open, `abort` comes next.

        Not to be cancelled: the caller shields it.
        """
        recorder = self._recorder
        assert self.open is None
        body = {"id": identity, "to_seq": to_seq, "disks": disks}
        begin, _ = recorder.append_control(Kind.ROLLBACK_BEGIN, body)
        refs = [(start, count) for start, count, _ in plan.tolist()] + remainder
        self.open = Open(identity, begin, begin, refs)
        try:
            for entries in entries_of(plan, remainder, to_seq):
                self.open.last_seq = recorder.append_refs(entries)
                await trio.lowlevel.checkpoint()
            await self._durable()
        except JournalFull:
            raise  # who asked for it hears that, and has it aborted
        except BaseException:
            if recorder.poisoned is None:
                await self.abort(identity)
            raise
        return self.open

    async def commit(self, identity: str) -> int:
        """Close it: from here on the refs are versions. Durable when this returns; its seq."""
        async with self._closing:
            if identity not in self._committed:
                current = self._expect(identity)
                seq = await self._close(Kind.ROLLBACK_COMMIT, identity)
                self._recorder.tell_refs(current.refs, seq)
                self.unapplied = seq
                self.open = None
                self._committed[identity] = seq
                while len(self._committed) > REMEMBERED_MAX:
                    del self._committed[next(iter(self._committed))]
            seq = self._committed[identity]
        await self._durable()
        return seq

    async def abort(self, identity: str) -> None:
        """Close it: its refs are no versions anywhere."""
        async with self._closing:
            self._expect(identity)
            await self._close(Kind.ROLLBACK_ABORT, identity)
            self.open = None
        await self._durable()

    async def _close(self, kind: Kind, identity: str) -> int:
        """Append the record that closes it, as soon as there is space for it; its seq.

        :raises JournalFull: there is none, and the process ends. Its successor decides.
        """
        while True:
            try:
                seq, _ = self._recorder.append_control(kind, {"id": identity})
            except JournalFull as error:
                self.trouble = str(error)
                if self._recorder.no_space.ending:
                    raise
                await trio.sleep(RETRY_SECONDS)
            else:
                self.trouble = None
                return seq

    def _expect(self, identity: str) -> Open:
        if self.open is None or self.open.id != identity:
            raise Conflict(f"no rollback {identity} is prepared here")
        return self.open

    async def _durable(self) -> None:
        event = trio.Event()
        self._recorder.wait_event(self._recorder.writer.last_seq, event)
        await event.wait()
        if self._recorder.poisoned is not None:
            raise self._recorder.poisoned

    def describe(self) -> dict[str, Any] | None:
        """For `hello`: what waits for the supervisor's word."""
        if self.open is None:
            return None
        return {"id": self.open.id, "begin_seq": self.open.begin_seq}
