"""One protected disk, as the supervisor sees it: its configuration, backing and processes."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from cdp.child import frontier_path
from cdp.clock import HostClock, boot_id_bytes
from cdp.config import DiskConfig, save_disk
from cdp.rpc import OnProgress
from cdp.supervisor import backing
from cdp.supervisor.children import Child, Hook, Hooks, Launcher, Role, State, _no_hook
from journal.errors import Busy, CdpError, Conflict, InvalidInput
from journal.frontier import Frontier, FrontierMissing

log = logging.getLogger(__name__)

# After that long, `ready` is printed although a disk is still on its way, with what it does.
SETTLE_SECONDS: Final = 60.0


class Backing:
    """The descriptor of a backing. Opened at most once, and only if no child has it."""

    def __init__(self, path: Path, size: Callable[[], int]) -> None:
        self._path, self._size = path, size
        self.fd: int | None = None

    def acquire(self) -> int:
        """The descriptor; opens the backing exclusively if need be.

        :raises CdpError: it cannot be opened, or has become too small for the disk.
        """
        if self.fd is None:
            facts = backing.inspect(self._path)
            if facts.size < self._size():
                raise InvalidInput(
                    f"{self._path} has {facts.size} bytes, {self._size()} are needed: enlarge it"
                )
            self.fd = backing.open_exclusively(self._path)
        return self.fd

    def offer(self, fd: int) -> None:
        """Takes over a descriptor that a child handed back, if there is none yet."""
        if self.fd is None:
            self.fd = fd
        else:
            os.close(fd)

    def close(self) -> None:
        """Lets go of it: it stays locked while a child has it."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


@dataclass(slots=True)
class DiskHooks:
    """What others have to do when a process of a disk comes up; called in that child's task."""

    recorder_greeted: Hook = _no_hook
    recorder_ready: Hook = _no_hook
    curator_ready: Hook = _no_hook
    viewer_ready: Hook = _no_hook


