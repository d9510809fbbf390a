"""A disk's life in an administrator's hands: resize, set, release, foreign writes, remove."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdp.nbd.client import NbdClient, NbdNegotiationError, NbdServerError
from tests.interop.commands import Commands, eventually
from tests.interop.daemon import Daemon
from tests.interop.devices import loop_device

MIB = 1 << 20
BLOCK = 4096
SIZE = MIB


@pytest.fixture
def cdp(shared: Daemon) -> Commands:
    """`cdp` for the module's daemon."""
    return Commands(shared.directory)


def write(uri: str, *blocks: tuple[int, int]) -> None:
    """Fill blocks with a byte each, flushed."""
    with NbdClient.connect(uri, timeout=60) as client:
        for block, value in blocks:
            client.write(block * BLOCK, bytes([value]) * BLOCK)
        client.flush()


def read(uri: str, *blocks: int) -> list[int]:
    """The byte that each block is filled with."""
    found = []
    with NbdClient.connect(uri, timeout=60) as client:
        for block in blocks:
            data = client.read(block * BLOCK, BLOCK)
            assert data == data[:1] * BLOCK
            found.append(data[0])
    return found


# ----------------------------------------------------------------------------------------- removing


def test_remove_leaves_a_complete_and_plain_backing(
    shared: Daemon, cdp: Commands, tmp_path: Path, seed: int
) -> None:
    image, journal = tmp_path / "image", tmp_path / "journal"
    disk = bytearray(random.Random(seed).randbytes(SIZE))
    image.write_bytes(disk)
    words = ["removed", "--backing", str(image), "--journal", str(journal)]
    cdp("disk", "add", *words)
    with NbdClient.connect(shared.uri("removed"), timeout=60) as client:
        for block in range(0, 200, 3):
            client.write(block * BLOCK, bytes([block % 251]) * BLOCK)
            disk[block * BLOCK : (block + 1) * BLOCK] = bytes([block % 251]) * BLOCK
        client.trim(100 * BLOCK, 20 * BLOCK)
        disk[100 * BLOCK : 120 * BLOCK] = bytes(20 * BLOCK)
        client.write(110 * BLOCK, b"\x01" * 512)
        disk[110 * BLOCK : 110 * BLOCK + 512] = b"\x01" * 512
        cdp.refused("disk", "remove", "removed", says="in use by 1 connection.*stop what uses it")
    view = cdp.json("view", "open", "removed", "--at", "now")
    cdp.refused("disk", "remove", "removed", says="1 view")
    cdp("view", "close", view["id"])
    cdp("disk", "remove", "removed", "--purge")
    assert image.read_bytes() == disk, "only what the daemon made is purged"
    assert list(journal.iterdir()) == [] if journal.exists() else True
    assert not (shared.directory / "disks" / "removed").exists()
    cdp.refused("status", "removed", says="no disk 'removed'")
    with pytest.raises(NbdNegotiationError, match="no disk 'removed'"):
        NbdClient.connect(shared.uri("removed"), timeout=60)
    cdp("disk", "add", *words)
    assert cdp.json("bookmark", "list", "removed") == []
    with NbdClient.connect(shared.uri("removed"), timeout=60) as client:
        assert client.read(0, SIZE) == disk
    cdp("disk", "remove", "removed")


def test_remove_with_and_without_purge(shared: Daemon, cdp: Commands) -> None:
    backing = shared.directory / "disks" / "own" / "backing.img"
    cdp("disk", "add", "own", "--size", str(SIZE))
    write(shared.uri("own"), (7, 7))
    cdp("disk", "remove", "own")
    assert backing.read_bytes() == bytes(7 * BLOCK) + b"\x07" * BLOCK + bytes(SIZE - 8 * BLOCK)
    says = "is left of an earlier disk: name it with --backing .*or delete it"
    cdp.refused("disk", "add", "own", "--size", str(SIZE), says=says)
    cdp("disk", "add", "own", "--backing", str(backing))
    assert read(shared.uri("own"), 7) == [7]
    cdp("disk", "remove", "own")
    backing.unlink()
    cdp("disk", "add", "own", "--size", str(SIZE))
    journal = shared.directory / "disks" / "own" / "journal"
    eventually((journal / "reserve").exists, lambda: list(journal.iterdir()))
    cdp("disk", "remove", "own", "--purge")
    assert not backing.parent.exists()


