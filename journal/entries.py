"""Index entries in memory: where versions and before-images of blocks lie, as sorted columns.

An entry says "the record at ``loc`` gave these blocks their content at ``seq``" (redo log), or
"holds what they were just before ``seq``" (undo log; there seq is the image's end). Its blocks are
one aligned piece of one of four sizes, the levels: 4 KiB, 64 KiB, 1 MiB, 1 GiB. A record of one
block is one entry of level 0; a larger one is cut into the largest pieces that fit, so that a trim
of 1 TiB is a thousand entries and not 268 million.

``key``  level << 60 | first block >> the level's shift
``seq``  the record's seq, or the image's end
``loc``  code of its kind << 60 | segment << 32 | row of the segment's table

Entries are sorted by (key, seq), so all that is known of one piece lies together, oldest first. A
block is looked up once per level, and what counts is the best over **all** levels: a block may have
been written alone at seq 5 and as part of a trim at seq 9. The n-th block of a record is the
block's number minus ``table.rows[row]["block"]``, whatever the level.

Everything here works on whole columns of u64; seq 0 stands for "none".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from journal.errors import Corruption
from journal.format import BLOCKS_MAX, SEGMENT_ID_MAX, VERSIONS, Kind
from journal.segment import Table

Column = npt.NDArray[np.uint64]
Seqs = int | Column

LEVEL_SHIFTS: Final = (0, 4, 8, 18)  # of 4 KiB blocks: 4 KiB, 64 KiB, 1 MiB, 1 GiB
KEY_LEVEL_SHIFT: Final = 60
KEY_NUMBER_MASK: Final = (1 << KEY_LEVEL_SHIFT) - 1
SEQ_MAX: Final = (1 << 64) - 1
LOC_KIND_SHIFT: Final = 60
LOC_SEGMENT_SHIFT: Final = 32
LOC_ROW_MASK: Final = (1 << LOC_SEGMENT_SHIFT) - 1
# A page of a run begins with an entry that no other page begins with: it takes more equal entries
# than fill a page to break that, and nobody needs the 65th copy of one before-image.
EQUALS_MAX: Final = 64

_CODES: Final = {kind: int(kind) for kind in VERSIONS} | {Kind.IMAGE: 5, Kind.IMAGE_ZERO: 6}
_CODE_OF: Final = np.zeros(256, np.uint64)
_KIND_OF: Final = np.zeros(16, np.uint8)
for _kind, _code in _CODES.items():
    _CODE_OF[_kind] = _code
    _KIND_OF[_code] = _kind
_SHIFT_OF: Final = np.array(LEVEL_SHIFTS, np.uint64)
_LEVEL: Final = np.uint64(KEY_LEVEL_SHIFT)
_NUMBER: Final = np.uint64(KEY_NUMBER_MASK)
_COMPACT_LEVEL: Final = np.uint64((BLOCKS_MAX - 1).bit_length())  # bits of a piece's number
_ROW_BITS: Final = np.uint64(30)  # with number and level 64 bits
_ROW: Final = np.uint64((1 << 30) - 1)
_SEGMENT: Final = np.uint64(SEGMENT_ID_MAX - 1)


def kinds_of(locs: Column) -> npt.NDArray[np.uint8]:
    """The `Kind` of each loc's record; 0 for loc 0."""
    return _KIND_OF[(locs >> LOC_KIND_SHIFT).astype(np.intp)]


def segments_of(locs: Column) -> Column:
    """The segment of each loc's record."""
    return (locs >> np.uint64(LOC_SEGMENT_SHIFT)) & _SEGMENT


def rows_of(locs: Column) -> Column:
    """The row of each loc's record in its segment's table."""
    return locs & np.uint64(LOC_ROW_MASK)


def unpack_loc(loc: int) -> tuple[int, int, int]:
    """(kind, segment, row) of one loc."""
    segment = loc >> LOC_SEGMENT_SHIFT & (SEGMENT_ID_MAX - 1)
    return int(_KIND_OF[loc >> LOC_KIND_SHIFT]), segment, loc & LOC_ROW_MASK


