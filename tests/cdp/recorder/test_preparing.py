"""When segments are prepared ahead, and when they are given back."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdp.recorder import preparing
from cdp.recorder.preparing import Preparing, count_for
from cdp.recorder.process import Process
from journal.format import BLOCK
from tests.cdp.recorder.support import MIB, clients, new_disk, recorder, wait_until

SIZE = 8 * MIB
LIMIT = 64 * MIB
PLENTY = 1 << 40


@pytest.mark.parametrize(
    ("limit", "count"), [(16 * MIB, 0), (32 * MIB, 1), (64 * MIB, 2), (1 << 40, 4)]
)
def test_they_are_few_against_the_limit(limit: int, count: int) -> None:
    assert count_for(limit, MIB) == count


def allow(process: Process, room: int) -> None:
    """As the curator does."""
    frontier = process.recorder.frontier
    frontier.redo_bytes_max = process.recorder.count_bytes() + room


async def fill_a_segment(process: Process) -> None:
    async with clients(process, "unix") as (client,):
        for number in range(MIB // BLOCK + 1):
            await client.write(number * BLOCK, bytes(BLOCK))


async def test_a_disk_that_is_written_has_some_and_gives_them_back(tmp_path: Path) -> None:
    async with recorder(tmp_path, new_disk(tmp_path, SIZE, journal_limit=LIMIT)) as process:
        spares = process.recorder.writer.spares
        allow(process, LIMIT)
        await fill_a_segment(process)
        allow(process, LIMIT)
        await wait_until(lambda: len(spares) == 2)
        allow(process, MIB)
        await wait_until(lambda: not len(spares))
    assert not list((tmp_path / "journal" / "redo").glob("*.tmp"))


async def test_it_is_for_quiet_times_with_plenty_of_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "LOOK_SECONDS", 1e9)  # the process's own does nothing
    async with recorder(tmp_path, new_disk(tmp_path, SIZE, journal_limit=LIMIT)) as process:
        available = PLENTY
        mine = Preparing(process.recorder, lambda: available)
        spares, tail = process.recorder.writer.spares, process.recorder.tail
        assert not mine.step()  # nobody has said what room there is
        allow(process, LIMIT)
        assert not mine.step()  # no segment was filled
        await fill_a_segment(process)
        allow(process, preparing.ROOM_SEGMENTS * MIB)
        assert not mine.step()
        allow(process, LIMIT)
        available = preparing.SPACE_SEGMENTS * MIB
        assert not mine.step()
        available = PLENTY
        tail.total += tail.bound // 2
        assert not mine.step()
        tail.total -= tail.bound // 2
        process.recorder.no_space.since = 1
        assert not mine.step()
        process.recorder.no_space.since = 0
        assert mine.step()
        assert len(spares) == 1
        available = preparing.SPACE_SEGMENTS_MIN * MIB - 1
        assert not mine.step()
        assert not len(spares)
        available = PLENTY
        mine.stop()
        assert not mine.step()
        assert not len(spares)
