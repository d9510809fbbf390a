"""The follower: what it shows of a redo log that is being written, recovered and reclaimed."""

from __future__ import annotations

import pytest

from journal.errors import Vanished
from journal.follower import RedoFollower
from journal.format import Log
from journal.segment import read_blocks, segment_name
from tests.crash.sim_storage import SimStorage
from tests.journal.redo_world import DISK, Recorder, seqs


@pytest.fixture
def storage() -> SimStorage:
    return SimStorage(0)


@pytest.fixture
def recorder(storage: SimStorage) -> Recorder:
    return Recorder(storage)


@pytest.fixture
def follower(storage: SimStorage, recorder: Recorder) -> RedoFollower:
    return RedoFollower(storage, DISK, recorder.frontier)


def test_only_what_is_durable_is_seen(recorder: Recorder, follower: RedoFollower) -> None:
    """! A seq that was shown once must never change its meaning."""
    recorder.write(3)
    assert seqs(follower) == []
    recorder.sync()
    assert seqs(follower) == [1, 2, 3]
    recorder.write(2)
    assert seqs(follower) == [1, 2, 3]
    assert follower.locate(4) is None
    # Also of a segment that is full, and of those begun since.
    for _ in range(10):
        recorder.write(4)
    assert len(follower.segments()) == 1
    assert seqs(follower) == [1, 2, 3]
    recorder.sync()
    assert seqs(follower) == list(range(1, 46))


def test_a_durable_in_the_middle_of_a_batch(recorder: Recorder, follower: RedoFollower) -> None:
    recorder.write(5)
    recorder.writer.sync()
    recorder.frontier.durable = 3
    assert seqs(follower) == [1, 2, 3]
    recorder.frontier.durable = 5
    assert seqs(follower) == [1, 2, 3, 4, 5]


def test_every_record_is_located(recorder: Recorder, follower: RedoFollower) -> None:
    for _ in range(20):
        recorder.write(3)
    recorder.sync()
    assert follower.locate(0) is None
    assert follower.locate(61) is None
    for seq in range(1, 61):
        place = follower.locate(seq)
        assert place is not None
        info, table, row = place
        data = read_blocks(follower.file(info), table, row, 0, 1, name=info.name)
        assert data == recorder.contents[seq]


def test_ranges(recorder: Recorder, follower: RedoFollower) -> None:
    for _ in range(20):
        recorder.write(3)
    recorder.sync()
    found = list(follower.tables(20, 31))
    assert found[0][1].first_seq <= 20 <= found[0][1].last_seq
    assert found[-1][1].last_seq == 31
    assert seqs(follower, 61, 70) == []


