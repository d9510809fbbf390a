"""The viewer's calls: open and close views, take connections, plan rollbacks.

A view exists while somebody wants it: the supervisor opens and closes it, and pins its point
before.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import threading
from typing import Any, Final

import trio

from cdp.child import Child
from cdp.nbd.export import Negotiated
from cdp.rpc import Call, Reply
from cdp.viewer.connection import Connection
from cdp.viewer.views import View, WritableView
from journal.errors import Conflict, InvalidInput, JournalError, NotFound
from journal.storage import RealFile
from replay import rollback
from replay.history import History
from replay.places import Places

log = logging.getLogger(__name__)

PREPARE_SECONDS: Final = 2.0
PREPARE_SECONDS_MAX: Final = 64.0  # after it failed again and again


class Service:
    """Handlers of the viewer; see the module."""

    def __init__(self, child: Child, history: History, nursery: trio.Nursery) -> None:
        self._child, self._history, self._nursery = child, history, nursery
        self._places = Places(history)
        self._lock = threading.Lock()
        self._views: dict[str, View] = {}
        self.stopping = trio.Event()

    def handlers(self) -> dict[str, Any]:
        """By method name."""
        return {
            "hello": self.hello, "status": self.status, "open": self.open, "close": self.close,
            "list": self.list_views, "attach": self.attach, "plan_rollback": self.plan_rollback,
            "stop": self.stop,
        }  # fmt: skip

    async def keep_prepared(self) -> None:
        """Have a snapshot of the history ready for the first view; readers take their own.

        It costs nothing while no file of the journal comes or goes.
        """
        pause = PREPARE_SECONDS
        while True:
            if not self._views and not self._history.is_prepared:
                try:
                    # (A device that hangs does not keep anybody from stopping us.)
                    await trio.to_thread.run_sync(self._prepare, abandon_on_cancel=True)
                    pause = PREPARE_SECONDS
                except (OSError, JournalError) as error:  # whoever opens a view will be told
                    log.info("cannot prepare for views: %s", error)
                    pause = min(2 * pause, PREPARE_SECONDS_MAX)
            await trio.sleep(pause)

    def _prepare(self) -> None:
        with self._lock:
            self._history.prepare()

    async def hello(self, _params: dict[str, Any], _fds: list[int], _call: Call) -> Reply:
        """Who this is, and the backing's descriptor for a supervisor that adopts it."""
        result = {
            "role": "viewer", "pid": os.getpid(), "uuid": self._child.config.uuid,
            "protocol": 1, "state": "ready",
        }  # fmt: skip
        return Reply(result, [self._child.backing_fd])

    async def status(self, _params: dict[str, Any], _fds: list[int], _call: Call) -> dict[str, Any]:
        """Numbers for metrics."""
        return {
            "views": len(self._views),
            "connections": sum(view.connections for view in self._views.values()),
            "overlay_bytes": sum(view.overlay_bytes for view in self._views.values()),
        }

    async def open(self, params: dict[str, Any], _fds: list[int], _call: Call) -> dict[str, Any]:
        """Open a view of a pinned point; ``size`` is the disk's at that point."""
        name, seq = str(params["id"]), int(params["seq"])
        if name in self._views:
            raise Conflict(f"there is a view {name!r} already")
        size = int(params.get("size") or self._child.config.size)
        if params.get("writable"):
            view: View = WritableView(
                name, seq, size, self._history, self._places, self._lock,
                directory=self._child.directory, limit=int(params["overlay_limit"]),
            )  # fmt: skip
        else:
            view = View(name, seq, size, self._history, self._places, self._lock)
        self._views[name] = view
        return self._describe(view)

    async def close(self, params: dict[str, Any], _fds: list[int], _call: Call) -> dict[str, Any]:
        """Close a view; its connections end."""
        view = self._views.pop(str(params["id"]), None)
        if view is None:
            raise NotFound(f"there is no view {params['id']!r}: see 'cdp view list'")
        for scope in list(view.scopes):
            scope.cancel()
        view.close()
        return {}

    async def list_views(
        self, _params: dict[str, Any], _fds: list[int], _call: Call
    ) -> dict[str, Any]:
        """All views."""
        return {"views": [self._describe(view) for view in self._views.values()]}

    @staticmethod
    def _describe(view: View) -> dict[str, Any]:
        return {
            "id": view.name, "seq": view.seq, "size": view.size, "writable": view.writable,
            "connections": view.connections, "overlay_bytes": view.overlay_bytes,
        }  # fmt: skip

    async def attach(self, params: dict[str, Any], fds: list[int], _call: Call) -> dict[str, Any]:
        """Serve a connection that the front door negotiated."""
        view = self._views.get(str(params["view"]))
        if view is None:
            raise NotFound(f"there is no view {params['view']!r}")
        if len(fds) != 1:
            raise InvalidInput("attach takes one descriptor")
        negotiated = params["negotiated"]
        text = negotiated if isinstance(negotiated, str) else json.dumps(negotiated)
        state = Negotiated.from_json(text)
        sock = socket.socket(fileno=fds.pop())
        leftover = base64.b64decode(params.get("leftover", ""))
        self._nursery.start_soon(self._serve, view, sock, state, leftover)
        return {}

    async def _serve(
        self, view: View, sock: socket.socket, state: Negotiated, leftover: bytes
    ) -> None:
        view.connections += 1
        with sock, trio.CancelScope() as scope:
            view.scopes.add(scope)
            try:
                await Connection(view, sock, state, leftover).run()
            finally:
                view.connections -= 1
                view.scopes.discard(scope)

    async def plan_rollback(self, params: dict[str, Any], _fds: list[int], _call: Call) -> Reply:
        """The refs of a rollback, as u64 triples in a memfd."""
        seq, tip = int(params["to_seq"]), int(params["tip_seq"])
        plan = await trio.to_thread.run_sync(self._plan, seq, tip)
        fd = os.memfd_create("rollback", os.MFD_CLOEXEC)
        RealFile(fd).write(0, [plan.pack()])
        return Reply(
            {"extents": len(plan.refs), "bytes": plan.size, "to_seq": seq, "tip_seq": tip},
            [fd], owned=True,
        )  # fmt: skip

    def _plan(self, seq: int, tip: int) -> rollback.Plan:
        with self._lock:
            return rollback.plan(self._history, seq, tip)

    async def stop(self, _params: dict[str, Any], _fds: list[int], _call: Call) -> dict[str, Any]:
        """End; views and their overlays are gone."""
        self.stopping.set()
        return {}
