"""The curator's housekeeping: the window follows time, old pins expire, and space is made.

Every decision about space is `replay.retention`'s; here it is found out how things stand, and done
what was decided, one segment at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from journal.catalog_state import Pin, drop
from journal.errors import Corruption, JournalFull
from journal.run_format import RunDamaged
from journal.segment import SegmentInfo
from replay import sweep
from replay.openable import Openable
from replay.retention import Action, Segment, Situation, Usage, decide

if TYPE_CHECKING:
    from cdp.curator.engine import Engine

log = logging.getLogger(__name__)

SECOND_NS: Final = 1_000_000_000
INTERVAL_NS = SECOND_NS
LOOK_NS = SECOND_NS // 20
SHRINK_NS = SECOND_NS // 10
SHRINK_LOG_NS = 600 * SECOND_NS  # shrinking goes on and on: said once in so long a time
PIN_GRACE_SECONDS = 600  # beyond a pin's age, for the supervisor to end what uses it
WINDOW_PART = 100  # the window moves by a hundredth of itself, or past a segment
_CONFINED: Final = (
    "the journal's file system has no space for its limit: free some there, or the oldest history "
    "goes, or writes wait"
)
JUDGED_MAX = 2  # undo segments looked through in one step while there is no hurry


class Housekeeping:
    """See the module.

    ``pressure``: what the administrator should know about the limit. ``pressed``: space is needed.
    ``throttled``: writes wait, or will, for nothing can be given up. ``refused``: the recorder had
    no space since something was given up.
    """

    def __init__(self, engine: Engine, viewer_gone: Callable[[], bool]) -> None:
        """``viewer_gone``: whether no process has this disk's views."""
        self._engine, self._viewer_gone = engine, viewer_gone
        self.pressure: str | None = None
        self.pressed = self.throttled = False
        self.refused = False
        self._last = self._last_look = self._last_care = 0
        self._last_shrink = self._last_shrink_log = -SHRINK_LOG_NS
        self._window_edge = -(1 << 62)
        self._freeing = False
        self._short = False  # something could not be given up for lack of space
        self._garbage: dict[int, tuple[Openable, float]] = {}
        # Segments that could not be given up: when, and whether that was for lack of space.
        self._stuck: dict[str, tuple[Openable, bool]] = {}

    def step(self, now: int) -> bool:
        """The next bit, if it is time; whether there was one."""
        if now - self._last < INTERVAL_NS and not self._freeing and not self._filling(now):
            return False
        if self._short:
            self._short = False
            if self._engine.space.release_reserve():  # rather than more history
                self._engine.retry()
        if now - self._last_care >= INTERVAL_NS:
            self._last_care = now
            self.care_for_space()
        self._last = now
        self._expire_pins(now)
        self._follow_window(now)
        engine = self._engine
        openable = engine.kept.openable()
        info, garbage = self._most_garbage(openable)
        situation = self._situation(openable, garbage)
        decision = decide(situation)
        self.throttled = decision.action is Action.THROTTLE
        self._freeing = decision.action not in (Action.NOTHING, Action.THROTTLE)
        self.pressure = _CONFINED if engine.space.confined else None
        match decision.action:
            case Action.SWEEP if info is not None:
                return self._give_up(info.name, openable, lambda: engine.sweep(info))
            case Action.RECLAIM:
                name = engine.redo.segments()[0].name
                return self._give_up(name, openable, engine.reclaim_oldest)
            case Action.SHRINK:
                return self._shrink(decision.seq, now)
            case Action.THROTTLE:
                self.refused = False  # there is nothing that could be done about it
                self.pressure = self._why_throttled()
        return False

    def _why_throttled(self) -> str:
        policy, confined = self._engine.policy.overflow, self._engine.space.confined
        what = "the journal is at its limit"
        if confined:
            what = "there is no space on the journal's file system"
        do = "free some there" if confined else "'cdp disk set NAME journal-limit=SIZE'"
        if policy == "shrink":
            why = "only pinned points are left: remove bookmarks, close views,"
        else:
            why = f"overflow={policy} keeps all history: shorten the window,"
        return f"{what} and {why} or {do}"

    # ------------------------------------------------------------------------------------ space
    def _filling(self, now: int) -> bool:
        """Whether the journal has come near its limit since the last full look; a cheap look."""
        if now - self._last_look < LOOK_NS:
            return False
        self._last_look = now
        return self._measure().high or self._engine.full or self.refused

    def _measure(self) -> Usage:
        """How much there is; the recorder is told how much more it may append.

        ! What it has counted is read before the files are looked at: what comes in between is in
        both, and errs towards less.
        """
        frontier = self._engine.frontier
        counted = frontier.redo_bytes
        usage = self._engine.usage()
        room = 0 if self._engine.full else usage.room
        frontier.redo_bytes_max = max(1, counted + room)
        self.pressed = usage.high
        return usage

    def _situation(self, openable: Openable, garbage: float) -> Situation:
        engine = self._engine
        infos = engine.redo.segments()
        segments = [
            Segment(info.first_seq, engine.last_seq_of(info), info.size, True)
            if engine.is_closed(info)
            else Segment(info.first_seq, engine.frontier.durable, info.size, False)
            for info in infos
        ]
        return Situation(
            usage=self._measure(), segments=segments, applied=engine.applier.applied,
            durable=engine.frontier.durable, window_start=engine.catalog.window_start,
            undo_garbage=garbage, full=engine.full or self.refused,
            freeing=self._freeing, stuck=bool(infos) and self._is_stuck(infos[0].name, openable),
            may_shrink=engine.policy.overflow == "shrink",
        )  # fmt: skip

    def _is_stuck(self, name: str, openable: Openable) -> bool:
        """Whether giving up a segment has failed, and no point was given up since."""
        since = self._stuck.get(name)
        return since is not None and _same_points(since[0], openable)

    def _give_up(self, name: str, openable: Openable, work: Callable[[], bool]) -> bool:
        """Sweep or reclaim a segment; one with which that fails is left alone for a while."""
        try:
            done = work()
        except RunDamaged:
            raise
        except (Corruption, JournalFull, OSError) as error:
            self._stuck[name] = openable, isinstance(error, JournalFull)
            if isinstance(error, JournalFull):
                self._short = True
                self._hold_writers()
            raise
        if done:
            self._stuck.pop(name, None)
            self.refused = False
            self._engine.retry()
        return done

    def _hold_writers(self) -> None:
        """At once, so that they have seen it when the reserve is given away for making space."""
        frontier = self._engine.frontier
        frontier.redo_bytes_max = max(1, frontier.redo_bytes)

    def forget_failures(self) -> None:
        """What could not be given up for lack of space is tried again."""
        self._stuck = {name: how for name, how in self._stuck.items() if not how[1]}

    def care_for_space(self) -> None:
        """Have a reserve; notice that somebody has made space."""
        engine = self._engine
        if not engine.full:
            closed = [each.size for each in engine.redo.segments() if engine.is_closed(each)]
            engine.space.keep_reserve(engine.policy.journal_limit, max(closed, default=0))
        elif not engine.space.scarce:
            engine.retry()

    def _shrink(self, seq: int, now: int) -> bool:
        engine = self._engine
        if engine.full and now - self._last_shrink < SHRINK_NS:
            return False  # what was given up before has to show first
        said = now - self._last_shrink_log <= SHRINK_LOG_NS
        log.log(
            logging.DEBUG if said else logging.WARNING,
            "journal at its limit of %d bytes: history before seq %d is given up",
            engine.policy.journal_limit, seq,
        )  # fmt: skip
        self._last_shrink = now
        if not said:
            self._last_shrink_log = now
        engine.counters.shrunk += 1
        engine.move_window(seq)
        return True

    def _most_garbage(self, openable: Openable) -> tuple[SegmentInfo | None, float]:
        """The undo segment that can be swept with the largest garbage part.

        Judged anew when points went, a few at a time: a part only grows while its segment stays as
        it is. When space is needed now, all are.
        """
        hurry = self._freeing or self._engine.full
        if hurry:
            self._finish_undo(openable)
        closed = self._engine.closed_undo()
        self._garbage = {
            info.segment: self._garbage[info.segment] for info in closed
            if info.segment in self._garbage
        }  # fmt: skip
        best: tuple[SegmentInfo | None, float] = (None, 0.0)
        room = len(closed) if hurry else JUDGED_MAX
        for info in closed:
            if self._is_stuck(info.name, openable):
                continue
            known = self._garbage.get(info.segment)
            if room and (known is None or not _same_points(known[0], openable)):
                known = self._garbage[info.segment] = openable, self._garbage_of(info, openable)
                room -= 1
            if known is not None and known[1] > best[1]:
                best = info, known[1]
            if best[1] >= 1.0:
                break
        return best

    def _garbage_of(self, info: SegmentInfo, openable: Openable) -> float:
        table = self._engine.history.undo.table(info)
        if sweep.all_garbage(table, openable):
            return 1.0
        return sweep.judge(self._engine.work, table, openable).garbage

    def _finish_undo(self, openable: Openable) -> None:
        """Begin a new undo segment if the one being written is nothing but garbage."""
        history, work = self._engine.history, self._engine.work
        info = history.current().undo_infos.get(work.undo.segment)
        if info is not None and sweep.all_garbage(history.undo.table(info), openable):
            work.undo.roll()
            work.publish()
            history.refresh()

    # ------------------------------------------------------------------------------------- time
    def _follow_window(self, now: int) -> None:
        """Move the window's start as time goes by: rarely, for each move is a commit."""
        engine = self._engine
        window = engine.policy.window_ns
        if window is None:
            return
        edge = now - window
        start = self.seq_at_stamp(edge)
        before = engine.catalog.window_start
        if start is None or start <= before:
            return
        passed = any(
            before <= engine.last_seq_of(info) <= start
            for info in engine.redo.segments() if engine.is_closed(info)
        )  # fmt: skip
        if passed or edge - self._window_edge >= window // WINDOW_PART:
            self._window_edge = edge
            engine.move_window(start)

    def seq_at_stamp(self, stamp: int) -> int | None:
        """The last record stamped at or before; None when that is before the redo log."""
        redo = self._engine.redo
        for info in reversed(redo.segments()):
            if info.header.stamp <= stamp:
                batches = redo.table(info).batches
                at = int(np.searchsorted(batches["stamp"], stamp, "right"))
                if at:
                    return int(batches["first_seq"][at - 1]) + int(batches["count"][at - 1]) - 1
        return None

    def _expire_pins(self, now: int) -> None:
        """Drop pins that nobody can use any more. While there is a viewer, it is the supervisor who
        ends what is too old: a point must not go while somebody reads it.
        """
        old = [pin for pin in self._engine.catalog.pins().values() if _is_old(pin, now)]
        if old and self._viewer_gone():
            with self._engine.policy_lock:
                for pin in old:
                    log.warning("pin %s of a %s is too old and dropped", pin.id, pin.owner)
                self._engine.catalog.commit(*map(drop, old))


def _is_old(pin: Pin, now: int) -> bool:
    age = (now - pin.opened_ns) / SECOND_NS
    return bool(pin.max_age_s) and age > pin.max_age_s + PIN_GRACE_SECONDS


def _same_points(one: Openable, other: Openable) -> bool:
    """Whether the same is openable, but for what was written since."""
    return (
        one.window_start == other.window_start
        and list(one.ranges())[:-1] == list(other.ranges())[:-1]
    )
