"""The recorder's process: its states, its tasks, its start and its end.

    starting  the redo log is being recovered (in a thread)
    ready     calls are answered; clients are served unless `not_served` names a reason
    failed    it could not be recovered; the process stays, to say why

It ends by `stop` or SIGTERM (cleanly: everything durable, the open segment sealed), or because it
must not go on: poisoned, it exits a moment after it has told everybody, and its successor recovers.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from cdp.nbd.export import Negotiated
from cdp.recorder.connection import Connection
from cdp.recorder.control import Service
from cdp.recorder.engine import now_ns
from cdp.recorder.holds import Holds
from cdp.recorder.loop import Loop
from cdp.recorder.preparing import Preparing
from cdp.recorder.start import Started, start_recorder
from cdp.rpc import RpcServer
from journal import reserve
from journal.errors import CdpError, JournalFull, Poisoned
from journal.format import BLOCK

if TYPE_CHECKING:
    from cdp.config import DiskConfig
    from cdp.recorder.engine import Recorder
    from cdp.recorder.rollback import Rollbacks
    from journal.frontier import Frontier
    from journal.storage import Storage

log = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.2
# An idle disk's watermark is written so long after its last sync (below 1 s, with the tick).
WATERMARK_SECONDS: Final = 0.5
# Clients of a poisoned journal are told so for a moment before the process ends.
POISON_SECONDS: Final = 0.3
# How long a clean stop waits for replies to be taken.
FAREWELL_SECONDS: Final = 3.0
COLLECT_SECONDS: Final = 30.0
# Between threads; the default, 5 ms, is a hundred requests.
SWITCH_SECONDS: Final = 0.0002


class ChildLike(Protocol):
    """What is needed of `cdp.child.Child`."""

    @property
    def config(self) -> DiskConfig:
        """The disk's configuration."""
        ...

    @property
    def directory(self) -> Path:
        """The disk's directory."""
        ...

    @property
    def backing_fd(self) -> int:
        """The backing's descriptor."""
        ...

    @property
    def clock_offset_ns(self) -> int:
        """What turns CLOCK_BOOTTIME into stamps."""
        ...

    @property
    def socket(self) -> Path:
        """Where calls are answered."""
        ...

    def storage(self) -> Storage:
        """The journal directory."""
        ...

    def available_bytes(self) -> int:
        """What its file system has left for us."""
        ...

    def frontier(self, *, create: bool, read_only: bool = False) -> Frontier:
        """The disk's shared page."""
        ...


