"""A directory of runs after crashes, with damage, and as readers see it beside the writer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from journal import run_format
from journal.entries import entries_of, merged
from journal.errors import UnknownVersion, Vanished
from journal.format import Log
from journal.run_format import INDEX, RUN_VERSION, RunDamaged
from journal.runset import TIER_RUNS, RunSet
from journal.segment import Table
from journal.storage import RealStorage
from tests.journal.index_model import (
    Index,
    all_facts,
    check,
    contents,
    entries_in,
    redo_tables,
    undo_tables,
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


# --------------------------------------------------------------------------------- crash leftovers
def test_half_written_runs_are_removed_by_the_writer_only(index: Index) -> None:
    writer = index.open()
    writer.add(redo_tables(1)[0])
    (index.directory / "redo-00000002.run.tmp").write_bytes(b"half")
    (index.directory / "undo-00000002.run.tmp").write_bytes(b"of the other log")
    (index.directory / "README").write_bytes(b"of somebody")
    index.open(read_only=True)
    assert "redo-00000002.run.tmp" in index.files()
    writer.refresh()
    assert index.files() == ["README", "redo-00000001.run", "undo-00000002.run.tmp"]
    assert writer.add(redo_tables(2)[1]).name == "redo-00000003.run"


def merged_with_leftovers(index: Index, *names: str) -> list[Table]:
    """Eight runs merged, of which some came back in a crash."""
    tables = redo_tables(TIER_RUNS)
    runs = index.open()
    for table in tables:
        runs.add(table)
    copy = index.keep()
    assert runs.merge()
    runs.close()
    index.bring_back(copy, *names)
    return tables


def test_merged_runs_that_came_back_are_superseded(index: Index) -> None:
    names = ["redo-00000002.run", "redo-00000008.run"]
    tables = merged_with_leftovers(index, *names)
    reader = index.open(read_only=True)
    assert [run.name for run in reader.runs] == ["redo-00000009.run"]
    assert contents(reader) == entries_in(tables)
    assert index.files() == [*names, "redo-00000009.run"]
    writer = index.open()
    assert index.files() == ["redo-00000009.run"]
    assert contents(writer) == entries_in(tables)
    reader.refresh()
    assert contents(reader) == entries_in(tables)


def test_merged_runs_of_a_segment_that_is_gone_are_superseded_too(undo_index: Index) -> None:
    """The merge left it out, so it does not cover it: it names what it replaces."""
    tables = undo_tables(TIER_RUNS + 1)
    runs = undo_index.open()
    first = merged([entries_of(table) for table in tables[:2]])
    both = runs.add_entries([first], segments=[1, 2], entries_max=len(first))
    for table in tables[2:]:
        runs.add(table)
    copy = undo_index.keep()
    runs.retain(range(2, 10))
    assert runs.merge()
    runs.close()
    undo_index.bring_back(copy, both.name)
    reader = undo_index.open(read_only=True)
    assert reader.covered == set(range(2, 10))
    assert contents(reader) == entries_in(tables[1:])


def test_a_merge_whose_result_is_damaged_gives_way_to_what_came_back(index: Index) -> None:
    names = [f"redo-{number:08d}.run" for number in range(1, 6)]
    tables = merged_with_leftovers(index, *names)
    path = index.directory / "redo-00000009.run"
    path.write_bytes(path.read_bytes()[:-1])
    for runs in (index.open(read_only=True), index.open()):
        assert isinstance(runs.problems["redo-00000009.run"], RunDamaged)
        assert runs.covered == {1, 2, 3, 4, 5}
        assert contents(runs) == entries_in(tables[:5])
    assert index.files() == names


def test_an_old_run_that_came_back_after_its_segments_were_reclaimed(index: Index) -> None:
    tables = redo_tables(3)
    runs = index.open()
    runs.add_entries(
        [merged([entries_of(t) for t in tables[:2]])], segments=[1, 2], entries_max=200
    )
    copy = index.keep()
    runs.add_entries([entries_of(tables[1])], segments=[2], entries_max=100)
    runs.retain([2, 3], floor=51)
    runs.refresh()
    index.bring_back(copy, "redo-00000001.run")
    runs.refresh()
    assert [run.name for run in runs.runs] == ["redo-00000002.run"]
    assert contents(runs) == entries_in([tables[1]])


def test_the_same_segment_twice_counts_once(index: Index) -> None:
    table = redo_tables(1)[0]
    runs = index.open()
    runs.add(table)
    runs.add(table)
    assert len(runs.runs) == 1
    assert contents(runs) == entries_in([table])
    runs.refresh()
    assert index.files() == ["redo-00000002.run"]


def test_overlapping_runs_are_all_searched(index: Index) -> None:
    """Neither covers the other: both stay, and no search stops early."""
    tables = redo_tables(3)
    entries = [entries_of(table) for table in tables]
    runs = index.open()
    runs.add_entries([merged(entries[:2])], segments=[1, 2], entries_max=200)
    runs.add_entries([merged(entries[1:])], segments=[2, 3], entries_max=200)
    assert len(runs.runs) == 2
    check(runs, all_facts(tables), list(range(65)), [1, 50, 51, 100, 101, 149, 150, 151])


# ---------------------------------------------------------------------------------------- damage
def flip_in_page(path: Path, at: int) -> None:
    """Damage in a data page, which opening does not notice."""
    data = bytearray(path.read_bytes())
    pages = [
        start for start in range(0, len(data) - 4096, 4096)
        if data[start : start + 16] == (start // 4096).to_bytes(8, "little") + b"\0\0\4\0\1\0\0\0"
    ]  # fmt: skip
    data[pages[at] + 100] ^= 8
    path.write_bytes(data)


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize(
    "use",
    [
        lambda runs: runs.newest_le_one(3, 1000),
        lambda runs: runs.smallest_gt_one(3, 0),
        lambda runs: runs.newest_le(np.arange(40, dtype=np.uint64), 1000),
        lambda runs: runs.smallest_gt(np.arange(40, dtype=np.uint64), 0),
        lambda runs: list(runs.versions_in(0, 1000)),
        lambda runs: runs.overlapping(0, 40),
    ],
)
def test_a_damaged_run_is_thrown_away_and_made_anew(index: Index, read_only: bool, use) -> None:
    tables = redo_tables(3, rows=100)
    maker = index.open()
    for table in tables:
        maker.add(table)
    maker.close()
    for number in (1, 2, 3):
        flip_in_page(index.directory / f"redo-{number:08d}.run", 0)
    runs = index.open(read_only=read_only)
    assert runs.covered == {1, 2, 3}
    while runs.covered:
        with pytest.raises(RunDamaged):
            use(runs)
    assert set(runs.problems) == {f"redo-{number:08d}.run" for number in (1, 2, 3)}
    assert len(index.files()) == (3 if read_only else 0)
    if read_only:
        runs.refresh()
        assert runs.covered == frozenset()  # not opened again
        writer = index.open()
        with pytest.raises(RunDamaged):
            use(writer)
        writer.verify()
    else:
        writer = runs
    for table in tables:
        writer.add(table)
    runs.refresh()
    assert contents(runs) == entries_in(tables)


def test_a_merge_over_a_damaged_run(index: Index) -> None:
    tables = redo_tables(TIER_RUNS, rows=100)
    maker = index.open()
    for table in tables:
        maker.add(table)
    maker.close()
    flip_in_page(index.directory / "redo-00000003.run", 0)
    runs = index.open()
    with pytest.raises(RunDamaged, match="redo-00000003"):
        runs.merge()
    assert runs.covered == {1, 2, 4, 5, 6, 7, 8}
    assert len(index.files()) == TIER_RUNS - 1
    runs.add(tables[2])
    assert runs.merge()
    assert contents(runs) == entries_in(tables)


def test_verify_finds_what_no_lookup_met(index: Index) -> None:
    tables = redo_tables(2, rows=1000)
    runs = index.open()
    for table in tables:
        runs.add(table)
    runs.close()
    flip_in_page(index.directory / "redo-00000002.run", 3)
    runs = index.open()
    assert [error.file for error in runs.verify()] == ["index/redo-00000002.run"]
    assert runs.covered == {1}


def test_a_foreign_run_is_thrown_away(index: Index, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / INDEX).mkdir()
    other = RunSet(
        RealStorage(elsewhere), elsewhere / INDEX, log=Log.REDO, disk=bytes(16), read_only=False
    )
    other.add(redo_tables(1)[0])
    other.close()
    shutil.copy(elsewhere / INDEX / "redo-00000001.run", index.directory)
    reader = index.open(read_only=True)
    assert isinstance(reader.problems["redo-00000001.run"], RunDamaged)
    assert index.files() == ["redo-00000001.run"]
    index.open()
    assert index.files() == []


def test_a_run_of_a_newer_version_is_left_alone(index: Index, monkeypatch) -> None:
    table = redo_tables(1)[0]
    maker = index.open()
    monkeypatch.setattr(run_format, "RUN_VERSION", RUN_VERSION + 1)
    maker.add(table)
    maker.close()
    monkeypatch.undo()
    runs = index.open()
    assert isinstance(runs.problems["redo-00000001.run"], UnknownVersion)
    assert runs.covered == frozenset()
    runs.add(table)
    assert index.files() == ["redo-00000001.run", "redo-00000002.run"]
    assert contents(runs) == entries_in([table])


# ------------------------------------------------------------------------------------------ readers
def test_a_reader_follows_the_writer(index: Index) -> None:
    tables = redo_tables(TIER_RUNS)
    writer, reader = index.open(), index.open(read_only=True)
    for at, table in enumerate(tables):
        writer.add(table)
        reader.refresh()
        assert reader.covered == set(range(1, at + 2))
    old = [run.name for run in reader.runs]
    writer.merge()
    # Until it looks again it has the old ones, whose names are gone.
    assert [run.name for run in reader.runs] == old
    assert contents(reader) == entries_in(tables)
    reader.refresh()
    assert [run.name for run in reader.runs] == ["redo-00000009.run"]
    assert contents(reader) == entries_in(tables)


def test_a_file_that_vanishes_between_listing_and_opening(index: Index, monkeypatch) -> None:
    writer, reader = index.open(), index.open(read_only=True)
    for table in redo_tables(2):
        writer.add(table)
    real = index.storage.list

    def stale(directory: str) -> list[str]:
        return [*real(directory), "redo-00000003.run"]

    monkeypatch.setattr(index.storage, "list", stale)
    with pytest.raises(Vanished, match="redo-00000003"):
        reader.refresh()
    monkeypatch.undo()
    reader.refresh()
    assert reader.covered == {1, 2}


def test_a_file_replaced_under_its_name(index: Index) -> None:
    """Numbers start anew when the whole index was removed."""
    tables = redo_tables(2)
    writer, reader = index.open(), index.open(read_only=True)
    writer.add(tables[0])
    reader.refresh()
    writer.close()
    os.unlink(index.directory / "redo-00000001.run")
    writer = index.open()
    writer.add(tables[1])
    assert index.files() == ["redo-00000001.run"]
    reader.refresh()
    assert contents(reader) == entries_in([tables[1]])


def test_both_logs_in_one_directory(tmp_path: Path) -> None:
    redo, undo = Index(tmp_path), Index(tmp_path, Log.UNDO)
    redo_set, undo_set = redo.open(), undo.open()
    redo_set.add(redo_tables(1)[0])
    undo_set.add(undo_tables(1)[0])
    assert redo.files() == ["redo-00000001.run", "undo-00000001.run"]
    for runs in (redo.open(), undo.open()):
        assert runs.problems == {}
        assert runs.covered == {1}
    redo.close()
    undo.close()
