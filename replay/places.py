"""Where the content of points' blocks lies, remembered: views are read in order, and again.

**Why a place may be remembered.** What the disk held at an openable point never changes, and
neither does what lies at a place of a log. So a place that was R1's answer once stays a right one
as long as its segment is there; when that is gone (reclaimed, swept: what was needed was copied
before), its places are dropped and looked up again. That a block is in *neither* log is different:
it is true of one snapshot only, since what the backing holds is overwritten as soon as it was
saved. It is believed while nothing was published since that snapshot, and that is asked again after
the backing was read; otherwise the block is resolved anew.

Looking up a block alone costs some ten times its share of a lookup of 4,096 neighbours, a *chunk*.
A chunk is looked up as a whole once so many of its blocks were wanted that it would have paid.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np

from journal.entries import LOC_SEGMENT_SHIFT, kinds_of
from journal.errors import Corruption, Vanished
from journal.format import BLOCK, SUM_LARGE, Kind, checksum
from journal.limits import FILES_OPEN_MAX
from journal.run_format import RunDamaged
from journal.segment import SegmentInfo, Table
from journal.segment_cache import Slices
from journal.storage import IOV_MAX, Buffer, Room
from replay.facts import Log, Snapshot
from replay.history import History, Piece, fill_zero

CHUNK_SHIFT: Final = 12
CHUNK_BLOCKS: Final = 1 << CHUNK_SHIFT
CHUNKS_MAX: Final = 1024  # 70 KiB each
FILL_AFTER: Final = 64  # blocks that were wanted of a chunk; twice as many each time it is renewed
_FILL_DOUBLINGS: Final = 6
_WANTED_MAX: Final = 1 << 16  # chunks of which it is counted how many blocks were wanted
PART_BLOCKS: Final = FILES_OPEN_MAX // 2  # read at once: all the files it takes stay open
_ZEROES_SHARE: Final = 4  # fewer than a fourth of what is copied: copied as well
_PIECE_BLOCKS: Final = 4  # pieces that are longer on average are read, not gathered
assert PART_BLOCKS <= IOV_MAX
_SEGMENTS_MAX: Final = 1 << 14  # some of them gone: look which

_UNKNOWN, _SMALL, _LARGE, _ZERO, _BACKING = range(5)
_LARGE_BLOCKS: Final = SUM_LARGE // BLOCK
_SEGMENT: Final = np.uint64(LOC_SEGMENT_SHIFT)
_OFFSET: Final = (1 << LOC_SEGMENT_SHIFT) - 1
_ROW: Final = np.uint64(_OFFSET)
_CHUNK: Final = np.uint64(CHUNK_SHIFT)
_WITHIN: Final = np.uint64(CHUNK_BLOCKS - 1)

_NONE: Final = np.zeros(0, np.intp)
_ZEROES: Final = bytes(BLOCK)
_ZEROES_SUM: Final = np.uint64(checksum(_ZEROES))
_NOWHERE: Final = 0  # in place of a segment's name: zeroes

Key = tuple[int, int]  # point, chunk
Stamp = tuple[tuple[int, int], int]  # generations, published


class Places:
    """Those of all points that one process reads; the places longest not used are forgotten.

    ``state`` says what a block's place is, ``where`` holds for a block with a checksum of its own
    what a loc does, with the offset in the file instead of the row; for one of a large record the
    loc. For one thread at a time, the one that uses the history.
    """

    def __init__(
        self, history: History, *, chunks: int = CHUNKS_MAX, fill_after: int = FILL_AFTER
    ) -> None:
        self._history = history
        self._fill_after = fill_after
        size = chunks * CHUNK_BLOCKS  # of zeroes: takes memory only where something was written
        self._state = np.zeros(size, np.uint8)
        self._where, self._sum = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
        self._slots: OrderedDict[Key, int] = OrderedDict()
        self._free = list(range(chunks))
        self._stamps: list[Stamp | None] = [None] * chunks
        self._fills = [0] * chunks
        self._wanted: dict[Key, int] = {}
        self._segments: dict[int, tuple[Log, SegmentInfo]] = {}
        self._room = Room(PART_BLOCKS, BLOCK)
        self._slices: dict[int, Slices] = {}  # of segments, until a file is closed
        self._closed = -1, -1
        self._voided = 0

    def read_into(self, out: memoryview, blocks: np.ndarray, seq: int) -> None:
        """Content of ``blocks`` (u64, in any order) at ``seq``, one after the other, into ``out``.

        :raises Corruption: what holds the content is damaged.
        :raises OSError: a file or the backing could not be read.
        """
        try:
            late = self._read(out, blocks, seq)
        except Vanished:
            self._drop_gone()
            late = np.arange(len(blocks))
        if not len(late):
            return
        wanted, places = np.unique(blocks[late], return_inverse=True)
        content = bytearray(len(wanted) * BLOCK)
        self._history.read_into(content, wanted, seq)
        with memoryview(content) as view:
            for at, place in zip((late * BLOCK).tolist(), (places * BLOCK).tolist(), strict=True):
                out[at : at + BLOCK] = view[place : place + BLOCK]

    def _read(self, out: memoryview, blocks: np.ndarray, seq: int) -> np.ndarray:
        """Read what is known; which of the blocks (positions) must be resolved anew."""
        history = self._history
        if history.snapshot.told.voided != self._voided:
            self.clear()
        now = self._now()
        at, slots = self._find(blocks, seq)
        state = self._state[at]
        if -1 in slots:
            state[at < 0] = _UNKNOWN
        stale = [slot for slot in slots if self._stamps[slot] != now]
        if stale:
            old = np.isin(at >> CHUNK_SHIFT, stale)
            state[old & (state == _BACKING)] = _UNKNOWN
        # Lists, since most requests are small: some ten calls of numpy cost as much as 64 rounds.
        kinds = state.tolist()
        small, zeroes = _places_of(kinds, _SMALL), kinds.count(_ZERO)
        if zeroes and zeroes * _ZEROES_SHARE <= len(small):  # part of what is copied
            small = [place for place, kind in enumerate(kinds) if kind in (_SMALL, _ZERO)]
        elif zeroes:
            fill_zero(out, np.flatnonzero(state == _ZERO))
        if small:
            self._copy(out, small, at)
        if _LARGE in kinds:
            self._copy_large(out, np.flatnonzero(state == _LARGE), at, blocks)
        late = _places_of(kinds, _UNKNOWN)
        if _BACKING in kinds:
            which = _places_of(kinds, _BACKING)
            history.read_backing(out, _pieces_of(blocks, which))
            if self._now() != now:  # published meanwhile: perhaps of these
                late += which
        if not late:
            return _NONE
        again = np.array(late)
        self._renew(at[again], blocks[again], seq)
        return again

    def clear(self) -> None:
        """Forget everything."""
        self._state[:] = _UNKNOWN
        self._free += self._slots.values()
        self._slots.clear()
        self._wanted.clear()
        self._segments.clear()
        self._slices.clear()
        self._closed = -1, -1
        self._voided = self._history.snapshot.told.voided

    # -------------------------------------------------------------------------------- chunks
    def _now(self) -> Stamp:
        frontier = self._history.frontier
        return frontier.generations(), frontier.undo_published

    def _find(self, blocks: np.ndarray, seq: int) -> tuple[np.ndarray, list[int]]:
        """Where in the columns each block is, negative: nowhere; and the slots concerned (-1 for
        none).
        """
        within = (blocks & _WITHIN).astype(np.int64)
        chunks = (blocks >> _CHUNK).tolist()
        if chunks.count(chunks[0]) == len(chunks):
            slot = self._slot((seq, chunks[0]), len(chunks), True)
            return within + (slot << CHUNK_SHIFT), [slot]
        wanted = Counter(chunks)
        # With more, one that is filled could take the place of one that was found just before.
        fill = len(wanted) <= len(self._stamps) // 2
        slot_of = {chunk: self._slot((seq, chunk), count, fill) for chunk, count in wanted.items()}
        base = np.array([slot_of[chunk] for chunk in chunks], np.int64)
        return within + (base << CHUNK_SHIFT), list(slot_of.values())

    def _slot(self, key: Key, wanted: int, fill: bool) -> int:
        """The chunk's place in the columns; -1 while it is not worth one."""
        slot = self._slots.get(key, -1)
        if slot >= 0:
            self._slots.move_to_end(key)
        elif fill and self._count(key, wanted, self._fill_after):
            slot = self._fill(key, -1)
        return slot

    def _count(self, key: Key, blocks: int, enough: int) -> bool:
        """So many more of a chunk were wanted and not known; whether that is enough now."""
        wanted = self._wanted.pop(key, 0) + blocks
        if wanted >= enough:
            return True
        if len(self._wanted) >= _WANTED_MAX:
            self._wanted.clear()
        self._wanted[key] = wanted
        return False

    def _renew(self, at: np.ndarray, blocks: np.ndarray, seq: int) -> None:
        """Look chunks up again of which much is not known any more; for the next time."""
        chunks = (blocks >> _CHUNK)[at >= 0].tolist()
        for chunk in dict.fromkeys(chunks):
            slot = self._slots.get((seq, chunk), -1)
            enough = self._fill_after << min(self._fills[slot], _FILL_DOUBLINGS)
            if slot >= 0 and self._count((seq, chunk), chunks.count(chunk), enough):
                self._fill((seq, chunk), slot)

    def _fill(self, key: Key, slot: int) -> int:
        """Look a chunk up; its place in the columns, -1 if that did not work."""
        seq, chunk = key
        first = chunk << CHUNK_SHIFT
        blocks = np.arange(first, first + CHUNK_BLOCKS, dtype=np.uint64)
        try:
            self._history.current()  # of an old one "in neither log" would be worth nothing
            snapshot, locs, redo = self._history.places(blocks, seq)
            columns = self._columns(snapshot, blocks, locs, redo)
        except (Vanished, RunDamaged, Corruption):
            return slot  # whoever reads those blocks will hear of it
        if slot < 0:
            if len(self._segments) > _SEGMENTS_MAX:
                self._drop_gone()
            if not self._free:
                self._free.append(self._slots.popitem(last=False)[1])
            slot = self._slots[key] = self._free.pop()
            self._fills[slot] = 0
        self._fills[slot] += 1
        self._stamps[slot] = snapshot.generation, snapshot.published
        part = slice(slot << CHUNK_SHIFT, (slot + 1) << CHUNK_SHIFT)
        self._state[part], self._where[part], self._sum[part] = columns
        return slot

    def _columns(
        self, snapshot: Snapshot, blocks: np.ndarray, locs: np.ndarray, redo: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``state``, ``where``, ``sum`` of a chunk."""
        kind = kinds_of(locs)
        state = np.full(len(blocks), _UNKNOWN, np.uint8)  # refs: not remembered
        state[locs == 0] = _BACKING
        state[(kind == Kind.ZERO) | (kind == Kind.TRIM) | (kind == Kind.IMAGE_ZERO)] = _ZERO
        where, sums = np.zeros(len(blocks), np.uint64), np.full(len(blocks), _ZEROES_SUM)
        content = np.flatnonzero((kind == Kind.WRITE) | (kind == Kind.IMAGE))
        order = content[np.argsort(locs[content])]
        names = locs[order] >> _SEGMENT
        for part in np.split(order, np.flatnonzero(np.diff(names)) + 1) if len(order) else ():
            table, rows = self._rows(snapshot, locs[part], bool(redo[part[0]]))
            within = blocks[part] - rows["block"]
            small = rows["nblocks"] < _LARGE_BLOCKS
            few, within, rows = part[small], within[small], rows[small]
            state[part] = np.where(small, _SMALL, _LARGE)
            where[part[~small]] = locs[part[~small]]
            offsets = rows["payload"].astype(np.uint64) + within * np.uint64(BLOCK)
            where[few] = (locs[few] & ~_ROW) | offsets
            sums[few] = table.sums[(rows["sum"] + within).astype(np.intp)]
        return state, where, sums

    def _rows(self, snapshot: Snapshot, locs: np.ndarray, redo: bool) -> tuple[Table, np.ndarray]:
        """The table and the rows of locs in one segment, which must be what is there."""
        history = self._history
        table, _, info = history.locate(int(locs[0]), redo=redo)
        at = (locs & _ROW).astype(np.intp)
        if int(at.max()) >= len(table.rows) or (table.rows["kind"][at] != kinds_of(locs)).any():
            raise Corruption("index names a record that the segment lacks", file=info.name)
        name = int(locs[0]) >> LOC_SEGMENT_SHIFT
        if self._segments.get(name, (None, None))[1] is not info:
            self._segments[name] = history.redo if redo else history.undo, info
            self._slices.pop(name, None)  # it may be sealed by now
        return table, table.rows[at]

    def _drop_gone(self) -> None:
        """A segment is gone: forget what lies in those that are not there any more."""
        snapshot = self._history.refresh()
        there = {True: snapshot.redo_infos, False: snapshot.undo_infos}
        gone = [
            name for name, (log, info) in self._segments.items()
            if info.segment not in there[log is self._history.redo]
        ]  # fmt: skip
        for name in gone:
            del self._segments[name]
        for slot in self._slots.values():
            part = slice(slot << CHUNK_SHIFT, (slot + 1) << CHUNK_SHIFT)
            content = (self._state[part] == _SMALL) | (self._state[part] == _LARGE)
            lost = content & np.isin(self._where[part] >> _SEGMENT, gone)
            self._state[part][lost] = _UNKNOWN

    # ------------------------------------------------------------------------------- content
    def _copy(self, out: memoryview, which: list[int], at: np.ndarray) -> None:
        """Blocks that have a checksum each, or zeroes, to their places ``which`` (ascending)."""
        for first in range(0, len(which), PART_BLOCKS):
            part = which[first : first + PART_BLOCKS]
            slots = at if len(part) == len(at) else at[part]
            self._fetch(self._where[slots])
            self._verify(slots)
            view, start = self._room.view, 0
            for place, count in _runs(part):
                end = start + count * BLOCK
                out[place * BLOCK : (place + count) * BLOCK] = view[start:end]
                start = end

    def _fetch(self, where: np.ndarray) -> None:
        """Have blocks in the room, PART_BLOCKS at most, one after the other.

        Scattered ones are gathered by one call, out of mapped files.
        """
        apart = (where[1:] - where[:-1] != BLOCK).nonzero()[0] + 1
        sources = where.tolist()
        if len(apart) * _PIECE_BLOCKS > len(sources) and self._gather(sources):
            return
        view = self._room.view
        for low, high in pairwise([0, *apart.tolist(), len(sources)]):
            part = view[low * BLOCK : high * BLOCK]
            name, offset = sources[low] >> LOC_SEGMENT_SHIFT, sources[low] & _OFFSET
            got = 0
            if name != _NOWHERE:
                log, info = self._segments[name]
                got = log.file(info).read_into(offset, part)
            if got < len(part):  # what is not there carries no checksum, but that of zeroes
                filling = b"\xa5" if name != _NOWHERE else b"\0"
                part[got:] = filling * (len(part) - got)

    def _gather(self, sources: list[int]) -> bool:
        """Whether they could be had that way."""
        caches = self._history.redo.cache, self._history.undo.cache
        of = self._slices
        if self._closed != (caches[0].closed, caches[1].closed):
            of.clear()
            of[_NOWHERE] = _ZEROES
            self._closed = caches[0].closed, caches[1].closed
        try:
            parts = _slices_of(of, sources)
        except KeyError:
            parts = None
        if parts is None:
            for name in {source >> LOC_SEGMENT_SHIFT for source in sources} - of.keys():
                log, info = self._segments[name]
                of[name] = log.cache.slices(info)
            if self._closed != (caches[0].closed, caches[1].closed):
                return False  # there were too many, perhaps one of these was closed
            parts = _slices_of(of, sources)
        return self._room.gather(parts, len(parts) * BLOCK)

    def _verify(self, slots: np.ndarray) -> None:
        """Verify the blocks in the room."""
        found = list(map(checksum, self._room.blocks[: len(slots)]))
        wanted = self._sum[slots].tolist()
        if found != wanted:
            bad = next(number for number, one in enumerate(found) if one != wanted[number])
            source = int(self._where[slots[bad]])
            raise Corruption(
                "checksum mismatch", file=self._segments[source >> LOC_SEGMENT_SHIFT][1].name,
                offset=source & _OFFSET,
            )  # fmt: skip

    def _copy_large(
        self, out: memoryview, which: np.ndarray, at: np.ndarray, blocks: np.ndarray
    ) -> None:
        """Blocks of large records: a checksum covers several."""
        locs = self._where[at[which]]
        redo = kinds_of(locs) == Kind.WRITE
        for mine, log in ((redo, self._history.redo), (~redo, self._history.undo)):
            if mine.any():
                part = which[mine]
                self._history.read_payloads(out, part, blocks[part], locs[mine], log)


def _slices_of(of: dict[int, Slices], sources: list[int]) -> list[Buffer]:
    """The blocks at these places."""
    return [
        of[source >> LOC_SEGMENT_SHIFT][(at := source & _OFFSET) : at + BLOCK]
        for source in sources
    ]  # fmt: skip


def _places_of(kinds: list[int], kind: int) -> list[int]:
    """Where that kind is."""
    if kind not in kinds:
        return []
    return [place for place, each in enumerate(kinds) if each == kind]


def _runs(places: list[int]) -> Iterator[tuple[int, int]]:
    """The first of places (ascending) that follow each other, and how many."""
    first = following = places[0]
    for place in places:
        if place != following:
            yield first, following - first
            first = place
        following = place + 1
    yield first, following - first


def _pieces_of(blocks: np.ndarray, places: list[int]) -> list[Piece]:
    """Where in the backing the blocks of these places are, and where in the output."""
    pieces: list[Piece] = []
    following = -1
    for place, block in zip(places, blocks[places].tolist(), strict=True):
        start, end = place * BLOCK, (place + 1) * BLOCK
        if block == following and pieces[-1][2] == start:
            pieces[-1] = pieces[-1][0], pieces[-1][1], end
        else:
            pieces.append((block * BLOCK, start, end))
        following = block + 1
    return pieces
