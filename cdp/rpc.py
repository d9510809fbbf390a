"""Calls between the supervisor and the processes of a disk: JSON and descriptors, unix sockets.

One datagram of a SOCK_SEQPACKET socket is one message, a JSON object:

    {"id": 7, "method": "sync", "params": {...}}       a call, from the client
    {"id": 7, "progress": {...}}                       any number of them, from the server
    {"id": 7, "result": {...}}                         its end,
    {"id": 7, "error": {"kind": "...", "message": "..."}}      or this one
    {"cancel": 7}                                      the client no longer wants the answer
    {"event": "...", ...}                              from the server, answers nothing
    {"spilled": 123456}                                the message itself is in the first descriptor

Descriptors travel beside a message (SCM_RIGHTS). Who owns one is never in doubt:

* what a caller or a handler *sends* stays its own (`Reply(..., owned=True)` hands it over);
* what a handler *receives* is closed for it when it ends, unless it removed it from its list;
* what a caller receives, in `Reply.fds`, is the caller's;
* what arrives for nobody (a cancelled call, a broken message) is closed at once.

A handler runs in its own task and is cancelled when its caller cancels, or when the connection
ends. One that must not stop half-way shields itself. Everything queued is bounded: calls in flight
by `CALLS_MAX`, progress to the latest one of each call, events to `EVENTS_MAX`.
"""

from __future__ import annotations

import array
import errno
import inspect
import logging
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from cdp.sockets import accept
from cdp.unix_sockets import bind_socket, socket_address
from journal.errors import Busy, CdpError, Conflict, InvalidInput, NotFound, NotOpenable

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX: Final = 128 * 1024
SPILLED_BYTES_MAX: Final = 256 * 1024 * 1024
FDS_MAX: Final = 16
CALLS_MAX: Final = 256
EVENTS_MAX: Final = 64
GONE_ERRNOS: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})

_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
_KINDS: Final[dict[str, type[CdpError]]] = {
    error.kind: error for error in (InvalidInput, NotFound, Conflict, Busy, NotOpenable)
}

Params = dict[str, Any]


class ConnectionLost(CdpError):
    """The other process ended, or closed the connection, before it answered."""


class BrokenMessage(CdpError):
    """What arrived is no message of this protocol: the other end is of another version."""


@dataclass(slots=True)
class Reply:
    """What a call results in. `owned`: the server closes `fds` once they are sent."""

    result: dict[str, Any] = field(default_factory=dict)
    fds: list[int] = field(default_factory=list)
    owned: bool = False


# --------------------------------------------------------------------------------------- messages


