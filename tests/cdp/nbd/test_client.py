"""The synchronous client: against our codec, against other servers, and against a server that lies.

That it works with qemu-nbd and nbdkit shows that client and codec do not merely agree on a mistake.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cdp.nbd import wire
from cdp.nbd.client import (
    NbdClient,
    NbdNegotiationError,
    NbdServerError,
    _SocketStream,
    list_exports,
)
from cdp.nbd.export import Negotiated
from cdp.nbd.limits import Limits
from cdp.nbd.transmission import (
    block_status_chunk,
    data_chunk_header,
    error_chunk,
    error_offset_chunk,
    hole_chunk,
    none_chunk,
    ok_reply,
    simple_error,
)
from cdp.nbd.uri import format_uri
from tests.cdp.nbd.memory_server import MemoryServer, memory_export, read_only
from tests.cdp.nbd.vectors import cookie

MIB = 1 << 20


def pattern(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def server(short_tmp: Path) -> Iterator[MemoryServer]:
    path = short_tmp / "nbd.sock"
    exports = [
        memory_export("disk0", 4 * MIB, description="the first"),
        read_only("fixed", 64 * 1024),
        memory_export("small", 256 * 1024, max_block=64 * 1024),
    ]
    with MemoryServer(exports, path) as server:
        server.path = path  # type: ignore[attr-defined]
        yield server


def socket_of(server: MemoryServer) -> Path:
    return server.path  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------- with our codec


@pytest.mark.parametrize("structured", [True, False])
def test_every_command(server: MemoryServer, structured: bool) -> None:
    with NbdClient.connect(socket_of(server), "disk0", structured=structured) as client:
        assert client.size == 4 * MIB
        assert client.description == "the first"
        assert client.negotiated.structured_replies is structured
        assert bool(client.flags & wire.NBD_FLAG_SEND_DF) is structured
        data = pattern(100_000)
        client.write(5000, data)
        client.write(MIB, b"durable", fua=True)
        client.flush()
        assert client.read(4990, 100_020) == bytes(10) + data + bytes(10)
        client.write_zeroes(6000, 8192, no_hole=True, fast=True, fua=True)
        client.trim(0, 4096, fua=True)
        client.cache(0, MIB)
        assert client.read(5990, 8212) == data[990:1000] + bytes(8192) + data[9192:9202]
        assert client.read(MIB, 7) == b"durable"
    server.settle()
    flags = {kind: flag for kind, flag, *_ in server.commands}
    assert flags[wire.NBD_CMD_WRITE] == wire.NBD_CMD_FLAG_FUA
    assert flags[wire.NBD_CMD_WRITE_ZEROES] == (
        wire.NBD_CMD_FLAG_FUA | wire.NBD_CMD_FLAG_NO_HOLE | wire.NBD_CMD_FLAG_FAST_ZERO
    )
    assert server.commands[-1][0] == wire.NBD_CMD_DISC


def test_block_status_covers_the_range_exactly(server: MemoryServer) -> None:
    with NbdClient.connect(socket_of(server), "disk0") as client:
        client.write(4096, pattern(8192))
        assert client.block_status(0, 4 * MIB) == [(4096, 3), (8192, 0), (4 * MIB - 12288, 3)]
        assert client.block_status(5000, 10) == [(10, 0)]
        assert client.block_status(5000, 0) == []
        with pytest.raises(ValueError, match="not negotiated"):
            client.block_status(0, 10, "qemu:dirty-bitmap:x")
    with (
        NbdClient.connect(socket_of(server), "disk0", structured=False) as client,
        pytest.raises(ValueError, match="not negotiated"),
    ):
        client.block_status(0, 4096)


@pytest.mark.parametrize("structured", [True, False])
def test_server_errors_leave_the_connection_usable(server: MemoryServer, structured: bool) -> None:
    with NbdClient.connect(socket_of(server), "fixed", structured=structured) as client:
        for number, command in (
            (1, lambda: client.write(0, b"x")),
            (1, lambda: client.write_zeroes(0, 10)),
            (22, lambda: client.read(1 << 40, 1)),
            (22, lambda: client.read(0, 0)),
        ):
            with pytest.raises(NbdServerError) as caught:
                command()
            assert caught.value.errno == number
            assert caught.value.message == ("not today" if structured else "")
        assert client.read(250, 3) == bytes([250, 0, 1])


def test_long_requests_are_cut(server: MemoryServer) -> None:
    with NbdClient.connect(socket_of(server), "small") as client:
        data = pattern(200_000)
        client.write(100, memoryview(data))
        assert client.read(100, 200_000) == data
        assert list(client.read_many([(0, 65536)])) == [(0, bytes(100) + data[: 65536 - 100])]
        for length in (0, 65537):
            with pytest.raises(ValueError):
                list(client.read_many([(0, length)]))
    lengths = [r[4] for r in server.commands if r[0] in {0, 1}]
    assert lengths == [65536, 65536, 65536, 3392] * 2 + [65536]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("depth", [1, 3, 100])
def test_read_many(server: MemoryServer, structured: bool, ordered: bool, depth: int) -> None:
    data = pattern(4 * MIB)
    server.exports["disk0"].content[:] = data
    with NbdClient.connect(socket_of(server), "disk0", structured=structured) as client:
        wanted = [(offset, 65536) for offset in range(0, 4 * MIB, 65536)]
        found = list(client.read_many(iter(wanted), depth, ordered))
        assert [offset for offset, _ in found] == [offset for offset, _ in wanted]
        assert b"".join(piece for _, piece in found) == data
        assert list(client.read_many([])) == []
        with pytest.raises(ValueError):
            list(client.read_many([(0, 1)], depth=0))


def test_read_many_left_early_or_failing_leaves_the_connection_usable(server: MemoryServer) -> None:
    export = server.exports["disk0"]
    export.content[:] = pattern(4 * MIB)
    export.fail.append((MIB, MIB + 1, 5))
    with NbdClient.connect(socket_of(server), "disk0") as client:
        pieces = [(offset, 65536) for offset in range(0, 2 * MIB, 65536)]
        for _ in client.read_many(pieces, 8):
            break
        client.write(0, b"after")
        with pytest.raises(NbdServerError) as caught:
            list(client.read_many(pieces, 8))
        assert caught.value.errno == 5
        assert client.read(0, 5) == b"after"


def test_lists_and_unknown_exports(server: MemoryServer) -> None:
    path = socket_of(server)
    expected = [("disk0", "the first"), ("fixed", ""), ("small", "")]
    assert list_exports(path) == expected
    assert list_exports(format_uri("", socket_path=path)) == expected
    with pytest.raises(NbdNegotiationError, match="no such export") as caught:
        NbdClient.connect(path, "nothing")
    assert caught.value.code == wire.NBD_REP_ERR_UNKNOWN
    with NbdClient.connect(format_uri("fixed", socket_path=path)) as client:
        assert client.size == 65536
    with NbdClient.connect(format_uri("fixed", socket_path=path), "disk0") as client:
        assert client.size == 4 * MIB


def test_tcp() -> None:
    with MemoryServer([memory_export("disk0", MIB)]) as server:
        uri = format_uri("disk0", host="127.0.0.1", port=server.port)
        with NbdClient.connect(uri, timeout=10) as client:
            client.write(0, pattern(MIB))
            assert client.read(0, MIB) == pattern(MIB)


def test_closing_twice_and_using_after(server: MemoryServer) -> None:
    client = NbdClient.connect(socket_of(server), "disk0")
    client.close()
    client.close()
    with pytest.raises(ConnectionError):
        client.read(0, 1)


def test_a_server_that_cuts_us_off(short_tmp: Path) -> None:
    path = short_tmp / "nbd.sock"
    limits = Limits(max_payload=1 << 16)
    with MemoryServer([memory_export("d", MIB, max_block=1 << 16)], path, limits) as server:
        client = NbdClient.connect(path, "d")
        client.max_payload = MIB  # what the server did not allow
        with pytest.raises(OSError):
            client.write(0, bytes(MIB))
        with pytest.raises(ConnectionError):
            client.flush()
        client.close()
    assert server.commands == []


# ----------------------------------------------------------------------------- with a lying server

TERMS = Negotiated(
    export_name="d",
    requested_name="d",
    size=MIB,
    flags=1,
    structured_replies=True,
    meta_contexts={7: "base:allocation"},
    min_block=1,
    preferred_block=4096,
    max_payload=1 << 25,
    block_size_requested=True,
)
SIMPLE = Negotiated.from_json(
    TERMS.to_json()
    .replace('"structured_replies": true', '"structured_replies": false')
    .replace('{"7": "base:allocation"}', "{}")
)
C0 = cookie(0)


@contextmanager
def answered(*replies: bytes, terms: Negotiated = TERMS) -> Iterator[NbdClient]:
    """A client whose server has already said everything it will say."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b"".join(replies))
    theirs.shutdown(socket.SHUT_WR)
    client = NbdClient(_SocketStream(ours), terms, "")
    try:
        yield client
    finally:
        client.close()
        theirs.close()


