"""Takes the redo log's control records into the catalog: bookmarks, rollbacks, resizes, crashes,
gaps, clock.

The redo log is the truth until its segments are reclaimed; the catalog has to know what they said
before. Taking the same record in twice changes nothing, so where scanning stands may be understated
- except that a bookmark removed meanwhile must not come back: removing one commits the place as
well. What was scanned counts only when the catalog has it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import threading
from typing import Any, Final

import numpy as np

from journal.catalog import Catalog
from journal.catalog_state import Bookmark, Crash, Gap, Hole, Op, Rollback, drop, put
from journal.errors import Corruption, NotFound, Vanished
from journal.follower import RedoFollower
from journal.format import Kind
from journal.segment import SegmentInfo, Table, read_body

log = logging.getLogger(__name__)

ATTEMPTS: Final = 100  # each retry means that a segment was reclaimed meanwhile


@dataclasses.dataclass(slots=True)
class _Place:
    """Where scanning stands: the last seq, the rollback and the gap that are open there."""

    scanned: int
    rollback: int | None
    gap: Gap | None


class Controls:
    """Scans for control records; usable from several threads."""

    def __init__(self, catalog: Catalog, redo: RedoFollower) -> None:
        self._catalog, self._redo = catalog, redo
        self._lock = threading.RLock()
        rollbacks = [each.begin for each in catalog.rollbacks() if each.end is None]
        gaps = [each for each in catalog.gaps() if each.end is None]
        self._place = _Place(
            catalog.scanned, rollbacks[-1] if rollbacks else None, gaps[-1] if gaps else None
        )

    @property
    def scanned(self) -> int:
        """Control records up to this seq are in the catalog."""
        return self._place.scanned

    def catch_up(self, *, commit_place: bool = False) -> int:
        """Scan up to what is durable; the seq reached."""
        with self._lock:
            for _ in range(ATTEMPTS):
                place, ops = dataclasses.replace(self._place), list[Op]()
                try:
                    self._scan(place, ops)
                except Vanished:
                    continue
                break
            else:
                raise Vanished("the redo log's segments change faster than they can be read")
            if ops or (commit_place and place.scanned > self._catalog.scanned):
                self._catalog.commit(*ops, ("scanned", place.scanned))
            self._place = place
            return place.scanned

    def unbookmark(self, label: str) -> None:
        """Remove a bookmark, durably.

        :raises NotFound: there is none of that label.
        """
        with self._lock:
            self.catch_up()
            mark = self._catalog.bookmarks().get(label)
            if mark is None:
                raise NotFound(f"there is no bookmark {label!r}: see 'cdp bookmark list'")
            self._catalog.commit(drop(mark), ("scanned", self.scanned))

    def _scan(self, place: _Place, ops: list[Op]) -> None:
        """Move ``place`` over what is new; what the catalog must know of it goes to ``ops``."""
        for info in self._redo.segments():
            if info.trailer is not None and info.trailer.last_seq <= place.scanned:
                continue
            table = self._redo.table(info)
            first = max(0, place.scanned + 1 - table.first_seq)
            kind = table.rows["kind"][first:]
            for row in (np.flatnonzero((kind >= 16) & (kind < 32)) + first).tolist():
                ops += self._ops(place, info, table, row)
            place.scanned = max(place.scanned, table.last_seq)

    def _body(self, info: SegmentInfo, table: Table, row: int) -> dict[str, Any]:
        try:
            file = self._redo.file(info)
            body = json.loads(read_body(file, table, row, name=info.name) or b"{}")
        except (Corruption, ValueError) as error:
            log.error("control record seq %d: %s", table.first_seq + row, error)
            return {}
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            log.error("control record seq %d: %s", table.first_seq + row, error)
            return {}
        return body if isinstance(body, dict) else {}

    def _ops(self, place: _Place, info: SegmentInfo, table: Table, row: int) -> list[Op]:
        kind, seq = Kind(int(table.rows["kind"][row])), table.first_seq + row
        body = self._body(info, table, row)
        stamp = int(table.batches["stamp"][table.batch_of(row)])
        match kind:
            case Kind.BOOKMARK if "label" in body:
                return [put(_bookmark(seq, stamp, body))]
            case Kind.UNBOOKMARK if "label" in body:
                return [(("bookmarks", str(body["label"])), None)]
            case Kind.ROLLBACK_BEGIN:
                place.rollback = seq
                return [put(Rollback(seq, None, False))]
            case Kind.ROLLBACK_COMMIT | Kind.ROLLBACK_ABORT if place.rollback is not None:
                begin, place.rollback = place.rollback, None
                return [put(Rollback(begin, seq, kind == Kind.ROLLBACK_COMMIT))]
            case Kind.RESIZE if "size" in body:
                return [(("sizes", str(seq)), int(body["size"]))]
            case Kind.GAP_BEGIN if place.gap is None:
                place.gap = Gap(seq, None, str(body.get("reason", "")))
                return [put(place.gap)]
            case Kind.GAP_END:
                gap, place.gap = place.gap or Gap(seq, None, ""), None
                return [put(gap._replace(end=seq))]
            case Kind.CLOCK if "wall_minus_stamp" in body:
                return [(("clock", str(stamp)), int(body["wall_minus_stamp"]))]
            case Kind.CRASH:
                return _crash(seq, body)
            case _:
                return []


def _crash(seq: int, body: dict[str, Any]) -> list[Op]:
    kept, seen = int(body.get("kept", seq - 1)), int(body.get("highest_seen", seq - 1))
    stamps = int(body.get("stamp_from", 0)), int(body.get("stamp_to", 0))
    ops = [put(Crash(seq, kept, seen, *stamps))]
    if kept + 1 < seq:
        ops.append(put(Hole(kept + 1, seq - 1)))
    return ops


def _bookmark(seq: int, stamp: int, body: dict[str, Any]) -> Bookmark:
    known = {"label", "target", "target_stamp", "requested", "consistency"}
    return Bookmark(
        label=str(body["label"]),
        seq=int(body.get("target", seq)),
        stamp=int(body.get("target_stamp", stamp)),
        record_seq=seq,
        requested=str(body.get("requested", "crash")),
        consistency=str(body.get("consistency", "crash")),
        more={key: value for key, value in body.items() if key not in known},
    )
