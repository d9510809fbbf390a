"""What a follower keeps of segments, and reads of what is mapped."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from journal.errors import Vanished
from journal.follower import RedoFollower
from journal.format import BLOCK
from journal.storage import Buffer, RealStorage, Room, map_file
from tests.crash.sim_storage import SimStorage
from tests.journal.redo_world import DISK, Recorder, seqs

PAGE = 4096


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    content = random.Random(1).randbytes(16 * PAGE)
    (tmp_path / "file").write_bytes(content)
    return content


def test_pieces_are_gathered(tmp_path: Path, content: bytes) -> None:
    file = RealStorage(tmp_path).open("file", "read")
    mapping = map_file(file, len(content))
    assert mapping is not None
    room = Room(4, PAGE)
    parts: list[Buffer] = [
        mapping.view[100 : 100 + PAGE],
        b"x" * PAGE,
        mapping.view[8 * PAGE : 9 * PAGE],
    ]
    assert room.gather(parts, 3 * PAGE)
    assert bytes(room.view[: 3 * PAGE]) == b"".join(parts)
    assert [bytes(block) for block in room.blocks[:3]] == [bytes(part) for part in parts]
    assert room.gather([], 0)
    assert not room.gather(parts[:1], 2 * PAGE), "less than what was wanted"
    file.close()


def test_a_forked_process_gathers_elsewhere() -> None:
    """The memory of a file stays shared: one would overwrite what the other is about to look at."""
    room = Room(1, PAGE)
    assert room.gather([b"p" * PAGE], PAGE)
    child = os.fork()
    if not child:
        gathered = room.gather([b"c" * PAGE], PAGE) and room.blocks[0] == b"c" * PAGE
        os._exit(0 if gathered else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert room.view == b"p" * PAGE


def test_what_cannot_be_read_kills_nobody(tmp_path: Path, content: bytes) -> None:
    """! A page that the device cannot read is, for who looks at a mapping of it, the same SIGBUS as
    one behind the end.
    """
    file = RealStorage(tmp_path).open("file", "read")
    mapping = map_file(file, len(content))
    assert mapping is not None
    room = Room(4, PAGE)
    with (tmp_path / "file").open("r+b") as cut:
        cut.truncate(8 * PAGE)
    good, bad = mapping.view[:PAGE], mapping.view[8 * PAGE : 9 * PAGE]
    assert not room.gather([good, bad, good], 3 * PAGE)
    assert not room.gather([bad], PAGE)
    assert room.gather([good, good], 2 * PAGE)
    assert bytes(room.view[: 2 * PAGE]) == 2 * content[:PAGE]
    file.close()


def test_what_cannot_be_mapped(tmp_path: Path, content: bytes) -> None:
    file = RealStorage(tmp_path).open("file", "read")
    assert map_file(file, len(content) + 1) is None
    file.close()
    simulated = SimStorage(0).open("file", "create")
    assert map_file(simulated, PAGE) is None
    simulated.close()


def test_a_closed_mapping_is_not_looked_at(tmp_path: Path, content: bytes) -> None:
    file = RealStorage(tmp_path).open("file", "read")
    mapping = map_file(file, len(content))
    assert mapping is not None
    view = mapping.view
    part = view[:PAGE]
    mapping.close()
    file.close()
    with pytest.raises(ValueError, match="released"):
        view[0:1]
    room = Room(1, PAGE)
    assert room.gather([part], PAGE)  # it lives as long as somebody has it
    assert bytes(room.view) == content[:PAGE]


def test_slices_of_sealed_and_of_open_segments(tmp_path: Path) -> None:
    storage = RealStorage(tmp_path)
    recorder = Recorder(storage)
    for _ in range(30):
        recorder.write()
    recorder.sync()
    follower = RedoFollower(storage, DISK, recorder.frontier)
    infos = follower.segments()
    assert infos[0].sealed
    assert not infos[-1].sealed
    room = Room(1, BLOCK)
    for seq in (1, recorder.writer.last_seq):
        place = follower.locate(seq)
        assert place is not None
        info, table, row = place
        at = int(table.rows["payload"][row])
        slices = follower.cache.slices(info)
        assert isinstance(slices, memoryview) == info.sealed
        assert (slices is follower.cache.slices(info)) == info.sealed
        assert room.gather([slices[at : at + BLOCK]], BLOCK)
        assert bytes(room.view) == recorder.contents[seq]
    closed = follower.cache.closed
    follower.cache.retain({infos[-1].segment})
    assert follower.cache.closed > closed
    (tmp_path / infos[0].name).unlink()
    with pytest.raises(Vanished):
        follower.cache.slices(infos[0])
    follower.close()
    recorder.writer.close()


def test_little_is_kept_while_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("journal.segment_cache.TABLE_ROWS_RESTING_MAX", 20)
    storage = SimStorage(0)
    recorder = Recorder(storage)
    for _ in range(40):
        recorder.write(3)
    recorder.sync()
    before = storage.open_files
    follower = RedoFollower(recorder.storage, DISK, recorder.frontier)
    assert len(seqs(follower)) == 120
    assert storage.open_files - before > 2
    follower.cache.rest()
    assert storage.open_files - before <= 1  # the one that is scanned
    assert 0 < sum(len(table.rows) for table in follower.cache._tables.values()) <= 20
    recorder.write()
    recorder.sync()
    assert len(seqs(follower)) == 121
    follower.close()
