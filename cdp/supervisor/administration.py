"""What administrators do with a disk that exists: change, resize, drain, release, remove, check."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import trio

from cdp.config import check_size
from cdp.rpc import OnProgress
from cdp.supervisor import backing, removal
from cdp.supervisor.children import State
from cdp.supervisor.disk import Disk
from cdp.supervisor.disks import Disks
from cdp.supervisor.settings import CHANGEABLE, FOR_CURATOR, FOR_RECORDER, parse_settings
from cdp.supervisor.views import Views
from journal.errors import Busy, CdpError, Conflict, InvalidInput

log = logging.getLogger(__name__)

ACCEPT_SECONDS_MAX: Final = 60.0


class Administration:
    """Operations on the disks of a registry. Those of one disk exclude each other."""

    def __init__(self, disks: Disks, views: Views) -> None:
        self._disks, self._views = disks, views

    # ----------------------------------------------------------------------------------- changing

    async def set(self, disk: Disk, values: Mapping[str, Any]) -> None:
        """Changes how a disk is protected; its processes hear of it at once.

        :raises InvalidInput: an unknown key, or a value that is not possible; nothing changed.
        """
        for key in values:
            if key.replace("_", "-") not in CHANGEABLE:
                raise InvalidInput(f"there is no setting {key!r}: choose {', '.join(CHANGEABLE)}")
        settings = parse_settings(values)
        disk.change(**settings)
        for child, fields in ((disk.recorder, FOR_RECORDER), (disk.curator, FOR_CURATOR)):
            told = {key: value for key, value in settings.items() if key in fields}
            # One that is not up reads the configuration when it comes up.
            if told and child.state is State.READY:
                await child.call("set", told)

    async def resize(self, disk: Disk, size: int) -> None:
        """Changes the size of a disk. Points before keep the size they had.

        :raises CdpError: the backing cannot hold it, or clients would lose the end of the disk.
        """
        disk.check_in_use()
        check_size(size, disk.config.block_size)
        with disk.exclusive("resizing"):
            if size < disk.config.size:
                status = (await disk.recorder.call("status")).result
                if status.get("connections"):
                    raise Conflict(
                        f"{disk.name} is in use by {status['connections']} connection(s), which "
                        "know its size: stop what uses it before making it smaller"
                    )
            backing.grow(Path(disk.config.backing), size)
            with trio.CancelScope(shield=True):
                await disk.recorder.call("resize", {"size": size})
                disk.change(size=size)

    async def drain(self, disk: Disk, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Applies everything that is durable now."""
        disk.check_in_use()
        await disk.sync()
        reply = await disk.curator.call("drain", on_progress=on_progress)
        return {"applied_seq": int(reply.result["applied"])}

    async def scrub(
        self, disk: Disk, *, wait: bool, rate: int | None, on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """Verifies every checksum of a disk's journal; goes on when who waits for it leaves."""
        disk.check_in_use()
        params = {"wait": wait, "rate": rate}
        return (await disk.curator.call("scrub", params, on_progress=on_progress)).result

    async def scrub_status(self, disk: Disk) -> dict[str, Any]:
        """How the scrub that runs goes, and what the last one found."""
        disk.check_in_use()
        return (await disk.curator.call("scrub_status", again=True)).result

    async def stop_scrub(self, disk: Disk) -> None:
        """Ends the one that runs."""
        disk.check_in_use()
        await disk.curator.call("scrub_stop")

    # ---------------------------------------------------------------------------------- releasing

    async def release(self, disk: Disk, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Lets go of the backing, for use without us: it is complete, and a gap begins.

        :raises CdpError: clients or views use the disk; it is served as before then.
        """
        disk.check_in_use()
        with disk.exclusive("releasing"), disk.closed_to_clients():
            await self._refuse_users(disk, force=False)
            result = await self.drain(disk, on_progress)
            await disk.curator.call("release_masked", on_progress=on_progress)
            with trio.CancelScope(shield=True):
                # First, so that whatever comes between, nobody is served inside the gap.
                disk.change(released=True)
                try:
                    await disk.recorder.call("gap_begin", {"reason": "released"})
                except BaseException:
                    disk.change(released=False)
                    raise
                await disk.let_go(on_progress)
        return result

    async def resume(self, disk: Disk, *, unchanged: bool, give_up_history: bool) -> None:
        """Takes back a disk that was released, or whose backing was changed by somebody else, or
        could not be opened: it had become too small, say.

        :raises CdpError: nobody said what happened to it, it is in use, or cannot be opened.
        """
        if unchanged == give_up_history:
            raise InvalidInput(
                "say either that nobody wrote to the backing, or that the history is given up"
            )
        released = disk.config.released
        with disk.exclusive("being taken back"), disk.closed_to_clients():
            disk.backing.acquire()  # says what is wrong with it, if that is why it is not served
            if released:
                disk.start()
            try:
                with trio.fail_after(ACCEPT_SECONDS_MAX):
                    await disk.curator.wait_decided()
                    if not released and disk.curator.state is not State.FAILED:
                        raise Conflict(
                            f"{disk.name} is neither released nor waiting for a decision: leave it"
                        )
                    await self._accept(disk, unchanged=unchanged, gap=released)
            except BaseException as error:
                why = disk.not_served()
                if released:  # it still is: interrupted anywhere, this can be said again
                    with trio.CancelScope(shield=True):
                        await disk.let_go()
                if isinstance(error, trio.TooSlowError):
                    raise Busy(f"{disk.name} is not ready in time ({why}): say it again") from None
                raise
            if released:
                disk.change(released=False)

    async def _accept(self, disk: Disk, *, unchanged: bool, gap: bool) -> None:
        """Its processes hear what the administrator knows of the time without them."""
        forgotten = unchanged
        if disk.curator.state is State.FAILED:
            # It has seen that somebody wrote, or cannot tell: the administrator can.
            await disk.curator.call_early("accept_backing", {"unchanged": unchanged})
            await disk.curator.wait_decided(other_than=State.FAILED)
            forgotten = True
        await disk.recorder.wait_ready()
        if gap:
            await disk.recorder.call("gap_end", {"unchanged": unchanged})
        if not forgotten:
            await disk.recorder.call("sync", again=True)
            await disk.curator.call("forget_history")

    async def offer(self, disk: Disk) -> None:
        """The administrator knows what a crash lost: the disk is served again."""
        disk.check_in_use()
        await disk.recorder.call("offer")

    # ----------------------------------------------------------------------------------- removing

    async def remove(
        self, disk: Disk, *, force: bool, purge: bool, on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """Ends the protection: everything is applied, the history is deleted, the content stays.

        With `force` also while clients or views use it, and if its processes do not work.
        """
        with disk.exclusive("being removed"), disk.closed_to_clients():
            if not disk.config.released:
                await self._refuse_users(disk, force=force)
                await self._empty(disk, force, on_progress)
            with trio.CancelScope(shield=True):
                await disk.stop(on_progress=on_progress)
                removal.mark(disk.directory, purge=purge)
                self._disks.forget(disk)
                await trio.to_thread.run_sync(removal.finish, disk.directory)
        return {"disk": disk.name, "backing": None if purge else disk.config.backing}

    async def _empty(self, disk: Disk, force: bool, on_progress: OnProgress | None) -> None:
        """Everything into the backing, and nothing of what was trimmed."""
        try:
            await disk.recorder.call("disconnect")
            await self.drain(disk, on_progress)
            await disk.curator.call("release_masked", on_progress=on_progress)
        except CdpError as error:
            if not force:
                raise Conflict(
                    f"{error}; with --force {disk.name} is removed all the same, and what is not "
                    "applied is lost"
                ) from error
            log.error("%s is removed although not everything is applied: %s", disk.name, error)

    async def _refuse_users(self, disk: Disk, *, force: bool) -> None:
        """Views are closed, and clients disconnected, only with `force`."""
        views = await self._views.users_of(disk)
        connections = 0
        if disk.recorder.is_ready:
            status = (await disk.recorder.call("status")).result
            connections = int(status.get("connections") or 0)
        if not force and (views or connections):
            raise Conflict(
                f"{disk.name} is in use by {connections} connection(s) and {len(views)} view(s): "
                "stop what uses it first"
            )
        await self._views.close_of(disk)
