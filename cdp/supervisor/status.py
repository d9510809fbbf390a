"""What the processes say of themselves, kept for those who cannot wait, and put together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from cdp.api.metrics import DiskFacts
from cdp.clock import SECOND_NS, HostClock
from cdp.supervisor.children import Child, Role, State
from cdp.supervisor.disk import Disk
from journal.errors import CdpError

log = logging.getLogger(__name__)

# What a stuck process may cost who asks for all of them.
STATUS_SECONDS_MAX: Final = 2.0
# A recorder that says nothing for so long serves nobody, whatever it said before.
SILENT_SECONDS_MAX: Final = 30.0
# Writes that wait for less are slowed down; nobody need be told more.
HELD_SECONDS_MIN: Final = 1.0


@dataclass(slots=True)
class ChildStatus:
    """The last answer of one process, and when (trio's clock). Empty before the first."""

    values: dict[str, Any] = field(default_factory=dict)
    at: float = float("-inf")

    def age_seconds(self) -> float:
        """How old the answer is."""
        return trio.current_time() - self.at


class StatusBoard:
    """The last answers of all processes of one disk."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.of: dict[Role, ChildStatus] = {role: ChildStatus() for role in Role}

    async def refresh(self, seconds: float = STATUS_SECONDS_MAX) -> None:
        """Asks all of them at once; who does not answer in time keeps the old answer."""
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for child in self.disk.children.values():
                    nursery.start_soon(self._ask, child)

    async def _ask(self, child: Child) -> None:
        if child.state is State.STOPPED:
            self.of[child.role] = ChildStatus({}, trio.current_time())
            return
        try:
            reply = await child.call_early("status")
        except CdpError as error:
            log.debug("the %s did not say how it is: %s", child, error)
            return
        if reply is not None:
            self.of[child.role] = ChildStatus(reply.result, trio.current_time())

    def age_seconds(self) -> float:
        """The age of the oldest answer of a process that should be running."""
        children = self.disk.children.values()
        running = [child.role for child in children if child.state is not State.STOPPED]
        return max((self.of[role].age_seconds() for role in running), default=0.0)


class Boards:
    """Those of all disks."""

    def __init__(self, disks: Mapping[str, Disk]) -> None:
        self._disks = disks
        self._boards: dict[str, StatusBoard] = {}

    def of(self, disk: Disk) -> StatusBoard:
        """The board of a disk; an empty one for a disk that is new."""
        board = self._boards.get(disk.name)
        if board is None or board.disk is not disk:
            board = self._boards[disk.name] = StatusBoard(disk)
        return board

    async def refresh(self, seconds: float = STATUS_SECONDS_MAX) -> None:
        """All disks at once."""
        for name in self._boards.keys() - set(self._disks):
            del self._boards[name]
        async with trio.open_nursery() as nursery:
            for disk in self._disks.values():
                nursery.start_soon(self.of(disk).refresh, seconds)

    def connections(self) -> int:
        """NBD connections that recorders and viewers had when they were asked last."""
        return sum(
            int(answer.values.get("connections") or 0)
            for board in self._boards.values()
            for answer in board.of.values()
        )


def _state(disk: Disk, recorder: dict[str, Any], curator: dict[str, Any], silent: float) -> str:
    if disk.config.released:
        return "released"
    if silent > SILENT_SECONDS_MAX:
        return "failed"
    if disk.operation is not None and disk.operation.startswith("rolling back"):
        return "rolling-back"
    if disk.recorder.state is State.FAILED:
        return "failed"
    if disk.curator.state is State.FAILED and not disk.cleared:
        return "failed"
    if recorder.get("poisoned"):
        return "poisoned"
    if disk.recorder.state is not State.READY or not disk.cleared:
        return "starting"
    if not recorder.get("served", True):
        return "rolling-back" if "rolled back" in str(recorder.get("reason")) else "failed"
    if recorder.get("held_seconds"):
        return "throttled"  # which matters more to who writes
    if _is_degraded(disk, curator):
        return "degraded"
    throttled = recorder.get("throttled") or curator.get("throttled")
    return "throttled" if throttled else "served"


def _is_degraded(disk: Disk, curator: dict[str, Any]) -> bool:
    """Whether nothing is applied: the backing does not take it, or nobody is there to do it."""
    return bool(curator.get("degraded")) or disk.curator.state is not State.READY


def _silent_seconds(disk: Disk, board: StatusBoard) -> float:
    """For how long a recorder that should answer has not."""
    if disk.recorder.state is not State.READY:
        return 0.0
    return min(board.of[Role.RECORDER].age_seconds(), trio.current_time() - disk.since)


def _reason(
    disk: Disk, recorder: dict[str, Any], curator: dict[str, Any], silent: float
) -> str | None:
    if silent > SILENT_SECONDS_MAX:
        return f"its recorder (process {disk.recorder.pid}) has not answered for {silent:.0f} s"
    of_process = [
        f"{child.role}: {child.reason}" if child.reason else None
        for child in (disk.recorder, disk.curator)
    ]
    why = (
        of_process[0] or recorder.get("trouble") or of_process[1] or recorder.get("reason")
        or curator.get("trouble") or disk.operation
    )  # fmt: skip
    held = float(recorder.get("held_seconds") or 0.0)
    if held < HELD_SECONDS_MIN or of_process[0]:
        return why
    return f"writes have waited for {held:.0f} s: {why or 'the journal has no room'}"


def _text(value: object) -> str | None:
    return None if value is None else str(value)


class Times:
    """From stamps to what people and Prometheus understand."""

    def __init__(self, clock: HostClock) -> None:
        self._clock, self._now = clock, clock.now()

    def age_seconds(self, stamp: int | None) -> float:
        """How long ago; 0 without a stamp."""
        return max(0, self._now - stamp) / SECOND_NS if stamp else 0.0

    def wall(self, stamp: int | None) -> float | None:
        """UNIX seconds; None without a stamp."""
        return self._clock.wall.wall_of(stamp) / SECOND_NS if stamp else None


def describe(disk: Disk, board: StatusBoard, views: int, uri: str) -> dict[str, Any]:
    """The object that the API calls Disk."""
    config = disk.config
    recorder, curator = board.of[Role.RECORDER].values, board.of[Role.CURATOR].values
    viewer = board.of[Role.VIEWER].values
    times = Times(disk.clock)
    start = curator.get("window_start_stamp")
    number: Callable[[str], int] = lambda key: int(curator.get(key) or 0)  # noqa: E731
    applied = max(int(recorder.get("applied") or 0), number("applied"))
    durable = max(int(recorder.get("durable") or 0), number("durable"))
    silent = _silent_seconds(disk, board)
    state = _state(disk, recorder, curator, silent)
    return {
        "name": config.name,
        "uuid": config.uuid,
        "size": config.size,
        "block_size": config.block_size,
        "backing": config.backing,
        "journal": config.journal,
        "state": state,
        "reason": _text(_reason(disk, recorder, curator, silent)),
        "durable_seq": durable,
        "applied_seq": applied,
        "last_seq": int(recorder.get("last_seq") or durable),
        "floor_seq": number("floor"),
        "window_start_seq": number("window_start"),
        "window_start": times.wall(start),
        "window_seconds": times.age_seconds(start),
        "window_configured": config.window_seconds,
        "journal_bytes": number("journal_bytes"),
        "journal_limit": config.journal_limit,
        "redo_bytes": number("redo_bytes"),
        "undo_bytes": number("undo_bytes"),
        "index_bytes": number("index_bytes"),
        "overflow": config.overflow,
        "lag_seconds": float(recorder.get("lag_seconds") or 0.0),
        "lag_bytes": int(recorder.get("lag_bytes") or 0),
        "held_seconds": round(float(recorder.get("held_seconds") or 0.0), 3),
        "apply_lag_bytes": number("apply_lag_bytes"),
        "apply_lag_records": number("apply_lag_records"),
        "apply_lag_seconds": times.age_seconds(curator.get("oldest_unapplied_stamp")),
        "connections": int(recorder.get("connections") or 0),
        "view_connections": int(viewer.get("connections") or 0),
        "views": views,
        "bookmarks": number("bookmarks"),
        "poisoned": bool(recorder.get("poisoned")),
        "degraded": disk.cleared and not disk.config.released and _is_degraded(disk, curator),
        "served": state in ("served", "degraded", "throttled"),
        "after_loss": config.after_loss,
        "segment_bytes": config.segment_bytes,
        "tail_bytes": config.tail_bytes,
        "sync_age_seconds": config.sync_age_seconds,
        "scrub_interval_seconds": config.scrub_interval_seconds,
        "scrub_rate": config.scrub_rate,
        "scrub": curator.get("scrub"),
        "status_age_seconds": round(max(0.0, board.age_seconds()), 3)
        if board.age_seconds() != float("inf")
        else None,
        "restarts": {str(child.role): child.restarts for child in disk.children.values()},
        "pids": {
            str(child.role): child.pid
            for child in disk.children.values()
            if child.state is not State.STOPPED
        },
        "uri": uri,
    }


def disk_facts(disk: Disk, board: StatusBoard, described: dict[str, Any]) -> DiskFacts:
    """What metrics of one disk are made of."""
    curator = board.of[Role.CURATOR].values
    age = board.age_seconds()
    return DiskFacts(
        described,
        board.of[Role.RECORDER].values,
        curator,
        Times(disk.clock).age_seconds(curator.get("oldest_pin_stamp")),
        # Of a process that never answered: since the disk is ours.
        age if age != float("inf") else trio.current_time() - disk.since,
    )
