"""A control API with canned answers, on a unix socket, for tests of the command line."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

NOW = 1_763_987_415.5  # 2025-11-24 12:30:15.5 UTC

DISK: dict[str, Any] = {
    "name": "disk0",
    "uuid": "0123456789abcdef0123456789abcdef",
    "size": 10 << 30,
    "block_size": 512,
    "backing": "/srv/disk0.img",
    "journal": "/srv/journal",
    "state": "served",
    "reason": None,
    "durable_seq": 1000,
    "applied_seq": 990,
    "last_seq": 1004,
    "floor_seq": 1,
    "window_start_seq": 17,
    "window_start": NOW - 7200,
    "window_seconds": 7200.0,
    "window_configured": 172_800,
    "journal_bytes": 3 << 30,
    "journal_limit": 20 << 30,
    "redo_bytes": 2 << 30,
    "undo_bytes": 1 << 30,
    "index_bytes": 5 << 20,
    "overflow": "shrink",
    "lag_seconds": 0.25,
    "lag_bytes": 16384,
    "apply_lag_bytes": 40960,
    "apply_lag_records": 10,
    "connections": 2,
    "views": 1,
    "bookmarks": 3,
    "poisoned": False,
    "degraded": False,
    "restarts": {"recorder": 0, "curator": 1, "viewer": 0},
    "uri": "nbd+unix:///disk0?socket=/run/cdp/nbd.sock",
}


def disk(name: str, **changes: Any) -> dict[str, Any]:
    """A disk as the API shows it."""
    return {**DISK, "name": name, **changes}


def status(*disks: dict[str, Any]) -> dict[str, Any]:
    """The answer of /v1/status."""
    return {
        "version": "0.1.0",
        "pid": 4711,
        "state_dir": "/var/lib/cdp",
        "uptime_seconds": 3661.2,
        "nbd": ["unix:/var/lib/cdp/nbd.sock"],
        "http": None,
        "disks": list(disks),
    }


@dataclass(frozen=True)
class Call:
    """One request that was made."""

    method: str
    path: str
    query: dict[str, str]
    body: Any


Answer = tuple[int, Any]


class FakeApi:
    """Answers ``(method, path)`` with what it was told, and keeps what it was asked."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.calls: list[Call] = []
        self._answers: dict[tuple[str, str], Callable[[Call], Answer]] = {}
        self._server = _Server(str(state_dir / "control.sock"), _Handler)
        self._server.api = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving, and wait for it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, method: str, path: str, body: Any, status: int = 200) -> None:
        """Answer with this JSON; a list of dictionaries is sent as ndjson."""
        self._answers[method, path] = lambda _: (status, body)

    def compute(self, method: str, path: str, function: Callable[[Call], Answer]) -> None:
        """Answer with what the function makes of the call."""
        self._answers[method, path] = function

    def refuse(self, method: str, path: str, status: int, kind: str, error: str) -> None:
        """Answer with an error."""
        self.answer(method, path, {"error": error, "kind": kind}, status)

    def find(self, call: Call) -> Answer:
        """The answer to a call."""
        self.calls.append(call)
        function = self._answers.get((call.method, call.path))
        if function is None:
            return 404, {"error": f"no answer to {call.method} {call.path}", "kind": "not_found"}
        return function(call)

    def asked(self, method: str, path: str) -> list[Call]:
        """All calls of this kind so far."""
        return [call for call in self.calls if (call.method, call.path) == (method, path)]


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    api: FakeApi


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("Content-Length", 0))
        data = self.rfile.read(length)
        call = Call(
            self.command,
            unquote(parts.path),
            dict(parse_qsl(parts.query)),
            json.loads(data) if data else None,
        )
        status, body = self.server.api.find(call)
        self.close_connection = True
        self.send_response(status)
        if isinstance(body, list):
            self._send_lines(body)
            return
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def _send_lines(self, lines: list[Any]) -> None:
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            data = json.dumps(line).encode() + b"\n"
            # In two pieces: a line need not arrive whole.
            for piece in (data[:5], data[5:]):
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        try:
            self.wfile.write(b"0\r\n\r\n")
        except BrokenPipeError:
            pass  # a client that was told of an error need not wait for the end

    do_GET = do_POST = do_DELETE = _handle

    def address_string(self) -> str:
        """A unix socket's client has no address."""
        return "client"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""
