"""Views: a disk as it was at one point, read-only, or writable with an overlay that is thrown away.

A view never changes, whatever the live disk does: its point is pinned in the catalog, and its
content is resolved through the logs (`replay.history`). The overlay of a writable view is a
bounded, unnamed sparse file; when it is full that view alone gets ENOSPC.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import trio
from pyroaring import BitMap

from journal.format import BLOCK
from replay.history import History
from replay.places import Places

DATA, HOLE_ZERO = 0, 3  # base:allocation: NBD_STATE_HOLE | NBD_STATE_ZERO


def allocate(length: int) -> memoryview:
    """New memory."""
    return memoryview(bytearray(length))


class View:
    """A read-only view. ``size`` in bytes; a short last block is padded inside."""

    writable = False

    def __init__(
        self, name: str, seq: int, size: int, history: History, places: Places,
        lock: threading.Lock,
    ) -> None:  # fmt: skip
        """``places``: of all views of the history; ``lock``: both are for one thread at a time."""
        self.name, self.seq, self.size = name, seq, size
        self.history, self._places, self._lock = history, places, lock
        self.connections = 0
        self.scopes: set[trio.CancelScope] = set()

    @property
    def overlay_bytes(self) -> int:
        """Bytes that the overlay takes."""
        return 0

    def read(self, offset: int, length: int) -> memoryview:
        """Bytes of the disk at the point."""
        return self.read_batch([(offset, length)], allocate)[0]

    def read_batch(
        self, requests: list[tuple[int, int]], room: Callable[[int], memoryview]
    ) -> list[memoryview]:
        """Several ``(offset, length)`` at once: what costs is done once for all of them.

        ``room``: gives memory for so many bytes, with any content; what is returned lies in it.
        :raises Corruption: what holds one of them is damaged.
        """
        spans = [
            (offset // BLOCK, -(-(offset + length) // BLOCK)) for offset, length in requests
        ]  # fmt: skip
        total = sum(end - first for first, end in spans)
        if total == len(spans):
            blocks = np.array([first for first, _ in spans], np.uint64)
        else:
            parts = [np.arange(first, end, dtype=np.uint64) for first, end in spans]
            blocks = parts[0] if len(parts) == 1 else np.concatenate(parts)
        content = room(total * BLOCK)
        with self._lock:
            self._places.read_into(content, blocks, self.seq)
        result, at = [], 0
        for (offset, length), (first, end) in zip(requests, spans, strict=True):
            start = at + offset - first * BLOCK
            result.append(content[start : start + length])
            at += (end - first) * BLOCK
        return result

    def allocation(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, flags) extents of base:allocation over the range."""
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        with self._lock:
            zero = self.history.zeroes(first, last - first, self.seq)
        edges = np.flatnonzero(np.diff(zero.astype(np.int8))) + 1
        bounds = [0, *edges.tolist(), len(zero)]
        extents = []
        for low, high in itertools.pairwise(bounds):
            start = max(offset, (first + low) * BLOCK)
            end = min(offset + length, (first + high) * BLOCK)
            extents.append((end - start, HOLE_ZERO if zero[low] else DATA))
        return extents

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Refused: the view is read-only."""
        raise OSError(errno.EPERM, "this view is read-only")

    def zero(self, offset: int, length: int) -> None:
        """Refused: the view is read-only."""
        raise OSError(errno.EPERM, "this view is read-only")

    def close(self) -> None:
        """Nothing is held."""


class WritableView(View):
    """A view with an overlay of whole blocks; what is written is gone when the view is closed."""

    writable = True

    def __init__(
        self, name: str, seq: int, size: int, history: History, places: Places,
        lock: threading.Lock, *, directory: Path, limit: int,
    ) -> None:  # fmt: skip
        """``directory``: where the overlay lies; ``limit``: bytes it may take."""
        super().__init__(name, seq, size, history, places, lock)
        self._fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._limit = limit
        self._present, self._zeroed = BitMap(), BitMap()

    @property
    def overlay_bytes(self) -> int:
        return len(self._present) * BLOCK

    def read_batch(
        self, requests: list[tuple[int, int]], room: Callable[[int], memoryview]
    ) -> list[memoryview]:
        if not self._present and not self._zeroed:
            return super().read_batch(requests, room)
        return [self._read(offset, length) for offset, length in requests]

    def _read(self, offset: int, length: int) -> memoryview:
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        content = bytearray((last - first) * BLOCK)
        ours = BitMap(range(first, last)) & (self._present | self._zeroed)
        others = np.array([b for b in range(first, last) if b not in ours], np.uint64)
        if len(others):
            below = bytearray(len(others) * BLOCK)
            with self._lock:
                self._places.read_into(memoryview(below), others, self.seq)
            for at, block in enumerate(others.tolist()):
                start = (block - first) * BLOCK
                content[start : start + BLOCK] = below[at * BLOCK : (at + 1) * BLOCK]
        for block in ours & self._present:
            start = (block - first) * BLOCK
            content[start : start + BLOCK] = os.pread(self._fd, BLOCK, block * BLOCK)
        return memoryview(content)[offset - first * BLOCK :][:length]

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Into the overlay.

        :raises OSError: ENOSPC when the overlay would exceed its limit.
        """
        first, last = offset // BLOCK, -(-(offset + len(data)) // BLOCK)
        span = BitMap(range(first, last))
        if (len(self._present) + len(span - self._present)) * BLOCK > self._limit:
            raise OSError(errno.ENOSPC, "the view's overlay is full")
        start, end = first * BLOCK, last * BLOCK
        if offset != start or offset + len(data) != end:
            whole = bytearray(self._read(start, end - start))
            whole[offset - start : offset - start + len(data)] = data
            data = memoryview(whole)
        os.pwrite(self._fd, data, start)
        self._present |= span
        self._zeroed -= span

    def zero(self, offset: int, length: int) -> None:
        """Zeroes into the overlay: whole blocks as marks, partial ones as data."""
        first, last = -(-offset // BLOCK), (offset + length) // BLOCK
        if first >= last:
            self.write(offset, bytes(length))
            return
        if offset < first * BLOCK:
            self.write(offset, bytes(first * BLOCK - offset))
        if offset + length > last * BLOCK:
            self.write(last * BLOCK, bytes(offset + length - last * BLOCK))
        span = BitMap()
        span.add_range(first, last)
        self._present -= span
        self._zeroed |= span

    def allocation(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Everything may be data once something was written: 0 is always a safe answer."""
        if not self._present and not self._zeroed:
            return super().allocation(offset, length)
        return [(length, DATA)]

    def close(self) -> None:
        """The overlay is gone."""
        os.close(self._fd)
