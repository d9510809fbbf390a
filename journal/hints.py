"""What catalog and index know of a redo log that is to be recovered.

After a reboot nobody remembers how far the log was durable, and the segments that remain may say
too little: what told it may have been reclaimed, or be what is damaged. Both know seqs that have
been durable:

- the catalog's `applied` (applied is only what is durable) and `reclaimed` (so is what was given
  up, and the segment behind it begins where that ended);
- the index: only records that are durable get into a run.

A catalog that is lost, or has lost commits, cannot say what was reclaimed. Then the log's oldest
segment is taken at its word: everything before it had been durable. (Otherwise it would look like
the middle of a log whose beginning never reached the disk, and be cut.)
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from journal.catalog import Catalog
from journal.errors import JournalError
from journal.format import Log
from journal.runset import RunSet
from journal.segment import SegmentLister
from journal.storage import Storage

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Hints:
    """For `recover`: the highest seq known durable, `applied`, the highest redo segment number, and
    up to where records were given up (None: not known).
    """

    durable: int = 0
    applied: int = 0
    segment: int = 0
    reclaimed: int | None = None

    def and_frontier(self, durable: int, applied: int) -> Hints:
        """With what the frontier of this boot says."""
        return dataclasses.replace(
            self, durable=max(self.durable, durable), applied=max(self.applied, applied)
        )


def gather(storage: Storage, index: Path, disk: bytes) -> Hints:
    """Read catalog and index, also beside a living curator; nothing is written.

    ``index``: where the storage's directory ``index`` lies. What cannot be read says nothing.
    """
    applied, reclaimed = _catalog(storage, disk)
    last, segment = _index(storage, index, disk)
    return Hints(max(applied, reclaimed or 0, last), applied, segment, reclaimed)


def _catalog(storage: Storage, disk: bytes) -> tuple[int, int | None]:
    """`applied`, and up to where records were given up."""
    try:
        catalog = Catalog.open(storage, disk, read_only=True)
        if catalog.found and not catalog.damage:
            return catalog.applied, catalog.reclaimed
        applied, reclaimed = catalog.applied, catalog.reclaimed
    except (JournalError, OSError) as error:
        log.error("the catalog says nothing for recovery: %s", error)
        applied = reclaimed = 0
    infos = SegmentLister(storage, Log.REDO, disk).refresh()
    if not infos:
        return applied, None
    if infos[0].header.predecessor:
        reclaimed = max(reclaimed, infos[0].header.cut)
    return applied, reclaimed


def _index(storage: Storage, index: Path, disk: bytes) -> tuple[int, int]:
    """Highest seq and highest segment number in any run of the redo log."""
    if not index.is_dir():
        return 0, 0
    runs = RunSet(storage, index, log=Log.REDO, disk=disk, read_only=True)
    try:
        runs.refresh()
        return runs.last_seq, max(runs.covered, default=0)
    except (JournalError, OSError) as error:  # it can be made anew, and a merge may be under way
        log.warning("the index says nothing for recovery: %s", error)
        return 0, 0
    finally:
        runs.close()
