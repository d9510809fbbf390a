"""The NBD front door: negotiates, then hands the connected socket to the process that serves it.

Exports:

    DISK            the live disk            -> its recorder
    DISK@SPEC       the disk at a point      -> a view that lives as long as its connections
    DISK@view:ID    a view that is open      -> its viewer

The answer to GO waits until that process is ready, so a client never gets an export that is not
there yet. What was negotiated and what had been read go with the socket; then our copy is closed,
and nothing of the connection depends on us any more.

Clients are strangers: how many there are, and how long each may take to say what it wants, is
bounded. The time in which a client waits for us does not count against it.
"""

from __future__ import annotations

import base64
import errno
import json
import logging
import socket
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import trio

from cdp.config import LimitsConfig
from cdp.nbd.export import ExportInfo
from cdp.nbd.handshake import Closed, Established, ExportQuery, ListQuery, ServerHandshake
from cdp.nbd.limits import DEFAULT_LIMITS
from cdp.nbd.wire import (
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_PLATFORM,
    NBD_REP_ERR_POLICY,
    NBD_REP_ERR_UNKNOWN,
)
from cdp.sockets import accept
from cdp.supervisor.bookmarks import Bookmarks
from cdp.supervisor.disk import Disk
from cdp.supervisor.views import View, Views
from journal.errors import Busy, CdpError, Conflict, InvalidInput, NotFound, NotOpenable

log = logging.getLogger(__name__)

RECEIVE_BYTES: Final = 64 * 1024
# An export that is not ready after that long: the client may ask again.
READY_SECONDS_MAX: Final = 600.0
# A recorder that is there and does not serve may be about to.
SERVED_SECONDS: Final = 0.1
SERVED_SECONDS_MAX: Final = 5.0
# Names other than the current one that a connection may have asked about, and so keeps open.
VIEWS_PER_CONNECTION: Final = 4
# A disk that does not answer in time is listed without its bookmarks; of many, the newest.
LIST_SECONDS_MAX: Final = 2.0
LISTED_BOOKMARKS_MAX: Final = 1000
HAND_OVER_SECONDS_MAX: Final = 30.0
VIEW_PREFIX: Final = "view:"
_UCRED: Final = struct.Struct("=iII")
ALLOCATION: Final = "base:allocation"
_READ_ONLY_FLAGS: Final = NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_DF
_WRITABLE_FLAGS: Final = (
    NBD_FLAG_HAS_FLAGS
    | NBD_FLAG_SEND_DF
    | NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
)


class FrontDoor:
    """All NBD listeners, and the connections that are negotiating.

    `served` says how many connections the processes have, as far as is known.
    """

    def __init__(
        self,
        disks: Mapping[str, Disk],
        views: Views,
        bookmarks: Bookmarks,
        limits: LimitsConfig,
        served: Callable[[], int],
    ) -> None:
        self.disks, self.views, self.bookmarks, self.limits = disks, views, bookmarks, limits
        self.errors: Counter[str] = Counter()
        # Connections that are here, and those of them that have not said what they want.
        self.here = 0
        self.strangers = 0
        self._served = served

    def connections(self) -> int:
        """NBD connections of the host, also those still negotiating."""
        return self.here + self._served()

    async def serve(self, listener: socket.socket) -> None:
        """Accepts clients until cancelled. Those that negotiate then are cut off."""
        with trio.socket.from_stdlib_socket(listener) as accepting:
            async with trio.open_nursery() as nursery:
                while True:
                    sock = await accept(accepting, "NBD")
                    if self._is_full():
                        self.errors["limit"] += 1
                        sock.close()
                        continue
                    self.here += 1
                    self.strangers += 1
                    nursery.start_soon(self._serve_client, sock)

    def _is_full(self) -> bool:
        if self.strangers >= self.limits.nbd_handshakes:
            return True
        return self.connections() >= self.limits.nbd_connections

    async def _serve_client(self, sock: trio.socket.SocketType) -> None:
        """One client from greeting to hand-over; whatever it does ends here."""
        try:
            with sock:
                _tune(sock)
                peer = _peer(sock)
                try:
                    await _Connection(self, sock, peer).run()
                except OSError as error:
                    self.errors["hangup"] += 1
                    log.debug("NBD client %s: %s", peer, error)
                except trio.TooSlowError:
                    self.errors["timeout"] += 1
                    log.info("NBD client %s was cut off: it does not say what it wants", peer)
                except CdpError as error:
                    self.errors["handover"] += 1
                    log.warning("NBD client %s was cut off: %s", peer, error)
                except Exception:
                    # The boundary: one client fails, the others and the daemon go on.
                    self.errors["internal"] += 1
                    log.exception("NBD client %s was cut off", peer)
        finally:
            self.here -= 1
            self.strangers -= 1


