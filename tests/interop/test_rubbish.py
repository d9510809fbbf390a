"""Clients that send rubbish, or nothing: they are cut off, others are served, limits hold."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cdp.nbd.client import NbdClient, NbdNegotiationError
from cdp.nbd.wire import RemoteProtocolError
from tests.interop.commands import Commands, eventually
from tests.interop.daemon import Daemon

MIB = 1 << 20
LIMITS = """
[limits]
nbd-connections = 40
nbd-handshakes = 16
handshake-seconds = 3.0
"""
GREETING = b"NBDMAGICIHAVEOPT"
SECONDS = 20.0


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with small limits, and the disk ``disk0``."""
    import shutil
    import tempfile

    place = Path(tempfile.mkdtemp(prefix="cdp-", dir="/tmp"))
    (place / "cdpd.toml").write_text(LIMITS)
    try:
        with Daemon(place / "state", "--config", str(place / "cdpd.toml")) as running:
            Commands(running.directory)("disk", "add", "disk0", "--size", str(MIB))
            yield running
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(autouse=True)
def _others_are_served(limited: Daemon) -> Iterator[None]:
    """Who was there before notices nothing, and who comes afterwards is let in."""
    with NbdClient.connect(limited.uri("disk0"), timeout=SECONDS) as client:
        client.write(4096, b"\x77" * 4096)
        yield
        assert client.read(4096, 4096) == b"\x77" * 4096
        client.flush()
    assert limited.process is not None
    assert limited.process.poll() is None
    eventually(lambda: _served(limited), "nobody is served any more")
    disk = Commands(limited.directory).disk("disk0")
    assert (disk["state"], set(disk["restarts"].values())) == ("served", {0})


def _served(daemon: Daemon) -> bool:
    try:
        with NbdClient.connect(daemon.uri("disk0"), timeout=SECONDS) as client:
            return client.read(4096, 1) == b"\x77"
    except (OSError, NbdNegotiationError, RemoteProtocolError, EOFError):
        return False


# ---------------------------------------------------------------------------------------------- NBD


