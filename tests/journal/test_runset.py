"""All runs of a log together: lookups over them, and merging."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from journal.entries import Entries, concatenated, entries_of, merged, segments_of
from journal.format import Kind, Log
from journal.run_format import IndexFailed
from journal.run_writer import RunWriter
from journal.runset import TIER_RUNS
from journal.segment import Table
from tests.journal.index_model import (
    Index,
    Record,
    all_facts,
    check,
    contents,
    edges,
    entries_in,
    is_sorted,
    redo_tables,
    table_of,
    triples,
    undo_tables,
    writes,
)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index(tmp_path)
    yield index
    index.close()


@pytest.fixture
def undo_index(tmp_path: Path) -> Iterator[Index]:
    index = Index(tmp_path, Log.UNDO)
    yield index
    index.close()


# ---------------------------------------------------------------------------------------- lookups
def test_an_empty_index(index: Index) -> None:
    runs = index.open()
    assert runs.runs == []
    assert runs.covered == frozenset()
    assert runs.last_seq == 0
    assert not runs.merge()
    check(runs, [], [0, 1, 2], [0, 1])
    assert list(runs.versions_in(0, 100)) == []


def test_redo_lookups(index: Index) -> None:
    tables = redo_tables(5)
    runs = index.open()
    for table in tables:
        runs.add(table)
    assert runs.covered == {1, 2, 3, 4, 5}
    assert runs.last_seq == 250
    check(runs, all_facts(tables), list(range(65)), [0, 1, 50, 51, 125, 200, 201, 250, 251])
    check(runs, all_facts(tables), [3, 8, 39, 60], [1, 50, 51, 125, 250, 251])


def test_undo_lookups(undo_index: Index) -> None:
    tables = undo_tables(6)
    runs = undo_index.open()
    for table in tables:
        runs.add(table)
    check(runs, all_facts(tables), list(range(60)), [0, 1, 100, 150, 299, 300, 301])


@pytest.mark.parametrize("together", [True, False])
def test_entries_below_the_floor_are_not_found(index: Index, together: bool) -> None:
    tables = redo_tables(4)
    runs = index.open()
    if together:
        every = merged([entries_of(table) for table in tables])
        runs.add_entries([every], segments=range(1, 5), entries_max=len(every))
    else:
        for table in tables:
            runs.add(table)
    for first in (2, 3, 4):
        floor = 1 + 50 * (first - 1)
        runs.retain(range(first, 5), floor=floor)
        check(
            runs, all_facts(tables[first - 1 :]), list(range(65)), [1, 50, 51, 101, 151, 200, 300]
        )
        assert contents(runs) == entries_in(tables[first - 1 :])
        assert triples(runs.overlapping(0, 100)) == entries_in(tables[first - 1 :])


def test_entries_of_undo_segments_that_are_gone_are_not_found(undo_index: Index) -> None:
    tables = undo_tables(6)
    runs = undo_index.open()
    runs.add_entries(
        [merged([entries_of(t) for t in tables[:4]])], segments=range(1, 5), entries_max=1000
    )
    for table in tables[4:]:
        runs.add(table)
    for gone in ({1}, {2, 4, 6}, {1, 2, 3}):
        runs.retain({1, 2, 3, 4, 5, 6, 7} - gone)
        living = [table for table in tables if table.segment not in gone]
        check(runs, all_facts(living), list(range(60)), [1, 100, 200, 299, 301])
        assert contents(runs) == entries_in(living)
        assert triples(runs.overlapping(0, 100)) == entries_in(living)


def test_a_segment_newer_than_the_list_is_not_gone(undo_index: Index) -> None:
    """A reader lists the segments first; what appears meanwhile has higher numbers."""
    tables = undo_tables(4)
    writer = undo_index.open()
    for table in tables[:3]:
        writer.add(table)
    reader = undo_index.open(read_only=True)
    reader.retain([1, 2])
    assert contents(reader) == entries_in(tables[:3])
    writer.retain([1, 2])  # its list is of now
    assert contents(writer) == entries_in(tables[:2])
    writer.add(tables[3])  # after the list
    assert contents(writer) == entries_in([*tables[:2], tables[3]])


def test_a_log_without_segments(undo_index: Index) -> None:
    runs = undo_index.open()
    for table in undo_tables(3):
        runs.add(table)
    runs.retain([])
    assert contents(runs) == []
    assert runs.drop_dead() == 3
    assert undo_index.files() == []


def test_a_redo_segment_that_is_lost_keeps_its_entries(index: Index) -> None:
    """Its blocks must become errors: without the entries they would get older content."""
    tables = redo_tables(TIER_RUNS)
    runs = index.open()
    for table in tables:
        runs.add(table)
    runs.retain({1, 2, 3, 5, 6, 7, 8}, floor=1)
    assert runs.merge()
    assert contents(runs) == entries_in(tables)
    assert 4 in segments_of(concatenated(list(runs.versions_in(0, 1 << 60))).loc)


def test_versions_in_a_range_with_those_of_tables(index: Index) -> None:
    tables = redo_tables(5)
    runs = index.open()
    for table in tables[:4]:
        runs.add(table)
    slices = list(runs.versions_in(60, 220, extra=[entries_of(tables[4])]))
    together = concatenated(slices)
    assert is_sorted(together)
    every = merged([entries_of(table) for table in tables])
    assert triples(together) == triples(every.between(60, 220))


def test_overlapping(index: Index) -> None:
    tables = redo_tables(5)
    runs = index.open()
    for table in tables:
        runs.add(table)
    every = merged([entries_of(table) for table in tables])
    for first, end in ((0, 1), (5, 25), (39, 100), (10, 10)):
        found = runs.overlapping(first, end, first_seq=20, last_seq=180)
        assert triples(found) == triples(every.overlapping(first, end).between(20, 180))


def test_records_without_blocks_are_covered_too(index: Index) -> None:
    runs = index.open()
    runs.add(table_of([Record(Kind.BOOKMARK, 0, 0)] * 5, segment=1))
    runs.add(table_of([Record(Kind.WRITE, 3, 1)], segment=2, first_seq=6))
    runs.add(table_of([], segment=3, first_seq=7))
    assert runs.covered == {1, 2, 3}
    check(
        runs,
        all_facts([table_of([Record(Kind.WRITE, 3, 1)], first_seq=6, segment=2)]),
        [2, 3],
        [5, 6],
    )
    index.sets[0].close()
    assert index.open().covered == {1, 2, 3}


def test_void_refs_are_left_out(index: Index) -> None:
    runs = index.open()
    table = table_of([Record(Kind.WRITE, 3, 1), Record(Kind.REF, 3, 1, 1)])
    runs.add(table, valid=np.array([True, False]))
    assert runs.newest_le_one(3, 100)[0] == 1


# ---------------------------------------------------------------------------------------- merging
def test_eight_become_one(index: Index) -> None:
    tables = redo_tables(TIER_RUNS * TIER_RUNS)
    runs = index.open()
    most = 0
    for table in tables:
        runs.add(table)
        most = max(most, len(runs.runs))
        while runs.merge():
            pass
    assert most <= 2 * TIER_RUNS
    assert len(runs.runs) <= TIER_RUNS
    assert runs.covered == set(range(1, 65))
    assert len(index.files()) == len(runs.runs)
    assert contents(runs) == entries_in(tables)
    check(runs, all_facts(tables), [0, 3, 20, 39, 58], [1, 777, 1600, 3200, 5000])
    assert runs.verify() == []


def test_redo_runs_that_are_merged_are_neighbours(index: Index) -> None:
    sizes = [2000, 1500, 1000, 30_000, *[20] * 5, 40_000, *[20] * 9, 1000]
    first = 1
    runs = index.open()
    for number, size in enumerate(sizes):
        runs.add(writes(np.arange(size), segment=number + 1, first_seq=first))
        first += size
        while runs.merge():
            pass
        bounds = [(run.meta.first_seq, run.meta.last_seq) for run in runs.runs]
        assert bounds == sorted(bounds)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(bounds))
        covered = [segment for run in runs.runs for segment in sorted(run.meta.segments)]
        assert covered == list(range(1, number + 2))
    assert len(runs.runs) < len(sizes)


def test_undo_runs_are_merged_by_size(undo_index: Index) -> None:
    runs = undo_index.open()
    for number in range(2 * TIER_RUNS - 1):
        size = 9000 if number % 2 else 9
        records = np.zeros(size, np.int64)
        table = writes(records, segment=number + 1)
        table.rows["kind"], table.rows["arg"] = Kind.IMAGE, np.arange(1, size + 1)
        runs.add(table)
    due = runs.due()
    assert [run.meta.entries for run in due] == [9] * TIER_RUNS
    assert runs.merge()
    assert len(runs.runs) == TIER_RUNS


def test_any_sizes_are_bounded_in_number(index: Index, monkeypatch) -> None:
    """Sizes that never look similar must not pile up."""
    monkeypatch.setattr("journal.runset._SIMILAR", 0)
    monkeypatch.setattr("journal.runset._RUNS_MAX", 12)
    runs = index.open()
    for table in redo_tables(40, rows=8):
        runs.add(table)
        while runs.merge():
            pass
        assert len(runs.runs) <= 12
    assert contents(runs) == entries_in(redo_tables(40, rows=8))


def test_merges_drop_what_is_gone(index: Index) -> None:
    tables = redo_tables(TIER_RUNS)
    runs = index.open()
    for table in tables:
        runs.add(table)
    assert runs.merge()
    runs.retain(range(4, 9), floor=151)
    assert runs.due() == []
    runs.retain(range(6, 9), floor=251)
    assert runs.statistics().dead_entries > runs.statistics().entries / 2
    assert runs.merge()
    assert runs.covered == {6, 7, 8}
    assert runs.statistics().dead_entries == 0
    assert contents(runs) == entries_in(tables[5:])
    assert not runs.merge()


def test_merges_of_undo_runs_drop_what_is_gone_and_nothing_else(undo_index: Index) -> None:
    tables = undo_tables(TIER_RUNS + 2)
    # The same image in three segments: two copies must survive the third's end.
    for segment in (1, 2, 7):
        tables[segment - 1].rows[0] = (500, 250, 1, Kind.IMAGE, 0, 0, 0)
    runs = undo_index.open()
    for table in tables:
        runs.add(table)
    runs.retain({2, 3, 5, 6, 7, 8, 9, 10})
    assert runs.merge()
    assert len(runs.runs) == 1
    living = [table for table in tables if table.segment not in (1, 4)]
    assert contents(runs) == entries_in(living)
    assert runs.covered == {2, 3, 5, 6, 7, 8, 9, 10}
    copies = runs.overlapping(500, 501)
    assert sorted(segments_of(copies.loc).tolist()) == [2, 7]


def test_runs_of_nothing_but_gone_segments_are_dropped(index: Index) -> None:
    tables = redo_tables(3)
    runs = index.open()
    for table in tables:
        runs.add(table)
    runs.retain([3], floor=101)
    assert runs.covered == {3}
    assert runs.drop_dead() == 2
    assert index.files() == ["redo-00000003.run"]
    assert runs.drop_dead() == 0
    assert not runs.merge()
    assert contents(runs) == entries_in(tables[2:])


def test_a_merge_in_steps_can_be_given_up(index: Index) -> None:
    tables = redo_tables(TIER_RUNS)
    runs = index.open()
    for table in tables:
        runs.add(table)
    before = index.files()
    steps = runs.merge_steps(runs.due())
    assert next(steps) > 0
    runs.add(redo_tables(TIER_RUNS + 1)[-1])
    assert any(name.endswith(".tmp") for name in index.files())
    runs.refresh()  # does not take the unfinished file for a leftover
    assert any(name.endswith(".tmp") for name in index.files())
    steps.close()
    assert len(index.files()) == len(before) + 1
    assert contents(runs) == entries_in(redo_tables(TIER_RUNS + 1))
    assert runs.merge()


def test_runs_under_a_merge_are_not_dropped(undo_index: Index) -> None:
    tables = undo_tables(TIER_RUNS)
    runs = undo_index.open()
    for table in tables:
        runs.add(table)
    steps = runs.merge_steps(runs.due())
    next(steps)
    runs.retain([1, 2])
    runs.refresh()
    assert runs.drop_dead() == 0
    assert len(undo_index.files()) == TIER_RUNS + 1
    assert contents(runs) == entries_in(tables[:2])
    for _ in steps:
        pass
    assert undo_index.files() == ["undo-00000009.run"]
    assert contents(runs) == entries_in(tables[:2])
    assert runs.merge()
    assert runs.statistics().dead_entries == 0


def test_a_merge_that_fails_changes_nothing(index: Index, monkeypatch) -> None:
    tables = redo_tables(TIER_RUNS)
    runs = index.open()
    for table in tables:
        runs.add(table)
    before = index.files()

    def fail(self: RunWriter) -> str:
        raise IndexFailed("no")

    monkeypatch.setattr(RunWriter, "finish", fail)
    with pytest.raises(IndexFailed):
        runs.merge()
    monkeypatch.undo()
    assert index.files() == before
    assert contents(runs) == entries_in(tables)
    assert runs.merge()


def test_the_generation_rises_between_appearing_and_unlinking(index: Index) -> None:
    seen: list[list[str]] = []
    runs = index.open(appeared=lambda: seen.append(index.files()))
    for table in redo_tables(TIER_RUNS):
        runs.add(table)
    assert runs.merge()
    assert len(seen) == TIER_RUNS + 1
    assert seen[0] == ["redo-00000001.run"]
    assert len(seen[-1]) == TIER_RUNS + 1
    assert index.files() == ["redo-00000009.run"]


def test_statistics(index: Index) -> None:
    runs = index.open()
    for table in redo_tables(3):
        runs.add(table)
    statistics = runs.statistics()
    assert statistics.runs == statistics.segments == 3
    assert statistics.entries == len(entries_in(redo_tables(3)))
    assert statistics.bytes == sum(
        (index.directory / name).stat().st_size for name in index.files()
    )


# ------------------------------------------------------------------------- any history, any merging
redo_records = st.builds(
    Record,
    st.sampled_from([Kind.WRITE, Kind.ZERO, Kind.TRIM]),
    st.integers(0, 300),
    st.sampled_from([1, 1, 1, 17, 300]),
)
undo_records = st.builds(
    Record,
    st.sampled_from([Kind.IMAGE, Kind.IMAGE_ZERO]),
    st.integers(0, 300),
    st.sampled_from([1, 1, 1, 17, 300]),
    st.integers(1, 60),
)


@settings(max_examples=20)
@given(
    log=st.sampled_from([Log.REDO, Log.UNDO]),
    lists=st.lists(st.integers(0, 2**32), min_size=1, max_size=2 * TIER_RUNS),
    data=st.data(),
)
def test_any_history(log: Log, lists: list[int], data: st.DataObject) -> None:
    records = redo_records if log == Log.REDO else undo_records
    tables: list[Table] = []
    first_seq = 1
    for number in range(len(lists)):
        rows = data.draw(st.lists(records, max_size=12))
        tables.append(table_of(rows, segment=number + 1, first_seq=first_seq))
        first_seq += len(rows)
    with tempfile.TemporaryDirectory() as root:
        index = Index(Path(root), log)
        runs = index.open()
        for table in tables:
            runs.add(table)
            if data.draw(st.booleans()):
                runs.merge()
        if log == Log.REDO:
            first = data.draw(st.integers(1, len(tables)))
            living = tables[first - 1 :]
            runs.retain(range(first, len(tables) + 1), floor=living[0].first_seq)
        else:
            kept = data.draw(st.sets(st.integers(1, len(tables)))) | {len(tables)}
            living = [table for table in tables if table.segment in kept]
            runs.retain(kept)
        for _ in range(3):
            facts = all_facts(living)
            chosen = edges(facts)[::7]
            check(runs, facts, chosen, [1, 5, 30, 60, first_seq])
            assert contents(runs) == entries_in(living)
            if not runs.merge():
                break
        assert runs.verify() == []
        index.close()


def test_a_part_of_entries_is_entries() -> None:
    entries = entries_of(redo_tables(1)[0])
    assert isinstance(entries[3:9], Entries)
