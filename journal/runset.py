"""All runs of one log of a disk: which there are, lookups, adding, merging, throwing away.

**Which runs count.** A run counts when its file has its name and is whole. A merge makes its new
run valid by a rename and unlinks the old ones afterwards; if a crash comes between the two (or
brings an unlinked name back), both are there, and the old one is *superseded*: the new one names
it, or covers all of its segments that still exist. A superseded run is left alone by readers and
removed by the writer. Everything a run says is a fact of the log: one too many is never wrong, only
slow.

**What is covered.** ``covered`` are the segments whose entries are in runs; the tables of all
others are for the caller to look at. A run that turns out to be damaged is thrown away at once and
`RunDamaged` raised: the caller looks at ``covered`` again, and the writer adds the missing tables
anew.

**Tiers.** Eight runs of similar size become one, so an entry is written again once per factor of
eight. Runs of the redo log that are merged are neighbours: their seqs stay disjoint, and a search
for the newest version stops at the first run with a hit. The undo log is in no order: its lookups
ask every run.

**Segments that are gone.** Of the redo log those below the first that is listed; their entries are
below ``floor`` and are not found. One missing further up is lost, not gone, and its entries stay.
Of the undo log those not listed; their entries are passed over. Merges leave out both.

A `RunSet` is for one thread at a time; an iterator over runs that `refresh` or a merge has closed
raises `Vanished`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from journal.entries import (
    SEQ_MAX,
    Column,
    Entries,
    Seqs,
    at_most,
    entries_of,
    is_member,
    merged,
    merged_slices,
    segments_of,
    without_surplus,
)
from journal.errors import UnknownVersion, Vanished
from journal.format import Log
from journal.run_format import INDEX, TEMPORARY, RunDamaged, run_name, run_number
from journal.run_writer import RunWriter
from journal.runs import Run
from journal.segment import Table
from journal.storage import Storage

TIER_RUNS: Final = 8  # so many of similar size become one
_SIMILAR: Final = 4  # the largest is at most so many times the second smallest
_RUNS_MAX: Final = 40  # with more than that the most similar ones are merged, similar or not


@dataclasses.dataclass(frozen=True, slots=True)
class RunSetStatistics:
    """A set of runs in numbers."""

    runs: int
    entries: int
    dead_entries: int
    bytes: int
    segments: int


class RunSet:
    """The runs of one log.

    ``directory``: where the storage's directory ``index`` lies (LMDB opens files by itself).
    ``read_only``: nothing is written, renamed or removed. ``appeared`` is called after a new run
    has its name and before those it replaces are unlinked: the frontier's generation rises there.
    """

    def __init__(
        self,
        storage: Storage,
        directory: Path,
        *,
        log: Log,
        disk: bytes,
        read_only: bool,
        appeared: Callable[[], None] = lambda: None,
    ) -> None:
        self._storage, self._directory = storage, directory
        self._log, self._disk, self._read_only = log, disk, read_only
        self._appeared = appeared
        self._opened: dict[str, Run] = {}
        self._writing: set[str] = set()
        self._number = 0
        self._disjoint = True
        self._listed: frozenset[int] | None = None  # not known
        self._upto = 0
        self._merging: set[str] = set()
        self.floor = 0
        self.runs: list[Run] = []
        self.covered: frozenset[int] = frozenset()
        self.problems: dict[str, RunDamaged | UnknownVersion] = {}
        self._bad: dict[str, tuple[int, int]] = {}

    # -------------------------------------------------------------------------------- what there is
    def refresh(self) -> None:
        """Take in what the directory holds now: open new runs, close those that are gone.

        The writer also removes what is damaged, superseded or half written. What could not be used
        is in ``problems`` by name, until the next refresh.

        :raises Vanished: a file was there and then was not; list again.
        """
        self.problems.clear()
        present = set()
        for name in self._storage.list(INDEX):
            number = run_number(self._log, name)
            if number is None:
                continue
            self._number = max(self._number, number)
            if name.endswith(TEMPORARY):
                if not self._read_only and name not in self._writing:
                    self._unlink(name)
            else:
                present.add(name)
        for name in self._opened.keys() - present:
            self._opened.pop(name).close()
        for name in sorted(present):
            self._take_in(name)
        self._arrange()
        if not self._read_only:
            self._remove(run for run in self._opened.values() if run not in self.runs)

    def _take_in(self, name: str) -> None:
        try:
            status = os.stat(self._directory / name)
        except FileNotFoundError:
            self._arrange()
            raise Vanished(f"{INDEX}/{name} is gone: take a new snapshot") from None
        identity = (status.st_dev, status.st_ino)
        known = self._opened.get(name)
        if known is not None and known.identity == identity:
            return
        if known is not None:  # a new file of an old name
            self._opened.pop(name).close()
        if self._bad.get(name) == identity:
            return
        try:
            self._opened[name] = Run.open(
                self._storage, self._directory, name, log=self._log, disk=self._disk
            )
        except Vanished:
            self._arrange()
            raise
        except UnknownVersion as error:  # a newer program's: it may come back for it
            self.problems[name] = error
        except RunDamaged as error:
            self._note_damage(name, identity, error)

    def _note_damage(self, name: str, identity: tuple[int, int], error: RunDamaged) -> None:
        self.problems[name] = error
        if self._read_only:
            self._bad[name] = identity
        else:
            self._unlink(name)

    def _arrange(self) -> None:
        """Which of the open runs count, in which order, and what they cover."""
        runs = list(self._opened.values())
        replaced = {run_name(self._log, n) for run in runs for n in run.meta.replaces}
        runs = [run for run in runs if run.name not in replaced]
        living = {run.name: self._living(run) for run in runs}
        # The larger of two that cover the same, or the later one, supersedes the other.
        runs.sort(key=lambda run: (len(living[run.name]), run.meta.number), reverse=True)
        kept: list[Run] = []
        for run in runs:
            own = living[run.name]
            if own and not any(own <= living[other.name] for other in kept):
                kept.append(run)
        kept.sort(key=lambda run: (min(run.meta.segments), run.meta.number))
        self.runs = kept
        self.covered = frozenset().union(*(run.meta.segments for run in kept))
        bounds = [(run.meta.first_seq, run.meta.last_seq) for run in kept if run.meta.entries]
        self._disjoint = self._log == Log.REDO and all(
            before[1] < after[0] for before, after in itertools.pairwise(bounds)
        )
        for run in kept:
            if self._log == Log.UNDO:
                run.dead = frozenset(run.meta.segments) - living[run.name]

    def _living(self, run: Run) -> frozenset[int]:
        segments = frozenset(run.meta.segments)
        listed, upto = self._listed, self._upto
        if listed is None:
            return segments
        if self._log == Log.REDO:
            first = min(listed, default=0)
            return frozenset(number for number in segments if number >= first)
        return frozenset(number for number in segments if number in listed or number > upto)

    def retain(self, segments: Iterable[int], *, floor: int = 0) -> None:
        """Say which segments of the log there are, and where the redo log begins.

        **Of the undo log name all that the catalog lists**, not those that could be read: entries
        of a lost segment must lead to an error, without them a block would get other content.

        A reader's list may be older than the runs: for it a segment above the highest listed is
        not gone but new. The writer's is not older than the runs it has at this moment.
        """
        self._listed = frozenset(segments)
        self._upto = max(self._listed, default=0)
        if not self._read_only:
            known = (number for run in self._opened.values() for number in run.meta.segments)
            self._upto = max(self._upto, max(known, default=0))
        self.floor = floor
        self._arrange()

    @property
    def last_seq(self) -> int:
        """The highest seq (or end) in any run: in the redo log it has been durable."""
        return max((run.meta.last_seq for run in self.runs), default=0)

    def statistics(self) -> RunSetStatistics:
        """The set in numbers."""
        return RunSetStatistics(
            runs=len(self.runs),
            entries=sum(run.meta.entries for run in self.runs),
            dead_entries=sum(map(self._dead_entries, self.runs)),
            bytes=sum(run.size for run in self.runs),
            segments=len(self.covered),
        )

    def _dead_entries(self, run: Run) -> int:
        living = self._living(run)
        return sum(count for number, count in run.meta.segments.items() if number not in living)

    def close(self) -> None:
        """Close all runs; may be repeated."""
        for run in self._opened.values():
            run.close()
        self._opened.clear()
        self.runs, self.covered = [], frozenset()

    # ------------------------------------------------------------------------------------- lookups
    def newest_le(self, blocks: Column, seq: Seqs) -> tuple[Column, Column]:
        """For each block its newest version (largest end) <= ``seq``: seqs and locs, 0 for none."""
        seqs, locs = np.zeros(len(blocks), np.uint64), np.zeros(len(blocks), np.uint64)
        limit = _highest(seq)
        open_ones = np.arange(len(blocks))
        for run in reversed(self.runs):
            if not run.meta.entries or run.meta.first_seq > limit or run.meta.last_seq < self.floor:
                continue
            if not len(open_ones):
                break
            with self._watching(run):
                found, at = run.newest_le(blocks[open_ones], _part(seq, open_ones))
            better = found > seqs[open_ones]
            seqs[open_ones[better]], locs[open_ones[better]] = found[better], at[better]
            if self._disjoint:
                open_ones = open_ones[found == 0]
        below = seqs < self.floor
        seqs[below], locs[below] = 0, 0
        return seqs, locs

    def smallest_gt(self, blocks: Column, seq: Seqs) -> tuple[Column, Column]:
        """For each block its smallest seq (or end) > ``seq``: seqs and locs, 0 for none."""
        seqs = np.full(len(blocks), SEQ_MAX, np.uint64)
        locs = np.zeros(len(blocks), np.uint64)
        if self.floor:
            seq = (
                max(seq, self.floor - 1) if isinstance(seq, int) else _at_least(seq, self.floor - 1)
            )
        limit = _lowest(seq)
        open_ones = np.arange(len(blocks))
        for run in self.runs:
            if not run.meta.entries or run.meta.last_seq <= limit:
                continue
            if not len(open_ones):
                break
            with self._watching(run):
                found, at = run.smallest_gt(blocks[open_ones], _part(seq, open_ones))
            better = (found != 0) & (found < seqs[open_ones])
            seqs[open_ones[better]], locs[open_ones[better]] = found[better], at[better]
            if self._disjoint:
                open_ones = open_ones[found == 0]
        seqs[seqs == SEQ_MAX] = 0
        return seqs, locs

    def newest_le_one(self, block: int, seq: int) -> tuple[int, int]:
        """`newest_le` of one block: (seq, loc), (0, 0) for none."""
        best = (0, 0)
        for run in reversed(self.runs):
            if run.meta.first_seq > seq or not run.meta.entries:
                continue
            try:
                best = max(best, run.newest_le_one(block, seq))
            except RunDamaged as error:
                self.throw_away(run, error)
                raise
            if best[0] and self._disjoint:
                break
        return best if best[0] >= self.floor else (0, 0)

    def smallest_gt_one(self, block: int, seq: int) -> tuple[int, int]:
        """`smallest_gt` of one block: (seq, loc), (0, 0) for none."""
        best = (0, 0)
        seq = max(seq, self.floor - 1)
        for run in self.runs:
            if run.meta.last_seq <= seq:
                continue
            try:
                found = run.smallest_gt_one(block, seq)
            except RunDamaged as error:
                self.throw_away(run, error)
                raise
            if found[0] and (not best[0] or found < best):
                best = found
            if best[0] and self._disjoint:
                break
        return best

    def oldest(self, blocks: Column) -> Column:
        """The seq of each block's oldest version (the save rule's o)."""
        return self.smallest_gt(blocks, 0)[0]

    def ends_le(self, blocks: Column, seqs: Seqs) -> Column:
        """Each block's largest end <= its seq (the save rule's p)."""
        return self.newest_le(blocks, seqs)[0]

    def successors(self, blocks: Column, seqs: Seqs, upto: int) -> tuple[Column, Column]:
        """Each block's next version after its seq, if that is <= ``upto``: seqs and locs."""
        return at_most(self.smallest_gt(blocks, seqs), upto)

    def versions_in(
        self, first_seq: int, last_seq: int, *, extra: Sequence[Entries] = ()
    ) -> Iterator[Entries]:
        """All entries with a seq (or end) in the range, sorted by key, in slices.

        ``extra`` are entries from elsewhere (tables not covered), filtered and merged in.
        """
        first_seq = max(first_seq, self.floor)
        sources = [
            self._source(run, first_seq, last_seq, run.dead)
            for run in self.runs
            if run.meta.entries
            and run.meta.first_seq <= last_seq
            and run.meta.last_seq >= first_seq
        ]
        sources += [iter([part.between(first_seq, last_seq)]) for part in extra]
        return merged_slices(sources)

    def overlapping(
        self, first_block: int, end_block: int, *, first_seq: int = 0, last_seq: int = SEQ_MAX
    ) -> Entries:
        """The entries with a block in [first_block, end_block) and a seq in the range."""
        first_seq = max(first_seq, self.floor)
        parts = []
        for run in self.runs:
            if (
                run.meta.entries
                and run.meta.first_seq <= last_seq
                and run.meta.last_seq >= first_seq
            ):
                with self._watching(run):
                    part = run.overlapping(first_block, end_block)
                parts.append(_without(part.between(first_seq, last_seq), run.dead))
        return merged(parts)

    def _source(
        self, run: Run, first_seq: int, last_seq: int, dead: frozenset[int]
    ) -> Iterator[Entries]:
        with self._watching(run):
            for part in run.slices():
                part = _without(part.between(first_seq, last_seq), dead)
                if len(part):
                    yield part

    # ------------------------------------------------------------------------- adding and merging
    def add(self, table: Table, *, valid: npt.NDArray[np.bool_] | None = None) -> Run:
        """Make a run of a sealed segment's table; see `entries_of` for ``valid``.

        :raises IndexFailed: (`IndexFull`) nothing has changed.
        """
        entries = entries_of(table, valid=valid)
        return self.add_entries([entries], segments=[table.segment], entries_max=len(entries))

    def add_entries(
        self, parts: Iterable[Entries], *, segments: Iterable[int], entries_max: int
    ) -> Run:
        """Make a run of ascending slices of entries that cover these segments.

        :raises IndexFailed: (`IndexFull`) nothing has changed.
        """
        assert not self._read_only
        writer = self._writer(segments, entries_max, ())
        with self._finishing(writer):
            for part in parts:
                writer.add(part)
        return self._adopt(writer.name, ())

    def due(self) -> list[Run]:
        """The runs that should become one now, in order; empty if all is well."""
        for run in self.runs:
            if self._dead_entries(run) * 2 > run.meta.entries:
                return [run]
        runs = self.runs
        if self._log == Log.UNDO:
            runs = sorted(runs, key=lambda run: run.meta.entries)
        windows = [runs[at : at + TIER_RUNS] for at in range(len(runs) - TIER_RUNS + 1)]
        similar = [window for window in windows if _are_similar(window)]
        if similar:
            return min(similar, key=_entries)
        if len(runs) > _RUNS_MAX:
            return min(windows, key=lambda window: _largest(window) / (_entries(window) + 1))
        return []

    def merge(self) -> bool:
        """Do one merge that is due, if there is one: whether there was. Drops dead runs."""
        self.drop_dead()
        runs = self.due()
        for _ in self.merge_steps(runs):
            pass
        return bool(runs)

    def merge_steps(self, runs: Sequence[Run]) -> Generator[int, None, None]:
        """Merge some runs of `due`, a slice per step; yields how many entries are done.

        Closing the generator before its end gives the merge up and leaves nothing behind.

        :raises IndexFailed: (`IndexFull`) nothing has changed.
        :raises RunDamaged: one of the runs has been thrown away.
        """
        assert not self._read_only
        if not runs:
            return
        living = frozenset().union(*map(self._living, runs))
        gone = frozenset().union(*(run.meta.segments for run in runs)) - living
        floor = self.floor
        sources = [self._source(run, floor, SEQ_MAX, gone) for run in runs]
        writer = self._writer(
            living, sum(map(_run_entries, runs)), [run.meta.number for run in runs]
        )
        done = 0
        names = {run.name for run in runs}
        self._merging |= names
        try:
            with self._finishing(writer):
                for part in merged_slices(sources):
                    writer.add(without_surplus(part))
                    done += len(part)
                    yield done
        finally:
            self._merging -= names
        self._adopt(writer.name, runs)

    def _writer(
        self, segments: Iterable[int], entries_max: int, replaces: Iterable[int]
    ) -> RunWriter:
        self._number += 1
        name = run_name(self._log, self._number) + TEMPORARY
        self._writing.add(name)
        try:
            return RunWriter(
                self._storage, self._directory, log=self._log, disk=self._disk,
                number=self._number, segments=segments, entries_max=entries_max, replaces=replaces,
            )  # fmt: skip
        except BaseException:
            self._writing.discard(name)
            raise

    @contextlib.contextmanager
    def _finishing(self, writer: RunWriter) -> Iterator[None]:
        """Finish the run after the block, or remove it."""
        try:
            yield
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
        finally:
            self._writing.discard(writer.name + TEMPORARY)

    def _adopt(self, name: str, replaced: Sequence[Run]) -> Run:
        """Count the new run and remove those it replaces, in this order."""
        run = Run.open(self._storage, self._directory, name, log=self._log, disk=self._disk)
        self._opened[name] = run
        self._arrange()
        self._appeared()
        self._remove(replaced)
        return run

    # -------------------------------------------------------------------------------- throwing away
    def drop_dead(self) -> int:
        """Remove the runs that cover no segment that still exists: how many there were."""
        dead = [run for run in self._opened.values() if not self._living(run)]
        return self._remove(dead)

    def throw_away(self, run: Run, error: RunDamaged) -> None:
        """A run has turned out to be damaged: it no longer counts; the writer removes it."""
        if self._opened.pop(run.name, None) is not None:
            run.close()
            self._note_damage(run.name, run.identity, error)
        self._arrange()

    def verify(self) -> list[RunDamaged]:
        """Check every page of every run, throw the damaged ones away: what was wrong with them."""
        found = []
        for run in list(self.runs):
            try:
                for _ in run.verify():
                    pass
            except RunDamaged as error:
                found.append(error)
                self.throw_away(run, error)
        return found

    @contextlib.contextmanager
    def _watching(self, run: Run) -> Iterator[None]:
        try:
            yield
        except RunDamaged as error:
            self.throw_away(run, error)
            raise

    def _remove(self, runs: Iterable[Run]) -> int:
        """Unlink and close runs that do not count, but not under a merge that reads them."""
        removed = 0
        for run in list(runs):
            if run.name not in self._merging and self._opened.pop(run.name, None) is not None:
                self._unlink(run.name)
                run.close()
                removed += 1
        self._arrange()
        return removed

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._storage.unlink(f"{INDEX}/{name}")


def _part(seq: Seqs, which: npt.NDArray[np.intp]) -> Seqs:
    return seq if isinstance(seq, int) else seq[which]


def _highest(seq: Seqs) -> int:
    return seq if isinstance(seq, int) else int(seq.max(initial=0))


def _lowest(seq: Seqs) -> int:
    return seq if isinstance(seq, int) else int(seq.min(initial=SEQ_MAX))


def _at_least(seqs: Column, least: int) -> Column:
    return np.maximum(seqs, np.uint64(least))


def _without(entries: Entries, dead: frozenset[int]) -> Entries:
    """The entries whose segment is not one of these."""
    if not dead or not len(entries):
        return entries
    return entries[~is_member(np.array(sorted(dead), np.uint64), segments_of(entries.loc))]


def _run_entries(run: Run) -> int:
    return run.meta.entries


def _entries(runs: Sequence[Run]) -> int:
    return sum(map(_run_entries, runs))


def _largest(runs: Sequence[Run]) -> int:
    return max(map(_run_entries, runs))


def _are_similar(runs: Sequence[Run]) -> bool:
    sizes = sorted(map(_run_entries, runs))
    return sizes[-1] <= _SIMILAR * (sizes[1] + 1024)