def nbd(daemon: Daemon) -> socket.socket:
    """A connection that has said nothing."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(SECONDS)
    sock.connect(str(daemon.directory / "nbd.sock"))
    return sock


def drain(sock: socket.socket) -> bytes:
    """Everything until the other side closes."""
    found = b""
    try:
        while data := sock.recv(65536):
            found += data
    except ConnectionError:
        pass
    return found


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    """One option of the negotiation."""
    return b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data


def test_random_bytes_instead_of_a_handshake(limited: Daemon, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        with nbd(limited) as sock:
            try:
                sock.sendall(struct.pack(">I", 3) + rng.randbytes(rng.randrange(1, 5000)))
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it has been cut off by then
            assert drain(sock).startswith(GREETING[:8])


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", 3) + option(7, length=0xFFFFFFFF),
        struct.pack(">I", 3) + option(7, struct.pack(">I", 0xFFFFFFFF) + b"x"),
        struct.pack(">I", 3) + option(1, b"nosuch"),
        struct.pack(">I", 3) + option(3, b"x" * 100) * 100,
        struct.pack(">I", 3) + option(0x7FFFFFFF, b"x") * 3,
        struct.pack(">I", 3) + option(7, struct.pack(">I", 5) + b"disk0" + b"\0\1")[:-5],
    ],
    ids=str,
)
def test_half_a_handshake(limited: Daemon, sent: bytes) -> None:
    with nbd(limited) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        assert drain(sock).startswith(GREETING)


def test_who_says_nothing_is_cut_off(limited: Daemon) -> None:
    with nbd(limited) as silent, nbd(limited) as slow:
        assert silent.recv(18).startswith(GREETING)
        slow.sendall(struct.pack(">I", 3) + option(7)[:9])
        assert drain(silent) == b""
        drain(slow)


def test_rubbish_after_the_handshake(limited: Daemon, seed: int) -> None:
    rng = random.Random(seed)
    before = Commands(limited.directory).disk("disk0")["last_seq"]
    for number in range(6):
        with nbd(limited) as sock:
            sock.sendall(struct.pack(">I", 3) + option(7, struct.pack(">I5sH", 5, b"disk0", 0)))
            found = b""
            while struct.pack(">II", 7, 1) not in found:
                data = sock.recv(4096)
                assert data, found
                found += data
            rubbish = rng.randbytes(28 * rng.randrange(1, 50))
            if number % 2:  # the head of a request of 4 GiB
                rubbish = struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 0xFFFFFFFF) + rubbish
            try:
                sock.sendall(rubbish)
            except OSError:
                pass
            sock.shutdown(socket.SHUT_WR)
            drain(sock)
    assert Commands(limited.directory).disk("disk0")["last_seq"] == before


def test_a_thousand_idle_connections(limited: Daemon) -> None:
    cdp = Commands(limited.directory)
    with ExitStack() as stack:
        idle = []
        for _ in range(1000):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(limited.directory / "nbd.sock"))
            idle.append(sock)
        assert cdp.json("status")["connections"] <= 40
        assert cdp.disk("disk0")["connections"] == 1
        open_files = len(os.listdir(f"/proc/{limited.process.pid}/fd")) if limited.process else 0
        assert open_files < 150
        # Those above the limit are closed at once, the others when their time is over; meanwhile
        # somebody who speaks gets in as soon as there is a place.
        eventually(lambda: _served(limited), "nobody can come in")
        poll = select.poll()
        for sock in idle:
            poll.register(sock, select.POLLHUP)
        eventually(lambda: len(poll.poll(0)) >= 1000, "idle connections are kept")


def test_more_clients_than_allowed(limited: Daemon) -> None:
    with ExitStack() as stack:
        clients = []
        for _ in range(60):
            try:
                client = NbdClient.connect(limited.uri("disk0"), timeout=SECONDS)
            except (OSError, RemoteProtocolError, EOFError):
                break
            clients.append(stack.enter_context(client))
            if len(clients) % 10 == 0:
                Commands(limited.directory).json("status")  # counts connections
        assert 30 <= len(clients) <= 40
        for client in clients:
            assert client.read(4096, 1) == b"\x77"


# -------------------------------------------------------------------------------------- control API


class Control(http.client.HTTPConnection):
    """Raw requests to the control socket."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = str(daemon.directory / "control.sock")

    def connect(self) -> None:
        """See the class."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)  # waits for room in the backlog, which it does not later on
        self.sock.settimeout(SECONDS)


def ask(daemon: Daemon, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    """Status and answer."""
    connection = Control(daemon)
    try:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data)
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert isinstance(answer, dict)
        return response.status, answer
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/disks", b"{", 400),
        ("POST", "/v1/disks", b"\xff\xfe", 400),
        ("POST", "/v1/disks", b"[]", 400),
        ("POST", "/v1/disks", b"null", 400),
        ("POST", "/v1/disks", b"", 400),
        ("POST", "/v1/disks", b"[" * 100_000, 400),
        ("POST", "/v1/disks", {"name": 5}, 400),
        ("POST", "/v1/disks", {"name": "x", "size": "1M"}, 400),
        ("POST", "/v1/disks", {"name": "x", "size": 1e9}, 400),
        ("POST", "/v1/disks", {"name": "x", "size": -1}, 400),
        ("POST", "/v1/disks", {"name": "x", "size": 1 << 70}, 400),
        ("POST", "/v1/disks", {"name": "x", "size": MIB, "frob": 1}, 400),
        ("POST", "/v1/disks", {"name": "x", "size": MIB, "journal": "relative"}, 400),
        ("POST", "/v1/disks", {"name": "x", "size": MIB, "backing": "/a\0b"}, 400),
        ("POST", "/v1/disks", {"name": "x", "size": MIB, "window": True}, 400),
        ("POST", "/v1/disks", {"name": "../x", "size": MIB}, 400),
        ("POST", "/v1/disks", {"name": "x\0y", "size": MIB}, 400),
        ("GET", "/v1/disks/nosuch", None, 404),
        ("GET", "/v1/nosuch", None, 404),
        ("GET", "/v2/status", None, 404),
        ("GET", "/", None, 404),
        ("PUT", "/v1/disks", None, 405),
        ("DELETE", "/v1/status", None, 405),
        ("DELETE", "/v1/views/nosuch", None, 404),
        ("DELETE", "/v1/disks/disk0?force=yes", None, 400),
        ("DELETE", "/v1/disks/nosuch", None, 404),
        ("DELETE", "/v1/disks/disk0/bookmarks/nosuch", None, 404),
        ("GET", "/v1/disks/disk0/timeline?buckets=0", None, 400),
        ("GET", "/v1/disks/disk0/timeline?buckets=1000000", None, 400),
        ("GET", "/v1/disks/disk0/timeline?buckets=1e3", None, 400),
        ("GET", "/v1/disks/disk0/timeline?from=nosuch", None, 404),
        ("GET", "/v1/disks/disk0/points?limit=-1", None, 400),
        ("GET", "/v1/disks/disk0/points?from=%ff", None, 400),
        ("POST", "/v1/disks/disk0/resolve", {"spec": 5}, 400),
        ("POST", "/v1/disks/disk0/resolve", {"spec": "seq:999"}, 409),
        ("POST", "/v1/disks/disk0/resize", {"size": None}, 400),
        ("POST", "/v1/disks/disk0/set", {"window": {}}, 400),
        ("POST", "/v1/disks/disk0/set", {"window": float("inf")}, 400),
        ("POST", "/v1/disks/disk0/set", {"tail": True}, 400),
        ("POST", "/v1/disks/disk0/set", {"frob": 1}, 400),
        ("POST", "/v1/disks/disk0/resume", {"unchanged": True, "give_up_history": True}, 400),
        ("POST", "/v1/disks/disk0/views", {"at": "now", "writable": "yes"}, 400),
        ("POST", "/v1/bookmarks", {"disks": "disk0", "label": "x"}, 400),
        ("POST", "/v1/bookmarks", {"disks": [], "label": "x"}, 400),
        ("POST", "/v1/bookmarks", {"disks": ["disk0", "disk0"], "label": "x"}, 400),
        ("POST", "/v1/bookmarks", {"disks": ["disk0"], "label": ""}, 400),
        ("POST", "/v1/bookmarks", {"disks": ["disk0"], "label": "x", "consistency": "y"}, 400),
        ("POST", "/v1/rollback", {"disks": [], "to": "now"}, 400),
        ("POST", "/v1/rollback", {"disks": ["nosuch"], "to": "now"}, 404),
    ],
)  # fmt: skip
def test_requests_that_make_no_sense(
    limited: Daemon, method: str, path: str, body: Any, status: int
) -> None:
    found, answer = ask(limited, method, path, body)
    assert found == status, answer
    assert set(answer) == {"error", "kind"}, answer
    assert answer["kind"] in {"invalid", "not_found", "conflict", "not_openable"}
    assert re.fullmatch(r"[^\n]{5,}", answer["error"]), answer
    assert [disk["name"] for disk in ask(limited, "GET", "/v1/disks")[1]["disks"]] == ["disk0"]


def test_huge_requests(limited: Daemon) -> None:
    body = b'{"name": "' + b"x" * (2 * MIB) + b'"}'
    for request in (
        b"POST /v1/disks HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
        b"GET /" + b"x" * MIB + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + b"x" * MIB + b"\r\n\r\n",
        b"\x16\x03\x01" * 1000,
        b"NBDMAGIC" * 10,
        b"POST /v1/disks HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/disks HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/disks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000,
    ):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(SECONDS)
            sock.connect(str(limited.directory / "control.sock"))
            try:
                sock.sendall(request)
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            assert b" 200 " not in drain(sock)[:20]


def test_who_hangs_up_in_the_middle(limited: Daemon) -> None:
    for sent in (b"", b"GET ", b"POST /v1/disks HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
                 b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n",
                 b"POST /v1/disks/disk0/scrub HTTP/1.1\r\nHost: x\r\n\r\n"):  # fmt: skip
        for _ in range(5):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(limited.directory / "control.sock"))
                sock.sendall(sent)
    assert ask(limited, "GET", "/v1/status")[0] == 200


def test_idle_api_clients_do_not_keep_others_out(limited: Daemon) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(limited.directory / "control.sock"))
            sock.sendall(b"GET /v1/st")
        assert ask(limited, "GET", "/v1/status")[0] == 200
