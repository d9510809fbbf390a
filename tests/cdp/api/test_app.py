"""Routes, errors and progress, against a control that only notes what it was asked."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from cdp.api.app import BODY_BYTES_MAX, make_app
from cdp.api.control import Control, Report
from cdp.api.metrics import HostFacts
from cdp.api.server import serve_http
from cdp.unix_sockets import bind_socket
from journal.errors import Busy, CdpError, Conflict, InvalidInput, NotFound, NotOpenable

Json = dict[str, Any]


class Answer:
    """What an application sent."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.gone = trio.Event()

    @property
    def json(self) -> Json:
        return dict(json.loads(self.body))

    @property
    def lines(self) -> list[Json]:
        return [json.loads(line) for line in self.body.splitlines()]


class Client:
    """Speaks ASGI, without a server in between."""

    def __init__(self, control: object, *, public: bool = False) -> None:
        self.app = make_app(cast(Control, control), public=public)

    async def request(
        self, method: str, target: str, body: bytes | Json = b"", answer: Answer | None = None
    ) -> Answer:
        """Until the application has answered; `answer.gone` is the client hanging up."""
        answer = answer or Answer()
        path, _, query = target.partition("?")
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        parts = [data]

        async def receive() -> Json:
            if parts:
                return {"type": "http.request", "body": parts.pop(), "more_body": False}
            await answer.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await trio.lowlevel.checkpoint()
            if message["type"] == "http.response.start":
                assert answer.status == 0
                answer.status = message["status"]
                answer.headers = dict(message["headers"])
            else:
                answer.body += message.get("body", b"")

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [],
            "scheme": "http",
            "server": ("cdpd", 80),
        }
        await self.app(scope, receive, send)
        return answer


