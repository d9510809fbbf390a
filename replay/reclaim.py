"""R4, reclaim: the oldest redo segment is deleted, what a kept point needs of it becoming
before-images.

For each version (block, s) of the segment, succ = the block's next version <= applied: if there is
one and an openable point lies in [s, succ), its content is saved as the block's image with the end
succ. No succ: the backing is its home. Versions that are masked need nothing here either: release
has zeroed them before. (An image more than needed is harmless, facts are only ever true.)

Planned on columns. Usually the records are cut into blocks, slice by slice; successors inside the
segment come from sorting, later ones from the index. Large trims and zeroes are not cut into
blocks, but where something changes: at the edges of other records (`_plan_ranges`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np
from pyroaring import BitMap

from journal.bitmaps import blocks_of
from journal.entries import kinds_of
from journal.errors import Corruption
from journal.format import BLOCK, Kind
from journal.segment import SegmentInfo, Table
from replay.images import Images
from replay.openable import NONE, Openable
from replay.payloads import Payloads
from replay.plan import expand
from replay.release import pending
from replay.work import BUFFER_BLOCKS, Work

SLICE_BLOCKS: Final = 1 << 20
LARGE_BLOCKS: Final = 4096  # a trim or zero of so many is not cut into blocks
REGION_BLOCKS: Final = 1 << 22  # 16 GiB, looked at together when there are large ones
_NO_NEXT: Final = np.uint64(NONE)


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """Versions to save: ranges of blocks, ``row`` of the table, ``end`` = the successor's seq."""

    starts: np.ndarray
    counts: np.ndarray
    row: np.ndarray
    end: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """One slice of a plan. ``held``: blocks with a later applied version that is no trim."""

    need: Need
    held: BitMap


def trimmed(table: Table, valid: np.ndarray) -> BitMap:
    """Blocks that the segment's records discarded: they must be released before it is reclaimed."""
    rows = table.rows[valid & (table.rows["kind"] == Kind.TRIM)]
    return blocks_of(rows["block"], rows["nblocks"])


def written(table: Table, valid: np.ndarray) -> BitMap:
    """Blocks with a version in the segment that is no trim."""
    rows = table.rows[valid & (table.rows["kind"] != Kind.TRIM)]
    return blocks_of(rows["block"], rows["nblocks"])


def plan(
    work: Work, table: Table, valid: np.ndarray, applied: int, openable: Openable
) -> Iterator[Slice]:
    """What of a segment's versions must be saved before it is deleted.

    Slices are cut by block number, so that all versions of a block are in the same one.
    """
    rows = np.flatnonzero(valid)
    starts = table.rows["block"][rows]
    ends = starts + table.rows["nblocks"][rows].astype(np.uint64)
    kind = table.rows["kind"][rows]
    large = (ends - starts >= LARGE_BLOCKS) & ((kind == Kind.TRIM) | (kind == Kind.ZERO))
    if large.any():
        cuts = [(low, low + REGION_BLOCKS) for low in range(0, int(ends.max()), REGION_BLOCKS)]
    else:
        cuts = list(_cuts(starts, (ends - starts).astype(np.int64)))
    for low, high in cuts:
        first, last = np.maximum(starts, np.uint64(low)), np.minimum(ends, np.uint64(high))
        inside = first < last
        if not inside.any():
            continue
        first, last, row = first[inside], last[inside], rows[inside]
        if large[inside].any():
            yield _plan_ranges(work, table, first, last, row, applied, openable)
        else:
            blocks, number = expand(first, last - first)
            yield _plan_blocks(work, table, blocks, row[number], applied, openable)


