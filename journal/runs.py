"""One run of the index, open for lookups.

`run_format` says what a run looks like and why an answer can be believed, `run_writer` writes one,
`runset` keeps all those of a log. A `Run` is for one thread at a time.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import lmdb
import numpy as np
import numpy.typing as npt
import xxhash
from pyroaring import BitMap

from journal.entries import (
    LEVEL_SHIFTS,
    LOC_SEGMENT_SHIFT,
    SEQ_MAX,
    Column,
    Entries,
    Seqs,
    at_most,
    concatenated,
    is_member,
    piece_key,
    piece_keys,
    rank_right,
    segments_of,
)
from journal.errors import Vanished
from journal.format import SEGMENT_ID_MAX, Log, checksum
from journal.run_format import (
    AFTER_LAST,
    CHUNK_PAGES,
    INDEX,
    LMDB_VERSION,
    LOC_AT,
    META_KEY,
    NEXT_KEY_AT,
    NEXT_SEQ_AT,
    PAGE_BYTES,
    PAGE_ENTRIES,
    PAGE_WORDS,
    PAIR,
    REGION_LEVEL_SHIFT,
    REGION_SHIFT,
    SEQ_AT,
    SUM_AT,
    SUMMED_BYTES,
    RunDamaged,
    RunMeta,
    check_guard,
    page_seed,
    page_sums,
    regions_of,
    run_name,
)
from journal.storage import File, Storage


class _Shared:
    """Open environments of this process: LMDB allows one per file, and any number may read it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[int, int], tuple[lmdb.Environment, int]] = {}

    def acquire(self, path: str, file: File) -> tuple[tuple[int, int], lmdb.Environment]:
        """The environment of the open file, which is at ``path``."""
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        with self._lock:
            env, users = self._open.get(identity, (None, 0))
            if env is None:
                env = lmdb.open(
                    path, lib_version=LMDB_VERSION, subdir=False, readonly=True, create=False,
                    lock=False, readahead=False, max_dbs=0,
                )  # fmt: skip
            self._open[identity] = (env, users + 1)
        return identity, env

    def release(self, identity: tuple[int, int]) -> None:
        """Close it when nobody else uses it."""
        with self._lock:
            env, users = self._open.pop(identity)
            if users > 1:
                self._open[identity] = (env, users - 1)
            else:
                env.close()


_shared: Final = _Shared()
_FEW_BLOCKS: Final = 12  # fewer than that are looked up faster one by one


_F = TypeVar("_F", bound=Callable[..., Any])


