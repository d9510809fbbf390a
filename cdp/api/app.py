"""Routes, and how their answers look.

Errors are ``{"error": LINE, "kind": WORD}`` with the status of the kind. Long work answers in lines
of JSON: ``{"progress": {...}}`` any number of times, then ``{"result": {...}}`` or an error. The
answer begins with the first of them, so work that fails before it reports anything has an ordinary
status. Who hangs up cancels the work, unless it is past the point of no return.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Annotated, Any, Final, TypeVar

import msgspec
import trio
from msgspec import Meta, Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from cdp.api.control import Control, Json, Report
from cdp.api.metrics import CONTENT_TYPE, render
from journal.errors import CdpError, InvalidInput

log = logging.getLogger(__name__)

BODY_BYTES_MAX: Final = 1 << 20
BUCKETS_MAX: Final = 10_000
POINTS_MAX: Final = 100_000
# A progress line at most so often: it is for eyes.
PROGRESS_SECONDS: Final = 0.1
# A client that does not take one for so long gets no more.
PROGRESS_SECONDS_MAX: Final = 5.0
# Errors that are nobody's mistake, and what to do about them.
_SURROUNDINGS: Final = {
    errno.ENOSPC: "free some space and say it again",
    errno.EDQUOT: "raise the quota and say it again",
    errno.EROFS: "mount the file system for writing",
    errno.EACCES: "let the daemon's user use it",
    errno.EPERM: "let the daemon's user use it",
    errno.EIO: "look at that device, and at the kernel's log",
}
STATUS_OF: Final = {
    "invalid": 400,
    "not_found": 404,
    "conflict": 409,
    "not_openable": 409,
    "busy": 503,
    "internal": 500,
}


# ------------------------------------------------------------------------------------ what is sent


class _AddDisk(Struct, forbid_unknown_fields=True):
    name: str
    size: int | None = None
    backing: str | None = None
    journal: str | None = None
    window: float | None = None
    journal_limit: int | None = None
    overflow: str | None = None
    segment_bytes: int | None = None
    block_size: int | None = None


class _Resize(Struct, forbid_unknown_fields=True):
    size: int


class _Resume(Struct, forbid_unknown_fields=True):
    unchanged: bool = False
    give_up_history: bool = False


class _Resolve(Struct, forbid_unknown_fields=True):
    spec: str


class _AddBookmarks(Struct, forbid_unknown_fields=True):
    disks: list[str]
    label: str
    consistency: str = "crash"


class _Rollback(Struct, forbid_unknown_fields=True):
    disks: list[str]
    to: str
    dry_run: bool = False
    disconnect: bool = False


class _Scrub(Struct, forbid_unknown_fields=True):
    wait: bool = True
    rate: Annotated[int, Meta(ge=0)] | None = None


class _OpenView(Struct, forbid_unknown_fields=True):
    at: str
    writable: bool = False


_T = TypeVar("_T")


async def _body(request: Request, kind: type[_T]) -> _T:
    """The JSON object of a request.

    :raises InvalidInput: there is none, or it is not as documented.
    """
    data = bytearray()
    async with aclosing(request.stream()) as parts:
        async for part in parts:
            data += part
            if len(data) > BODY_BYTES_MAX:
                raise InvalidInput(f"a request has at most {BODY_BYTES_MAX} bytes")
    try:
        return msgspec.json.decode(bytes(data) or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise InvalidInput(f"the request is not as documented: {error}") from error


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "0")
    if value not in ("0", "1"):
        raise InvalidInput(f"{name} is 0 or 1, not {value!r}")
    return value == "1"


def _count(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= most):
        raise InvalidInput(f"{name} is a number from 1 to {most}, not {text!r}")
    return int(text)


# -------------------------------------------------------------------------------- what is answered


def _json(value: Json, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _error(error: CdpError) -> Response:
    return _json({"error": str(error), "kind": error.kind}, STATUS_OF.get(error.kind, 500))


class Work(Response):
    """The answer to long work; see the module."""

    def __init__(self, work: Callable[[Report], Awaitable[Json]]) -> None:
        self._work = work
        self._latest: Json | None = None
        self._reported = trio.Event()
        self._begun = False
        super().__init__()

    def _report(self, report: Json) -> None:
        """Never waits: a client that does not read must not hold up the work."""
        self._latest = report
        self._reported.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the work and reports, as long as the client is there."""
        line: Json | None = None
        status = 200
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_gone, receive, nursery.cancel_scope)
            nursery.start_soon(self._send_progress, send)
            try:
                line = {"result": await self._work(self._report)}
            except CdpError as error:
                line, status = _line(error), STATUS_OF.get(error.kind, 500)
            except Exception as error:
                # The boundary: what fails here fails for this client only.
                line, status = _line(_unexpected("work", error)), 500
            nursery.cancel_scope.cancel()
        if line is not None:
            await self._send(send, line, status)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_progress(self, send: Send) -> None:
        while True:
            await self._reported.wait()
            self._reported = trio.Event()
            latest, self._latest = self._latest, None
            if latest is not None:
                # Not interrupted half-way, or the last line would begin in the middle of this one.
                with trio.CancelScope(shield=True), trio.move_on_after(PROGRESS_SECONDS_MAX):
                    await self._send(send, {"progress": latest}, 200)
            await trio.sleep(PROGRESS_SECONDS)

    async def _send(self, send: Send, line: Json, status: int) -> None:
        if not self._begun:
            self._begun = True
            headers = [(b"content-type", b"application/x-ndjson")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
        body = msgspec.json.encode(line) + b"\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _line(error: CdpError) -> Json:
    return {"error": str(error), "kind": error.kind}


# ------------------------------------------------------------------------------------------ routes


class _Api:
    """One method per route, in the order of the documentation."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def status(self, request: Request) -> Response:
        return _json(await self._control.status())

    async def disks(self, request: Request) -> Response:
        return _json({"disks": (await self._control.status())["disks"]})

    async def add_disk(self, request: Request) -> Response:
        body = await _body(request, _AddDisk)
        return _json(await self._control.add_disk(msgspec.structs.asdict(body)), 201)

    async def disk(self, request: Request) -> Response:
        return _json(await self._control.disk(_name(request)))

    async def remove_disk(self, request: Request) -> Response:
        name, force, purge = _name(request), _flag(request, "force"), _flag(request, "purge")
        return Work(lambda report: self._control.remove_disk(name, force, purge, report))

    async def resize(self, request: Request) -> Response:
        body = await _body(request, _Resize)
        return _json(await self._control.resize(_name(request), body.size))

    async def set(self, request: Request) -> Response:
        values = await _body(request, dict[str, Any])
        return _json(await self._control.set(_name(request), values))

    async def drain(self, request: Request) -> Response:
        name = _name(request)
        return Work(lambda report: self._control.drain(name, report))

    async def release(self, request: Request) -> Response:
        name = _name(request)
        return Work(lambda report: self._control.release(name, report))

    async def resume(self, request: Request) -> Response:
        name, body = _name(request), await _body(request, _Resume)
        return Work(lambda report: self._control.resume(name, body.unchanged, body.give_up_history))

    async def offer(self, request: Request) -> Response:
        return _json(await self._control.offer(_name(request)))

    async def resolve(self, request: Request) -> Response:
        body = await _body(request, _Resolve)
        return _json(await self._control.resolve(_name(request), body.spec))

    async def timeline(self, request: Request) -> Response:
        buckets = _count(request, "buckets", 60, BUCKETS_MAX)
        since, until = request.query_params.get("from"), request.query_params.get("to")
        return _json(await self._control.timeline(_name(request), buckets, since, until))

    async def points(self, request: Request) -> Response:
        limit = _count(request, "limit", 200, POINTS_MAX)
        since, until = request.query_params.get("from"), request.query_params.get("to")
        return _json(await self._control.points(_name(request), since, until, limit))

    async def add_bookmarks(self, request: Request) -> Response:
        body = await _body(request, _AddBookmarks)
        return _json(
            await self._control.add_bookmarks(body.disks, body.label, body.consistency), 201
        )

    async def bookmarks(self, request: Request) -> Response:
        return _json(await self._control.bookmarks(_name(request)))

    async def remove_bookmark(self, request: Request) -> Response:
        label = request.path_params["label"]
        return _json(await self._control.remove_bookmark(_name(request), label))

    async def rollback(self, request: Request) -> Response:
        body = await _body(request, _Rollback)
        return Work(
            lambda report: self._control.rollback(
                body.disks, body.to, body.dry_run, body.disconnect, report
            )
        )

    async def open_view(self, request: Request) -> Response:
        body = await _body(request, _OpenView)
        return _json(await self._control.open_view(_name(request), body.at, body.writable), 201)

    async def views(self, request: Request) -> Response:
        return _json(await self._control.views())

    async def close_view(self, request: Request) -> Response:
        return _json(await self._control.close_view(request.path_params["view"]))

    async def scrub(self, request: Request) -> Response:
        name, body = _name(request), await _body(request, _Scrub)
        return Work(lambda report: self._control.scrub(name, body.wait, body.rate, report))

    async def scrub_status(self, request: Request) -> Response:
        return _json(await self._control.scrub_status(_name(request)))

    async def stop_scrub(self, request: Request) -> Response:
        return _json(await self._control.stop_scrub(_name(request)))

    async def doctor(self, request: Request) -> Response:
        return _json(await self._control.doctor())

    async def metrics(self, request: Request) -> Response:
        return Response(render(await self._control.metrics()), media_type=CONTENT_TYPE)

    async def health(self, request: Request) -> Response:
        """The daemon answers. How its disks are is for metrics and alerts to say."""
        return Response("ok\n", media_type="text/plain")


def _name(request: Request) -> str:
    return str(request.path_params["name"])


def _control_routes(api: _Api) -> list[BaseRoute]:
    one = "/v1/disks/{name}"
    return [
        Route("/v1/status", api.status, methods=["GET"]),
        Route("/v1/disks", api.disks, methods=["GET"]),
        Route("/v1/disks", api.add_disk, methods=["POST"]),
        Route(one, api.disk, methods=["GET"]),
        Route(one, api.remove_disk, methods=["DELETE"]),
        Route(f"{one}/resize", api.resize, methods=["POST"]),
        Route(f"{one}/set", api.set, methods=["POST"]),
        Route(f"{one}/drain", api.drain, methods=["POST"]),
        Route(f"{one}/release", api.release, methods=["POST"]),
        Route(f"{one}/resume", api.resume, methods=["POST"]),
        Route(f"{one}/offer", api.offer, methods=["POST"]),
        Route(f"{one}/resolve", api.resolve, methods=["POST"]),
        Route(f"{one}/timeline", api.timeline, methods=["GET"]),
        Route(f"{one}/points", api.points, methods=["GET"]),
        Route("/v1/bookmarks", api.add_bookmarks, methods=["POST"]),
        Route(f"{one}/bookmarks", api.bookmarks, methods=["GET"]),
        Route(f"{one}/bookmarks/{{label}}", api.remove_bookmark, methods=["DELETE"]),
        Route("/v1/rollback", api.rollback, methods=["POST"]),
        Route(f"{one}/views", api.open_view, methods=["POST"]),
        Route("/v1/views", api.views, methods=["GET"]),
        Route("/v1/views/{view}", api.close_view, methods=["DELETE"]),
        Route(f"{one}/scrub", api.scrub, methods=["POST"]),
        Route(f"{one}/scrub", api.scrub_status, methods=["GET"]),
        Route(f"{one}/scrub", api.stop_scrub, methods=["DELETE"]),
        Route("/v1/doctor", api.doctor, methods=["GET"]),
    ]


def _public_routes(api: _Api) -> list[BaseRoute]:
    return [
        Route("/metrics", api.metrics, methods=["GET"]),
        Route("/healthz", api.health, methods=["GET"]),
    ]


async def _on_cdp_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, CdpError)
    return _error(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found" if error.status_code in (404, 405) else "invalid"
    return _json(
        {"error": f"{request.method} {request.url.path}: {error.detail}", "kind": kind},
        error.status_code,
    )


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return _json({"error": "the client has gone", "kind": "invalid"}, 400)


async def _on_bug(request: Request, error: Exception) -> Response:
    return _error(_unexpected(f"{request.method} {request.url.path}", error))


def _unexpected(what: str, error: Exception) -> CdpError:
    """What to say of an error that nobody has words for; it is logged."""
    if isinstance(error, OSError) and error.errno in _SURROUNDINGS:
        where = f"{error.filename}: " if error.filename else ""
        log.error("%s failed: %s", what, error)
        return CdpError(f"{where}{error.strerror}: {_SURROUNDINGS[error.errno]}")
    log.error("%s failed", what, exc_info=error)
    return CdpError(f"{type(error).__name__}: {error}; the daemon's log says more")


def make_app(control: Control, *, public: bool) -> Starlette:
    """The application. `public`: metrics and health only, for a port that others can reach."""
    api = _Api(control)
    routes = _public_routes(api) if public else [*_control_routes(api), *_public_routes(api)]
    return Starlette(
        routes=routes,
        exception_handlers={
            CdpError: _on_cdp_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_bug,
        },
    )
