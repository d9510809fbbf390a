"""The codec under real clients: nbdinfo, nbdsh, qemu-io, qemu-img, nbdcopy, fio, nbdkit.

The host is `memory_server`, so what is proven is the codec, not the daemon. One behaviour a test.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdp.nbd import wire
from cdp.nbd.uri import format_uri
from tests.cdp.nbd.memory_server import MemoryServer, memory_export, read_only

MIB = 1 << 20
# nbdsh runs the `python3` of PATH, and its module belongs to the system's.
ENVIRONMENT = {**os.environ, "PATH": "/usr/bin" + os.pathsep + os.environ.get("PATH", os.defpath)}


@pytest.fixture
def server(short_tmp: Path) -> Iterator[MemoryServer]:
    exports = [
        memory_export("disk0", 16 * MIB, description="the first"),
        read_only("fixed@seq:7", 64 * 1024),
        memory_export("sector", MIB, min_block=512),
        memory_export("plain", MIB, flags=0, meta_contexts=()),
    ]
    with MemoryServer(exports, short_tmp / "nbd.sock") as server:
        yield server


@pytest.fixture
def uri(server: MemoryServer, short_tmp: Path) -> Callable[[str], str]:
    return lambda export: format_uri(export, socket_path=short_tmp / "nbd.sock")


Run = Callable[..., str]


@pytest.fixture
def run(need_tool: Callable[[str], str]) -> Run:
    """`run(tool, *arguments)`: what it printed; fails with what it said if it failed."""

    def run_tool(tool: str, *arguments: str | Path) -> str:
        command = [need_tool(tool), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=ENVIRONMENT
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    return run_tool


@pytest.fixture
def nbdsh(run: Run, uri: Callable[[str], str]) -> Callable[..., str]:
    """`nbdsh(export, script)`: `script` with `h` connected and every check of the client off."""

    def run_script(export: str, script: str, *, structured: bool = True) -> str:
        prepare = [
            "h.set_strict_mode(0)",
            f"h.set_request_structured_replies({structured})",
            "h.add_meta_context('base:allocation')",
            f"h.connect_uri({uri(export)!r})",
        ]
        helper = """
def errno_of(command, *args):
    try:
        command(*args)
    except nbd.Error as error:
        return error.errnum
    return 0
"""
        return run("nbdsh", "-c", "\n".join([*prepare, helper, script]))

    return run_script


# ---------------------------------------------------------------------------------------- nbdinfo


def test_nbdinfo_of_an_export(run: Run, uri: Callable[[str], str]) -> None:
    report = json.loads(run("nbdinfo", "--json", uri("disk0")))
    (export,) = report["exports"]
    assert report["structured"]
    assert export["export-name"] == "disk0"
    assert export["description"] == "the first"
    assert export["export-size"] == 16 * MIB
    assert export["contexts"] == ["base:allocation"]
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] == 4096
    assert export["block_size_maximum"] == 1 << 25
    for ability in ("flush", "fua", "trim", "zero", "fast_zero", "df", "cache", "multi_conn"):
        assert export[f"can_{ability}"], ability
    assert not export["is_read_only"]


def test_nbdinfo_of_a_plain_export(run: Run, uri: Callable[[str], str]) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", uri("plain")))["exports"]
    assert not [ability for ability, value in export.items() if ability[:4] == "can_" and value]


def test_nbdinfo_lists_all(run: Run, uri: Callable[[str], str], server: MemoryServer) -> None:
    report = json.loads(run("nbdinfo", "--json", "--list", uri("")))
    names = [export["export-name"] for export in report["exports"]]
    assert names == ["disk0", "fixed@seq:7", "sector", "plain"]
    server.settle()
    assert server.closed
    assert all(end.clean for end in server.closed)


def test_nbdinfo_map(run: Run, uri: Callable[[str], str], server: MemoryServer) -> None:
    server.exports["disk0"].content[4096:12288] = b"x" * 8192
    found = json.loads(run("nbdinfo", "--json", "--map", uri("disk0")))
    assert [(e["offset"], e["length"], e["type"]) for e in found] == [
        (0, 4096, 3),
        (4096, 8192, 0),
        (12288, 16 * MIB - 12288, 3),
    ]


def test_nbdinfo_of_an_unknown_export(
    uri: Callable[[str], str], need_tool: Callable[[str], str]
) -> None:
    done = subprocess.run(
        [need_tool("nbdinfo"), uri("nothing")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "No such file" in done.stderr


# ------------------------------------------------------------------------------------------ nbdsh


@pytest.mark.parametrize("structured", [True, False])
def test_every_rule_has_its_errno(nbdsh: Callable[..., str], structured: bool) -> None:
    script = """