class _Gone(OSError):
    """The client hung up while it waited for us."""


class _Connection:
    """One client that negotiates."""

    def __init__(self, door: FrontDoor, sock: trio.socket.SocketType, peer: str) -> None:
        self._door, self._sock, self._peer = door, sock, peer
        self._handshake = ServerHandshake()
        self._seconds_left = door.limits.handshake_seconds
        # Views it has asked about, by the name it used: each is held, and asked for only once, so
        # that INFO and GO of a relative SPEC mean the same moment.
        self._views: dict[str, tuple[View, bool]] = {}

    async def run(self) -> None:
        try:
            established = await self._negotiate()
            if established is not None:
                await self._hand_over(established)
        finally:
            for view, _ in self._views.values():
                self._door.views.release(view)

    # -------------------------------------------------------------------------------- negotiating

    async def _negotiate(self) -> Established | None:
        while True:
            events = self._handshake.events_received()
            try:
                await self._send()
            except OSError:
                if any(isinstance(event, Closed) and event.clean for event in events):
                    # Nobody has to wait for the last word.
                    return None
                raise
            for event in events:
                match event:
                    case Established():
                        await self._send()
                        return event
                    case Closed(reason, clean):
                        if not clean:
                            self._door.errors["handshake"] += 1
                            log.info("NBD client %s was cut off: %s", self._peer, reason)
                        return None
                    case ListQuery():
                        async with self._while_it_waits():
                            self._handshake.answer_list(await self._exports())
                    case ExportQuery(name, option):
                        await self._answer(name, option)
            if events:
                continue
            data = await self._receive()
            if data:
                self._handshake.receive_data(data)
            else:
                self._handshake.receive_eof()

    @contextmanager
    def _in_its_time(self) -> Generator[None]:
        """Takes the client's time, not ours. TooSlowError when it has none left."""
        began = trio.current_time()
        with trio.fail_after(max(0.0, self._seconds_left)):
            yield
        self._seconds_left -= trio.current_time() - began

    async def _send(self) -> None:
        with self._in_its_time():
            for part in self._handshake.data_to_send():
                view = memoryview(part)
                while view:
                    view = view[await self._sock.send(view) :]

    async def _receive(self) -> bytes:
        with self._in_its_time():
            return await self._sock.recv(RECEIVE_BYTES)

    @asynccontextmanager
    async def _while_it_waits(self) -> AsyncGenerator[None]:
        """While the client waits for us it is no stranger, and we notice when it goes."""
        self._door.strangers -= 1
        gone = False
        try:
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    nonlocal gone
                    try:
                        gone = await self._sock.recv(1, socket.MSG_PEEK) == b""
                    except OSError:
                        gone = True
                    if gone:
                        nursery.cancel_scope.cancel()

                nursery.start_soon(watch)
                yield
                nursery.cancel_scope.cancel()
        finally:
            self._door.strangers += 1
        if gone:
            raise _Gone(errno.ECONNRESET, "the client hung up while it waited")

    async def _answer(self, name: str, option: int) -> None:
        try:
            async with self._while_it_waits():
                with trio.fail_after(READY_SECONDS_MAX):
                    info = await self._describe(name)
        except* (CdpError, trio.TooSlowError) as group:
            error = _first(group)
            if not isinstance(error, CdpError):
                error = Busy(f"{name} is still not ready: try again later")
            log.info("NBD client %s asked for %r: %s", self._peer, name[:80], error)
            self._handshake.refuse_export(_code(error), str(error))
        else:
            self._handshake.answer_export(info)

    # ------------------------------------------------------------------------------------- exports

    async def _exports(self) -> list[tuple[str, str]]:
        """Disks that can be used, and their bookmarks. Not the infinity of points."""
        exports = []
        for disk in list(self._door.disks.values()):
            if not disk.is_open or not disk.cleared or not disk.recorder.is_ready:
                continue
            exports.append((disk.name, f"disk, {disk.config.size} bytes"))
            marks: list[dict[str, Any]] = []
            try:
                with trio.move_on_after(LIST_SECONDS_MAX):
                    marks = await self._door.bookmarks.of(disk)
            except CdpError as error:
                log.debug("the bookmarks of %s are not known: %s", disk.name, error)
            for mark in marks[-LISTED_BOOKMARKS_MAX:]:
                exports.append((f"{disk.name}@{mark['label']}", f"bookmark, seq {mark['seq']}"))
        return exports

    async def _describe(self, name: str) -> ExportInfo:
        """What an export is, once it is ready. CdpError when there is none of that name."""
        disk, spec = self._parse(name)
        disk.check_in_use()
        if not disk.is_open:
            raise Conflict(f"{disk.name} is {disk.operation or 'closed'}: try again later")
        if spec is None:
            return await _describe_live(disk)
        view, stable = await self._view(name, disk, spec)
        flags = _WRITABLE_FLAGS if view.writable else _READ_ONLY_FLAGS
        return ExportInfo(
            f"{disk.name}@{spec}",
            view.point.size,
            flags | (NBD_FLAG_CAN_MULTI_CONN if stable else 0),
            description=f"{disk.name} at seq {view.point.seq}",
            meta_contexts=(ALLOCATION,),
        )

    def _parse(self, name: str) -> tuple[Disk, str | None]:
        """The disk and, if a point of it is meant, the SPEC."""
        disk_name, at, spec = name.partition("@")
        if not disk_name and not at and len(self._door.disks) == 1:
            (disk_name,) = self._door.disks
        if at and not spec:
            raise InvalidInput(f"{name!r} names no point: write {disk_name}@SPEC")
        return self._door.disks[disk_name], spec if at else None

    async def _view(self, name: str, disk: Disk, spec: str) -> tuple[View, bool]:
        if name in self._views:
            return self._views[name]
        if len(self._views) >= VIEWS_PER_CONNECTION:
            oldest, _ = self._views.pop(next(iter(self._views)))
            self._door.views.release(oldest)
        if spec.startswith(VIEW_PREFIX):
            view = self._door.views.get(spec.removeprefix(VIEW_PREFIX))
            if view.disk is not disk:
                raise NotFound(f"view {view.id} is one of {view.disk.name}, not of {disk.name}")
            self._door.views.hold(view)
            self._views[name] = (view, True)
        else:
            self._views[name] = await self._door.views.open_for_connection(disk, spec)
        await disk.viewer.wait_ready()
        return self._views[name]

    # ----------------------------------------------------------------------------------- hand-over

    async def _hand_over(self, established: Established) -> None:
        """The socket, what was agreed on, and what had been read already, to who serves it."""
        negotiated = established.negotiated
        params: dict[str, Any] = {
            "negotiated": json.loads(negotiated.to_json()),
            "leftover": base64.b64encode(established.leftover).decode(),
            "peer": self._peer,
        }
        held = self._views.get(negotiated.requested_name)
        disk, _ = self._parse(negotiated.requested_name)
        child = disk.recorder
        if held is not None:
            child = disk.viewer
            params["view"] = held[0].id
        with trio.fail_after(HAND_OVER_SECONDS_MAX):
            await child.call("attach", params, [self._sock.fileno()])
        log.debug("NBD client %s is with the %s", self._peer, child)