def test_chunks_in_any_order() -> None:
    with answered(
        data_chunk_header(C0, 12, 3, done=False),
        b"mno",
        hole_chunk(C0, 15, 5, done=False),
        data_chunk_header(C0, 10, 2, done=False),
        b"kl",
        none_chunk(C0),
    ) as client:
        assert client.read(10, 10) == b"klmno" + bytes(5)


def test_data_and_an_error_are_an_error() -> None:
    with answered(
        data_chunk_header(C0, 0, 4, done=False),
        b"data",
        error_offset_chunk(C0, 5, 2, "bad sector", done=False),
        none_chunk(C0),
        ok_reply(cookie(1)),
    ) as client:
        with pytest.raises(NbdServerError, match="bad sector") as caught:
            client.read(0, 4)
        assert caught.value.errno == 5
        client.flush()


def test_replies_out_of_order() -> None:
    replies = [
        data_chunk_header(cookie(number), number * 8, 8) + bytes([number] * 8)
        for number in (2, 0, 1)
    ]
    wanted = [(number * 8, 8) for number in range(3)]
    with answered(*replies) as client:
        assert [o for o, _ in client.read_many(wanted, 3, ordered=False)] == [16, 0, 8]
    with answered(*replies) as client:
        assert list(client.read_many(wanted, 3)) == [(n * 8, bytes([n] * 8)) for n in range(3)]


