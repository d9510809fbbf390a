"""Restoring: what is copied and what stays a hole, and what is left when it fails."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdp.cli import image, restore
from cdp.cli.output import CliError
from cdp.nbd.client import format_uri
from tests.cdp.cli.conftest import Cdp
from tests.cdp.cli.fake_api import NOW, FakeApi, disk

MIB = 1 << 20
UNIT = image.ZERO_UNIT


# ----------------------------------------------------------------------------------- what is copied
@dataclass
class Memory:
    """A source whose content is known; ``zeroes``: the ranges it declares to be zero."""

    content: bytes
    zeroes: list[tuple[int, int]] | None = None
    max_payload: int = 3 * UNIT
    reads: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.size = len(self.content)

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """One extent a change."""
        if self.zeroes is None:
            raise ValueError("not negotiated")
        flags = bytearray(length)
        for first, count in self.zeroes:
            for at in range(max(first, offset), min(first + count, offset + length)):
                flags[at - offset] = 3
        extents: list[tuple[int, int]] = []
        for flag in flags:
            if extents and extents[-1][1] == flag:
                extents[-1] = (extents[-1][0] + 1, flag)
            else:
                extents.append((1, flag))
        return extents

    def read_many(
        self, requests: Iterable[tuple[int, int]], depth: int = 1
    ) -> Iterator[tuple[int, bytes]]:
        """In order."""
        assert depth > 1
        for offset, length in requests:
            assert 0 < length <= self.max_payload
            self.reads.append((offset, length))
            yield offset, self.content[offset : offset + length]


class Target:
    """A sink that begins as old content, and says what it was told."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(b"?" * size)
        self.written = 0

    def write(self, offset: int, data: memoryview) -> None:
        """Content."""
        self.written += len(data)
        self.content[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        """Zeroes."""
        self.content[offset : offset + length] = bytes(length)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 2 * UNIT)), min_size=1, max_size=8),
    st.booleans(),
)
def test_everything_arrives(parts: list[tuple[bool, int]], declared: bool) -> None:
    content, zeroes = bytearray(), []
    for is_zero, length in parts:
        if is_zero and declared:
            zeroes.append((len(content), length))
        content += bytes(length) if is_zero else b"x" * length
    source = Memory(bytes(content), zeroes)
    target = Target(source.size)
    done: list[int] = []
    image.copy(source, target, done.append)
    assert target.content == content
    assert done == sorted(done)
    assert done[-1] == source.size


def test_what_is_zero_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "STATUS_BYTES", 4 * UNIT)
    content = b"a" * UNIT + bytes(5 * UNIT) + b"b" * UNIT
    source = Memory(content, [(UNIT, 5 * UNIT)])
    image.copy(source, Target(len(content)), lambda _: None)
    assert source.reads == [(0, UNIT), (6 * UNIT, UNIT)]


def test_zeroes_that_nobody_declared_are_not_written() -> None:
    content = b"a" * UNIT + bytes(5 * UNIT) + b"b" * 100
    target = Target(len(content))
    image.copy(Memory(content), target, lambda _: None)
    assert target.content == content
    assert target.written == UNIT + 100


def test_an_empty_disk() -> None:
    image.copy(Memory(b""), Target(0), lambda _: None)


# -------------------------------------------------------------------------------- whole commands
@dataclass(frozen=True)
class Server:
    """An NBD server with a sparse image, as the view that the daemon would open."""

    content: bytes
    uri: str


@pytest.fixture
def server(api: FakeApi, short_tmp: Path, need_tool: Callable[[str], str]) -> Iterator[Server]:
    """8 MiB and a bit with two holes; the API opens views of it."""
    nbdkit = need_tool("nbdkit")
    content = bytearray(8 * MIB + 512)
    noise = random.Random(5)
    for offset, length in ((0, MIB), (3 * MIB + 4096, 8192), (8 * MIB - 512, 1024)):
        content[offset : offset + length] = noise.randbytes(length)
    backing, socket, pid = (short_tmp / name for name in ("backing", "view.sock", "pid"))
    with backing.open("wb") as file:
        file.truncate(len(content))
        for offset in range(0, len(content), 4096):
            part = content[offset : offset + 4096]
            if any(part):
                file.seek(offset)
                file.write(part)
    # It goes to the background when it listens.
    subprocess.run([nbdkit, "-r", "-U", socket, "-P", pid, "file", backing], check=True)
    uri = format_uri("", socket_path=socket)
    point = {"seq": 17, "stamp": 1, "time": NOW, "spec": "seq:17"}
    api.answer("POST", "/v1/disks/disk0/resolve", point)
    api.answer("GET", "/v1/disks/disk0", disk("disk0", size=len(content)))
    view = {"id": "v1", "disk": "disk0", "seq": 17, "time": NOW, "uri": uri, "writable": False}
    api.answer("POST", "/v1/disks/disk0/views", view, 201)
    api.answer("DELETE", "/v1/views/v1", {})
    api.answer("GET", "/v1/disks", {"disks": [disk("disk0")]})
    yield Server(bytes(content), uri)
    os.kill(int(pid.read_text()), signal.SIGTERM)


