"""Real clients against the recorder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from cdp.recorder.process import Process
from cdp.recorder.standalone import serve_nbd
from tests.cdp.recorder.support import MIB, Applier, new_disk, recorder, wait_until

SIZE = 64 * MIB
pytestmark = pytest.mark.slow
NeedTool = Callable[[str], str]


@pytest.fixture
async def process(short_tmp: Path) -> AsyncIterator[Process]:
    async with recorder(short_tmp, new_disk(short_tmp, SIZE)) as process:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_nbd, process, short_tmp / "s")
            yield process
            nursery.cancel_scope.cancel()


@pytest.fixture
def uri(short_tmp: Path) -> str:
    return f"nbd+unix:///disk0?socket={short_tmp}/s"


async def run(*command: str | Path, status: int = 0) -> str:
    # nbdsh takes the python3 that it finds first.
    environment = {**os.environ, "PATH": f"/usr/bin:{os.environ.get('PATH', os.defpath)}"}
    done = await trio.run_process(
        [str(part) for part in command], capture_stdout=True, stderr=subprocess.STDOUT,
        check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == status, done.stdout.decode()
    return done.stdout.decode()


@pytest.mark.needs_tool("nbdinfo")
async def test_nbdinfo(process: Process, uri: str) -> None:
    (export,) = json.loads(await run("nbdinfo", "--json", uri))["exports"]
    assert export["export-size"] == SIZE
    assert export["contexts"] == ["base:allocation"]
    for flag in ("flush", "fua", "trim", "zero", "fast_zero", "df", "cache", "multi_conn"):
        assert export[f"can_{flag}"], flag


@pytest.mark.needs_tool("qemu-io")
async def test_qemu_io(process: Process, uri: str) -> None:
    commands = [
        "write -P 1 0 1M", "write -P 2 512 512", "write -z 64k 64k", "discard 128k 128k",
        "aio_write -P 3 2M 256k", "aio_flush", "flush", "read -P 1 0 512", "read -P 2 512 512",
        "read -P 0 64k 64k", "read -P 0 128k 128k", "read -P 3 2M 256k", "read -P 0 32M 1M",
        "write -f -P 4 3M 4k", "read -P 4 3M 4k",
    ]  # fmt: skip
    arguments = [part for command in commands for part in ("-c", command)]
    assert "Pattern verification failed" not in await run("qemu-io", "-f", "raw", *arguments, uri)


@pytest.mark.needs_tool("fio")
async def test_fio_verifies(process: Process, uri: str, short_tmp: Path) -> None:
    common: list[str | Path] = [
        "fio", "--name=j", "--ioengine=nbd", f"--uri={uri}", "--size=16m", "--thread",
        "--verify=crc32c", "--verify_fatal=1", "--output", short_tmp / "fio.out",
    ]  # fmt: skip
    await run(*common, "--rw=randrw", "--bsrange=512-64k", "--bs_unaligned=1", "--iodepth=16")
    await run(*common, "--rw=randwrite", "--bs=4k", "--iodepth=32", "--fsync=8")
    async with trio.open_nursery() as nursery:
        applier = Applier(process)

        async def apply() -> None:
            while True:
                applier.step()
                await trio.sleep(0.01)

        nursery.start_soon(apply)
        await run(*common, "--rw=randwrite", "--bssplit=4k/60:12k/20:1k/20", "--iodepth=32")
        nursery.cancel_scope.cancel()
        applier.close()


@pytest.mark.needs_tool("nbdcopy", "nbdinfo", "qemu-img")
async def test_copies_are_exact_and_sparse(process: Process, uri: str, short_tmp: Path) -> None:
    source = short_tmp / "source"
    with source.open("wb") as file:
        for at in range(0, SIZE, 4 * MIB):
            file.seek(at)
            file.write(os.urandom(MIB + 777))
        file.truncate(SIZE)
    await run("nbdcopy", source, uri)
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
    applier = Applier(process)
    process.recorder.syncer.want(process.recorder.writer.last_seq)
    await wait_until(lambda: applier.step() >= process.recorder.writer.last_seq)
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
    copy = short_tmp / "copy"
    await run("nbdcopy", uri, copy)
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_blocks * 512 < SIZE // 2
    applier.close()


@pytest.mark.needs_tool("nbdinfo", "qemu-io")
async def test_block_status_tells_what_is_zero(process: Process, uri: str) -> None:
    await run(
        "qemu-io", "-f", "raw", "-c", "write 0 1M", "-c", "discard 256k 256k",
        "-c", "write -z 512k 64k", "-c", "write 8M 4k", uri,
    )  # fmt: skip
    expected = [
        (0, 256 << 10, 0), (256 << 10, 320 << 10, 3), (576 << 10, 448 << 10, 0),
        (MIB, 7 * MIB, 3), (8 * MIB, 4096, 0), (8 * MIB + 4096, SIZE - 8 * MIB - 4096, 3),
    ]  # fmt: skip

    async def check() -> None:
        found = json.loads(await run("nbdinfo", "--map", "--json", uri))
        assert [(e["offset"], e["length"], e["type"]) for e in found] == expected

    await check()
    applier = Applier(process)
    process.recorder.syncer.want(process.recorder.writer.last_seq)
    await wait_until(lambda: applier.step() >= process.recorder.writer.last_seq)
    expected[1:3] = [(256 << 10, 256 << 10, 3), (512 << 10, 512 << 10, 0)]
    await check()
    applier.close()


NBDSH = """
h.set_request_structured_replies({structured})
h.add_meta_context("base:allocation")
h.connect_uri("{uri}")
h.set_strict_mode(0)
h.pwrite(b"a" * 65536, 0)
h.trim(32768, 4096)
h.zero(8192, 40960, nbd.CMD_FLAG_FAST_ZERO)
h.cache(65536, 0)
expected = b"a" * 4096 + bytes(32768) + b"a" * 4096 + bytes(8192) + b"a" * 16384
assert h.pread(65536, 0) == expected
chunks = []
h.pread_structured(65536, 0, lambda b, o, s, e: chunks.append((o, len(b), s)), {df})
if {structured}:
    h.pread_structured(4096, 8192, lambda b, o, s, e: chunks.append((o, len(b), s)), 0)
    assert chunks == [(0, 65536, nbd.READ_DATA), (8192, 4096, nbd.READ_HOLE)], chunks
    extents = []
    h.block_status(65536, 0, lambda m, o, e, err: extents.extend(e), nbd.CMD_FLAG_REQ_ONE)
    assert extents == [4096, 0], extents
