"""A run of the index as it lies on disk: an immutable file of sorted entries.

A run is an LMDB file whose items are pages of 169 entries. It is filled in the order of its keys,
synced, given its name by a rename, never changed, and unlinked after a merge. So it needs no reader
table, no growing map and no free list, and opening it read-only needs no lock.

Of the two engines that py-lmdb bundles, which cannot read each other's files, it is 0.9 (data
format 1): the one every other tool knows, and the one whose overflow pages have the 16 bytes of
header that make a value of 4,080 bytes exactly one page of the file.

Item:  key = first entry of the page, as key and seq, big-endian; value = 510 little-endian u64:
  0..168 keys, 169..337 seqs, 338..506 locs, 507..508 key and seq of the next page's first entry,
  509 XXH3-64 of the 4,072 bytes before, seeded by the run's disk, log and number.
Unused places of the last page hold key = seq = 2^64 - 1, loc = 0; what follows it is 2^64 - 1.
Last item: key = 20 bytes FF, value = metadata (`RunMeta`) with a checksum of its own.

**Why a lookup can be believed.** A page carries the right sum for this very run, it begins at or
before what is sought, and the page after it begins behind: so there is no entry in between that a
damaged inner page, or a page of another file, could have hidden. If any of that does not hold the
run is `RunDamaged`: its owner throws it away and makes it anew from the segments' tables.

A damaged inner page can make LMDB abort the process, or read outside its map, instead of raising.
So behind LMDB's last page lies a *guard*: the numbers of all pages that are no data, and one
checksum of them. They (less than 1 % of the file) are read and compared before LMDB may see it.
"""

from __future__ import annotations

import dataclasses
import struct
import sys
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash
from pyroaring import BitMap

from journal.entries import KEY_LEVEL_SHIFT, KEY_NUMBER_MASK, LEVEL_SHIFTS, SEQ_MAX, Column
from journal.errors import Corruption, JournalError, UnknownVersion
from journal.format import U64, Log, checksum
from journal.storage import File

assert sys.byteorder == "little"  # columns are used as they lie in the file

RUN_VERSION: Final = 1
INDEX: Final = "index"  # the directory of all runs, in the journal directory
PREFIX: Final = {Log.REDO: "redo", Log.UNDO: "undo"}
TEMPORARY: Final = ".tmp"

PAGE_ENTRIES: Final = 169
PAGE_WORDS: Final = 510
PAGE_BYTES: Final = PAGE_WORDS * 8
SEQ_AT, LOC_AT = PAGE_ENTRIES, 2 * PAGE_ENTRIES
NEXT_KEY_AT, NEXT_SEQ_AT, SUM_AT = 3 * PAGE_ENTRIES, 3 * PAGE_ENTRIES + 1, 3 * PAGE_ENTRIES + 2
assert SUM_AT + 1 == PAGE_WORDS
SUMMED_BYTES: Final = SUM_AT * 8
AFTER_LAST: Final = (SEQ_MAX, SEQ_MAX)  # "the entry after the last one"

REGION_SHIFT: Final = 14  # of blocks: 64 MiB
REGION_LEVEL_SHIFT: Final = 18  # a region's number has 18 bits, its level comes above
CHUNK_PAGES: Final = 256  # read, checked and searched at a time: 1 MiB

LMDB_PAGE: Final = 4096
_LMDB_HEADER: Final = struct.Struct("<QHHI")  # number, padding, flags, pages of an overflow
_LMDB_OVERFLOW: Final = 0x04
LMDB_VERSION: Final = 0  # lib_version: data format 1, see above
META_KEY: Final = b"\xff" * 20
_META_MAGIC: Final = b"CDPRUNMD"
_META: Final = struct.Struct("<8sII16sQQQQQQ4QQIII4x")
assert _META.size == 136
_GUARD_MAGIC: Final = b"CDPINDEX"
# pages, checksum of the inner ones, checksum of their numbers and of this; how many, version, magic
_GUARD: Final = struct.Struct("<QQIIQ8s")
assert _GUARD.size == 40
PAIR: Final = struct.Struct(">QQ")


class RunDamaged(Corruption):
    """A run is not what was written: it is thrown away, and made anew from the segments' tables."""


class IndexFailed(JournalError):
    """A run could not be written; nothing of it is left. The index is a cache: try again later."""


class IndexFull(IndexFailed):
    """The file system of the index, or a limit, has no space for the run."""


def run_name(log: Log, number: int) -> str:
    """Name of a run's file in the index directory."""
    return f"{PREFIX[log]}-{number:08d}.run"


def run_number(log: Log, name: str) -> int | None:
    """The number in a run's name (also a temporary one); None if it is no run of this log."""
    stem = name.removesuffix(TEMPORARY).removesuffix(".run")
    prefix, _, digits = stem.partition("-")
    return int(digits) if prefix == PREFIX[log] and digits.isdecimal() else None


