"""What the unapplied records say about the disk: the upper layer of every live read.

Content of a block, newest first: the unapplied tail, else zero if the block is masked, else the
backing. The tail is a list of *generations*, each a stretch of records that lie in one segment of
the redo log. A generation is a dict from block to the place of its content, for small records, and
a list of disjoint extents for large ones; the dict is newer. It is dropped whole when `applied`
passes its last record: nothing in it is ever taken out one by one because of that.
A record that is applied and still here is no mistake: what it says is what the backing holds.

Synchronous, and without I/O: places are handed out as *pieces*, and `reads` fetches them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import numpy as np
from pyroaring import BitMap

from journal.format import BLOCK, SUM_LARGE, SUM_SMALL, Kind, sum_count
from journal.storage import File

if TYPE_CHECKING:
    from journal.segment import Table

# Values of a generation's dict are offsets in the segment (never below its header's page), or:
ZEROES: Final = 1
MASKED: Final = 2

# From so many blocks on a record is one extent: its payload then has a checksum per SUM_LARGE.
EXTENT_BLOCKS_MIN: Final = SUM_LARGE // BLOCK
# A generation is dropped in one step; this bounds how long that takes.
GENERATION_BLOCKS_MAX: Final = 16384
GENERATION_EXTENTS_MAX: Final = 1024

# Kinds of pieces.
BACKING: Final = 0
ZERO: Final = 1
SMALL: Final = 2  # consecutive blocks whose contents are consecutive, a checksum each
LARGE: Final = 3  # part of one large record


class Extent(NamedTuple):
    """A large record, or a part of it that is still the newest. ``first`` is the record's block."""

    kind: int
    first: int
    offset: int
    nbytes: int
    sums: Sequence[int]


# (kind, first block, number of blocks, generation or None, offset or extent or None)
Piece: TypeAlias = "tuple[int, int, int, Generation | None, int | Extent | None]"


