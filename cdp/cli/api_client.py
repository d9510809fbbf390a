"""The daemon's API: HTTP and JSON over DIR/control.sock, by the standard library alone.

What the daemon answers is handed on as it is: lists and dictionaries with the names that the API
documents, which are also those of ``--json``.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote, urlencode

from journal.errors import CdpError, InvalidInput

if TYPE_CHECKING:
    import typer

SOCKET_NAME = "control.sock"
# The longest that a call which should be quick may take: a bookmark may wait for a frozen
# application, opening a view for a slow disk.
CALL_SECONDS_MAX = 300.0
BUSY_TRIES, BUSY_SECONDS = 100, 0.05
LINE_BYTES_MAX = 16 << 20

Json = dict[str, Any]


class ApiError(CdpError):
    """The daemon refused; ``kind`` is its word for why, ``status`` the HTTP status."""

    def __init__(self, message: str, kind: str, status: int) -> None:
        super().__init__(message)
        self.kind, self.status = kind, status


class DaemonUnreachable(CdpError):
    """Nobody answers at the control socket, or not as a daemon does; ``running`` if it exists."""

    def __init__(self, message: str, *, running: bool) -> None:
        super().__init__(message)
        self.running = running


def default_state_dir() -> Path:
    """Where the daemon keeps its state, unless told otherwise: that of root, or of this user."""
    if os.geteuid() == 0:
        return Path("/var/lib/cdp")
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home) / "cdp"


def state_dir_of(ctx: typer.Context) -> Path:
    """The state directory of this invocation; also while a shell completes it."""
    given = ctx.find_root().params.get("state_dir") or os.environ.get("CDP_STATE_DIR")
    return Path(given) if given else default_state_dir()


def client_of(ctx: typer.Context) -> ApiClient:
    """The API of the daemon that this invocation talks to."""
    return ApiClient(state_dir_of(ctx))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self.timeout)
            self._connect(connection)
        except BaseException:
            connection.close()
            raise
        self.sock = connection

    def _connect(self, connection: socket.socket) -> None:
        for _ in range(BUSY_TRIES):
            try:
                connection.connect(os.fspath(self._path))
                return
            except BlockingIOError:  # many clients wait already, and sockets of this kind do not
                time.sleep(BUSY_SECONDS)
        raise TimeoutError(f"too many clients wait for {self._path}")


def path_of(*parts: str) -> str:
    """``/v1/disks/NAME/...``: parts quoted, so that no name can mean another path.

    :raises InvalidInput: one that can be no name: nothing is called that.
    """
    for part in parts:
        if part in ("", ".", "..") or "/" in part:
            raise InvalidInput(f"nothing can be called {part!r}: see 'cdp status'")
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


class ApiClient:
    """One daemon, found by its state directory. Every call opens a connection of its own.

    :raises ApiError: the daemon refused, from every call.
    :raises DaemonUnreachable: it is not running, or broke off, from every call.
    """

    def __init__(self, state_dir: Path, *, timeout: float = CALL_SECONDS_MAX) -> None:
        self.state_dir = state_dir
        self._timeout = timeout

    # ------------------------------------------------------------------------------ short calls
    def get(self, path: str, **query: object) -> Json:
        """The answer to a GET; parameters that are None are left out."""
        return self._call("GET", path, None, query)

    def post(self, path: str, body: Mapping[str, object] | None = None) -> Json:
        """The answer to a POST of a JSON object."""
        return self._call("POST", path, body or {}, {})

    def delete(self, path: str) -> Json:
        """The answer to a DELETE."""
        return self._call("DELETE", path, None, {})

    def _call(
        self, method: str, path: str, body: Mapping[str, object] | None, query: Mapping[str, object]
    ) -> Json:
        connection = _UnixConnection(self.state_dir / SOCKET_NAME, self._timeout)
        try:
            response = self._send(connection, method, path, body, query)
            return self._object(response.read() or b"{}")
        except TimeoutError:
            raise DaemonUnreachable(
                f"the daemon has not answered within {self._timeout:.0f} s: look at its log",
                running=True,
            ) from None
        except (OSError, http.client.HTTPException) as error:
            self._broken(error)
        finally:
            connection.close()

    # ------------------------------------------------------------------------------- long calls
    def long_call(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        query: Mapping[str, object] | None = None,
        progress: Callable[[Json], None] = lambda _: None,
    ) -> Json:
        """The result of a call that reports as it goes (ndjson), however long it takes.

        :param progress: called with each report: ``phase``, ``done``, ``total``, ``unit``.
        """
        connection = _UnixConnection(self.state_dir / SOCKET_NAME, None)
        try:
            response = self._send(connection, method, path, body, query or {})
            if response.headers.get_content_type() == "application/json":
                return self._object(response.read())  # it was quick, there is nothing to report
            for line in self._lines(response):
                if "result" in line:
                    result = line["result"]
                    return result if isinstance(result, dict) else {"result": result}
                if "error" in line:
                    kind = str(line.get("kind", "internal"))
                    raise ApiError(str(line["error"]), kind, response.status)
                if isinstance(line.get("progress"), dict):
                    progress(line["progress"])
        except (OSError, http.client.HTTPException) as error:
            self._broken(error)
        finally:
            connection.close()
        raise DaemonUnreachable(
            "the daemon broke off before it was done: see 'cdp status' and its log", running=True
        )

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[Json]:
        while line := response.readline(LINE_BYTES_MAX):
            if line.strip():
                yield self._object(line)

    # -------------------------------------------------------------------------------- plumbing
    def _send(
        self,
        connection: _UnixConnection,
        method: str,
        path: str,
        body: Mapping[str, object] | None,
        query: Mapping[str, object],
    ) -> http.client.HTTPResponse:
        given = {name: value for name, value in query.items() if value is not None}
        target = f"{path}?{urlencode(given)}" if given else path
        data = None if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/json, application/x-ndjson"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        connection.request(method, target, data, headers)
        response = connection.getresponse()
        if response.status >= 300:
            self._refused(response)
        return response

    def _refused(self, response: http.client.HTTPResponse) -> NoReturn:
        data = response.read(LINE_BYTES_MAX)
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or "error" not in answer:
            answer = {"error": f"the daemon answered {response.status} {response.reason}"}
        raise ApiError(str(answer["error"]), str(answer.get("kind", "internal")), response.status)

    def _object(self, data: bytes) -> Json:
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise DaemonUnreachable(
                f"what answers at {self.state_dir / SOCKET_NAME} is no cdpd, or of another version",
                running=True,
            )
        return answer

    def _broken(self, error: OSError | http.client.HTTPException) -> NoReturn:
        path = self.state_dir / SOCKET_NAME
        if isinstance(error, PermissionError):
            raise DaemonUnreachable(
                f"no permission to talk to the daemon at {path}: run it as the daemon's user",
                running=True,
            ) from None
        absent = (FileNotFoundError, ConnectionRefusedError, NotADirectoryError)
        if isinstance(error, absent):
            raise DaemonUnreachable(
                f"no daemon is running for {self.state_dir}: start it with "
                f"'cdpd --state-dir {self.state_dir}', or name another --state-dir",
                running=False,
            ) from None
        if isinstance(error, OSError) and "too long" in str(error):
            raise DaemonUnreachable(
                f"the path {path} is too long for a socket: use a shorter --state-dir",
                running=False,
            ) from None
        what = str(error) or type(error).__name__
        raise DaemonUnreachable(
            f"the daemon broke off ({what}): see 'cdp status' and its log", running=True
        ) from None
