"""Foreign clients against the daemon: one small test per behaviour."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.interop.daemon import Daemon

SIZE = 32 << 20


@pytest.fixture
def disk(daemon: Daemon) -> Daemon:
    """The daemon with one disk of SIZE bytes."""
    daemon.cdp("disk", "add", "disk0", "--size", str(SIZE))
    return daemon


def call(*command: str, status: int = 0) -> str:
    """Run a tool; its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == status, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.needs_tool("nbdinfo")
def test_nbdinfo_shows_disks_and_bookmarks(disk: Daemon) -> None:
    disk.cdp("bookmark", "add", "disk0", "nightly")
    exports = json.loads(call("nbdinfo", "--json", "--list", disk.uri("")))["exports"]
    assert {each["export-name"] for each in exports} == {"disk0", "disk0@nightly"}
    found = json.loads(call("nbdinfo", "--json", disk.uri("disk0")))["exports"][0]
    assert found["export-size"] == SIZE
    assert found["can_multi_conn"]
    assert found["can_fua"]
    assert found["can_trim"]
    assert not found["is_read_only"]
    view = json.loads(call("nbdinfo", "--json", disk.uri("disk0@nightly")))["exports"][0]
    assert view["is_read_only"]
    assert view["can_multi_conn"]
    moving = json.loads(call("nbdinfo", "--json", disk.uri("disk0@now")))["exports"][0]
    assert not moving["can_multi_conn"], "four connections would show four points"


@pytest.mark.needs_tool("qemu-img", "nbdcopy")
def test_copies_there_and_back_are_equal(disk: Daemon, tmp_path: Path, seed: int) -> None:
    source = tmp_path / "source.img"
    with source.open("wb") as file:
        file.truncate(SIZE)
        file.seek(5 << 20)
        file.write((b"%d " % seed) * (1 << 20))
    call("nbdcopy", "--flush", str(source), disk.uri("disk0"))
    call("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), disk.uri("disk0"))
    disk.cdp("bookmark", "add", "disk0", "copied")
    call("qemu-img", "bench", "-f", "raw", "-w", "-c", "500", "-n", disk.uri("disk0"))
    old = tmp_path / "old.qcow2"
    call("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.uri("disk0@copied"), str(old))
    call("qemu-img", "compare", str(source), str(old))
    back = tmp_path / "back.img"
    call("nbdcopy", disk.uri("disk0@copied"), str(back))
    assert back.read_bytes() == source.read_bytes()
    restored = tmp_path / "restored.qcow2"
    disk.cdp("restore", "disk0", "--to", "copied", "--output", str(restored), "--format", "qcow2")
    call("qemu-img", "compare", str(source), str(restored))
    raw = tmp_path / "restored.img"
    disk.cdp("restore", "disk0", "--to", "copied", "--output", str(raw))
    assert raw.read_bytes() == source.read_bytes()
    assert raw.stat().st_blocks * 512 < SIZE // 2, "holes stay holes"


@pytest.mark.needs_tool("qemu-io")
def test_qemu_io_patterns_zeroes_and_discards(disk: Daemon) -> None:
    uri = disk.uri("disk0")
    commands = ["write -P 0x5a 1M 1M", "write -P 0x21 1000 3000", "flush", "write -z 1200k 64k",
                "discard 1536k 128k", "read -P 0x5a 1M 176k", "read -P 0 1200k 64k",
                "read -P 0x21 1000 3000", "read -P 0 1536k 128k"]  # fmt: skip
    options = [word for command in commands for word in ("-c", command)]
    out = call("qemu-io", "-f", "raw", "-d", "unmap", *options, uri)
    assert "verification failed" not in out


@pytest.mark.needs_tool("fio")
def test_fio_verifies_what_it_wrote(disk: Daemon) -> None:
    call(
        "fio", "--name=v", "--ioengine=nbd", f"--uri={disk.uri('disk0')}", "--rw=randwrite",
        "--bsrange=512-64k", "--size=16m", "--iodepth=16", "--verify=crc32c", "--do_verify=1",
        "--verify_fatal=1", "--verify_state_save=0", "--randseed=7", "--output-format=terse",
    )  # fmt: skip


@pytest.mark.needs_tool("nbdsh")
def test_nbdsh_gets_the_errors_of_the_specification(disk: Daemon) -> None:
    script = f"""
import errno, nbd
h.set_strict_mode(0)
h.connect_uri("{disk.uri("disk0")}")
def refused(code, call, *args):
    try:
        call(*args)
    except nbd.Error as error:
        assert error.errnum == code, (call, error.errnum)
    else:
        raise AssertionError(call)
refused(errno.EINVAL, h.pread, 4096, {SIZE})
refused(errno.ENOSPC, h.pwrite, bytes(4096), {SIZE - 512})
refused(errno.EINVAL, h.trim, 4096, {SIZE})
refused(errno.ENOSPC, h.zero, 4096, {SIZE})
h.pwrite(b"x" * 4096, 0, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 0) == b"x" * 4096
"""
    subprocess.run(["nbdsh", "-c", script], check=True, timeout=60, env={"PATH": "/usr/bin:/bin"})


@pytest.mark.needs_tool("qemu-img")
def test_block_status_tells_holes_of_a_view(disk: Daemon) -> None:
    uri = disk.uri("disk0")
    call("qemu-io", "-f", "raw", "-c", "write -P 1 8M 1M", uri)
    disk.cdp("bookmark", "add", "disk0", "one")
    for export in (uri, disk.uri("disk0@one")):
        extents = json.loads(call("qemu-img", "map", "--output=json", "-f", "raw", export))
        data = [each for each in extents if each["data"] and not each["zero"]]
        assert sum(each["length"] for each in data) < 4 << 20, extents
        assert any(each["start"] <= 8 << 20 < each["start"] + each["length"] for each in data)
