"""Which points must stay exact, put together from the catalog and the redo log.

Sources of refs in the redo log are openable by definition (R6), also those of a rollback that is
not closed yet; of one that is only being planned the target is pinned. Each thread has its own,
since a follower is for one thread.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from cdp.curator.controls import Controls
from journal.catalog import Catalog
from journal.catalog_state import Rollback
from journal.errors import Vanished
from journal.follower import RedoFollower
from journal.format import Kind
from journal.frontier import Frontier
from replay.openable import Openable

ATTEMPTS: Final = 100  # each retry means that a segment was reclaimed meanwhile


class Kept:
    """Makes the set of openable points of one disk."""

    def __init__(
        self, catalog: Catalog, controls: Controls, redo: RedoFollower, frontier: Frontier
    ) -> None:
        self._catalog, self._controls = catalog, controls
        self._redo, self._frontier = redo, frontier
        self._sources: dict[Rollback, frozenset[int]] = {}
        self._last: tuple[object, Openable] | None = None

    def openable(self) -> Openable:
        """The openable points now; bookmarks whose records are durable included."""
        durable = self._controls.catch_up()
        catalog = self._catalog
        # Everything else that counts is in the catalog: its number tells whether that has changed.
        # (It is read first; what changes meanwhile makes the answer new again.)
        state = durable, catalog.number, self._frontier.generations()
        if self._last is not None and self._last[0] == state:
            return self._last[1]
        rollbacks = catalog.rollbacks()
        found = Openable.of(
            window_start=catalog.window_start,
            durable=durable,
            rollbacks=rollbacks,
            gaps=catalog.gaps(),
            holes=catalog.holes(),
            named=[*catalog.bookmarks().values(), *catalog.pins().values(), *catalog.thinned()],
            refs=self._refs(rollbacks),
        )
        self._last = state, found
        return found

    def _refs(self, rollbacks: list[Rollback]) -> set[int]:
        """Sources of the refs in the redo log."""
        # What counts is whether the segment is there. The catalog says "reclaimed" before it goes,
        # which a crash may have kept from happening, or undone: its refs are facts until then.
        infos = self._redo.segments()
        gone = min([self._catalog.reclaimed, *(info.first_seq - 1 for info in infos[:1])])
        # What was given up to others' writes is void, refs and all.
        gone = max(gone, self._catalog.voided)
        there = [
            each for each in rollbacks
            if each.end is None or (each.committed and each.end > gone)
        ]  # fmt: skip
        self._sources = {each: self._sources[each] for each in there if each in self._sources}
        found: set[int] = set()
        for rollback in there:
            sources = self._sources.get(rollback)
            if sources is None:
                sources = self._sources_of(rollback)
                if rollback.end is not None:
                    self._sources[rollback] = sources
            found |= sources
        return found

    def _sources_of(self, rollback: Rollback) -> frozenset[int]:
        for _ in range(ATTEMPTS):
            try:
                return self._look_up(rollback)
            except Vanished:
                continue
        raise Vanished("the redo log's segments change faster than they can be read")

    def _look_up(self, rollback: Rollback) -> frozenset[int]:
        found: set[int] = set()
        for info in self._redo.segments():
            if info.trailer is not None and info.trailer.last_seq < rollback.begin:
                continue
            if rollback.end is not None and info.first_seq > rollback.end:
                break
            table = self._redo.table(info)
            if rollback.end is not None:  # behind it are others' refs, also of aborted ones
                table = table.upto(rollback.end)
            rows = table.rows[max(0, rollback.begin - table.first_seq) :]
            found |= set(np.unique(rows["arg"][rows["kind"] == Kind.REF]).tolist())
        return frozenset(found)
