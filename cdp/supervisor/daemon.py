"""The daemon: its parts put together, from start to clean stop."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from cdp.api.app import make_app
from cdp.api.server import serve_http
from cdp.clock import SECOND_NS, HostClock, Sources
from cdp.config import DaemonConfig
from cdp.nbd.uri import format_uri
from cdp.supervisor import addresses
from cdp.supervisor.administration import Administration
from cdp.supervisor.bookmarks import Bookmarks
from cdp.supervisor.children import Child, Launcher
from cdp.supervisor.disk import Disk, DiskHooks
from cdp.supervisor.disks import Disks
from cdp.supervisor.frontdoor import FrontDoor
from cdp.supervisor.lock import StateLock
from cdp.supervisor.rollback import Rollbacks
from cdp.supervisor.status import Boards
from cdp.supervisor.views import Views
from cdp.unix_sockets import bind_socket
from journal.errors import CdpError

log = logging.getLogger(__name__)

NBD_SOCKET: Final = "nbd.sock"
CONTROL_SOCKET: Final = "control.sock"
CLOCK_SECONDS: Final = 1.0
# How often processes are asked how they are, though nobody wants to know.
REFRESH_SECONDS: Final = 5.0
CLOSE_VIEWS_SECONDS_MAX: Final = 30.0
NOTE_SECONDS_MAX: Final = 2.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line and the configuration file say together."""

    state_dir: Path
    config: DaemonConfig = field(default_factory=DaemonConfig)
    nbd: tuple[str, ...] = ()
    http: str = ""
    allow_remote_without_tls: bool = False
    launcher: Launcher = field(default_factory=Launcher)
    sources: Sources = field(default_factory=Sources)


@dataclass(slots=True)
class Listeners:
    """Sockets that listen, bound before anything is started."""

    nbd: list[socket.socket] = field(default_factory=list)
    control: list[socket.socket] = field(default_factory=list)
    http: list[socket.socket] = field(default_factory=list)
    nbd_uris: list[str] = field(default_factory=list)
    http_address: str | None = None

    def close(self) -> None:
        """Those that nobody took over."""
        for one in (*self.nbd, *self.control, *self.http):
            one.close()