size = h.get_size()
x = bytearray(512)
print([
    errno_of(h.pread, 512, size),
    errno_of(h.pread, 512, size - 1),
    errno_of(h.pwrite, x, size),
    errno_of(h.zero, 512, size),
    errno_of(h.trim, 512, size),
    errno_of(h.cache, 512, size),
    errno_of(h.pread, 0, 0),
    errno_of(h.pwrite, bytearray(0), 0),
    errno_of(h.pwrite, x, 0, 1 << 5),
    errno_of(h.pwrite, x, 0, nbd.CMD_FLAG_NO_HOLE),
    errno_of(h.pwrite, x, 0, nbd.CMD_FLAG_FUA),
    errno_of(h.flush, nbd.CMD_FLAG_FUA),
    errno_of(h.zero, 512, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO),
    errno_of(h.trim, 512, 0, nbd.CMD_FLAG_REQ_ONE),
])
h.shutdown()
"""
    found = json.loads(nbdsh("disk0", script, structured=structured))
    assert found == [22, 22, 28, 28, 22, 22, 22, 22, 22, 22, 0, 0, 0, 22]


def test_a_read_only_export(nbdsh: Callable[..., str]) -> None:
    script = """
print([
    errno_of(h.pwrite, bytearray(1), 0),
    errno_of(h.zero, 1, 0),
    errno_of(h.trim, 1, 0),
    errno_of(h.flush),
    h.pread(3, 250)[0],
])
h.shutdown()
"""
    assert json.loads(nbdsh("fixed@seq:7", script)) == [1, 1, 1, 0, 250]


def test_the_minimum_block(nbdsh: Callable[..., str]) -> None:
    script = """
x = bytearray(512)
print([errno_of(h.pwrite, x, 512), errno_of(h.pwrite, x, 1), errno_of(h.pread, 1, 0)])
h.shutdown()
"""
    assert json.loads(nbdsh("sector", script)) == [0, 22, 22]


def test_structured_reads(nbdsh: Callable[..., str]) -> None:
    """Data and holes as chunks; with DF one piece; and all of it adds up."""
    script = """
h.pwrite(b'a' * 4096, 4096)
chunks = []
def chunk(data, offset, status, error):
    chunks.append([offset, len(data), status])
whole = h.pread_structured(16384, 0, chunk)
assert whole == bytes(4096) + b'a' * 4096 + bytes(8192)
print(chunks)
chunks.clear()
assert h.pread_structured(16384, 0, chunk, nbd.CMD_FLAG_DF) == whole
print(chunks)
h.shutdown()
"""
    first, second = nbdsh("disk0", script).splitlines()
    assert json.loads(first) == [[0, 4096, 2], [4096, 4096, 1], [8192, 8192, 2]]
    assert json.loads(second) == [[0, 16384, 1]]


def test_block_status_of_one_extent(nbdsh: Callable[..., str]) -> None:
    script = """
h.pwrite(b'a' * 4096, 4096)
found = []
def extent(context, offset, entries, error):
    found.append([context, offset, entries])