class Recording:
    """Answers every call with what it was asked."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*arguments: Any) -> Json:
            await trio.lowlevel.checkpoint()
            shown = [each for each in arguments if not callable(each)]
            return {"call": name, "arguments": shown, "disks": []}

        return call


BODIES: dict[str, Json] = {"resize": {"size": 1}, "scrub": {}}

ROUTES: list[tuple[str, str, Json | None, str, list[Any]]] = [
    ("GET", "/v1/status", None, "status", []),
    ("GET", "/v1/disks/d", None, "disk", ["d"]),
    ("DELETE", "/v1/disks/d?force=1", None, "remove_disk", ["d", True, False]),
    ("DELETE", "/v1/disks/d?purge=1", None, "remove_disk", ["d", False, True]),
    ("POST", "/v1/disks/d/resize", {"size": 7}, "resize", ["d", 7]),
    ("POST", "/v1/disks/d/set", {"window": None}, "set", ["d", {"window": None}]),
    ("POST", "/v1/disks/d/drain", {}, "drain", ["d"]),
    ("POST", "/v1/disks/d/release", {}, "release", ["d"]),
    ("POST", "/v1/disks/d/resume", {"unchanged": True}, "resume", ["d", True, False]),
    ("POST", "/v1/disks/d/offer", {}, "offer", ["d"]),
    ("POST", "/v1/disks/d/resolve", {"spec": "-1m"}, "resolve", ["d", "-1m"]),
    ("GET", "/v1/disks/d/timeline", None, "timeline", ["d", 60, None, None]),
    ("GET", "/v1/disks/d/timeline?buckets=9&from=%405&to=now", None, "timeline",
     ["d", 9, "@5", "now"]),
    ("GET", "/v1/disks/d/points?limit=3&from=seq:1", None, "points", ["d", "seq:1", None, 3]),
    ("POST", "/v1/bookmarks", {"disks": ["d"], "label": "l"}, "add_bookmarks",
     [["d"], "l", "crash"]),
    ("GET", "/v1/disks/d/bookmarks", None, "bookmarks", ["d"]),
    ("DELETE", "/v1/disks/d/bookmarks/l", None, "remove_bookmark", ["d", "l"]),
    ("POST", "/v1/rollback", {"disks": ["d"], "to": "-1m", "dry_run": True}, "rollback",
     [["d"], "-1m", True, False]),
    ("POST", "/v1/disks/d/views", {"at": "now", "writable": True}, "open_view",
     ["d", "now", True]),
    ("GET", "/v1/views", None, "views", []),
    ("DELETE", "/v1/views/v", None, "close_view", ["v"]),
    ("POST", "/v1/disks/d/scrub", {}, "scrub", ["d", True, None]),
    ("POST", "/v1/disks/d/scrub", {"wait": False, "rate": 5}, "scrub", ["d", False, 5]),
    ("GET", "/v1/disks/d/scrub", None, "scrub_status", ["d"]),
    ("DELETE", "/v1/disks/d/scrub", None, "stop_scrub", ["d"]),
    ("GET", "/v1/doctor", None, "doctor", []),
]  # fmt: skip


@pytest.mark.parametrize(("method", "target", "body", "call", "arguments"), ROUTES)
async def test_routes(
    method: str, target: str, body: Json | None, call: str, arguments: list[Any]
) -> None:
    answer = await Client(Recording()).request(method, target, body if body is not None else b"")
    assert answer.status in (200, 201)
    result = answer.json if len(answer.lines) == 1 and "call" in answer.json else None
    result = result or answer.lines[-1]["result"]
    assert (result["call"], result["arguments"]) == (call, arguments)


async def test_adding_a_disk_answers_201_and_fills_in_what_was_left_out() -> None:
    answer = await Client(Recording()).request("POST", "/v1/disks", {"name": "d", "size": 5})
    assert answer.status == 201
    (body,) = answer.json["arguments"]
    assert (body["name"], body["size"], body["backing"], body["window"]) == ("d", 5, None, None)
    assert (await Client(Recording()).request("GET", "/v1/disks")).json == {"disks": []}


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "said"),
    [
        ("GET", "/v1/nothing", b"", 404, "Not Found"),
        ("PUT", "/v1/disks", b"", 405, "Method Not Allowed"),
        ("POST", "/v1/disks", b"{", 400, "not as documented"),
        ("POST", "/v1/disks", b"[]", 400, "not as documented"),
        ("POST", "/v1/disks", b"{}", 400, "name"),
        ("POST", "/v1/disks", b'{"name": "d", "sise": 1}', 400, "sise"),
        ("POST", "/v1/disks", b'{"name": "d", "size": "1"}', 400, "size"),
        ("POST", "/v1/disks/d/resize", b"{}", 400, "size"),
        ("POST", "/v1/disks/d/set", b"x" * (BODY_BYTES_MAX + 1), 400, "at most"),
        ("GET", "/v1/disks/d/timeline?buckets=0", b"", 400, "from 1 to"),
        ("GET", "/v1/disks/d/points?limit=many", b"", 400, "limit is a number"),
        ("DELETE", "/v1/disks/d?force=yes", b"", 400, "0 or 1"),
    ],
)
async def test_what_is_not_as_documented(
    method: str, target: str, body: bytes, status: int, said: str
) -> None:
    answer = await Client(Recording()).request(method, target, body)
    assert answer.status == status
    assert said in answer.json["error"]
    assert "\n" not in answer.json["error"]
    assert answer.json["kind"] in ("invalid", "not_found")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidInput, 400, "invalid"),
        (NotFound, 404, "not_found"),
        (Conflict, 409, "conflict"),
        (NotOpenable, 409, "not_openable"),
        (Busy, 503, "busy"),
        (CdpError, 500, "internal"),
    ],
)
@pytest.mark.parametrize("target", ["/v1/disks/d/resize", "/v1/disks/d/scrub"])
async def test_errors_have_a_status_and_a_kind(
    error: type[CdpError], status: int, kind: str, target: str
) -> None:
    class Refusing:
        async def resize(self, name: str, size: int) -> Json:
            raise error("what to do")

        async def scrub(self, name: str, wait: bool, rate: int | None, report: Report) -> Json:
            raise error("what to do")

    answer = await Client(Refusing()).request("POST", target, BODIES[target.rpartition("/")[2]])
    assert (answer.status, answer.json) == (status, {"error": "what to do", "kind": kind})


@pytest.mark.expect_log("failed")
@pytest.mark.parametrize("target", ["/v1/disks/d/resize", "/v1/disks/d/scrub"])
async def test_a_bug_is_an_answer(target: str) -> None:
    class Broken:
        async def resize(self, name: str, size: int) -> Json:
            raise KeyError("oops")

        async def scrub(self, name: str, wait: bool, rate: int | None, report: Report) -> Json:
            raise KeyError("oops")

    answer = Answer()
    try:
        await Client(Broken()).request("POST", target, BODIES[target.rpartition("/")[2]], answer)
    except KeyError:
        # starlette hands it on to the server once it has been answered.
        assert target.endswith("resize")
    assert answer.status == 500
    assert answer.json["kind"] == "internal"
    assert "KeyError" in answer.json["error"]


# ----------------------------------------------------------------------------------------- progress


async def test_progress_then_the_result(autojump_clock: trio.testing.MockClock) -> None:
    class Working:
        async def scrub(self, name: str, wait: bool, rate: int | None, report: Report) -> Json:
            for done in range(3):
                report({"phase": "scrubbing", "done": done, "total": 3, "unit": "bytes"})
                await trio.sleep(1)
            return {"damaged": []}

    answer = await Client(Working()).request("POST", "/v1/disks/d/scrub")
    assert answer.status == 200
    assert answer.headers[b"content-type"] == b"application/x-ndjson"
    assert [line["progress"]["done"] for line in answer.lines[:-1]] == [0, 1, 2]
    assert answer.lines[-1] == {"result": {"damaged": []}}


async def test_an_error_after_progress_is_the_last_line(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Failing:
        async def scrub(self, name: str, wait: bool, rate: int | None, report: Report) -> Json:
            report({"done": 1})
            await trio.sleep(1)
            raise Conflict("too late")

    answer = await Client(Failing()).request("POST", "/v1/disks/d/scrub")
    assert answer.status == 200
    assert answer.lines[1] == {"error": "too late", "kind": "conflict"}


async def test_only_the_latest_of_many_reports_is_sent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Chatty:
        async def scrub(self, name: str, wait: bool, rate: int | None, report: Report) -> Json:
            for done in range(100_000):
                report({"done": done})
            await trio.sleep(1)
            return {}

    answer = await Client(Chatty()).request("POST", "/v1/disks/d/scrub")
    assert answer.lines[:-1] == [{"progress": {"done": 99_999}}]


async def test_who_hangs_up_cancels_the_work() -> None:
    began, cancelled = trio.Event(), trio.Event()

    class Working:
        async def scrub(self, name: str, wait: bool, rate: int | None, report: Report) -> Json:
            began.set()
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

    answer = Answer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Client(Working()).request, "POST", "/v1/disks/d/scrub", b"", answer)
        await began.wait()
        answer.gone.set()
    assert cancelled.is_set()
    assert answer.status == 0


# ------------------------------------------------------------------------------------------- public


async def test_a_port_that_others_reach_has_metrics_and_no_control() -> None:
    class Measured:
        async def metrics(self) -> HostFacts:
            return HostFacts("1.0", 5.0, 2, {}, [])

    public, private = Client(Measured(), public=True), Client(Measured())
    for client in (public, private):
        answer = await client.request("GET", "/metrics")
        assert answer.headers[b"content-type"].startswith(b"text/plain; version=0.0.4")
        assert b"cdp_nbd_connections 2.0" in answer.body
        assert (await client.request("GET", "/healthz")).body == b"ok\n"
    for method, target, *_ in ROUTES:
        assert (await public.request(method, target)).status == 404


# ------------------------------------------------------------------------------------------- server


async def _exchange(stream: trio.SocketStream, request: bytes) -> bytes:
    await stream.send_all(request)
    answer = b""
    async for part in stream:
        answer += part
    return answer


@pytest.fixture
async def http_socket(short_tmp: Path, nursery: trio.Nursery) -> Path:
    """A server on a unix socket."""
    path = short_tmp / "control.sock"
    app = make_app(cast(Control, Recording()), public=False)
    await nursery.start(serve_http, app, [bind_socket(path, socket.SOCK_STREAM)])
    return path


async def test_over_a_real_socket(http_socket: Path) -> None:
    async with await trio.open_unix_socket(str(http_socket)) as stream:
        request = b"GET /v1/disks/d HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = await _exchange(stream, request)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert json.loads(body)["call"] == "disk"


async def test_a_client_that_talks_nonsense_harms_nobody(http_socket: Path) -> None:
    async with await trio.open_unix_socket(str(http_socket)) as stream:
        assert b"400" in await _exchange(stream, b"\x00\xff nonsense\r\n\r\n")
    await test_over_a_real_socket(http_socket)
    assert logging.getLogger("hypercorn.error").level == logging.WARNING