def views_closed(api: FakeApi) -> bool:
    """Whether every view that was opened was closed."""
    opened = len(api.asked("POST", "/v1/disks/disk0/views"))
    return opened == len(api.asked("DELETE", "/v1/views/v1"))


def test_restore(cdp: Cdp, api: FakeApi, server: Server, tmp_path: Path) -> None:
    output = tmp_path / "old.img"
    ran = cdp("restore", "disk0", "--to", "seq:17", "--output", str(output))
    assert ran.err == ""
    assert ran.out == (f"{output}: disk0 as it was at seq:17 (2025-11-24 13:30:15.500+01:00)\n")
    assert output.read_bytes() == server.content
    assert output.stat().st_blocks * 512 < 2 * MIB  # the holes are holes
    assert output.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["old.img"]
    body = {"at": "seq:17", "writable": False}
    assert [call.body for call in api.asked("POST", "/v1/disks/disk0/views")] == [body]
    assert views_closed(api)


def test_restore_as_json(cdp: Cdp, server: Server, tmp_path: Path) -> None:
    output = tmp_path / "old.img"
    arguments = ["restore", "disk0", "--to", "seq:17", "--output", str(output)]
    assert cdp(*arguments, "--json").json == {
        "disk": "disk0",
        "seq": 17,
        "time": NOW,
        "output": str(output),
        "format": "raw",
    }
    assert len(server.content) == output.stat().st_size


@pytest.mark.parametrize("there", ["old.img", "old.img.partial"])
def test_restore_does_not_overwrite(
    cdp: Cdp, api: FakeApi, server: Server, tmp_path: Path, there: str
) -> None:
    output = tmp_path / "old.img"
    (tmp_path / there).write_text("precious")
    arguments = ["restore", "disk0", "--to", "seq:17", "--output", str(output)]
    assert cdp(*arguments).error == (
        f"{tmp_path / there} exists: name another file, or say --force to replace it"
    )
    assert (tmp_path / there).read_text() == "precious"
    assert api.asked("POST", "/v1/disks/disk0/views") == []
    assert cdp(*arguments, "--force").status == 0
    assert output.read_bytes() == server.content
    assert [path.name for path in tmp_path.iterdir()] == ["old.img"]


def test_files_of_the_daemon_are_never_replaced(
    cdp: Cdp, api: FakeApi, short_tmp: Path, tmp_path: Path
) -> None:
    journal, backing, locked = (tmp_path / name for name in ("journal", "db.img", "locked.img"))
    own = short_tmp / "disks" / "disk0" / "disk.json"
    for path in (journal / "catalog.0", backing, locked, own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    (tmp_path / "link").symlink_to(backing)
    entry = disk("disk0", journal=str(journal), backing=str(backing))
    api.answer("GET", "/v1/disks", {"disks": [entry]})
    api.answer("POST", "/v1/disks/disk0/resolve", {"seq": 1, "stamp": 1, "time": NOW, "spec": ""})
    with locked.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for path in (journal / "catalog.0", backing, tmp_path / "link", own, locked):
            words = ["restore", "disk0", "--to", "seq:1", "--output", str(path), "--force"]
            assert cdp(*words).error.endswith("name another file")
            assert path.read_text() == "precious"
    new = short_tmp / "disks" / "new.img"
    assert "own" in cdp("restore", "disk0", "--to", "seq:1", "--output", str(new)).error


def test_a_file_that_appears_meanwhile_is_not_overwritten(
    cdp: Cdp, api: FakeApi, server: Server, tmp_path: Path
) -> None:
    output = tmp_path / "old.img"

    def appear(_: object) -> tuple[int, dict[str, object]]:
        output.write_text("precious")
        return 201, {"id": "v1", "uri": server.uri}

    api.compute("POST", "/v1/disks/disk0/views", appear)
    error = cdp("restore", "disk0", "--to", "seq:17", "--output", str(output)).error
    assert "has appeared meanwhile" in error
    assert output.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["old.img"]
    assert views_closed(api)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nosuch/old.img", "is no directory: create it first"),
        (".", "neither a file nor a block device"),
        ("/dev/null", "neither a file nor a block device"),
    ],
)
def test_outputs_that_cannot_be(
    cdp: Cdp, server: Server, tmp_path: Path, output: str, message: str
) -> None:
    arguments = ["restore", "disk0", "--to", "seq:17", "--output", str(tmp_path / output)]
    assert message in cdp(*arguments, "--force").error
    assert server.content


class Unlucky(Exception):
    """Something goes wrong in the middle."""


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt, SystemExit])
def test_a_failed_restore_leaves_nothing(
    cdp: Cdp,
    api: FakeApi,
    server: Server,
    tmp_path: Path,
    kind: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_self: object, offset: int, _data: memoryview) -> None:
        if offset:
            raise kind("unlucky")

    monkeypatch.setattr(image.SparseFile, "write", fail)
    arguments = ["restore", "disk0", "--to", "seq:17", "--output", str(tmp_path / "old.img")]
    if kind is SystemExit:
        with pytest.raises(SystemExit):
            cdp(*arguments)
    else:
        assert cdp(*arguments).status == (1 if kind is OSError else 130)
    assert list(tmp_path.iterdir()) == []
    assert views_closed(api)
    assert server.content