def test_an_unknown_error_chunk_and_an_unknown_errno() -> None:
    chunk = bytearray(error_chunk(C0, 12345, "odd"))
    chunk[6:8] = b"\x80\x77"
    with answered(bytes(chunk)) as client, pytest.raises(NbdServerError, match="odd") as caught:
        client.read(0, 4)
    assert caught.value.errno == 12345


def test_an_errno_too_large_for_c() -> None:
    """Found by the fuzzer: os.strerror raised OverflowError instead of the server's error."""
    with answered(error_chunk(C0, 0x80000000), ok_reply(cookie(1))) as client:
        with pytest.raises(NbdServerError, match="2147483648") as caught:
            client.read(0, 4)
        assert caught.value.errno == 0x80000000
        client.flush()


LIES = [
    b"\0" * 16,
    ok_reply(C0) + b"data",  # simple reply to a read
    ok_reply(cookie(9)),  # never asked
    none_chunk(C0),  # nothing read
    data_chunk_header(C0, 0, 2) + b"da",  # half of it
    data_chunk_header(C0, 0, 5) + b"data!",  # too much
    data_chunk_header(C0, 4, 4) + b"data",  # elsewhere
    data_chunk_header(C0, (1 << 64) - 1, 4) + b"data",
    data_chunk_header(C0, 0, 3, done=False) + b"dat" + data_chunk_header(C0, 2, 2) + b"ta",
    hole_chunk(C0, 0, 3, done=False) + hole_chunk(C0, 2, 1),  # overlap, and a gap
    hole_chunk(C0, 0, 0xFFFFFFFF),
    wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 1, 0, C0, 1) + b"x",
    wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 1, 1, C0, 8) + bytes(8),  # no data at all
    wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 1, 2, C0, 13) + bytes(13),
    wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 1, 77, C0, 0),
    wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 1, 0x8001, C0, 5) + bytes(5),
    wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 1, 0x8001, C0, 1 << 30),
    wire.CHUNK.pack(wire.NBD_STRUCTURED_REPLY_MAGIC, 1, 5, C0, 1 << 30),
    block_status_chunk(C0, 7, [(4, 0)]),  # a status for a read
]


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_a_read(lie: bytes) -> None:
    with answered(lie) as client:
        with pytest.raises(wire.RemoteProtocolError):
            client.read(0, 4)
        with pytest.raises(ConnectionError):
            client.read(0, 4)


