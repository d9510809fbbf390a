"""The main job, end to end: protect, write, open any write of the past, copy out, roll back,
undo.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cdp.nbd.client import NbdClient, NbdServerError
from tests.interop.daemon import Daemon

MIB = 1 << 20
BLOCK = 4096


def fill(client: NbdClient, rng: random.Random, writes: int, size: int) -> list[bytearray]:
    """Random writes of any length; the disk after each."""
    disk = bytearray(client.read(0, size))
    states = [bytearray(disk)]
    for _ in range(writes):
        length = rng.choice((1, 512, 4096, 5000, 8192, 70_000))
        offset = rng.randrange(size - length)
        data = rng.randbytes(length)
        client.write(offset, data)
        disk[offset : offset + length] = data
        states.append(bytearray(disk))
    client.flush()
    return states


def test_every_write_can_be_opened_and_rolled_back_to(
    daemon: Daemon, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    size = 2 * MIB
    daemon.cdp("disk", "add", "disk0", "--size", str(size))
    with NbdClient.connect(daemon.uri("disk0")) as client:
        assert client.size == size
        states = fill(client, rng, 60, size)
        assert client.read(0, size) == states[-1]
    assert daemon.status("disk0")["durable_seq"] >= 60
    daemon.cdp("bookmark", "add", "disk0", "before")
    for seq in (0, 1, 17, 42, 60):
        with NbdClient.connect(daemon.uri(f"disk0@seq:{seq}")) as view:
            assert view.read(0, size) == states[seq], f"seq {seq}"
            with pytest.raises(NbdServerError):
                view.write(0, bytes(512))
    with NbdClient.connect(daemon.uri("disk0")) as client:
        client.write(0, b"\xff" * size)
        client.trim(0, MIB)
        client.flush()
    out = tmp_path / "restored.img"
    daemon.cdp("restore", "disk0", "--to", "seq:33", "--output", str(out))
    assert out.read_bytes() == states[33]
    daemon.cdp("rollback", "disk0", "--to", "before", "--yes")
    with NbdClient.connect(daemon.uri("disk0")) as client:
        assert client.read(0, size) == states[-1]
    wrecked = next(
        each for each in daemon.json("points", "disk0", "--from", "seq:62", "--to", "now")["points"]
    )
    assert wrecked["seq"] >= 62
    daemon.cdp("rollback", "disk0", "--to", "seq:63", "--yes")
    with NbdClient.connect(daemon.uri("disk0")) as client:
        assert client.read(0, size) == bytes(MIB) + b"\xff" * (size - MIB)
    daemon.cdp("rollback", "disk0", "--to", "seq:17", "--yes")
    assert daemon.stop() == 0
    backing = daemon.directory / "disks" / "disk0" / "backing.img"
    assert backing.read_bytes() == states[17]
    daemon.start()
    with NbdClient.connect(daemon.uri("disk0")) as client:
        assert client.read(0, size) == states[17]
    with NbdClient.connect(daemon.uri("disk0@before")) as view:
        assert view.read(0, size) == states[-1]


def test_an_existing_image_is_protected_in_place(daemon: Daemon, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    image = tmp_path / "old.img"
    old = rng.randbytes(3 * MIB + 512)
    image.write_bytes(old)
    daemon.cdp("disk", "add", "old", "--backing", str(image))
    with NbdClient.connect(daemon.uri("old")) as client:
        assert client.size == len(old)
        assert client.read(0, len(old)) == old
        client.write(len(old) - 512, b"\x11" * 512)
        client.write(0, b"\x22" * MIB)
        client.flush()
    daemon.cdp("disk", "drain", "old")
    with NbdClient.connect(daemon.uri("old@seq:0")) as view:
        assert view.read(0, len(old)) == old
    daemon.cdp("rollback", "old", "--to", "seq:0", "--yes")
    with NbdClient.connect(daemon.uri("old")) as client:
        assert client.read(0, len(old)) == old
    assert daemon.stop() == 0
    assert image.read_bytes() == old


def test_a_writable_view_is_thrown_away(daemon: Daemon) -> None:
    daemon.cdp("disk", "add", "d", "--size", "1M")
    with NbdClient.connect(daemon.uri("d")) as client:
        client.write(4096, b"\x05" * 4096)
        client.flush()
    view = daemon.json("view", "open", "d", "--at", "now", "--writable")
    with NbdClient.connect(view["uri"]) as client:
        client.write(4000, b"\x07" * 200)
        assert client.read(4000, 200) == b"\x07" * 200
        assert client.read(4200, 10) == b"\x05" * 10
    assert [each["id"] for each in daemon.json("view", "list")] == [view["id"]]
    daemon.cdp("view", "close", view["id"])
    assert daemon.json("view", "list") == []
    with NbdClient.connect(daemon.uri("d")) as client:
        assert client.read(4096, 4096) == b"\x05" * 4096