h.block_status(16384, 0, extent, nbd.CMD_FLAG_REQ_ONE)
h.block_status(16384, 0, extent)
print(str(found).replace("'", '"'))
print(errno_of(h.block_status, 512, h.get_size(), extent))
h.shutdown()
"""
    first, second = nbdsh("disk0", script).splitlines()
    assert json.loads(first) == [
        ["base:allocation", 0, [4096, 3]],
        ["base:allocation", 0, [4096, 3, 4096, 0, 8192, 3]],
    ]
    assert second == "22"


def test_the_words_of_an_error_reach_the_client(
    nbdsh: Callable[..., str], server: MemoryServer
) -> None:
    server.exports["disk0"].fail.append((0, 512, wire.NbdError.EIO))
    script = """
def chunk(data, offset, status, error):
    pass
print([
    errno_of(h.pread, 4096, 0),
    errno_of(h.pwrite, bytearray(512), 0),
    errno_of(h.pread, 512, 512),
])
h.shutdown()
"""
    assert json.loads(nbdsh("disk0", script)) == [5, 5, 0]


@pytest.mark.parametrize("flags", ["0", "nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE"])
def test_old_handshakes(run: Run, uri: Callable[[str], str], flags: str) -> None:
    """EXPORT_NAME with and without fixed newstyle, with the padding of 124 zeroes."""
    script = f"""
h.set_handshake_flags({flags})
h.connect_uri({uri("disk0")!r})
h.pwrite(b'hello', 7)
print(h.get_size(), h.pread(6, 7), h.get_protocol())
h.shutdown()
"""
    assert run("nbdsh", "-c", script).startswith(f"{16 * MIB} bytearray(b'hello\\x00') newstyle")


def test_haggling_step_by_step(run: Run, uri: Callable[[str], str]) -> None:
    script = f"""
h.set_opt_mode(True)
h.connect_uri({uri("disk0")!r})
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == ['disk0', 'fixed@seq:7', 'sector', 'plain'], names
found = []
h.set_export_name('nothing')
for step in (h.opt_info, h.opt_go, lambda: h.opt_list_meta_context(found.append)):
    try:
        step()
    except nbd.Error as error:
        assert error.errnum in {2, 95}, error
    else:
        raise SystemExit('an export that does not exist')
h.set_export_name('fixed@seq:7')
h.opt_info()
assert h.get_size() == 65536 and h.is_read_only()
h.add_meta_context('base:')
assert h.opt_list_meta_context(found.append) == 1 and found == ['base:allocation']
h.clear_meta_contexts()
h.set_export_name('disk0')
h.add_meta_context('base:allocation')
h.opt_go()
assert h.get_size() == {16 * MIB} and h.can_meta_context('base:allocation')
h.shutdown()
"""
    run("nbdsh", "-c", script)


def test_opt_abort(run: Run, uri: Callable[[str], str], server: MemoryServer) -> None:
    script = f"h.set_opt_mode(True); h.connect_uri({uri('disk0')!r}); h.opt_abort()"
    run("nbdsh", "-c", script)
    server.settle()
    assert [end.reason for end in server.closed] == ["the client gave up"]


def test_the_largest_payload(nbdsh: Callable[..., str], short_tmp: Path) -> None:
    """32 MiB both ways; and one byte more ends the connection."""
    exports = [memory_export("big", 64 * MIB)]
    with MemoryServer(exports, short_tmp / "big.sock"):
        uri = format_uri("big", socket_path=short_tmp / "big.sock")
        script = f"""
g = nbd.NBD()
g.set_strict_mode(0)
g.connect_uri({uri!r})
data = bytearray(b'0123456789abcdef' * 65536 * 32)
g.pwrite(data, 5)
assert g.pread(len(data), 5) == data
print(errno_of(g.pread, len(data) + 1, 0), errno_of(g.zero, 64 << 20, 0))
try:
    g.pwrite(data + b'x', 0)
    raise SystemExit('more than the maximum was written')
except nbd.Error:
    pass
