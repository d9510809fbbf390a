"""What a recorder does when the journal's file system fails it, or its own data are damaged."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from cdp.recorder.overlay import Extent
from cdp.recorder.process import Process
from tests.cdp.recorder.support import (
    MIB,
    Applier,
    FaultyStorage,
    NbdFailure,
    clients,
    new_disk,
    recorder,
)

SIZE = 8 * MIB
Logged = Callable[..., None]


async def exited(process: Process) -> None:
    with trio.fail_after(5):
        await process.ended.wait()


async def test_a_failed_sync_poisons(short_tmp: Path, expect_log: Logged) -> None:
    expect_log("CRITICAL .*could not make the redo log durable")
    config = new_disk(short_tmp, SIZE)
    storage = FaultyStorage(Path(config.journal))
    async with recorder(short_tmp, config, storage=storage) as process:
        async with clients(process, "unix", "unix") as (client, other):
            await client.write(0, b"a" * 4096)
            await client.flush()
            await client.write(4096, b"b" * 4096)
            storage.sync_error = errno.EIO
            with pytest.raises(NbdFailure) as caught:
                await client.flush()
            assert caught.value.code == 5
            assert process.status()["poisoned"]
            assert not process.status()["served"]
            # Nothing is acknowledged any more, whoever asks, and no sync is tried again.
            syncs = storage.syncs
            for call in (
                other.write(0, b"c" * 4096), other.zeroes(0, 100), other.flush(),
                other.trim(0, 8192), other.read(0, 4096),
            ):  # fmt: skip
                with pytest.raises(NbdFailure) as caught:
                    await call
                assert caught.value.code == 5
            assert storage.syncs == syncs
            assert process.recorder.frontier.durable == 1
            await exited(process)
    assert process.exit_code == 1
    # The next one recovers: what had been appended is copied and durable.
    async with recorder(short_tmp, config) as process:
        assert process.recorder.frontier.durable >= 2
        async with clients(process, "unix") as (client,):
            assert await client.read(0, 8192) == b"a" * 4096 + b"b" * 4096


async def test_a_failed_sync_of_the_age_cap_poisons_too(
    short_tmp: Path, expect_log: Logged
) -> None:
    expect_log("CRITICAL .*could not make the redo log durable")
    config = new_disk(short_tmp, SIZE)
    storage = FaultyStorage(Path(config.journal))
    async with recorder(short_tmp, config, storage=storage) as process:
        async with clients(process, "unix") as (client,):
            storage.sync_error = errno.EIO
            await client.write(0, b"a" * 4096)
            await exited(process)
    assert process.exit_code == 1


async def test_a_failed_append_poisons(short_tmp: Path, expect_log: Logged) -> None:
    expect_log("CRITICAL .*could not append")
    config = new_disk(short_tmp, SIZE)
    storage = FaultyStorage(Path(config.journal))
    async with recorder(short_tmp, config, storage=storage) as process:
        async with clients(process, "unix") as (client,):
            storage.write_error = errno.EIO
            for number in range(2):
                with pytest.raises(NbdFailure) as caught:
                    await client.write(number, b"a" * 4096)
                assert caught.value.code == 5
            await exited(process)
    assert process.exit_code == 1


def damage(process: Process, block: int) -> None:
    """Turn over a bit of a block's content in the redo log."""
    _, _, _, generation, where = process.recorder.overlay.find(block)
    assert generation is not None
    if isinstance(where, Extent):
        offset = where.offset + (block - where.first) * 4096 + 1000
    else:
        assert where is not None
        offset = where + 1000
    path = Path(process.config.journal) / "redo" / f"{generation.segment:08d}.seg"
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


async def test_a_damaged_record_is_an_error_not_old_content(
    short_tmp: Path, expect_log: Logged
) -> None:
    expect_log("ERROR .*checksum mismatch in redo segment")
    async with recorder(short_tmp, new_disk(short_tmp, SIZE)) as process:
        async with clients(process, "unix") as (client,):
            await client.write(0, b"a" * 4096)
            await client.flush()
            applier = Applier(process)
            applier.step()
            await client.write(0, b"b" * 4096)
            await client.write(4096, b"c" * 4096)
            await client.write(MIB, b"d" * MIB)
            damage(process, 0)
            damage(process, MIB // 4096 + 100)
            for offset, length in ((0, 4096), (100, 100), (0, 8192), (MIB + 100 * 4096, 512)):
                with pytest.raises(NbdFailure) as caught:
                    await client.read(offset, length)
                assert caught.value.code == 5
            # A change that needs the damaged content cannot be made either; one that does not, can.
            with pytest.raises(NbdFailure):
                await client.write(100, b"x")
            assert await client.read(4096, 4096) == b"c" * 4096
            assert await client.read(MIB, 65536) == b"d" * 65536
            await client.write(0, b"e" * 4096)
            assert await client.read(0, 4096) == b"e" * 4096
            assert process.status()["corruptions"] >= 4
            applier.close()
