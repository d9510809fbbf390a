"""Start after a clean stop, after a kill, with an unapplied tail, with a loss."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cdp.nbd.client import NbdClient, NbdNegotiationError
from cdp.nbd.wire import RemoteProtocolError
from cdp.recorder.holds import HOLD_FILE, NETWORK_FILE
from cdp.recorder.start import start_recorder
from journal.format import HEADER_PAGE, Kind, pack_segment_header, unpack_segment_header
from journal.recovery import Lost
from tests.cdp.recorder.support import MIB, Applier, clients, new_disk, recorder

SIZE = 8 * MIB
ROOT = Path(__file__).resolve().parents[3]
Logged = Callable[..., None]


async def test_an_unapplied_tail_is_there_after_a_restart(short_tmp: Path) -> None:
    config = new_disk(short_tmp, SIZE)
    data = random.Random(1).randbytes(SIZE)
    model = bytearray(SIZE)
    async with recorder(short_tmp, config) as process:
        async with clients(process, "unix") as (client,):
            for offset, length in ((0, 4096), (4096, 40960), (MIB, MIB), (3 * MIB, 100_000)):
                await client.write(offset, data[offset : offset + length])
                model[offset : offset + length] = data[offset : offset + length]
            await client.flush()
            applier = Applier(process)
            applier.step(2)
            await client.trim(8192, 8192)
            model[8192:16384] = bytes(8192)
            await client.zeroes(MIB + 65536, 131072)
            model[MIB + 65536 : MIB + 196608] = bytes(131072)
            await client.trim(3 * MIB, MIB)
            model[3 * MIB : 4 * MIB] = bytes(MIB)
            await client.write(3 * MIB + 100, b"x" * 50)
            model[3 * MIB + 100 : 3 * MIB + 150] = b"x" * 50
            applier.close()
        last = process.recorder.writer.last_seq
    async with recorder(short_tmp, config) as process:
        assert process.recorder.tail.applied == 2
        assert process.recorder.tail.work > 0
        async with clients(process, "unix") as (client,):
            assert await client.read(0, SIZE) == model
            await client.write(0, b"new")
            assert process.recorder.writer.last_seq > last
            applier = Applier(process)
            await client.flush()
            applier.step()
            model[:3] = b"new"
            assert await client.read(0, SIZE) == model
            applier.close()
    # Masks come from the footers.
    async with recorder(short_tmp, config) as process:
        assert not process.recorder.overlay.generations
        assert 2 in process.recorder.overlay.masks
        async with clients(process, "unix") as (client,):
            assert await client.read(0, SIZE) == model


async def test_the_frontier_says_where_the_recorder_stands(short_tmp: Path) -> None:
    config = new_disk(short_tmp, SIZE)
    async with recorder(short_tmp, config) as process:
        frontier = process.recorder.frontier
        first = frontier.epoch
        assert first >= 1
        async with clients(process, "unix") as (client,):
            for _ in range(5):
                await client.write(0, os.urandom(MIB // 2))
            generation = frontier.redo_generation
            await client.write(0, os.urandom(MIB))
            assert frontier.redo_generation > generation
            stamp = process.recorder.last_stamp
            await client.flush()
        assert frontier.durable == 6
        assert frontier.durable_stamp >= stamp
    async with recorder(short_tmp, config) as process:
        assert process.recorder.frontier.epoch == first + 1
        assert process.recorder.frontier.durable >= 6


async def test_stamps_rise_over_restarts(short_tmp: Path) -> None:
    config = new_disk(short_tmp, SIZE)
    stamps = []
    for _ in range(3):
        async with recorder(short_tmp, config) as process:
            for _ in range(3):
                stamps.append(process.recorder.append_control(Kind.BOOKMARK, {"label": "x"})[1])
    assert stamps == sorted(set(stamps))


async def test_stamps_do_not_pass_the_ceiling(short_tmp: Path) -> None:
    async with recorder(short_tmp, new_disk(short_tmp, SIZE)) as process:
        inner = process.recorder
        inner.ceiling = inner.stamp() + 1000
        stamps = [inner.stamp() for _ in range(2000)]
        assert stamps == sorted(stamps)
        assert stamps[-1] == inner.ceiling
        assert inner.stamps_stand_still
        inner.ceiling = 1 << 64
        assert inner.stamp() > stamps[-1]


async def test_a_loss_holds_the_disk_if_it_shall(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = new_disk(short_tmp, SIZE, after_loss="hold")
    start = start_recorder

    def lossy(*arguments: object) -> object:
        started = start(*arguments)  # type: ignore[arg-type]
        started.lost = Lost(17, 20, 1, 2)
        return started

    monkeypatch.setattr("cdp.recorder.process.start_recorder", lossy)
    async with recorder(short_tmp, config) as process:
        assert "17..20" in str(process.not_served())
    monkeypatch.undo()
    # It outlives a restart that loses nothing; only the administrator ends it.
    async with recorder(short_tmp, config) as process:
        assert "17..20" in str(process.not_served())
        process.holds.offer()
        assert process.not_served() is None
    assert not (short_tmp / HOLD_FILE).exists()
    async with recorder(short_tmp, config) as process:
        assert process.not_served() is None


@pytest.mark.parametrize(
    ("policy", "family", "held"),
    [("auto", "unix", False), ("auto", "tcp", True), ("offer", "tcp", False)],
)
async def test_a_client_that_outlives_a_crash_must_not_find_the_disk(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, policy: str, family: str, held: bool
) -> None:
    """! It counts on writes that were acknowledged and are gone."""
    config = new_disk(short_tmp, SIZE, after_loss=policy)
    start = start_recorder

    def lossy(*arguments: object) -> object:
        started = start(*arguments)  # type: ignore[arg-type]
        started.lost = Lost(17, 20, 1, 2)
        return started

    async with recorder(short_tmp, config) as process:
        async with clients(process, family):
            pass
        assert (short_tmp / NETWORK_FILE).exists() == (family == "tcp")
        monkeypatch.setattr(process.holds, "stopped_cleanly", lambda: None)  # it crashes
    monkeypatch.setattr("cdp.recorder.process.start_recorder", lossy)
    async with recorder(short_tmp, config) as process:
        assert (process.not_served() is not None) == held
        process.holds.offer()
    monkeypatch.undo()
    assert not (short_tmp / NETWORK_FILE).exists()  # a clean stop: nobody counts on more


async def test_a_crash_of_the_host_may_lose_what_left_no_trace(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = new_disk(short_tmp, SIZE, after_loss="hold")
    start = start_recorder

    def rebooted(*arguments: object) -> object:
        started = start(*arguments)  # type: ignore[arg-type]
        assert not started.rebooted
        started.rebooted = True
        return started

    monkeypatch.setattr("cdp.recorder.process.start_recorder", rebooted)
    async with recorder(short_tmp, config) as process:
        assert "may be lost" in str(process.not_served())


async def test_a_journal_that_cannot_be_recovered_is_a_failed_disk(
    short_tmp: Path, expect_log: Logged
) -> None:
    expect_log("CRITICAL .*cannot be started")
    config = new_disk(short_tmp, SIZE)
    async with recorder(short_tmp, config) as process:
        async with clients(process, "unix") as (client,):
            await client.write(0, bytes(4096))
    path = next((Path(config.journal) / "redo").iterdir())
    content = bytearray(path.read_bytes())
    header, _ = unpack_segment_header(bytes(content[:HEADER_PAGE]), file=path.name)
    content[:HEADER_PAGE] = pack_segment_header(header._replace(version=99))  # of the future
    path.write_bytes(content)
    async with recorder(short_tmp, config) as process:
        assert process.state == "failed"
        assert "format version" in str(process.reason)
        assert process.status()["served"] is False


# ------------------------------------------------------------------------------------- real kills
class Served:
    """`cdp.recorder.standalone` as a process of its own."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "s"
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cdp.recorder.standalone", "--disk-dir", str(directory / "d"),
             "--size", str(SIZE), "--nbd", str(self.socket)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert "ready" in self.process.stdout.readline()

    def connect(self) -> NbdClient:
        return NbdClient.connect(f"nbd+unix:///disk0?socket={self.socket}")

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def check(served: Served, model: bytearray, unsure: dict[int, bytes]) -> None:
    """Everything acknowledged is there; a write in flight may or may not be."""
    with served.connect() as client:
        content = client.read(0, SIZE)
    for offset, data in unsure.items():
        if content[offset : offset + len(data)] == data:
            model[offset : offset + len(data)] = data
    assert content == model


