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
    # Where the last point before the end is openable, the next smaller end does not matter. So of
    # all images within the window: only those that points behind it may need are looked up.
    certain = openable.wanted(ends - np.uint64(1), ends)
    large = (table.rows["kind"] == Kind.IMAGE_ZERO) & (table.rows["nblocks"] >= LARGE_BLOCKS)
    needed = _blocks_of(table, np.flatnonzero(~large & certain))
    doubtful = _blocks_of(table, np.flatnonzero(~large & possible & ~certain))
    kept = _needed(work, openable, ends, *doubtful)
    blocks, row = (np.concatenate(each) for each in zip(needed, kept, strict=True))
    order = np.lexsort((ends[row], blocks))
    blocks, row = blocks[order], row[order]
    ranges = np.flatnonzero(large & possible)
    content = int(np.count_nonzero(table.rows["kind"][row] == Kind.IMAGE))
    total = int(table.rows["nblocks"][table.rows["kind"] == Kind.IMAGE].astype(np.int64).sum())
    return Verdict(
        total=total * BLOCK + len(table.rows) * RECORD_BYTES,
        kept=content * BLOCK + (len(np.unique(row)) + len(ranges)) * RECORD_BYTES,
        blocks=blocks, row=row, ranges=ranges,
    )  # fmt: skip


def _blocks_of(table: Table, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The blocks of some rows, with the row of each."""
    blocks, number = expand(table.rows["block"][rows], table.rows["nblocks"][rows])
    return blocks, rows[number]


def _needed(
    work: Work, openable: Openable, ends: np.ndarray, blocks: np.ndarray, row: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Those of some images that a point between the next smaller end and theirs needs."""
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
    return blocks[keep], row[keep]


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