def test_remove_with_force_disconnects(shared: Daemon, cdp: Commands) -> None:
    cdp("disk", "add", "forced", "--size", str(SIZE))
    with NbdClient.connect(shared.uri("forced"), timeout=60) as client:
        client.write(0, b"\x09" * BLOCK)
        cdp("view", "open", "forced", "--at", "now")
        cdp("disk", "remove", "forced", "--force")
        with pytest.raises((OSError, EOFError, NbdServerError)):
            client.read(0, BLOCK)
    backing = shared.directory / "disks" / "forced" / "backing.img"
    assert backing.read_bytes()[:BLOCK] == b"\x09" * BLOCK
    backing.unlink()


# ----------------------------------------------------------------------------------------- resizing


def test_resize(shared: Daemon, cdp: Commands) -> None:
    cdp("disk", "add", "sized", "--size", "1M")
    uri = shared.uri("sized")
    write(uri, (255, 1))
    cdp("bookmark", "add", "sized", "small")
    with NbdClient.connect(uri, timeout=60) as client:
        assert cdp.json("disk", "resize", "sized", "2M")["size"] == 2 * MIB
        assert client.read(255 * BLOCK, BLOCK) == b"\x01" * BLOCK
        client.size = 2 * MIB  # a client that hears of it goes on in the same connection
        client.write(MIB, b"\x02" * BLOCK)
        client.flush()
        says = r"in use by 1 connection\(s\), which know its size: stop what uses it"
        cdp.refused("disk", "resize", "sized", "1M", says=says)
    assert read(uri, 255, 256, 511) == [1, 2, 0]
    with NbdClient.connect(shared.uri("sized@small"), timeout=60) as view:
        assert view.size == MIB
        with pytest.raises(NbdServerError):
            view.read(MIB, BLOCK)
    cdp("bookmark", "add", "sized", "large")

    cdp("disk", "resize", "sized", "512K")
    with NbdClient.connect(uri, timeout=60) as client:
        assert client.size == MIB // 2
        with pytest.raises(NbdServerError):
            client.read(MIB // 2, BLOCK)
    with NbdClient.connect(shared.uri("sized@large"), timeout=60) as view:
        assert view.size == 2 * MIB
    assert read(shared.uri("sized@large"), 255, 256, 511) == [1, 2, 0]
    words = ["rollback", "sized", "--to", "large", "--yes"]
    cdp.refused(*words, says="2 MiB .* 512 KiB .*cdp disk resize")
    # What lay beyond the end was kept.
    cdp("disk", "resize", "sized", "2M")
    assert read(uri, 255, 256, 511) == [1, 2, 0]
    write(uri, (256, 5))
    cdp(*words)
    assert read(uri, 255, 256, 511) == [1, 2, 0]
    assert cdp.disk("sized")["size"] == 2 * MIB
    cdp("disk", "remove", "sized", "--purge")


# ----------------------------------------------------------------------------------------- settings


def test_settings_hold_and_outlive_the_daemon(short_tmp: Path) -> None:
    with Daemon(short_tmp / "state") as daemon:
        cdp = Commands(daemon.directory)
        words = ["--window", "2d", "--journal-limit", "300M", "--segment-bytes", "2M"]
        cdp("disk", "add", "d", "--size", str(SIZE), *words)
        disk = cdp.json("disk", "set", "d", "sync-age=0.5s", "tail=128M", "after-loss=hold")
        expected = {
            "window_configured": 172_800, "journal_limit": 300 * MIB, "segment_bytes": 2 * MIB,
            "sync_age_seconds": 0.5, "tail_bytes": 128 * MIB, "after_loss": "hold",
            "overflow": "shrink",
        }  # fmt: skip
        assert {key: disk[key] for key in expected} == expected
        cdp("disk", "set", "d", "window=none", "overflow=throttle")
        expected |= {"window_configured": None, "overflow": "throttle"}
        write(daemon.uri("d"), (1, 1))
        cdp("bookmark", "add", "d", "b")
        before = cdp.json("bookmark", "list", "d"), cdp.json("points", "d")
        assert daemon.stop() == 0
        daemon.start()
        disk = cdp.disk("d")
        assert {key: disk[key] for key in expected} == expected
        assert (cdp.json("bookmark", "list", "d"), cdp.json("points", "d")) == before
        assert read(daemon.uri("d@b"), 1) == [1]
        write(daemon.uri("d"), (1, 2))
        assert read(daemon.uri("d@b"), 1) == [1]
        assert cdp.json("disk", "drain", "d")["applied_seq"] == cdp.disk("d")["durable_seq"]


# ----------------------------------------------------------------------- the backing in other hands


def stray_write(backing: Path, block: int, value: int) -> None:
    """Somebody writes to a backing behind the daemon's back."""
    with backing.open("r+b") as file:
        file.seek(block * BLOCK)
        file.write(bytes([value]) * BLOCK)
        os.fsync(file.fileno())


def test_release_use_resume(shared: Daemon, cdp: Commands, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    cdp("disk", "add", "lent", "--backing", str(image))
    uri = shared.uri("lent")
    write(uri, (0, 1), (1, 1), (2, 1))
    cdp("bookmark", "add", "lent", "one")
    write(uri, (0, 2), (3, 2))
    cdp("rollback", "lent", "--to", "one", "--yes")
    with NbdClient.connect(uri, timeout=60) as client:
        client.trim(2 * BLOCK, BLOCK)
        cdp.refused("disk", "release", "lent", says="in use by 1 connection")
    out = cdp("disk", "release", "lent")
    assert "cdp disk resume lent --unchanged" in out
    assert image.read_bytes() == b"\x01" * 2 * BLOCK + bytes(SIZE - 2 * BLOCK), "plain, complete"
    assert cdp.disk("lent")["state"] == "released"
    for words in (["disk", "drain"], ["disk", "release"], ["points"], ["scrub"],
                  ["bookmark", "list"]):  # fmt: skip
        cdp.refused(*words, "lent", says="lent is released: take it back with 'cdp disk resume'")
    with pytest.raises(NbdNegotiationError, match="is released"):
        NbdClient.connect(uri, timeout=60)
    cdp.refused("disk", "resume", "lent", says="say --unchanged or --give-up-history", status=2)

    assert image.read_bytes()[:BLOCK] == b"\x01" * BLOCK
    cdp("disk", "resume", "lent", "--unchanged")
    assert read(uri, 0, 1, 2, 3) == [1, 1, 0, 0]
    assert read(shared.uri("lent@one"), 0, 1, 2, 3) == [1, 1, 1, 0]
    write(uri, (4, 4))
    assert read(shared.uri("lent@now"), 0, 1, 2, 3, 4) == [1, 1, 0, 0, 4]

    cdp("disk", "release", "lent")
    stray_write(image, 0, 9)
    stray_write(image, 5, 9)
    cdp("disk", "resume", "lent", "--give-up-history")
    assert read(uri, 0, 1, 2, 3, 4, 5) == [9, 1, 0, 0, 4, 9]
    assert read(shared.uri("lent@now"), 0, 1, 2, 3, 4, 5) == [9, 1, 0, 0, 4, 9]
    assert cdp.json("bookmark", "list", "lent") == []
    first = cdp.disk("lent")["window_start_seq"]
    for seq in range(first):
        says = "is not kept|lies in a gap"
        cdp.refused("view", "open", "lent", "--at", f"seq:{seq}", says=says)
    cdp("bookmark", "add", "lent", "after")
    write(uri, (0, 10), (1, 10))
    cdp("disk", "drain", "lent")
    assert read(shared.uri("lent@after"), 0, 1, 2, 3, 4, 5) == [9, 1, 0, 0, 4, 9]
    cdp("rollback", "lent", "--to", "after", "--yes")
    assert read(uri, 0, 1, 2, 3, 4, 5) == [9, 1, 0, 0, 4, 9]
    cdp("disk", "remove", "lent")
    assert image.read_bytes()[:BLOCK] == b"\x09" * BLOCK


@pytest.mark.parametrize("decision", ["--unchanged", "--give-up-history"])
def test_a_foreign_write_while_the_daemon_is_stopped(
    daemon: Daemon, tmp_path: Path, decision: str
) -> None:
    cdp = Commands(daemon.directory)
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    cdp("disk", "add", "d", "--backing", str(image))
    cdp("disk", "add", "other", "--size", str(SIZE))
    write(daemon.uri("d"), (0, 1), (9, 1))
    cdp("bookmark", "add", "d", "one")
    write(daemon.uri("d"), (0, 2))
    assert daemon.stop() == 0
    stray_write(image, 0, 7)
    daemon.start()
    disk = cdp.disk("d")
    assert (disk["state"], disk["served"]) == ("failed", False)
    assert "was changed while cdpd did not run" in disk["reason"]
    assert "cdp disk resume d" in disk["reason"]
    assert cdp.disk("other")["state"] == "served"
    with pytest.raises(NbdNegotiationError, match="cdp disk resume"):
        NbdClient.connect(daemon.uri("d"), timeout=60)
    for words in (["rollback", "d", "--to", "one", "--yes"], ["bookmark", "add", "d", "x"],
                  ["disk", "drain", "d"], ["disk", "remove", "d"]):  # fmt: skip
        cdp.refused(*words, says="was changed while cdpd did not run.*cdp disk resume d")
    assert cdp.run("doctor").status == 1
    assert image.read_bytes()[:BLOCK] == b"\x07" * BLOCK, "nothing is applied before the decision"
    cdp("disk", "resume", "d", decision)
    eventually(lambda: cdp.disk("d")["state"] == "served", lambda: cdp.disk("d"))
    assert read(daemon.uri("d"), 0, 9) == [7, 1]
    if decision == "--give-up-history":
        assert cdp.json("bookmark", "list", "d") == []
        assert read(daemon.uri("d@now"), 0, 9) == [7, 1]
        cdp.refused("view", "open", "d", "--at", "seq:1", says="is not kept")
    else:
        assert read(daemon.uri("d@one"), 9) == [1]
    write(daemon.uri("d"), (1, 3))
    assert read(daemon.uri("d@now"), 0, 1, 9)[1:] == [3, 1]
    assert daemon.stop() == 0
    daemon.start()
    assert cdp.disk("d")["state"] == "served"
    assert read(daemon.uri("d"), 0, 1, 9) == [7, 3, 1]


def test_a_backing_that_became_too_small_is_not_served(daemon: Daemon, tmp_path: Path) -> None:
    cdp = Commands(daemon.directory)
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    cdp("disk", "add", "d", "--backing", str(image))
    write(daemon.uri("d"), (255, 1))
    for stop in (daemon.stop, lambda: cdp("disk", "release", "d")):
        stop()
        os.truncate(image, SIZE // 2)
        if daemon.process is None:
            daemon.start()
            assert cdp.disk("d")["served"] is False
        cdp.refused("disk", "resume", "d", "--unchanged", says=f"{SIZE // 2} bytes, .*enlarge it")
        os.truncate(image, SIZE)
        cdp("disk", "resume", "d", "--give-up-history")
        eventually(lambda: cdp.disk("d")["state"] == "served", lambda: cdp.disk("d"))
        write(daemon.uri("d"), (255, 2))
        assert read(daemon.uri("d"), 255) == [2]


# ------------------------------------------------------------------------------------ several disks


class Pair:
    """Writes numbers to two disks alternately, each after the other was acknowledged."""

    def __init__(self, a: str, b: str) -> None:
        self._uris, self._stop = (a, b), threading.Event()
        self.written = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with NbdClient.connect(self._uris[0], timeout=60) as a:
            with NbdClient.connect(self._uris[1], timeout=60) as b:
                while not self._stop.is_set():
                    self.written += 1
                    for client in (a, b):
                        client.write(0, self.written.to_bytes(8, "big"))

    def goes_on(self) -> None:
        """Until some more has been written."""
        low = self.written
        eventually(lambda: self.written > low + 30, "nothing is written")

    def __enter__(self) -> Pair:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)


def number(uri: str) -> int:
    """The number that a disk holds."""
    with NbdClient.connect(uri, timeout=60) as client:
        return int.from_bytes(client.read(0, 8), "big")


def test_an_instant_is_one_cut_across_disks(shared: Daemon, cdp: Commands) -> None:
    for name in ("a", "b"):
        cdp("disk", "add", name, "--size", str(SIZE))
    bounds = []
    with Pair(shared.uri("a"), shared.uri("b")) as pair:
        for label in ("first", "second", "third"):
            before = pair.written
            marks = cdp.json("bookmark", "add", "a,b", label)
            bounds.append((label, before, pair.written))
            assert {mark["disk"] for mark in marks} == {"a", "b"}
            pair.goes_on()
        moment = cdp.json("status")["disks"][0] and _time(cdp)
        at_moment = pair.written
        pair.goes_on()
    for label, low, high in bounds:
        on_a, on_b = number(shared.uri(f"a@{label}")), number(shared.uri(f"b@{label}"))
        assert on_a - on_b in (0, 1), "b holds what a does not hold yet"
        assert low - 1 <= on_b <= on_a <= high
    for spec in (f"@{moment}", "second"):
        done = cdp.json("rollback", "a,b", "--to", spec, "--yes")["rollbacks"]
        assert [each["disk"] for each in done] == ["a", "b"]
        on_a, on_b = number(shared.uri("a")), number(shared.uri("b"))
        assert on_a - on_b in (0, 1)
    assert (on_a, on_b) == (number(shared.uri("a@second")), number(shared.uri("b@second")))
    undo = {each["disk"]: each["undo_with"] for each in done}
    cdp("rollback", "a", "--to", undo["a"], "--yes")
    assert number(shared.uri("a")) <= at_moment + 1
    for name in ("a", "b"):
        cdp("disk", "remove", name, "--purge")


def _time(cdp: Commands) -> str:
    """Now, as the daemon sees it."""
    points: dict[str, Any] = cdp.json("timeline", "a", "--buckets", "1")
    return f"{points['to']:.6f}"


# -------------------------------------------------------------------------------------------- views


def test_views_end_when_they_are_too_old_and_with_their_last_connection(short_tmp: Path) -> None:
    config = short_tmp / "cdpd.toml"
    config.write_text('[limits]\nview-age = "8s"\nviews = 3\nview-overlay = "64KiB"\n')
    with Daemon(short_tmp / "state", "--config", str(config)) as daemon:
        cdp = Commands(daemon.directory)
        cdp("disk", "add", "d", "--size", str(SIZE))
        write(daemon.uri("d"), (0, 1))
        with NbdClient.connect(daemon.uri("d@seq:1"), timeout=60) as one:
            with NbdClient.connect(daemon.uri("d@seq:1"), timeout=60):
                assert len(cdp.json("view", "list")) == 1, "equal points share a view"
            assert one.read(0, BLOCK) == b"\x01" * BLOCK
            assert len(cdp.json("view", "list")) == 1
        eventually(lambda: cdp.json("view", "list") == [], "a view outlives its connections")
        view = cdp.json("view", "open", "d", "--at", "now", "--writable")
        for _ in range(2):
            cdp("view", "open", "d", "--at", "seq:1")
        cdp.refused("view", "open", "d", "--at", "seq:1", says="3 views are open, .*close one")
        assert len(cdp.json("view", "list")) == 3
        with NbdClient.connect(view["uri"], timeout=60) as client:
            with pytest.raises(NbdServerError, match=r"No space left|28"):
                for block in range(200):
                    client.write(block * BLOCK, b"\x05" * BLOCK)
            assert client.read(0, 1) == b"\x05"
        assert read(daemon.uri("d"), 0) == [1]
        eventually(lambda: cdp.json("view", "list") == [], "old views are kept")
        assert json.loads(cdp("timeline", "d", "--json"))["pins"] == []


def test_what_the_api_offers_a_device_that_is_too_small(
    shared: Daemon, cdp: Commands, tmp_path: Path, not_here: Callable[[str], Any]
) -> None:
    """A disk on a device cannot become larger than it."""

    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        not_here("needs root and loop devices")
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    with loop_device(image) as device:
        cdp("disk", "add", "device", "--backing", device)
        write(shared.uri("device"), (255, 1))
        says = f"{device} has {SIZE} bytes, {2 * SIZE} are needed: enlarge it"
        cdp.refused("disk", "resize", "device", "2M", says=says)
        assert cdp.disk("device")["size"] == SIZE
        cdp("disk", "remove", "device")
    assert image.read_bytes()[255 * BLOCK :] == b"\x01" * BLOCK
