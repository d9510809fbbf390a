"""What the API asks, answered by the daemon's parts."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Final

import trio

from cdp.api.control import Json, Report
from cdp.api.metrics import HostFacts, sum_errors
from cdp.supervisor import doctor, points
from cdp.supervisor.children import Role
from cdp.supervisor.daemon import Daemon
from cdp.supervisor.disk import Disk
from cdp.supervisor.disks import AddRequest
from cdp.supervisor.settings import parse_settings
from cdp.supervisor.status import describe, disk_facts
from journal.errors import Busy, InvalidInput
from replay.target import AtTime

DISTRIBUTION: Final = "cdp-journal"
# A scrape, or who looks at the status, waits that long for a process that does not answer.
STATUS_SECONDS: Final = 1.0


def version() -> str:
    """Of this program."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


class DaemonControl:
    """Implements `cdp.api.control.Control`."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._disks, self._views = daemon.disks, daemon.views
        self._administration = daemon.administration

    # -------------------------------------------------------------------------------------- looking

    def _describe(self, disk: Disk) -> Json:
        board = self._daemon.boards.of(disk)
        views = len(self._views.of(disk))
        return describe(disk, board, views, self._daemon.uri(disk.name))

    async def status(self) -> Json:
        """The daemon and all disks."""
        daemon = self._daemon
        await daemon.boards.refresh(STATUS_SECONDS)
        return {
            "version": version(),
            "pid": os.getpid(),
            "state_dir": str(daemon.state_dir),
            "uptime_seconds": daemon.clock.wall_now() / 1e9 - daemon.start_time,
            "nbd": daemon.listeners.nbd_uris,
            "http": daemon.listeners.http_address,
            "connections": daemon.front_door.connections(),
            "stopping": daemon.stopping.is_set(),
            "disks": [self._describe(disk) for disk in self._disks.values()],
            "broken": dict(self._disks.broken),
        }

    async def disk(self, name: str) -> Json:
        """One disk."""
        disk = self._disks[name]
        await self._daemon.boards.of(disk).refresh(STATUS_SECONDS)
        return self._describe(disk)

    async def metrics(self) -> HostFacts:
        """What a scrape is made of; old values of processes that do not answer."""
        daemon = self._daemon
        await daemon.boards.refresh(STATUS_SECONDS)
        disks = list(self._disks.values())
        boards = [daemon.boards.of(disk) for disk in disks]
        recorders = [board.of[Role.RECORDER].values for board in boards]
        errors = [recorder.get("protocol_errors") or {} for recorder in recorders]
        return HostFacts(
            version(),
            daemon.start_time,
            daemon.front_door.connections(),
            sum_errors([daemon.front_door.errors, *errors]),
            [
                disk_facts(disk, board, self._describe(disk))
                for disk, board in zip(disks, boards, strict=True)
            ],
        )

    async def doctor(self) -> Json:
        """What endangers the data."""
        await self._daemon.boards.refresh(STATUS_SECONDS)
        checks = [*doctor.state_directory(self._daemon.state_dir)]
        checks += doctor.broken(self._disks.broken)
        for disk in self._disks.values():
            checks += doctor.processes(disk)
            checks += doctor.description(disk, self._describe(disk))
            checks += doctor.places(disk)
        return {"checks": checks}

    # --------------------------------------------------------------------------------------- disks

    async def add_disk(self, body: Json) -> Json:
        """Protects a disk."""
        keys = ("window", "journal_limit", "overflow")
        given = {key: body[key] for key in keys if body.get(key) is not None}
        disk = await self._disks.add(
            AddRequest(
                name=body["name"],
                size=body.get("size"),
                backing=body.get("backing"),
                journal=body.get("journal"),
                settings=parse_settings(given),
                block_size=body.get("block_size"),
                segment_bytes=body.get("segment_bytes"),
            )
        )
        return await self.disk(disk.name)

    async def remove_disk(self, name: str, force: bool, purge: bool, report: Report) -> Json:
        """Ends the protection of a disk."""
        return await self._administration.remove(
            self._disks[name], force=force, purge=purge, on_progress=report
        )

    async def resize(self, name: str, size: int) -> Json:
        """Changes a disk's size."""
        await self._administration.resize(self._disks[name], size)
        return await self.disk(name)

    async def set(self, name: str, values: Json) -> Json:
        """Changes how a disk is protected."""
        await self._administration.set(self._disks[name], values)
        return await self.disk(name)

    async def drain(self, name: str, report: Report) -> Json:
        """Applies everything."""
        return await self._administration.drain(self._disks[name], report)

    async def release(self, name: str, report: Report) -> Json:
        """Lets go of a backing."""
        return await self._administration.release(self._disks[name], report)

    async def resume(self, name: str, unchanged: bool, give_up_history: bool) -> Json:
        """Takes a backing back."""
        await self._administration.resume(
            self._disks[name], unchanged=unchanged, give_up_history=give_up_history
        )
        return await self.disk(name)

    async def offer(self, name: str) -> Json:
        """Serves a disk again that lost something in a crash."""
        await self._administration.offer(self._disks[name])
        return await self.disk(name)

    async def scrub(self, name: str, wait: bool, rate: int | None, report: Report) -> Json:
        """Verifies every checksum."""
        disk = self._disks[name]
        return await self._administration.scrub(disk, wait=wait, rate=rate, on_progress=report)

    async def scrub_status(self, name: str) -> Json:
        """How it goes, and what the last one found."""
        return await self._administration.scrub_status(self._disks[name])

    async def stop_scrub(self, name: str) -> Json:
        """Ends the one that runs."""
        await self._administration.stop_scrub(self._disks[name])
        return {}

    # -------------------------------------------------------------------------------------- points

    async def resolve(self, name: str, spec: str) -> Json:
        """What a SPEC means."""
        point = await points.resolve(self._disks[name], spec)
        return {
            "disk": name,
            "seq": point.seq,
            "stamp": point.stamp,
            "time": point.time,
            "size": point.size,
            "spec": spec,
        }

    async def timeline(self, name: str, buckets: int, since: str | None, until: str | None) -> Json:
        """Writes over time, with bookmarks, gaps and pins."""
        disk = self._disks[name]
        await self._confirm(disk)
        params = {
            "buckets": buckets,
            "from_ns": None if since is None else await self._wall_ns(disk, since),
            "to_ns": None if until is None else await self._wall_ns(disk, until),
            "now_ns": self._daemon.clock.wall_now(),
        }
        return {"disk": name, **(await disk.curator.call("timeline", params, again=True)).result}

    async def points(self, name: str, since: str | None, until: str | None, limit: int) -> Json:
        """Moments worth looking at between two."""
        disk = self._disks[name]
        await self._confirm(disk)
        params = {
            "from": since or "seq:0",
            "to": until or "now",
            "limit": limit,
            "now_ns": self._daemon.clock.wall_now(),
            "zone": points.local_zone_name(),
        }
        return {"disk": name, **(await disk.curator.call("points", params, again=True)).result}

    @staticmethod
    async def _confirm(disk: Disk) -> None:
        """What was just written is shown, too; without a recorder, what is known."""
        disk.check_in_use()
        try:
            await disk.sync()
        except Busy:
            await trio.lowlevel.checkpoint()

    async def _wall_ns(self, disk: Disk, spec: str) -> int:
        meant = points.parse(spec, self._daemon.clock.wall_now())
        if isinstance(meant, AtTime):
            return meant.wall_ns
        return (await points.resolve(disk, meant)).wall_ns

    async def add_bookmarks(self, names: list[str], label: str, consistency: str) -> Json:
        """Bookmarks this moment."""
        disks = [self._disks[name] for name in names]
        return {"bookmarks": await self._daemon.bookmarks.add(disks, label, consistency)}

    async def bookmarks(self, name: str) -> Json:
        """All bookmarks of a disk."""
        return {"bookmarks": await self._daemon.bookmarks.of(self._disks[name])}

    async def remove_bookmark(self, name: str, label: str) -> Json:
        """Removes one."""
        await self._daemon.bookmarks.remove(self._disks[name], label)
        return {}

    async def rollback(
        self, names: list[str], spec: str, dry_run: bool, disconnect: bool, report: Report
    ) -> Json:
        """Makes disks what they were."""
        if not names:
            raise InvalidInput("name the disk to roll back")
        return await self._daemon.rollbacks.run(
            names, spec, dry_run=dry_run, disconnect=disconnect, on_progress=report
        )

    # --------------------------------------------------------------------------------------- views

    async def open_view(self, name: str, spec: str, writable: bool) -> Json:
        """Opens a disk as it was."""
        view = await self._views.open(self._disks[name], spec, writable=writable)
        return self._views.describe(view)

    async def views(self) -> Json:
        """All views."""
        await self._views.refresh()
        return {"views": [self._views.describe(view) for view in self._views.all()]}

    async def close_view(self, view: str) -> Json:
        """Closes one."""
        await self._views.close(view)
        return {}
