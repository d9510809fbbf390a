"""The undo log over a storage that crashes at every operation.

What was published is there after any crash, byte for byte; what is there besides was appended; no
damage is reported where there is none. And what a recovery shows it has made durable: a decision
that rests on it ("nothing to save, it is there already") holds after the next power loss.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
from collections.abc import Callable

import pytest

from journal.errors import Corruption, JournalFull
from journal.format import BLOCK, Kind, payload_sums
from journal.segment import read_blocks
from journal.undo import UndoFailed, UndoWriter
from journal.undo_follower import UndoFollower, verify_undo
from journal.undo_recovery import RecoveredUndo, recover_undo
from tests.crash.sim_storage import Crash, SimStorage

DISK = b"d" * 16
SEGMENT_BYTES = 24 << 10  # four batches fill it
BATCHES = 14
SEEDS = int(os.environ.get("CDP_CRASH_SEEDS", "3"))


@dataclasses.dataclass
class Known:
    """What outlives a crash of the storage: the catalog's list; the frontier, if the boot goes
    on."""

    segments: dict[int, int] = dataclasses.field(default_factory=dict)
    highest: int = 0
    frontier: int = 0
    published: list[int] = dataclasses.field(default_factory=list)
    appended: list[int] = dataclasses.field(default_factory=list)
    identities: int = 0

    def identity(self) -> bytes:
        self.identities += 1
        return (self.identities * 7919).to_bytes(16, "little")

    def listed(self, segment: int) -> None:
        self.segments[segment] = 0
        self.highest = max(self.highest, segment)


def content(number: int) -> bytes:
    return bytes([number & 0xFF, 1 + number // 256]) * (BLOCK // 2)


def batch(number: int) -> tuple[list[int], list[int], list[bytes], int]:
    """An image of block ``number``, and one of zeroes behind it."""
    data = content(number)
    entries = [number, number + 1, 1, Kind.IMAGE, 0, 0]
    entries += [number + (1 << 20), number + 1, 3, Kind.IMAGE_ZERO, 0, 0]
    return entries, payload_sums(data), [data], len(data)


def recover(storage: SimStorage, known: Known) -> RecoveredUndo:
    found = recover_undo(
        storage, DISK, known.segments, identity=known.identity, highest=known.highest,
        published_hint=known.frontier,
    )  # fmt: skip
    known.segments.update(found.ends)
    known.highest = max(known.highest, *found.ends, 0)
    known.frontier = found.published
    return found


def writer_after(found: RecoveredUndo, storage: SimStorage, known: Known) -> UndoWriter:
    return UndoWriter(
        storage, DISK, next_segment=found.next_segment, next_number=found.next_number,
        segment_bytes=SEGMENT_BYTES, identity=known.identity, listed=known.listed,
        predecessor=found.predecessor, published=found.published,
    )  # fmt: skip


def work(storage: SimStorage, known: Known, batches: int = BATCHES) -> None:
    """Recover, append, sync, publish; the list learns the ends only now and then."""
    writer = writer_after(recover(storage, known), storage, known)
    mine = list(known.published)
    for _ in range(batches):
        number = len(known.appended) + 1
        known.appended.append(number)
        mine.append(number)
        writer.append(*batch(number))
        if number % 3 == 0:
            continue
        known.frontier = writer.sync()
        known.published = list(mine)
        if number % 4 == 0:
            known.segments.update(writer.take_ends())
    writer.close()
    known.frontier = writer.published
    known.published = list(mine)
    known.segments.update(writer.take_ends())


def images(storage: SimStorage, known: Known) -> list[int]:
    """The images that a follower shows; each is whole, and no two of them are the same."""
    follower = UndoFollower(storage, DISK, lambda: known.frontier)
    snapshot = follower.snapshot()
    found = []
    for info, table in follower.tables(snapshot):
        for row, entry in enumerate(table.rows):
            block, end = int(entry["block"]), int(entry["arg"])
            assert entry["kind"] != Kind.LOST
            if entry["kind"] == Kind.IMAGE:
                file = follower.file(info)
                assert read_blocks(file, table, row, 0, 1, name=info.name) == content(block)
                assert end == block + 1
                found.append(block)
            else:
                assert (int(entry["nblocks"]), end) == (3, block - (1 << 20) + 1)
                assert found[-1] == block - (1 << 20)
    assert verify_undo(follower, snapshot, known.segments) == []
    follower.close()
    assert len(set(found)) == len(found)
    return found


def check(storage: SimStorage, known: Known) -> list[int]:
    """Recover, and see that nothing published is missing and nothing else was made up."""
    found = recover(storage, known)
    assert (found.damage, found.lost) == ((), ())
    there = images(storage, known)
    assert set(known.published) <= set(there), "lost"
    assert set(there) <= set(known.appended), "made up"
    assert there == sorted(there)
    return there


def power(storage: SimStorage, known: Known) -> SimStorage:
    known.frontier = 0
    return storage.crash()


ENDS: dict[str, Callable[[SimStorage, Known], SimStorage]] = {
    "power": power,
    "killed": lambda storage, known: storage.kill(),
    "evicted": lambda storage, known: storage.kill(evict=True),
}


def crashed(at: int, seed: int, end: str) -> tuple[SimStorage, Known]:
    storage, known = SimStorage(seed * 1000 + at, crash_at=at), Known()
    with pytest.raises(Crash):
        work(storage, known)
    return ENDS[end](storage, known), known


def count() -> SimStorage:
    storage = SimStorage(0)
    work(storage, Known())
    return storage


TOTAL = count().operations


@pytest.mark.crash
@pytest.mark.parametrize("end", ENDS)
def test_a_crash_at_every_operation(end: str) -> None:
    """! What is published survives; what a recovery shows survives from then on."""
    in_flight = set()
    for at, seed in itertools.product(range(1, TOTAL + 1), range(SEEDS)):
        storage, known = crashed(at, seed, end)
        there = check(storage, known)
        in_flight.add(len(there) - len(known.published))
        # Decisions may rest on all of that now, so it must be durable.
        known.published = there
        after = power(storage, known)
        assert check(after, known) == there
        known.published = there
        work(after, known, 3)
        check(power(after, known), known)
    assert in_flight >= {0, 1}


@pytest.mark.crash
@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("second", ENDS)
def test_a_crash_at_every_operation_of_a_recovery(first: str, second: str) -> None:
    for at, seed in itertools.product(range(1, TOTAL + 1, 2), range(-(-SEEDS // 4))):
        for again in itertools.count(1):
            storage, known = crashed(at, seed, first)
            storage.crash_at = again
            try:
                recover(storage, known)
            except Crash:
                check(ENDS[second](storage, known), known)
            else:
                break


@pytest.mark.crash
@pytest.mark.parametrize("kind", ["sync", "sync_dir", "write", "create"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("end", ENDS)
def test_a_failure_at_every_call(kind: str, code: int, end: str) -> None:
    """! A sync that failed is the end; what it was about is copied, or was never there."""
    for at, seed in itertools.product(range(1, count().counts[kind] + 1), range(SEEDS)):
        storage, known = SimStorage(seed * 1000 + at), Known()
        storage.faults[kind, at] = code
        try:
            work(storage, known)
        except (UndoFailed, JournalFull):
            pass  # without space for a footer it goes on
        after = ENDS[end](storage, known)
        known.published = check(after, known)
        check(power(after, known), known)


@pytest.mark.crash
def test_a_disk_that_is_full_at_every_size() -> None:
    for space in range(0, 90 << 10, 2048):
        storage, known = SimStorage(space, space=space), Known()
        try:
            work(storage, known)
        except JournalFull:
            pass
        after = storage.kill()
        after.space = 1 << 30
        known.published = check(after, known)
        check(power(after, known), known)


@pytest.mark.crash
@pytest.mark.parametrize("lie", ["SimFile.sync", "SimStorage.sync_dir"])
def test_the_simulation_finds_a_log_that_is_not_synced(
    lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks above are able to fail."""
    monkeypatch.setattr(f"tests.crash.sim_storage.{lie}", lambda *_: None)
    found = 0
    for seed in range(SEEDS):
        storage, known = SimStorage(seed), Known()
        work(storage, known)
        try:
            check(power(storage, known), known)
        except (AssertionError, Corruption):
            found += 1
    assert found