def _lmdb_is_told(method: _F) -> _F:
    """What LMDB finds wrong inside a file that was whole when it was opened is damage, too."""

    @functools.wraps(method)
    def guarded(self: Run, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except lmdb.Error as error:
            raise self._damaged(f"LMDB: {error}") from error

    return cast(_F, guarded)


class Run:
    """One run, open for reading.

    Lookups of columns expect blocks in ascending order to be fast, and work in any. ``dead`` are
    segments (of the undo log) that are no more: their entries are passed over.

    Every call may raise `RunDamaged`.
    """

    def __init__(
        self, name: str, identity: tuple[int, int], env: lmdb.Environment, size: int
    ) -> None:
        self.name, self.identity, self.size = name, identity, size
        self.dead: frozenset[int] = frozenset()
        self._env: lmdb.Environment | None = env
        self._transaction = env.begin(buffers=True)
        self._cursor = self._transaction.cursor()
        value = self._transaction.get(META_KEY)
        if value is None:
            raise self._damaged("no metadata")
        self.meta = RunMeta.unpack(bytes(value), file=f"{INDEX}/{name}")
        self._seed = page_seed(self.meta.log, self.meta.disk, self.meta.number)
        self._levels = [level for level, count in enumerate(self.meta.levels) if count]
        self._region_list: npt.NDArray[np.uint32] | None = None
        self._keys: bytes | None = None  # of all pages, as in the file
        self._first_key = self._first_seq = np.zeros(0, np.uint64)

    @classmethod
    def open(cls, storage: Storage, directory: Path, name: str, *, log: Log, disk: bytes) -> Run:
        """Open a run by its name.

        :raises Vanished: it is not there (any more).
        :raises RunDamaged: also when it belongs to another disk, log or name.
        :raises UnknownVersion: written by a newer program.
        """
        try:
            file = storage.open(f"{INDEX}/{name}", "read")
        except FileNotFoundError:
            raise Vanished(f"{INDEX}/{name} is gone: take a new snapshot") from None
        identity = None
        try:
            pages = check_guard(file, name)
            identity, env = _shared.acquire(str(directory / name), file)
            if env.info()["last_pgno"] + 1 != pages:
                raise RunDamaged("file of the wrong size", file=f"{INDEX}/{name}")
            run = cls(name, identity, env, file.size())
            meta = run.meta
            if (meta.log, meta.disk) != (log, disk) or name != run_name(log, meta.number):
                raise run._damaged("run of another disk, log or name")
        except BaseException as error:
            if identity is not None:
                _shared.release(identity)
            device = isinstance(error, OSError) and error.errno == errno.EIO
            if device or isinstance(error, lmdb.Error):
                raise RunDamaged(f"unusable: {error}", file=f"{INDEX}/{name}") from error
            raise
        finally:
            file.close()
        return run

    def close(self) -> None:
        """Close it; may be repeated."""
        if self._env is not None:
            self._cursor.close()
            self._transaction.abort()
            self._env = None
            _shared.release(self.identity)

    def _damaged(self, what: str) -> RunDamaged:
        return RunDamaged(what, file=f"{INDEX}/{self.name}")

    # ------------------------------------------------------------------------------- one block
    def newest_le_one(self, block: int, seq: int) -> tuple[int, int]:
        """The newest version (largest end) <= ``seq`` of one block: (seq, loc), or (0, 0)."""
        best = (0, 0)
        for level in self._levels:
            if level and not self._may_have(level, block):
                continue
            key = piece_key(level, block)
            place = self._last_le(key, seq)
            if place is not None:
                best = max(best, self._living(*place, key, -1))
        return best

    def smallest_gt_one(self, block: int, seq: int) -> tuple[int, int]:
        """The smallest seq or end > ``seq`` of one block: (seq, loc), or (0, 0)."""
        best = (0, 0)
        for level in self._levels:
            if level and not self._may_have(level, block):
                continue
            key = piece_key(level, block)
            place = self._first_gt(key, seq)
            if place is not None:
                found = self._living(*place, key, +1)
                if found[0] and (not best[0] or found < best):
                    best = found
        return best

    def _last_le(self, key: int, seq: int) -> tuple[memoryview, int] | None:
        """Page and place of the last entry <= (key, seq), if it has that key."""
        page, at = self._rank(key, seq)
        return None if page is None or page[at - 1] != key else (page, at - 1)

    @_lmdb_is_told
    def _first_gt(self, key: int, seq: int) -> tuple[memoryview, int] | None:
        """Page and place of the first entry > (key, seq), if it has that key."""
        page, at = self._rank(key, seq)
        if page is None:
            if self.meta.first[0] != key:
                return None
            page = self._page_at(self._cursor.first(), self.meta.first)
        elif at == PAGE_ENTRIES:
            if page[NEXT_KEY_AT] != key:
                return None
            page, at = self._page_at(self._cursor.next(), (key, page[NEXT_SEQ_AT])), 0
        return (page, at) if page[at] == key else None

    def _may_have(self, level: int, block: int) -> bool:
        shift = LEVEL_SHIFTS[level]
        region = level << REGION_LEVEL_SHIFT | block >> shift << shift >> REGION_SHIFT
        return region in self.meta.regions

    def _is_dead(self, loc: int) -> bool:
        return loc >> LOC_SEGMENT_SHIFT & (SEGMENT_ID_MAX - 1) in self.dead

    @_lmdb_is_told
    def _rank(self, key: int, seq: int) -> tuple[memoryview | None, int]:
        """The page in which (key, seq) would lie, and how many of its entries are <= it.

        No page: it would lie before the first. The cursor is left at the page.
        """
        if (key, seq) < self.meta.first:
            return None, 0
        wanted = PAIR.pack(key, seq)
        cursor = self._cursor
        found = cursor.set_range(wanted)
        if found and cursor.key() != wanted:
            found = cursor.prev()
        page = self._page_at(found, None)
        first_key, next_key = page[0], page[NEXT_KEY_AT]
        if not (first_key < key or (first_key == key and page[SEQ_AT] <= seq)) or not (
            key < next_key or (key == next_key and seq < page[NEXT_SEQ_AT])
        ):
            raise self._damaged("page out of its place")
        at = bisect_right(page, key, 0, PAGE_ENTRIES)
        if at and page[at - 1] == key and page[at - 1 + SEQ_AT] > seq:
            low = bisect_left(page, key, 0, at)
            at = bisect_right(page, seq, low + SEQ_AT, at + SEQ_AT) - SEQ_AT
        return page, at

    def _page_at(self, found: bool, first: tuple[int, int] | None) -> memoryview:
        """The page at the cursor, checked, also that it begins with ``first``."""
        value = self._cursor.value() if found else None
        if value is None or len(value) != PAGE_BYTES:
            raise self._damaged("page missing")
        page = value.cast("Q")
        if checksum(value[:SUMMED_BYTES], self._seed) != page[SUM_AT]:
            raise self._damaged("damaged page")
        if first is not None and (page[0], page[SEQ_AT]) != first:
            raise self._damaged("page out of its place")
        return page

    def _living(self, page: memoryview, at: int, key: int, step: int) -> tuple[int, int]:
        """This entry or, if dead, the nearest living one of its key: (seq, loc), or (0, 0)."""
        while self.dead and self._is_dead(page[at + LOC_AT]):
            at += step
            if at == PAGE_ENTRIES:
                if page[NEXT_KEY_AT] != key:
                    return 0, 0
                following = (key, page[NEXT_SEQ_AT])
                page, at = self._page_at(self._cursor.next(), following), 0
            elif at < 0:
                first = (page[0], page[SEQ_AT])
                if first == self.meta.first:
                    return 0, 0
                page, at = self._page_at(self._cursor.prev(), None), PAGE_ENTRIES - 1
                if (page[NEXT_KEY_AT], page[NEXT_SEQ_AT]) != first:
                    raise self._damaged("page out of its place")
            if page[at] != key:
                return 0, 0
        return page[at + SEQ_AT], page[at + LOC_AT]

    # --------------------------------------------------------------------------------- columns
    def newest_le(self, blocks: Column, seq: Seqs) -> tuple[Column, Column]:
        """See `Entries.newest_le`; with ends instead of seqs it is the undo log's ends_le."""
        if len(blocks) <= _FEW_BLOCKS:
            return _one_by_one(self.newest_le_one, blocks, seq)
        seqs, locs = np.zeros(len(blocks), np.uint64), np.zeros(len(blocks), np.uint64)
        for level in self._levels:
            which, want, upto = self._wanted(level, blocks, seq)
            found, at = self._search(want, upto, -1)
            self._pass_dead(want, found, at, -1)
            better = found > seqs[which]
            seqs[which[better]], locs[which[better]] = found[better], at[better]
        return seqs, locs

    def smallest_gt(self, blocks: Column, seq: Seqs) -> tuple[Column, Column]:
        """See `Entries.smallest_gt`."""
        if len(blocks) <= _FEW_BLOCKS:
            return _one_by_one(self.smallest_gt_one, blocks, seq)
        seqs = np.full(len(blocks), SEQ_MAX, np.uint64)
        locs = np.zeros(len(blocks), np.uint64)
        for level in self._levels:
            which, want, upto = self._wanted(level, blocks, seq)
            found, at = self._search(want, upto, +1)
            self._pass_dead(want, found, at, +1)
            better = (found != 0) & (found < seqs[which])
            seqs[which[better]], locs[which[better]] = found[better], at[better]
        seqs[seqs == SEQ_MAX] = 0
        return seqs, locs

    def oldest(self, blocks: Column) -> Column:
        """The seq of each block's oldest version."""
        return self.smallest_gt(blocks, 0)[0]

    def ends_le(self, blocks: Column, seqs: Seqs) -> Column:
        """Each block's largest end <= its seq."""
        return self.newest_le(blocks, seqs)[0]

    def successors(self, blocks: Column, seqs: Seqs, upto: int) -> tuple[Column, Column]:
        """Each block's next version after its seq, if that is <= ``upto``: seqs and locs."""
        return at_most(self.smallest_gt(blocks, seqs), upto)

    # ----------------------------------------------------------------------------------- ranges
    def slices(self, first_key: int = 0, end_key: int = SEQ_MAX) -> Iterator[Entries]:
        """All entries with first_key <= key < end_key, in order, a few ten thousand at a time."""
        self._load_firsts()
        firsts = self._first_key[:-1]
        page = max(0, int(firsts.searchsorted(np.uint64(first_key))) - 1)
        end = int(firsts.searchsorted(np.uint64(end_key)))
        while page < end:
            pages = np.arange(page, min(page + CHUNK_PAGES, end))
            page += len(pages)
            words = self._load(pages).reshape(len(pages), PAGE_WORDS)
            count = min(self.meta.entries, page * PAGE_ENTRIES) - int(pages[0]) * PAGE_ENTRIES
            key, seq, loc = (
                words[:, start : start + PAGE_ENTRIES].reshape(-1)[:count]
                for start in (0, SEQ_AT, LOC_AT)
            )
            low = int(key.searchsorted(np.uint64(first_key)))
            high = int(key.searchsorted(np.uint64(end_key)))
            if low < high:
                yield Entries(key[low:high], seq[low:high], loc[low:high])

    def overlapping(self, first_block: int, end_block: int) -> Entries:
        """The entries that have a block in [first_block, end_block), of all levels."""
        if first_block >= end_block:
            return Entries.empty()
        parts: list[Entries] = []
        for level in self._levels:
            last = piece_key(level, end_block - 1)
            parts += self.slices(piece_key(level, first_block), last + 1)
        return concatenated(parts)

    def verify(self) -> Iterator[int]:
        """Check everything, page by page; yields how many entries have been, now and then.

        :raises RunDamaged: pages or metadata are not what was written.
        """
        meta, sums = self.meta, xxhash.xxh3_64()
        seqs: list[int] = []
        levels = np.zeros(len(LEVEL_SHIFTS), np.int64)
        segments = dict.fromkeys(meta.segments, 0)
        regions = BitMap()
        end = (0, 0)
        done = 0
        for part in self.slices():
            count = np.arange(done // PAGE_ENTRIES, -(-(done + len(part)) // PAGE_ENTRIES))
            sums.update(self._load(count)[SUM_AT::PAGE_WORDS].tobytes())
            same = part.key[1:] == part.key[:-1]
            rising = (part.key[1:] > part.key[:-1]) | (same & (part.seq[1:] >= part.seq[:-1]))
            if end > (int(part.key[0]), int(part.seq[0])) or not rising.all():
                raise self._damaged("entries out of order")
            end = (int(part.key[-1]), int(part.seq[-1]))
            seqs += [int(part.seq.min()), int(part.seq.max())]
            for level, low, high in part.levels:
                levels[level] += high - low
            numbers, counts = np.unique(segments_of(part.loc), return_counts=True)
            for segment, number in zip(numbers.tolist(), counts.tolist(), strict=True):
                segments[segment] = segments.get(segment, 0) + number
            regions.update(regions_of(part.key).tolist())
            done += len(part)
            yield done
        found = (
            done, min(seqs, default=0), max(seqs, default=0), tuple(levels.tolist()),
            sums.intdigest(), segments, regions,
        )  # fmt: skip
        said = (
            meta.entries, meta.first_seq, meta.last_seq, meta.levels,
            meta.pages_sum, meta.segments, meta.regions,
        )  # fmt: skip
        if found != said:
            raise self._damaged("metadata and entries differ")

    # ------------------------------------------------------------------------------------ pages
    @_lmdb_is_told
    def _load_firsts(self) -> None:
        """The first entry of every page, 16 bytes each, with an end mark: on first need."""
        if self._keys is not None:
            return
        self._cursor.first()
        keys = b"".join(islice(self._cursor.iternext(values=False), self.meta.pages))
        pairs = np.frombuffer(keys, ">u8")
        if len(pairs) != 2 * self.meta.pages:
            raise self._damaged("page missing")
        firsts = np.concatenate([pairs, np.array(AFTER_LAST, np.uint64)]).astype(np.uint64)
        key, seq = firsts[0::2].copy(), firsts[1::2].copy()
        rising = (key[1:] > key[:-1]) | ((key[1:] == key[:-1]) & (seq[1:] > seq[:-1]))
        if not rising.all() or (int(key[0]), int(seq[0])) != self.meta.first:
            raise self._damaged("pages out of order")
        self._keys, self._first_key, self._first_seq = keys, key, seq

    @_lmdb_is_told
    def _load(self, pages: npt.NDArray[np.intp]) -> Column:
        """The words of some pages (ascending, not too many), one after the other, checked."""
        if self._env is None:
            raise Vanished(f"{INDEX}/{self.name} was closed: take a new snapshot")
        assert self._keys is not None
        keys = self._keys
        get = self._transaction.get
        values = [get(keys[at : at + 16], b"") for at in (pages * 16).tolist()]
        data = b"".join(values)
        if len(data) != len(pages) * PAGE_BYTES:
            raise self._damaged("page missing")
        words = np.frombuffer(data, np.uint64)
        table = words.reshape(len(pages), PAGE_WORDS)
        whole = table[:, SUM_AT] == np.array(
            page_sums(memoryview(data), len(pages), self._seed), np.uint64
        )
        if not whole.all():
            raise self._damaged("damaged page")
        placed = (table[:, 0] == self._first_key[pages]) & (
            table[:, SEQ_AT] == self._first_seq[pages]
        )
        placed &= (table[:, NEXT_KEY_AT] == self._first_key[pages + 1]) & (
            table[:, NEXT_SEQ_AT] == self._first_seq[pages + 1]
        )
        if not placed.all():
            raise self._damaged("page out of its place")
        return words

    def _wanted(
        self, level: int, blocks: Column, seq: Seqs
    ) -> tuple[npt.NDArray[np.intp], Column, Seqs]:
        """What to search on a level: positions in ``blocks``, keys, seqs.

        Without the blocks in whose region the level has no entry.
        """
        want = piece_keys(level, blocks)
        if not level:
            return np.arange(len(blocks)), want, seq
        if self._region_list is None:
            self._region_list = np.array(self.meta.regions.to_array(), np.uint32)
        shift = np.uint64(LEVEL_SHIFTS[level])
        regions = (blocks >> shift << shift >> np.uint64(REGION_SHIFT)).astype(np.uint32)
        regions |= np.uint32(level << REGION_LEVEL_SHIFT)
        which = np.flatnonzero(is_member(self._region_list, regions))
        return which, want[which], seq if isinstance(seq, int) else seq[which]

    def _search(self, want: Column, upto: Seqs, step: int) -> tuple[Column, Column]:
        """The last entry <= (want, upto), or the first one behind, if it has the wanted key."""
        seqs, locs = np.zeros(len(want), np.uint64), np.zeros(len(want), np.uint64)
        self._load_firsts()
        if not len(want) or not self.meta.pages:
            return seqs, locs
        page = rank_right(self._first_key, self._first_seq, want, upto) - 1
        order = page.argsort(kind="stable")
        if step < 0:
            order = order[int(page.searchsorted(0, sorter=order)) :]  # before the first page: none
        page = np.maximum(page[order], 0)
        starts = np.flatnonzero(np.diff(page, prepend=-1))
        pages, bounds = page[starts], np.append(starts, len(page))
        behind: list[npt.NDArray[np.intp]] = []
        for first in range(0, len(pages), CHUNK_PAGES):
            chunk = pages[first : first + CHUNK_PAGES]
            words = self._load(chunk)
            sizes = np.diff(bounds[first : first + len(chunk) + 1])
            which = order[bounds[first] : bounds[first + len(chunk)]]
            base = np.repeat(np.arange(len(chunk)) * PAGE_WORDS, sizes)
            keys = want[which]
            rank = _rank_in_pages(words, base, keys, upto if isinstance(upto, int) else upto[which])
            at = base + (rank - 1 if step < 0 else np.minimum(rank, PAGE_ENTRIES - 1))
            hit = words[at] == keys
            if step > 0:
                hit &= rank < PAGE_ENTRIES
                behind.append(which[(rank == PAGE_ENTRIES) & (words[base + NEXT_KEY_AT] == keys)])
            seqs[which[hit]], locs[which[hit]] = words[at[hit] + SEQ_AT], words[at[hit] + LOC_AT]
        if step > 0:
            self._first_of_next(np.concatenate(behind), want, upto, seqs, locs)
        return seqs, locs

    def _first_of_next(
        self, which: npt.NDArray[np.intp], want: Column, upto: Seqs, seqs: Column, locs: Column
    ) -> None:
        """Fill in for those whose page ends just before the sought entry."""
        if not len(which):
            return
        limits = upto if isinstance(upto, int) else upto[which]
        page = rank_right(self._first_key, self._first_seq, want[which], limits)
        pages, inverse = np.unique(page, return_inverse=True)
        for first in range(0, len(pages), CHUNK_PAGES):
            chunk = pages[first : first + CHUNK_PAGES]
            words = self._load(chunk)
            here = np.flatnonzero((inverse >= first) & (inverse < first + len(chunk)))
            base = (inverse[here] - first) * PAGE_WORDS
            seqs[which[here]], locs[which[here]] = words[base + SEQ_AT], words[base + LOC_AT]

    def _pass_dead(self, want: Column, seqs: Column, locs: Column, step: int) -> None:
        """Replace dead entries by the nearest living ones, in place."""
        if not self.dead:
            return
        dead = np.array(sorted(self.dead), np.uint64)
        for at in np.flatnonzero((seqs != 0) & is_member(dead, segments_of(locs))).tolist():
            key, seq = int(want[at]), int(seqs[at])
            place = self._last_le(key, seq) if step < 0 else self._first_gt(key, seq - 1)
            assert place is not None
            seqs[at], locs[at] = self._living(*place, key, step)


def _rank_in_pages(
    words: Column, base: npt.NDArray[np.intp], want: Column, upto: Seqs
) -> npt.NDArray[np.intp]:
    """How many entries of the page at ``base`` are <= (want, upto), for each."""
    low, high = base, base + PAGE_ENTRIES
    for _ in range(PAGE_ENTRIES.bit_length()):
        middle = (low + high) >> 1
        keys = words[middle]
        inside = (keys < want) | ((keys == want) & (words[middle + SEQ_AT] <= upto))
        inside &= low < high
        low = np.where(inside, middle + 1, low)
        high = np.where(inside, high, middle)
    return low - base


def _one_by_one(
    lookup: Callable[[int, int], tuple[int, int]], blocks: Column, seq: Seqs
) -> tuple[Column, Column]:
    limits = [seq] * len(blocks) if isinstance(seq, int) else seq.tolist()
    found = [lookup(block, limit) for block, limit in zip(blocks.tolist(), limits, strict=True)]
    columns = np.array(found, np.uint64).reshape(len(blocks), 2)
    return columns[:, 0].copy(), columns[:, 1].copy()