async def _describe_live(disk: Disk) -> ExportInfo:
    facts = await _served(disk)
    return ExportInfo(
        disk.name,
        int(facts["size"]),
        int(facts["flags"]),
        min_block=int(facts.get("min_block") or 1),
        preferred_block=int(facts.get("preferred_block") or 4096),
        max_block=int(facts.get("max_block") or DEFAULT_LIMITS.max_payload),
        description=f"disk, {facts['size']} bytes",
        meta_contexts=tuple(facts.get("meta_contexts") or ()),
    )


async def _served(disk: Disk) -> dict[str, Any]:
    """What the recorder exports, once it serves; a rollback is waited for, an administrator not."""
    patience = trio.current_time() + SERVED_SECONDS_MAX
    while True:
        await disk.wait_servable()
        facts = (await disk.recorder.call("export", again=True)).result
        if facts.get("served", True):
            return facts
        if disk.operation is None and trio.current_time() > patience:
            raise Busy(f"{disk.name} is not served: {facts.get('reason')}")
        await trio.sleep(SERVED_SECONDS)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


def _code(error: CdpError) -> int:
    match error:
        case NotFound() | NotOpenable():
            return NBD_REP_ERR_UNKNOWN
        case InvalidInput():
            return NBD_REP_ERR_INVALID
        case Conflict() | Busy():
            return NBD_REP_ERR_POLICY
        case _:
            return NBD_REP_ERR_PLATFORM


def _tune(sock: trio.socket.SocketType) -> None:
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A client whose host has died holds the disk: it is noticed within two minutes.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)


def _peer(sock: trio.socket.SocketType) -> str:
    """Who is there, for logs."""
    if sock.family == socket.AF_UNIX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(credentials)
        return f"process {pid} of user {uid}"
    host, port = sock.getpeername()[:2]
    return f"{host} port {port}"
