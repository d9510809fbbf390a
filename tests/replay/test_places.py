"""What a viewer remembers, over many chunks of a disk."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from journal.errors import Corruption
from journal.format import BLOCK, Kind
from journal.storage import RealFile
from replay.places import CHUNK_BLOCKS, Places
from tests.cdp.curator.disk_model import Disk

CHUNKS = 6


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path, blocks=CHUNKS * CHUNK_BLOCKS, sparse=True)


def read(places: Places, blocks: list[int], seq: int) -> list[int]:
    """The first word of each block."""
    out = bytearray(b"\xff" * (len(blocks) * BLOCK))
    places.read_into(memoryview(out), np.array(blocks, np.uint64), seq)
    words: list[int] = np.frombuffer(out, "<u8")[:: BLOCK // 8].tolist()
    return words


def test_a_request_of_more_chunks_than_there_is_room_for(disk: Disk) -> None:
    """! A chunk that is looked up must not take the place of one that was found just before."""
    blocks = [chunk * CHUNK_BLOCKS + 7 for chunk in range(CHUNKS)]
    for block in blocks:
        disk.write(block, 1)
    disk.sync()
    seq = disk.frontier.durable
    places = Places(disk.new_reader(), chunks=2, fill_after=0)
    expected = list(range(1, CHUNKS + 1))
    for _ in range(2):
        assert [read(places, [block], seq)[0] for block in blocks] == expected
        assert read(places, blocks, seq) == expected
        assert read(places, blocks[::-1], seq) == expected[::-1]


@pytest.mark.parametrize("number", range(3))
def test_any_blocks_in_any_order_more_than_once(disk: Disk, seed: int, number: int) -> None:
    rng = random.Random(f"{seed}/{number}")
    some = [rng.randrange(disk.blocks - 40) for _ in range(12)]
    for _ in range(40):
        block = rng.choice(some)
        match rng.randrange(5):
            case 0:
                disk.write(block, rng.choice((16, 20, 40)))
            case 1:
                disk.zero(block, rng.choice((1, 30)), rng.choice((Kind.ZERO, Kind.TRIM)))
            case _:
                disk.write(block, rng.choice((1, 3)))
    disk.sync()
    seqs = rng.sample(disk.openable(), 4)
    places = Places(disk.new_reader(), chunks=rng.choice((2, 64)), fill_after=rng.choice((0, 20)))
    for _ in range(6):
        disk.step()
        for seq in seqs:
            wanted = [rng.choice(some) + rng.randrange(40) for _ in range(rng.choice((1, 30)))]
            first = rng.choice(some)
            wanted += range(first, first + rng.choice((0, 40)))
            model = disk.model[seq]
            assert model is not None
            assert read(places, wanted, seq) == [model[block] for block in wanted]


def scattered(disk: Disk, rng: random.Random) -> tuple[Places, list[int], list[int]]:
    """What is remembered of blocks that were written in any order, over several sealed segments;
    the blocks, and what they hold.
    """
    blocks = rng.sample(range(1000), 600)
    for block in blocks:
        disk.write(block, 1)
    disk.zero(1, 3, Kind.ZERO)
    disk.sync()
    blocks = list(range(1000))
    seq = disk.frontier.durable
    places = Places(disk.new_reader(), fill_after=0)
    expected = disk.now()[:1000]
    assert read(places, blocks, seq) == expected
    return places, blocks, expected


@pytest.mark.parametrize("most", [256, 2])
@pytest.mark.parametrize("mapped", [True, False])
def test_scattered_blocks(
    disk: Disk, seed: int, monkeypatch: pytest.MonkeyPatch, most: int, mapped: bool
) -> None:
    """Also with more segments than files may be open, and where nothing can be mapped."""
    monkeypatch.setattr("journal.segment_cache.FILES_OPEN_MAX", most)
    if not mapped:
        monkeypatch.setattr("journal.segment_cache.map_file", lambda file, length: None)
    rng = random.Random(f"{seed}/{most}/{mapped}")
    places, blocks, expected = scattered(disk, rng)
    seq = disk.frontier.durable
    for _ in range(20):
        first, count = rng.randrange(900), rng.randrange(1, 100)
        wanted = blocks[first : first + count]
        assert read(places, wanted, seq) == expected[first : first + count]
        wanted = rng.choices(blocks, k=count)
        assert read(places, wanted, seq) == [expected[block] for block in wanted]
    reads: list[int] = []
    original = RealFile.read_into

    def read_into(file: RealFile, offset: int, buffer: memoryview) -> int:
        reads.append(offset)
        return original(file, offset, buffer)

    monkeypatch.setattr(RealFile, "read_into", read_into)
    written = [block for block in blocks if expected[block]]
    assert read(places, written, seq) == [expected[block] for block in written]
    assert bool(reads) == (most < 256), "one by one only if they could not be gathered"


def test_scattered_blocks_of_damaged_segments(disk: Disk, seed: int) -> None:
    """! Neither old data nor a SIGBUS, whatever became of a segment that is mapped; and its
    neighbours can be read.
    """
    places, blocks, expected = scattered(disk, random.Random(seed))
    seq = disk.frontier.durable
    # The newest of the sealed ones, so that no block of it has been written again.
    name = f"{len(list((disk.root / 'journal/redo').glob('*.seg'))) - 1:08d}.seg"
    path = disk.root / "journal/redo" / name
    original = path.read_bytes()
    mine = [
        block for block in blocks
        if expected[block] and original.count(expected[block].to_bytes(8, "little") * 512)
    ]  # fmt: skip
    assert len(mine) > 60
    others = [block for block in blocks if block not in mine]
    damaged = bytearray(original)
    at = original.index(expected[mine[0]].to_bytes(8, "little") * 512)
    damaged[at + 2222] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(Corruption, match="checksum") as caught:
        read(places, blocks, seq)
    assert (caught.value.file, caught.value.offset) == (f"redo/{name}", at)
    assert read(places, mine[1:], seq) == [expected[block] for block in mine[1:]]
    with path.open("r+b") as file:
        file.truncate(4096)
    for wanted in (blocks, mine, mine[:1]):
        with pytest.raises(Corruption, match="checksum"):
            read(places, wanted, seq)
    assert read(places, others, seq) == [expected[block] for block in others]
    path.write_bytes(original)
    assert read(places, blocks, seq) == expected
