"""The recorder's path from a client's socket to the journal and back."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from cdp.nbd.wire import NBD_CMD_FLAG_FUA
from cdp.recorder.connection import Connection
from cdp.recorder.engine import Recorder
from cdp.recorder.process import Process
from tests.cdp.recorder.support import (
    FLUSH,
    MIB,
    READ,
    WRITE,
    ZEROES,
    Applier,
    Client,
    NbdFailure,
    clients,
    new_disk,
    recorder,
    request,
    wait_until,
)

SIZE = 8 * MIB


@pytest.fixture
async def process(short_tmp: Path) -> AsyncIterator[Process]:
    async with recorder(short_tmp, new_disk(short_tmp, SIZE)) as process:
        yield process


@pytest.fixture
async def client(process: Process) -> AsyncIterator[Client]:
    async with clients(process, "unix") as (client,):
        yield client


async def test_what_was_written_is_read(client: Client) -> None:
    data = os.urandom(4096)
    await client.write(8192, data)
    assert await client.read(8192, 4096) == data
    assert await client.read(0, 16384) == bytes(8192) + data + bytes(4096)


@pytest.mark.parametrize("length", [1, 511, 512, 4095, 4097, 65536, 65537, 300_000, 2 * MIB])
@pytest.mark.parametrize("offset", [0, 1, 512, 4096, 5000])
async def test_any_offset_and_length(client: Client, offset: int, length: int) -> None:
    data = os.urandom(length)
    await client.write(offset, data)
    whole = await client.read(0, offset + length + 4096)
    assert whole == bytes(offset) + data + bytes(4096)


async def test_a_large_request_takes_a_large_buffer_for_a_moment(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(SIZE)
    connection, shrink = client.connection, Connection.shrink
    monkeypatch.setattr(Connection, "shrink", lambda _self: None)
    await client.write(0, data)
    assert await client.read(0, SIZE) == data
    assert SIZE < connection.capacity <= 2 * SIZE
    shrink(connection)
    await client.write(0, data[:4096])
    shrink(connection)
    assert connection.capacity == MIB
    assert await client.read(0, SIZE) == data


async def test_zeroes_and_trims(client: Client) -> None:
    await client.write(0, b"a" * 65536)
    await client.zeroes(1000, 10000)
    await client.trim(20000, 20000)
    expected = bytearray(b"a" * 65536)
    expected[1000:11000] = bytes(10000)
    expected[20480:36864] = bytes(16384)  # only whole blocks
    assert await client.read(0, 65536) == expected


async def test_one_request_is_one_record(process: Process, client: Client) -> None:
    writer = process.recorder.writer
    for number, call in enumerate(
        [
            client.write(0, bytes(4096)),
            client.write(100, bytes(100)),
            client.write(4000, bytes(200)),
            client.write(0, bytes(MIB)),
            client.zeroes(0, 3 * MIB),
            client.zeroes(100, 100_000),
            client.trim(0, MIB),
        ],
        1,
    ):
        await call
        assert writer.last_seq == number
    # One that covers no whole block changes nothing.
    await client.trim(100, 4000)
    assert writer.last_seq == 7


async def test_a_batch_of_one_client_is_one_append(process: Process, client: Client) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(64):
            nursery.start_soon(client.write, number * 4096, bytes([number]) * 4096)
    for number in range(64):
        assert await client.read(number * 4096, 4096) == bytes([number]) * 4096


async def test_everybody_gets_his_own_answer(client: Client) -> None:
    """One plain write in front of others, all in one piece: once it took the next one's cookie."""
    for plain in range(12):
        first = client._next + 1
        sent, cookies = b"", []
        for number in range(plain):
            cookies.append(first + number)
            sent += request(WRITE, number * 4096, 4096, cookies[-1], bytes([plain]) * 4096)
        for kind, length in ((WRITE, 100), (READ, 4096), (ZEROES, 8192), (FLUSH, 0), (READ, 10)):
            cookies.append(first + len(cookies))
            payload = bytes(length) if kind == WRITE else b""
            sent += request(kind, 0, length, cookies[-1], payload)
        events = [trio.Event() for _ in cookies]
        for cookie, event, length in zip(
            cookies, events, [0] * plain + [0, 4096, 0, 0, 10], strict=True
        ):
            client._pending[cookie] = event, length
        client._next += len(cookies)
        client.send_nowait(sent)
        with trio.fail_after(5):
            for event in events:
                await event.wait()
        assert [client._answers.pop(cookie)[0] for cookie in cookies] == [0] * len(cookies)


async def test_flush_and_fua_wait_for_the_disk(process: Process, client: Client) -> None:
    writer = process.recorder.writer
    await client.write(0, b"x" * 4096)
    await client.flush()
    assert writer.durable == 1
    assert process.recorder.frontier.durable == 1
    assert process.recorder.barrier == 1
    await client.write(4096, b"y" * 4096, NBD_CMD_FLAG_FUA)
    assert writer.durable == 2
    await client.zeroes(0, 4096, NBD_CMD_FLAG_FUA)
    assert writer.durable == 3 == process.recorder.barrier


async def test_an_age_cap_syncs_without_a_flush(process: Process, client: Client) -> None:
    await client.write(0, b"x" * 4096)
    await wait_until(lambda: process.recorder.frontier.durable >= 1)