def close_all(fds: Sequence[int]) -> None:
    """Closes descriptors, each whatever becomes of the others."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            log.error("descriptor %d could not be closed: %s", fd, error)


def _spill(data: bytes) -> int:
    fd = os.memfd_create("cdp-rpc", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def _unspill(size: object, fds: list[int]) -> bytes:
    if not isinstance(size, int) or not 0 < size <= SPILLED_BYTES_MAX or not fds:
        raise BrokenMessage(f"a message announces {size!r} bytes beside it")
    fd = fds.pop(0)
    try:
        data = os.pread(fd, size, 0)
    finally:
        os.close(fd)
    if len(data) != size:
        raise BrokenMessage(f"a message announces {size} bytes beside it and has {len(data)}")
    return data


class _Channel:
    """One connection: whole messages out and in. Used by both ends."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._send_lock = trio.Lock()

    async def send(
        self,
        message: dict[str, Any],
        fds: Sequence[int] = (),
        *,
        unless: Callable[[], bool] | None = None,
    ) -> None:
        """Sends one message; `unless` is asked last, when its turn has come. OSError if gone."""
        data = msgspec.json.encode(message)
        spilled: list[int] = []
        try:
            if len(data) > MESSAGE_BYTES_MAX:
                spilled.append(_spill(data))
                data = msgspec.json.encode({"spilled": len(data)})
            beside = [*spilled, *fds]
            if len(beside) > FDS_MAX:
                raise ValueError(f"{len(beside)} descriptors beside one message")
            rights = (
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", beside))] if beside else []
            )
            async with self._send_lock:
                if unless is None or not unless():
                    await self._sock.sendmsg([data], rights)
        finally:
            close_all(spilled)

    async def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors, which are the caller's; None at the end."""
        data, ancillary, flags, _ = await self._sock.recvmsg(
            MESSAGE_BYTES_MAX + 1, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        # From here on no await: a descriptor must not be lost to a cancellation.
        fds: list[int] = []
        try:
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    numbers = array.array("i")
                    numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                    fds.extend(numbers)
            if not data:
                close_all(fds)
                return None
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise BrokenMessage("a message or its descriptors were cut off")
            return self._decode(data, fds), fds
        except BaseException:
            close_all(fds)
            raise

    @staticmethod
    def _decode(data: bytes, fds: list[int]) -> dict[str, Any]:
        try:
            message = msgspec.json.decode(data)
            if isinstance(message, dict) and "spilled" in message:
                message = msgspec.json.decode(_unspill(message["spilled"], fds))
        except msgspec.DecodeError as error:
            raise BrokenMessage(f"a message is not JSON: {error}") from error
        if not isinstance(message, dict):
            raise BrokenMessage("a message is no JSON object")
        return message

    def send_nowait(self, message: dict[str, Any]) -> bool:
        """Sends a small message if there is room for it; whether there was."""
        try:
            os.write(self._sock.fileno(), msgspec.json.encode(message))
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._sock.close()


# ----------------------------------------------------------------------------------------- server


class Call:
    """What a handler knows of the call it answers, and its way to report progress."""

    def __init__(self, connection: _Connection, number: int, method: str) -> None:
        self._connection = connection
        self._number = number
        self.method = method
        self.cancel_scope = trio.CancelScope()
        self.ended = False

    def progress(self, progress: dict[str, Any]) -> None:
        """Reports progress. Never waits; an unsent report is replaced by a newer one.

        From a thread: `trio.from_thread.run_sync(call.progress, {...})`.
        """
        if not self.ended:
            self._connection.latest[self._number] = progress
            self._connection.wake.set()


Handler = Callable[[Params, list[int], Call], Awaitable["dict[str, Any] | Reply | None"]]


class _Connection:
    """One client of an RpcServer."""

    def __init__(self, channel: _Channel, handlers: Mapping[str, Handler]) -> None:
        self._channel = channel
        self._handlers = handlers
        self._calls: dict[int, Call] = {}
        self.latest: dict[int, dict[str, Any]] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)
        self.wake = trio.Event()

    async def run(self) -> None:
        """Serves the client until it goes; its calls are cancelled then."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump)
                try:
                    await self._receive(nursery)
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            self._channel.close()

    async def _receive(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                received = await self._channel.receive()
            except OSError:
                return
            except BrokenMessage as error:
                log.warning("a client was cut off: %s", error)
                return
            if received is None:
                return
            message, fds = received
            if not await self._dispatch(message, fds, nursery):
                return

    async def _dispatch(
        self, message: dict[str, Any], fds: list[int], nursery: trio.Nursery
    ) -> bool:
        """Starts or cancels a call; False when the client must be cut off."""
        if "cancel" in message:
            close_all(fds)
            call = self._calls.get(message["cancel"])
            if call is not None:
                call.cancel_scope.cancel()
            return True
        number, method, params = message.get("id"), message.get("method"), message.get("params")
        params = {} if params is None else params
        valid = isinstance(number, int) and isinstance(method, str) and isinstance(params, dict)
        if not valid or number in self._calls:
            close_all(fds)
            log.warning("a client was cut off: it sent no valid call")
            return False
        assert isinstance(number, int)
        assert isinstance(method, str)
        handler = self._handlers.get(method)
        problem: CdpError | None = None
        if handler is None:
            problem = InvalidInput(f"this process knows no call {method!r}: versions differ")
        elif len(self._calls) >= CALLS_MAX:
            problem = Busy(f"{CALLS_MAX} calls are in flight: try again later")
        if handler is None or problem is not None:
            close_all(fds)
            assert problem is not None
            return await self._answer({"id": number, "error": _error(problem)})
        call = Call(self, number, method)
        self._calls[number] = call
        nursery.start_soon(self._run_call, call, number, handler, params, fds)
        return True

    async def _run_call(
        self, call: Call, number: int, handler: Handler, params: Params, fds: list[int]
    ) -> None:
        reply = Reply()
        answer: dict[str, Any] = {"error": _error(Conflict(f"{call.method} was cancelled"))}
        try:
            try:
                with call.cancel_scope:
                    result = await handler(params, fds, call)
                    reply = result if isinstance(result, Reply) else Reply(result or {})
                    answer = {"result": reply.result}
            except CdpError as problem:
                answer = {"error": _error(problem)}
            except Exception as problem:
                # The boundary: one call fails, the process and its other calls go on.
                log.exception("the call %s failed", call.method)
                what = f"{type(problem).__name__}: {problem}"
                answer = {"error": _error(CdpError(f"{call.method} failed: {what}"))}
            finally:
                call.ended = True
                self.latest.pop(number, None)
                self._calls.pop(number, None)
            try:
                await self._answer({"id": number, **answer}, reply.fds)
            except (TypeError, ValueError, OSError) as problem:
                log.exception("the answer to %s cannot be sent", call.method)
                error = _error(CdpError(f"the answer to {call.method} cannot be sent: {problem}"))
                await self._answer({"id": number, "error": error})
        finally:
            close_all(fds)
            if reply.owned:
                close_all(reply.fds)

    async def _answer(self, message: dict[str, Any], fds: Sequence[int] = ()) -> bool:
        """Sends; False when the client has gone (then the receiver notices, too)."""
        try:
            await self._channel.send(message, fds)
        except OSError as error:
            if error.errno in GONE_ERRNOS:
                return False
            raise
        return True

    async def _pump(self) -> None:
        """Sends progress and events, so that who reports them never waits for the client."""
        while True:
            await self.wake.wait()
            self.wake = trio.Event()
            while self.latest or self.events:
                if self.events:
                    if not await self._answer(self.events.popleft()):
                        return
                    continue
                number, progress = next(iter(self.latest.items()))
                del self.latest[number]
                if not await self._report(number, progress):
                    return

    async def _report(self, number: int, progress: dict[str, Any]) -> bool:
        """Sends progress unless the call has ended meanwhile; False when the client has gone."""
        try:
            await self._channel.send(
                {"id": number, "progress": progress}, unless=lambda: number not in self._calls
            )
        except OSError as error:
            if error.errno in GONE_ERRNOS:
                return False
            raise
        return True


def _error(problem: CdpError) -> dict[str, str]:
    return {"kind": problem.kind, "message": str(problem)}


class RpcServer:
    """Answers calls on one unix socket, any number of clients at once."""

    def __init__(self) -> None:
        self._connections: set[_Connection] = set()

    @property
    def clients(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    async def serve(
        self,
        path: Path,
        handlers: Mapping[str, Handler],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serves until cancelled; `started` once clients can connect.

        What is left at `path` of an earlier process is replaced: the caller holds the lock that
        says that it is gone. The name stays behind at the end: a successor may be there already.
        """
        listener = trio.socket.from_stdlib_socket(bind_socket(path, socket.SOCK_SEQPACKET))
        with listener:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    sock = await accept(listener, path.name)
                    nursery.start_soon(self._serve_client, sock, handlers)

    async def _serve_client(
        self, sock: trio.socket.SocketType, handlers: Mapping[str, Handler]
    ) -> None:
        connection = _Connection(_Channel(sock), handlers)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    def notify(self, event: str, **fields: Any) -> None:
        """Tells every client; never waits. A client that does not read loses the oldest."""
        for connection in self._connections:
            connection.events.append({"event": event, **fields})
            connection.wake.set()