def _cuts(starts: np.ndarray, counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of blocks [low, high) with at most about SLICE_BLOCKS versions each."""
    if not len(starts):
        return
    end = int((starts + counts.astype(np.uint64)).max())
    if int(counts.sum()) <= SLICE_BLOCKS:
        yield 0, end
        return
    edges = np.unique(np.concatenate([starts, starts + counts.astype(np.uint64)]))
    delta = np.zeros(len(edges), np.int64)
    np.add.at(delta, np.searchsorted(edges, starts), 1)
    np.add.at(delta, np.searchsorted(edges, starts + counts.astype(np.uint64)), -1)
    load = np.cumsum(np.cumsum(delta)[:-1] * np.diff(edges.astype(np.int64)))
    low = before = 0
    for full in [*range(SLICE_BLOCKS, int(load[-1]), SLICE_BLOCKS), int(load[-1])]:
        at = int(np.searchsorted(load, full))
        high = int(edges[at + 1])
        if high > low:
            # A single record may be larger than a slice.
            parts = max(1, (int(load[at]) - before) // SLICE_BLOCKS)
            between = [low + (high - low) * part // parts for part in range(parts)]
            yield from pairwise([*between, high])
            low, before = high, int(load[at])


def _plan_blocks(
    work: Work, table: Table, blocks: np.ndarray, row: np.ndarray, applied: int, openable: Openable
) -> Slice:
    """Records cut into blocks: one version each, ``row`` its row of the table."""
    order = np.lexsort((row, blocks))
    blocks, row = blocks[order], row[order]
    seqs = row.astype(np.uint64) + np.uint64(table.first_seq)
    succ = np.zeros(len(blocks), np.uint64)
    inner = np.zeros(len(blocks), bool)
    inner[:-1] = blocks[1:] == blocks[:-1]
    succ[:-1][inner[:-1]] = seqs[1:][inner[:-1]]
    last = np.flatnonzero(~inner)
    later, locs = work.history.successors(blocks[last], seqs[last], applied)
    succ[last] = later
    keep = succ > 0
    keep[keep] = openable.wanted(seqs[keep], succ[keep])
    # Only the next version is known; if that is a trim a write may follow, and the block is just
    # not held: a wrong "no" costs a lookup.
    held = blocks[last][(later > 0) & (kinds_of(locs) != Kind.TRIM)]
    starts = blocks[keep]
    need = Need(starts, np.ones(len(starts), np.int64), row[keep], succ[keep])
    return Slice(need, blocks_of(held, np.ones(len(held), np.int64)))


def _plan_ranges(
    work: Work, table: Table, first: np.ndarray, last: np.ndarray, row: np.ndarray, applied: int,
    openable: Openable,
) -> Slice:  # fmt: skip
    """Records [first, last) cut at the edges of each other and of all later ones' entries.

    ``nexts`` is, for every piece between two edges, its next version: seq * 2, plus 1 if that is a
    trim. It begins with what comes after the segment; then the rows are gone through, newest first.
    """
    last_seq = table.first_seq + len(table.rows) - 1
    later = work.history.overlapping(
        int(first.min()), int(last.max()), first_seq=last_seq + 1, last_seq=applied
    )
    low, count = later.ranges()
    edges = np.unique(np.concatenate([first, last, low, low + count]))
    nexts = np.full(len(edges) - 1, _NO_NEXT, np.uint64)
    value = later.seq * np.uint64(2) + (kinds_of(later.loc) == Kind.TRIM).astype(np.uint64)
    start, end = edges.searchsorted(low), edges.searchsorted(low + count)
    single = end == start + 1
    np.minimum.at(nexts, start[single], value[single])
    for at, to, one in zip(
        start[~single].tolist(), end[~single].tolist(), value[~single], strict=True
    ):
        np.minimum(nexts[at:to], one, out=nexts[at:to])
    start, end = edges.searchsorted(first), edges.searchsorted(last)
    held = (nexts != _NO_NEXT) & (nexts % np.uint64(2) == 0) & _covered(start, end, len(nexts))
    where = np.flatnonzero(held)
    seqs = row.astype(np.uint64) + np.uint64(table.first_seq)
    own = seqs * np.uint64(2) + (table.rows["kind"][row] == Kind.TRIM).astype(np.uint64)
    # [s, succ) has an openable point when the first one from s on lies below succ.
    wanted = openable.first_at_or_after(seqs)
    pieces: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    for number in range(len(row) - 1, -1, -1):
        part = nexts[start[number] : end[number]]
        if wanted[number] != _NO_NEXT:
            succ = part // np.uint64(2)
            found = np.flatnonzero((part != _NO_NEXT) & (succ > wanted[number]))
            if len(found):
                pieces.append(found + start[number])
                rows.append(np.full(len(found), row[number]))
                ends.append(succ[found])
        part[:] = own[number]
    sizes = np.diff(edges).astype(np.int64)
    some = np.concatenate([np.zeros(0, np.int64), *pieces])
    need = Need(
        edges[some], sizes[some], np.concatenate([np.zeros(0, np.int64), *rows]),
        np.concatenate([np.zeros(0, np.uint64), *ends]),
    )  # fmt: skip
    return Slice(need, blocks_of(edges[where], sizes[where]))


def _covered(start: np.ndarray, end: np.ndarray, count: int) -> np.ndarray:
    """Which of ``count`` pieces lie in one of the ranges (bool)."""
    depth = np.zeros(count + 1, np.int64)
    np.add.at(depth, start, 1)
    np.add.at(depth, end, -1)
    return np.asarray(np.cumsum(depth)[:-1] > 0)


def reclaimable(work: Work, table: Table, valid: np.ndarray) -> BitMap:
    """What must be released before; empty: the segment can be reclaimed."""
    return pending(work, trimmed(table, valid))


def save(work: Work, info: SegmentInfo, table: Table, need: Need) -> int:
    """Append the needed versions to the undo log (not synced yet); bytes of content copied.

    :raises Corruption: a payload is damaged; the segment must stay.
    :raises JournalFull: no space for them; likewise.
    """
    kind = table.rows["kind"][need.row]
    work.require(int(need.counts[(kind == Kind.WRITE) | (kind == Kind.REF)].sum()))
    images = Images(work.undo)
    zero = (kind == Kind.ZERO) | (kind == Kind.TRIM)
    images.zero_ranges(need.starts[zero], need.counts[zero], need.end[zero])
    write = kind == Kind.WRITE
    if write.any():
        blocks, number = expand(need.starts[write], need.counts[write])
        payloads = Payloads(work.history.redo.file(info), info.name, table, work.buffer)
        images.copy(payloads, need.row[write][number], blocks, need.end[write][number])
    ref = kind == Kind.REF
    if ref.any():
        blocks, number = expand(need.starts[ref], need.counts[ref])
        sources = table.rows["arg"][need.row[ref]][number]
        _save_refs(work, images, sources, blocks, need.end[ref][number])
    return images.copied


def _save_refs(
    work: Work, images: Images, sources: np.ndarray, blocks: np.ndarray, ends: np.ndarray
) -> None:
    for source in np.unique(sources).tolist():
        mine = sources == source
        order = np.argsort(blocks[mine], kind="stable")
        its, its_ends = blocks[mine][order], ends[mine][order]
        for at in range(0, len(its), BUFFER_BLOCKS):
            part = its[at : at + BUFFER_BLOCKS]
            content = work.buffer[: len(part) * BLOCK]
            content[:] = bytes(len(content))
            work.history.read_into(content, part, int(source))
            images.add(part, its_ends[at : at + BUFFER_BLOCKS], content)


def reclaim(work: Work, info: SegmentInfo, table: Table, valid: np.ndarray, applied: int) -> int:
    """Save what is needed of the oldest segment and delete it; bytes of content copied.

    The caller has checked: complete, wholly <= ``applied``, `reclaimable` says nothing is left to
    release, and since an unclean end apply has passed the recovered end. The catalog says
    "reclaimed up to" before the file goes, so that a lost segment is told from a reclaimed one.

    :raises Corruption: a record that is needed is damaged, or it is not known what is; the segment
        stays.
    """
    if (table.rows["kind"] == Kind.LOST).any():
        raise Corruption(
            "damaged batches", file=info.name, first_seq=table.first_seq, last_seq=table.last_seq
        )
    openable = work.openable()
    held = BitMap()
    copied = 0
    for part in plan(work, table, valid, applied, openable):
        copied += save(work, info, table, part.need)
        held |= part.held
    work.publish()
    work.blocks.held -= written(table, valid) - held
    work.catalog.commit(("reclaimed", table.last_seq))
    work.frontier.curator_generation += 1
    work.storage.unlink(info.name)
    work.storage.sync_dir("redo")
    return copied
