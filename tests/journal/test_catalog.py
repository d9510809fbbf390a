"""The catalog on real files: what is kept, what is repaired, what is refused, what fails for
good."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from journal.catalog import Catalog, CatalogFailed
from journal.catalog_copies import COPIES
from journal.catalog_state import (
    Bookmark,
    Crash,
    Gap,
    Hole,
    Pin,
    Rollback,
    Thinned,
    drop,
    put,
)
from journal.errors import JournalFull
from journal.limits import CATALOG_FILE_BYTES_MIN
from journal.storage import Buffer, RealStorage
from tests.journal.catalog_files import (
    DISK,
    SMALL,
    Faulty,
    FaultyFile,
    both,
    filled,
    open_it,
)

MARK = Bookmark("before", 7, 70, 9, "application", "filesystem", {"freeze_seconds": 0.5})


# ------------------------------------------------------------------------------------- what is kept
def test_a_new_one_is_empty_and_kept_twice(tmp_path: Path) -> None:
    first = open_it(tmp_path)
    assert not first.found
    assert first.state() == {}
    assert (first.applied, first.window_start, first.reclaimed, first.scanned) == (0, 0, 0, 0)
    assert (first.number, first.clean, first.fingerprint) == (0, False, None)
    first.close()
    assert [path.stat().st_size for path in both(tmp_path)] == [SMALL, SMALL]
    second = open_it(tmp_path)
    assert second.found
    assert (second.damage, second.notes) == ((), ())


def test_what_was_committed_is_there_again_typed(tmp_path: Path) -> None:
    items: list[Any] = [
        MARK,
        Thinned(5, 50, 60),
        Pin("view-1", 6, "viewer 17", 123, 3600.5),
        Gap(20, None, "overflow"),
        Rollback(11, None, False),
        Hole(30, 39),
        Crash(40, 29, 39, 1000, 2000),
    ]
    first = open_it(tmp_path)
    first.commit(("applied", 10), ("window_start", 3), ("clean", True))
    first.commit(*map(put, items))
    first.commit(("fingerprint", {"size": 5}), (("sizes", "0"), 4096), (("clock", "0"), -5))
    first.commit((("undo", "3"), 8192), (("undo", "10"), 4096), ("undo_highest", 10))
    first.commit((("damaged", "x"), {"what": "?"}), (("verdicts", "before"), {"ok": True}))
    for known in (first, open_it(tmp_path, read_only=True), open_it(tmp_path)):
        assert known.bookmarks() == {"before": MARK}
        assert known.thinned() == [items[1]]
        assert known.pins() == {"view-1": items[2]}
        assert known.gaps() == [items[3]]
        assert known.rollbacks() == [items[4]]
        assert known.holes() == [items[5]]
        assert known.crashes() == [items[6]]
        assert known.undo() == {3: 8192, 10: 4096}
        assert (known.sizes(), known.clock()) == ([(0, 4096)], [(0, -5)])
        assert (known.applied, known.window_start, known.undo_highest) == (10, 3, 10)
        assert (known.clean, known.fingerprint) == (True, {"size": 5})
        assert known.damaged() == {"x": {"what": "?"}}
        assert known.verdicts() == {"before": {"ok": True}}
        assert known.number == 5


def test_items_are_changed_and_removed_one_by_one(tmp_path: Path) -> None:
    known = open_it(tmp_path)
    known.commit(put(MARK), put(Gap(5, None, "release")), put(Gap(1, 2, "")))
    known.commit(drop(MARK), put(Gap(5, 9, "release")), (("pins", "never there"), None))
    assert known.bookmarks() == {}
    assert known.gaps() == [Gap(1, 2, ""), Gap(5, 9, "release")]
    known.commit(("gaps", None), ("fingerprint", None), ("bookmarks", {}))
    again = open_it(tmp_path)
    assert again.state() == known.state() == {"bookmarks": {}}


def test_taking_in_the_same_control_records_again_changes_nothing(tmp_path: Path) -> None:
    known = open_it(tmp_path)
    changes = [put(Rollback(5, 9, True)), put(Crash(3, 1, 2, 0, 9)), (("sizes", "4"), 512)]
    known.commit(*changes)
    before = known.state()
    known.commit(*changes)
    assert known.state() == before


def test_the_state_is_not_the_callers_to_change(tmp_path: Path) -> None:
    known = open_it(tmp_path)
    value = {"size": [1]}
    known.commit(("fingerprint", value))
    value["size"].append(2)
    known.state()["fingerprint"] = None
    assert known.fingerprint == {"size": [1]}
    known.commit(("fingerprint", {"ends": (1, 2)}))
    assert known.fingerprint == open_it(tmp_path).fingerprint == {"ends": [1, 2]}


def test_unknown_names_are_kept(tmp_path: Path) -> None:
    known = open_it(tmp_path)
    known.commit(("of a later version", {"a": [1, None]}), (("other", "x"), 1))
    assert open_it(tmp_path).state() == {"of a later version": {"a": [1, None]}, "other": {"x": 1}}


@pytest.mark.parametrize(
    "change",
    [
        ("applied", -1),
        ("applied", 1 << 64),
        ("applied", True),
        ("applied", "1"),
        ("clean", 1),
        (("applied", "x"), 1),
        (("applied", "x"), None),
        ((), 1),
        (("a", "b", "c"), 1),
        ((1,), 1),
        ("bookmarks", []),
        ("bookmarks", {"x": {}}),
        (("bookmarks", "x"), {"seq": 1}),
        (("undo", "x"), 1),
        (("undo", "01"), 1),
        (("undo", "-1"), 1),
        (("undo", "1"), None, "allowed"),
        (("holes", "5"), 4),
        (("gaps", "5"), {"end": 4, "reason": ""}),
        (("rollbacks", "5"), {"end": None, "committed": True}),
        (("rollbacks", "5"), {"end": 6, "committed": 1}),
        (("crashes", "5"), [1, 2, 3]),
        (("pins", "p"), {"seq": 1, "owner": 2, "opened_ns": 1, "max_age_s": 0}),
        (("pins", "p"), {"seq": 1, "owner": "", "opened_ns": 1, "max_age_s": float("nan")}),
        (("damaged", "p"), 1),
        ("new", float("nan")),
    ],
)
def test_what_would_not_be_valid_is_not_committed(tmp_path: Path, change) -> None:
    known = open_it(tmp_path)
    if change[2:]:
        known.commit(change[:2])
        return
    with pytest.raises(ValueError, match=r"."):
        known.commit(("scanned", 4), change)
    assert known.state() == {}
    assert known.failed is None
    known.commit(("scanned", 5))
    assert open_it(tmp_path).state() == {"scanned": 5}


# -------------------------------------------------------------------------------- order and bounds
def test_a_commit_syncs_one_copy_before_it_touches_the_other(tmp_path: Path) -> None:
    """! At every moment one copy is whole, synced and quiet; back only when both are."""
    storage = Faulty(tmp_path)
    known = Catalog.open(storage, DISK, file_bytes_min=SMALL)
    for name in COPIES:
        steps = [call for call, file in storage.done if file.startswith(name) or file == ""]
        assert "write" in steps
    storage.done.clear()
    known.commit(("applied", 1))
    first, second = COPIES
    assert storage.done == [
        ("write", first),
        ("sync", first),
        ("write", second),
        ("sync", second),
    ]


def test_a_new_file_is_synced_before_its_name_and_the_name_before_the_other(tmp_path: Path) -> None:
    """! Only so one of old and new is whole whatever survives."""
    storage = Faulty(tmp_path)
    Catalog.open(storage, DISK, file_bytes_min=SMALL)
    done = [step for step in storage.done if step[0] != "open read"]
    for name in COPIES:
        want = [
            ("open create", name + ".tmp"),
            ("write", name + ".tmp"),
            ("sync", name + ".tmp"),
            ("rename", name),
            ("sync_dir", ""),
        ]
        assert done[:5] == want
        done = done[5:]
    assert done == []


def test_a_full_copy_is_replaced_and_its_size_is_bounded_by_the_state(tmp_path: Path) -> None:
    storage = Faulty(tmp_path)
    known = Catalog.open(storage, DISK, file_bytes_min=SMALL)
    for number in range(200):
        known.commit(("applied", number), put(Bookmark(f"b{number % 5}", number, 1, 1, "", "")))
        assert all(path.stat().st_size == SMALL for path in both(tmp_path))
    renames = sum(call == "rename" for call, _ in storage.done)
    assert 2 < renames <= 2 + 2 * 200 // 7
    again = open_it(tmp_path)
    assert again.state() == known.state()
    assert again.number == 200
    assert (again.damage, again.notes) == ((), ())


def test_a_large_state_gets_room_to_grow(tmp_path: Path) -> None:
    known = open_it(tmp_path)
    known.commit(*(put(Bookmark(f"b{number}", number, 1, 1, "", "")) for number in range(1000)))
    known.close()
    open_it(tmp_path).close()
    size = len(json.dumps(known.state()))
    assert all(3 * size < path.stat().st_size < 6 * size for path in both(tmp_path))


def test_a_commit_that_fits_no_new_file_gets_a_larger_one(tmp_path: Path) -> None:
    known = open_it(tmp_path)
    known.commit(("fingerprint", {"x": "y" * 5 * SMALL}))
    known.commit(("fingerprint", {"x": "z" * 5 * SMALL}))
    assert open_it(tmp_path).fingerprint == {"x": "z" * 5 * SMALL}


def test_threads_commit_one_after_the_other(tmp_path: Path) -> None:
    known = open_it(tmp_path)

    def work(name: str) -> None:
        for number in range(30):
            known.commit((("verdicts", f"{name}{number}"), {"n": number}))
            assert f"{name}{number}" in known.verdicts()

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert known.number == len(known.verdicts()) == 120
    assert open_it(tmp_path).state() == known.state()


# ----------------------------------------------------------------------------------------- failing
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("call", ["write", "sync"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_after_a_failure_nothing_is_ever_appended_again(
    tmp_path: Path, copy: str, call: str, code: int
) -> None:
    """! A sync that failed is not repeated, and what it was about is copied by the next opening."""
    storage = Faulty(tmp_path)
    known = Catalog.open(storage, DISK, file_bytes_min=SMALL)
    known.commit(("applied", 1))
    storage.fail = lambda what, name: code if (what, name) == (call, copy) else 0
    with pytest.raises(CatalogFailed, match="restarted") as first:
        known.commit(("applied", 2))
    assert known.applied == 1
    storage.fail = lambda what, name: 0
    storage.done.clear()
    with pytest.raises(CatalogFailed) as second:
        known.commit(("applied", 3))
    assert storage.done == []
    assert known.failed is first.value is second.value
    known.close()
    again = Catalog.open(storage, DISK, file_bytes_min=SMALL)
    assert again.applied in {1, 2}
    assert again.damage == ()
    assert {step for step in storage.done if step[0] in {"write", "sync"}} == {
        (what, name + ".tmp") for what in ("write", "sync") for name in COPIES
    }
    again.commit(("applied", 4))
    assert open_it(tmp_path).applied == 4


@pytest.mark.parametrize("call", ["rename", "sync_dir", "write", "sync", "open create"])
def test_a_new_file_that_cannot_be_made_durable_fails_too(tmp_path: Path, call: str) -> None:
    want = filled(tmp_path)
    storage = Faulty(tmp_path)
    storage.fail = lambda what, name: errno.EIO if what == call else 0
    with pytest.raises(CatalogFailed):
        Catalog.open(storage, DISK, file_bytes_min=SMALL)
    assert open_it(tmp_path).state() == want


def test_an_interruption_in_the_middle_fails_as_well(tmp_path: Path) -> None:
    known = open_it(tmp_path)
    known.commit(("applied", 1))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    known._copies[1].file.sync = interrupt  # type: ignore[method-assign,union-attr]
    with pytest.raises(KeyboardInterrupt):
        known.commit(("applied", 2))
    assert known.failed is not None
    with pytest.raises(CatalogFailed):
        known.commit(("applied", 3))


def fill_up(known: Catalog) -> None:
    while known._copies[1].room >= 512:
        known.commit(("applied", known.applied + 1))


def test_without_space_a_commit_is_refused_and_can_be_tried_again(tmp_path: Path) -> None:
    storage = Faulty(tmp_path)
    known = Catalog.open(storage, DISK, file_bytes_min=SMALL)
    fill_up(known)
    before = known.state()
    storage.fail = lambda what, name: errno.ENOSPC if what == "write" else 0
    for _ in range(2):
        with pytest.raises(JournalFull, match="free some"):
            known.commit(("applied", 1000))
    assert known.failed is None
    assert known.state() == before == open_it(tmp_path, read_only=True).state()
    assert sorted(path.name for path in tmp_path.iterdir()) == list(COPIES)
    storage.fail = lambda what, name: 0
    known.commit(("applied", 1000))
    assert open_it(tmp_path).applied == 1000


def test_with_little_space_a_smaller_file_does(tmp_path: Path) -> None:
    """A curator must be able to start on a full disk: it is the one who makes space."""
    filled(tmp_path)
    known = Catalog.open(RealStorage(tmp_path), DISK)
    known.close()
    storage = Faulty(tmp_path)
    large = CATALOG_FILE_BYTES_MIN

    class Small(FaultyFile):
        def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
            if sum(map(len, buffers)) >= large:
                raise OSError(errno.ENOSPC, "full")
            super().write(offset, buffers)

    storage.open = lambda name, mode: Small(  # type: ignore[method-assign]
        RealStorage(tmp_path).open(name, mode), storage, name
    )
    known = Catalog.open(storage, DISK)
    known.commit(("applied", 77))
    assert all(path.stat().st_size < large for path in both(tmp_path))
    assert open_it(tmp_path).applied == 77
