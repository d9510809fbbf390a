"""The registry of disks: which there are, and how one is added.

A disk exists from the moment its `disk.json` is durable, which is written last. Its directory may
be all there is before (a crash while adding: it is taken over by the next `add`), and a marker
says when it is being removed (`removal`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from cdp.clock import HostClock
from cdp.config import (
    DISK_FILE,
    DaemonConfig,
    DiskConfig,
    check_name,
    default_journal_limit,
    load_disk,
    new_uuid,
    save_disk,
    sync_directory,
)
from cdp.supervisor import backing, removal
from cdp.supervisor.children import Launcher, State
from cdp.supervisor.disk import Disk, DiskHooks
from cdp.supervisor.settings import Settings, parse_settings
from journal.errors import CdpError, Conflict, InvalidInput, NotFound
from journal.limits import MIB, SEGMENT_BYTES_MIN

log = logging.getLogger(__name__)

DISKS: Final = "disks"
BACKING_FILE: Final = "backing.img"
JOURNAL: Final = "journal"
JOURNAL_PARTS: Final = ("redo", "undo", "index")
# A new disk is reported as it is after that long.
ADD_SECONDS_MAX: Final = 30.0
# A journal of fewer could only be kept within its limit in steps that are large against it.
SEGMENTS_MIN: Final = 16


@dataclass(frozen=True, slots=True)
class AddRequest:
    """What an administrator wants protected, and how; None is the default."""

    name: str
    size: int | None = None
    backing: str | None = None
    journal: str | None = None
    settings: Settings | None = None
    block_size: int | None = None
    segment_bytes: int | None = None


class Disks(Mapping[str, Disk]):
    """All disks by name. Their tasks run in the nursery of `run`."""

    def __init__(
        self,
        directory: Path,
        config: DaemonConfig,
        *,
        launcher: Launcher,
        clock: HostClock,
        hooks: DiskHooks,
    ) -> None:
        self._directory = directory / DISKS
        self._config, self._launcher, self._clock, self._hooks = config, launcher, clock, hooks
        self._disks: dict[str, Disk] = {}
        self._nursery: trio.Nursery | None = None
        # Disks whose configuration cannot be read, and why.
        self.broken: dict[str, str] = {}

    # -------------------------------------------------------------------------------------- mapping

    def __getitem__(self, name: str) -> Disk:
        """A disk by its name.

        :raises NotFound: there is none; says which there are.
        """
        disk = self._disks.get(name)
        if disk is None:
            if name in self.broken:
                raise Conflict(f"{name} is not usable: {self.broken[name]}")
            there = f"there are: {', '.join(sorted(self._disks))}" if self._disks else "none is"
            raise NotFound(f"no disk {name[:80]!r} is protected; {there}")
        return disk

    def get(self, name: str, default: Any = None) -> Any:
        """A disk by its name, if there is one."""
        return self._disks.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._disks))

    def __len__(self) -> int:
        return len(self._disks)

    def __contains__(self, name: object) -> bool:
        return name in self._disks

    # ----------------------------------------------------------------------------------------- life

    def load(self) -> None:
        """Reads the configuration of all disks, and finishes removals that were interrupted."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in sorted(self._directory.iterdir()):
            try:
                if removal.is_marked(directory):
                    log.warning("%s is being removed: that is finished now", directory.name)
                    removal.finish(directory)
                elif (directory / DISK_FILE).exists():
                    self._load(directory)
            except (CdpError, OSError) as error:
                log.error("%s is not served: %s", directory.name, error)
                self.broken[directory.name] = str(error)

    def _load(self, directory: Path) -> None:
        config = load_disk(directory)
        if config.name != directory.name:
            raise InvalidInput(
                f"{directory / DISK_FILE} names {config.name!r}: give the directory that name"
            )
        self._disks[config.name] = self._make(config, directory)

    def _make(self, config: DiskConfig, directory: Path) -> Disk:
        return Disk(
            config,
            directory,
            launcher=self._launcher,
            clock=self._clock,
            hooks=self._hooks,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs all disks until cancelled; `started` at once, see `settle`."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for disk in self._disks.values():
                nursery.start_soon(disk.run)
            task_status.started()
            await trio.sleep_forever()

    async def settle(self) -> None:
        """Waits until each disk is served or has said why not."""
        async with trio.open_nursery() as nursery:
            for disk in self._disks.values():
                nursery.start_soon(disk.settle)

    async def stop(self) -> None:
        """Stops all disks cleanly: everything is applied."""
        async with trio.open_nursery() as nursery:
            for disk in self._disks.values():
                nursery.start_soon(disk.stop)

    def forget(self, disk: Disk) -> None:
        """A disk is no longer one of ours; its tasks end."""
        disk.ended.set()
        del self._disks[disk.name]

    # --------------------------------------------------------------------------------------- adding

    async def add(self, request: AddRequest) -> Disk:
        """Protects a disk, at once.

        :raises CdpError: it is not possible; nothing is left behind then.
        """
        assert self._nursery is not None, "a disk is added before the registry runs"
        check_name(request.name)
        if request.name in self._disks or request.name in self.broken:
            raise Conflict(f"there is a disk {request.name!r} already: choose another name")
        directory = self._directory / request.name
        created: list[Path] = []
        try:
            config = self._prepare(request, directory, created)
            save_disk(directory, config)
        except BaseException:
            _remove_created(created)
            raise
        disk = self._disks[request.name] = self._make(config, directory)
        await self._nursery.start(disk.run)
        with trio.move_on_after(ADD_SECONDS_MAX):
            await disk.recorder.settled.wait()
            if disk.recorder.state is not State.FAILED:
                await disk.recorder.wait_ready()
                await disk.curator.wait_ready()
        if disk.recorder.state is State.FAILED:
            raise Conflict(
                f"{disk.headline()}; remove it with 'cdp disk remove {disk.name}', or correct that"
            )
        return disk

    def _prepare(self, request: AddRequest, directory: Path, created: list[Path]) -> DiskConfig:
        """Checks everything, then creates what is missing; `created` in order of creation."""
        own = request.backing is None
        path = directory / BACKING_FILE if own else _absolute(request.backing, "backing")
        journal = (
            directory / JOURNAL
            if request.journal is None
            else _absolute(request.journal, "journal")
        )
        block_size = request.block_size
        if own:
            if request.size is None:
                raise InvalidInput("say the --size of the disk, or name a --backing that has one")
            block_size = block_size or backing.DEFAULT_BLOCK_BYTES
            size, is_device = request.size, False
        else:
            facts = backing.inspect(path)
            block_size = block_size or facts.block_size
            size, is_device = backing.check_fits(path, facts, request.size), facts.is_device
            self._check_unused(path, facts)
        config = DiskConfig(
            name=request.name,
            uuid=new_uuid(),
            size=size,
            block_size=block_size,
            backing=str(path),
            journal=str(journal),
            backing_is_device=is_device,
            backing_is_own=own,
            **self._policy(request, journal),
        ).checked()
        self._check_journal(journal)
        _make_directory(directory, created)
        if own:
            backing.create(path, size)
            created.append(path)
        else:
            # Whoever has it now would be surprised later.
            os.close(backing.open_exclusively(path))
        for part in (journal, *(journal / name for name in JOURNAL_PARTS)):
            _make_directory(part, created)
        return config

    def _policy(self, request: AddRequest, journal: Path) -> Settings:
        """How it is protected: what was asked for over the daemon's defaults."""
        defaults = self._config.defaults
        values = parse_settings(
            {
                "window": defaults.window,
                "overflow": defaults.overflow,
                "tail": defaults.tail,
                "sync-age": defaults.sync_age,
                "segment": defaults.segment,
                "after-loss": defaults.after_loss,
                "scrub-interval": defaults.scrub_interval,
                "scrub-rate": defaults.scrub_rate,
                **({"journal-limit": defaults.journal_limit} if defaults.journal_limit else {}),
            }
        )
        values |= request.settings or {}
        if request.segment_bytes is not None:
            values["segment_bytes"] = request.segment_bytes
        if "journal_limit" not in values:
            existing = next(path for path in (journal, *journal.parents) if path.exists())
            values["journal_limit"] = default_journal_limit(existing)
        if request.segment_bytes is None:
            fitting = int(values["journal_limit"]) // SEGMENTS_MIN // MIB * MIB
            segment = min(int(values["segment_bytes"]), max(SEGMENT_BYTES_MIN, fitting))
            values["segment_bytes"] = segment
        return values

    def _check_unused(self, path: Path, facts: backing.BackingFacts) -> None:
        for other in self._disks.values():
            try:
                theirs = backing.inspect(Path(other.config.backing))
            except InvalidInput:
                continue
            if theirs.identity == facts.identity:
                raise Conflict(
                    f"{path} is the backing of {other.name} already: name another --backing"
                )

    def _check_journal(self, journal: Path) -> None:
        real = Path(os.path.realpath(journal))
        for other in self._disks.values():
            theirs = Path(os.path.realpath(other.config.journal))
            if theirs == real or theirs in real.parents or real in theirs.parents:
                raise Conflict(
                    f"{journal} holds the journal of {other.name}: name another --journal"
                )
        if journal.exists() and not journal.is_dir():
            raise Conflict(f"{journal} is no directory: a journal needs one of its own")
        if journal.exists() and any(journal.iterdir()):
            raise Conflict(
                f"{journal} is not empty: a journal needs a directory of its own; if one was left "
                "there by an earlier disk, delete it first"
            )


def _absolute(path: str | None, what: str) -> Path:
    assert path is not None
    if not path.startswith("/") or "\0" in path:
        raise InvalidInput(f"the path of the {what} must be absolute, {path!r} is not")
    return Path(os.path.normpath(path))


def _make_directory(path: Path, created: list[Path]) -> None:
    """Creates a directory and those above it, durably."""
    missing = [part for part in (path, *path.parents) if not part.exists()]
    for part in reversed(missing):
        try:
            part.mkdir(mode=0o700)
        except OSError as error:
            raise InvalidInput(f"{part} cannot be created: {error.strerror}") from error
        created.append(part)
        sync_directory(part.parent)


def _remove_created(created: list[Path]) -> None:
    """The other way round: only what was created, and only while it is empty."""
    for path in reversed(created):
        try:
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()
        except OSError as error:
            log.warning("%s is left behind: %s", path, error.strerror)
