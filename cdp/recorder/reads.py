"""Fetching what a read needs: from the page cache in the loop, from disks in threads.

The loop never waits for a disk. It asks with RWF_NOWAIT; what is not in the page cache becomes a
`Job` for one of a few threads, and is answered when it is done, in whatever order. The places were
looked up before, in the loop (`overlay`); what is read afterwards, even much later, is right: a
place in the redo log never changes, its file stays open while a job needs it
(`Readers.oldest_segment`), and a place in the backing can only have become newer, by a write that
the reader raced with.

What comes out of the redo log is verified. A record that does not have its checksum is `Damaged`:
its blocks cannot be read, and the backing must not answer for it, for it holds what was before.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from cdp.recorder.overlay import BACKING, LARGE, SMALL, ZERO, Extent, Generation, Piece
from journal.format import BLOCK, checksum, sum_unit

log = logging.getLogger(__name__)

THREADS: Final = 8
_ZEROES: Final = bytes(1 << 16)
NOWAIT: Final = os.RWF_NOWAIT


class Damaged(OSError):
    """Content of an unapplied record is not what was written."""

    def __init__(self, generation: Generation, offset: int) -> None:
        super().__init__(
            errno.EIO,
            f"checksum mismatch in redo segment {generation.segment} at byte {offset}, in a record "
            "that is not applied: its blocks cannot be read; run 'cdp scrub'",
        )


def fetch(pieces: Sequence[Piece], backing: int, offset: int, into: memoryview, flags: int) -> bool:
    """Fill `into` with the bytes from `offset` of the disk on, which `pieces` cover.

    With NOWAIT in `flags`: False when not all of it is in the page cache. Without: always True.
    OSError when it cannot be read, of which Damaged is one.
    """
    end = offset + len(into)
    for kind, first, count, generation, where in pieces:
        low, high = max(first * BLOCK, offset), min((first + count) * BLOCK, end)
        part = into[low - offset : high - offset]
        if kind == BACKING:
            if not _read(backing, low, part, flags, beyond_end=True):
                return False
        elif kind == ZERO:
            zero(part)
        elif kind == SMALL:
            assert generation is not None
            assert isinstance(where, int)
            skip = low - first * BLOCK
            if not _fetch_small(generation, where, skip, part, flags):
                return False
        else:
            assert generation is not None
            assert isinstance(where, Extent)
            skip = low - where.first * BLOCK
            if not _fetch_large(generation, where, skip, part, flags):
                return False
    return True


def zero(part: memoryview) -> None:
    """Fill with zeroes."""
    size = len(part)
    for at in range(0, size, len(_ZEROES)):
        step = min(len(_ZEROES), size - at)
        part[at : at + step] = _ZEROES[:step]


def _read(fd: int, at: int, into: memoryview, flags: int, *, beyond_end: bool) -> bool:
    """Read exactly; what lies beyond the file's end is zero if it may be, else EIO."""
    if flags:
        try:
            return os.preadv(fd, (into,), at, flags) == len(into)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # this file system cannot tell
                return False
            raise
    while into:
        done = os.preadv(fd, (into,), at)
        if not done:
            if not beyond_end:
                raise OSError(errno.EIO, "a segment of the redo log is too short")
            zero(into)
            break
        at, into = at + done, into[done:]
    return True


def _fetch_small(
    generation: Generation, offset: int, skip: int, part: memoryview, flags: int
) -> bool:
    """Bytes of consecutive small contents that begin at `offset`, from `skip` on."""
    fd = generation.file.fileno()
    low, high = skip // BLOCK * BLOCK, -(-(skip + len(part)) // BLOCK) * BLOCK
    whole = part
    if high - low != len(part):
        whole = memoryview(bytearray(high - low))
    if not _read(fd, offset + low, whole, flags, beyond_end=False):
        return False
    for at in range(0, high - low, BLOCK):
        if checksum(whole[at : at + BLOCK]) != generation.sum_of(offset + low + at):
            raise Damaged(generation, offset + low + at)
    if whole is not part:
        part[:] = whole[skip - low : skip - low + len(part)]
    return True


