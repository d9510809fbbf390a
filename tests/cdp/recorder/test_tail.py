"""Back-pressure: delays that grow, a bound that holds, and what may pass it."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from cdp.recorder import tail
from cdp.recorder.batch import BLOCK_WORK
from cdp.recorder.process import Process
from cdp.recorder.tail import SECOND, Tail
from tests.cdp.recorder.support import MIB, Applier, clients, new_disk, recorder, wait_until

SIZE = 64 * MIB


@pytest.fixture
async def process(short_tmp: Path) -> AsyncIterator[Process]:
    async with recorder(short_tmp, new_disk(short_tmp, SIZE)) as process:
        yield process


def filled(fill: float, *, bound: int = 1 << 30) -> Tail:
    found = Tail(bound)
    found.start(0, 0)
    found.add(1, int(bound * fill))
    return found


def test_nobody_is_delayed_below_half_of_the_bound() -> None:
    assert filled(0.5).delay(MIB, 0) == 0


def test_delays_grow_smoothly_towards_the_bound() -> None:
    delays = [filled(fill / 100).delay(64 << 10, 0) for fill in range(51, 101)]
    assert delays == sorted(delays)
    assert delays[0] > 0
    # No step: what a percent adds is small against what there is at the bound.
    steps = [after - before for before, after in itertools.pairwise(delays)]
    assert max(steps) < delays[-1] / 4


def test_at_the_bound_work_comes_in_at_the_rate_at_which_it_goes() -> None:
    found = Tail(1 << 30)
    found.start(0, 0)
    seq = now = 0
    for _ in range(20):  # applied at 100 MiB/s
        for _ in range(10):
            seq += 1
            found.add(seq, MIB)
        now += SECOND // 10
        found.advance(seq, now)
    found.add(seq + 1, 1 << 30)
    delay = found.delay(MIB, now) - now
    assert 0.5 < delay / (SECOND / 100) < 2


def roomy(room: int, *, span: int = 4 * MIB) -> Tail:
    """Nothing waits, and the journal has so much room."""
    found = Tail(1 << 40, span=span)
    found.start(0, 0)
    found.set_room(room, 1 << 30, 1)
    return found


def test_nobody_is_delayed_while_the_journal_has_room() -> None:
    found = roomy(5 * MIB)
    assert (found.cramped, found.delay(MIB, 0)) == (False, 0)
    found.add(1, 2 * MIB + 2)  # as much may have to be saved
    assert found.cramped is True
    assert found.total > found.gentle
    assert found.delay(2 * MIB, 0) > 0


def test_delays_grow_smoothly_as_room_goes() -> None:
    delays = [roomy(4 * MIB * left // 100).delay(16 << 10, 0) for left in range(99, 0, -1)]
    assert delays == sorted(delays)
    assert delays[0] > 0
    assert delays[50] == pytest.approx(2 * delays[0], rel=0.1)


def test_at_half_the_span_as_much_comes_as_goes() -> None:
    found, now, allowed = roomy(100 * MIB), 1, 1 << 30
    for _ in range(20):  # 20 MiB/s are given up
        now += SECOND // 10
        allowed += 2 * MIB
        found.set_room(2 * MIB, allowed, now)
    assert (found.delay(2 * MIB, now) - now) / SECOND == pytest.approx(1 / 20, rel=0.05)


def test_without_room_nothing_is_admitted() -> None:
    """! Nor is a record that is alone: it would not fit in a smaller journal either."""
    found = roomy(0)
    assert (found.held, found.admits(512)) == (True, False)
    found.set_room(MIB, 1 << 30, 2)
    assert (found.held, found.admits(512), found.admits(100 * MIB)) == (False, True, True)
    found.add(1, MIB)
    assert not found.admits(100 * MIB)
    assert found.admits(MIB)
    found.advance(1, 3)
    found.set_room(-5 * MIB, 1 << 30, 4)  # above the limit
    assert (found.held, found.delay(MIB, 5) - 5) == (True, tail.DELAY_NS_MAX)


def test_applied_takes_work_off() -> None:
    found = Tail(MIB)
    found.start(0, 0)
    for seq in range(1, 9):
        found.add(seq, 128 << 10)
    assert found.work == MIB
    assert not found.admits(1)
    found.advance(4, 1)
    assert found.work == MIB // 2
    assert found.admits(MIB // 2)
    assert not found.admits(MIB // 2 + 1)
    found.advance(8, 2)
    assert found.work == 0
    # Alone, a record may be larger than the bound.
    assert found.admits(100 * MIB)
    found.add(9, 100 * MIB)
    assert not found.admits(1)


def test_the_history_stays_short() -> None:
    found = Tail(1 << 40)
    found.start(0, 0)
    for seq in range(1, 100_001):
        found.add(seq, 8192)
    assert len(found._history) < 100_000 * 8192 / (64 << 10) + 2
    found.advance(50_000, 1)
    assert 0 <= found.work - 50_000 * 8192 <= 64 << 10


async def test_writes_wait_for_apply_and_reads_do_not(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "FILL_SECONDS", 0.5)
    recorder = process.recorder
    recorder.tail.set_bound(64 * BLOCK_WORK)
    async with clients(process, "unix", "unix") as (writer, reader):
        applier = Applier(process)
        done = 0

        async def write() -> None:
            nonlocal done
            for number in range(200):
                await writer.write(number * 4096, bytes([number]) * 4096)
                done += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await wait_until(lambda: recorder.tail.work >= 60 * BLOCK_WORK)
            await trio.sleep(0.05)
            assert done <= 64
            assert recorder.tail.work <= recorder.tail.bound
            with trio.fail_after(1):
                assert await reader.read(0, 4096) == bytes(4096)
                assert await reader.read(4096, 4096) == b"\1" * 4096
            while done < 200:
                recorder.syncer.want(recorder.writer.last_seq)
                await trio.sleep(0.02)
                applier.step()
        assert await reader.read(199 * 4096, 4096) == bytes([199]) * 4096
        assert recorder.statistics.throttled_ns > 0
        assert recorder.tail.peak_work <= recorder.tail.bound
        applier.close()


async def test_writes_wait_for_room_in_the_journal(process: Process) -> None:
    """The curator's word on what may be appended is kept, and heard when it changes."""
    recorder, frontier = process.recorder, process.recorder.frontier
    async with clients(process, "unix", "unix") as (writer, reader):
        await writer.write(0, os.urandom(MIB))
        recorder.advance()
        assert MIB < frontier.redo_bytes < MIB + 8192
        allowed = frontier.redo_bytes_max = frontier.redo_bytes + MIB
        done = 0

        async def write() -> None:
            nonlocal done
            for number in range(64):
                await writer.write(number * 65536, os.urandom(65536))
                done += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await wait_until(lambda: recorder.tail.cramped and done)
            frontier.redo_bytes_max = allowed = frontier.redo_bytes
            await wait_until(lambda: recorder.tail.held)
            before = done
            await trio.sleep(0.05)
            assert done <= before + 1
            assert frontier.redo_bytes <= allowed + 2 * (65536 + 8192)
            with trio.fail_after(1):
                await reader.read(0, 4096)
            frontier.redo_bytes_max = allowed + 64 * MIB
            await wait_until(lambda: done == 64)
        assert process.status()["tail_bytes"] > 0


