"""Before-images on their way to the undo log.

An image is of consecutive blocks and has one end: they are cut wherever the end changes. Nothing
here syncs; see `replay.work.Work.publish`.
"""

from __future__ import annotations

import itertools

import numpy as np

from journal.format import BLOCK, SUM_LARGE, Kind, checksum, payload_sums
from journal.undo import UndoWriter
from replay.payloads import Payloads
from replay.plan import stretches

BATCH_IMAGES = 8192  # without content, in one batch of the undo log
_ZERO_SUM = checksum(bytes(BLOCK))
_LARGE_BLOCKS = SUM_LARGE // BLOCK  # from so many on a checksum covers more than a block


class Images:
    """Writes images: one batch of the undo log for each call, or several. ``copied``: bytes of
    content so far.
    """

    def __init__(self, undo: UndoWriter) -> None:
        self._undo = undo
        self.copied = 0

    def add(self, blocks: np.ndarray, ends: np.ndarray, content: memoryview) -> None:
        """Blocks (u64) with what they held just before their ends, one after the other in
        ``content``.
        """
        if not len(blocks):
            return
        bounds = stretches(blocks, ends)
        starts, counts = bounds[:-1], np.diff(bounds)
        entries = _entries(blocks[starts], ends[starts], counts, Kind.IMAGE)
        if len(starts) == len(blocks):
            places = range(0, len(content), BLOCK)
            sums = [checksum(content[place : place + BLOCK]) for place in places]
        else:
            sums = []
            for start, end in zip((bounds * BLOCK)[:-1].tolist(), (bounds * BLOCK)[1:].tolist(),
                                  strict=True):  # fmt: skip
                sums += payload_sums(content[start:end])
        payloads = [content]
        if _ZERO_SUM in sums:
            sums, payloads = _without_zeroes(entries, sums, starts, counts, content)
        self._append(entries, sums, payloads)

    def zeroes(self, blocks: np.ndarray, ends: np.ndarray) -> None:
        """Blocks (u64) that held zeroes just before their ends; nothing is copied."""
        self.zero_ranges(blocks, np.ones(len(blocks), np.int64), ends)

    def zero_ranges(self, starts: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> None:
        """The same of ranges of blocks; those that follow each other become one image."""
        order = np.lexsort((starts, ends))
        starts, counts, ends = starts[order], counts[order].astype(np.int64), ends[order]
        behind = starts + counts.astype(np.uint64)
        new = np.ones(len(starts), bool)
        new[1:] = (ends[1:] != ends[:-1]) | (starts[1:] != behind[:-1])
        first = np.flatnonzero(new)
        if len(first):
            counts = np.add.reduceat(counts, first)
        entries = _entries(starts[first], ends[first], counts, Kind.IMAGE_ZERO)
        for at in range(0, len(entries), BATCH_IMAGES):
            self._append(entries[at : at + BATCH_IMAGES], [], [])

    def copy(
        self, payloads: Payloads, rows: np.ndarray, blocks: np.ndarray, ends: np.ndarray
    ) -> None:
        """The content of ``blocks``, each in its row of a segment, as images with these ends.

        :raises Corruption: a payload is damaged.
        """
        order = np.lexsort((blocks, rows))
        rows, blocks, ends = rows[order], blocks[order], ends[order]
        small = payloads.is_small(rows)
        few_rows, few, few_ends = rows[small], blocks[small], ends[small]
        for which, places, sums, view in payloads.small(few_rows, few):
            # Of one record: with more blocks a checksum would have to cover several.
            bounds = stretches(few[which], few_ends[which], few_rows[which])
            starts, last = bounds[:-1], places[bounds[1:] - 1] + BLOCK
            first = few[which][starts]
            entries = _entries(first, few_ends[which][starts], np.diff(bounds), Kind.IMAGE)
            pairs = zip(places[starts].tolist(), last.tolist(), strict=True)
            self._append(entries, sums, [view[start:end] for start, end in pairs])
        many, many_ends = blocks[~small], ends[~small]
        at = 0
        for _, view in payloads.large(rows[~small], many):
            to = at + len(view) // BLOCK
            self.add(many[at:to], many_ends[at:to], view)
            at = to

    def _append(self, entries: np.ndarray, sums: list[int], payloads: list[memoryview]) -> None:
        nbytes = sum(map(len, payloads))
        self._undo.append(entries.ravel().tolist(), sums, payloads, nbytes)
        self.copied += nbytes


def _entries(starts: np.ndarray, ends: np.ndarray, counts: np.ndarray, kind: Kind) -> np.ndarray:
    entries = np.zeros((len(starts), 6), np.uint64)
    entries[:, 0], entries[:, 1], entries[:, 2], entries[:, 3] = starts, ends, counts, kind
    return entries


def _without_zeroes(
    entries: np.ndarray, sums: list[int], starts: np.ndarray, counts: np.ndarray,
    content: memoryview,
) -> tuple[list[int], list[memoryview]]:  # fmt: skip
    """Make zero images of those that are zero; checksums and content of the others."""
    units = np.where(counts < _LARGE_BLOCKS, counts, -(-counts // _LARGE_BLOCKS))
    total = np.array(sums, np.uint64)
    zero = np.logical_and.reduceat(total == np.uint64(_ZERO_SUM), np.cumsum(units) - units)
    for at in np.flatnonzero(zero).tolist():  # a checksum alone proves nothing
        piece = content[int(starts[at]) * BLOCK : int(starts[at] + counts[at]) * BLOCK]
        zero[at] = piece == bytes(len(piece))
    entries[zero, 3] = Kind.IMAGE_ZERO
    edges = [0, *(np.flatnonzero(np.diff(zero)) + 1).tolist(), len(zero)]
    payloads = [
        content[int(starts[low]) * BLOCK : int(starts[high - 1] + counts[high - 1]) * BLOCK]
        for low, high in itertools.pairwise(edges) if not zero[low]
    ]  # fmt: skip
    return total[np.repeat(~zero, units)].tolist(), payloads