for call, code in ((lambda: h.pread(4096, {size}), 22), (lambda: h.pwrite(b"x", {size}), 28),
                   (lambda: h.trim(512, {size}), 22), (lambda: h.zero(512, {size}), 28)):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == code, error
    else:
        raise AssertionError(code)
h.flush()
h.pwrite(b"b" * 100, 1000, nbd.CMD_FLAG_FUA)
assert h.pread(102, 999) == b"a" + b"b" * 100 + b"a"
h.shutdown()
"""


@pytest.mark.needs_tool("nbdsh")
@pytest.mark.parametrize("structured", [True, False])
async def test_nbdsh(process: Process, uri: str, structured: bool) -> None:
    script = NBDSH.format(
        uri=uri, structured=structured, size=SIZE, df="nbd.CMD_FLAG_DF" if structured else "0"
    )
    if shutil.which("nbdsh"):
        await run("nbdsh", "-c", script)


@pytest.mark.needs_tool("nbdsh")
async def test_large_structured_reads_tell_holes(process: Process, uri: str) -> None:
    script = f"""
h.connect_uri("{uri}")
h.pwrite(b"a" * (1 << 20), 0)
h.pwrite(b"b" * (1 << 20), 3 << 20)
h.trim(1 << 20, 1 << 20)
chunks = []
data = h.pread_structured(3 << 20, 1 << 19, lambda b, o, s, e: chunks.append((o, len(b), s)))
assert data == b"a" * (1 << 19) + bytes(2 << 20) + b"b" * (1 << 19)
assert chunks[0] == (1 << 19, 1 << 19, nbd.READ_DATA), chunks
assert (1 << 20, 1 << 20, nbd.READ_HOLE) in chunks, chunks
assert sum(n for _, n, _ in chunks) == 3 << 20
"""
    await run("nbdsh", "-c", script)


@pytest.mark.needs_tool("nbdcopy")
async def test_many_connections(process: Process, uri: str, short_tmp: Path) -> None:
    source = short_tmp / "source"
    source.write_bytes(os.urandom(SIZE))
    await run("nbdcopy", "--connections=4", "--threads=4", "--requests=16", source, uri)
    copy = short_tmp / "copy"
    await run("nbdcopy", "--connections=4", "--threads=4", uri, copy)
    assert copy.read_bytes() == source.read_bytes()
    assert process.recorder.statistics.connections_total == 8
    assert process.recorder.statistics.discarded_connections == 0