class Process:
    """One recorder; see the module."""

    def __init__(self, child: ChildLike, *, own_process: bool = True) -> None:
        self.child = child
        self._own_process = own_process  # the garbage collector is ours, too
        self.config = child.config
        self.backing = child.backing_fd
        self.storage = child.storage()
        self.state = "starting"
        self.reason: str | None = "the redo log is being recovered"
        self.started: Started | None = None
        self.sync_age = child.config.sync_age_seconds
        self.preparing = False
        self.gap = False
        self.settled = trio.Event()  # no longer starting
        self.stopping = trio.Event()
        self.ended = trio.Event()
        self.exit_code = 0
        self.holds = Holds(child.directory)
        self._rpc = RpcServer()
        self._loop: Loop | None = None
        self._notify_early = False
        self._frontier: Frontier | None = None
        self._poisoned = trio.Event()
        self._damage: str | None = None

    @property
    def recorder(self) -> Recorder:
        """Once started."""
        assert self.started is not None
        return self.started.recorder

    @property
    def rollbacks(self) -> Rollbacks:
        """Once started."""
        assert self.started is not None
        return self.started.rollbacks

    @property
    def loop(self) -> Loop:
        """Once started."""
        assert self._loop is not None
        return self._loop

    def not_served(self) -> str | None:
        """Why clients are not served; None when they are."""
        if self.started is None:
            return self.reason
        if self.recorder.poisoned is not None:
            return str(self.recorder.poisoned)
        if self.stopping.is_set():
            return "it is being stopped"
        if self.rollbacks.trouble is not None:
            return f"it is being rolled back, and that waits: {self.rollbacks.trouble}"
        if self.preparing or not self.rollbacks.serving:
            return "it is being rolled back: served again when that is applied"
        if self.gap:
            return "its backing is in the hands of others: take it back first"
        return self._damage or self.holds.reason

    def attach(
        self, sock: socket.socket, negotiated: Negotiated, *, leftover: bytes = b"", peer: str = ""
    ) -> Connection:
        """Serve a client that has been negotiated with; the socket is the connection's from now."""
        self.holds.serves(sock)
        connection = Connection(sock, negotiated, leftover=leftover, peer=peer)
        connection.resize(self.recorder.size)
        self.loop.attach(connection)
        return connection

    def stop(self) -> None:
        """Begin a clean end."""
        self.stopping.set()

    # ------------------------------------------------------------------------------------- tasks
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """From start to end."""
        async with trio.open_nursery() as nursery:
            service = Service(self)
            await nursery.start(self._rpc.serve, self.child.socket, service.handlers())
            task_status.started()
            nursery.start_soon(self._watch_signals)
            if await self._start():
                preparing = Preparing(self.recorder, self.child.available_bytes)
                async with trio.open_nursery() as work:
                    work.start_soon(self.loop.run)
                    work.start_soon(self._tick)
                    work.start_soon(self._watch_poison)
                    work.start_soon(preparing.run)
                    await self.stopping.wait()
                    await self._say_farewell()
                    self.loop.stop()
                    preparing.stop()
                    work.cancel_scope.cancel()
                await trio.to_thread.run_sync(self._close)
            else:
                await self.stopping.wait()
            self.ended.set()
            await trio.sleep(0.05)  # lets the answer to `stop` leave
            nursery.cancel_scope.cancel()

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                self.stop()

    async def _start(self) -> bool:
        """Recover; False when it failed for good, or was stopped meanwhile."""

        def notify() -> None:
            if self._loop is not None:
                self._loop.notify()

        while not self.stopping.is_set():
            try:
                frontier = self._frontier = self.child.frontier(create=True)
                started = await trio.to_thread.run_sync(
                    start_recorder, self.config, self.storage, self._frontier, self.backing,
                    self.child.clock_offset_ns, notify,
                )  # fmt: skip
                break
            except JournalFull as error:
                # Space may come back; nobody else will say so.
                if self.reason != str(error):
                    log.error("%s", error)
                self.reason = str(error)
                frontier.close()
                if reserve.release(self.storage):
                    continue
                with trio.move_on_after(1.0):
                    await self.stopping.wait()
            except CdpError as error:
                self.state, self.reason = "failed", str(error)
                self.settled.set()
                log.critical("%s cannot be started: %s", self.config.name, error)
                return False
        else:
            return False
        self._take_up(started)
        return True

    def _take_up(self, started: Started) -> None:
        """Recovery is through: decide whether the disk may be offered, and begin."""
        recorder = started.recorder
        recorder.on_poison = self._on_poison
        self.holds.judge(self.config.after_loss, started.lost, rebooted=started.rebooted)
        damaged = [each for each in started.corruptions if each.last_seq > recorder.tail.applied]
        if damaged:
            self._damage = (
                f"{len(damaged)} damaged places hold records that are not applied, so the newest "
                f"content is not known: {damaged[0]}"
            )
        self._loop = Loop(recorder)
        self.started = started
        self.state, self.reason = "ready", None
        self.settled.set()
        if self._own_process:
            # What the loop waits, after a system call, for a thread that runs Python meanwhile.
            sys.setswitchinterval(SWITCH_SECONDS)
            # A full collection stops everything for 20 ms; what is here now stays anyway.
            gc.collect()
            gc.freeze()
            gc.disable()
        if started.rollbacks.open is not None:
            log.warning("%s waits for the end of a rollback", self.config.name)

    def _on_poison(self, error: Poisoned) -> None:
        self._rpc.notify("poisoned", reason=str(error))
        self._poisoned.set()

    async def _watch_poison(self) -> None:
        await self._poisoned.wait()
        self.exit_code = 1
        await trio.sleep(POISON_SECONDS)
        self.stop()

    async def _say_farewell(self) -> None:
        """Hear nobody any more; let replies that are due go out."""
        self.loop.hear_nobody()
        if self.recorder.poisoned is None:
            event = trio.Event()
            self.recorder.wait_event(self.recorder.writer.last_seq, event)
            await event.wait()
        with trio.move_on_after(FAREWELL_SECONDS):
            while self.loop.connections:  # noqa: ASYNC110
                await trio.sleep(0.005)

    def _close(self) -> None:
        """The end, in a thread: what is appended becomes durable, the segment sealed."""
        recorder = self.recorder
        recorder.readers.stop()
        recorder.syncer.stop()
        try:
            recorder.writer.close()
        except Poisoned as error:
            log.critical("%s", error)
            self.exit_code = 1
        else:
            if recorder.poisoned is None:
                recorder.publish_durable()
                self.holds.stopped_cleanly()

    # ------------------------------------------------------------------------------------- ticker
    async def _tick(self) -> None:
        """What has to be done now and then, whether or not there are clients."""
        collected_at = trio.current_time()
        seen_active = 0
        while True:
            await trio.sleep(min(TICK_SECONDS, self.sync_age / 4))
            recorder = self.recorder
            if recorder.poisoned is not None:
                continue
            if recorder.advance() or recorder.no_space.since or recorder.no_space.holds:
                self.loop.notify()
            recorder.ceiling = recorder.frontier.stamp_ceiling or 1 << 64
            recorder.window_start = recorder.frontier.window_start
            now = now_ns(time.CLOCK_BOOTTIME)
            try:
                self._care_for_age()
                idle = now - recorder.active_at > WATERMARK_SECONDS * 1e9
                if idle and not recorder.no_space.holds:
                    self._care_for_watermark()
            except (JournalFull, Poisoned) as error:
                if isinstance(error, Poisoned):
                    recorder.poison(error)
                continue
            for connection in self.loop.connections.values():
                connection.shrink()
            quiet = seen_active == recorder.active_at
            seen_active = recorder.active_at
            if self._own_process and quiet and trio.current_time() - collected_at > COLLECT_SECONDS:
                gc.collect()
                collected_at = trio.current_time()

    def _care_for_age(self) -> None:
        """Sync before the oldest write that is not durable becomes too old."""
        recorder = self.recorder
        oldest = recorder.writer.oldest_unsynced_stamp
        if oldest and recorder.age_ns(oldest) >= self.sync_age * 0.7e9:
            recorder.syncer.want(recorder.writer.last_seq)

    def _care_for_watermark(self) -> None:
        """When idle: say in the log itself what is durable."""
        recorder = self.recorder
        writer = recorder.writer
        if writer.durable == writer.last_seq and recorder.watermark < writer.durable:
            recorder.append_watermark()

    # ------------------------------------------------------------------------------------- status
    def status(self) -> dict[str, Any]:
        """See `Service.status`."""
        if self.started is None:
            return {"served": False, "reason": self.reason, "state": self.state}
        recorder = self.recorder
        statistics, writer, tail = recorder.statistics, recorder.writer, recorder.tail
        unsynced = writer.last_seq > writer.durable
        oldest = writer.oldest_unsynced_stamp
        lag = recorder.age_ns(oldest) / 1e9 if oldest else 0.0
        reason = self.not_served()
        throttled = any(
            each.stalled or each.held or each.resume_at for each in self.loop.connections.values()
        )
        return {
            "state": self.state,
            "served": reason is None,
            "reason": reason,
            "trouble": recorder.no_space.why if recorder.no_space.since else None,
            "held_seconds": recorder.no_space.seconds,
            "size": recorder.size,
            "last_seq": writer.last_seq,
            "durable": writer.durable,
            "applied": recorder.frontier.applied,
            "segment": writer.segment,
            "lag_bytes": writer.unsynced_bytes if unsynced else 0,
            "lag_seconds": lag,
            "tail_bytes": tail.work,
            "tail_bytes_max": tail.bound,
            "tail_bytes_peak": tail.peak_work,
            "tail_records": max(0, writer.last_seq - recorder.frontier.applied),
            "connections": len(self.loop.connections),
            "reads": statistics.reads,
            "read_bytes": statistics.read_bytes,
            "reads_waited": statistics.reads_waited,
            "writes": statistics.plain_writes + statistics.other_writes,
            "written_bytes": statistics.plain_writes * BLOCK + statistics.other_written_bytes,
            "partial_writes": statistics.partial_writes,
            "flushes": statistics.flushes,
            "trims": statistics.trims,
            "zeroes": statistics.zeroes,
            "syncs": statistics.syncs,
            "failed": statistics.failed,
            "discarded_requests": statistics.discarded_requests,
            "discarded_connections": statistics.discarded_connections,
            "connections_total": statistics.connections_total,
            "corruptions": statistics.damaged_reads,
            "fsync_buckets": statistics.sync_latency.snapshot(),
            "write_buckets": statistics.write_latency.snapshot(),
            "poisoned": recorder.poisoned is not None,
            "throttled": throttled,
            "throttled_seconds": statistics.throttled_ns / 1e9,
            "protocol_errors": {
                **statistics.protocol_errors, "refused": statistics.refused
            },
        }  # fmt: skip


@contextlib.asynccontextmanager
async def running(process: Process) -> AsyncIterator[Process]:
    """A process as tasks of the caller's; stopped cleanly at the end (for tests and benches)."""
    async with trio.open_nursery() as nursery:
        await nursery.start(process.run)
        try:
            yield process
        finally:
            process.stop()
            with trio.CancelScope(shield=True):
                await process.ended.wait()
