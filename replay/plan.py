"""Plans of apply (R3): which blocks a group of records changes, and what each held first and last.

Pure functions on columns. A *group* is a stretch of records in seq order, as rows of one or more
segment tables. Nothing here reads a file or changes one.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from journal.format import Kind

LARGE_ZERO_BLOCKS = 8192  # a zero of so many is not cut into blocks
# In ``Changes.row``: the group's newest version is a trim, the block becomes zero.
TRIM = np.int64(-1)
_ROW_BITS = np.uint64(32)


@dataclasses.dataclass(frozen=True, slots=True)
class Changes:
    """What a group does to the backing, one element per changed block, sorted by block.

    ``blocks``: u64. ``row``: i64, the row of the group whose content is the newest (TRIM when the
    newest version is a trim that follows a write of the same group). ``oldest``: u64, seq of the
    block's oldest version in the group, trims included.
    """

    blocks: np.ndarray
    row: np.ndarray
    oldest: np.ndarray


def is_version(rows: np.ndarray) -> np.ndarray:
    """Which rows change blocks (bool)."""
    kind = rows["kind"]
    return (kind >= Kind.WRITE) & (kind <= Kind.REF)


def expand(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every block of the ranges (u64), and the number of the range it comes from (i64)."""
    counts = counts.astype(np.int64)
    if len(counts) and int(counts.max()) == 1 == int(counts.min()):
        return starts.astype(np.uint64), np.arange(len(counts))
    number = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(number)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts.astype(np.uint64)[number] + within.astype(np.uint64), number


def plan_changes(rows: np.ndarray, seqs: np.ndarray, valid: np.ndarray) -> Changes:
    """The changes of a group.

    ``rows`` (ROW_DTYPE) in seq order with their ``seqs`` (u64); ``valid`` (bool) excludes rows that
    are no versions: controls and refs of aborted rollbacks. Blocks with only trims in the group are
    left alone (the mask hides them); of a trim only what overlaps a written block counts.
    """
    kind = rows["kind"]
    content = np.flatnonzero(valid & (kind != Kind.TRIM))
    blocks, number = expand(rows["block"][content], rows["nblocks"][content])
    if not len(blocks):
        empty = np.zeros(0, np.uint64)
        return Changes(empty, np.zeros(0, np.int64), empty)
    # Blocks are 32-bit numbers: sorting one number of both is the fastest way.
    key = (blocks << _ROW_BITS) | content[number].astype(np.uint64)
    key.sort()
    blocks, row = key >> _ROW_BITS, (key & np.uint64(0xFFFFFFFF)).astype(np.int64)
    first = np.ones(len(blocks), bool)
    first[1:] = blocks[1:] != blocks[:-1]
    starts = np.flatnonzero(first)
    ends = np.append(starts[1:], len(blocks)) - 1
    unique, newest, oldest = blocks[starts], row[ends], seqs[row[starts]].copy()
    trims = np.flatnonzero(valid & (kind == Kind.TRIM))
    if len(trims):
        newest = newest.copy()
        low = np.searchsorted(unique, rows["block"][trims])
        high = np.searchsorted(
            unique, rows["block"][trims] + rows["nblocks"][trims].astype(np.uint64)
        )
        newest_seq = seqs[newest].copy()
        for at, start, end in zip(trims, low, high, strict=True):
            if start < end:
                seq = seqs[at]
                part = slice(start, end)
                later = newest_seq[part] < seq
                newest[part][later] = TRIM
                newest_seq[part][later] = seq
                np.minimum(oldest[part], seq, out=oldest[part])
    return Changes(unique, newest.astype(np.int64), oldest)


def stretches(blocks: np.ndarray, *same: np.ndarray) -> np.ndarray:
    """Boundaries of the runs of consecutive blocks in which every column of ``same`` is constant.

    Returns the starts (i64) with ``len(blocks)`` appended.
    """
    if not len(blocks):
        return np.zeros(1, np.int64)
    new = np.ones(len(blocks), bool)
    new[1:] = blocks[1:] != blocks[:-1] + np.uint64(1)
    for column in same:
        new[1:] |= column[1:] != column[:-1]
    return np.append(np.flatnonzero(new), len(blocks))


def group_end(rows: np.ndarray, valid: np.ndarray, limit_blocks: int) -> int:
    """How many of the rows a group takes so that it changes at most ``limit_blocks`` blocks.

    At least one: a record larger than the limit is a group by itself (`apply` does it in slices),
    and so is a large zero. Trims cost nothing here.
    """
    counted = valid & (rows["kind"] != Kind.TRIM)
    work = np.cumsum(np.where(counted, rows["nblocks"].astype(np.int64), 0))
    count = max(1, int(np.searchsorted(work, limit_blocks, "right"))) if len(rows) else 0
    large = np.flatnonzero(valid[:count] & large_zeroes(rows[:count]))
    return max(1, int(large[0])) if len(large) else count


def large_zeroes(rows: np.ndarray) -> np.ndarray:
    """Which rows are zeroes that are handled as ranges (bool)."""
    return np.asarray((rows["kind"] == Kind.ZERO) & (rows["nblocks"] >= LARGE_ZERO_BLOCKS))