@pytest.mark.parametrize(
    "lie",
    [
        none_chunk(C0),
        ok_reply(C0),
        block_status_chunk(C0, 8, [(4, 0)]),
        block_status_chunk(C0, 7, [(4, 0)], done=False) + block_status_chunk(C0, 7, [(4, 0)]),
        block_status_chunk(C0, 7, [(4, 0)])[:-4].replace(b"\0\0\0\x0c", b"\0\0\0\x08"),
        block_status_chunk(C0, 7, [(0xABCD, 0)]).replace(b"\0\0\xab\xcd", bytes(4)),
        data_chunk_header(C0, 0, 4) + b"data",
    ],
)
def test_lies_about_a_block_status(lie: bytes) -> None:
    with answered(lie) as client, pytest.raises(wire.RemoteProtocolError):
        client.block_status(0, 4)


def test_lies_without_structured_replies() -> None:
    with answered(none_chunk(C0), terms=SIMPLE) as client:
        with pytest.raises(wire.RemoteProtocolError):
            client.flush()
    with answered(simple_error(C0, 5), ok_reply(cookie(1)) + b"da", terms=SIMPLE) as client:
        with pytest.raises(NbdServerError):
            client.read(0, 4)
        with pytest.raises(ConnectionError):  # hung up in the middle of the data
            client.read(0, 4)


def test_a_short_and_an_overlong_status_are_put_together() -> None:
    with answered(
        block_status_chunk(cookie(0), 7, [(10, 0)]),
        block_status_chunk(cookie(1), 7, [(5, 0), (5, 3)]),
        block_status_chunk(cookie(2), 7, [(1000, 3)]),
    ) as client:
        assert client.block_status(0, 30) == [(15, 0), (15, 3)]


def test_a_silent_server_runs_into_the_time_out(short_tmp: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_tmp / "s"))
        listener.listen()
        with pytest.raises(TimeoutError):
            NbdClient.connect(short_tmp / "s", timeout=0.05)


GREETING = wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_OPTS_MAGIC, 3)


def rep(option: int, kind: int, data: bytes = b"") -> bytes:
    return wire.OPTION_REPLY.pack(wire.NBD_REP_MAGIC, option, kind, len(data)) + data


ACK8 = rep(8, wire.NBD_REP_ACK)
NO_CONTEXTS = rep(10, wire.NBD_REP_ACK)


@pytest.mark.parametrize(
    "script",
    [
        b"SSH-2.0-OpenSSH_9",
        wire.GREETING.pack(wire.NBD_MAGIC, 0x420281861253, 3),
        wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_OPTS_MAGIC, 2),
        GREETING + b"x" * 20,
        GREETING + rep(9, wire.NBD_REP_ACK),
        GREETING + wire.OPTION_REPLY.pack(wire.NBD_REP_MAGIC, 8, 2, 1 << 30),
        GREETING + ACK8 + rep(10, 3, b""),
        GREETING + ACK8 + rep(10, wire.NBD_REP_META_CONTEXT, b"\0\0\0\1\xff") + NO_CONTEXTS,
        GREETING + ACK8 + NO_CONTEXTS + rep(7, wire.NBD_REP_ACK),
        GREETING + ACK8 + NO_CONTEXTS + rep(7, 2, b"xxx") + rep(7, wire.NBD_REP_ACK),
    ],
)
def test_lies_in_haggling(script: bytes, short_tmp: Path) -> None:
    with _scripted(script, short_tmp / "s") as path:
        with pytest.raises((wire.RemoteProtocolError, ConnectionError)):
            NbdClient.connect(path, timeout=10)