@dataclasses.dataclass(frozen=True, slots=True)
class RunMeta:
    """What a run says about itself.

    ``segments``: covered segment -> its entries here; their tables need not be looked at.
    ``levels``: entries per level. ``first_seq``..``last_seq``: of the entries (0 when there are
    none). ``replaces``: numbers of the runs it was merged from, which are void beside it.
    ``regions``: level << 18 | first block of the piece >> 14 of every entry. ``pages_sum``:
    checksum over the checksums of all pages.
    """

    log: Log
    disk: bytes
    number: int
    entries: int
    first_seq: int
    last_seq: int
    first: tuple[int, int]
    levels: tuple[int, ...]
    pages_sum: int
    segments: dict[int, int]
    replaces: tuple[int, ...]
    regions: BitMap

    @property
    def pages(self) -> int:
        """How many pages the entries fill."""
        return -(-self.entries // PAGE_ENTRIES)

    def pack(self) -> bytes:
        """The metadata item's value."""
        regions = self.regions.serialize()
        body = _META.pack(
            _META_MAGIC, RUN_VERSION, self.log, self.disk, self.number, self.entries,
            self.first_seq, self.last_seq, *self.first, *self.levels, self.pages_sum,
            len(self.segments), len(self.replaces), len(regions),
        )  # fmt: skip
        numbers = [*self.segments, *self.segments.values(), *self.replaces]
        body += np.array(numbers, "<u8").tobytes() + regions
        return body + U64.pack(checksum(body))

    @classmethod
    def unpack(cls, data: bytes, *, file: str) -> RunMeta:
        """From the metadata item's value.

        :raises RunDamaged: wrong magic, version, length or checksum.
        """
        whole = len(data) >= _META.size + 8 and data[:8] == _META_MAGIC
        if not whole or U64.unpack(data[-8:])[0] != checksum(data[:-8]):
            raise RunDamaged("damaged metadata", file=file)
        fields = _META.unpack_from(data)
        _, version, log, disk, number, entries, first_seq, last_seq, key, seq = fields[:10]
        nsegments, nreplaces, nregions = fields[15:18]
        middle = _META.size + (2 * nsegments + nreplaces) * 8
        if version != RUN_VERSION or log not in PREFIX or middle + nregions + 8 != len(data):
            raise RunDamaged("metadata of another format", file=file)
        numbers = np.frombuffer(data[_META.size : middle], "<u8").tolist()
        return cls(
            Log(log), disk, number, entries, first_seq, last_seq, (key, seq), fields[10:14],
            fields[14], dict(zip(numbers[:nsegments], numbers[nsegments:], strict=False)),
            tuple(numbers[2 * nsegments :]), BitMap.deserialize(data[middle:-8]),
        )  # fmt: skip


def page_seed(log: Log, disk: bytes, number: int) -> int:
    return checksum(struct.pack("<16sIQ", disk, log, number))


def regions_of(key: Column) -> npt.NDArray[np.uint32]:
    """The regions of entries (see `RunMeta`), each once per stretch."""
    level = (key >> np.uint64(KEY_LEVEL_SHIFT)).astype(np.intp)
    block = (key & np.uint64(KEY_NUMBER_MASK)) << np.array(LEVEL_SHIFTS, np.uint64)[level]
    region = (level << REGION_LEVEL_SHIFT) | (block >> np.uint64(REGION_SHIFT)).astype(np.intp)
    return region[np.flatnonzero(np.diff(region, prepend=-1))].astype(np.uint32)


def page_sums(view: memoryview, pages: int, seed: int) -> list[int]:
    return [
        checksum(view[at : at + SUMMED_BYTES], seed)
        for at in range(0, pages * PAGE_BYTES, PAGE_BYTES)
    ]


def make_guard(file: File, pages: int, name: str) -> bytes:
    """What goes behind LMDB's pages: which of them are no data, and their checksum."""
    inner = []
    at = 0
    while at < pages:
        chunk = memoryview(file.read(at * LMDB_PAGE, CHUNK_PAGES * LMDB_PAGE))
        start = at
        while at < pages and at < start + CHUNK_PAGES:
            number, _, flags, count = _LMDB_HEADER.unpack_from(chunk, (at - start) * LMDB_PAGE)
            if number == at and flags == _LMDB_OVERFLOW:
                at += count
            else:
                inner.append(at)
                at += 1
    numbers = np.array(inner, "<u8")
    head = numbers.tobytes() + _GUARD.pack(
        pages, _inner_sum(file, numbers, name), len(inner), RUN_VERSION, 0, _GUARD_MAGIC
    )[:-16]  # fmt: skip
    return head + U64.pack(checksum(head)) + _GUARD_MAGIC


def _inner_sum(file: File, numbers: np.ndarray, name: str) -> int:
    sums = xxhash.xxh3_64()
    for number in numbers.tolist():
        page = file.read(number * LMDB_PAGE, LMDB_PAGE)
        if len(page) != LMDB_PAGE:
            raise RunDamaged("file too short", file=f"{INDEX}/{name}", offset=number * LMDB_PAGE)
        sums.update(page)
    return sums.intdigest()


def check_guard(file: File, name: str) -> int:
    """Compare the inner pages with the guard; the number of LMDB's pages.

    :raises RunDamaged: no guard, a damaged one, or inner pages that are not what was written.
    :raises UnknownVersion: written by a newer program (the guard has the same shape in all).
    """
    where = f"{INDEX}/{name}"
    size = file.size()
    tail = file.read(size - _GUARD.size, _GUARD.size) if size >= _GUARD.size else b""
    if len(tail) != _GUARD.size or tail[-8:] != _GUARD_MAGIC:
        raise RunDamaged("no guard at the end", file=where, offset=size)
    pages, inner_sum, count, version, own, _ = _GUARD.unpack(tail)
    start = size - _GUARD.size - count * 8
    if start < 0:
        raise RunDamaged("damaged guard", file=where, offset=size)
    body = file.read(start, size - start)
    if checksum(body[:-16]) != own:
        raise RunDamaged("damaged guard", file=where, offset=start)
    if version > RUN_VERSION:
        raise UnknownVersion(where, version, RUN_VERSION)
    if start != pages * LMDB_PAGE:
        raise RunDamaged("file of the wrong size", file=where, offset=size)
    if _inner_sum(file, np.frombuffer(body, "<u8", count), name) != inner_sum:
        raise RunDamaged("damaged inner page", file=where)
    return int(pages)