def test_a_view_that_cannot_be_closed_is_named(
    cdp: Cdp, api: FakeApi, server: Server, tmp_path: Path
) -> None:
    api.refuse("DELETE", "/v1/views/v1", 500, "internal", "no")
    ran = cdp("restore", "disk0", "--to", "seq:17", "--output", str(tmp_path / "old.img"))
    assert ran.status == 0
    assert ran.err == "cdp: view v1 is still open (no): cdp view close v1\n"
    assert (tmp_path / "old.img").read_bytes() == server.content


def test_a_server_that_is_gone(cdp: Cdp, api: FakeApi, server: Server, tmp_path: Path) -> None:
    uri = format_uri("", socket_path=tmp_path / "nosuch.sock")
    api.answer("POST", "/v1/disks/disk0/views", {"id": "v1", "uri": uri})
    ran = cdp("restore", "disk0", "--to", "seq:17", "--output", str(tmp_path / "old.img"))
    assert ran.status == 1
    assert "No such file" in ran.error
    assert views_closed(api)
    assert server.content


# ----------------------------------------------------------------------------------------- qcow2
def test_restore_to_qcow2(
    cdp: Cdp, api: FakeApi, server: Server, tmp_path: Path, need_tool: Callable[[str], str]
) -> None:
    qemu_img = need_tool("qemu-img")
    output, raw = tmp_path / "old.qcow2", tmp_path / "raw"
    arguments = ["restore", "disk0", "--to", "seq:17", "--output", str(output)]
    ran = cdp(*arguments, "--format", "qcow2")
    assert (ran.status, ran.err) == (0, "")
    subprocess.run(
        [qemu_img, "convert", "-f", "qcow2", "-O", "raw", output, raw], check=True, timeout=60
    )
    assert raw.read_bytes() == server.content
    assert views_closed(api)
    assert not (tmp_path / "old.qcow2.partial").exists()


def test_without_qemu_img(
    cdp: Cdp, api: FakeApi, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    output = tmp_path / "old.qcow2"
    arguments = ["restore", "disk0", "--to", "seq:17", "--output", str(output)]
    assert cdp(*arguments, "--format", "qcow2").error == (
        "qcow2 needs qemu-img: install it (qemu-utils), or restore --format raw"
    )
    assert list(tmp_path.iterdir()) == []
    assert views_closed(api)
    assert server.content


def test_qemu_img_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "qemu-img"
    program.write_text("#!/bin/sh\nprintf '   (12.50/100%%)\\r'\necho 'disk full' >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(CliError, match="qemu-img failed: disk full"):
        restore._run_qemu_img([str(program)], "disk0")


# ---------------------------------------------------------------------------------------- devices
@pytest.fixture
def loop_device(
    tmp_path: Path, need_tool: Callable[[str], str], not_here: Callable[[str], None]
) -> Iterator[tuple[Path, Path]]:
    """A block device of 9 MiB full of old content, and the file behind it."""
    losetup = need_tool("losetup")
    behind = tmp_path / "behind"
    behind.write_bytes(b"?" * 9 * MIB)
    done = subprocess.run(
        [losetup, "--find", "--show", behind], capture_output=True, text=True, check=False
    )
    if done.returncode:
        not_here(f"no loop devices: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    yield device, behind
    subprocess.run([losetup, "--detach", device], check=True)


@pytest.mark.parametrize("by_kernel", [True, False])
def test_restore_to_a_device(
    cdp: Cdp,
    api: FakeApi,
    server: Server,
    loop_device: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    by_kernel: bool,
) -> None:
    device, behind = loop_device
    if not by_kernel:
        monkeypatch.setattr(image, "BLKZEROOUT", 0)
    ran = cdp("restore", "disk0", "--to", "seq:17", "--output", str(device))
    assert (ran.status, ran.err) == (0, "")
    size = len(server.content)
    assert behind.read_bytes()[:size] == server.content  # old content is not where zeroes belong
    assert behind.read_bytes()[size:] == b"?" * (9 * MIB - size)
    assert views_closed(api)


def test_a_device_that_is_too_small_or_in_use(
    cdp: Cdp, api: FakeApi, server: Server, loop_device: tuple[Path, Path]
) -> None:
    device, behind = loop_device
    fd = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        ran = cdp("restore", "disk0", "--to", "seq:17", "--output", str(device))
        assert "is in use: unmount it" in ran.error
    finally:
        os.close(fd)
    with behind.open("r+b") as file:
        file.truncate(8 * MIB)
    subprocess.run(["losetup", "--set-capacity", device], check=True)
    ran = cdp("restore", "disk0", "--to", "seq:17", "--output", str(device))
    assert ran.error == (
        f"{device} has 8388608 bytes, the disk had {len(server.content)}: name a larger device"
    )
    assert behind.read_bytes() == b"?" * 8 * MIB
    error = cdp(*("restore", "disk0", "--to", "now", "--format", "qcow2", "--output", str(device)))
    assert "restore it raw" in error.error
    assert views_closed(api)
