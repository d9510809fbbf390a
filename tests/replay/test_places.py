"""What a viewer remembers, over many chunks of a disk."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from journal.format import BLOCK, Kind
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