h.shutdown()
"""
        assert nbdsh("disk0", script).split() == ["75", "0"]


# --------------------------------------------------------------------------- qemu-io and qemu-img


def test_qemu_io(run: Run, uri: Callable[[str], str], server: MemoryServer) -> None:
    commands = [
        "write -P 3 0 1M",
        "write -f -P 4 1M 64k",
        "write -z 4k 64k",
        "write -z -u 128k 64k",
        "aio_write -P 5 2M 64k",
        "aio_write -P 6 3M 64k",
        "aio_flush",
        "discard 512k 64k",
        "flush",
        "read -P 3 0 4k",
        "read -P 0 4k 64k",
        "read -P 4 1M 64k",
        "read -P 5 2M 64k",
        "read -P 6 3M 64k",
        "write -P 7 1 511",
        "read -P 7 1 511",
    ]
    options = [part for command in commands for part in ("-c", command)]
    printed = run("qemu-io", "-f", "raw", *options, uri("disk0"))
    assert "failed" not in printed
    assert "error" not in printed
    kinds = {request[0] for request in server.commands}
    assert {wire.NBD_CMD_TRIM, wire.NBD_CMD_FLUSH, wire.NBD_CMD_WRITE_ZEROES} <= kinds
    assert server.exports["disk0"].content[1:512] == b"\7" * 511


def test_qemu_img(
    run: Run, uri: Callable[[str], str], server: MemoryServer, short_tmp: Path
) -> None:
    content = server.exports["disk0"].content
    content[MIB : 2 * MIB] = random.Random(1).randbytes(MIB)
    copy = short_tmp / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri("disk0"), copy)
    assert "identical" in run("qemu-img", "compare", "-F", "raw", copy, uri("disk0"))
    extents = json.loads(run("qemu-img", "map", "--output=json", uri("disk0")))
    assert [(e["start"], e["length"], e["zero"]) for e in extents] == [
        (0, MIB, True),
        (MIB, MIB, False),
        (2 * MIB, 14 * MIB, True),
    ]
    content[MIB] ^= 1
    with pytest.raises(AssertionError, match="mismatch"):
        run("qemu-img", "compare", "-F", "raw", copy, uri("disk0"))
    run("qemu-img", "convert", "-n", "-O", "raw", copy, uri("disk0"))
    content[MIB] ^= 1
    assert "mismatch" not in run("qemu-img", "bench", "-f", "raw", "-c", "1000", uri("disk0"))


# -------------------------------------------------------------------------- nbdcopy, nbdkit, fio


@pytest.mark.parametrize("options", [["--synchronous"], ["--connections=4", "--requests=16"]])
def test_nbdcopy_both_ways(
    run: Run, uri: Callable[[str], str], server: MemoryServer, short_tmp: Path, options: list[str]
) -> None:
    content = server.exports["disk0"].content
    content[3 * MIB + 5 : 5 * MIB] = random.Random(2).randbytes(2 * MIB - 5)
    before = bytes(content)
    copy = short_tmp / "copy"
    run("nbdcopy", *options, uri("disk0"), copy)
    assert copy.read_bytes() == before
    content[:] = bytes(len(content))
    run("nbdcopy", *options, "--flush", copy, uri("disk0"))
    assert content == before
    if "--synchronous" not in options:
        assert len(server.negotiated) > 2


def test_nbdkit_as_a_client(
    run: Run, uri: Callable[[str], str], server: MemoryServer, need_tool: Callable[[str], str]
) -> None:
    """A proxy in between: what nbdkit accepts from us, it offers on."""
    need_tool("nbdinfo")
    printed = run(
        "nbdkit", "-U", "-", "nbd", f"uri={uri('disk0')}", "--run", 'nbdinfo --json "$uri"'
    )
    (export,) = json.loads(printed)["exports"]
    assert export["export-size"] == 16 * MIB
    assert export["can_fua"]
    assert "base:allocation" in export["contexts"]


def test_fio_verifies_what_it_wrote(
    run: Run, uri: Callable[[str], str], server: MemoryServer, short_tmp: Path
) -> None:
    printed = run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={uri('disk0')}",
        "--rw=randrw",
        "--bsrange=512-64k",
        "--size=8M",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--fsync=32",
        "--randseed=7",
        f"--aux-path={short_tmp}",
    )
    assert re.search(r"err= 0", printed)
    assert len(server.commands) > 200
