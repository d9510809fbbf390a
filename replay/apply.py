"""R3, apply: bring the backing forward over durable records, saving first what a kept point still
needs.

For each group of records: save rule; sync the undo log, always; publish; overwrite with the group's
newest values. After one or several groups: sync the backing, then `applied` moves, in the catalog
and in one store in the frontier. The sync may go on beside the next groups: what it is good for is
what was overwritten before it began. A crash anywhere, or an error of the backing, repeats the
groups; the save rule then finds its own images.

A group is bounded in blocks. A record larger than that is a group alone, done in slices, each with
all the steps; `applied` moves after the last. Of a rollback, too, only the end is shown as applied:
whoever starts from `applied` need not know of a rollback that began before. Every checksum is
verified before anything is written from what it covers; at a damaged record apply stops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno

import numpy as np

from journal.errors import Corruption
from journal.format import BLOCK, Kind
from journal.run_format import RunDamaged
from journal.segment import SegmentInfo, Table
from replay.payloads import Payloads, Write, in_disk_order
from replay.plan import TRIM, Changes, group_end, large_zeroes, plan_changes, stretches
from replay.ranges import zero_range
from replay.refs import decide
from replay.release import zero_blocks
from replay.work import BUFFER_BLOCKS, Flight, Work, bitmap, members

GROUP_BLOCKS = 32768
GROUP_ROWS = 1 << 18
LAST_BLOCKS = 16


@dataclasses.dataclass(slots=True)
class _Group:
    """Consecutive records: rows of one or more tables."""

    first_seq: int
    rows: np.ndarray
    valid: np.ndarray
    piece: np.ndarray  # of each row: number in ``sources``
    row: np.ndarray  # of each row: its row in that table
    sources: list[tuple[SegmentInfo, Table]]

    @property
    def last_seq(self) -> int:
        return self.first_seq + len(self.rows) - 1

    @property
    def seqs(self) -> np.ndarray:
        return np.arange(self.first_seq, self.first_seq + len(self.rows), dtype=np.uint64)

    def head(self, count: int) -> _Group:
        return dataclasses.replace(
            self, rows=self.rows[:count], valid=self.valid[:count],
            piece=self.piece[:count], row=self.row[:count],
        )  # fmt: skip


class Applier:
    """Applies groups.

    ``done``: the end of the last group overwritten; ``applied``: the last one synced and shown;
    ``started``: no group, of this life or an earlier one, can have ended above it. Nothing may be
    reclaimed or released unless all three are equal. ``damaged``: why it stopped for good.
    ``last_blocks``: some blocks of the last group, for the fingerprint.
    """

    def __init__(self, work: Work, *, applied: int, barrier: int) -> None:
        """``barrier``: no group of an earlier life can have ended above it."""
        self._work = work
        self.applied = self.done = self._whole = applied
        self.started = max(applied, barrier)
        self.damaged: Corruption | None = None
        self.last_blocks: list[int] = []
        self.unsynced_bytes = 0  # written to the backing since its last sync
        self._barred: Corruption | None = None  # a damaged record: apply up to it
        self._inside = False  # a rollback, at ``done``
        self._gaps_passed = False
        self._flight: tuple[int, Flight] | None = None  # a sync, and what was whole when it began
        self._doubtful_upto = 0  # groups up to there were not all synced by a sync that failed

    @property
    def unfinished(self) -> bool:
        """Whether a sync of the backing would let `applied` move."""
        return self._whole > self.applied

    @property
    def settled(self) -> bool:
        """Whether everything that was ever begun is applied."""
        return self.done == self.applied >= self.started

    @property
    def doubtful(self) -> bool:
        """Whether the backing may hold, when the page cache is gone, something else than it does
        now: a sync has failed, and what that had is not written again yet.
        """
        return self.applied < self._doubtful_upto

    def step(self, *, limit_blocks: int = GROUP_BLOCKS) -> bool:
        """Save and overwrite one group; whether there was one.

        :raises Corruption: a record, or what it refers to, is damaged; `applied` stays below it
            until somebody decides.
        """
        if self.damaged is not None:
            raise self.damaged
        group = self._next(limit_blocks)
        if group is None:
            return False
        # Before anything is done: if this fails half-way, its blocks are not fresh any more.
        fresh_above, self.started = self.started, max(self.started, group.last_seq)
        try:
            self._carry_out(group, limit_blocks, fresh_above)
        except RunDamaged:
            raise
        except Corruption as error:
            if group.first_seq < error.first_seq <= group.last_seq:
                self._barred = error
                return True
            self.damaged = error
            raise
        self._work.blocks.advance(group.rows, group.valid)
        self._follow(group)
        return True

    def _carry_out(self, group: _Group, limit_blocks: int, fresh_above: int) -> None:
        kind = int(group.rows["kind"][0])
        if kind in (Kind.GAP_BEGIN, Kind.GAP_END):
            self._work.blocks.forget(self._work.backing.size())
        elif len(group.rows) == 1 and group.valid[0] and large_zeroes(group.rows)[0]:
            start, count = int(group.rows["block"][0]), int(group.rows["nblocks"][0])
            self.unsynced_bytes += zero_range(
                self._work, start, start + count, group.first_seq, fresh_above=fresh_above
            )
        elif len(group.rows) == 1 and int(group.rows["nblocks"][0]) > limit_blocks:
            self._large(group, limit_blocks, fresh_above)
        else:
            changes = plan_changes(group.rows, group.seqs, group.valid)
            self._change(group, changes, fresh_above)

    def _follow(self, group: _Group) -> None:
        """The group is overwritten; is its end inside a rollback?"""
        kind = group.rows["kind"]
        controls = np.flatnonzero((kind >= Kind.ROLLBACK_BEGIN) & (kind <= Kind.ROLLBACK_ABORT))
        if len(controls):
            self._inside = bool(kind[controls[-1]] == Kind.ROLLBACK_BEGIN)
        self.done = group.last_seq
        if not self._inside:
            self._whole = self.done

    def begin(self) -> bool:
        """Begin a sync of the backing, unless there is nothing to sync or one is under way; whether
        one was begun. Groups may be overwritten meanwhile: they belong to the next one.

        :raises OSError: see `look`.
        """
        if self._flight is not None or not self.unfinished:
            return False
        self._flight = self._whole, self._work.launch(self._work.backing.sync)
        self.unsynced_bytes = 0
        self.look()
        return True

    def look(self, *, wait: bool = False) -> None:
        """Take in a sync that has ended: `applied` moves to the end of the last group, in no
        rollback, that was overwritten *before it began*.

        :raises OSError: the sync failed; everything above `applied` will be written again.
        """
        if self._flight is None or not (wait or self._flight[1].done()):
            return
        (whole, flight), self._flight = self._flight, None
        try:
            self._work.take_in(flight)
        except OSError:
            self._doubtful_upto = self.started
            self.done = self._whole = self.applied
            self._inside = False
            self.unsynced_bytes = 0
            raise
        self._show(whole)

    def finish(self) -> None:
        """Sync the backing; `applied` moves to the end of the last group that is in no rollback.

        :raises OSError: the sync failed; everything above `applied` will be written again.
        """
        self.look(wait=True)
        self.begin()
        self.look(wait=True)

    def _show(self, applied: int) -> None:
        self._work.catalog.commit(("applied", applied), *self._work.take_ends())
        self.applied = applied
        self._work.frontier.applied = max(applied, self._work.frontier.applied)

    def skip(self, upto: int) -> None:
        """Records up to ``upto`` are not to be applied (any more): somebody else wrote meanwhile.

        The catalog says so already.
        """
        with contextlib.suppress(OSError):
            self.look(wait=True)
        if upto > self.applied:
            self._show(upto)
        self.done = self._whole = max(self.done, upto)
        self.started = max(self.started, upto)
        self._inside = False
        self.damaged = self._barred = None

    # ------------------------------------------------------------------------------- the group
    def _next(self, limit_blocks: int) -> _Group | None:
        """The records to be applied next.

        :raises Corruption: the next one is lost or damaged.
        """
        history = self._work.history
        snapshot = history.refresh()
        if snapshot.decided <= self.done:
            return None
        infos = list(snapshot.redo_infos.values())
        if not self._gaps_passed:
            self._pass_gaps(infos, snapshot.decided)
        group = self._collect(infos, limit_blocks)
        if group is None:
            return None
        self._stop_before_damage(group.first_seq)
        count = group_end(group.rows, group.valid, limit_blocks)
        kind = group.rows["kind"][:count]
        gaps = np.flatnonzero((kind == Kind.GAP_BEGIN) | (kind == Kind.GAP_END))
        if len(gaps):  # what is known of the backing is void behind it
            count = max(1, int(gaps[0]))
        if self._barred is not None:
            count = min(count, self._barred.first_seq - group.first_seq)
        return group.head(count)

    def _stop_before_damage(self, first_seq: int) -> None:
        """Note the first record above ``done`` that is lost; raise if it comes next."""
        lost = [each for each in self._work.history.snapshot.lost if each[1] > self.done]
        if lost and (self._barred is None or lost[0][0] < self._barred.first_seq):
            first, last = lost[0]
            self._barred = Corruption(
                "records are damaged or gone", file="redo", first_seq=max(first, self.done + 1),
                last_seq=last,
            )  # fmt: skip
        if self._barred is not None and self._barred.first_seq <= first_seq:
            self.damaged = self._barred
            raise self.damaged

    def _collect(self, infos: list[SegmentInfo], limit_blocks: int) -> _Group | None:
        """Rows of consecutive seqs from the first above ``done`` on, enough for a group."""
        redo = self._work.history.redo
        sources: list[tuple[SegmentInfo, Table]] = []
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        first = count = blocks = 0
        for place, info in enumerate(infos):
            if info.trailer is not None and info.trailer.last_seq <= self.done:
                continue
            table = redo.table(info)
            low = max(0, self.done + 1 - table.first_seq)
            if low >= len(table.rows):
                continue
            if count and table.first_seq + low != first + count:
                break  # seqs were lost in between: the next group starts behind the hole
            verdict = decide(table.rows, (redo.table(each).rows for each in infos[place + 1 :]))
            high = min(verdict.undecided, low + GROUP_ROWS - count)
            if high > low:
                first = first or table.first_seq + low
                rows = table.rows[low:high]
                number = np.full(high - low, len(sources))
                parts.append((rows, verdict.valid[low:high], number, np.arange(low, high)))
                sources.append((info, table))
                count += high - low
                blocks += int(rows["nblocks"].astype(np.int64).sum())
            if high < len(table.rows) or blocks > limit_blocks:
                break
        if not parts:
            return None
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return _Group(first, columns[0], columns[1], columns[2], columns[3], sources)

    def _pass_gaps(self, infos: list[SegmentInfo], decided: int) -> None:
        """Before a gap everything was applied, and in it somebody else wrote: at a start nothing
        from before the last one is written again, whatever `applied` says.
        """
        self._gaps_passed = True
        for info in infos:
            if info.trailer is not None and info.trailer.last_seq <= self.done:
                continue
            table = self._work.history.redo.table(info).upto(decided)
            begins = np.flatnonzero(table.rows["kind"] == Kind.GAP_BEGIN)
            if len(begins) and table.first_seq + int(begins[-1]) > self.done + 1:
                self.done = self._whole = table.first_seq + int(begins[-1]) - 1

    # ------------------------------------------------------------------------------- the steps
    def _large(self, group: _Group, limit_blocks: int, fresh_above: int) -> None:
        """One record in slices of blocks; a trim alone changes nothing."""
        if not group.valid[0] or group.rows["kind"][0] == Kind.TRIM:
            return
        start, count = int(group.rows["block"][0]), int(group.rows["nblocks"][0])
        for at in range(start, start + count, limit_blocks):
            blocks = np.arange(at, min(at + limit_blocks, start + count), dtype=np.uint64)
            oldest = np.full(len(blocks), group.first_seq, np.uint64)
            changes = Changes(blocks, np.zeros(len(blocks), np.int64), oldest)
            self._change(group, changes, fresh_above)

    def _change(self, group: _Group, changes: Changes, fresh_above: int) -> None:
        work, known = self._work, self._work.blocks
        touched = bitmap(changes.blocks)
        need = ~members(changes.blocks, known.held, known=touched)
        self._save(changes.blocks[need], changes.oldest[need], fresh_above)
        work.publish()
        chosen = np.where(changes.row == TRIM, 0, changes.row)
        kind = group.rows["kind"][chosen]
        kind[changes.row == TRIM] = Kind.ZERO
        zero = kind == Kind.ZERO
        # Before the first write: one that fails may have happened all the same.
        known.zero -= touched
        known.data |= touched if not zero.any() else bitmap(changes.blocks[~zero])
        zero_blocks(work, changes.blocks[zero])
        self._records(group, changes.blocks, chosen, kind == Kind.WRITE)
        self._refs(group, changes.blocks, chosen, kind == Kind.REF)
        known.held |= touched
        self.unsynced_bytes += int(np.count_nonzero(~zero)) * BLOCK
        if len(changes.blocks):
            self.last_blocks = changes.blocks[-LAST_BLOCKS:].tolist()

    def _save(self, blocks: np.ndarray, oldest: np.ndarray, fresh_above: int) -> None:
        """Before-images of blocks of which the redo log may not have what the backing holds."""
        if not len(blocks):
            return
        work = self._work
        fresh = ~members(blocks, work.blocks.masked) & (oldest > fresh_above)
        if not fresh.all():
            # Masked: an applied trim lies in the redo log, so the oldest version is older than the
            # group's. A repeat after a crash: the backing may hold a newer version already, and
            # only the end of the image that was saved first tells that nothing must be saved now.
            oldest = oldest.copy()
            oldest[~fresh] = work.history.oldest(blocks[~fresh])
        save = work.unsaved(blocks, oldest, fresh=fresh)
        if save.any():
            work.save_backing(blocks[save], oldest[save])

    # ------------------------------------------------------------------------------- content
    def _records(
        self, group: _Group, blocks: np.ndarray, chosen: np.ndarray, which: np.ndarray
    ) -> None:
        """Write the content of the group's write records, segment by segment."""
        if not which.any():
            return
        work = self._work
        blocks, chosen = blocks[which], chosen[which]
        piece = group.piece[chosen]
        for number in np.unique(piece).tolist():
            mine = piece == number
            info, table = group.sources[number]
            payloads = Payloads(work.history.redo.file(info), info.name, table, work.buffer)
            rows, its = group.row[chosen[mine]], blocks[mine]
            small = payloads.is_small(rows)
            few = its[small]
            for part, places, _, view in payloads.small(rows[small], few):
                self._write(in_disk_order(few[part], places, view))
            for block, view in payloads.large(rows[~small], its[~small]):
                self._write([(block * BLOCK, (view,))])

    def _refs(
        self, group: _Group, blocks: np.ndarray, chosen: np.ndarray, which: np.ndarray
    ) -> None:
        """A ref is resolved before its block is overwritten."""
        if not which.any():
            return
        work = self._work
        blocks, sources = blocks[which], group.rows["arg"][chosen[which]]
        for source in np.unique(sources).tolist():
            mine = blocks[sources == source]
            for at in range(0, len(mine), BUFFER_BLOCKS):
                part = mine[at : at + BUFFER_BLOCKS]
                content = work.buffer[: len(part) * BLOCK]
                content[:] = bytes(len(content))
                work.history.read_into(content, part, int(source))
                bounds = stretches(part)
                starts = (part[bounds[:-1]] * np.uint64(BLOCK)).tolist()
                places = (bounds * BLOCK).tolist()
                self._write(
                    [(start, (content[low:high],)) for start, low, high in
                     zip(starts, places[:-1], places[1:], strict=True)]
                )  # fmt: skip

    def _write(self, writes: list[Write]) -> None:
        """Write to the backing, without the padding of a short last block."""
        backing = self._work.backing
        offset, pieces = writes[-1]
        surplus = offset + sum(map(len, pieces)) - backing.size()
        if surplus >= BLOCK:
            raise OSError(errno.ENOSPC, "the backing is smaller than the disk")
        if surplus > 0:
            writes[-1] = offset, (*pieces[:-1], pieces[-1][:-surplus])
        write = backing.write
        for offset, pieces in writes:
            write(offset, pieces)