class Disk:
    """One disk. Its children run in the nursery of `run`; everything else is called by others."""

    def __init__(
        self,
        config: DiskConfig,
        directory: Path,
        *,
        launcher: Launcher,
        clock: HostClock,
        hooks: DiskHooks,
    ) -> None:
        self.config, self.directory, self.clock = config, directory, clock
        self.backing = Backing(Path(config.backing), lambda: self.config.size)
        self.since = trio.current_time()
        # What an administrator has it do at the moment, which excludes everything of that kind.
        self.operation: str | None = None
        # Whether the front door may let clients in.
        self.is_open = True
        # Whether its curator has found the backing as it was left. Before that nobody is served:
        # what somebody else wrote in the meantime is the administrator's to judge.
        self.cleared = False
        self.stopping = False
        self.ended = trio.Event()
        wanted = {
            Role.RECORDER: Hooks(hooks.recorder_greeted, hooks.recorder_ready),
            Role.CURATOR: Hooks(ready=hooks.curator_ready),
            Role.VIEWER: Hooks(ready=hooks.viewer_ready),
        }
        self.children: dict[Role, Child] = {
            role: Child(
                role,
                config.name,
                directory,
                config.uuid,
                launcher=launcher,
                clock_offset_ns=clock.offset_ns,
                backing=self.backing,
                hooks=wanted[role],
            )
            for role in Role
        }
        self.recorder = self.children[Role.RECORDER]
        self.curator = self.children[Role.CURATOR]
        self.viewer = self.children[Role.VIEWER]
        if not config.released:
            # Before its tasks run, so that who asks for it meanwhile waits and is not refused.
            self.start()

    @property
    def name(self) -> str:
        """Its name."""
        return self.config.name

    # ------------------------------------------------------------------------------------- life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps its processes running until `ended` is set; they outlive a cancellation."""
        try:
            # First all of them: the backing may only be opened when none of them has it.
            async with trio.open_nursery() as nursery:
                for child in self.children.values():
                    nursery.start_soon(self._adopt, child)
            async with trio.open_nursery() as nursery:
                for child in self.children.values():
                    nursery.start_soon(child.run)
                if self.config.released and any(child.pid for child in self.children.values()):
                    # A supervisor died while it let go of the disk, or took it back.
                    await self.let_go()
                task_status.started()
                await self.ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.backing.close()

    async def _adopt(self, child: Child) -> None:
        if await child.adopt() and not self.config.released:
            log.info("the %s is adopted (process %s)", child, child.pid)
            child.want()

    def start(self) -> None:
        """Its recorder and curator shall run; the viewer follows when the curator is ready."""
        self.stopping = False
        self.recorder.want()
        self.curator.want()

    async def settle(self) -> None:
        """Waits until it is served or has said why not, or is still busy with coming up."""
        if self.config.released:
            return
        with trio.move_on_after(SETTLE_SECONDS):
            await self.recorder.settled.wait()
            if not self.cleared:
                await self.curator.settled.wait()

    async def wait_servable(self) -> None:
        """Waits until clients may be let in.

        :raises CdpError: they may not, and why.
        """
        self.check_in_use()
        await self.recorder.wait_ready()
        if not self.cleared:
            await self.curator.wait_ready()

    def headline(self) -> str:
        """How it is, in a few words, for the line that says that the daemon is ready."""
        if self.config.released:
            return f"{self.name} is released"
        reason = self.not_served()
        return (
            f"{self.name} is served" if reason is None else f"{self.name} is not served: {reason}"
        )

    def not_served(self) -> str | None:
        """Which of its processes is not as it should be; None if they are."""
        for child in (self.recorder, self.curator):
            if child.state is not State.READY and not (child is self.curator and self.cleared):
                return child.reason or f"its {child.role} is {child.state}"
        return None

    async def stop(self, *, drain: bool = True, on_progress: OnProgress | None = None) -> None:
        """Stops its processes cleanly: what was written is applied, unless `drain` is False.

        The recorder first: nothing may be appended behind what the curator applies last.
        """
        self.stopping = True
        await self.viewer.stop()
        await self.recorder.stop()
        try:
            await self.curator.stop({"drain": drain}, on_progress)
        except CdpError as error:
            log.error("%s is stopped before everything is applied: %s", self.name, error)
            try:
                await self.curator.stop({"drain": False})
            except CdpError as refusal:
                log.error("the curator of %s is left running: %s", self.name, refusal)

    async def let_go(self, on_progress: OnProgress | None = None) -> None:
        """Stop its processes, and leave its backing to others."""
        await self.stop(on_progress=on_progress)
        self.backing.close()
        self.cleared = False

    # ---------------------------------------------------------------------------------- for others

    @contextlib.contextmanager
    def exclusive(self, operation: str) -> Generator[None]:
        """For an administrator's operation that no other may disturb.

        :raises Busy: there is one already.
        """
        if self.operation is not None:
            raise Busy(f"{self.name} is busy: {self.operation}; wait until that is done")
        self.operation = operation
        try:
            yield
        finally:
            self.operation = None

    @contextlib.contextmanager
    def closed_to_clients(self) -> Generator[None]:
        """While this lasts, the front door lets nobody in."""
        self.is_open = False
        try:
            yield
        finally:
            self.is_open = True

    def check_in_use(self) -> None:
        """:raises Conflict: the disk is released, so there is nothing to be asked."""
        if self.config.released:
            raise Conflict(f"{self.name} is released: take it back with 'cdp disk resume' first")

    def publish_ceiling(self) -> None:
        """Tells the recorder how far its stamps may go: no boot after this one begins below."""
        try:
            page = Frontier.open(
                frontier_path(self.directory, self.config),
                disk=self.config.id_bytes,
                boot_id=boot_id_bytes(self.clock.boot_id),
                create=False,
            )
        except FrontierMissing:
            return
        with page:
            page.stamp_ceiling = self.clock.ceiling_ns

    def change(self, **values: Any) -> DiskConfig:
        """Changes its configuration, durably. InvalidInput if that is not possible."""
        config = msgspec.structs.replace(self.config, **values).checked()
        save_disk(self.directory, config)
        self.config = config
        return config

    async def sync(self) -> tuple[int, int]:
        """Makes everything appended so far durable: (durable seq, stamp).

        No later record will carry a stamp at or below that one.
        """
        self.check_in_use()
        result = (await self.recorder.call("sync", again=True)).result
        return int(result["durable"]), int(result["stamp"])

    async def ready_viewer(self) -> Child:
        """Its viewer, started if need be."""
        self.check_in_use()
        self.viewer.want()
        await self.viewer.wait_ready()
        return self.viewer
