"""Writing one run of the index; `run_format` says what it looks like."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import lmdb
import numpy as np
import numpy.typing as npt
import xxhash
from pyroaring import BitMap

from journal.entries import LEVEL_SHIFTS, SEQ_MAX, Entries, concatenated, segments_of
from journal.format import Log
from journal.run_format import (
    AFTER_LAST,
    INDEX,
    LMDB_PAGE,
    LMDB_VERSION,
    META_KEY,
    NEXT_KEY_AT,
    NEXT_SEQ_AT,
    PAGE_BYTES,
    PAGE_ENTRIES,
    PAGE_WORDS,
    SEQ_AT,
    SUM_AT,
    TEMPORARY,
    IndexFailed,
    IndexFull,
    RunMeta,
    make_guard,
    page_seed,
    page_sums,
    regions_of,
    run_name,
)
from journal.storage import File, Storage

_FLUSH_ENTRIES: Final = 1 << 17  # written in one transaction: 3 MiB


class RunWriter:
    """Writes one run from slices of entries that follow each other in the order of (key, seq).

    Nothing has the run's name before :meth:`finish` has returned it. :meth:`abandon`, or any error,
    leaves no file behind. ``entries_max`` bounds what will be added. No transaction is open between
    calls, which may come from different threads.
    """

    def __init__(
        self, storage: Storage, directory: Path, *, log: Log, disk: bytes, number: int,
        segments: Iterable[int], entries_max: int, replaces: Iterable[int] = (),
    ) -> None:  # fmt: skip
        self.name = run_name(log, number)
        self._log, self._disk, self._number = log, disk, number
        self._storage, self._temporary = storage, f"{INDEX}/{self.name}{TEMPORARY}"
        self._segments = {segment: 0 for segment in sorted(segments)}
        self._replaces = tuple(sorted(replaces))
        self._seed = page_seed(log, disk, number)
        self._waiting: list[Entries] = []
        self._count = self._written = 0
        self._first = self._end = AFTER_LAST
        self._seqs = (SEQ_MAX, 0)
        self._levels = np.zeros(len(LEVEL_SHIFTS), np.int64)
        self._regions = BitMap()
        self._sums = xxhash.xxh3_64()
        self._env: lmdb.Environment | None = None
        self._file: File | None = None
        self._named = False  # or removed: no temporary file is there
        with self._cleaning():
            self._file = storage.open(self._temporary, "create")
            self._env = lmdb.open(
                str(directory / f"{self.name}{TEMPORARY}"), lib_version=LMDB_VERSION,
                subdir=False, lock=False, sync=False, metasync=False, readahead=False, max_dbs=0,
                map_size=_map_size(entries_max),
            )  # fmt: skip

    def add(self, entries: Entries) -> None:
        """Take in the next slice.

        :raises IndexFailed: (`IndexFull`) and all is cleaned up.
        """
        if not len(entries):
            return
        key, seq = entries.key, entries.seq
        first = (int(key[0]), int(seq[0]))
        assert self._end == AFTER_LAST or self._end <= first
        assert bool((key[1:] >= key[:-1]).all())
        if not self._count:
            self._first = first
        self._end = (int(key[-1]), int(seq[-1]))
        self._count += len(key)
        self._seqs = (min(self._seqs[0], int(seq.min())), max(self._seqs[1], int(seq.max())))
        for level, low, high in entries.levels:
            self._levels[level] += high - low
        self._regions.update(regions_of(key).tolist())
        self._note_segments(segments_of(entries.loc).astype(np.intp))
        self._waiting.append(entries)
        if sum(map(len, self._waiting)) >= _FLUSH_ENTRIES:
            with self._cleaning():
                self._flush(final=False)

    def _note_segments(self, segments: npt.NDArray[np.intp]) -> None:
        base = int(segments.min())
        if int(segments.max()) - base < 1 << 20:
            counts = np.bincount(segments - base)
            numbers = np.flatnonzero(counts)
            pairs = zip((numbers + base).tolist(), counts[numbers].tolist(), strict=True)
        else:
            numbers, counts = np.unique(segments, return_counts=True)
            pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
        for segment, count in pairs:
            self._segments[segment] += count  # KeyError: the caller covers too little

    def _flush(self, *, final: bool) -> None:
        """Write the full pages, but for the last one, which needs the next one's first entry."""
        waiting = concatenated(self._waiting)
        pages = -(-len(waiting) // PAGE_ENTRIES)
        if not final:
            pages = (len(waiting) - 1) // PAGE_ENTRIES
        used = min(len(waiting), pages * PAGE_ENTRIES)
        rest = waiting[used:]
        following = (int(rest.key[0]), int(rest.seq[0])) if len(rest) else AFTER_LAST
        assert self._env is not None
        with self._env.begin(write=True) as transaction:
            if pages:
                self._put_pages(transaction, waiting[:used], pages, following)
            if final:
                transaction.put(META_KEY, self._meta().pack(), append=True)
        self._waiting = [rest] if len(rest) else []

    def _put_pages(
        self,
        transaction: lmdb.Transaction,
        entries: Entries,
        pages: int,
        following: tuple[int, int],
    ) -> None:
        words = np.empty((pages, PAGE_WORDS), np.uint64)
        columns = ((entries.key, SEQ_MAX), (entries.seq, SEQ_MAX), (entries.loc, 0))
        for number, (column, filler) in enumerate(columns):
            missing = pages * PAGE_ENTRIES - len(column)
            if missing:
                column = np.concatenate([column, np.full(missing, filler, np.uint64)])
            start = number * PAGE_ENTRIES
            words[:, start : start + PAGE_ENTRIES] = column.reshape(pages, PAGE_ENTRIES)
        words[:-1, NEXT_KEY_AT], words[:-1, NEXT_SEQ_AT] = words[1:, 0], words[1:, SEQ_AT]
        words[-1, NEXT_KEY_AT], words[-1, NEXT_SEQ_AT] = following
        view = words.reshape(-1).view(np.uint8).data
        words[:, SUM_AT] = page_sums(view, pages, self._seed)
        self._sums.update(words[:, SUM_AT].tobytes())
        keys = words[:, [0, SEQ_AT]].astype(">u8").tobytes()
        items = [
            (keys[at * 16 : at * 16 + 16], view[at * PAGE_BYTES : (at + 1) * PAGE_BYTES])
            for at in range(pages)
        ]
        with transaction.cursor() as cursor:
            _, added = cursor.putmulti(items, append=True)
        assert added == pages
        self._written += pages

    def _meta(self) -> RunMeta:
        seqs = self._seqs if self._count else (0, 0)
        meta = RunMeta(
            self._log, self._disk, self._number, self._count, *seqs, self._first,
            tuple(self._levels.tolist()), self._sums.intdigest(), self._segments, self._replaces,
            self._regions,
        )  # fmt: skip
        assert meta.pages == self._written
        assert sum(self._segments.values()) == self._count
        return meta

    def finish(self) -> str:
        """Write the rest, make all of it durable, give it its name and make that durable.

        There is one sync, of the storage's file and after the guard: LMDB's pages are pages of the
        same inode. The descriptor is as old as the file, so no failed write-back escapes it.

        :raises IndexFailed: (`IndexFull`) and all is cleaned up.
        """
        with self._cleaning():
            self._flush(final=True)
            env, file = self._env, self._file
            assert env is not None
            assert file is not None
            pages = env.info()["last_pgno"] + 1
            env.close()
            self._env = None
            file.write(pages * LMDB_PAGE, [make_guard(file, pages, self.name)])
            file.sync()
            file.close()
            self._file = None
            self._storage.rename(self._temporary, f"{INDEX}/{self.name}")
            self._named = True
            self._storage.sync_dir(INDEX)
        return self.name

    def abandon(self) -> None:
        """Give up: close and remove what there is. May be repeated, and called after `finish`."""
        if self._env is not None:
            self._env.close()
        if self._file is not None:
            self._file.close()
        self._env = self._file = None
        if not self._named:
            self._named = True  # there is nothing more to remove
            with contextlib.suppress(FileNotFoundError):
                self._storage.unlink(self._temporary)
        self._waiting = []

    @contextlib.contextmanager
    def _cleaning(self) -> Iterator[None]:
        """On any error nothing is left behind, and what a write meets gets a type."""
        try:
            yield
        except BaseException as error:
            full = self._is_full(error)
            self.abandon()
            if full:
                raise IndexFull(f"no space for {INDEX}/{self.name}: free some") from error
            if isinstance(error, lmdb.Error | OSError):
                what = f"cannot write {INDEX}/{self.name}: {error}"
                raise IndexFailed(what) from error
            raise

    def _is_full(self, error: BaseException) -> bool:
        """LMDB reports a full file system as EIO: a write of our own tells which it is."""
        if isinstance(error, lmdb.MapFullError):
            return True
        if isinstance(error, lmdb.Error) and self._file is not None:
            try:
                self._file.write(self._file.size(), [bytes(1 << 20)])
            except OSError as own:
                error = own
        return isinstance(error, OSError) and error.errno in (
            errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
        )  # fmt: skip


def _map_size(entries: int) -> int:
    """Address space for a run, which is all it is: pages, their part of the tree, metadata."""
    return (entries // PAGE_ENTRIES + 1) * (LMDB_PAGE + 128) + (64 << 20)
