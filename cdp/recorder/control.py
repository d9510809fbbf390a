"""The recorder's calls: what the supervisor asks of it. See `cdp.rpc` for how.

Until recovery is through only `hello`, `status` and `stop` are answered. `hello` says `starting`,
`ready` or `failed`; *ready* means that the calls work, not that the disk is served: `served` says
that, and `reason` why not. Reasons are a rollback that is not applied, a gap, a loss that the
administrator must know of first (`offer` ends that), a stop.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import trio

from cdp.nbd.export import Negotiated
from cdp.nbd.wire import (
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_META_BASE_ALLOCATION,
    LocalProtocolError,
)
from cdp.recorder.rollback import changed_since, read_plan
from cdp.rpc import Reply
from journal.errors import Busy, Conflict, InvalidInput
from journal.follower import RedoFollower
from journal.format import BLOCK, Kind

if TYPE_CHECKING:
    from cdp.recorder.process import Process
    from cdp.rpc import Call

Params = dict[str, Any]
Handler = Callable[[Params, list[int], "Call"], Awaitable["dict[str, Any] | Reply | None"]]

EXPORT_FLAGS: Final = (
    NBD_FLAG_HAS_FLAGS
    | NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_SEND_DF
    | NBD_FLAG_CAN_MULTI_CONN
    | NBD_FLAG_SEND_CACHE
    | NBD_FLAG_SEND_FAST_ZERO
)
META_CONTEXTS: Final = (NBD_META_BASE_ALLOCATION,)
WAIT_SECONDS: Final = 0.02
# At its limit a journal has no room for a moment now and then.
HELD_SECONDS_MIN: Final = 1.0
_ALWAYS: Final = frozenset({"hello", "status", "stop"})


class Service:
    """Handlers for one process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._exclusive = trio.Lock()  # rollback, resize and gap, one at a time

    def handlers(self) -> dict[str, Handler]:
        """By method."""
        methods: dict[str, Handler] = {
            "hello": self.hello,
            "status": self.status,
            "export": self.export,
            "attach": self.attach,
            "sync": self.sync,
            "bookmark": self.bookmark,
            "rollback_prepare": self.rollback_prepare,
            "rollback_commit": self.rollback_commit,
            "rollback_abort": self.rollback_abort,
            "rollback_wait": self.rollback_wait,
            "resize": self.resize,
            "gap_begin": self.gap_begin,
            "gap_end": self.gap_end,
            "set": self.set,
            "disconnect": self.disconnect,
            "offer": self.offer,
            "stop": self.stop,
        }
        return {
            name: handler if name in _ALWAYS else self._when_started(handler)
            for name, handler in methods.items()
        }

    def _when_started(self, handler: Handler) -> Handler:
        async def checked(
            params: Params, fds: list[int], call: Call
        ) -> dict[str, Any] | Reply | None:
            if self._process.started is None:
                raise Busy(self._process.reason or "the redo log is being recovered")
            if self._process.recorder.poisoned is not None:
                raise Conflict(str(self._process.recorder.poisoned))
            return await handler(params, fds, call)

        return checked

    # -------------------------------------------------------------------------------------- state
    async def hello(self, _params: Params, _fds: list[int], _call: Call) -> Reply:
        """Who this is, and the backing's descriptor for a supervisor that adopts it."""
        process = self._process
        started = process.started
        answer: dict[str, Any] = {
            "role": "recorder",
            "pid": os.getpid(),
            "uuid": process.config.uuid,
            "protocol": 1,
            "state": process.state,
            "reason": process.reason,
        }
        if started is not None:
            waiting = started.rollbacks.describe()
            if waiting is not None:
                answer["open_rollback"] = waiting
        return Reply(answer, [process.backing])

    async def status(self, _params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """Numbers for `cdp status` and metrics. Never waits."""
        return self._process.status()

    async def export(self, _params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """What the front door offers for this disk."""
        process = self._process
        return {
            "size": process.recorder.size,
            "block_size": process.config.block_size,
            "flags": EXPORT_FLAGS,
            "min_block": 1,
            "preferred_block": BLOCK,
            "meta_contexts": list(META_CONTEXTS),
            "served": process.not_served() is None,
            "reason": process.not_served(),
        }

    # -------------------------------------------------------------------------------- connections
    async def attach(self, params: Params, fds: list[int], _call: Call) -> dict[str, Any]:
        """Serve a connection whose client has been negotiated with."""
        process = self._process
        reason = process.not_served()
        if reason is not None:
            raise Busy(f"{process.config.name} is not served: {reason}")
        if len(fds) != 1:
            raise InvalidInput(f"{len(fds)} descriptors beside attach: it takes one socket")
        try:
            negotiated = Negotiated.from_json(json.dumps(params["negotiated"]))
        except LocalProtocolError as error:
            raise InvalidInput(str(error)) from error
        leftover = base64.b64decode(params.get("leftover") or "")
        sock = socket.socket(fileno=fds.pop())
        try:
            connection = process.attach(
                sock, negotiated, leftover=leftover, peer=str(params.get("peer") or "")
            )
        except BaseException:
            sock.close()
            raise
        return {"number": connection.number}

    async def disconnect(self, _params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """Close all connections; what is in their buffers is not executed."""
        count = len(self._process.loop.connections)
        self._process.loop.close_all()
        return {"connections": count}

    # ------------------------------------------------------------------------------------ records
    async def sync(self, _params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """What was appended before is durable, and no later batch has a stamp up to this one."""
        recorder = self._process.recorder
        stamp = recorder.stamp()
        if recorder.stamps_stand_still:
            raise Conflict("the host's clock has no ceiling above it: start cdpd")
        await self._durable(recorder.writer.last_seq)
        return {"durable": recorder.writer.durable, "stamp": stamp}

    async def bookmark(self, params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """Append a bookmark and make it durable."""
        if not params.get("label"):
            raise InvalidInput("a bookmark needs a label")
        seq, stamp = self._process.recorder.append_control(Kind.BOOKMARK, params)
        await self._durable(seq)
        return {"seq": seq, "stamp": stamp}

    def _expect_space(self) -> None:
        """Whoever waits for space is not cut off for something that will find none, either."""
        name, no_space = self._process.config.name, self._process.recorder.no_space
        why = no_space.why
        if no_space.seconds >= HELD_SECONDS_MIN:
            why = why or f"the journal has no room, and 'cdp status {name}' says why"
        if why is not None:
            raise Conflict(f"writes to {name} wait: {why}")

    async def _durable(self, seq: int) -> None:
        recorder = self._process.recorder
        event = trio.Event()
        recorder.wait_event(seq, event)
        await event.wait()
        if recorder.poisoned is not None:
            raise recorder.poisoned

    # ----------------------------------------------------------------------------------- rollback
    async def rollback_prepare(self, params: Params, fds: list[int], _call: Call) -> dict[str, Any]:
        """Stop serving, append begin and refs, make them durable."""
        process = self._process
        recorder, rollbacks = process.recorder, process.rollbacks
        identity, to_seq = str(params["id"]), int(params["to_seq"])
        self._expect_space()
        if len(fds) != 1:
            raise InvalidInput("a rollback needs one plan")
        plan = read_plan(fds[0], -(-recorder.size // BLOCK))
        async with self._exclusive:
            if not rollbacks.serving:
                raise Conflict(f"{process.config.name}: {process.not_served()}")
            if process.loop.connections and not params.get("disconnect"):
                raise Conflict(
                    f"{process.config.name} is in use by {len(process.loop.connections)} "
                    "connection(s): stop what uses it, or say --disconnect"
                )
            process.preparing = True
            try:
                process.loop.close_all()
                with trio.CancelScope(shield=True):
                    last_seq = recorder.writer.last_seq
                    await self._durable(last_seq)
                    follower = RedoFollower(
                        process.storage, process.config.id_bytes, recorder.frontier
                    )
                    try:
                        remainder = await trio.to_thread.run_sync(
                            changed_since, follower, int(params["tip_seq"]), last_seq
                        )
                    finally:
                        follower.close()
                    prepared = await rollbacks.prepare(
                        identity, to_seq, plan, remainder,
                        [str(name) for name in params.get("disks") or ()],
                    )  # fmt: skip
            finally:
                process.preparing = False
        return {"begin_seq": prepared.begin_seq, "last_seq": prepared.last_seq}

    async def rollback_commit(self, params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """Close a prepared rollback; may be asked for again."""
        seq = 0
        with trio.CancelScope(shield=True):
            seq = await self._process.rollbacks.commit(str(params["id"]))
        return {"commit_seq": seq}

    async def rollback_abort(self, params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """Give a prepared rollback up."""
        with trio.CancelScope(shield=True):
            await self._process.rollbacks.abort(str(params["id"]))
        return {}

    async def rollback_wait(self, _params: Params, _fds: list[int], call: Call) -> dict[str, Any]:
        """Wait until the refs are applied and the disk is served again."""
        process = self._process
        frontier = process.recorder.frontier
        first = frontier.applied
        while not process.rollbacks.serving:
            if process.recorder.poisoned is not None:
                raise Conflict(str(process.recorder.poisoned))
            target = process.rollbacks.unapplied
            call.progress(
                {"phase": "applying", "done": max(0, frontier.applied - first),
                 "total": max(1, target - first), "unit": "records"}
            )  # fmt: skip
            await trio.sleep(WAIT_SECONDS)
        return {"applied": frontier.applied}

    # ------------------------------------------------------------------------- size, gap, settings
    async def resize(self, params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """The disk has another size from this record on; the backing has it already."""
        process, recorder = self._process, self._process.recorder
        size = int(params["size"])
        if size <= 0 or size % process.config.block_size:
            raise InvalidInput(f"{size} bytes is no multiple of {process.config.block_size}")
        async with self._exclusive:
            self._expect_space()
            if not process.rollbacks.serving:
                raise Conflict(f"{process.config.name}: {process.not_served()}")
            seq, stamp = recorder.append_control(Kind.RESIZE, {"size": size})
            recorder.size = size
            for connection in process.loop.connections.values():
                connection.resize(size)
            await self._durable(seq)
        return {"seq": seq, "stamp": stamp}

    async def gap_begin(self, params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """From here on somebody else may write to the backing: nobody is served any more."""
        process, recorder = self._process, self._process.recorder
        async with self._exclusive:
            self._expect_space()
            process.gap = True
            try:
                process.loop.close_all()
                recorder.advance()
                if recorder.overlay.generations:
                    raise Conflict("not everything is applied yet: drain the disk first")
                reason = str(params.get("reason") or "")
                seq, stamp = recorder.append_control(Kind.GAP_BEGIN, {"reason": reason})
                recorder.overlay.forget_all()
                await self._durable(seq)
            except BaseException:
                process.gap = False
                raise
        return {"seq": seq, "stamp": stamp}

    async def gap_end(self, params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """What is written goes through us again; the disk is served."""
        process, recorder = self._process, self._process.recorder
        async with self._exclusive:
            seq, stamp = recorder.append_control(Kind.GAP_END, params)
            recorder.overlay.forget_all()
            await self._durable(seq)
            process.gap = False
        return {"seq": seq, "stamp": stamp}

    async def set(self, params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """Change what can be changed while the disk is in use."""
        process = self._process
        if "tail_bytes" in params:
            process.recorder.tail.set_bound(int(params["tail_bytes"]))
        if "sync_age_seconds" in params:
            process.sync_age = float(params["sync_age_seconds"])
        return {}

    async def offer(self, _params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """The administrator knows what was lost: serve the disk."""
        self._process.holds.offer()
        return {}

    async def stop(self, _params: Params, _fds: list[int], _call: Call) -> dict[str, Any]:
        """A clean end: clients are closed, everything is durable and sealed."""
        process = self._process
        process.stop()
        await process.ended.wait()
        durable = process.started.recorder.writer.durable if process.started else 0
        return {"durable": durable, "at": time.monotonic()}
