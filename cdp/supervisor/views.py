"""Open views of all disks: which there are, who holds them, and when they end.

A view is a pin in the curator's catalog (its point stays openable, durably) and an entry in the
viewer (its export). The pin comes first and goes last. Two kinds: those an administrator opened,
which stay until closed or too old; and *ephemeral* ones behind exports such as `disk0@-10m`, which
end with their last connection.

The registry is memory only. A new supervisor learns of views from the viewer it adopts; pins whose
view is gone are dropped as soon as viewer and curator are known.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import trio

from cdp.clock import HostClock
from cdp.config import LimitsConfig
from cdp.supervisor.children import Child, State
from cdp.supervisor.disk import Disk
from cdp.supervisor.points import Point, resolve
from journal.errors import Busy, CdpError, NotFound

log = logging.getLogger(__name__)

WATCH_SECONDS: Final = 1.0
WATCH_SECONDS_MAX: Final = 10.0
OWNER_VIEW: Final = "view"
OWNER_CONNECTION: Final = "connection"
PIN_OWNERS: Final = frozenset({OWNER_VIEW, OWNER_CONNECTION, "rollback"})


@dataclass(slots=True)
class View:
    """One view. `holders`: connections that are negotiating it; `served`: as the viewer says."""

    id: str
    disk: Disk
    point: Point
    writable: bool
    ephemeral: bool
    opened: float
    opened_at: float
    holders: int = 0
    touched: int = 0
    served: int = 0
    overlay_bytes: int = 0
    closing: bool = False


class Views:
    """The registry. `uri` makes the address of an export."""

    def __init__(
        self,
        disks: Mapping[str, Disk],
        clock: HostClock,
        limits: LimitsConfig,
        uri: Callable[[str], str],
    ) -> None:
        self._disks, self._clock, self._limits, self._uri = disks, clock, limits, uri
        self._views: dict[str, View] = {}
        # Pins of others, which are no views and not to be dropped: rollbacks in progress.
        self.kept_pins: set[str] = set()
        self._look = trio.Event()

    # -------------------------------------------------------------------------------------- asking

    def all(self) -> list[View]:
        """Every view that is open."""
        return list(self._views.values())

    def of(self, disk: Disk) -> list[View]:
        """Those of one disk."""
        return [view for view in self._views.values() if view.disk is disk]

    def get(self, name: str) -> View:
        """A view by its id.

        :raises NotFound: there is none.
        """
        view = self._views.get(name)
        if view is None or view.closing:
            raise NotFound(f"there is no view {name!r}: see 'cdp view list'")
        return view

    def describe(self, view: View) -> dict[str, Any]:
        """The object that the API calls View."""
        return {
            "id": view.id,
            "disk": view.disk.name,
            "seq": view.point.seq,
            "time": view.point.time,
            "size": view.point.size,
            "uri": self._uri(f"{view.disk.name}@view:{view.id}"),
            "writable": view.writable,
            "opened": view.opened,
            "ephemeral": view.ephemeral,
            "connections": view.served,
            "overlay_bytes": view.overlay_bytes,
        }

    # --------------------------------------------------------------------------- opening, closing

    async def open(self, disk: Disk, spec: str, *, writable: bool = False) -> View:
        """Opens a view that stays.

        :raises CdpError: the point cannot be opened, or there are too many views.
        """
        point = await resolve(disk, spec)
        return await self._open(disk, point, writable=writable, ephemeral=False)

    async def open_for_connection(self, disk: Disk, spec: str) -> tuple[View, bool]:
        """A read-only view for one connection, held until `release`. Equal points share one.

        Also whether `spec` will mean the same point next time.
        """
        point = await resolve(disk, spec)
        for view in self.of(disk):
            if view.ephemeral and not view.closing and view.point.seq == point.seq:
                self.hold(view)
                return view, point.stable
        view = await self._open(disk, point, writable=False, ephemeral=True)
        self.hold(view)
        return view, point.stable

    def hold(self, view: View) -> None:
        """Keeps a view from being closed while a connection negotiates it."""
        view.holders += 1
        view.touched += 1

    def release(self, view: View) -> None:
        """The counterpart: the connection is with the viewer, or it is over."""
        view.holders -= 1
        view.touched += 1
        if view.ephemeral and view.holders == 0:
            self._look.set()

    async def _open(self, disk: Disk, point: Point, *, writable: bool, ephemeral: bool) -> View:
        # Counted apart: clients of the front door must not keep an administrator out.
        count = sum(view.ephemeral is ephemeral for view in self._views.values())
        if count >= self._limits.views:
            raise Busy(f"{count} views are open, that is the limit: close one first")
        view = View(
            secrets.token_hex(4),
            disk,
            point,
            writable,
            ephemeral,
            self._clock.wall_now() / 1e9,
            trio.current_time(),
            holders=1,
        )
        self._views[view.id] = view
        try:
            await self._pin(view)
            viewer = await disk.ready_viewer()
            await viewer.call("open", self._open_params(view))
        except BaseException:
            # Also when nobody waits any more: neither pin nor view may be left behind.
            with trio.CancelScope(shield=True), trio.move_on_after(self._limits.handshake_seconds):
                await self._end(view)
            raise
        view.holders -= 1
        return view

    async def _pin(self, view: View) -> None:
        await view.disk.curator.call(
            "pin",
            {
                "id": view.id,
                "seq": view.point.seq,
                "owner": OWNER_CONNECTION if view.ephemeral else OWNER_VIEW,
                "max_age_seconds": self._limits.view_age_seconds,
            },
            again=True,
        )

    def _open_params(self, view: View) -> dict[str, Any]:
        return {
            "id": view.id,
            "seq": view.point.seq,
            "size": view.point.size,
            "writable": view.writable,
            "overlay_limit": self._limits.view_overlay_bytes,
        }

    async def close(self, name: str) -> None:
        """Closes a view; its connections end, what was written to it is gone.

        :raises NotFound: there is none.
        """
        view = self.get(name)
        with trio.CancelScope(shield=True):
            await self._end(view)

    async def close_of(self, disk: Disk) -> None:
        """Closes all views of a disk."""
        for view in self.of(disk):
            if not view.closing:
                await self._end(view)

    async def _end(self, view: View) -> None:
        """Ends a view; whatever cannot be told now is put right when that process is back."""
        view.closing = True
        try:
            await view.disk.viewer.call("close", {"id": view.id})
        except CdpError as error:
            log.debug("view %s: %s", view.id, error)
        try:
            await view.disk.curator.call("unpin", {"id": view.id})
        except CdpError as error:
            log.info("the pin of view %s is dropped later: %s", view.id, error)
        self._views.pop(view.id, None)

    # --------------------------------------------------------------------------------- processes

    async def viewer_ready(self, child: Child, _hello: dict[str, Any]) -> None:
        """A viewer has come up, or was adopted: it and the registry shall know the same views."""
        disk = self._disks.get(child.disk)
        if disk is None:
            return
        reply = await child.call_early("list")
        there = {str(each["id"]): each for each in reply.result["views"]} if reply else {}
        for view in self.of(disk):
            if view.id not in there and not view.closing and view.holders == 0:
                await self._reopen(child, view)
        if there.keys() - self._views.keys():
            await disk.curator.wait_ready()
            pins = await self._pins(disk)
            for name in there.keys() - self._views.keys():
                await self._learn(disk, there[name], pins.get(name))
        await self._drop_pins(disk)

    async def _reopen(self, child: Child, view: View) -> None:
        """The viewer died: what it served is opened anew, except what had been written."""
        if view.writable:
            log.warning("view %s ended with its viewer: what was written to it is gone", view.id)
            view.closing = True
            self._views.pop(view.id, None)
            return
        await child.call_early("open", self._open_params(view))

    async def _learn(self, disk: Disk, there: dict[str, Any], pin: dict[str, Any] | None) -> None:
        """A view that an earlier supervisor opened."""
        try:
            point = await resolve(disk, f"seq:{there['seq']}")
        except CdpError as error:
            log.warning("view %s of %s is closed: %s", there["id"], disk.name, error)
            await disk.viewer.call_early("close", {"id": there["id"]})
            return
        point = Point(
            point.seq, point.stamp, point.wall_ns, int(there.get("size") or point.size), True
        )
        self._views[str(there["id"])] = View(
            str(there["id"]),
            disk,
            point,
            bool(there.get("writable")),
            pin is not None and pin.get("owner") == OWNER_CONNECTION,
            self._clock.wall_now() / 1e9,
            trio.current_time(),
        )

    async def curator_ready(self, child: Child, _hello: dict[str, Any]) -> None:
        """A curator has come up: pins of views that ended meanwhile are dropped."""
        disk = self._disks.get(child.disk)
        # While a viewer is coming up, nobody knows which views there are: it is asked first.
        if disk is not None and disk.viewer.state in (State.STOPPED, State.READY):
            await self._drop_pins(disk)

    async def _pins(self, disk: Disk) -> dict[str, dict[str, Any]]:
        reply = await disk.curator.call_early("pins")
        return {str(pin["id"]): pin for pin in reply.result["pins"]} if reply else {}

    async def _drop_pins(self, disk: Disk) -> None:
        for name, pin in (await self._pins(disk)).items():
            known = name in self._views or name in self.kept_pins
            if pin.get("owner") in PIN_OWNERS and not known:
                log.info("pin %s of a %s that is gone is dropped", name, pin["owner"])
                await disk.curator.call_early("unpin", {"id": name})

    # ------------------------------------------------------------------------------------ watching

    async def watch(self) -> None:
        """Ends ephemeral views without connections, and views that are too old."""
        while True:
            with trio.move_on_after(WATCH_SECONDS):
                await self._look.wait()
            self._look = trio.Event()
            for disk in list(self._disks.values()):
                # A viewer that is stuck must not keep the others from being looked at.
                with trio.move_on_after(WATCH_SECONDS_MAX):
                    await self._watch_disk(disk)

    async def _watch_disk(self, disk: Disk) -> None:
        views = self.of(disk)
        if not views or disk.viewer.state is not State.READY:
            return
        # Whoever was attached while the viewer was asked may not have been counted.
        touched = {view.id: view.touched for view in views}
        try:
            await self._count(disk, views)
        except CdpError as error:
            log.debug("the views of %s are not known: %s", disk.name, error)
            return
        for view in views:
            age = trio.current_time() - view.opened_at
            if view.closing or view.holders or view.touched != touched[view.id]:
                continue
            if view.ephemeral and view.served == 0:
                await self._end(view)
            elif age > self._limits.view_age_seconds:
                log.warning("view %s of %s is closed: it is too old", view.id, disk.name)
                await self._end(view)

    @staticmethod
    async def _count(disk: Disk, views: Iterable[View]) -> None:
        """How many connections each view has, and what its overlay takes."""
        reply = await disk.viewer.call("list")
        there = {str(each["id"]): each for each in reply.result["views"]}
        for view in views:
            facts = there.get(view.id, {})
            view.served = int(facts.get("connections") or 0)
            view.overlay_bytes = int(facts.get("overlay_bytes") or 0)

    async def users_of(self, disk: Disk) -> list[View]:
        """Views that somebody uses: an ephemeral one without connections is only not ended yet."""
        await self._watch_disk(disk)
        return [view for view in self.of(disk) if not view.closing]

    async def refresh(self) -> None:
        """Asks the viewers for what `describe` shows; those that do not answer keep the old."""
        for disk in {id(view.disk): view.disk for view in self._views.values()}.values():
            try:
                with trio.move_on_after(WATCH_SECONDS):
                    await self._count(disk, self.of(disk))
            except CdpError as error:
                log.debug("the views of %s are not known: %s", disk.name, error)
