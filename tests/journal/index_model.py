"""The index in the most obvious way, a list of facts that is searched from end to end.

And what tests of runs share: tables to make them of, a directory to keep them in.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from journal.entries import Column, Entries, concatenated, entries_of, merged, unpack_loc
from journal.format import BATCH_DTYPE, ROW_DTYPE, VERSIONS, Kind, Log
from journal.run_format import INDEX
from journal.runset import RunSet
from journal.segment import Table
from journal.storage import RealStorage

DISK = bytes(range(16))


@dataclass(frozen=True)
class Record:
    """One row of a table; ``arg`` is the end of an image."""

    kind: Kind
    block: int
    nblocks: int
    arg: int = 0


@dataclass(frozen=True)
class Fact:
    """Blocks [block, end) have ``seq`` (a version's, or an image's end) at ``place``."""

    block: int
    end: int
    seq: int
    place: tuple[int, int, int]


def table_of(records: Sequence[Record], *, segment: int = 1, first_seq: int = 1) -> Table:
    """A table with these rows, as if read from a segment."""
    rows = np.zeros(len(records), ROW_DTYPE)
    for at, record in enumerate(records):
        rows[at] = (record.block, record.arg, record.nblocks, record.kind, 0, 0, 0)
    return Table(segment, first_seq, rows, np.zeros(0, "<u8"), np.zeros(0, BATCH_DTYPE))


def writes(blocks: np.ndarray, *, segment: int = 1, first_seq: int = 1) -> Table:
    """A table of one-block writes."""
    rows = np.zeros(len(blocks), ROW_DTYPE)
    rows["kind"], rows["block"], rows["nblocks"] = Kind.WRITE, blocks, 1
    return Table(segment, first_seq, rows, np.zeros(0, "<u8"), np.zeros(0, BATCH_DTYPE))


def facts_of(table: Table, valid: Sequence[bool] | None = None) -> list[Fact]:
    """What a table says."""
    facts = []
    for at, row in enumerate(table.rows):
        kind = int(row["kind"])
        seq = int(row["arg"]) if kind >= Kind.IMAGE else table.first_seq + at
        counts = kind in VERSIONS or kind >= Kind.IMAGE
        if counts and row["nblocks"] and (valid is None or valid[at]):
            first, end = int(row["block"]), int(row["block"]) + int(row["nblocks"])
            facts.append(Fact(first, end, seq, (kind, table.segment, at)))
    return facts


def newest_le(facts: list[Fact], block: int, seq: int) -> tuple[int, set[tuple[int, int, int]]]:
    """The largest seq <= ``seq`` of a block (0: none), and the places that have it."""
    found = [f for f in facts if f.block <= block < f.end and f.seq <= seq]
    best = max((f.seq for f in found), default=0)
    return best, {f.place for f in found if f.seq == best}


def smallest_gt(facts: list[Fact], block: int, seq: int) -> tuple[int, set[tuple[int, int, int]]]:
    """The smallest seq > ``seq`` of a block (0: none), and the places that have it."""
    found = [f for f in facts if f.block <= block < f.end and f.seq > seq]
    best = min((f.seq for f in found), default=0)
    return best, {f.place for f in found if f.seq == best}


def edges(facts: list[Fact]) -> list[int]:
    """The blocks around the ends of all facts, where mistakes would show."""
    found = {0}
    for fact in facts:
        middle = (fact.block + fact.end) // 2
        found |= {fact.block - 1, fact.block, fact.block + 1, middle, fact.end - 1, fact.end}
    return sorted(block for block in found if 0 <= block < 1 << 32)


def check(source, facts: list[Fact], blocks: Sequence[int], seqs: Sequence[int]) -> None:
    """All lookups of `Entries`, a `Run` or a `RunSet` say what the facts say."""
    column = np.array(blocks, np.uint64)
    for seq in seqs:
        for lookup, one, model in (
            (source.newest_le, source.newest_le_one, newest_le),
            (source.smallest_gt, source.smallest_gt_one, smallest_gt),
        ):
            wanted = [model(facts, block, seq) for block in blocks]
            agree(lookup(column, seq), wanted)
            agree(_columns([one(block, seq) for block in blocks]), wanted)
    mixed = np.array([seqs[at % len(seqs)] for at in range(len(blocks))], np.uint64)
    pairs = list(zip(blocks, mixed.tolist(), strict=True))
    agree(source.newest_le(column, mixed), [newest_le(facts, b, s) for b, s in pairs])
    agree(source.smallest_gt(column, mixed), [smallest_gt(facts, b, s) for b, s in pairs])
    assert source.ends_le(column, mixed).tolist() == [newest_le(facts, b, s)[0] for b, s in pairs]
    assert source.oldest(column).tolist() == [smallest_gt(facts, b, 0)[0] for b in blocks]
    upto = sorted(seqs)[len(seqs) // 2]
    found, locs = source.successors(column, mixed, upto)
    wanted = [smallest_gt(facts, b, s) for b, s in pairs]
    agree((found, locs), [(s, p) if s <= upto else (0, set()) for s, p in wanted])


def agree(
    found: tuple[Column, Column], wanted: list[tuple[int, set[tuple[int, int, int]]]]
) -> None:
    """Seqs are the wanted ones, and locs name a place that has it."""
    assert found[0].tolist() == [seq for seq, _ in wanted]
    for loc, (seq, places) in zip(found[1].tolist(), wanted, strict=True):
        assert (unpack_loc(loc) in places) if seq else loc == 0


def _columns(pairs: list[tuple[int, int]]) -> tuple[Column, Column]:
    columns = np.array(pairs, np.uint64).reshape(len(pairs), 2)
    return columns[:, 0], columns[:, 1]


def is_sorted(entries: Entries) -> bool:
    """By (key, seq)."""
    pairs = list(zip(entries.key.tolist(), entries.seq.tolist(), strict=True))
    return pairs == sorted(pairs)


def triples(entries: Entries) -> list[tuple[int, int, int]]:
    """(key, seq, loc) of all, in an order of their own."""
    return sorted(
        zip(entries.key.tolist(), entries.seq.tolist(), entries.loc.tolist(), strict=True)
    )


class Index:
    """An index directory and the sets of runs that a test opened on it."""

    def __init__(self, root: Path, log: Log = Log.REDO) -> None:
        (root / INDEX).mkdir(exist_ok=True)
        self.directory, self.log = root / INDEX, log
        self.storage = RealStorage(root)
        self.sets: list[RunSet] = []

    def open(self, *, read_only: bool = False, refresh: bool = True, **options) -> RunSet:
        runs = RunSet(
            self.storage, self.directory, log=self.log, disk=DISK, read_only=read_only, **options
        )
        self.sets.append(runs)
        if refresh:
            runs.refresh()
        return runs

    def close(self) -> None:
        for runs in self.sets:
            runs.close()

    def files(self) -> list[str]:
        return sorted(os.listdir(self.directory))

    def keep(self) -> Path:
        """A copy of all files as they are now, for a crash to bring back."""
        copy = Path(tempfile.mkdtemp(dir=self.directory.parent))
        shutil.copytree(self.directory, copy, dirs_exist_ok=True)
        return copy

    def bring_back(self, copy: Path, *names: str) -> None:
        for name in names:
            shutil.copy(copy / name, self.directory / name)


def redo_tables(count: int, rows: int = 50, blocks: int = 40, seed: int = 1) -> list[Table]:
    """Segments 1, 2, ... of a redo log."""
    rng = np.random.default_rng(seed)
    tables = []
    for number in range(count):
        table = writes(
            rng.integers(0, blocks, rows), segment=number + 1, first_seq=1 + number * rows
        )
        table.rows[7] = (int(rng.integers(0, blocks)), 0, 20, Kind.TRIM, 0, 0, 0)
        tables.append(table)
    return tables


def undo_tables(count: int, rows: int = 50, blocks: int = 40, seed: int = 1) -> list[Table]:
    """Segments 1, 2, ... of an undo log."""
    rng = np.random.default_rng(seed)
    return [
        table_of(
            [
                Record(Kind.IMAGE, int(rng.integers(0, blocks)), 1 + at % 17, end)
                for at, end in enumerate(rng.integers(1, 300, rows).tolist())
            ],
            segment=number + 1,
        )
        for number in range(count)
    ]


def all_facts(tables: list[Table]) -> list[Fact]:
    return [fact for table in tables for fact in facts_of(table)]


def contents(runs: RunSet) -> list[tuple[int, int, int]]:
    return triples(concatenated(list(runs.versions_in(0, (1 << 64) - 1))))


def entries_in(tables: list[Table]) -> list[tuple[int, int, int]]:
    return triples(merged([entries_of(table) for table in tables]))
