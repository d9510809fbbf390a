"""The curator's calls, and its loop: one step of the engine after the other, commands in between.

Two locks. `steps` (fair) is held by each step of the engine and by commands that change what it
works on; a command waits for one step at most. Questions about points take none of it
(`cdp.curator.points`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import trio

from cdp.child import Child, wait_for_recorder
from cdp.curator.engine import Engine
from cdp.curator.points import Points
from cdp.curator.scrubbing import Pass, Scrubbing
from cdp.curator.start import ForeignWrite, check_backing, open_catalog, open_engine
from cdp.rpc import Call, Reply
from journal import reserve
from journal.errors import Busy, Conflict, Corruption, InvalidInput, JournalFull
from journal.frontier import Frontier
from replay.work import Flight

log = logging.getLogger(__name__)

IDLE_SECONDS: Final = 0.02  # between looks at the frontier when nothing is to be done
PROGRESS_NS: Final = 100_000_000
HELD_SECONDS: Final = 0.05  # in which a recorder notices that it is held
SPACE_SECONDS: Final = 1.0  # between looks for space while nothing else can be done
DRAIN_SECONDS: Final = 5.0  # that a drain waits for space, which may be made just now
T = TypeVar("T")


def beside() -> Callable[[Callable[[], None]], Flight]:
    """Begins syncs in a thread of their own, one after the other."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="sync").submit


