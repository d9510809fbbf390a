"""What two copies of a catalog tell together, whatever has happened to them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from journal import catalog_copies as module
from journal.catalog import Catalog
from journal.catalog_copies import COPIES, pack_entry
from journal.errors import Corruption, UnknownVersion
from journal.storage import RealStorage
from tests.journal.catalog_files import (
    DISK,
    SMALL,
    Faulty,
    FaultyFile,
    both,
    entries_of,
    filled,
    flip,
    open_it,
)


# ---------------------------------------------------------------------------------- damage, repair
@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("at", [0, 20, 56, 512, 570, 1024, 2560])
def test_one_copy_is_repaired_from_the_other(tmp_path: Path, copy: int, at: int) -> None:
    want = filled(tmp_path)
    flip(both(tmp_path)[copy], at)
    reader = open_it(tmp_path, read_only=True)
    assert reader.state() == want
    assert reader.damage == ()
    assert [note.split()[0] for note in reader.notes] == [COPIES[copy]]
    writer = open_it(tmp_path)
    assert (writer.state(), writer.damage) == (want, ())
    writer.close()
    both(tmp_path)[1 - copy].write_bytes(b"")
    assert open_it(tmp_path).state() == want


@pytest.mark.parametrize("copy", [0, 1])
def test_a_missing_copy_is_made_again(tmp_path: Path, copy: int) -> None:
    want = filled(tmp_path)
    both(tmp_path)[copy].unlink()
    known = open_it(tmp_path)
    assert (known.state(), known.found, known.damage) == (want, True, ())
    assert known.notes == (f"{COPIES[copy]} was missing",)
    known.close()
    both(tmp_path)[1 - copy].unlink()
    assert open_it(tmp_path).state() == want


def test_different_losses_of_both_are_made_good_from_each_other(tmp_path: Path) -> None:
    want = filled(tmp_path)
    first, second = both(tmp_path)
    flip(first, entries_of(first)[2])
    flip(first, entries_of(second)[5])
    flip(second, entries_of(second)[0])
    flip(second, entries_of(second)[3] if len(entries_of(second)) > 3 else 4 * 512 + 100)
    known = open_it(tmp_path)
    assert known.state() == want
    assert known.damage == ()
    assert len(known.notes) == 2


def test_a_commit_that_is_whole_in_neither_is_reported_and_never_forgotten(tmp_path: Path) -> None:
    """! Damage is no torn tail: what is left is used, and said to be what is left."""
    want = filled(tmp_path)
    at = entries_of(both(tmp_path)[0])[3]
    for path in both(tmp_path):
        flip(path, at + 60)
    reader = open_it(tmp_path, read_only=True)
    del want["verdicts"]["3"]
    assert reader.state() == want
    assert len(reader.damage) == 1
    assert "commits 3..3 are lost" in str(reader.damage[0])
    writer = open_it(tmp_path)
    assert str(writer.damage[0]) == str(reader.damage[0])
    writer.close()
    again = open_it(tmp_path)
    assert again.damage == ()
    assert [value["what"] for value in again.damaged().values()] == ["commits 3..3 are lost"]
    again.commit(("damaged", None))
    assert again.state() == want


def test_a_newest_commit_that_is_whole_in_neither_is_reported(tmp_path: Path) -> None:
    """! Copy 1 shows its beginning, so copy 0 had it synced: that is no torn tail."""
    filled(tmp_path)
    at = entries_of(both(tmp_path)[0])[5]
    for path in both(tmp_path):
        flip(path, at + 60)
    known = open_it(tmp_path)
    assert known.applied == 4
    assert ["what followed commit 4 is lost" in str(error) for error in known.damage] == [True]


@pytest.mark.parametrize("torn", [0, 1])
def test_a_torn_end_is_no_damage(tmp_path: Path, torn: int) -> None:
    filled(tmp_path)
    first, second = both(tmp_path)
    at = entries_of(first)[5]
    if torn == 0:  # in flight in copy 0, copy 1 not touched yet
        flip(first, at + 60)
        data = bytearray(second.read_bytes())
        data[at : at + 512] = bytes(512)
        second.write_bytes(data)
    else:  # in flight in copy 1
        flip(second, at + 60)
    known = open_it(tmp_path)
    assert known.damage == ()
    assert known.applied == 4 + torn


def test_without_a_whole_state_the_rest_is_reported(tmp_path: Path) -> None:
    filled(tmp_path)
    for path in both(tmp_path):
        flip(path, 56)
    known = open_it(tmp_path)
    assert known.found
    assert known.applied == 5
    assert ["no whole state" in str(error) for error in known.damage] == [True]


def test_both_copies_gone_is_found_out(tmp_path: Path) -> None:
    filled(tmp_path)
    for path in both(tmp_path):
        path.write_bytes(bytes(SMALL))
    known = open_it(tmp_path)
    assert known.found
    assert len(known.damage) == 1
    for path in both(tmp_path):
        path.unlink()
    assert not open_it(tmp_path, read_only=True).found


def replace_entry(where: Path, number: int, kind: int, value: object) -> None:
    for path in both(where):
        data = pack_entry(DISK, number, kind, value)
        path.write_bytes(data.ljust(SMALL, b"\0"))


@pytest.mark.parametrize(
    "state",
    [
        [],
        5,
        {"applied": "x"},
        {"applied": None},
        {"bookmarks": {"x": {"seq": 1}}},
        {"holes": {"x": 1}},
        {"gaps": []},
        {"undo": {"1": -5}},
        {"clock": {"5": 1 << 70}},
    ],
)
def test_a_state_that_makes_no_sense_is_reported_and_not_used(tmp_path: Path, state) -> None:
    """! Bytes from a disk are judged, never asserted, even under a right checksum."""
    replace_entry(tmp_path, 9, 2, state)
    known = open_it(tmp_path)
    assert [str(error).startswith("invalid state") for error in known.damage] == [True, True, False]
    assert set(known.state()) == {"damaged"}
    assert known.number == 9


@pytest.mark.parametrize(
    "body", [5, [5], [[["applied"]]], [["applied", 5]], [[["applied"], -1]], [[[], 1]], [[[5], 1]]]
)
def test_a_commit_that_makes_no_sense_is_reported(tmp_path: Path, body) -> None:
    for path in both(tmp_path):
        data = pack_entry(DISK, 4, 2, {"scanned": 3}) + pack_entry(DISK, 5, 1, body)
        path.write_bytes(data.ljust(SMALL, b"\0"))
    known = open_it(tmp_path)
    assert [str(error).startswith("invalid commit 5") for error in known.damage] == [True]
    assert known.scanned == 3


def test_a_commit_through_something_that_is_no_table_is_reported(tmp_path: Path) -> None:
    for path in both(tmp_path):
        change = [[["strange", "x"], 1]]
        data = pack_entry(DISK, 4, 2, {"strange": 3}) + pack_entry(DISK, 5, 1, change)
        path.write_bytes(data.ljust(SMALL, b"\0"))
    assert [str(e).startswith("invalid commit 5") for e in open_it(tmp_path).damage] == [True]


@pytest.mark.parametrize("read_only", [False, True])
def test_another_disks_catalog_is_refused_and_not_touched(tmp_path: Path, read_only: bool) -> None:
    filled(tmp_path)
    before = [path.read_bytes() for path in both(tmp_path)]
    with pytest.raises(Corruption, match="catalog of another disk"):
        Catalog.open(RealStorage(tmp_path), b"e" * 16, read_only=read_only)
    assert [path.read_bytes() for path in both(tmp_path)] == before


@pytest.mark.parametrize("space", [True, False])
def test_damaged_files_are_kept_beside(tmp_path: Path, space: bool) -> None:
    filled(tmp_path)
    for path in both(tmp_path):
        flip(path, 56)
    before = [path.read_bytes() for path in both(tmp_path)]
    storage = Faulty(tmp_path)
    storage.fail = lambda what, name: (
        errno.ENOSPC if what == "write" and name.endswith(".damaged") and not space else 0
    )
    known = Catalog.open(storage, DISK, file_bytes_min=SMALL)
    assert known.damage
    kept = [path.with_name(path.name + ".damaged") for path in both(tmp_path)]
    if space:
        assert [path.read_bytes() for path in kept] == before
    known.close()
    again = open_it(tmp_path)
    assert again.damage == ()
    assert again.damaged()


def test_a_newer_version_is_refused_and_nothing_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VERSION", 2)
    filled(tmp_path)
    monkeypatch.setattr(module, "VERSION", 1)
    before = [path.read_bytes() for path in both(tmp_path)]
    with pytest.raises(UnknownVersion, match="format version 2"):
        open_it(tmp_path)
    assert [path.read_bytes() for path in both(tmp_path)] == before


def test_an_unreadable_place_costs_no_more_than_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = filled(tmp_path)
    storage = Faulty(tmp_path)

    def read(self: FaultyFile, offset: int, length: int) -> bytes:
        bad = 1024 if self.name == COPIES[0] else 1536
        if offset <= bad < offset + length:
            raise OSError(errno.EIO, "bad sector")
        return self._file.read(offset, length)

    monkeypatch.setattr(FaultyFile, "read", read, raising=False)
    known = Catalog.open(storage, DISK, read_only=True)
    assert known.state() == want
    assert known.damage == ()


# ----------------------------------------------------------------------------------------- readers
def test_a_reader_changes_nothing_and_follows(tmp_path: Path) -> None:
    writer = open_it(tmp_path)
    writer.commit(("applied", 1))
    before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in both(tmp_path)]
    reader = open_it(tmp_path, read_only=True)
    assert reader.applied == 1
    assert before == [(path.stat().st_mtime_ns, path.stat().st_ino) for path in both(tmp_path)]
    for number in range(2, 60):
        writer.commit(("applied", number))
        reader.refresh()
        assert (reader.applied, reader.damage, reader.notes) == (number, (), ())
    with pytest.raises(AssertionError):
        reader.commit(("applied", 5))


def test_a_reader_between_the_copies_of_a_commit_sees_no_damage(tmp_path: Path) -> None:
    """! It reads copy 1 first: a commit begun there is whole in copy 0."""
    filled(tmp_path)
    at = entries_of(both(tmp_path)[0])[5]
    storage = Faulty(tmp_path)
    whole = [path.read_bytes() for path in both(tmp_path)]
    # The last commit is about to be made: neither copy has it; and while a reader is between the
    # two files, copy 0 gets it and copy 1 a part of it.
    for path, data in zip(both(tmp_path), whole, strict=True):
        path.write_bytes(data[:at] + bytes(SMALL - at))
    torn = whole[1][: at + 60] + bytes(SMALL - at - 60)
    opened: list[str] = []

    def between(what: str, name: str) -> int:
        opened.append(name)
        if len(opened) == 2:
            both(tmp_path)[0].write_bytes(whole[0])
            both(tmp_path)[1].write_bytes(torn)
        return 0

    storage.fail = between
    reader = Catalog.open(storage, DISK, read_only=True)
    assert reader.damage == ()
    assert reader.applied == 5
    assert opened == [COPIES[1], COPIES[0]]


def test_a_reader_between_two_commits_looks_again(tmp_path: Path) -> None:
    """It finds the one under way in copy 1, and then, in copy 0, the next one: no damage either."""
    filled(tmp_path)
    first, second = both(tmp_path)
    whole = first.read_bytes()
    fourth, fifth = entries_of(first)[4:6]
    second.write_bytes(whole[: fourth + 60] + bytes(SMALL - fourth - 60))
    first.write_bytes(whole[: fifth + 60] + bytes(SMALL - fifth - 60))
    storage = Faulty(tmp_path)
    opened: list[str] = []

    def between(what: str, name: str) -> int:
        opened.append(name)
        if len(opened) == 3:
            first.write_bytes(whole)
            second.write_bytes(whole)
        return 0

    storage.fail = between
    reader = Catalog.open(storage, DISK, read_only=True)
    assert (reader.damage, reader.applied) == ((), 5)
    opened.clear()
    first.write_bytes(whole[: fifth + 60] + bytes(SMALL - fifth - 60))
    second.write_bytes(whole[: fourth + 60] + bytes(SMALL - fourth - 60))
    reader.refresh()
    assert (reader.damage, reader.applied) == ((), 5)


def test_the_newer_of_two_states_is_where_it_begins(tmp_path: Path) -> None:
    """One copy was replaced, the other not yet: what is damaged before that state costs nothing."""
    want = filled(tmp_path)
    first, second = both(tmp_path)
    old = second.read_bytes()
    open_it(tmp_path).close()
    for newer, older in ((first, second), (second, first)):
        older.write_bytes(old)
        flip(older, entries_of(older)[2] + 60)
        assert len(entries_of(newer)) == 1
        reader = open_it(tmp_path, read_only=True)
        assert (reader.state(), reader.damage) == (want, ())
        older.write_bytes(newer.read_bytes())


# ------------------------------------------------------------------------ while it is being written
def test_nothing_is_repaired_where_nothing_is_damaged(tmp_path: Path) -> None:
    filled(tmp_path)
    known = open_it(tmp_path)
    known.commit(("applied", 77))
    before = [path.read_bytes() for path in both(tmp_path)]
    assert known.repair() == []
    assert [path.read_bytes() for path in both(tmp_path)] == before
    known.close()


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("how", ["state", "commit", "padding", "room", "gone", "short", "zeroed"])
def test_a_damaged_copy_is_replaced_in_use(tmp_path: Path, copy: int, how: str) -> None:
    """No commit, and no start, has to come before somebody notices."""
    known = open_it(tmp_path)
    for number in range(5):
        known.commit(("applied", 70 + number), ("marker", "x" * 700))
    path, want = both(tmp_path)[copy], known.state()
    entries, size = entries_of(path), path.stat().st_size
    end = len(path.read_bytes().rstrip(b"\0"))
    match how:
        case "state":
            flip(path, 60)
        case "commit":
            flip(path, entries[-2] + 600)
        case "padding":
            flip(path, entries[-1] - 1)
        case "room":
            flip(path, size - 5)
        case "gone":
            path.unlink()
        case "short":
            path.write_bytes(path.read_bytes()[: end - 5])
        case "zeroed":
            content = bytearray(path.read_bytes())
            content[entries[-1] :] = bytes(size - entries[-1])
            path.write_bytes(content)
    (error,) = known.repair()
    assert error.file == COPIES[copy]
    assert known.repair() == []
    known.commit(("applied", 90))
    known.close()
    both(tmp_path)[1 - copy].unlink()
    after = open_it(tmp_path, read_only=True)
    assert (after.state(), after.damage) == (want | {"applied": 90}, ())