def piece_key(level: int, block: int) -> int:
    """The key of the piece of a level that a block is in."""
    return level << KEY_LEVEL_SHIFT | block >> LEVEL_SHIFTS[level]


class Entries:
    """Parallel columns ``key``, ``seq``, ``loc``, sorted by (key, seq)."""

    __slots__ = ("_levels", "key", "loc", "seq")

    def __init__(self, key: Column, seq: Column, loc: Column) -> None:
        assert len(key) == len(seq) == len(loc)
        self.key, self.seq, self.loc = key, seq, loc
        self._levels: list[tuple[int, int, int]] | None = None

    @classmethod
    def empty(cls) -> Entries:
        """No entries."""
        nothing = np.zeros(0, np.uint64)
        return cls(nothing, nothing, nothing)

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, which: slice | np.ndarray) -> Entries:
        """A part, by slice, mask or ascending positions."""
        return Entries(self.key[which], self.seq[which], self.loc[which])

    @property
    def levels(self) -> list[tuple[int, int, int]]:
        """(level, first position, end position) of every level that has entries."""
        if self._levels is None:
            bounds = np.arange(len(LEVEL_SHIFTS) + 1, dtype=np.uint64) << KEY_LEVEL_SHIFT
            at = self.key.searchsorted(bounds).tolist()
            self._levels = [
                (level, at[level], at[level + 1])
                for level in range(len(LEVEL_SHIFTS))
                if at[level] < at[level + 1]
            ]
        return self._levels

    def ranges(self) -> tuple[Column, Column]:
        """First block and number of blocks of each entry."""
        shift = _SHIFT_OF[(self.key >> _LEVEL).astype(np.intp)]
        return (self.key & _NUMBER) << shift, np.uint64(1) << shift

    def newest_le(self, blocks: Column, seq: Seqs) -> tuple[Column, Column]:
        """For each block its newest version <= ``seq`` (one for all, or a column).

        Seqs and locs, 0 for none.
        """
        seqs, locs = np.zeros(len(blocks), np.uint64), np.zeros(len(blocks), np.uint64)
        for level, first, end in self.levels:
            want = piece_keys(level, blocks)
            at = rank_right(self.key[first:end], self.seq[first:end], want, seq)
            at = np.maximum(at + (first - 1), first)
            found = self.seq[at]
            better = (self.key[at] == want) & (found <= seq) & (found > seqs)
            seqs[better], locs[better] = found[better], self.loc[at[better]]
        return seqs, locs

    def smallest_gt(self, blocks: Column, seq: Seqs) -> tuple[Column, Column]:
        """For each block its smallest seq (or end) > ``seq``: seqs and locs, 0 for none."""
        seqs = np.full(len(blocks), SEQ_MAX, np.uint64)
        locs = np.zeros(len(blocks), np.uint64)
        for level, first, end in self.levels:
            want = piece_keys(level, blocks)
            at = rank_right(self.key[first:end], self.seq[first:end], want, seq)
            at = np.minimum(at + first, end - 1)
            found = self.seq[at]
            better = (self.key[at] == want) & (found > seq) & (found < seqs)
            seqs[better], locs[better] = found[better], self.loc[at[better]]
        seqs[seqs == SEQ_MAX] = 0
        return seqs, locs

    def newest_le_one(self, block: int, seq: int) -> tuple[int, int]:
        """`newest_le` of one block: (seq, loc), (0, 0) for none. Without columns: 3 us a level."""
        best = (0, 0)
        for level, _, _ in self.levels:
            low, high = self._of_piece(piece_key(level, block))
            at = low + int(self.seq[low:high].searchsorted(np.uint64(seq), "right"))
            if at > low:
                best = max(best, (int(self.seq[at - 1]), int(self.loc[at - 1])))
        return best

    def smallest_gt_one(self, block: int, seq: int) -> tuple[int, int]:
        """`smallest_gt` of one block: (seq, loc), (0, 0) for none."""
        best = (0, 0)
        for level, _, _ in self.levels:
            low, high = self._of_piece(piece_key(level, block))
            at = low + int(self.seq[low:high].searchsorted(np.uint64(seq), "right"))
            if at < high:
                found = int(self.seq[at]), int(self.loc[at])
                if not best[0] or found < best:
                    best = found
        return best

    def _of_piece(self, key: int) -> tuple[int, int]:
        """First and end position of the entries of one piece."""
        wanted = np.uint64(key)
        low = int(self.key.searchsorted(wanted))
        if low == len(self.key) or self.key[low] != wanted:
            return low, low
        return low, int(self.key.searchsorted(wanted, "right"))

    def oldest(self, blocks: Column) -> Column:
        """The seq of each block's oldest version."""
        return self.smallest_gt(blocks, 0)[0]

    def ends_le(self, blocks: Column, seqs: Seqs) -> Column:
        """Each block's largest end <= its seq."""
        return self.newest_le(blocks, seqs)[0]

    def successors(self, blocks: Column, seqs: Seqs, upto: int) -> tuple[Column, Column]:
        """Each block's next version after its seq, if that is <= ``upto``: seqs and locs."""
        return at_most(self.smallest_gt(blocks, seqs), upto)

    def overlapping(self, first_block: int, end_block: int) -> Entries:
        """The entries that have a block in [first_block, end_block), of all levels."""
        parts = []
        for level, first, end in self.levels:
            keys = self.key[first:end]
            low = int(keys.searchsorted(np.uint64(piece_key(level, first_block))))
            high = int(keys.searchsorted(np.uint64(piece_key(level, end_block - 1)), "right"))
            if low < high and first_block < end_block:
                parts.append(self[first + low : first + high])
        return concatenated(parts)

    def between(self, first_seq: int, last_seq: int) -> Entries:
        """The entries with a seq in [first_seq, last_seq]."""
        if not len(self) or (first_seq <= 1 and last_seq >= SEQ_MAX):
            return self
        return self[(self.seq >= first_seq) & (self.seq <= last_seq)]