def write_until_the_end(
    served: Served, rng: random.Random, model: bytearray, unsure: dict[int, bytes]
) -> None:
    """Write and flush until the server dies; ``unsure`` is what was not acknowledged then."""
    with served.connect() as client:
        try:
            while True:
                offset = rng.randrange(SIZE - 20000)
                data = rng.randbytes(rng.choice([4096, rng.randrange(1, 20000)]))
                if rng.random() < 0.5:
                    offset -= offset % 4096
                unsure[offset] = data
                client.write(offset, data)
                model[offset : offset + len(data)] = data
                unsure.clear()
                if rng.random() < 0.1:
                    client.flush()
        except (OSError, RemoteProtocolError):
            pass


@pytest.mark.crash
def test_kill(short_tmp: Path, seed: int) -> None:
    """A killed process loses nothing that was acknowledged: the page cache has it."""
    rng = random.Random(seed)
    model = bytearray(SIZE)
    unsure: dict[int, bytes] = {}
    for _ in range(4):
        with Served(short_tmp) as served:
            check(served, model, unsure)
            unsure = {}
            writer = threading.Thread(target=write_until_the_end, args=(served, rng, model, unsure))
            writer.start()
            writer.join(rng.uniform(0.05, 0.4))
            served.process.kill()
            writer.join()
    with Served(short_tmp) as served:
        check(served, model, unsure)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(10) == 0
    with Served(short_tmp) as served:  # and after a clean stop
        check(served, model, {})


def test_the_wrong_export_is_refused(short_tmp: Path) -> None:
    with Served(short_tmp) as served:
        with pytest.raises(NbdNegotiationError, match="no such export"):
            NbdClient.connect(f"nbd+unix:///other?socket={served.socket}")
