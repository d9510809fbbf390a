"""Rolling back one disk or several: all of them, or none.

    resolve     every disk's seq for the same SPEC, each pinned durably
    plan        by the viewers, while the disks are served
    prepare     each recorder stops serving, appends begin and refs, makes them durable
    intent      one file, durable: from here on it will happen
    commit      each recorder
    (remove the intent, wait until served, unpin)

A recorder that comes up with a prepared rollback asks, by its hello, and waits for the word: commit
if there is an intent, abort otherwise. So it does not matter who dies when. What is in the intent
file stays there until every disk of it is known to have committed.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio
from msgspec import Struct

from cdp.clock import HostClock
from cdp.config import read_json, sync_directory, write_json
from cdp.rpc import ConnectionLost, OnProgress, close_all
from cdp.supervisor.children import Child, State
from cdp.supervisor.disk import Disk
from cdp.supervisor.points import Point, one_instant, resolve
from cdp.supervisor.views import Views
from cdp.units import format_size
from journal.errors import Busy, CdpError, Conflict, InvalidInput

log = logging.getLogger(__name__)

INTENTS: Final = "rollbacks"
OWNER: Final = "rollback"
# A recorder that has not made its refs durable by then is not going to soon: all disks go on.
PREPARE_SECONDS_MAX: Final = 300.0
ABORT_SECONDS_MAX: Final = 60.0
# After that long the caller hears that the rest follows by itself.
COMMIT_SECONDS_MAX: Final = 60.0
# For the estimate that a dry run shows: what applying refs achieves on an ordinary disk.
APPLY_BYTES_PER_SECOND: Final = 150_000_000
APPLY_SECONDS_MIN: Final = 0.5


class Intent(Struct, frozen=True):
    """A rollback that was decided: the disks that prepared it."""

    id: str
    disks: list[str]


@dataclass(slots=True)
class _Part:
    """One disk's share of a rollback."""

    disk: Disk
    point: Point
    tip_seq: int = 0
    extents: int = 0
    bytes: int = 0
    plan_fd: int = -1
    begin_seq: int = 0
    commit_seq: int = 0


@dataclass(slots=True)
class _Decided:
    """An intent, and the disks not known to have committed."""

    path: Path
    pending: set[str]
    commit_seqs: dict[str, int] = field(default_factory=dict)
    changed: trio.Event = field(default_factory=trio.Event)


