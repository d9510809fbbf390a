"""One run: written, looked up, and never believed when it is not what was written."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lmdb
import numpy as np
import pytest

from journal import run_format, run_writer
from journal.entries import EQUALS_MAX, Entries, concatenated, entries_of, merged
from journal.errors import UnknownVersion, Vanished
from journal.format import Kind, Log
from journal.run_format import (
    CHUNK_PAGES,
    INDEX,
    PAGE_BYTES,
    PAGE_ENTRIES,
    RUN_VERSION,
    IndexFailed,
    IndexFull,
    RunDamaged,
    run_name,
    run_number,
)
from journal.run_writer import RunWriter
from journal.runs import Run
from journal.storage import RealStorage
from tests.journal.index_model import (
    Record,
    check,
    edges,
    facts_of,
    is_sorted,
    table_of,
    triples,
    writes,
)

DISK = bytes(range(16))
LMDB_PAGE = 4096


class Place:
    """A journal's index directory."""

    def __init__(self, root: Path) -> None:
        (root / INDEX).mkdir()
        self.storage = RealStorage(root)
        self.directory = root / INDEX
        self.opened: list[Run] = []

    def writer(self, segments: Sequence[int], number: int = 1, **options) -> RunWriter:
        log, disk = options.pop("log", Log.REDO), options.pop("disk", DISK)
        entries_max = options.pop("entries_max", 100_000)
        return RunWriter(
            self.storage, self.directory, log=log, disk=disk, number=number,
            segments=segments, entries_max=entries_max, **options,
        )  # fmt: skip

    def write(self, *parts: Entries, segments: Sequence[int] = (1,), **options) -> str:
        writer = self.writer(segments, **options)
        for part in parts:
            writer.add(part)
        return writer.finish()

    def open(self, name: str, log: Log = Log.REDO, disk: bytes = DISK) -> Run:
        run = Run.open(self.storage, self.directory, name, log=log, disk=disk)
        self.opened.append(run)
        return run

    def files(self) -> list[str]:
        return sorted(os.listdir(self.directory))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for run in place.opened:
        run.close()


def everything(run: Run) -> Entries:
    return concatenated(list(run.slices()))


def some_table(count: int, seed: int = 1):
    """Random writes on a small disk, with a few ranges among them."""
    rng = np.random.default_rng(seed)
    table = writes(rng.integers(0, 700, count), first_seq=10)
    for at in range(0, count, 37):
        table.rows[at] = (int(rng.integers(0, 600)), 0, 40, Kind.TRIM, 0, 0, 0)
    return table


