"""Random changes, reads, flushes, applies and restarts against a bytearray.

Each round sends requests for disjoint byte ranges over several connections at once, in pieces of
any size, so that many share a block: whatever order they are executed in, each must leave the
others' bytes alone. Old content that a change must be widened with is often "not in the page
cache", so that changes are parked and blocks locked.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import trio

from cdp.recorder import changes, live, reads
from cdp.recorder.process import Process
from tests.cdp.recorder.support import MIB, Applier, Client, clients, new_disk, recorder

BLOCK = 4096
# The last block is a short one.
SIZE = 64 * BLOCK + 512 * 3


def ranges(rng: random.Random, count: int) -> list[tuple[int, int]]:
    """Disjoint ranges with gaps between them, most of them ragged."""
    cuts = sorted(rng.sample(range(SIZE + 1), 2 * count))
    if rng.random() < 0.5:
        cuts = sorted({cut // 512 * 512 for cut in cuts})
        cuts = cuts[: len(cuts) // 2 * 2]
    if rng.random() < 0.3:
        cuts[-1] = SIZE
    return [(low, high) for low, high in zip(cuts[::2], cuts[1::2], strict=True) if high > low]


def trimmed(model: bytearray, low: int, high: int) -> None:
    """What a trim does to the model: whole blocks become zero."""
    first = -(-low // BLOCK) * BLOCK
    last = SIZE if high == SIZE else high // BLOCK * BLOCK
    if last > first:
        model[first:last] = bytes(last - first)


async def one(
    client: Client, rng: random.Random, model: bytearray, low: int, high: int, wrong: list[Any]
) -> None:
    """One request for a range that nobody else touches, and its effect on the model."""
    kind = rng.choice(["write", "write", "write", "zeroes", "trim", "read", "read"])
    if kind == "write":
        data = rng.randbytes(high - low)
        model[low:high] = data
        await client.write(low, data, flags=rng.random() < 0.05)
    elif kind == "zeroes":
        model[low:high] = bytes(high - low)
        await client.zeroes(low, high - low)
    elif kind == "trim":
        trimmed(model, low, high)
        await client.trim(low, high - low)
    else:
        expected = bytes(model[low:high])
        if await client.read(low, high - low) != expected:
            wrong.append((low, high))


async def rounds(
    process: Process, rng: random.Random, model: bytearray, count: int, families: list[str]
) -> None:
    applier = Applier(process)
    async with clients(process, *families) as found:
        for _ in range(count):
            wrong: list[Any] = []
            async with trio.open_nursery() as nursery:
                for low, high in ranges(rng, rng.randrange(1, 24)):
                    nursery.start_soon(one, rng.choice(found), rng, model, low, high, wrong)
                if rng.random() < 0.3:
                    nursery.start_soon(rng.choice(found).flush)
            assert not wrong
            if rng.random() < 0.5:
                frontier = process.recorder.frontier
                if frontier.durable > frontier.applied:
                    applier.step(rng.randrange(frontier.applied + 1, frontier.durable + 1))
            if rng.random() < 0.3:
                whole = await rng.choice(found).read(0, SIZE)
                assert whole == model
        assert await found[0].read(0, SIZE) == model
    applier.close()


@pytest.mark.parametrize("number", range(6))
async def test_model(
    short_tmp: Path, seed: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed + number)
    fetch = reads.fetch

    def sometimes(pieces: Any, backing: int, offset: int, into: memoryview, flags: int) -> bool:
        if flags and rng.random() < 0.3:
            return False
        return fetch(pieces, backing, offset, into, flags)

    monkeypatch.setattr(changes, "fetch", sometimes)
    monkeypatch.setattr(live, "fetch", sometimes)
    config = new_disk(short_tmp, SIZE, segment_bytes=MIB)
    model = bytearray(SIZE)
    families = rng.choices(["unix", "tcp"], k=3)
    for _ in range(3):  # a clean stop and a new start in between
        async with recorder(short_tmp, config) as process:
            await rounds(process, rng, model, 25, families)
            statistics = process.recorder.statistics
            assert statistics.partial_waits
            assert statistics.reads_waited
            assert not process.recorder.changes.locks
            assert process.recorder.changes.locks.bytes == 0