def piece_keys(level: int, blocks: Column) -> Column:
    """The key of the piece of a level that each block is in."""
    if not level:
        return blocks
    return (blocks >> np.uint64(LEVEL_SHIFTS[level])) | np.uint64(level << KEY_LEVEL_SHIFT)


def at_most(found: tuple[Column, Column], upto: int) -> tuple[Column, Column]:
    """Lookups' answers without those above ``upto``."""
    seqs, locs = found
    beyond = seqs > upto
    seqs[beyond], locs[beyond] = 0, 0
    return seqs, locs


def rank_right(keys: Column, seqs: Column, want: Column, upto: Seqs) -> npt.NDArray[np.intp]:
    """How many entries are <= (want, upto), for each pair."""
    low, high = keys.searchsorted(want), keys.searchsorted(want, "right")
    widest = int((high - low).max(initial=0))
    last = len(seqs) - 1
    for _ in range(widest.bit_length()):
        middle = (low + high) >> 1
        above = (low < high) & (seqs[np.minimum(middle, last)] <= upto)
        high = np.where(above, high, np.minimum(high, middle))
        low = np.where(above, middle + 1, low)
    return low


def is_member(ascending: np.ndarray, values: np.ndarray) -> npt.NDArray[np.bool_]:
    """For each value whether it is among the ascending ones."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    at = np.minimum(ascending.searchsorted(values), len(ascending) - 1)
    result: npt.NDArray[np.bool_] = ascending[at] == values
    return result


def concatenated(parts: Sequence[Entries]) -> Entries:
    """Parts put together that follow each other in the order of (key, seq)."""
    if not parts:
        return Entries.empty()
    if len(parts) == 1:
        return parts[0]
    return Entries(
        np.concatenate([part.key for part in parts]),
        np.concatenate([part.seq for part in parts]),
        np.concatenate([part.loc for part in parts]),
    )


def merged(parts: Sequence[Entries]) -> Entries:
    """All entries of several, sorted. Equal ones are kept, in the order of the parts."""
    parts = [part for part in parts if len(part)]
    together = concatenated(parts)
    return together if len(parts) < 2 else together[_order(together.key, together.seq)]


def merged_slices(sources: Sequence[Iterator[Entries]]) -> Iterator[Entries]:
    """All entries of sources that each yield ascending slices, sorted, again in slices.

    One slice of every source is in memory at a time. Equal (key, seq) come in one slice.
    """
    open_sources = dict(enumerate(sources))
    heads = [Entries.empty()] * len(sources)
    starved = list(open_sources)
    while True:
        for number in starved:
            following = next(open_sources[number], None)
            if following is None:
                del open_sources[number]
            else:
                heads[number] = concatenated(
                    [part for part in (heads[number], following) if len(part)]
                )
        # What a source has not shown yet is not below the last it has shown.
        ends = {
            n: (int(heads[n].key[-1]), int(heads[n].seq[-1])) for n in open_sources if len(heads[n])
        }
        starved = [number for number in open_sources if number not in ends]
        if starved:
            continue
        if not ends:
            break
        bound = min(ends.values())
        starved = [number for number, end in ends.items() if end == bound]
        ready = []
        for number, head in enumerate(heads):
            count = _rank_left(head, *bound)
            ready.append(head[:count])
            heads[number] = head[count:]
        part = merged(ready)
        if len(part):
            yield part
    rest = merged(heads)
    if len(rest):
        yield rest


def _rank_left(entries: Entries, key: int, seq: int) -> int:
    """How many entries are below (key, seq)."""
    low = int(entries.key.searchsorted(np.uint64(key)))
    high = int(entries.key.searchsorted(np.uint64(key), "right"))
    return low + int(entries.seq[low:high].searchsorted(np.uint64(seq)))


def _order(key: Column, seq: Column) -> npt.NDArray[np.intp]:
    """Stable order by (key, seq): of one 64-bit number where both fit, which is much faster."""
    compact = ((key >> _LEVEL) << _COMPACT_LEVEL) | (key & _NUMBER)
    key_first, seq_first = int(compact.min()), int(seq.min())
    seq_bits = (int(seq.max()) - seq_first).bit_length()
    if (int(compact.max()) - key_first).bit_length() + seq_bits > 64:
        return np.lexsort((seq, key))
    compact -= np.uint64(key_first)
    if seq_bits < 64:  # else all keys are equal
        compact <<= np.uint64(seq_bits)
    compact |= seq - np.uint64(seq_first)
    return compact.argsort(kind="stable")


def without_surplus(entries: Entries) -> Entries:
    """At most EQUALS_MAX of equal (key, seq): those in the newest segments."""
    key, seq = entries.key, entries.seq
    if len(key) <= EQUALS_MAX:
        return entries
    if not (
        (key[EQUALS_MAX:] == key[:-EQUALS_MAX]) & (seq[EQUALS_MAX:] == seq[:-EQUALS_MAX])
    ).any():
        return entries
    order = np.lexsort((segments_of(entries.loc), seq, key))
    entries = entries[order]
    key, seq = entries.key, entries.seq
    keep = np.ones(len(key), bool)
    keep[:-EQUALS_MAX] = (key[EQUALS_MAX:] != key[:-EQUALS_MAX]) | (
        seq[EQUALS_MAX:] != seq[:-EQUALS_MAX]
    )
    return entries[keep]


# -------------------------------------------------------------------------- from a segment's table
def entries_of(table: Table, *, valid: npt.NDArray[np.bool_] | None = None) -> Entries:
    """The entries of a table's versions (redo log) or before-images (undo log).

    ``valid``: one truth value per row; rows without are left out (refs of a rollback that is void).
    Other records (bookmarks, ...) have no entries.

    :raises Corruption: a record reaches beyond the largest possible disk.
    """
    rows = table.rows
    codes = _CODE_OF[rows["kind"]]
    taken = (codes != 0) & (rows["nblocks"] != 0)
    if valid is not None:
        assert len(valid) == len(rows)
        taken &= valid
    row = np.flatnonzero(taken).astype(np.uint64)
    block = rows["block"][taken].astype(np.uint64)
    nblocks = rows["nblocks"][taken].astype(np.uint64)
    if not len(row):
        return Entries.empty()
    _check_bounds(table, row, block, nblocks)
    if int(nblocks.max()) == 1:
        number = block
    else:
        number, row = _cut(block, nblocks, row)
    images = bool((rows["kind"][taken] >= Kind.IMAGE).any())
    if not images and len(rows) <= int(_ROW) + 1:
        # Rows are in order of seq: sorting one number of both gives the order and the row.
        number <<= _ROW_BITS
        number |= row
        number.sort()
        row = number & _ROW
        number >>= _ROW_BITS
        seq = row + np.uint64(table.first_seq)
    else:
        kinds = rows["kind"][row.astype(np.intp)]
        ends = rows["arg"][row.astype(np.intp)].astype(np.uint64)
        seq = np.where(kinds >= Kind.IMAGE, ends, row + np.uint64(table.first_seq))
        order = _order(_spread(number), seq)
        number, row, seq = number[order], row[order], seq[order]
    loc = codes[row.astype(np.intp)] << np.uint64(LOC_KIND_SHIFT)
    loc |= row
    loc |= np.uint64(table.segment << LOC_SEGMENT_SHIFT)
    return without_surplus(Entries(_spread(number), seq, loc))


def _check_bounds(table: Table, row: Column, block: Column, nblocks: Column) -> None:
    if int(block.max()) < BLOCKS_MAX and int((block + nblocks).max()) <= BLOCKS_MAX:
        return
    at = int(np.flatnonzero((block >= BLOCKS_MAX) | (block + nblocks > BLOCKS_MAX))[0])
    seq = table.first_seq + int(row[at])
    raise Corruption(
        "record beyond the largest disk", file=f"segment {table.segment}",
        first_seq=seq, last_seq=seq,
    )  # fmt: skip


def _spread(number: Column) -> Column:
    """Keys from piece numbers with the level in the bits right above them."""
    level = number >> _COMPACT_LEVEL
    return (level << _LEVEL) | (number & np.uint64(BLOCKS_MAX - 1))


def _cut(start: Column, nblocks: Column, row: Column) -> tuple[Column, Column]:
    """Records cut into the largest aligned pieces: numbers (see `_spread`) and rows, unsorted.

    Level by level: what is left and right of the part aligned for the next level becomes pieces,
    the part itself goes on. All records at once; the loop is over the levels.
    """
    end = start + nblocks
    numbers, rows = [], []
    for level, shift in enumerate(LEVEL_SHIFTS):
        if level + 1 < len(LEVEL_SHIFTS):
            up = np.uint64(LEVEL_SHIFTS[level + 1])
            inner_start = ((start + np.uint64((1 << int(up)) - 1)) >> up) << up
            inner_end = (end >> up) << up
            whole = inner_start >= inner_end  # nothing for the next level
            left_end = np.where(whole, end, inner_start)
            right_start = np.where(whole, end, inner_end)
        else:
            whole = np.ones(len(start), bool)
            left_end = right_start = end
        for low, high in ((start, left_end), (right_start, end)):
            count = ((high - low) >> shift).astype(np.intp)
            total = int(count.sum())
            if total:
                first = (low >> shift) | np.uint64(level << int(_COMPACT_LEVEL))
                before = (np.cumsum(count) - count).astype(np.uint64)
                numbers.append(np.repeat(first - before, count) + np.arange(total, dtype=np.uint64))
                rows.append(np.repeat(row, count))
        if whole.all():
            break
        start, end, row = inner_start[~whole], inner_end[~whole], row[~whole]
    return np.concatenate(numbers), np.concatenate(rows)
