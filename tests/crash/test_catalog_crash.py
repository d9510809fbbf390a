"""The catalog over a storage that crashes at every operation.

After any crash the state is that of the last commit that returned, or that plus the one in flight:
never a mixture, never older, and never with a complaint about damage. The same when the opening
after the crash crashes, at every one of its operations, and when a sync fails.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable

import pytest

from journal.catalog import Catalog, CatalogFailed
from journal.catalog_state import Bookmark, State, put
from journal.errors import JournalFull
from tests.crash.sim_storage import Crash, SimStorage

DISK = b"d" * 16
COPY_BYTES = 8192  # seven commits fill it, so that files are replaced often
PAD = {"pad": "x" * 700}  # an entry takes two sectors, and can be torn inside
SEEDS = int(os.environ.get("CDP_CRASH_SEEDS", "4"))
COMMITS = 12


def changes(number: int) -> list:
    """Commits that depend on each other, so that one that is missing shows in the state."""
    return [
        ("applied", number),
        put(Bookmark(f"b{number % 3}", number, number, number, "", "", PAD)),
        ((("pins", f"p{number - 1}"), None) if number % 2 else (("verdicts", "v"), {"n": number})),
    ]


def history() -> list[State]:
    """The state after each commit."""
    storage = SimStorage(1)
    known = Catalog.open(storage, DISK, file_bytes_min=COPY_BYTES)
    states = [known.state()]
    for number in range(1, 2 * COMMITS + 1):
        known.commit(*changes(number))
        states.append(known.state())
    return states


HISTORY = history()


def work(storage: SimStorage, returned: list[int], upto: int = COMMITS) -> None:
    """Open, commit, note what has returned."""
    known = Catalog.open(storage, DISK, file_bytes_min=COPY_BYTES)
    for number in range(known.applied + 1, upto + 1):
        known.commit(*changes(number))
        returned[0] = number
    known.close()


def check(storage: SimStorage, returned: int, *, read_only: bool = False) -> int:
    """What an opening finds: the number of the commit that it is at."""
    known = Catalog.open(storage, DISK, file_bytes_min=COPY_BYTES, read_only=read_only)
    number = known.applied
    assert returned <= number <= returned + 1, "older than what returned, or out of nothing"
    assert known.state() == HISTORY[number], "a mixture"
    assert known.damage == ()
    assert known.found or not returned
    known.close()
    return number


def operations_of(run: Callable[[SimStorage], None], storage: SimStorage) -> int:
    run(storage)
    return storage.operations


ENDS: dict[str, Callable[[SimStorage], SimStorage]] = {
    "power": SimStorage.crash,
    "killed": SimStorage.kill,
    "evicted": lambda storage: storage.kill(evict=True),
}

TOTAL = operations_of(lambda storage: work(storage, [0]), SimStorage(0))


@pytest.mark.crash
@pytest.mark.parametrize("end", ENDS)
def test_a_crash_at_every_operation(end: str) -> None:
    found = set()
    for at, seed in itertools.product(range(1, TOTAL + 1), range(SEEDS)):
        storage = SimStorage(seed * 1000 + at, crash_at=at)
        returned = [0]
        with pytest.raises(Crash):
            work(storage, returned)
        after = ENDS[end](storage)
        number = check(after, returned[0], read_only=True)
        assert check(after, returned[0]) == number, "reading and writing see the same"
        found.add(number - returned[0])
        # It goes on from there, and what it does then survives as well.
        work(after, [0], 2 * COMMITS)
        check(after.crash(), 2 * COMMITS)
    assert found == {0, 1}, "both outcomes of a commit in flight were seen"


@pytest.mark.crash
@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("second", ENDS)
def test_a_crash_at_every_operation_of_the_opening_after_a_crash(first: str, second: str) -> None:
    for at, seed in itertools.product(range(1, TOTAL + 1, 2), range(-(-SEEDS // 4))):
        for again in range(1, 12):
            storage = SimStorage(seed * 1000 + at, crash_at=at)
            returned = [0]
            with pytest.raises(Crash):
                work(storage, returned)
            after = ENDS[first](storage)
            after.crash_at = again
            try:
                known = Catalog.open(after, DISK, file_bytes_min=COPY_BYTES)
            except Crash:
                check(ENDS[second](after), returned[0])
            else:
                assert again > 10, "an opening has ten operations"
                number = known.applied
                assert check(after.crash(), number) == number, "what an opening found stays"
                break


@pytest.mark.crash
@pytest.mark.parametrize("kind", ["sync", "write"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failure_at_every_sync_and_write(kind: str, code: int) -> None:
    """! After it nothing is appended; the next opening copies what is whole, and rests on that."""
    count = SimStorage(0)
    work(count, [0])
    for at, seed in itertools.product(range(1, count.counts[kind] + 1), range(SEEDS)):
        storage = SimStorage(seed * 1000 + at)
        storage.faults[kind, at] = code
        returned = [0]
        try:
            work(storage, returned)
        except (CatalogFailed, JournalFull):
            pass  # where a smaller file could be tried, it may also have gone on
        for end in ENDS.values():
            again = SimStorage(seed * 1000 + at)
            again.faults[kind, at] = code
            returned = [0]
            try:
                work(again, returned)
            except (CatalogFailed, JournalFull):
                pass
            after = end(again)
            number = check(after, returned[0])
            assert check(after.crash(), number) == number


@pytest.mark.crash
def test_a_crash_after_a_failed_sync_and_a_new_opening() -> None:
    """! Pages whose sync failed are clean, not durable: what was read from them must be
    rewritten."""
    count = SimStorage(0)
    work(count, [0])
    for at, seed in itertools.product(range(1, count.counts["sync"] + 1), range(SEEDS)):
        storage = SimStorage(seed * 1000 + at)
        storage.faults["sync", at] = errno.EIO
        returned = [0]
        with pytest.raises(CatalogFailed):
            work(storage, returned)
        after = storage.kill()
        known = Catalog.open(after, DISK, file_bytes_min=COPY_BYTES)
        number = known.applied
        known.commit(*changes(number + 1))
        check(after.crash(), number + 1)


@pytest.mark.crash
def test_a_disk_that_is_full_at_every_size() -> None:
    for space in range(0, 5 * COPY_BYTES, 512):
        storage = SimStorage(space, space=space)
        returned = [0]
        try:
            work(storage, returned)
        except JournalFull:
            pass
        after = storage.kill()
        after.space = 1 << 30
        assert check(after, returned[0]) == returned[0]


@pytest.mark.crash
def test_the_simulation_finds_a_catalog_that_syncs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above are able to fail."""
    monkeypatch.setattr("tests.crash.sim_storage.SimFile.sync", lambda self: None)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(SEEDS):
            storage = SimStorage(seed, crash_at=TOTAL // 2)
            returned = [0]
            with pytest.raises(Crash):
                work(storage, returned)
            check(storage.crash(), returned[0])