class Service:
    """Handlers of the curator; see the module.

    It answers from the start: ``starting`` until the recorder has come up and the engine is made,
    then ``ready``; ``failed`` with a reason while somebody must decide about the backing.
    """

    def __init__(self, child: Child) -> None:
        self._child = child
        self._open: tuple[Engine, Points] | None = None
        self._clock: list[tuple[int, int]] = []
        self._accepted = trio.Event()
        self._give_up_history = False
        self._state, self._reason = "starting", "waiting for the recorder"
        self.scrubbing = Scrubbing(child.directory, child.config)
        self.steps = trio.Lock()
        self.stopping = trio.Event()  # `stop` was called
        self.stopped = trio.Event()  # and has done its work

    @property
    def _engine(self) -> Engine:
        if self._open is None:
            raise Busy(f"this disk's curator is not ready: {self._reason}")
        return self._open[0]

    @property
    def _points(self) -> Points:
        if self._open is None:
            raise Busy(f"this disk's curator is not ready: {self._reason}")
        return self._open[1]

    def handlers(self) -> dict[str, Any]:
        """By method name."""
        return {
            "hello": self.hello, "status": self.status, "resolve": self.resolve,
            "bookmarks": self.bookmarks, "unbookmark": self.unbookmark, "pin": self.pin,
            "unpin": self.unpin, "pins": self.pins, "set": self.set, "drain": self.drain,
            "release_masked": self.release_masked, "timeline": self.timeline,
            "points": self.points, "scrub": self.scrub, "scrub_status": self.scrub_status,
            "scrub_stop": self.scrub_stop, "note_clock": self.note_clock,
            "forget_history": self.forget_history, "accept_backing": self.accept_backing,
            "stop": self.stop,
        }  # fmt: skip

    # ----------------------------------------------------------------------------------- the loop
    async def run(self) -> None:
        """Start and work until `stop` was called; a failure ends the process, the next recovers."""
        frontier = await wait_for_recorder(self._child, read_only=False)
        self._reason = "recovering the undo log and reading the index"
        catalog = await self._with_space(frontier, lambda: open_catalog(self._child))
        if catalog is None:
            return
        try:
            await trio.to_thread.run_sync(check_backing, self._child, catalog)
        except ForeignWrite as error:
            log.error("%s", error)
            self._state, self._reason = "failed", str(error)
            await self._accepted.wait()
            if self.stopping.is_set():
                return
        opened = await self._with_space(
            frontier, lambda: open_engine(self._child, frontier, catalog, launch=beside())
        )
        if opened is None:
            return
        engine, points = opened
        if self._give_up_history:
            await trio.to_thread.run_sync(engine.forget_history)
        points.set_clock(self._clock)
        self._open = engine, points
        self._state, self._reason = "ready", ""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.scrubbing.run, self)
            await self._step_on(engine)
            nursery.cancel_scope.cancel()

    async def _step_on(self, engine: Engine) -> None:
        while not self.stopping.is_set():
            async with self.steps:
                if self.stopping.is_set():
                    break
                busy = await trio.to_thread.run_sync(engine.step, self._child.stamp())
            if not busy:
                with trio.move_on_after(IDLE_SECONDS):
                    await self.stopping.wait()

    async def _with_space(self, frontier: Frontier, work: Callable[[], T]) -> T | None:
        """Something that needs a little space: the reserve's, or what somebody makes meanwhile.

        None: `stop` was called before there was any.
        """
        while not self.stopping.is_set():
            try:
                return await trio.to_thread.run_sync(work)
            except JournalFull as error:
                if self._reason != str(error):
                    log.error("%s", error)
                self._reason = str(error)
            # What becomes free is not for the recorder: let it see that first.
            frontier.redo_bytes_max = max(1, frontier.redo_bytes)
            with trio.move_on_after(HELD_SECONDS):
                await self.stopping.wait()
            storage = self._child.storage()
            if not await trio.to_thread.run_sync(reserve.release, storage):
                with trio.move_on_after(SPACE_SECONDS):
                    await self.stopping.wait()
        return None

    async def _locked(self, work: Callable[[], T]) -> T:
        async with self.steps:
            return await trio.to_thread.run_sync(work)

    # -------------------------------------------------------------------------------------- calls
    async def hello(self, _params: dict[str, Any], _fds: list[int], _call: Call) -> Reply:
        """Who this is, and the backing's descriptor for a supervisor that adopts it."""
        return Reply(
            {"role": "curator", "pid": os.getpid(), "uuid": self._child.config.uuid,
             "protocol": 1, "state": self._state, "reason": self._reason},
            [self._child.backing_fd],
        )  # fmt: skip

    async def accept_backing(
        self, params: dict[str, Any], _fds: list[int], _call: Call
    ) -> dict[str, Any]:
        """Go on although the backing differs: ``unchanged`` states that nobody wrote to it."""
        if self._state != "failed":
            raise Conflict("nothing has to be decided about this disk's backing")
        self._give_up_history = not params.get("unchanged", False)
        self._accepted.set()
        return {}

    async def status(self, _params: dict[str, Any], _fds: list[int], _call: Call) -> dict[str, Any]:
        """Numbers for `cdp status` and metrics; never waits for a step."""
        numbers = await trio.to_thread.run_sync(self._points.status)
        return {**numbers, "scrub": self.scrubbing.status()}

    async def resolve(self, params: dict[str, Any], _fds: list[int], _call: Call) -> dict[str, Any]:
        """What a SPEC or a ``stamp`` means: ``{"seq", "stamp", "wall_ns", "size"}``."""
        points = self._points
        if params.get("stamp") is not None:
            return await trio.to_thread.run_sync(points.resolve_stamp, int(params["stamp"]))
        return await trio.to_thread.run_sync(
            lambda: points.resolve(
                str(params["spec"]), now_ns=int(params["now_ns"]), zone=params.get("zone")
            )
        )

    async def pins(self, _params: dict[str, Any], _fds: list[int], _call: Call) -> dict[str, Any]:
        """All pins."""
        return self._points.pins()

    async def bookmarks(
        self, _params: dict[str, Any], _fds: list[int], _call: Call
    ) -> dict[str, Any]:
        """All bookmarks."""
        return await trio.to_thread.run_sync(self._points.bookmarks)

    async def unbookmark(
        self, params: dict[str, Any], _fds: list[int], _call: Call
    ) -> dict[str, Any]:
        """Remove a bookmark."""
        return await trio.to_thread.run_sync(self._points.unbookmark, str(params["label"]))

    async def pin(self, params: dict[str, Any], _fds: list[int], _call: Call) -> dict[str, Any]:
        """Keep a point openable; confirmed when it is durable."""
        return await trio.to_thread.run_sync(
            lambda: self._points.pin(
                str(params["id"]), int(params["seq"]), owner=str(params.get("owner", "")),
                opened_ns=self._child.stamp(), max_age_s=float(params.get("max_age_seconds") or 0),
            )
        )  # fmt: skip

    async def unpin(self, params: dict[str, Any], _fds: list[int], _call: Call) -> dict[str, Any]:
        """Let go of a point."""
        return await trio.to_thread.run_sync(self._points.unpin, str(params["id"]))

    async def set(self, params: dict[str, Any], _fds: list[int], _call: Call) -> dict[str, Any]:
        """Change the policy; it counts from the next step on."""
        policy = self._engine.policy
        if "window_seconds" in params:
            seconds = params["window_seconds"]
            policy.window_ns = None if seconds is None else int(float(seconds) * 1e9)
        if "journal_limit" in params:
            policy.journal_limit = int(params["journal_limit"])
        if "tail_bytes" in params:
            policy.tail_bytes = int(params["tail_bytes"])
        if "overflow" in params:
            policy.overflow = str(params["overflow"])
        if params.keys() & {"scrub_interval_seconds", "scrub_rate"}:
            scrubbing = self.scrubbing
            interval = params.get("scrub_interval_seconds", scrubbing.interval_seconds)
            await scrubbing.set(interval, params.get("scrub_rate", scrubbing.rate))
        return {}

    async def drain(self, params: dict[str, Any], _fds: list[int], call: Call) -> dict[str, Any]:
        """Apply everything durable now (or up to ``upto``), synced."""
        engine = self._engine
        target = int(params.get("upto") or engine.frontier.durable)
        start, until = engine.applier.applied, trio.current_time() + DRAIN_SECONDS
        await self._locked(engine.retry)  # what held apply before may be over
        while not await self._locked(lambda: engine.drain_step(target, self._child.stamp())):
            if engine.held is not None:
                if not engine.full or trio.current_time() > until:
                    raise InvalidInput(f"apply is held: {engine.held}")
                await trio.sleep(IDLE_SECONDS)
            call.progress(
                {"phase": "applying", "done": max(0, engine.applier.done - start),
                 "total": max(1, target - start), "unit": "records"}
            )  # fmt: skip
        return {"applied": engine.applier.applied}

    async def release_masked(
        self, _params: dict[str, Any], _fds: list[int], call: Call
    ) -> dict[str, Any]:
        """Zero all masked blocks in the backing."""
        done = 0
        while count := await self._locked(self._engine.release_step):
            done += count
            left = await self._locked(self._engine.release_pending)
            call.progress(
                {"phase": "releasing", "done": done, "total": done + left, "unit": "blocks"}
            )
        return {"blocks": done}

    async def timeline(
        self, params: dict[str, Any], _fds: list[int], _call: Call
    ) -> dict[str, Any]:
        """A histogram of writes with bookmarks, gaps and pins."""
        start, end = params.get("from_ns"), params.get("to_ns")
        return await trio.to_thread.run_sync(
            lambda: self._points.timeline_view(
                buckets=int(params.get("buckets") or 60),
                from_ns=None if start is None else int(start),
                to_ns=int(end if end is not None else params["now_ns"]),
            )
        )

    async def points(self, params: dict[str, Any], _fds: list[int], _call: Call) -> dict[str, Any]:
        """Candidate points between two SPECs."""
        return await trio.to_thread.run_sync(
            lambda: self._points.candidates(
                str(params["from"]), str(params["to"]), now_ns=int(params["now_ns"]),
                zone=params.get("zone"), limit=int(params.get("limit") or 200),
            )
        )  # fmt: skip

    # ---------------------------------------------------------------------------------- scrubbing
    async def scrub(self, params: dict[str, Any], _fds: list[int], call: Call) -> dict[str, Any]:
        """Verify every checksum of the journal: begin, and wait for the end if ``wait``."""
        self._engine  # noqa: B018  (refused while there is none)
        rate = params.get("rate")
        await self.scrubbing.start(None if rate is None else int(rate))
        if not params.get("wait", True):
            return {}
        return await self._scrubbed(await self.scrubbing.wait(call.progress))

    async def scrub_status(
        self, _params: dict[str, Any], _fds: list[int], _call: Call
    ) -> dict[str, Any]:
        """How the one that runs goes; what the last one found."""
        status, last = self.scrubbing.status(), self.scrubbing.last
        if last is not None:
            status["last"] |= await self._scrubbed(last)
        return status

    async def scrub_stop(
        self, _params: dict[str, Any], _fds: list[int], _call: Call
    ) -> dict[str, Any]:
        """End the one that runs."""
        self.scrubbing.stop()
        return {}

    async def _scrubbed(self, found: Pass) -> dict[str, Any]:
        points = self._points
        damaged = await trio.to_thread.run_sync(points.with_times, found.damaged)
        return {"checked_bytes": found.bytes, "checked_records": found.records,
                "damaged": damaged, "more": found.more}  # fmt: skip

    async def repair_catalog(self) -> list[Corruption]:
        """See `cdp.curator.scrubbing.Hands`."""
        return await trio.to_thread.run_sync(self._engine.catalog.repair)

    async def drop_runs(self, files: Sequence[str]) -> None:
        """See `cdp.curator.scrubbing.Hands`."""
        if files:
            await self._locked(lambda: self._engine.drop_runs(files))

    async def note_clock(
        self, params: dict[str, Any], _fds: list[int], _call: Call
    ) -> dict[str, Any]:
        """The host's table of (stamp, wall-clock minus stamp)."""
        self._clock = [(int(stamp), int(delta)) for stamp, delta in params["entries"]]
        if self._open is not None:
            self._open[1].set_clock(self._clock)
        return {}

    async def forget_history(
        self, _params: dict[str, Any], _fds: list[int], _call: Call
    ) -> dict[str, Any]:
        """Give up every point before now: after somebody else wrote to the backing."""
        await self._locked(self._engine.forget_history)
        return {"window_start": self._engine.catalog.window_start}

    async def stop(self, params: dict[str, Any], _fds: list[int], call: Call) -> dict[str, Any]:
        """A clean stop: apply all, sync, leave a fingerprint. The recorder has ended before."""
        self.stopping.set()
        self._accepted.set()
        if self._open is None:
            self.stopped.set()
            return {"applied": 0}
        engine = self._engine
        try:
            if params.get("drain", True):
                await self.drain({}, [], call)
            await self._locked(engine.close)
        finally:  # an unclean end is one that the next curator recovers from
            self.stopped.set()
        return {"applied": engine.applier.applied}