class Rollbacks:
    """Orchestration, and the answer to recorders that ask."""

    def __init__(
        self, directory: Path, disks: Mapping[str, Disk], views: Views, clock: HostClock
    ) -> None:
        self._directory = directory / INTENTS
        self._disks, self._views, self._clock = disks, views, clock
        self._preparing: set[str] = set()
        self._decided: dict[str, _Decided] = {}

    def load(self) -> None:
        """Reads the intents of an earlier supervisor. When the disks are known, none asked yet.

        :raises InvalidInput: one cannot be read: what to do is not known then.
        """
        self._directory.mkdir(mode=0o700, exist_ok=True)
        for path in sorted(self._directory.glob("*.json")):
            intent = read_json(path, Intent)
            log.warning("rollback %s of %s will be finished", intent.id, ", ".join(intent.disks))
            decided = _Decided(path, set(intent.disks))
            self._decided[intent.id] = decided
            for name in decided.pending - self._disks.keys():
                self._committed(decided, name, 0)

    # --------------------------------------------------------------------------------- recorders

    async def recorder_greeted(self, child: Child, hello: dict[str, Any]) -> None:
        """A recorder came up: one that has prepared a rollback is told how it ends."""
        waiting = hello.get("open_rollback")
        waits_for = str(waiting["id"]) if waiting else None
        if waits_for is None:
            if hello.get("state") == State.READY:
                self._assume_committed(child.disk)
            return
        if waits_for in self._preparing:
            return
        decided = self._decided.get(waits_for)
        if decided is None:
            log.warning("rollback %s of %s is aborted: it was not decided", waits_for, child.disk)
            await child.call_early("rollback_abort", {"id": waits_for})
            return
        log.warning("rollback %s of %s is committed: it was decided", waits_for, child.disk)
        reply = await child.call_early("rollback_commit", {"id": waits_for})
        if reply is not None:
            self._committed(decided, child.disk, int(reply.result["commit_seq"]))

    def _assume_committed(self, disk: str) -> None:
        """Its recorder has nothing open: what was decided has happened."""
        for decided in list(self._decided.values()):
            if disk in decided.pending:
                self._committed(decided, disk, 0)

    def _committed(self, decided: _Decided, disk: str, seq: int) -> None:
        decided.pending.discard(disk)
        if seq:
            decided.commit_seqs[disk] = seq
        if not decided.pending:
            decided.path.unlink(missing_ok=True)
            sync_directory(self._directory)
            self._decided.pop(decided.path.stem, None)
        decided.changed.set()
        decided.changed = trio.Event()

    # -------------------------------------------------------------------------------- orchestration

    async def run(
        self,
        names: list[str],
        spec: str,
        *,
        dry_run: bool,
        disconnect: bool,
        on_progress: OnProgress | None = None,
    ) -> dict[str, Any]:
        """Plans and does it; with `dry_run` only says what would be done.

        :raises CdpError: it is not possible; then nothing has changed. Conflict, once it is
            decided, if a disk of it follows later.
        """
        if not names or len(set(names)) != len(names):
            raise InvalidInput("name each disk once")
        disks = [self._disks[name] for name in names]
        identity = secrets.token_hex(8)
        with contextlib.ExitStack() as stack:
            for disk in disks:
                disk.check_in_use()
                stack.enter_context(disk.exclusive("planning a rollback"))
            if not dry_run:
                await self._refuse_clients(disks, disconnect)
            parts: list[_Part] = []
            pins = {f"{OWNER}-{identity}"}
            self._views.kept_pins |= pins
            try:
                await self._plan(parts, disks, spec, identity, on_progress)
                if dry_run:
                    return {"plans": [_plan(part) for part in parts]}
                for disk in disks:
                    disk.operation = "rolling back"
                await self._execute(parts, identity, disconnect, on_progress)
                return {"rollbacks": [_result(part) for part in parts]}
            finally:
                close_all([part.plan_fd for part in parts if part.plan_fd >= 0])
                self._views.kept_pins -= pins
                with trio.CancelScope(shield=True), trio.move_on_after(ABORT_SECONDS_MAX):
                    await self._unpin(parts, identity)

    async def _refuse_clients(self, disks: list[Disk], disconnect: bool) -> None:
        """Before the work of planning; the recorders decide in the end."""
        for disk in disks:
            status = (await disk.recorder.call("status", again=True)).result
            if status.get("connections") and not disconnect:
                raise Conflict(
                    f"{disk.name} is in use by {status['connections']} connection(s): stop what "
                    "uses it, or say --disconnect"
                )

    async def _plan(
        self,
        parts: list[_Part],
        disks: list[Disk],
        spec: str,
        identity: str,
        on_progress: OnProgress | None,
    ) -> None:
        """Fills `parts`: one instant for all disks, pinned, then what differs."""
        meant = one_instant(spec, self._clock.wall_now(), disks)
        for disk in disks:
            point = await resolve(disk, meant)
            if point.size > disk.config.size:
                # Its end would be missing; a smaller one then is no harm, the rest stays.
                raise Conflict(
                    f"{disk.name} had {format_size(point.size)} then and has "
                    f"{format_size(disk.config.size)} now: 'cdp disk resize {disk.name} "
                    f"{point.size}' first, or restore that point to a file"
                )
            parts.append(_Part(disk, point))
        for part in parts:
            pin = {"id": f"{OWNER}-{identity}", "seq": part.point.seq, "owner": OWNER}
            await part.disk.curator.call("pin", pin, again=True)
        for part in parts:
            part.tip_seq, _ = await part.disk.sync()
            viewer = await part.disk.ready_viewer()
            reply = await viewer.call(
                "plan_rollback",
                {"to_seq": part.point.seq, "tip_seq": part.tip_seq},
                on_progress=on_progress,
                again=True,
            )
            if len(reply.fds) != 1:
                close_all(reply.fds)
                raise CdpError(f"the viewer of {part.disk.name} sent no plan: versions differ")
            part.plan_fd = reply.fds[0]
            part.extents, part.bytes = int(reply.result["extents"]), int(reply.result["bytes"])

    async def _execute(
        self,
        parts: list[_Part],
        identity: str,
        disconnect: bool,
        on_progress: OnProgress | None,
    ) -> None:
        names = [part.disk.name for part in parts]
        path = self._directory / f"{identity}.json"
        decided = _Decided(path, set(names))
        self._preparing.add(identity)
        try:
            with trio.move_on_after(PREPARE_SECONDS_MAX) as scope:
                async with trio.open_nursery() as nursery:
                    for part in parts:
                        nursery.start_soon(self._prepare, part, identity, names, disconnect)
            if scope.cancelled_caught:
                raise Busy(
                    f"not all of {', '.join(names)} could stop writing within "
                    f"{PREPARE_SECONDS_MAX:.0f} s: nothing was rolled back"
                )
            # The decision. No await from here to the commits.
            self._decided[identity] = decided
            write_json(path, Intent(identity, names))
        except BaseException as error:
            self._decided.pop(identity, None)
            self._preparing.discard(identity)
            with trio.CancelScope(shield=True), trio.move_on_after(ABORT_SECONDS_MAX):
                await self._abort(parts, identity, path)
            if isinstance(error, BaseExceptionGroup):
                raise _first(error) from error
            raise
        self._preparing.discard(identity)
        with trio.CancelScope(shield=True):
            await self._commit(parts, identity, decided)
        await self._wait_served(parts, identity, on_progress)

    async def _prepare(
        self, part: _Part, identity: str, names: list[str], disconnect: bool
    ) -> None:
        reply = await part.disk.recorder.call(
            "rollback_prepare",
            {
                "id": identity,
                "to_seq": part.point.seq,
                "tip_seq": part.tip_seq,
                "disconnect": disconnect,
                "disks": names,
            },
            [part.plan_fd],
        )
        part.begin_seq = int(reply.result["begin_seq"])

    async def _abort(self, parts: list[_Part], identity: str, path: Path) -> None:
        """Nothing happens. A recorder that cannot be told now will ask, and hear the same."""
        if path.exists():
            path.unlink()
            sync_directory(self._directory)
        for part in parts:
            try:
                await part.disk.recorder.call("rollback_abort", {"id": identity})
            except CdpError as error:
                log.info("rollback %s of %s: %s", identity, part.disk.name, error)

    async def _commit(self, parts: list[_Part], identity: str, decided: _Decided) -> None:
        async with trio.open_nursery() as nursery:
            for part in parts:
                nursery.start_soon(self._commit_one, part, identity, decided)
        with trio.move_on_after(COMMIT_SECONDS_MAX):
            while decided.pending:
                await decided.changed.wait()
        if decided.pending:
            raise Conflict(
                f"the rollback is decided, and follows on {', '.join(sorted(decided.pending))} as "
                "soon as its recorder answers again: see 'cdp status'"
            )
        for part in parts:
            part.commit_seq = decided.commit_seqs.get(part.disk.name, 0)

    async def _commit_one(self, part: _Part, identity: str, decided: _Decided) -> None:
        try:
            with trio.move_on_after(COMMIT_SECONDS_MAX):
                reply = await part.disk.recorder.call("rollback_commit", {"id": identity})
                self._committed(decided, part.disk.name, int(reply.result["commit_seq"]))
        except CdpError as error:
            # It commits when it is back: the intent is durable, and it will ask.
            log.error("rollback %s of %s: %s", identity, part.disk.name, error)

    async def _wait_served(
        self, parts: list[_Part], identity: str, on_progress: OnProgress | None
    ) -> None:
        for part in parts:
            while True:
                try:
                    await part.disk.recorder.wait_ready()
                    await part.disk.recorder.call(
                        "rollback_wait", {"id": identity}, on_progress=on_progress
                    )
                    break
                except (Busy, ConnectionLost):
                    continue

    async def _unpin(self, parts: list[_Part], identity: str) -> None:
        for part in parts:
            try:
                await part.disk.curator.call("unpin", {"id": f"{OWNER}-{identity}"})
            except CdpError as error:
                log.info("the pin of rollback %s is dropped later: %s", identity, error)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What to tell of several failures: the first one, an administrator's words before others."""
    leaves: list[BaseException] = []

    def collect(error: BaseException) -> None:
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                collect(inner)
        else:
            leaves.append(error)

    collect(group)
    serious = [error for error in leaves if not isinstance(error, CdpError | trio.Cancelled)]
    return group if serious else next((e for e in leaves if isinstance(e, CdpError)), group)


def _plan(part: _Part) -> dict[str, Any]:
    return {
        "disk": part.disk.name,
        "to_seq": part.point.seq,
        "to_time": part.point.time,
        "extents": part.extents,
        "bytes": part.bytes,
        "seconds_estimate": round(APPLY_SECONDS_MIN + part.bytes / APPLY_BYTES_PER_SECOND, 1),
    }


def _result(part: _Part) -> dict[str, Any]:
    return {
        "disk": part.disk.name,
        "to_seq": part.point.seq,
        "to_time": part.point.time,
        "begin_seq": part.begin_seq,
        "commit_seq": part.commit_seq,
        "extents": part.extents,
        "bytes": part.bytes,
        "undo_with": f"seq:{part.begin_seq - 1}",
    }
