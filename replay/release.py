"""R9, release: masked blocks become zero in the backing, what a kept point still needs being saved
first.

A trim copies nothing when it is applied: its blocks are masked, the backing keeps what was there.
Before the segment with the trim can be reclaimed, and when the backing is let go, they are zeroed:
save rule; sync the undo log; publish; zero; sync the backing. Any part, at any time outside other
jobs. That a block is zero already is remembered in memory only, until apply overwrites it.
"""

from __future__ import annotations

import numpy as np
from pyroaring import BitMap

from journal.format import BLOCK
from replay.plan import stretches
from replay.work import Work, bitmap, members, to_blocks

SLICE_BLOCKS = 65536


def pending(work: Work, within: BitMap | None = None) -> BitMap:
    """Masked blocks not known to be zero."""
    masked = work.blocks.masked - work.blocks.zero
    return masked if within is None else masked & within


def release_slice(work: Work, wanted: BitMap) -> int:
    """Release the wanted blocks that are holes, and up to SLICE_BLOCKS others; how many were done
    (0: nothing left).

    A hole is zero already. Nothing changes, so nothing is saved; that it is one must be durable.
    """
    todo = pending(work, wanted)
    if not todo:
        return 0
    full = todo & work.blocks.data
    if len(full) > SLICE_BLOCKS:
        rest = BitMap()
        rest.add_range(full[SLICE_BLOCKS], full.max() + 1)
        todo -= full & rest
        full -= rest
    if full:
        blocks = to_blocks(full)
        ends = work.history.oldest(blocks)
        save = (ends > 0) & work.unsaved(blocks, ends)
        if save.any():
            work.save_backing(blocks[save], ends[save])
        work.publish()
        zero_blocks(work, blocks)
    work.sync_backing()
    work.blocks.zero |= todo
    return len(todo)


def zero_blocks(work: Work, blocks: np.ndarray) -> None:
    """Make blocks (sorted u64) zero in the backing, where it may hold anything else."""
    blocks = blocks[members(blocks, work.blocks.data)]
    size = work.backing.size()
    bounds = stretches(blocks)
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        start = int(blocks[low]) * BLOCK
        work.backing.zero(start, min((high - low) * BLOCK, size - start))
    if len(blocks):
        work.blocks.data -= bitmap(blocks)