async def test_the_process_answers_while_clients_are_held_back(process: Process) -> None:
    recorder = process.recorder
    async with clients(process, "unix") as (client,):
        await client.write(0, bytes(4096))
        recorder.tail.set_bound(BLOCK_WORK)
        with trio.move_on_after(0.1):
            await client.write(4096, bytes(4096))
        status = process.status()
        assert status["throttled"]
        assert status["throttled_seconds"] > 0
        began = time.monotonic()
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        assert time.monotonic() - began < 1
        recorder.tail.set_bound(1 << 30)


async def test_a_record_larger_than_the_bound_is_admitted_alone(process: Process) -> None:
    recorder = process.recorder
    recorder.tail.set_bound(4 * BLOCK_WORK)
    applier = Applier(process)
    async with clients(process, "unix") as (client,):
        await client.zeroes(0, 32 * MIB)  # nothing else is there
        done = trio.Event()

        async def more() -> None:
            await client.zeroes(0, 32 * MIB)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(more)
            await trio.sleep(0.05)
            assert not done.is_set()
            await process_sync(process)
            applier.step()
            with trio.fail_after(2):
                await done.wait()
    applier.close()


async def test_trims_are_hardly_any_work(process: Process) -> None:
    process.recorder.tail.set_bound(64 << 10)
    async with clients(process, "unix") as (client,):
        for _ in range(20):
            await client.trim(0, 32 * MIB)
    assert process.recorder.tail.work <= 20 * 512


async def test_bytes_that_are_not_durable_are_bounded(short_tmp: Path) -> None:
    config = new_disk(short_tmp, SIZE, unsynced_bytes=MIB, sync_age_seconds=60.0)
    async with recorder(short_tmp, config) as process:
        peak = 0
        async with clients(process, "unix") as (client,):
            data = os.urandom(128 << 10)
            async with trio.open_nursery() as nursery:
                for number in range(64):
                    nursery.start_soon(client.write, number * len(data), data)
                while client._pending or not process.recorder.writer.last_seq:
                    peak = max(peak, process.recorder.writer.unsynced_bytes)
                    await trio.lowlevel.checkpoint()
            assert await client.read(63 * len(data), len(data)) == data
        assert 0 < peak <= MIB + (128 << 10)


async def process_sync(process: Process) -> None:
    event = trio.Event()
    process.recorder.wait_event(process.recorder.writer.last_seq, event)
    await event.wait()