async def test_an_idle_disk_says_in_its_log_what_is_durable(
    process: Process, client: Client
) -> None:
    await client.write(0, b"x" * 4096)
    await client.flush()
    offset = process.recorder.writer.segment_offset
    await wait_until(lambda: process.recorder.watermark >= 1)
    assert process.recorder.writer.segment_offset > offset
    assert process.recorder.writer.last_seq == 1
    # Once is enough.
    offset = process.recorder.writer.segment_offset
    for _ in range(3):
        process._care_for_age()
        process._care_for_watermark()
    assert process.recorder.writer.segment_offset == offset


async def test_errors_of_the_client(process: Process, client: Client) -> None:
    for call, code in [
        (client.write(SIZE - 100, bytes(200)), 28),
        (client.read(SIZE, 1), 22),
        (client.trim(SIZE, 4096), 22),
        (client.zeroes(SIZE - 1, 2), 28),
    ]:
        with pytest.raises(NbdFailure) as caught:
            await call
        assert caught.value.code == code
    await client.write(0, b"still here")
    assert process.recorder.statistics.refused == 4


async def test_rubbish_ends_the_connection(process: Process, client: Client) -> None:
    client.send_nowait(b"rubbish" * 10)
    await client.gone.wait()
    assert process.recorder.statistics.protocol_errors == {"transmission": 1}
    assert not process.loop.connections


async def test_disconnect_is_answered_by_the_end(process: Process, client: Client) -> None:
    await client.write(0, b"x" * 4096)
    await client.disconnect()
    assert not process.loop.connections


async def test_reads_of_applied_data_come_from_the_backing(
    process: Process, client: Client
) -> None:
    await client.write(0, b"x" * 4096 + b"y" * 4096)
    await client.trim(4096, 4096)
    await client.write(16384, b"z" * 4096)
    await client.flush()
    applier = Applier(process)
    assert applier.step() == 3
    assert await client.read(0, 20480) == b"x" * 4096 + bytes(12288) + b"z" * 4096
    recorder = process.recorder
    assert not recorder.overlay.generations
    assert list(recorder.overlay.masks) == [1]
    # The masked block still holds its old content in the backing.
    assert os.pread(process.backing, 4096, 4096) == b"y" * 4096
    await client.write(4096, b"w" * 100)
    await client.flush()
    applier.step()
    assert await client.read(4096, 4096) == b"w" * 100 + bytes(3996)
    assert not recorder.overlay.masks
    applier.close()


@pytest.mark.parametrize("before", [True, False])
async def test_what_is_read_is_applied_at_that_moment(
    process: Process, client: Client, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """! The tail is looked up first, the backing read then: the other way round neither has it."""
    await client.write(0, b"x" * 4096 + b"y" * 4096)
    await client.trim(4096, 4096)
    await client.flush()
    applier, advance, steps = Applier(process), Recorder.advance, []

    def racing(self: Recorder) -> bool:
        if before:
            steps.append(applier.step())
        moved = advance(self)
        if not before:
            steps.append(applier.step())
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "advance", racing)
        for _ in range(2):
            assert await client.read(0, 12288) == b"x" * 4096 + bytes(8192)
    assert steps[0] == 2
    applier.close()


async def test_segment_files_are_closed_when_they_are_applied(
    process: Process, client: Client
) -> None:
    applier = Applier(process)
    for _ in range(8):
        await client.write(0, os.urandom(MIB // 2))
    await client.flush()
    await client.read(0, 4096)
    files = process.recorder.writer._files
    assert len(files) >= 4
    applier.step()
    await client.read(0, 4096)
    await wait_until(
        lambda: len(files) <= 2
    )  # those that are not sealed yet are closed when they are
    applier.close()


async def test_several_connections_share_one_log(process: Process) -> None:
    async with clients(process, "unix", "tcp", "unix") as found:
        for number, client in enumerate(found):
            await client.write(number * 4096, bytes([number + 1]) * 4096)
        for client in found:
            assert await client.read(0, 12288) == b"\1" * 4096 + b"\2" * 4096 + b"\3" * 4096
        # A flush on one covers what was answered on the others.
        await found[0].flush()
        assert process.recorder.writer.durable == 3


async def test_a_client_that_does_not_take_its_replies(process: Process) -> None:
    async with clients(process, "unix", "unix") as (slow, other):
        data = os.urandom(MIB)
        await other.write(0, data)
        async with trio.open_nursery() as nursery:
            # Its replies are 64 MiB; they wait for it, in its connection and as deferred reads.
            slow._stream.socket.setsockopt(1, 8, 4096)
            results: list[bytes] = []

            async def read() -> None:
                results.append(await slow.read(0, MIB))

            for _ in range(64):
                nursery.start_soon(read)
            for _ in range(20):
                await other.write(MIB, b"x" * 4096)
            assert slow.connection.out_bytes < 16 * MIB
        assert results == [data] * 64
    assert process.recorder.reads.waiting_bytes == 0


async def test_memory_of_a_silent_disk_is_small(process: Process, client: Client) -> None:
    # Many changes, all applied: nothing of them is left.
    applier = Applier(process)
    for round_number in range(4):
        for number in range(0, 2000, 50):
            await client.write(number * 4096, bytes([round_number]) * 4096)
    await client.flush()
    applier.step()
    await wait_until(lambda: not process.recorder.overlay.generations)
    assert process.recorder.tail.work == 0
    applier.close()
