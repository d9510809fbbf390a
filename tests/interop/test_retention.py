"""What is kept: the window by time, the journal's limit, bookmarks; and scrub, which checks it."""

from __future__ import annotations

import contextlib
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cdp.nbd.client import NbdClient, NbdNegotiationError, NbdServerError
from tests.interop.commands import Commands, eventually
from tests.interop.daemon import Daemon

MIB = 1 << 20
BLOCK = 4096


@pytest.fixture
def cdp(shared: Daemon) -> Commands:
    """`cdp` for the module's daemon."""
    return Commands(shared.directory)


def content(uri: str) -> bytes:
    """All of an export."""
    with NbdClient.connect(uri, timeout=60) as client:
        return client.read(0, client.size)


def journal_bytes(path: Path) -> int:
    """What a journal takes of its file system."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it was given up meanwhile
            total += file.stat().st_blocks * 512 if file.is_file() else 0
    return total


def test_the_window_is_what_was_asked_for(shared: Daemon, cdp: Commands) -> None:
    cdp("disk", "add", "timed", "--size", "1M", "--segment-bytes", "1M")
    with NbdClient.connect(shared.uri("timed"), timeout=60) as client:
        for number in range(600):
            client.write(number % 256 * BLOCK, number.to_bytes(4, "big") * 1024)
            if number == 299:
                cdp("bookmark", "add", "timed", "early")
        client.flush()
    last = cdp.disk("timed")["durable_seq"]
    assert cdp.disk("timed")["window_start_seq"] == 0
    assert content(shared.uri("timed@seq:1"))[:4] == bytes(4)
    early = content(shared.uri("timed@early"))
    cdp("disk", "set", "timed", "window=0.2s")
    eventually(lambda: cdp.disk("timed")["window_start_seq"] >= last - 1, lambda: cdp.disk("timed"))
    disk = cdp.disk("timed")
    assert disk["window_configured"] == 0.2
    says = "is not kept; openable: seq:.*nearest bookmarks: early"
    cdp.refused("view", "open", "timed", "--at", "seq:5", says=says)
    with pytest.raises(NbdNegotiationError, match="is not kept"):
        NbdClient.connect(shared.uri("timed@seq:5"), timeout=60)
    assert content(shared.uri("timed@early")) == early
    cdp("disk", "set", "timed", "window=1h")
    with NbdClient.connect(shared.uri("timed"), timeout=60) as client:
        client.write(0, b"\xaa" * BLOCK)
        client.write(0, b"\xbb" * BLOCK)
        client.flush()
    now = cdp.disk("timed")["last_seq"]
    assert content(shared.uri(f"timed@seq:{now - 1}"))[:BLOCK] == b"\xaa" * BLOCK
    cdp("bookmark", "remove", "timed", "early")
    cdp.refused("view", "open", "timed", "--at", "early", says="no bookmark 'early'")
    cdp("disk", "remove", "timed", "--purge")


def test_a_small_journal_keeps_its_limit_and_the_newest_points(
    shared: Daemon, cdp: Commands, seed: int
) -> None:
    rng = random.Random(seed)
    limit, size, chunk = 16 * MIB, 2 * MIB, 64 << 10
    words = ["--size", str(size), "--segment-bytes", "1M", "--journal-limit", str(limit)]
    cdp("disk", "add", "small", *words)
    journal = Path(cdp.disk("small")["journal"])
    with NbdClient.connect(shared.uri("small"), timeout=60) as client:
        client.write(0, rng.randbytes(size))
        cdp("bookmark", "add", "small", "far-back")
        far_back = client.read(0, size)
        disk = bytearray(far_back)
        most = 0
        recent: list[bytes] = []
        for number in range(6 * limit // chunk):
            offset = rng.randrange(size // chunk) * chunk
            data = rng.randbytes(1024) * (chunk // 1024)
            client.write(offset, data)
            disk[offset : offset + chunk] = data
            recent = [*recent[-9:], bytes(disk)]
            if number % 16 == 15:
                most = max(most, journal_bytes(journal))
            if number % 160 == 159:
                client.flush()
        client.flush()
    last = cdp.disk("small")["durable_seq"]
    for back, expected in enumerate(reversed(recent)):
        if back % 3 == 0:
            assert content(shared.uri(f"small@seq:{last - back}")) == expected, back
    assert content(shared.uri("small@far-back")) == far_back
    assert most <= 1.1 * limit, f"the journal took {most / MIB:.1f} MiB"
    described = cdp.disk("small")
    assert described["window_start_seq"] > 100
    assert described["state"] in ("served", "throttled")
    cdp.refused("view", "open", "small", "--at", "seq:100", says="is not kept; openable: ")
    assert cdp.json("scrub", "small")["damaged"] == []
    cdp("rollback", "small", "--to", "far-back", "--yes")
    assert content(shared.uri("small")) == far_back
    cdp("disk", "remove", "small", "--purge")


def test_pins_alone_throttle(shared: Daemon, cdp: Commands, seed: int) -> None:
    """When only bookmarks are left, writes are held back until there is room; nothing is lost."""
    rng = random.Random(seed)
    size, chunk = 4 * MIB, 256 << 10
    words = ["--size", str(size), "--segment-bytes", "1M", "--journal-limit", "8M"]
    cdp("disk", "add", "pinned", *words)
    states = []
    with NbdClient.connect(shared.uri("pinned"), timeout=60) as client:
        for number in range(2):
            for offset in range(0, size, chunk):
                client.write(offset, rng.randbytes(chunk))
            client.flush()
            cdp("bookmark", "add", "pinned", f"mark-{number}")
            states.append(client.read(0, size))
    for number, state in enumerate(states):
        assert content(shared.uri(f"pinned@mark-{number}")) == state
    with (
        NbdClient.connect(shared.uri("pinned"), timeout=60) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        data = rng.randbytes(2 * size)

        def write() -> None:
            for offset in range(0, 2 * size, chunk):
                client.write(offset % size, data[offset : offset + chunk])
            client.flush()

        writing = thread.submit(write)
        says = "at its limit and only pinned points are left: remove bookmarks"
        disk = eventually(
            lambda: says in ((disk := cdp.disk("pinned"))["reason"] or "") and disk,
            lambda: cdp.disk("pinned"),
        )
        assert disk["state"] == "throttled"
        assert not writing.done()
        cdp("disk", "set", "pinned", "journal-limit=64M")
        writing.result(60)
    for number, state in enumerate(states):
        assert content(shared.uri(f"pinned@mark-{number}")) == state
    cdp("disk", "remove", "pinned", "--purge")


def test_scrub_finds_what_is_damaged(shared: Daemon, cdp: Commands) -> None:
    cdp("disk", "add", "hurt", "--size", "4M", "--segment-bytes", "1M")
    with NbdClient.connect(shared.uri("hurt"), timeout=60) as client:
        for number in range(1, 601):
            client.write(number * BLOCK, number.to_bytes(4, "big") * 1024)
        client.write(77 * BLOCK, b"\x01" * BLOCK)
        client.flush()
    cdp("disk", "drain", "hurt")
    assert cdp.json("scrub", "hurt")["damaged"] == []
    (record,) = cdp.json("journal", "dump", "hurt", "--from", "seq:77", "--to", "seq:77")
    assert (record["seq"], record["kind"]) == (77, "write")
    journal = Path(cdp.disk("hurt")["journal"])
    with (journal / record["file"]).open("r+b") as file:
        file.seek(record["file_offset"] + 100)
        file.write(b"\xff\xff")
    ran = cdp.run("scrub", "hurt", "--json")
    assert ran.status == 3
    assert "1 damaged places; 0 repaired; 1 cost content, points that need it fail" in ran.err
    (damaged,) = json.loads(ran.out)["damaged"]
    assert damaged["effect"] == "lost"
    assert damaged["file"] == record["file"]
    assert (damaged["first_seq"], damaged["last_seq"]) == (77, 77)
    low, high = record["file_offset"], record["file_offset"] + BLOCK
    assert low <= damaged["offset"] < high
    assert damaged["from_time"] == pytest.approx(record["time"], abs=0.001)
    for seq, block, readable in [
        (76, 77, True), (77, 77, False), (300, 77, False), (77, 76, True), (300, 200, True),
        (601, 77, True),
    ]:  # fmt: skip
        with NbdClient.connect(shared.uri(f"hurt@seq:{seq}"), timeout=60) as view:
            if readable:
                assert len(view.read(block * BLOCK, BLOCK)) == BLOCK
            else:
                with pytest.raises(NbdServerError):
                    view.read(block * BLOCK, BLOCK)
    assert content(shared.uri("hurt"))[77 * BLOCK : 78 * BLOCK] == b"\x01" * BLOCK
    assert content(shared.uri("hurt@now"))[77 * BLOCK : 78 * BLOCK] == b"\x01" * BLOCK
    output = str(shared.directory / "out.img")
    says = "reading hurt failed .*look with 'cdp scrub hurt'"
    cdp.refused("restore", "hurt", "--to", "seq:300", "--output", output, says=says)
    assert not Path(output).exists()
    status = cdp.run("scrub", "hurt", "--status", "--json")
    assert (status.status, json.loads(status.out)["last"]["damaged"]) == (3, [damaged])
    assert cdp.disk("hurt")["scrub"]["last"]["lost"] == 1
    cdp("disk", "remove", "hurt", "--purge")


def test_scrub_repairs_what_lies_twice(shared: Daemon, cdp: Commands) -> None:
    """A copy of the catalog and a run of the index are damaged under a daemon that goes on."""
    cdp("disk", "add", "twice", "--size", "4M", "--segment-bytes", "1M")
    with NbdClient.connect(shared.uri("twice"), timeout=60) as client:
        for number in range(1, 601):
            client.write(number * BLOCK, number.to_bytes(4, "big") * 1024)
        client.flush()
    cdp("disk", "drain", "twice")
    journal = Path(cdp.disk("twice")["journal"])
    runs = eventually(lambda: sorted((journal / "index").glob("redo-*.run")), lambda: None)
    for path, offset in ((journal / "catalog.1", 100), (runs[0], runs[0].stat().st_size - 9)):
        with path.open("r+b") as file:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 0x10]))
    ran = cdp.run("scrub", "twice", "--json")
    assert ran.status == 3
    damaged = json.loads(ran.out)["damaged"]
    found = {(each["file"], each["effect"]) for each in damaged}
    assert found == {("catalog.1", "repaired"), (f"index/{runs[0].name}", "repaired")}
    assert cdp.json("scrub", "twice")["damaged"] == []
    with NbdClient.connect(shared.uri("twice@seq:300"), timeout=60) as view:
        assert view.read(300 * BLOCK, BLOCK) == (300).to_bytes(4, "big") * 1024
        assert view.read(301 * BLOCK, BLOCK) == bytes(BLOCK)
    cdp("disk", "remove", "twice", "--purge")


def test_scrub_in_the_background(shared: Daemon, cdp: Commands) -> None:
    cdp("disk", "add", "slowly", "--size", "16M")
    with NbdClient.connect(shared.uri("slowly"), timeout=60) as client:
        for number in range(64):
            client.write(number * 128 * 1024, bytes([number]) * 128 * 1024)
        client.flush()
    cdp("disk", "set", "slowly", "scrub-interval=30d", "scrub-rate=1M")
    disk = cdp.disk("slowly")
    assert (disk["scrub_interval_seconds"], disk["scrub_rate"]) == (30 * 86400, MIB)
    cdp("scrub", "slowly", "--no-wait")
    eventually(
        lambda: (cdp.json("scrub", "slowly", "--status")["running"] or {}).get("done"),
        lambda: cdp.json("scrub", "slowly", "--status"),
    )
    cdp("scrub", "slowly", "--stop")
    assert cdp.json("scrub", "slowly", "--status")["running"] is None
    cdp.refused("scrub", "slowly", "--stop", says="no scrub runs")
    cdp("scrub", "slowly", "--no-wait")
    assert cdp.json("scrub", "slowly", "--rate", "none")["checked_bytes"] >= 8 * MIB
    cdp("disk", "remove", "slowly", "--purge")
