"""Bookmarks: one moment, on one disk or on several at once.

Stamps of all disks come from one clock, so one instant is a consistent cut across any of them: a
write that was issued after another's acknowledgement has the larger stamp, on whatever disk. Each
disk's bookmark names its last record stamped at or before that instant.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import trio

from cdp.clock import SECOND_NS, HostClock
from cdp.supervisor.disk import Disk
from cdp.supervisor.points import Point, at_stamp
from journal.errors import CdpError, Conflict, InvalidInput
from replay.target import check_label

log = logging.getLogger(__name__)

CONSISTENCIES: Final = ("crash", "filesystem", "application")
UNDO_SECONDS_MAX: Final = 30.0


class Bookmarks:
    """Adds, lists and removes bookmarks."""

    def __init__(self, clock: HostClock) -> None:
        self._clock = clock

    async def add(self, disks: list[Disk], label: str, consistency: str) -> list[dict[str, Any]]:
        """Bookmarks this moment on all of them, or on none.

        :raises CdpError: it is not possible on one of them.
        """
        check_label(label)
        if consistency not in CONSISTENCIES:
            raise InvalidInput(
                f"{consistency!r} is no consistency: choose {', '.join(CONSISTENCIES)}"
            )
        if not disks or len({disk.name for disk in disks}) != len(disks):
            raise InvalidInput("name each disk once")
        for disk in disks:
            disk.check_in_use()
            if any(mark["label"] == label for mark in await self.of(disk)):
                raise Conflict(
                    f"{disk.name} has a bookmark {label!r} already: choose another label"
                )
        stamp = self._clock.now()
        points = await self._at_instant(disks, stamp) if len(disks) > 1 else {}
        done: list[Disk] = []
        try:
            return [
                await self._add_one(disk, points.get(disk.name), stamp, label, consistency, done)
                for disk in disks
            ]
        except BaseException:
            with trio.CancelScope(shield=True), trio.move_on_after(UNDO_SECONDS_MAX):
                await self._undo(done, label)
            raise

    async def _at_instant(self, disks: list[Disk], stamp: int) -> dict[str, Point]:
        """The point of each disk at an instant that has just passed, confirmed by its recorder."""
        points: dict[str, Point] = {}

        async def confirm(disk: Disk) -> None:
            _, confirmed = await disk.sync()
            if confirmed < stamp:
                raise CdpError(
                    f"the recorder of {disk.name} has another clock: restart the daemon cleanly"
                )
            points[disk.name] = await at_stamp(disk, stamp)

        first: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                for disk in disks:
                    nursery.start_soon(confirm, disk)
        except* CdpError as group:
            first = group
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
        if first is not None:  # raised in there it would be a group again, before Python 3.11.4
            raise first from None
        return points

    async def _add_one(
        self,
        disk: Disk,
        point: Point | None,
        instant: int,
        label: str,
        requested: str,
        done: list[Disk],
    ) -> dict[str, Any]:
        params: dict[str, Any] = {"label": label, "requested": requested, "consistency": "crash"}
        if point is not None:
            params |= {"target": point.seq, "target_stamp": instant}
        result = (await disk.recorder.call("bookmark", params)).result
        done.append(disk)
        seq, stamp = int(result["seq"]), int(result["stamp"])
        if point is not None:
            seq, stamp = point.seq, instant
        return {
            "disk": disk.name,
            "label": label,
            "seq": seq,
            "time": self._clock.wall.wall_of(stamp) / SECOND_NS,
            "requested": requested,
            "consistency": "crash",
        }

    async def _undo(self, disks: list[Disk], label: str) -> None:
        for disk in disks:
            try:
                await self.remove(disk, label)
            except CdpError as error:
                log.error("bookmark %s of %s is left over: %s", label, disk.name, error)

    async def of(self, disk: Disk) -> list[dict[str, Any]]:
        """All bookmarks of a disk, ascending by seq."""
        disk.check_in_use()
        marks: list[dict[str, Any]] = (await disk.curator.call("bookmarks", again=True)).result[
            "bookmarks"
        ]
        return marks

    async def remove(self, disk: Disk, label: str) -> None:
        """Removes a bookmark. NotFound if there is none."""
        disk.check_in_use()
        await disk.curator.call("unbookmark", {"label": label})
