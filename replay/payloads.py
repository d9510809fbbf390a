"""Content of records on its way to the backing or to the undo log: read in the order of the
segment's file into one buffer, and verified there.

A record's payload has a checksum for every block, or, if it is large, for every sixteen: see
`journal.format`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

from journal.errors import Corruption
from journal.format import BLOCK, SUM_LARGE, Kind, checksum
from journal.segment import Table
from journal.storage import File
from replay.plan import stretches

# Where on the disk (bytes), and what: pieces that follow each other.
Write: TypeAlias = tuple[int, tuple[memoryview, ...]]
UNIT_BLOCKS = SUM_LARGE // BLOCK  # records of so many blocks and more are large
GAP_BYTES = 64 << 10  # not needed, and read all the same rather than in two reads


class Window(NamedTuple):
    """Blocks of small records: ``which`` of those asked for, where each begins in ``view``, and its
    checksum.
    """

    which: np.ndarray
    places: np.ndarray
    sums: list[int]
    view: memoryview


class Payloads:
    """Those of one segment. What is handed out lies in the buffer, until the next is asked for.

    Both questions are about ``blocks`` (u64), each in its row of the table.
    """

    def __init__(self, file: File, name: str, table: Table, buffer: memoryview) -> None:
        """``buffer``: several times UNIT_BLOCKS blocks."""
        self._file, self._name, self._table, self._buffer = file, name, table, buffer

    def is_small(self, rows: np.ndarray) -> np.ndarray:
        """Which of the rows have a checksum for every block."""
        return np.asarray(self._table.rows["nblocks"][rows] < UNIT_BLOCKS)

    def small(self, rows: np.ndarray, blocks: np.ndarray) -> Iterator[Window]:
        """Blocks of small records, in the order of the file.

        :raises Corruption: a checksum does not match, or the file is too short.
        """
        if not len(rows):
            return
        table = self._table.rows
        within = blocks - table["block"][rows]
        offsets = (table["payload"][rows] + within * np.uint64(BLOCK)).astype(np.int64)
        sums = self._table.sums[(table["sum"][rows] + within).astype(np.int64)]
        order = np.argsort(offsets)
        offsets, sums = offsets[order], sums[order]
        gaps = np.append(np.flatnonzero(np.diff(offsets) > BLOCK + GAP_BYTES) + 1, len(offsets))
        room = len(self._buffer) - BLOCK
        at = 0
        while at < len(offsets):
            full = int(np.searchsorted(offsets, offsets[at] + room, "right"))
            to = min(full, int(gaps[np.searchsorted(gaps, at, "right")]))
            places = offsets[at:to] - offsets[at]
            view = self._read(int(offsets[at]), int(places[-1]) + BLOCK)
            found = [checksum(view[place : place + BLOCK]) for place in places.tolist()]
            wanted = sums[at:to].tolist()
            if found != wanted:
                bad = next(number for number, one in enumerate(found) if one != wanted[number])
                raise self._damaged(int(rows[order[at + bad]]), int(offsets[at + bad]))
            yield Window(order[at:to], places, found, view)
            at = to

    def large(self, rows: np.ndarray, blocks: np.ndarray) -> Iterator[tuple[int, memoryview]]:
        """Blocks (sorted by row, or by number) of large records: first block, content of it and
        what follows in the same record.

        :raises Corruption: a checksum does not match, or the file is too short.
        """
        bounds = stretches(blocks, rows)
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            row, block = int(rows[low]), int(blocks[low])
            first = int(self._table.rows["block"][row])
            for start, view in self._part(row, block - first, block - first + high - low):
                yield first + start, view

    def _part(self, row: int, start: int, end: int) -> Iterator[tuple[int, memoryview]]:
        """Blocks ``start``..``end`` of one record."""
        entry = self._table.rows[row]
        count, payload, sum_at = int(entry["nblocks"]), int(entry["payload"]), int(entry["sum"])
        room = len(self._buffer) // SUM_LARGE * UNIT_BLOCKS
        while start < end:
            low = start // UNIT_BLOCKS * UNIT_BLOCKS
            stop = min(end, low + room)
            high = min(count, -(-stop // UNIT_BLOCKS) * UNIT_BLOCKS)
            view = self._read(payload + low * BLOCK, (high - low) * BLOCK)
            for number, at in enumerate(range(0, len(view), SUM_LARGE), low // UNIT_BLOCKS):
                if checksum(view[at : at + SUM_LARGE]) != int(self._table.sums[sum_at + number]):
                    raise self._damaged(row, payload + low * BLOCK + at)
            yield start, view[(start - low) * BLOCK : (stop - low) * BLOCK]
            start = stop

    def _read(self, offset: int, length: int) -> memoryview:
        view = self._buffer[:length]
        got = self._file.read_into(offset, view)
        if got < length:  # cut short: what is not there carries no checksum
            view[got:] = b"\xa5" * (length - got)
        return view

    def _damaged(self, row: int, offset: int) -> Corruption:
        entry = self._table.rows[row]
        image = entry["kind"] == Kind.IMAGE
        seq = int(entry["arg"]) if image else self._table.first_seq + row
        return Corruption(
            "checksum mismatch", file=self._name, offset=offset, first_seq=seq, last_seq=seq
        )


def in_disk_order(blocks: np.ndarray, places: np.ndarray, view: memoryview) -> list[Write]:
    """Blocks at ``places`` in a view as writes, ascending; neighbours on the disk are one."""
    order = np.argsort(blocks)
    blocks, places = blocks[order].astype(np.int64), places[order]
    near = np.diff(blocks) == 1
    offsets = (blocks * BLOCK).tolist()
    if not near.any():
        return [
            (offset, (view[place : place + BLOCK],))
            for offset, place in zip(offsets, places.tolist(), strict=True)
        ]
    # Pieces are contiguous in both; runs, on the disk.
    first = np.flatnonzero(np.append(True, ~(near & (np.diff(places) == BLOCK))))
    ends = places[np.append(first[1:], len(blocks)) - 1] + BLOCK
    pieces = [
        view[start:end]
        for start, end in zip(places[first].tolist(), ends.tolist(), strict=True)
    ]  # fmt: skip
    runs = np.flatnonzero(np.append(True, ~near)[first]).tolist()
    starts = first.tolist()
    return [
        (offsets[starts[low]], tuple(pieces[low:high]))
        for low, high in zip(runs, [*runs[1:], len(pieces)], strict=True)
    ]
