"""Answers about points: what a SPEC means, the timeline, candidates, bookmarks, pins.

These have a follower of their own and never wait for a step of the engine: opening a view must not
be slower because a segment is being reclaimed. What they decide together with the engine - a pin
against a move of the window - happens under `Engine.policy_lock`.
"""

from __future__ import annotations

import dataclasses
import threading
from datetime import UTC, tzinfo
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np

from cdp.curator.controls import Controls
from cdp.curator.engine import Engine
from cdp.curator.kept import Kept
from journal.catalog_state import Pin, drop, put
from journal.errors import NotOpenable
from journal.follower import RedoFollower
from journal.segment import SegmentInfo, payload_sizes
from replay.target import AtSeq, Bookmark, ClockTable, KeptPoint, parse_spec, resolve
from replay.timeline import JournalTimeline


def zone_of(name: str | None) -> tzinfo:
    """The zone named; UTC when there is none of that name here."""
    try:
        return ZoneInfo(name) if name else UTC
    except (ZoneInfoNotFoundError, ValueError):
        return UTC


class Points:
    """See the module. Its calls may come from several threads."""

    def __init__(
        self, engine: Engine, redo: RedoFollower, controls: Controls, *, clock: list[tuple[int,
        int]], start_stamp: int,
    ) -> None:  # fmt: skip
        self._engine, self._redo, self._controls = engine, redo, controls
        self._kept = Kept(engine.catalog, controls, redo, engine.frontier)
        self._lock = threading.Lock()
        self._clock = clock
        self._start_stamp = start_stamp

    def set_clock(self, entries: list[tuple[int, int]]) -> None:
        """The host's table of (stamp, wall-clock minus stamp), ns."""
        self._clock = sorted(entries) or self._clock

    def clock(self) -> ClockTable:
        """When the wall clock was what."""
        return ClockTable(self._clock)

    def timeline(self) -> JournalTimeline:
        """One consistent state of all points."""
        self._controls.catch_up()
        openable = self._kept.openable()
        catalog = self._engine.catalog
        named = catalog.bookmarks().values()
        marks = {mark.label: Bookmark(mark.seq, mark.stamp) for mark in named}
        kept = {mark.seq: KeptPoint(mark.seq, mark.stamp, mark.stamp) for mark in named}
        kept |= {
            each.seq: KeptPoint(each.seq, each.stamp, each.until) for each in catalog.thinned()
        }
        return JournalTimeline(
            tables=self._redo,
            durable_seq=self._controls.scanned,
            window_start_seq=catalog.window_start,
            openable=openable,
            kept_points=[kept[seq] for seq in sorted(kept)],
            bookmarks=marks,
            clock=self.clock(),
            start_stamp=self._start_stamp,
        )

    def resolve(self, spec: str, *, now_ns: int, zone: str | None) -> dict[str, Any]:
        """``{"seq", "stamp", "wall_ns", "size"}`` of the openable point that a SPEC means."""
        with self._lock:
            where = zone_of(zone)
            parsed = parse_spec(spec, now_ns=now_ns, zone=where)
            point = resolve(parsed, self.timeline(), zone=where)
        return self._point(point.seq, point.stamp_ns, point.wall_ns)

    def resolve_stamp(self, stamp: int) -> dict[str, Any]:
        """The same of an instant of the host's clock: after the last write stamped at or before.

        :raises NotOpenable: that point cannot be opened.
        """
        with self._lock:
            line = self.timeline()
            seq = line.seq_at_stamp(stamp)
            if seq is None or not line.openable.contains(seq):
                raise NotOpenable(
                    "this instant cannot be opened on this disk any more: see 'cdp points'"
                )
            return self._point(seq, line.stamp_of(seq), line.clock.wall_of(stamp))

    def _point(self, seq: int, stamp: int, wall_ns: int) -> dict[str, Any]:
        return {"seq": seq, "stamp": stamp, "wall_ns": wall_ns, "size": self.size_at(seq)}

    def size_at(self, seq: int) -> int:
        """Bytes of the disk after record ``seq``."""
        return max(
            ((since, size) for since, size in self._engine.catalog.sizes() if since <= seq),
            default=(0, 0),
        )[1]

    def pins(self) -> dict[str, Any]:
        """All pins."""
        return {
            "pins": [
                {"id": pin.id, "seq": pin.seq, "owner": pin.owner}
                for pin in self._engine.catalog.pins().values()
            ]
        }

    def pin(
        self, name: str, seq: int, *, owner: str, opened_ns: int, max_age_s: float
    ) -> dict[str, Any]:
        """Keep a point openable, durably.

        :raises NotOpenable: it is not openable (any more).
        """
        with self._lock, self._engine.policy_lock:
            self._controls.catch_up()
            if not self._kept.openable().contains(seq):
                raise NotOpenable(f"seq {seq} cannot be opened any more: see 'cdp points'")
            self._engine.catalog.commit(put(Pin(name, seq, owner, opened_ns, max_age_s)))
        return {"id": name, "seq": seq}

    def unpin(self, name: str) -> dict[str, Any]:
        """Let go of a point; one that is not there is fine."""
        with self._engine.policy_lock:
            pin = self._engine.catalog.pins().get(name)
            if pin is not None:
                self._engine.catalog.commit(drop(pin))
        return {}

    def unbookmark(self, label: str) -> dict[str, Any]:
        """Remove a bookmark.

        :raises NotFound: there is none of that label.
        """
        with self._lock:
            self._controls.unbookmark(label)
        return {}

    def status(self) -> dict[str, Any]:
        """Numbers for `cdp status` and metrics; nothing here waits for a step of the engine."""
        engine, catalog = self._engine, self._engine.catalog
        with self._lock:
            infos = self._redo.segments()
            applied, durable = engine.applier.applied, engine.frontier.durable
            pending = lag_bytes = 0
            oldest: int | None = None
            for info in reversed(infos):
                table = self._redo.table(info).upto(durable)
                if table.last_seq <= applied:
                    break
                rows = table.rows[max(0, applied + 1 - table.first_seq) :]
                if not len(rows):
                    continue
                pending += len(rows)
                lag_bytes += int(payload_sizes(rows).sum())
                batch = table.batch_of(max(0, applied + 1 - table.first_seq))
                oldest = int(table.batches["stamp"][batch])
            start = self._window_stamp(infos)
            usage = engine.last_usage
            pins = list(catalog.pins().values())
            return {
                "applied": applied, "durable": durable, "floor": infos[0].first_seq if infos else 0,
                "window_start": catalog.window_start, "window_start_stamp": start,
                "apply_lag_records": pending, "apply_lag_bytes": lag_bytes,
                "oldest_unapplied_stamp": oldest,
                "index_lag_records": self._index_lag(infos),
                "redo_bytes": usage.redo, "undo_bytes": usage.undo, "index_bytes": usage.other,
                "journal_bytes": usage.total,
                "bookmarks": len(catalog.bookmarks()), "pins": len(pins),
                "oldest_pin_stamp": min((pin.opened_ns for pin in pins), default=None),
                # A journal at its limit, or an index without space, is trouble, but all is applied.
                "trouble": engine.trouble, "degraded": engine.held is not None,
                "throttled": engine.throttled,
                "damaged": [dict(each) for each in catalog.damaged().values()],
                **dataclasses.asdict(engine.counters),
            }  # fmt: skip

    def _window_stamp(self, infos: list[SegmentInfo]) -> int:
        seq = self._engine.catalog.window_start
        for info in reversed(infos):
            if info.first_seq <= max(seq, infos[0].first_seq):
                batches = self._redo.table(info).batches
                at = int(np.searchsorted(batches["first_seq"], seq, "right"))
                return int(batches["stamp"][at - 1]) if at else info.header.stamp
        return self._start_stamp

    def _index_lag(self, infos: list[SegmentInfo]) -> int:
        """Records in sealed segments that no run covers yet."""
        covered = self._engine.redo_runs.covered
        return sum(
            info.trailer.last_seq - info.first_seq + 1
            for info in infos
            if info.trailer is not None and info.segment not in covered
        )

    def with_times(self, damaged: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Damaged places with the times (UNIX seconds) of the records that they concern."""
        with self._lock:
            line = self.timeline()
            clock = line.clock

            def wall(seq: int) -> float | None:
                return clock.wall_of(line.stamp_of(min(seq, line.durable_seq))) / 1e9

            return [
                {
                    **each,
                    "from_time": wall(each["first_seq"]) if each["last_seq"] else None,
                    "to_time": wall(each["last_seq"]) if each["last_seq"] else None,
                }
                for each in damaged
            ]

    def bookmarks(self) -> dict[str, Any]:
        """All bookmarks, ascending by seq, with wall-clock times (UNIX seconds)."""
        with self._lock:
            self._controls.catch_up()
            clock = self.clock()
            return {
                "bookmarks": [
                    {
                        "label": mark.label, "seq": mark.seq, "stamp": mark.stamp,
                        "time": clock.wall_of(mark.stamp) / 1e9,
                        "requested": mark.requested, "consistency": mark.consistency,
                        "freeze_seconds": mark.more.get("freeze_seconds"),
                        "providers": mark.more.get("providers", []),
                    }
                    for mark in sorted(self._engine.catalog.bookmarks().values(), key=lambda mark:
                    mark.seq)
                ]
            }  # fmt: skip

    def timeline_view(
        self, *, buckets: int, from_ns: int | None, to_ns: int, start_ns: int | None = None
    ) -> dict[str, Any]:
        """The timeline of contracts with the control API; times are UNIX seconds."""
        with self._lock:
            line = self.timeline()
            clock = line.clock
            catalog = self._engine.catalog
            first = line.stamp_of(max(line.window_start_seq or 0, line.floor))
            start = self._stamp(clock, from_ns) if from_ns is not None else first
            end = max(self._stamp(clock, to_ns), start + 1)
            counted = line.buckets(start, end, buckets)

            def wall(stamp: int) -> float:
                return clock.wall_of(stamp) / 1e9

            return {
                "from": wall(start), "to": wall(end),
                "window_start": wall(first),
                "window_start_seq": line.window_start_seq, "durable_seq": line.durable_seq,
                "buckets": [
                    {"start": wall(each.start), "end": wall(each.end), "records": each.records,
                     "bytes": each.bytes, "barriers": each.barriers,
                     "first_seq": each.first_seq, "last_seq": each.last_seq}
                    for each in counted
                ],
                "bookmarks": [
                    {"label": mark.label, "seq": mark.seq, "time": wall(mark.stamp),
                     "consistency": mark.consistency}
                    for mark in sorted(catalog.bookmarks().values(), key=lambda mark: mark.seq)
                ],
                "gaps": [
                    {"from": wall(line.stamp_of(gap.begin)),
                     "to": wall(line.stamp_of(gap.end)) if gap.end is not None else None,
                     "reason": gap.reason}
                    for gap in catalog.gaps()
                ],
                "pins": [
                    {"id": pin.id, "seq": pin.seq, "owner": pin.owner} for pin in
                    catalog.pins().values()
                ],
            }  # fmt: skip

    @staticmethod
    def _stamp(clock: ClockTable, wall_ns: int) -> int:
        return max(clock.stamps_at(wall_ns))

    def candidates(
        self, first: str, last: str, *, now_ns: int, zone: str | None, limit: int
    ) -> dict[str, Any]:
        """Candidate points between two SPECs."""
        with self._lock:
            line, where = self.timeline(), zone_of(zone)
            low = self._edge(line, first, now_ns, where)
            high = self._edge(line, last, now_ns, where)
            clock = line.clock
            return {
                "points": [
                    {"seq": each.seq, "time": clock.wall_of(each.stamp) / 1e9, "kind": each.kind,
                     "label": each.label, "records": each.records, "bytes": each.bytes}
                    for each in line.candidates(min(low, high), max(low, high), limit)
                ]
            }  # fmt: skip

    @staticmethod
    def _edge(line: JournalTimeline, spec: str, now_ns: int, zone: tzinfo) -> int:
        """An end of a range need not be openable: before the window means the window's start."""
        parsed = parse_spec(spec, now_ns=now_ns, zone=zone)
        if isinstance(parsed, AtSeq):
            return parsed.seq
        try:
            return resolve(parsed, line, zone=zone).seq
        except NotOpenable:
            return line.window_start_seq or 0