def test_a_server_without_go(short_tmp: Path) -> None:
    unsup = [rep(option, wire.NBD_REP_ERR_UNSUP) for option in (8, 7)]
    reply = wire.EXPORT_NAME_REPLY.pack(12345, 0)
    plain = wire.GREETING.pack(wire.NBD_MAGIC, wire.NBD_OPTS_MAGIC, 1)
    for greeting, zeroes in ((GREETING, b""), (plain, bytes(124))):
        script = greeting + b"".join(unsup) + reply + zeroes + ok_reply(C0)
        (short_tmp / "s").unlink(missing_ok=True)
        with _scripted(script, short_tmp / "s") as path, NbdClient.connect(path) as client:
            assert client.size == 12345
            client.flush()


@contextmanager
def _scripted(script: bytes, path: Path) -> Iterator[Path]:
    """A server that says the same whatever it is asked."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def play() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(script)
                connection.shutdown(socket.SHUT_WR)
                try:
                    while connection.recv(1 << 16):
                        pass
                except ConnectionError:
                    pass  # The client did not read everything before it left.

        thread = threading.Thread(target=play)
        thread.start()
        yield path
        thread.join()


# ------------------------------------------------------------------------------ with other servers


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(500):
        if path.exists():
            return
        assert process.poll() is None, "the server gave up"
        time.sleep(0.01)
    pytest.fail(f"no server at {path}")


@contextmanager
def _served_by(command: list[str], path: Path) -> Iterator[Path]:
    process = subprocess.Popen(command)
    try:
        _wait_for(path, process)
        yield path
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(params=["qemu-nbd", "nbdkit"])
def foreign(
    request: pytest.FixtureRequest, short_tmp: Path, need_tool: Callable[[str], str]
) -> Iterator[Path]:
    tool = need_tool(request.param)
    path = short_tmp / "nbd.sock"
    image = short_tmp / "image"
    image.write_bytes(b"")
    os.truncate(image, 64 * MIB)
    if request.param == "qemu-nbd":
        options = ["-f", "raw", "-x", "disk0", "--discard=unmap", "-t", "-e", "4", "-k", str(path)]
        command = [tool, *options, str(image)]
    else:
        command = [tool, "-f", "-U", str(path), "memory", "64M"]
    with _served_by(command, path) as served:
        yield served


@pytest.mark.parametrize("structured", [True, False])
def test_foreign_servers(foreign: Path, structured: bool) -> None:
    with NbdClient.connect(foreign, "disk0", structured=structured, timeout=30) as client:
        assert client.size == 64 * MIB
        data = pattern(MIB)
        client.write(MIB, data)
        client.write(3 * MIB + 1, b"odd", fua=True)
        client.flush()
        assert client.read(MIB - 10, MIB + 20) == bytes(10) + data + bytes(10)
        assert client.read(3 * MIB, 5) == b"\0odd\0"
        client.write_zeroes(MIB, 4096)
        client.trim(2 * MIB - 4096, 4096)
        expected = bytes(4096) + data[4096:-4096]
        assert client.read(MIB, MIB - 4096) == expected
        pieces = [(offset, 65536) for offset in range(0, 64 * MIB, 65536)]
        whole = dict(client.read_many(pieces, 16, ordered=False))
        assert len(whole) == 1024
        assert b"".join(whole[MIB + i * 65536] for i in range(15)) == expected[: 15 * 65536]
        with pytest.raises(NbdServerError) as caught:
            client.read(64 * MIB, 512)
        assert caught.value.errno == 22
        if structured:
            extents = client.block_status(0, 64 * MIB)
            assert sum(length for length, _ in extents) == 64 * MIB
            assert extents[0][1] == 3
            assert 0 in {status for _, status in extents}
        client.flush()


def test_foreign_servers_list_their_exports(foreign: Path) -> None:
    assert list_exports(foreign, timeout=30)[0][0] in {"disk0", ""}