# ---------------------------------------------------------------------------------------- round
# trip
@pytest.mark.parametrize("count", [0, 1, 168, 169, 170, 338, 339, 1000])
def test_what_is_written_is_found(place: Place, count: int) -> None:
    table = writes(np.random.default_rng(count).integers(0, count + 1, count), first_seq=50)
    entries = entries_of(table)
    run = place.open(place.write(entries))
    assert (run.meta.entries, run.meta.pages) == (count, -(-count // PAGE_ENTRIES))
    assert run.meta.segments == {1: count}
    assert triples(everything(run)) == triples(entries)
    assert is_sorted(everything(run))
    blocks = range(min(count, 120) + 2)
    check(run, facts_of(table), list(blocks), [49, 50, 51, 50 + count // 2, 50 + count, 1 << 60])
    assert list(run.verify())[-1:] == [count] * (count > 0)


def test_all_levels(place: Place) -> None:
    table = some_table(900)
    run = place.open(place.write(entries_of(table)))
    assert sum(map(bool, run.meta.levels)) == 2
    check(run, facts_of(table), list(range(0, 750, 3)), [9, 10, 200, 500, 908, 909, 5000])
    large = table_of([Record(Kind.TRIM, 77, 3 << 18), Record(Kind.ZERO, 1 << 18, 600)])
    run = place.open(place.write(entries_of(large), number=2))
    assert all(run.meta.levels)
    facts = facts_of(large)
    check(run, facts, edges(facts), [0, 1, 2, 3])
    check(run, facts, edges(facts) * 4, [0, 1, 2, 3])


def test_slices_in_any_cut_give_the_same_file(place: Place, monkeypatch) -> None:
    monkeypatch.setattr(run_writer, "_FLUSH_ENTRIES", 400)
    entries = entries_of(some_table(3000))
    place.write(entries, number=1)
    whole = place.open(run_name(Log.REDO, 1))
    for size in (1, 100, 168, 169, 170, 500):
        parts = [entries[at : at + size] for at in range(0, len(entries), size)]
        run = place.open(place.write(*parts, number=2))
        assert triples(everything(run)) == triples(entries)
        assert run.meta.regions == whole.meta.regions
        assert list(run.verify())[-1] == len(entries)
        run.close()
        os.unlink(place.directory / run.name)


def test_one_block_with_more_versions_than_pages_hold(place: Place) -> None:
    table = writes(np.array([5] * 1200 + [4, 6] * 10), first_seq=1)
    run = place.open(place.write(entries_of(table)))
    check(run, facts_of(table), [3, 4, 5, 6, 7], [1, 168, 169, 170, 338, 339, 1200, 1220])
    blocks = [4, 5, 6] * 10
    check(run, facts_of(table), blocks, [1, 168, 169, 170, 338, 339, 1200, 1220])


def test_the_last_place_of_a_page_and_the_first_of_the_next(place: Place) -> None:
    table = writes(np.arange(0, 3 * PAGE_ENTRIES + 5).repeat(1), first_seq=1)
    run = place.open(place.write(entries_of(table)))
    blocks = [
        PAGE_ENTRIES - 1,
        PAGE_ENTRIES,
        PAGE_ENTRIES + 1,
        2 * PAGE_ENTRIES,
        3 * PAGE_ENTRIES + 4,
    ]
    check(run, facts_of(table), blocks, [1, PAGE_ENTRIES, PAGE_ENTRIES + 1, 600])
    check(run, facts_of(table), blocks * 5, [1, PAGE_ENTRIES, PAGE_ENTRIES + 1, 600])


def test_more_pages_than_are_loaded_at_a_time(place: Place) -> None:
    count = (CHUNK_PAGES * 2 + 3) * PAGE_ENTRIES + 1
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, count, count)
    entries = entries_of(writes(blocks))
    run = place.open(place.write(entries))
    wanted = np.unique(rng.integers(0, count, 9000).astype(np.uint64))
    for order in (wanted, rng.permutation(wanted)):
        for seq in (count // 2, rng.integers(1, count, len(order)).astype(np.uint64)):
            for name in ("newest_le", "smallest_gt"):
                found, expected = getattr(run, name)(order, seq), getattr(entries, name)(order, seq)
                assert (found[0] == expected[0]).all()
                assert (found[1] == expected[1]).all()
    assert len(everything(run)) == count


def test_equal_entries_of_different_segments_are_all_kept(place: Place) -> None:
    tables = [
        table_of([Record(Kind.IMAGE, 3, 1, 70), Record(Kind.IMAGE, 4, 1, 70)], segment=number)
        for number in range(1, EQUALS_MAX + 1)
    ]
    entries = merged([entries_of(table) for table in tables])
    numbers = range(1, EQUALS_MAX + 1)
    run = place.open(place.write(entries, segments=numbers, log=Log.UNDO), log=Log.UNDO)
    assert triples(everything(run)) == triples(entries)
    facts = [fact for table in tables for fact in facts_of(table)]
    check(run, facts, [2, 3, 4, 5], [69, 70, 71])


@pytest.mark.parametrize("seed", range(4))
def test_dead_segments_are_passed_over(place: Place, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = []
    for number in range(1, 9):
        ends = rng.integers(1, 60, 150).tolist()
        records = [Record(Kind.IMAGE, int(rng.integers(0, 12)), 1, end) for end in ends]
        records += [Record(Kind.IMAGE_ZERO, 3, 5, end) for end in ends[:5]]
        tables.append(table_of(records, segment=number))
    entries = merged([entries_of(table) for table in tables])
    run = place.open(place.write(entries, segments=range(1, 9), log=Log.UNDO), log=Log.UNDO)
    for dead in (set(), {1}, {2, 3, 8}, {1, 2, 3, 4, 5, 6, 7}, set(range(1, 9))):
        run.dead = frozenset(dead)
        living = [table for table in tables if table.segment not in dead]
        facts = [fact for table in living for fact in facts_of(table)]
        check(run, facts, list(range(14)), [1, 2, 17, 30, 58, 59, 60, 61])


def test_overlapping(place: Place) -> None:
    entries = entries_of(some_table(2000))
    run = place.open(place.write(entries))
    for first, end in ((0, 1), (100, 101), (5, 300), (690, 5000), (7, 7), (5000, 6000)):
        assert triples(run.overlapping(first, end)) == triples(entries.overlapping(first, end))


def test_metadata(place: Place) -> None:
    table = table_of(
        [Record(Kind.WRITE, 1 << 14, 1), Record(Kind.TRIM, 5 << 18, 1 << 18), Record(Kind.CLOCK, 0,
        0)], segment=4, first_seq=900,
    )  # fmt: skip
    name = place.write(entries_of(table), segments=[4, 9, 2], replaces=[11, 7], number=12)
    meta = place.open(name).meta
    assert meta.segments == {2: 0, 4: 2, 9: 0}
    assert meta.replaces == (7, 11)
    assert (meta.log, meta.disk, meta.number) == (Log.REDO, DISK, 12)
    assert (meta.first_seq, meta.last_seq) == (900, 901)
    assert meta.levels == (1, 0, 0, 1)
    assert set(meta.regions) == {1, 3 << 18 | 5 << 4}


def test_names() -> None:
    assert run_name(Log.UNDO, 7) == "undo-00000007.run"
    assert run_number(Log.UNDO, "undo-00000007.run") == 7
    assert run_number(Log.UNDO, "undo-123456789.run.tmp") == 123456789
    assert run_number(Log.REDO, "undo-00000007.run") is None
    assert run_number(Log.REDO, "redo-x.run") is run_number(Log.REDO, "lost+found") is None


def test_a_value_is_one_page_of_the_file(place: Place) -> None:
    """Or 169 entries of 24 bytes would take 8 KiB."""
    count = 300 * PAGE_ENTRIES
    name = place.write(entries_of(writes(np.arange(count))))
    size = (place.directory / name).stat().st_size
    assert size < 300 * LMDB_PAGE * 1.03 + 10 * LMDB_PAGE
    assert size / count < 25.5


def test_lmdb_itself_finds_no_fault(place: Place) -> None:
    name = place.write(entries_of(writes(np.arange(5000))))
    path = str(place.directory / name)
    env = lmdb.open(path, subdir=False, lock=False, readonly=True, lib_version=0, max_dbs=0)
    with env.begin() as transaction:
        assert transaction.stat()["entries"] == -(-5000 // PAGE_ENTRIES) + 1
    env.close()


def test_a_file_open_twice_in_one_process(place: Place) -> None:
    """LMDB refuses a second environment of one file, and a viewer beside a curator needs one."""
    name = place.write(entries_of(writes(np.arange(500))))
    first, second = place.open(name), place.open(name)
    first.close()
    first.close()
    assert second.newest_le_one(499, 1000)[0] == 500
    third = place.open(name)
    second.close()
    assert third.newest_le_one(0, 1000)[0] == 1


def test_a_run_unlinked_while_open_is_still_read(place: Place) -> None:
    run = place.open(place.write(entries_of(writes(np.arange(5000)))))
    os.unlink(place.directory / run.name)
    assert run.newest_le_one(4999, 1 << 40)[0] == 5000
    assert len(everything(run)) == 5000
    with pytest.raises(Vanished):
        place.open(run.name)


def test_an_iterator_over_a_closed_run_says_so(place: Place) -> None:
    count = (CHUNK_PAGES + 1) * PAGE_ENTRIES
    run = place.open(place.write(entries_of(writes(np.arange(count)))))
    slices = run.slices()
    next(slices)
    run.close()
    with pytest.raises(Vanished):
        next(slices)


# ------------------------------------------------------------------------------- writing that fails
def test_abandoned(place: Place) -> None:
    writer = place.writer([1])
    writer.add(entries_of(writes(np.arange(500))))
    assert place.files() == ["redo-00000001.run.tmp"]
    writer.abandon()
    writer.abandon()
    assert place.files() == []


def test_a_full_map_leaves_nothing(place: Place, monkeypatch) -> None:
    monkeypatch.setattr(run_writer, "_map_size", lambda entries: 1 << 20)
    writer = place.writer([1])
    with pytest.raises(IndexFull, match="redo-00000001"):
        for part in range(9):
            writer.add(entries_of(writes(np.arange(20_000) + 20_000 * part)))
    assert place.files() == []


def test_a_full_file_system_is_told_from_a_broken_one(place: Place) -> None:
    """LMDB says EIO for both."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    entries = entries_of(writes(np.arange(200_000)))
    writer = place.writer([1], entries_max=200_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(IndexFull):
            writer.add(entries)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert place.files() == []


@pytest.mark.parametrize("call", ["sync", "write"])
@pytest.mark.parametrize(("code", "error"), [(errno.EIO, IndexFailed), (errno.ENOSPC, IndexFull)])
def test_a_failing_call_leaves_nothing(place: Place, call: str, code: int, error: type) -> None:
    writer = place.writer([1])
    writer.add(entries_of(writes(np.arange(500))))

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    setattr(writer._file, call, fail)
    with pytest.raises(IndexFailed) as caught:
        writer.finish()
    assert type(caught.value) is error
    assert place.files() == []


def test_nothing_has_the_name_before_it_is_synced(place: Place) -> None:
    writer = place.writer([1])
    writer.add(entries_of(writes(np.arange(500))))
    seen: list[list[str]] = []
    assert writer._file is not None
    real = writer._file.sync

    def sync() -> None:
        seen.append(place.files())
        real()

    setattr(writer._file, "sync", sync)  # noqa: B010 - a method, which mypy would not let us assign
    writer.finish()
    assert seen == [["redo-00000001.run.tmp"]]
    assert place.files() == ["redo-00000001.run"]


# -------------------------------------------------------------------------------------- damaged
# files
BLOCKS = np.arange(0, 710, dtype=np.uint64)
# Every way to read a run checks for itself what it reads.
WAYS: dict[str, Callable[[Run], object]] = {
    "newest one": lambda run: [run.newest_le_one(block, 700) for block in range(0, 710, 5)],
    "smallest one": lambda run: [run.smallest_gt_one(block, 300) for block in range(0, 710, 5)],
    "newest": lambda run: list(map(bytes, run.newest_le(BLOCKS, 700))),
    "smallest": lambda run: list(map(bytes, run.smallest_gt(BLOCKS, 300))),
    "slices": lambda run: triples(everything(run)),
    "metadata": lambda run: run.meta,
}


def put(place: Place, name: str, data: bytes) -> None:
    """Give the file this content, as a new file: the old one may still be open."""
    copy = place.directory / "copy"
    copy.write_bytes(data)
    os.replace(copy, place.directory / name)


def answers(place: Place, name: str, data: bytes) -> dict[str, object]:
    """What each way to read says of a file with this content; None if it finds damage."""
    put(place, name, data)
    try:
        run = Run.open(place.storage, place.directory, name, log=Log.REDO, disk=DISK)
    except RunDamaged:
        return dict.fromkeys(WAYS)
    found: dict[str, object] = {}
    try:
        for way, read in WAYS.items():
            try:
                found[way] = read(run)
            except RunDamaged:
                found[way] = None
    finally:
        run.close()
    return found


def believed(found: dict[str, object], truth: dict[str, object]) -> list[str]:
    """The ways that answered; each must have told the truth."""
    ways = [way for way, answer in found.items() if answer is not None]
    for way in ways:
        assert found[way] == truth[way], f"damage changed the answers of {way}"
    return ways


def test_damage_anywhere_is_found_or_harmless(place: Place, seed: int) -> None:
    name = place.write(entries_of(some_table(900)))
    good = (place.directory / name).read_bytes()
    truth = answers(place, name, good)
    rng = np.random.default_rng(seed)
    found = 0
    for start in range(0, len(good), 128):
        data = bytearray(good)
        at = start + int(rng.integers(0, min(128, len(good) - start)))
        data[at] ^= 1 << int(rng.integers(0, 8))
        found += len(believed(answers(place, name, bytes(data)), truth)) < len(WAYS)
    # What is not found lies in a page's unused rest or in the header of an overflow page.
    assert found > len(good) / 128 * 0.7


def pages_of(data: bytes) -> tuple[list[int], list[int]]:
    """Offsets of the data pages and of LMDB's own."""
    inner: list[int] = []
    pages: list[int] = []
    for at in range(0, len(data) // LMDB_PAGE * LMDB_PAGE, LMDB_PAGE):
        is_data = struct.unpack_from("<QHHI", data, at) == (at // LMDB_PAGE, 0, 4, 1)
        (pages if is_data else inner).append(at)
    return pages[:-1], inner  # the last one is the metadata


def test_any_damage_of_lmdbs_own_pages_is_found_before_it_sees_them(
    place: Place, seed: int
) -> None:
    """A flipped bit in a branch page made it abort the process, or read outside the map."""
    name = place.write(entries_of(some_table(30_000)))
    good = (place.directory / name).read_bytes()
    _, inner = pages_of(good)
    assert len(inner) >= 5  # two headers, a branch, two leaves
    rng = np.random.default_rng(seed)
    for page in inner:
        for start in range(page, page + LMDB_PAGE, 256):
            data = bytearray(good)
            data[start + int(rng.integers(0, 256))] ^= 1 << int(rng.integers(0, 8))
            put(place, name, bytes(data))
            with pytest.raises(RunDamaged, match="inner page"):
                place.open(name)


def test_pages_lost_swapped_or_of_another_run(place: Place) -> None:
    name = place.write(entries_of(some_table(900)))
    other = place.write(entries_of(some_table(900, seed=2)), number=2)
    good = (place.directory / name).read_bytes()
    foreign = (place.directory / other).read_bytes()
    truth = answers(place, name, good)
    for start in range(0, len(good) - LMDB_PAGE, LMDB_PAGE):
        end = start + LMDB_PAGE
        for other_page in (bytes(LMDB_PAGE), foreign[start:end], good[end : end + LMDB_PAGE]):
            data = good[:start] + other_page.ljust(LMDB_PAGE, b"\0") + good[end:]
            believed(answers(place, name, data), truth)


def test_data_pages_swapped_or_foreign_are_found(place: Place) -> None:
    """Whole and of the right size, but in another's place."""
    name = place.write(entries_of(some_table(900)))
    other = place.write(entries_of(some_table(900)), number=2)
    good = (place.directory / name).read_bytes()
    foreign = (place.directory / other).read_bytes()
    truth = answers(place, name, good)
    pages, _ = pages_of(good)
    assert len(pages) >= 4
    for one, two in itertools.pairwise(pages):
        swapped = bytearray(good)
        swapped[one + 16 : one + LMDB_PAGE] = good[two + 16 : two + LMDB_PAGE]
        swapped[two + 16 : two + LMDB_PAGE] = good[one + 16 : one + LMDB_PAGE]
        assert believed(answers(place, name, bytes(swapped)), truth) == ["metadata"]
        # The same entries under another number: only the seed of the sum tells them apart.
        assert good[one + 16 : one + 4000] == foreign[one + 16 : one + 4000]
        mixed = good[:one] + foreign[one : one + LMDB_PAGE] + good[one + LMDB_PAGE :]
        assert believed(answers(place, name, mixed), truth) == ["metadata"]


def test_an_entry_hidden_between_two_pages_is_missed(place: Place) -> None:
    """A page may lie in its place and yet not say what is sought: the next one begins too early.

    Here LMDB's keys lead to the page before the right one, whose sum and first entry are as they
    should be; only "it ends before what is sought" tells.
    """
    count = 5 * PAGE_ENTRIES
    run = place.open(place.write(entries_of(writes(np.arange(count)))))
    cursor = run._cursor

    class Astray:
        """A cursor that goes one page too far back."""

        def set_range(self, key: bytes) -> bool:
            return cursor.set_range(key) and cursor.prev()

        def __getattr__(self, name: str) -> object:
            return getattr(cursor, name)

    setattr(run, "_cursor", Astray())  # noqa: B010 - of another type, which mypy would not allow
    with pytest.raises(RunDamaged, match="out of its place"):
        run.newest_le_one(3 * PAGE_ENTRIES + 5, 1 << 40)
    with pytest.raises(RunDamaged, match="out of its place"):
        run.smallest_gt_one(3 * PAGE_ENTRIES + 5, 0)


@pytest.mark.parametrize("keep", [0, 1, 39, 40, 4096, 8192, -1, -40, -4096])
def test_truncated(place: Place, keep: int) -> None:
    name = place.write(entries_of(some_table(900)))
    good = (place.directory / name).read_bytes()
    for data in (good[:keep], good + bytes(4096)):
        put(place, name, data)
        with pytest.raises(RunDamaged):
            place.open(name)


def test_of_another_disk_log_or_name(place: Place) -> None:
    name = place.write(entries_of(writes(np.arange(500))))
    with pytest.raises(RunDamaged, match="another"):
        place.open(name, disk=bytes(16))
    with pytest.raises(RunDamaged, match="another"):
        place.open(name, log=Log.UNDO)
    os.rename(place.directory / name, place.directory / run_name(Log.REDO, 2))
    with pytest.raises(RunDamaged, match="another"):
        place.open(run_name(Log.REDO, 2))


def test_of_a_newer_version(place: Place, monkeypatch) -> None:
    monkeypatch.setattr(run_format, "RUN_VERSION", RUN_VERSION + 1)
    name = place.write(entries_of(writes(np.arange(500))))
    monkeypatch.undo()
    with pytest.raises(UnknownVersion, match="version 2"):
        place.open(name)


def test_no_lmdb_file_at_all(place: Place) -> None:
    name = run_name(Log.REDO, 1)
    for data in (b"", b"hello", os.urandom(50_000), bytes(PAGE_BYTES * 10)):
        (place.directory / name).write_bytes(data)
        with pytest.raises(RunDamaged):
            place.open(name)
