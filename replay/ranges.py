"""Zeroing whole ranges of the backing without a look at every block (R3 for a large write-zeroes).

A range is cut where something changes: where what is known of the backing's blocks does, and at the
edges of everything that the logs say of it. Within such a piece one block stands for all.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from pyroaring import BitMap

from journal.format import BLOCK
from replay.images import Images
from replay.plan import expand
from replay.work import Work, members, to_blocks

REGION_BLOCKS: Final = 1 << 20  # looked at together: 4 GiB


def zero_range(work: Work, start: int, end: int, seq: int, *, fresh_above: int) -> int:
    """Blocks [start, end) become zero by record ``seq``, with all the steps of apply but the sync
    of the backing; bytes written.

    ``fresh_above``: no group of an earlier time can have ended above it.
    """
    written = 0
    for low in range(start, end, REGION_BLOCKS):
        high = min(low + REGION_BLOCKS, end)
        span = BitMap()
        span.add_range(low, high)
        _save(work, span, low, high, seq, fresh_above)
        work.publish()
        blocks = work.blocks
        blocks.zero -= span
        data = span & blocks.data
        size = work.backing.size()
        for first, last in _runs(data):
            work.backing.zero(first * BLOCK, min(last * BLOCK, size) - first * BLOCK)
        blocks.data -= data
        blocks.held |= span
        written += len(data) * BLOCK
    return written


def _save(work: Work, span: BitMap, low: int, high: int, seq: int, fresh_above: int) -> None:
    """The save rule for a range."""
    known, history = work.blocks, work.history
    if span.issubset(known.held):
        return
    edges = [np.array([low, high], np.uint64)]
    for bits in (known.held, known.masked, known.data):
        part = bits & span
        if part and len(part) < len(span):
            edges.append(_edges(part))
    for entries in (
        history.overlapping(low, high, first_seq=0, last_seq=seq), history.images(low, high)
    ):  # fmt: skip
        starts, counts = entries.ranges()
        edges += [starts, starts + counts]
    cuts = np.unique(np.clip(np.concatenate(edges), low, high))
    starts, counts = cuts[:-1], np.diff(cuts).astype(np.int64)
    need = ~members(starts, known.held)
    starts, counts = starts[need], counts[need]
    ends = np.full(len(starts), seq, np.uint64)
    fresh = ~members(starts, known.masked) & (seq > fresh_above)
    if not fresh.all():
        ends[~fresh] = history.oldest(starts[~fresh])
    save = work.unsaved(starts, ends, fresh=fresh)
    starts, counts, ends = starts[save], counts[save], ends[save]
    full = members(starts, known.data)
    Images(work.undo).zero_ranges(starts[~full], counts[~full], ends[~full])
    blocks, number = expand(starts[full], counts[full])
    if len(blocks):
        work.save_backing(blocks, ends[full][number])


def _edges(bits: BitMap) -> np.ndarray:
    """First blocks of the runs of a bitmap, and those behind their last ones."""
    blocks = to_blocks(bits)
    new = np.flatnonzero(np.diff(blocks) != 1)
    return np.concatenate([blocks[:1], blocks[new] + np.uint64(1), blocks[new + 1],
                           blocks[-1:] + np.uint64(1)])  # fmt: skip


def _runs(bits: BitMap) -> list[tuple[int, int]]:
    """The runs of a bitmap: first block, and the one behind the last."""
    if not bits:
        return []
    blocks = to_blocks(bits)
    new = np.flatnonzero(np.diff(blocks) != 1)
    starts = np.append(blocks[:1], blocks[new + 1])
    ends = np.append(blocks[new], blocks[-1:]) + np.uint64(1)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