def _fetch_large(
    generation: Generation, extent: Extent, skip: int, part: memoryview, flags: int
) -> bool:
    """Bytes of a large record from its byte `skip` on; whole units are read, to verify them."""
    fd = generation.file.fileno()
    unit = sum_unit(extent.nbytes)
    low = skip // unit * unit
    high = min(extent.nbytes, -(-(skip + len(part)) // unit) * unit)
    whole = part
    if high - low != len(part):
        whole = memoryview(bytearray(high - low))
    if not _read(fd, extent.offset + low, whole, flags, beyond_end=False):
        return False
    for at in range(low, high, unit):
        if checksum(whole[at - low : min(at + unit, high) - low]) != extent.sums[at // unit]:
            raise Damaged(generation, extent.offset + at)
    if whole is not part:
        part[:] = whole[skip - low : skip - low + len(part)]
    return True


def holes(fd: int, start: int, end: int) -> Iterator[tuple[int, bool]]:
    """(length, whether it is a hole) of a file from `start` to `end`, as far as it can tell.

    What lies beyond the end of the file reads as zeroes: a hole.
    """
    at = start
    while at < end:
        try:
            data = min(os.lseek(fd, at, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                yield end - at, True
            else:
                yield end - at, False
            return
        if data > at:
            yield data - at, True
            at = data
        if at < end:
            hole = min(os.lseek(fd, at, os.SEEK_HOLE), end)
            yield hole - at, False
            at = hole


# ---------------------------------------------------------------------------------------- threads
class Job(Protocol):
    """Something to do in a thread, and then to be finished in the loop."""

    oldest_segment: int | None

    def work(self) -> None:
        """Runs in a reader thread; must not touch anything of the loop's, must not raise."""
        ...

    def finish(self) -> None:
        """Runs in the loop afterwards."""
        ...


class Fetch:
    """A `fetch` that has to wait for a disk."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        backing: int,
        offset: int,
        into: memoryview,
        then: Callable[[OSError | None], None],
    ) -> None:
        self.pieces, self.backing, self.offset, self.into = pieces, backing, offset, into
        self.then = then
        self.error: OSError | None = None
        segments = [piece[3].segment for piece in pieces if piece[3] is not None]
        self.oldest_segment = min(segments, default=None)

    def work(self) -> None:
        try:
            fetch(self.pieces, self.backing, self.offset, self.into, 0)
        except OSError as error:
            self.error = error

    def finish(self) -> None:
        self.then(self.error)


class Advise:
    """Ask the kernel to read a part of the backing ahead; nobody waits for it."""

    oldest_segment: int | None = None

    def __init__(self, backing: int, ranges: Sequence[tuple[int, int]]) -> None:
        self.backing, self.ranges = backing, ranges

    def work(self) -> None:
        try:
            for offset, length in self.ranges:
                os.posix_fadvise(self.backing, offset, length, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            log.debug("no read-ahead: %s", error)

    def finish(self) -> None:
        pass


class Readers:
    """A few threads that wait for disks. `notify` is called in them when something is done.

    They are daemon threads: one that is stuck in the kernel must not keep the process from ending
    as far as that is possible; the kernel keeps the process's lock until it has come out.
    """

    def __init__(self, notify: Callable[[], None], threads: int = THREADS) -> None:
        self._notify = notify
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads_max = threads
        self._threads: list[threading.Thread] = []
        self._segments: Counter[int] = Counter()
        self.done: deque[Job] = deque()
        self.pending = 0

    def submit(self, job: Job) -> None:
        """Have a job done; never waits."""
        if self.pending >= len(self._threads) and len(self._threads) < self._threads_max:
            thread = threading.Thread(target=self._run, name="reader", daemon=True)
            self._threads.append(thread)
            thread.start()
        self.pending += 1
        if job.oldest_segment is not None:
            self._segments[job.oldest_segment] += 1
        self._jobs.put(job)

    def finish_done(self) -> int:
        """In the loop: finish what the threads have done; how many there were."""
        count = 0
        while self.done:
            job = self.done.popleft()
            self.pending -= 1
            count += 1
            if job.oldest_segment is not None:
                self._segments[job.oldest_segment] -= 1
                if not self._segments[job.oldest_segment]:
                    del self._segments[job.oldest_segment]
            job.finish()
        return count

    @property
    def oldest_segment(self) -> int | None:
        """The oldest segment that a job in flight reads; its file must stay open."""
        return min(self._segments, default=None)

    def stop(self) -> None:
        """Let idle threads end; does not wait."""
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            job.work()
            self.done.append(job)
            self._notify()


assert (BACKING, ZERO, SMALL, LARGE) == (0, 1, 2, 3)