class Generation:
    """A stretch of records in one segment. ``last_seq``: the newest of them."""

    __slots__ = (
        "bases", "blocks", "ends", "extents", "file", "firsts", "last_seq", "masking", "segment",
        "starts", "sums",
    )  # fmt: skip

    def __init__(self, segment: int, file: File) -> None:
        self.segment = segment
        self.file = file
        self.last_seq = 0
        self.masking = False  # whether any record is a trim
        self.blocks: dict[int, int] = {}
        # Where the runs of small contents begin, and the number of each one's first checksum.
        self.bases: list[int] = []
        self.firsts: list[int] = []
        self.sums = array("Q")
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.extents: list[Extent] = []

    @property
    def full(self) -> bool:
        """Whether it should not grow any more."""
        return (
            len(self.sums) >= GENERATION_BLOCKS_MAX
            or len(self.blocks) >= GENERATION_BLOCKS_MAX
            or len(self.extents) >= GENERATION_EXTENTS_MAX
        )

    def add_run(self, blocks: Sequence[int], offset: int, sums: list[int], last_seq: int) -> None:
        """Small contents, one after the other in the segment from ``offset`` on, in order."""
        self.bases.append(offset)
        self.firsts.append(len(self.sums))
        self.sums.fromlist(sums)
        self.last_seq = last_seq
        if len(blocks) == 1:
            self.blocks[blocks[0]] = offset
        else:
            places = range(offset, offset + len(blocks) * BLOCK, BLOCK)
            self.blocks.update(zip(blocks, places))  # noqa: B905  # strict costs a third more

    def add_without_content(self, kind: int, first: int, count: int) -> None:
        """A zero, a trim or a ref."""
        if kind == Kind.TRIM:
            self.masking = True
        if count < EXTENT_BLOCKS_MIN and kind != Kind.REF:
            value = MASKED if kind == Kind.TRIM else ZEROES
            self.blocks.update(dict.fromkeys(range(first, first + count), value))
        else:
            self.add_extent(first, count, Extent(kind, first, 0, 0, ()))

    def add_extent(self, first: int, count: int, extent: Extent) -> None:
        """A large record: what is below it in this generation goes."""
        end = first + count
        blocks = self.blocks
        if blocks:
            if count <= len(blocks):
                for block in range(first, end):
                    blocks.pop(block, None)
            else:
                for block in [block for block in blocks if first <= block < end]:
                    del blocks[block]
        starts, ends, extents = self.starts, self.ends, self.extents
        low = bisect_right(ends, first)
        high = bisect_left(starts, end)
        new_starts, new_ends, new_extents = [first], [end], [extent]
        if low < high:
            if starts[low] < first:
                new_starts.insert(0, starts[low])
                new_ends.insert(0, first)
                new_extents.insert(0, extents[low])
            if ends[high - 1] > end:
                new_starts.append(end)
                new_ends.append(ends[high - 1])
                new_extents.append(extents[high - 1])
        starts[low:high] = new_starts
        ends[low:high] = new_ends
        extents[low:high] = new_extents

    def sum_of(self, offset: int) -> int:
        """Checksum of the small content at ``offset``."""
        run = bisect_right(self.bases, offset) - 1
        return self.sums[self.firsts[run] + (offset - self.bases[run]) // BLOCK]

    def cut(self, first: int, count: int, pieces: list[Piece], gaps: list[tuple[int, int]]) -> None:
        """Split a range into what this generation knows (``pieces``) and the rest (``gaps``)."""
        end = first + count
        blocks = self.blocks
        at = first
        if blocks:
            if count <= len(blocks):
                hits = [block for block in range(first, end) if block in blocks]
            else:
                hits = sorted([block for block in blocks if first <= block < end])
            for block in hits:
                if block > at:
                    self._cut_extents(at, block, pieces, gaps)
                value = blocks[block]
                if value > MASKED:
                    pieces.append((SMALL, block, 1, self, value))
                else:
                    pieces.append((ZERO, block, 1, None, None))
                at = block + 1
        if at < end:
            self._cut_extents(at, end, pieces, gaps)

    def _cut_extents(
        self, at: int, end: int, pieces: list[Piece], gaps: list[tuple[int, int]]
    ) -> None:
        starts, ends = self.starts, self.ends
        number = bisect_right(ends, at)
        while at < end and number < len(starts) and starts[number] < end:
            if starts[number] > at:
                gaps.append((at, starts[number] - at))
                at = starts[number]
            upto = min(end, ends[number])
            extent = self.extents[number]
            if extent.kind == Kind.WRITE:
                pieces.append((LARGE, at, upto - at, self, extent))
            else:
                assert extent.kind != Kind.REF, "a disk with unapplied refs is not served"
                pieces.append((ZERO, at, upto - at, None, None))
            at = upto
            number += 1
        if at < end:
            gaps.append((at, end - at))

    def mask_into(self, masks: BitMap) -> None:
        """Bring the masks to where this generation ends."""
        if not masks and not self.masking:
            return
        for start, end, extent in zip(self.starts, self.ends, self.extents, strict=True):
            if extent.kind == Kind.TRIM:
                masks.add_range(start, end)
            else:
                masks.remove_range(start, end)
        if not self.masking:
            masks -= BitMap(self.blocks.keys())
            return
        masks -= BitMap([block for block, value in self.blocks.items() if value != MASKED])
        masks |= BitMap([block for block, value in self.blocks.items() if value == MASKED])


class Overlay:
    """Generations, oldest first, above the masks as of the last one dropped.

    ``file(segment)`` gives the open file of a segment.
    """

    def __init__(self, masks: BitMap, file: Callable[[int], File]) -> None:
        self.masks = masks
        self._file = file
        self._newest: Generation | None = None
        self.generations: deque[Generation] = deque()

    @property
    def empty(self) -> bool:
        """Whether every block's content is in the backing."""
        return not self.generations and not self.masks

    @property
    def oldest_segment(self) -> int | None:
        """The oldest segment that a read may need; None when there is none."""
        return self.generations[0].segment if self.generations else None

    def generation(self, segment: int) -> Generation:
        """The generation that takes the next records, which lie in ``segment``."""
        newest = self._newest
        if newest is None or newest.segment != segment or newest.full:
            return self.begin_generation(segment)
        return newest

    def begin_generation(self, segment: int) -> Generation:
        """A new generation, although the last one may not be full."""
        self._newest = newest = Generation(segment, self._file(segment))
        self.generations.append(newest)
        return newest

    def drop(self, applied: int) -> bool:
        """Forget generations that are applied, and bring the masks up to them: one step.

        ``applied`` was read before, and only what is looked up afterwards may use it.
        """
        generations = self.generations
        dropped = False
        while generations and generations[0].last_seq <= applied:
            generations.popleft().mask_into(self.masks)
            dropped = True
        if not generations:
            self._newest = None
        return dropped

    def forget_all(self) -> None:
        """Nothing that was recorded before holds any more (a gap begins)."""
        self.generations.clear()
        self._newest = None
        self.masks.clear()

    def find(self, block: int) -> Piece:
        """Where one block's content lies."""
        for generation in reversed(self.generations):
            value = generation.blocks.get(block)
            if value is not None:
                if value > MASKED:
                    return (SMALL, block, 1, generation, value)
                return (ZERO, block, 1, None, None)
            if generation.starts:
                pieces: list[Piece] = []
                generation.cut(block, 1, pieces, [])
                if pieces:
                    return pieces[0]
        if self.masks and block in self.masks:
            return (ZERO, block, 1, None, None)
        return (BACKING, block, 1, None, None)

    def resolve(self, first: int, count: int) -> list[Piece]:
        """Where the contents of ``count`` blocks lie, in order, neighbours of one kind together."""
        if self.empty:
            return [(BACKING, first, count, None, None)]
        if count == 1:
            return [self.find(first)]
        pieces: list[Piece] = []
        gaps = [(first, count)]
        for generation in reversed(self.generations):
            if not gaps:
                break
            rest: list[tuple[int, int]] = []
            for start, length in gaps:
                generation.cut(start, length, pieces, rest)
            gaps = rest
        for start, length in gaps:
            pieces.extend(self._below(start, length))
        pieces.sort(key=_first_block)
        return _joined(pieces)

    def _below(self, first: int, count: int) -> Iterator[Piece]:
        """A range that no unapplied record touches: masked or backing."""
        masks, end = self.masks, first + count
        at = first
        masked = masks.range_cardinality(first, end) if masks else 0
        while at < end:
            if masked:
                start = masks.next_set_bit(at)
            else:
                start = end
            if start > at:
                yield (BACKING, at, start - at, None, None)
                at = start
            if at < end:
                stop = _end_of_set(masks, at, end)
                yield (ZERO, at, stop - at, None, None)
                masked -= stop - at
                at = stop


def _first_block(piece: Piece) -> int:
    return piece[1]


def _end_of_set(masks: BitMap, start: int, end: int) -> int:
    """Where the stretch of set bits that begins at ``start`` ends, at most ``end``."""
    known = start + 1
    step = 1
    while known < end:
        upto = min(end, known + step)
        if masks.contains_range(known, upto):
            known = upto
            step *= 2
        elif step == 1:
            break
        else:
            step = max(1, step // 4)
    return known


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    last = None
    for piece in pieces:
        kind, _, count, generation, where = piece
        if last is not None and last[0] == kind and last[3] is generation:
            before = last[4]
            if kind in (ZERO, BACKING):
                last = (kind, last[1], last[2] + count, None, None)
                joined[-1] = last
                continue
            if kind == SMALL:
                assert isinstance(before, int)
                if where == before + last[2] * BLOCK:
                    last = (kind, last[1], last[2] + count, generation, before)
                    joined[-1] = last
                    continue
        last = piece
        joined.append(piece)
    return joined


# ------------------------------------------------------------------------------- after a restart
def load_table(overlay: Overlay, table: Table, versions: np.ndarray) -> None:
    """Take in the rows of a table that ``versions`` (bool) selects, in order; all are unapplied."""
    rows = table.rows
    kind, nblocks = rows["kind"], rows["nblocks"]
    small = versions & (kind == Kind.WRITE) & (nblocks < EXTENT_BLOCKS_MIN)
    others = np.flatnonzero(versions & ~small).tolist()
    done = 0
    for at in [*others, len(rows)]:
        for low in range(done, at, GENERATION_BLOCKS_MAX // EXTENT_BLOCKS_MIN):
            high = min(at, low + GENERATION_BLOCKS_MAX // EXTENT_BLOCKS_MIN)
            chosen = np.flatnonzero(small[low:high]) + low
            if len(chosen):
                _load_small(overlay, table, chosen)
        if at < len(rows):
            _load_other(overlay, table, at)
        done = at + 1


def _load_small(overlay: Overlay, table: Table, chosen: np.ndarray) -> None:
    generation = overlay.generation(table.segment)
    rows = table.rows[chosen]
    counts = rows["nblocks"].astype(np.int64)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    blocks = np.repeat(rows["block"].astype(np.int64), counts) + within
    offsets = np.repeat(rows["payload"].astype(np.int64), counts) + within * SUM_SMALL
    sums = table.sums[np.repeat(rows["sum"].astype(np.int64), counts) + within]
    breaks = np.flatnonzero(np.diff(offsets) != BLOCK) + 1
    firsts = np.concatenate([[0], breaks])
    generation.bases.extend(offsets[firsts].tolist())
    generation.firsts.extend((firsts + len(generation.sums)).tolist())
    generation.sums.frombytes(sums.astype("=u8").tobytes())
    generation.blocks.update(zip(blocks.tolist(), offsets.tolist(), strict=True))
    generation.last_seq = table.first_seq + int(chosen[-1])


def _load_other(overlay: Overlay, table: Table, row: int) -> None:
    generation = overlay.generation(table.segment)
    entry = table.rows[row]
    kind, first, count = int(entry["kind"]), int(entry["block"]), int(entry["nblocks"])
    if kind == Kind.WRITE:
        number, nbytes = int(entry["sum"]), count * BLOCK
        sums = table.sums[number : number + sum_count(nbytes)].tolist()
        extent = Extent(kind, first, int(entry["payload"]), nbytes, sums)
        generation.add_extent(first, count, extent)
    else:
        generation.add_without_content(kind, first, count)
    generation.last_seq = table.first_seq + row
