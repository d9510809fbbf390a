"""What a curator learns at its start of the backing's blocks, from the redo log.

Footers of segments wholly applied hold bitmaps as they stood at their ends; from there on, tables
in order. A gap, in which others may have written, voids all that lies before it.
"""

from __future__ import annotations

import logging
from typing import Final

import numpy as np

from journal.errors import Corruption
from journal.follower import RedoFollower
from journal.segment import Footer, SegmentInfo, Table, load_footer
from replay import reclaim
from replay.refs import decide
from replay.work import Work

log = logging.getLogger(__name__)

FOOTERS_MAX: Final = 256  # read for the "held" bitmap; older blocks cost a lookup


def valid_rows(
    redo: RedoFollower, infos: list[SegmentInfo], info: SegmentInfo, table: Table, voided: int
) -> np.ndarray:
    """Which rows of a segment's table are versions; refs may be decided by a later segment."""
    behind = (redo.table(each).rows for each in infos if each.segment > info.segment)
    valid = decide(table.rows, behind).valid
    valid[: max(0, voided + 1 - table.first_seq)] = False
    return valid


def load_blocks(work: Work, applied: int) -> None:
    """Fill ``work.blocks``: everything up to ``applied`` is in the backing."""
    blocks, redo, catalog = work.blocks, work.history.redo, work.catalog
    assert isinstance(redo, RedoFollower)
    blocks.load_extents(work.backing.extents())
    since = max([catalog.voided, *(gap.end or gap.begin for gap in catalog.gaps())])
    everything = list(work.history.refresh().redo_infos.values())
    infos = [info for info in everything if info.first_seq <= applied]
    later: list[SegmentInfo] = []
    for info in reversed(infos):
        footer = _usable_footer(redo, info, applied) if info.first_seq > since else None
        if footer is not None:
            blocks.masked = footer.masks.copy()
            break
        later.append(info)
        if info.first_seq <= since:
            break
    for info in reversed(later):
        table = redo.table(info)
        valid = valid_rows(redo, everything, info, table, since)
        rows = table.upto(applied).rows
        blocks.advance(rows, valid[: len(rows)])
        blocks.held |= reclaim.written(table.upto(applied), valid[: len(rows)])
    older = [info for info in infos[: len(infos) - len(later)] if info.first_seq > since]
    for info in older[-FOOTERS_MAX:]:
        footer = _usable_footer(redo, info, applied)
        if footer is not None:
            blocks.held |= footer.written


def _usable_footer(redo: RedoFollower, info: SegmentInfo, applied: int) -> Footer | None:
    """A footer that says how things stood at its end: all of it applied and valid, no rollback
    open.
    """
    if info.trailer is None or info.trailer.last_seq > min(applied, info.bound):
        return None
    try:
        footer = load_footer(redo.file(info), info)
    except Corruption as error:
        # A crash while it was written leaves this, too, and the batches say the same.
        log.info("%s: its batches are read instead", error)
        return None
    return None if footer.rollback else footer