class Daemon:
    """Everything one supervisor has. Its tasks run in the nursery of `run`."""

    def __init__(self, options: Options) -> None:
        """Takes the lock of the state directory and binds all sockets.

        :raises CdpError: one of that is not possible; nothing is left behind then.
        """
        self.options = options
        self.state_dir = options.state_dir
        self._lock = StateLock.take(self.state_dir)
        self.listeners = Listeners()
        try:
            self.clock = HostClock.open(self.state_dir, options.sources)
            self.start_time = self.clock.wall_now() / SECOND_NS
            self._build()
            self.disks.load()
            self.rollbacks.load()
            self._bind()
        except BaseException:
            self.listeners.close()
            self._lock.close()
            raise
        self.stopping = trio.Event()

    def _build(self) -> None:
        hooks = DiskHooks(
            recorder_greeted=self._recorder_greeted,
            recorder_ready=self._recorder_ready,
            curator_ready=self._curator_ready,
            viewer_ready=self._viewer_ready,
        )
        limits = self.options.config.limits
        self.disks = Disks(
            self.state_dir,
            self.options.config,
            launcher=self.options.launcher,
            clock=self.clock,
            hooks=hooks,
        )
        self.boards = Boards(self.disks)
        self.views = Views(self.disks, self.clock, limits, self.uri)
        self.bookmarks = Bookmarks(self.clock)
        self.rollbacks = Rollbacks(self.state_dir, self.disks, self.views, self.clock)
        self.administration = Administration(self.disks, self.views)
        self.front_door = FrontDoor(
            self.disks, self.views, self.bookmarks, limits, self.boards.connections
        )

    def _bind(self) -> None:
        listeners, options = self.listeners, self.options
        allow = options.allow_remote_without_tls
        for text in options.nbd:
            address = addresses.parse_nbd(text)
            sockets = addresses.listen(address, allow_remote=allow, what="NBD")
            listeners.nbd += sockets
            bound = addresses.bound_address(sockets[0], address.host)
            listeners.nbd_uris.append(addresses.nbd_uri(bound))
        if options.http:
            address = addresses.parse_http(options.http)
            listeners.http = addresses.listen(address, allow_remote=allow, what="HTTP")
            bound = addresses.bound_address(listeners.http[0], address.host)
            listeners.http_address = f"http://{bound}"
        mode = int(options.config.nbd_socket_mode, 8)
        path = self.state_dir / NBD_SOCKET
        listeners.nbd.append(bind_socket(path, socket.SOCK_STREAM, mode=mode))
        listeners.nbd_uris.insert(0, self.uri(""))
        control = bind_socket(self.state_dir / CONTROL_SOCKET, socket.SOCK_STREAM)
        listeners.control.append(control)

    def uri(self, export: str) -> str:
        """The address of an export on the unix socket."""
        return format_uri(export, socket_path=self.state_dir / NBD_SOCKET)

    # ------------------------------------------------------------------------------------- hooks

    async def _recorder_greeted(self, child: Child, hello: dict[str, Any]) -> None:
        await self.rollbacks.recorder_greeted(child, hello)

    async def _recorder_ready(self, child: Child, hello: dict[str, Any]) -> None:
        """Its stamps get a ceiling; and a resize that we did not live to note down is noted."""
        disk = self.disks[child.disk]
        disk.publish_ceiling()
        reply = await child.call_early("status")
        size = int(reply.result.get("size") or 0) if reply is not None else 0
        if size and size != disk.config.size:
            log.warning("%s has %d bytes since a resize that was interrupted", disk.name, size)
            disk.change(size=size)

    async def _curator_ready(self, child: Child, hello: dict[str, Any]) -> None:
        disk = self.disks[child.disk]
        disk.cleared = True
        await child.call_early("note_clock", {"entries": self.clock.wall.entries})
        await self.views.curator_ready(child, hello)
        if not disk.stopping:
            # Ahead of its first view, which is to be open at once.
            disk.viewer.want()

    async def _viewer_ready(self, child: Child, hello: dict[str, Any]) -> None:
        await self.views.viewer_ready(child, hello)

    # -------------------------------------------------------------------------------------- life

    async def run(self, on_ready: Callable[[str], None]) -> None:
        """Until `stopping` is set, and then until everything is applied.

        `on_ready` gets one line when each disk is served or has said why not. When this is
        cancelled, or fails, the disks' processes go on and wait for the next supervisor.
        """
        try:
            async with trio.open_nursery() as nursery:
                await self._serve(nursery)
                nursery.start_soon(self._announce, on_ready)
                await self.stopping.wait()
                await self._stop()
                nursery.cancel_scope.cancel()
            self._remove_sockets()
        finally:
            self.listeners.close()
            self._lock.close()

    async def _serve(self, nursery: trio.Nursery) -> None:
        """Starts every task."""
        from cdp.supervisor.control import DaemonControl

        control = DaemonControl(self)
        self._front = await nursery.start(self._serve_nbd)
        await nursery.start(serve_http, make_app(control, public=False), self.listeners.control)
        if self.listeners.http:
            await nursery.start(serve_http, make_app(control, public=True), self.listeners.http)
        nursery.start_soon(self._keep_clock)
        nursery.start_soon(self._keep_boards)
        nursery.start_soon(self.views.watch)
        await nursery.start(self.disks.run)

    async def _announce(self, on_ready: Callable[[str], None]) -> None:
        await self.disks.settle()
        headlines = [disk.headline() for disk in self.disks.values()]
        headlines += [f"{name} is not usable" for name in self.disks.broken]
        if not self.stopping.is_set():
            on_ready("ready" + (": " if headlines else "") + "; ".join(headlines))

    async def _serve_nbd(self, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                for listener in self.listeners.nbd:
                    nursery.start_soon(self.front_door.serve, listener)
                task_status.started(scope)

    async def _keep_clock(self) -> None:
        """Renews the ceiling, and notices when somebody sets the wall clock."""
        while True:
            if self.clock.must_renew:
                await trio.to_thread.run_sync(self.clock.renew)
                for disk in self.disks.values():
                    disk.publish_ceiling()
            if self.clock.observe() is not None:
                # A curator that does not take it gets it when it comes up again.
                async with trio.open_nursery() as nursery:
                    for disk in self.disks.values():
                        nursery.start_soon(self._note_clock, disk)
            await trio.sleep(CLOCK_SECONDS)

    async def _note_clock(self, disk: Disk) -> None:
        with trio.move_on_after(NOTE_SECONDS_MAX), contextlib.suppress(CdpError):
            await disk.curator.call_early("note_clock", {"entries": self.clock.wall.entries})

    async def _keep_boards(self) -> None:
        while True:
            await self.boards.refresh()
            await trio.sleep(REFRESH_SECONDS)

    async def _stop(self) -> None:
        """A clean stop: nobody comes in any more, then each disk, then the clock."""
        log.info("stopping: what was written is applied, that may take a while")
        self._front.cancel()
        with trio.move_on_after(CLOSE_VIEWS_SECONDS_MAX):
            for disk in self.disks.values():
                await self.views.close_of(disk)
        await self.disks.stop()
        # All who made stamps have ended; a recorder may have been a little ahead of the clock.
        try:
            self.clock.lower(self.clock.now() + SECOND_NS)
        except OSError as error:
            # A stop must not need space, and a ceiling that is too high does no harm.
            log.warning("the clock's ceiling stays where it is: %s", error)
        log.info("stopped")

    def _remove_sockets(self) -> None:
        """So that who comes later is told that nobody is there."""
        for name in (NBD_SOCKET, CONTROL_SOCKET):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.state_dir / name)