# ----------------------------------------------------------------------------------------- client

OnProgress = Callable[[dict[str, Any]], Awaitable[None] | None]
OnEvent = Callable[[dict[str, Any]], None]


class _Pending:
    """A call that waits for its answer."""

    def __init__(self) -> None:
        self.wake = trio.Event()
        self.progress: dict[str, Any] | None = None
        self.answer: dict[str, Any] | None = None
        self.fds: list[int] = []
        self.lost = False


class RpcClient:
    """One connection to an RpcServer; any number of calls at once.

    `closed` is set when the other end is gone, or after `aclose`. Its receiver is a system task of
    trio: it lives as long as the connection and runs no code of others, so nothing can fail in it
    that somebody would have to hear of (`on_event` excepted, which must not raise).
    """

    def __init__(
        self, sock: trio.socket.SocketType, *, name: str = "the process", on_event: OnEvent | None
    ) -> None:
        self._channel = _Channel(sock)
        self._name = name
        self._on_event = on_event
        self._pending: dict[int, _Pending] = {}
        self._next = 0
        self.closed = trio.Event()

    @classmethod
    async def connect(
        cls, path: Path, *, name: str | None = None, on_event: OnEvent | None = None
    ) -> RpcClient:
        """Connects; OSError when nobody listens there. `name` appears in error messages."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with socket_address(path) as address:
                await sock.connect(address)
        except BaseException:
            sock.close()
            raise
        client = cls(sock, name=name or path.stem, on_event=on_event)
        trio.lowlevel.spawn_system_task(client._receive, name=f"rpc client of {path.name}")
        return client

    async def call(
        self,
        method: str,
        params: Params | None = None,
        fds: Sequence[int] = (),
        on_progress: OnProgress | None = None,
    ) -> Reply:
        """Calls and waits for the answer. `fds` stay the caller's, those of the reply become so.

        :raises CdpError: the subclass the other end named; ConnectionLost when it is gone.
        """
        if self.closed.is_set():
            raise ConnectionLost(f"{self._name} is gone: {method} was not asked")
        self._next += 1
        number, pending = self._next, _Pending()
        self._pending[number] = pending
        try:
            try:
                await self._channel.send(
                    {"id": number, "method": method, "params": params or {}}, fds
                )
            except (OSError, trio.ClosedResourceError) as error:
                raise ConnectionLost(f"{self._name} is gone: {method} was not asked") from error
            return await self._wait(method, pending, on_progress)
        except BaseException:
            close_all(pending.fds)
            raise
        finally:
            if self._pending.pop(number, None) is not None and pending.answer is None:
                self._cancel_nowait(number)

    async def _wait(self, method: str, pending: _Pending, on_progress: OnProgress | None) -> Reply:
        while True:
            await pending.wake.wait()
            pending.wake = trio.Event()
            progress, pending.progress = pending.progress, None
            if progress is not None and on_progress is not None:
                outcome = on_progress(progress)
                if inspect.isawaitable(outcome):
                    await outcome
            if pending.answer is not None:
                return self._result(method, pending)
            if pending.lost:
                raise ConnectionLost(f"{self._name} ended before it answered {method}")

    @staticmethod
    def _result(method: str, pending: _Pending) -> Reply:
        assert pending.answer is not None
        error, result = pending.answer.get("error"), pending.answer.get("result")
        if isinstance(result, dict):
            return Reply(result, pending.fds)
        if not isinstance(error, dict):
            raise BrokenMessage(f"the answer to {method} is neither a result nor an error")
        kind = _KINDS.get(str(error.get("kind")), CdpError)
        raise kind(str(error.get("message")))

    def _cancel_nowait(self, number: int) -> None:
        """Tells the other end that nobody waits any more, if that is possible without waiting."""
        if not self.closed.is_set():
            self._channel.send_nowait({"cancel": number})

    async def _receive(self) -> None:
        try:
            while True:
                received = await self._channel.receive()
                if received is None:
                    return
                self._take(*received)
        except (OSError, trio.ClosedResourceError):
            return
        except BrokenMessage as error:
            log.warning("the connection to %s was cut: %s", self._name, error)
        finally:
            self._lose()

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        if "event" in message:
            close_all(fds)
            if self._on_event is not None:
                self._on_event(message)
            return
        pending = self._pending.get(message.get("id", 0))
        if pending is None or pending.answer is not None:
            close_all(fds)
            return
        if "progress" in message:
            close_all(fds)
            pending.progress = message["progress"]
        else:
            pending.answer, pending.fds = message, fds
        pending.wake.set()

    def _lose(self) -> None:
        self.closed.set()
        self._channel.close()
        for pending in self._pending.values():
            pending.lost = True
            pending.wake.set()

    def close(self) -> None:
        """Closes the connection; calls in flight end with ConnectionLost."""
        self._lose()

    async def aclose(self) -> None:
        """The same, with a checkpoint, for `contextlib.aclosing` and `async with`."""
        self._lose()
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> RpcClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