def test_the_open_segment_is_scanned_from_where_the_last_look_ended(
    recorder: Recorder, follower: RedoFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.write(2)
    recorder.sync()
    seqs(follower)
    (scanner,) = follower.cache._scanners.values()
    at = scanner.offset
    recorder.write(1)
    recorder.sync()
    reads: list[int] = []
    original = scanner.file.read

    def read(offset: int, length: int) -> bytes:
        reads.append(offset)
        return original(offset, length)

    monkeypatch.setattr(scanner.file, "read", read)
    assert seqs(follower) == [1, 2, 3]
    assert min(reads) >= at


def test_reclaimed_segments_are_gone(
    storage: SimStorage, recorder: Recorder, follower: RedoFollower
) -> None:
    for _ in range(20):
        recorder.write(3)
    recorder.sync()
    first, second = follower.segments()[:2]
    follower.table(first)
    recorder.frontier.curator_generation += 1
    storage.unlink(first.name)
    assert follower.file(first).read(0, 8) == b"CDPSEGMT"  # open files stay readable
    assert seqs(follower)[0] == second.first_seq
    assert follower.locate(1) is None
    with pytest.raises(Vanished):
        follower.file(first)


def test_a_listing_is_repeated_when_a_generation_changed(
    storage: SimStorage,
    recorder: Recorder,
    follower: RedoFollower,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """! A listing during create-then-unlink can miss both names."""
    recorder.write(3)
    recorder.sync()
    original = storage.list
    calls = 0

    def listing(directory: str) -> list[str]:
        nonlocal calls
        calls += 1
        if calls == 1:
            recorder.frontier.redo_generation += 1
            return []
        return original(directory)

    monkeypatch.setattr(storage, "list", listing)
    assert len(follower.segments()) == 1
    assert calls == 2


def test_recovery_is_followed(storage: SimStorage, recorder: Recorder) -> None:
    """What a recovery cut, copied and left out is seen by whoever looks again."""
    recorder.write(3)
    recorder.sync()
    follower = RedoFollower(storage, DISK, recorder.frontier)
    assert seqs(follower) == [1, 2, 3]
    recorder.write(2)
    recorder.writer.close(seal_open=False)
    recorder.start()  # 4 and 5 are copied; 6 says so
    assert seqs(follower) == [1, 2, 3, 4, 5, 6]
    for seq in (4, 5):
        place = follower.locate(seq)
        assert place is not None
        info, table, row = place
        assert info.header.highest >= info.first_seq  # the copy
        data = read_blocks(follower.file(info), table, row, 0, 1, name=info.name)
        assert data == recorder.contents[seq]


def test_an_old_listing_never_shows_what_a_recovery_made_void(
    storage: SimStorage, recorder: Recorder
) -> None:
    """! The old segment still holds records that are void now; `durable` is above their seqs."""
    recorder.write(3)
    recorder.sync()
    follower = RedoFollower(storage, DISK, recorder.frontier)
    (old,) = follower.segments()
    recorder.write(2)
    content = storage.live[segment_name(Log.REDO, 1)].live
    recorder.writer.close(seal_open=False)
    content[recorder.writer.segment_offset - 2048] ^= 1  # in the payload of seq 5
    recorder.start()
    assert recorder.frontier.durable == 6
    assert follower.table(old).last_seq == 3
    follower.segments()  # also when somebody else has listed again meanwhile
    assert follower.table(old).last_seq == 3


def test_a_hole_is_no_record(storage: SimStorage, recorder: Recorder) -> None:
    recorder.write(3)
    recorder.sync()
    recorder.write(2)
    content = storage.live[segment_name(Log.REDO, 1)].live
    recorder.writer.close(seal_open=False)
    content[recorder.writer.segment_offset - 2048] ^= 1  # in the payload of seq 5
    recorder.start()
    follower = RedoFollower(storage, DISK, recorder.frontier)
    assert seqs(follower) == [1, 2, 3, 4, 6]
    assert follower.locate(5) is None
    assert follower.locate(6) is not None


def test_caches_are_bounded(
    storage: SimStorage, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("journal.segment_cache.FILES_OPEN_MAX", 3)
    monkeypatch.setattr("journal.segment_cache.TABLE_ROWS_CACHED_MAX", 12)
    for _ in range(40):
        recorder.write(3)
    recorder.sync()
    before = storage.open_files
    follower = RedoFollower(recorder.storage, DISK, recorder.frontier)
    for _ in range(2):
        for seq in (1, 60, 30, 119, 7, 90):
            place = follower.locate(seq)
            assert place is not None
            info, table, row = place
            data = read_blocks(follower.file(info), table, row, 0, 1, name=info.name)
            assert data == recorder.contents[seq]
    assert storage.open_files - before <= 4  # and the one that is scanned
    assert sum(len(table.rows) for table in follower.cache._tables.values()) <= 12
    follower.close()
    assert storage.open_files == before


def test_unsealed_segments_of_former_lives_are_scanned_once(recorder: Recorder) -> None:
    for _ in range(5):
        recorder.write(2)
        recorder.sync()
        recorder.writer.close(seal_open=False)
        recorder.start()
    follower = RedoFollower(recorder.storage, DISK, recorder.frontier)
    assert seqs(follower) == list(range(1, recorder.writer.last_seq + 1))
    assert len(follower.cache._scanners) <= 1
