"""The curator's work on one disk, step by step: apply, index, give up what the policy says.

One step at a time, in one thread: apply, release, reclaim and sweep exclude each other from the
first decision to the last step (R4). Between two steps commands may come in. Nothing here awaits or
reads a clock; the time (ns, the host's stamps) is an argument.

A step does a bit of each kind of work, so that none starves another. What cannot be done - the
backing gives an error, there is no space, something is damaged - holds that kind of work for a
while, and the others go on. What leaves a log in an unknown state (`UndoFailed`, `CatalogFailed`)
is not held but raised: the process ends, and the next one recovers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Final

import numpy as np

from cdp.curator.controls import Controls
from cdp.curator.housekeeping import Housekeeping
from cdp.curator.kept import Kept
from cdp.curator.known import load_blocks, valid_rows
from cdp.curator.space import Space
from journal.catalog import Catalog
from journal.catalog_state import Bookmark, Pin, Thinned, drop
from journal.errors import Conflict, Corruption, JournalFull, Vanished
from journal.follower import RedoFollower
from journal.format import BLOCK, Kind
from journal.frontier import Frontier, unpack_position
from journal.run_format import INDEX, IndexFailed, IndexFull, RunDamaged
from journal.runset import RunSet
from journal.segment import SegmentInfo, Table
from journal.storage import File, Storage
from journal.undo import UndoWriter
from replay import fingerprint, reclaim, release, sweep
from replay.apply import Applier
from replay.history import ATTEMPTS, History, Told, UndoLog
from replay.retention import Usage
from replay.work import Blocks, Flight, Work, at_once

log = logging.getLogger(__name__)

SECOND_NS: Final = 1_000_000_000
GROUP_BLOCKS = 65536
TAIL_PART = 4  # of the tail's bound, as content: half of the work from which clients are delayed
GROUP_LIMIT_PART = 32  # of the journal's limit at most is applied in one step
APPLY_RECORDS = 65536  # a backlog that is worth a group at once
APPLY_AGE_NS = SECOND_NS  # a smaller one waits so long: later groups coalesce more
SYNC_AGE_NS = SECOND_NS
SYNC_BYTES = 256 << 20
SYNC_AHEAD_BYTES = 2 * SYNC_BYTES  # written beside a sync; then it is waited for
FULL_RETRY_NS = SECOND_NS // 10  # in which the recorder has seen that it is held
RETRY_NS = SECOND_NS  # after something that could not be done
SAID_NS: Final = 60 * SECOND_NS  # what comes and goes is logged once in so long a time
INDEX_RETRY_NS = 60 * SECOND_NS
OWNER_ROLLBACK: Final = "rollback"  # of the pin that a rollback holds while it is planned
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_ERRORS_HELD: Final = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclasses.dataclass(slots=True)
class Policy:
    """What the administrator set. ``window_ns`` None: everything until the limit."""

    window_ns: int | None
    journal_limit: int
    overflow: str
    segment_bytes: int
    tail_bytes: int


@dataclasses.dataclass(slots=True)
class Counters:
    """Since this curator started."""

    groups: int = 0
    reclaimed_segments: int = 0
    swept_segments: int = 0
    copied_bytes: int = 0
    shrunk: int = 0
    corruptions: int = 0


@dataclasses.dataclass(slots=True)
class _Job:
    """A kind of work. ``trouble``: why it is held, until ``again`` (ns)."""

    name: str
    trouble: str | None = None
    again: int = 0
    vanished: int = 0
    full: bool = False  # there was no space for it, when it was last tried
    said: str = ""  # in the log, not long ago
    said_at: int = 0


class Engine:
    """See the module. Made by `cdp.curator.start`."""

    def __init__(
        self,
        *,
        storage: Storage,
        frontier: Frontier,
        catalog: Catalog,
        redo: RedoFollower,
        undo: UndoWriter,
        undo_log: UndoLog,
        redo_runs: RunSet,
        undo_runs: RunSet,
        backing: File,
        controls: Controls,
        policy: Policy,
        other_bytes: Callable[[], int],
        identity: Callable[[], dict[str, int]],
        space: Space,
        launch: Callable[[Callable[[], None]], Flight] = at_once,
        viewer_gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self.policy, self.space = policy, space
        self.controls, self.catalog, self.frontier = controls, catalog, frontier
        self.redo = redo
        self.redo_runs, self.undo_runs = redo_runs, undo_runs
        self.counters = Counters()
        self.policy_lock = threading.RLock()  # a pin's check and commit, a window's move
        self.kept = Kept(catalog, controls, redo, frontier)
        self.history = History(
            frontier=frontier, redo=redo, undo=undo_log, redo_runs=redo_runs, undo_runs=undo_runs,
            backing=backing, told=lambda: Told.by(catalog),
        )  # fmt: skip
        self.work = Work(
            storage=storage, history=self.history, undo=undo, backing=backing, catalog=catalog,
            frontier=frontier, blocks=Blocks(), openable=self.kept.openable,
            available=space.available, launch=launch,
        )  # fmt: skip
        self._other_bytes = other_bytes
        self.identity = identity
        controls.catch_up()
        self._undo_before = max(catalog.undo(), default=0)  # those up to here are of earlier lives
        self.applier = Applier(self.work, applied=self._start_applied(), barrier=frontier.durable)
        load_blocks(self.work, self.applier.applied)
        self._epoch = frontier.epoch
        self._jobs = _Job("apply"), _Job("the index"), _Job("housekeeping")
        self._keeper = Housekeeping(self, viewer_gone)
        self._refused = frontier.redo_refused
        self._last_apply = self._last_sync = 0
        self._appended_before = 0  # the frontier's redo_bytes, when all of that was applied
        self._merging: dict[RunSet, Iterator[int]] = {}
        self.last_usage = self.usage()
        with contextlib.suppress(OSError):  # housekeeping tries again, and says what is wrong
            self._keeper.care_for_space()  # before anybody is served

    def _start_applied(self) -> int:
        """PROTOCOLS: the highest that anybody knows; shown before any work."""
        catalog, frontier = self.catalog, self.frontier
        applied = max(frontier.applied, catalog.applied, catalog.reclaimed)
        frontier.applied = applied
        frontier.window_start = catalog.window_start
        return applied

    # ------------------------------------------------------------------------------------ steps
    def step(self, now: int, *, urgent: bool = False) -> bool:
        """Do a bit of each kind of work; whether there was any. ``urgent``: apply at once."""
        if self.frontier.epoch != self._epoch:
            self._epoch = self.frontier.epoch
            self.history.refresh()
        if self.frontier.redo_refused != self._refused:
            self._refused = self.frontier.redo_refused
            self.space.confine()
            self._keeper.refused = True
        applying, indexing, keeping = self._jobs
        busy = self._try(applying, lambda: self._apply(now, urgent), now)
        busy |= self._try(indexing, self._index, now)
        busy |= self._try(keeping, lambda: self._keeper.step(now), now)
        return busy

    def _try(self, job: _Job, work: Callable[[], bool], now: int) -> bool:
        if now < job.again:
            return False
        try:
            busy = work()
        except (Vanished, RunDamaged) as error:
            # A file went, or a run was thrown away: its segment's table is read instead.
            self.history.refresh()
            job.vanished += 1
            if job.vanished <= ATTEMPTS:
                return True
            self._hold(job, str(error), now)
        except Corruption as error:
            self._note_damage(error)
            self._hold(job, str(error), now)
        except JournalFull as error:
            self._hold(job, str(error), now)
            self._note_full(job, now)
        except IndexFailed as error:
            self._hold(job, str(error), now + INDEX_RETRY_NS - RETRY_NS)
            if isinstance(error, IndexFull) and self.space.scarce:
                self._note_full(job, now)
        except OSError as error:
            if error.errno not in _ERRORS_HELD:
                raise
            self._hold(job, f"{job.name} waits: {error.strerror} from the backing or journal", now)
            # Where the backing lies beside the journal, history may be what takes its space.
            if error.errno in _NO_SPACE and self.space.scarce:
                self._note_full(job, now)
        else:
            job.trouble, job.vanished = None, 0
            job.full &= not busy and self._is_waiting(job)
            return busy
        return False

    def _note_full(self, job: _Job, now: int) -> None:
        """There was no space for it. History is given up, if the policy says so; if that needs
        space, the reserve's, but not before the recorder has seen that it is held.
        """
        again, job.full = job.full, True
        self.space.confine()
        if again and self.space.release_reserve():
            self.retry()
        elif not again or job is self._jobs[2]:  # housekeeping has other things to give up
            job.again = now + FULL_RETRY_NS

    def _is_waiting(self, job: _Job) -> bool:
        """Whether a job that had nothing to do now may not even have tried."""
        applying, _, keeping = self._jobs
        if job is applying:
            return self.applier.done < self.frontier.durable
        return job is keeping and self._keeper.pressed

    @property
    def full(self) -> bool:
        """Whether some work had no space when it was last tried."""
        return any(job.full for job in self._jobs)

    def _hold(self, job: _Job, why: str, now: int) -> None:
        if job.said != why or now - job.said_at > SAID_NS:
            log.warning("%s is held: %s", job.name, why)
            job.said, job.said_at = why, now
        job.trouble, job.again, job.vanished = why, now + RETRY_NS, 0

    @property
    def held(self) -> str | None:
        """Why apply is held; None: it is not."""
        return self._jobs[0].trouble

    @property
    def throttled(self) -> bool:
        """Whether writes wait, or will, for there is nothing to give up."""
        return self._keeper.throttled

    @property
    def trouble(self) -> str | None:
        """Why any work is held, or writes are, for status."""
        return self._keeper.pressure or next(
            (job.trouble for job in self._jobs if job.trouble), None
        )

    def _group_blocks(self) -> int:
        """A step must be short against the time in which a client can fill a small journal."""
        return min(GROUP_BLOCKS, max(256, self.policy.journal_limit // GROUP_LIMIT_PART // BLOCK))

    def drop_runs(self, names: Collection[str]) -> None:
        """Throw away runs, by their files, that were found damaged; they are made anew."""
        for runs in (self.redo_runs, self.undo_runs):
            for run in [run for run in runs.runs if f"{INDEX}/{run.name}" in names]:
                runs.throw_away(run, RunDamaged("found by a scrub", file=f"{INDEX}/{run.name}"))
        self.history.refresh()

    def retry(self) -> None:
        """What holds apply, or what had no space, may be gone."""
        for job in self._jobs:
            if job.full or job is self._jobs[0]:
                job.again = 0
        self._keeper.forget_failures()

    def _note_damage(self, error: Corruption) -> None:
        key = f"{error.file}@{error.offset}"
        if key in self.catalog.damaged():
            return
        self.counters.corruptions += 1
        log.error("%s", error)
        note = {
            "what": error.what, "file": error.file, "offset": error.offset,
            "first_seq": error.first_seq, "last_seq": error.last_seq,
        }  # fmt: skip
        try:
            self.catalog.commit((("damaged", key), note))
        except JournalFull:
            pass  # it is logged, and will be found again

    # ------------------------------------------------------------------------------------ apply
    def _apply(self, now: int, urgent: bool) -> bool:
        applier = self.applier
        applier.look()
        appended, durable = self.frontier.redo_bytes, self.frontier.durable
        waiting, limit = durable - applier.done, self._group_blocks()
        pressed = self._keeper.pressed  # only what is applied, and synced, can be given up
        backlog = min(limit * BLOCK, self.policy.tail_bytes // TAIL_PART)
        urgent |= pressed or appended - self._appended_before >= backlog
        due = waiting >= APPLY_RECORDS or now - self._last_apply >= APPLY_AGE_NS or urgent
        if waiting > 0 and due and applier.step(limit_blocks=limit):
            self.counters.groups += 1
            if applier.done >= durable:
                self._appended_before = appended
            if self.frontier.durable - applier.done < APPLY_RECORDS:
                self._last_apply = now
            if pressed:
                applier.finish()
            elif applier.unsynced_bytes >= SYNC_BYTES or now - self._last_sync >= SYNC_AGE_NS:
                self._begin_sync(now)
            return True
        if not applier.unfinished:
            return False
        if urgent:
            applier.finish()
            return True
        return now - self._last_sync >= SYNC_AGE_NS and self._begin_sync(now)

    def _begin_sync(self, now: int) -> bool:
        """Whether a sync of the backing was begun. The next one begins when it has ended, so the
        slower the device, the more each is good for; up to a bound, for writers wait for `applied`.
        """
        if self.applier.unsynced_bytes >= SYNC_AHEAD_BYTES:
            self.applier.look(wait=True)
        begun = self.applier.begin()
        if begun:
            self._last_sync = now
        return begun

    # ------------------------------------------------------------------------------------ index
    def is_closed(self, info: SegmentInfo) -> bool:
        """Whether nothing will be appended any more to a segment of the redo log.

        Sealed, or left behind by a recorder that died; a newer one says where its records end.
        """
        return info.sealed or info.bound <= self.frontier.durable

    def closed_undo(self) -> list[SegmentInfo]:
        """Undo segments to which nothing will be appended any more."""
        published = unpack_position(self.frontier.undo_published)[0]
        infos = self.history.current().undo_infos.values()
        return [
            info for info in infos
            if info.sealed or info.segment < published or info.segment <= self._undo_before
        ]  # fmt: skip

    def last_seq_of(self, info: SegmentInfo) -> int:
        """The last record of a closed redo segment."""
        return info.bound if info.trailer is None else min(info.trailer.last_seq, info.bound)

    def _index(self) -> bool:
        """Bring one closed segment of either log into a run, or go on with a merge."""
        snapshot = self.history.current()
        for info in snapshot.redo_infos.values():
            if info.segment in self.redo_runs.covered or not self.is_closed(info):
                continue
            if self.last_seq_of(info) > snapshot.decided:
                break  # refs of a rollback that is not closed are in no run
            table = self.redo.table(info)
            # Of one that lacks records the table is looked at every time, to know what it lacks.
            if table.last_seq == self.last_seq_of(info) and _is_whole(table):
                return self._add(self.redo_runs, table, self.valid(info, table))
        for info in self.closed_undo():
            if info.segment not in self.undo_runs.covered:
                table = self.history.undo.table(info)
                if _is_whole(table):
                    return self._add(self.undo_runs, table, None)
        return self._merge(self.redo_runs) or self._merge(self.undo_runs)

    def _add(self, runs: RunSet, table: Table, valid: np.ndarray | None) -> bool:
        runs.add(table, valid=valid)
        self.history.refresh()
        return True

    def _merge(self, runs: RunSet) -> bool:
        """A slice of a merge that is due; whether there was one."""
        merging = self._merging.get(runs)
        if merging is None:
            due = runs.due()
            if not due:
                return False
            merging = self._merging[runs] = runs.merge_steps(due)
        done = True
        try:
            done = next(merging, None) is None
        finally:
            if done:
                del self._merging[runs]
        if done:
            self.history.refresh()
        return True

    def valid(self, info: SegmentInfo, table: Table) -> np.ndarray:
        """Which rows of a redo segment are versions; refs may be decided by a later segment."""
        return valid_rows(self.redo, self.redo.segments(), info, table, self.catalog.voided)

    # -------------------------------------------------------------------------------- giving up
    def usage(self) -> Usage:
        """Bytes of each kind of file now."""
        other = self._other_bytes()  # first: of the others some become segments
        self.redo.segments()
        redo = self.redo.bytes
        undo = sum(info.size for info in self.history.current().undo_infos.values())
        self.last_usage = Usage(
            redo=redo, undo=undo, other=other,
            limit=self.space.limit(redo + undo + other, self.policy.journal_limit),
            segment=self.policy.segment_bytes,
        )  # fmt: skip
        return self.last_usage

    def move_window(self, seq: int) -> None:
        """The window starts at ``seq`` from now on, durably, before anything is dropped for it."""
        with self.policy_lock:
            self.controls.catch_up(commit_place=True)
            if seq > self.catalog.window_start:
                self.catalog.commit(("window_start", seq))
                self.frontier.window_start = seq

    def sweep(self, info: SegmentInfo) -> bool:
        """Copy what is needed of an undo segment, and delete it."""
        table = self.history.undo.table(info)
        verdict = sweep.judge(self.work, table, self.kept.openable())
        self.counters.copied_bytes += sweep.sweep(self.work, info, table, verdict)
        self.counters.swept_segments += 1
        self.history.refresh()
        return True

    def reclaim_oldest(self) -> bool:
        """Bring the oldest redo segment nearer to its end: release what it masks, at last delete
        it. False: not now.
        """
        if not self._settle():
            return False
        info = self.redo.segments()[0]
        if not self.is_closed(info) or self.last_seq_of(info) > self.applier.applied:
            return False
        if any(pin.owner == OWNER_ROLLBACK for pin in self.catalog.pins().values()):
            return False  # its plan names sources of refs that may be in this segment
        table = self.redo.table(info)
        if table.last_seq < self.last_seq_of(info):
            raise Corruption(
                "records are missing", file=info.name, first_seq=table.last_seq + 1,
                last_seq=self.last_seq_of(info),
            )  # fmt: skip
        valid = self.valid(info, table)
        left = reclaim.reclaimable(self.work, table, valid)
        if left:
            release.release_slice(self.work, left)
            return True
        self.controls.catch_up(commit_place=True)
        self.counters.copied_bytes += reclaim.reclaim(
            self.work, info, table, valid, self.applier.applied
        )
        self.counters.reclaimed_segments += 1
        self.history.refresh()
        return True

    def _settle(self) -> bool:
        """Whether nothing that was begun is unfinished; the condition of reclaim and release."""
        self.applier.finish()
        return self.applier.settled

    # --------------------------------------------------------------------------------- commands
    def drain_step(self, target: int, now: int) -> bool:
        """Apply towards ``target``; whether it is reached, synced."""
        if self.applier.applied >= target:
            return True
        self.step(now, urgent=True)
        return self.applier.applied >= target

    def release_pending(self) -> int:
        """Blocks still to be released."""
        return len(release.pending(self.work))

    def release_step(self) -> int:
        """Release a slice of all masked blocks; how many were done.

        :raises Conflict: not everything is applied.
        """
        if not self._settle():
            raise Conflict("not everything is applied yet: drain the disk first")
        return release.release_slice(self.work, release.pending(self.work))

    def forget_history(self) -> None:
        """Give up every point before the end of the last gap, or before now if there is none that
        was not given up for before: somebody else wrote to the backing.

        What the logs say of the time before is void, and what is not applied of it never will be:
        the backing as it is counts.
        """
        self.controls.catch_up(commit_place=True)
        catalog = self.catalog
        with self.policy_lock:
            ends = [gap.end for gap in catalog.gaps() if gap.end is not None]
            upto = max(ends, default=0)
            if upto <= catalog.voided:
                upto = self.frontier.durable
            kept: list[Bookmark | Thinned | Pin] = [
                *catalog.bookmarks().values(), *catalog.thinned(), *catalog.pins().values(),
            ]  # fmt: skip
            there = {info.segment for info in self.history.refresh().undo_infos.values()}
            catalog.commit(
                *(drop(each) for each in kept if each.seq < upto),
                *((("undo", str(segment)), None) for segment in catalog.undo().keys() - there),
                ("window_start", max(upto, catalog.window_start)),
                ("voided", upto),
            )  # fmt: skip
            self.frontier.window_start = catalog.window_start
        self.frontier.curator_generation += 1
        self.applier.skip(upto)
        self.work.blocks.forget(self.work.backing.size())
        load_blocks(self.work, self.applier.applied)
        self.history.refresh()

    def close(self) -> None:
        """The end of a clean stop: everything is applied; logs are sealed, the catalog says so.

        ! Not if a sync of the backing failed and not all of it is written again: what is read here
        may be gone with the page cache, and would be taken for somebody else's write.
        """
        self.applier.finish()
        self.work.undo.close()
        self.controls.catch_up(commit_place=True)
        known = not self.applier.doubtful
        self.catalog.commit(
            *self.work.take_ends(),
            ("fingerprint", fingerprint.take(
                self.work.backing, identity=self.identity(), last_blocks=self.applier.last_blocks
            ) if known else None),
            ("clean", known),
        )  # fmt: skip
        self.catalog.close()
        for runs in (self.redo_runs, self.undo_runs):
            runs.close()


def _is_whole(table: Table) -> bool:
    return not bool((table.rows["kind"] == Kind.LOST).any())
