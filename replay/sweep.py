"""R5, garbage in the undo log: what no openable point needs is dropped, segment by segment.

The image (block, end) is garbage when no openable point lies in [e', end), e' the block's next
smaller end, or 0. Any smaller end may stand in for e' (keeps more, never wrong). A segment of only
garbage is deleted; one that is mostly garbage is deleted after the rest was copied: copy, verify,
sync, publish, catalog, unlink. The openable set has shrunk durably in the catalog before any of
this.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from journal.errors import Corruption
from journal.format import BLOCK, Kind
from journal.segment import SegmentInfo, Table
from replay.images import Images
from replay.openable import Openable
from replay.payloads import Payloads
from replay.plan import expand
from replay.work import Work

LARGE_BLOCKS: Final = 1024  # an image of so many zero blocks is kept or dropped as a whole
RECORD_BYTES: Final = 64  # what a record costs besides its content, about


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """Of one undo segment: its bytes, those of garbage, and what must be kept.

    ``blocks`` with the ``row`` of each; ``ranges``: rows of zeroes that are kept as a whole.
    """

    total: int
    kept: int
    blocks: np.ndarray
    row: np.ndarray
    ranges: np.ndarray

    @property
    def garbage(self) -> float:
        """The part of it that nobody needs."""
        return 1.0 - self.kept / self.total if self.total else 1.0


def all_garbage(table: Table, openable: Openable) -> bool:
    """Whether the ends alone show that nothing is needed: no openable point lies below them."""
    if not len(table.rows):
        return True
    end = np.array([table.rows["arg"].max()], np.uint64)
    return not bool(openable.wanted(np.zeros(1, np.uint64), end)[0])


def judge(work: Work, table: Table, openable: Openable) -> Verdict:
    """What of an undo segment some openable point still needs."""
    ends = table.rows["arg"].astype(np.uint64)
    possible = openable.wanted(np.zeros(len(ends), np.uint64), ends)
    large = (table.rows["kind"] == Kind.IMAGE_ZERO) & (table.rows["nblocks"] >= LARGE_BLOCKS)
    small = np.flatnonzero(~large & possible)
    blocks, number = expand(table.rows["block"][small], table.rows["nblocks"][small])
    row = small[number]
    order = np.lexsort((ends[row], blocks))
    blocks, row = blocks[order], row[order]
    mine = ends[row]
    smaller = np.zeros(len(blocks), np.uint64)
    if len(blocks):
        same = blocks[1:] == blocks[:-1]
        smaller[1:][same] = mine[:-1][same]
        first = np.flatnonzero(np.append(True, ~same))
        smaller[first] = work.history.ends_le(blocks[first], mine[first] - np.uint64(1))
    keep = openable.wanted(smaller, mine)
    blocks, row = blocks[keep], row[keep]
    ranges = np.flatnonzero(large & possible)
    content = int(np.count_nonzero(table.rows["kind"][row] == Kind.IMAGE))
    total = int(table.rows["nblocks"][table.rows["kind"] == Kind.IMAGE].astype(np.int64).sum())
    return Verdict(
        total=total * BLOCK + len(table.rows) * RECORD_BYTES,
        kept=content * BLOCK + (len(np.unique(row)) + len(ranges)) * RECORD_BYTES,
        blocks=blocks, row=row, ranges=ranges,
    )  # fmt: skip


def sweep(work: Work, info: SegmentInfo, table: Table, verdict: Verdict) -> int:
    """Copy what is kept and delete the segment; bytes of content copied.

    :raises Corruption: an image that is needed is damaged, or it is not known what is; the segment
        stays.
    :raises JournalFull: no space for the copy; likewise.
    """
    rows = table.rows
    if (rows["kind"] == Kind.LOST).any():
        raise Corruption("damaged batches", file=info.name)
    zero = rows["kind"][verdict.row] == Kind.IMAGE_ZERO
    work.require(int(np.count_nonzero(~zero)))
    images = Images(work.undo)
    ends = rows["arg"].astype(np.uint64)
    images.zero_ranges(
        rows["block"][verdict.ranges], rows["nblocks"][verdict.ranges], ends[verdict.ranges]
    )
    images.zeroes(verdict.blocks[zero], ends[verdict.row[zero]])
    blocks, row = verdict.blocks[~zero], verdict.row[~zero]
    if len(blocks):
        payloads = Payloads(work.history.undo.file(info), info.name, table, work.buffer)
        images.copy(payloads, row, blocks, ends[row])
    work.publish()
    drop(work, info)
    return images.copied


def drop(work: Work, info: SegmentInfo) -> None:
    """Take an undo segment off the catalog's list, durably, and delete it."""
    work.catalog.commit((("undo", str(info.segment)), None))
    work.frontier.curator_generation += 1
    work.storage.unlink(info.name)
    work.storage.sync_dir("undo")
