"""The frontier: one memory-mapped page of numbers that the processes of a disk show each other.

Each number is one naturally aligned 8-byte word and is stored and loaded by one instruction, so
that a reader sees an old or the new value, never a mixture. Two numbers are not read together:
whoever needs a pair orders the stores and loads (see the fields).

Who writes what: the recorder ``epoch``, ``durable``, ``durable_stamp``, ``redo_generation``,
``redo_bytes``, ``redo_refused``; the curator ``applied``, ``window_start``, ``curator_generation``,
``undo_published``, ``redo_bytes_max``; the supervisor ``stamp_ceiling``. At its start, before it
raises ``epoch``, the recorder also sets ``applied``.

**How the journal keeps its limit.** The recorder counts what it appends in ``redo_bytes``, the
curator answers with ``redo_bytes_max``, up to which it may go on: what was counted *before* the
curator looked at the files, and the room that it found. So what arrives while the curator is busy
is bounded by the room that there was, however long its step takes.

**The page is a cache that is worth nothing after a reboot**: it lies on tmpfs, and the boot's
identity inside tells a page of another boot, should it lie on a disk. Nothing in it is ever synced,
and no crash can leave it half-written in a way that counts: a power loss ends the boot, and after
the death of a process the kernel's pages hold exactly what was stored. That is why this module,
alone in the journal, does not go through `journal.storage`: a simulator of power losses has nothing
to lose here.

A page of another boot, disk or layout is never cleaned in place (a process that has it mapped would
see numbers fall): a zeroed one is made beside it and renamed over it. Of several processes that do
so at once one wins and all use its page: a missing page is made by ``link``, which refuses an
existing name; a stale one is replaced by whoever holds its flock and finds it still in place.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from journal.errors import Conflict, NotFound
from journal.format import ALIGN, SEGMENT_ID_MAX
from journal.limits import UNDO_POSITION_BITS

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_BYTES: Final = 4096
LAYOUT_VERSION: Final = 1
_MAGIC: Final = b"CDPFRONT"
_HEAD: Final = struct.Struct("=8sQ16s16s16s")  # magic, layout, boot, disk, reserved
assert _HEAD.size == 64
_FIRST_WORD: Final = _HEAD.size // 8
_ATTEMPTS: Final = 100

# The layout: word number behind the head. Changing it means a new LAYOUT_VERSION.
_EPOCH: Final = _FIRST_WORD + 0
_DURABLE: Final = _FIRST_WORD + 1
_DURABLE_STAMP: Final = _FIRST_WORD + 2
_APPLIED: Final = _FIRST_WORD + 3
_WINDOW_START: Final = _FIRST_WORD + 4
_REDO_GENERATION: Final = _FIRST_WORD + 5
_CURATOR_GENERATION: Final = _FIRST_WORD + 6
_UNDO_PUBLISHED: Final = _FIRST_WORD + 7
_STAMP_CEILING: Final = _FIRST_WORD + 8
# Word 9 was a flag, 0 for ever now. A word added behind whose 0 means "nothing was said" needs no
# new layout: processes of both programs agree.
_REDO_BYTES: Final = _FIRST_WORD + 10
_REDO_BYTES_MAX: Final = _FIRST_WORD + 11
_REDO_REFUSED: Final = _FIRST_WORD + 12


def pack_position(segment: int, end_offset: int) -> int:
    """A place in the undo log as one word; positions compare as the places do. 0 is before all."""
    assert 0 < segment < SEGMENT_ID_MAX
    assert end_offset % ALIGN == 0
    assert 0 <= end_offset // ALIGN < 1 << UNDO_POSITION_BITS
    return segment << UNDO_POSITION_BITS | end_offset // ALIGN


def unpack_position(position: int) -> tuple[int, int]:
    """Segment and end offset in bytes of a packed position; (0, 0) when there is none."""
    return position >> UNDO_POSITION_BITS, (position & (1 << UNDO_POSITION_BITS) - 1) * ALIGN


class FrontierMissing(NotFound):
    """There is no page of this boot: the recorder makes one when it starts."""


class Frontier:
    """The mapped page.

    Numbers only rise (but ``window_start``, which a new policy may move either way within what is
    kept): the setters of the others assert it. In particular **applied never falls while a recorder
    lives**: the recorder has dropped its overlay up to there.

    ``fresh``: the page was there and of this boot, so its numbers mean something. A page whose
    ``epoch`` is 0 has not seen a recorder yet.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, *, fresh: bool, read_only: bool) -> None:
        self.path = path
        self.fresh = fresh
        self.read_only = read_only
        self._mmap = mapped
        self._view = memoryview(mapped)
        self._words = self._view.cast("Q")

    @classmethod
    def open(
        cls, path: Path, *, disk: bytes, boot_id: bytes, create: bool, read_only: bool = False
    ) -> Frontier:
        """Map the page of this disk and boot.

        :param create: make it if there is none of this boot (the recorder; whoever else finds none
            waits for the recorder instead of inventing one).
        :raises FrontierMissing: there is none of this boot, and ``create`` is false.
        :raises Conflict: something of another user is in its place.
        """
        assert len(disk) == len(boot_id) == 16
        assert not (create and read_only)
        head = _HEAD.pack(_MAGIC, LAYOUT_VERSION, boot_id, disk, b"")
        fresh = True
        for _ in range(_ATTEMPTS):
            mapped = _map_if_of_this_boot(path, head, read_only)
            if mapped is not None:
                return cls(path, mapped, fresh=fresh, read_only=read_only)
            if not create:
                raise FrontierMissing(
                    f"{path} is not of this boot: start the disk's recorder first"
                )
            fresh = not _make(path, head) and fresh
        raise Conflict(f"{path} keeps being replaced: is another cdpd running?")

    def close(self) -> None:
        """Unmap it; the page stays for the other processes."""
        if self._mmap.closed:
            return
        self._words.release()
        self._view.release()
        self._mmap.close()

    def __enter__(self) -> Frontier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _raise(self, word: int, value: int) -> None:
        assert value >= self._words[word], f"{self.path.name}: word {word} must not fall"
        self._words[word] = value

    @property
    def epoch(self) -> int:
        """How many recorders have come up in this boot; 0: none yet, all else means nothing."""
        return self._words[_EPOCH]

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._raise(_EPOCH, value)

    @property
    def durable(self) -> int:
        """The highest seq on stable storage; nobody but the recorder looks at a record above."""
        return self._words[_DURABLE]

    @durable.setter
    def durable(self, value: int) -> None:
        self._raise(_DURABLE, value)

    @property
    def durable_stamp(self) -> int:
        """Stamp of ``durable``: stored before it and loaded after it, so never too small."""
        return self._words[_DURABLE_STAMP]

    @durable_stamp.setter
    def durable_stamp(self, value: int) -> None:
        self._raise(_DURABLE_STAMP, value)

    @property
    def applied(self) -> int:
        """The highest seq whose effects are in the backing, synced."""
        return self._words[_APPLIED]

    @applied.setter
    def applied(self, value: int) -> None:
        self._raise(_APPLIED, value)

    @property
    def window_start(self) -> int:
        """First seq of the window, as durable in the catalog."""
        return self._words[_WINDOW_START]

    @window_start.setter
    def window_start(self, value: int) -> None:
        self._words[_WINDOW_START] = value

    @property
    def redo_generation(self) -> int:
        """Raised by the recorder after a new segment's name appeared."""
        return self._words[_REDO_GENERATION]

    @redo_generation.setter
    def redo_generation(self, value: int) -> None:
        self._raise(_REDO_GENERATION, value)

    @property
    def curator_generation(self) -> int:
        """Raised by the curator after a new run or undo segment appeared and before an unlink."""
        return self._words[_CURATOR_GENERATION]

    @curator_generation.setter
    def curator_generation(self, value: int) -> None:
        self._raise(_CURATOR_GENERATION, value)

    @property
    def undo_published(self) -> int:
        """Up to where the undo log may be read (:func:`pack_position`)."""
        return self._words[_UNDO_PUBLISHED]

    @undo_published.setter
    def undo_published(self, value: int) -> None:
        self._raise(_UNDO_PUBLISHED, value)

    @property
    def stamp_ceiling(self) -> int:
        """Durable bound of the stamps that may be given out (ns)."""
        return self._words[_STAMP_CEILING]

    @stamp_ceiling.setter
    def stamp_ceiling(self, value: int) -> None:
        self._raise(_STAMP_CEILING, value)

    @property
    def redo_bytes(self) -> int:
        """Bytes appended to the redo log in this boot; at most some 64 KiB behind the truth."""
        return self._words[_REDO_BYTES]

    @redo_bytes.setter
    def redo_bytes(self, value: int) -> None:
        self._raise(_REDO_BYTES, value)

    @property
    def redo_bytes_max(self) -> int:
        """What ``redo_bytes`` may rise to; it may also fall. 0: no curator has said anything."""
        return self._words[_REDO_BYTES_MAX]

    @redo_bytes_max.setter
    def redo_bytes_max(self, value: int) -> None:
        self._words[_REDO_BYTES_MAX] = value

    @property
    def redo_refused(self) -> int:
        """How many appends to the redo log had no space in this boot."""
        return self._words[_REDO_REFUSED]

    @redo_refused.setter
    def redo_refused(self, value: int) -> None:
        self._raise(_REDO_REFUSED, value)

    def generations(self) -> tuple[int, int]:
        """Both generations: unchanged around a listing, they prove that it missed nothing."""
        return self._words[_REDO_GENERATION], self._words[_CURATOR_GENERATION]


# -------------------------------------------------------------------------------- making the page
@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _map_if_of_this_boot(path: Path, head: bytes, read_only: bool) -> mmap.mmap | None:
    """The mapping, or None when the page is missing or stale (other head, or too short)."""
    try:
        with _opened(path, os.O_RDONLY if read_only else os.O_RDWR) as descriptor:
            status = os.fstat(descriptor)
            # Directories for shared memory are open to all users: take no numbers from another one.
            if not read_only and status.st_uid != os.geteuid():
                raise Conflict(f"{path} belongs to user {status.st_uid}: remove it")
            # A mapping beyond the file's end would end the process by a signal when touched.
            if status.st_size < PAGE_BYTES or os.pread(descriptor, len(head), 0) != head:
                return None
            access = mmap.ACCESS_READ if read_only else mmap.ACCESS_WRITE
            return mmap.mmap(descriptor, PAGE_BYTES, access=access)
    except FileNotFoundError:
        return None


def _make(path: Path, head: bytes) -> bool:
    """Put a zeroed page in place of a missing or stale one; whether it was this call that did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            # Written out, not a hole: a full tmpfs then says so here, and not by SIGBUS at a store.
            page = head.ljust(PAGE_BYTES, b"\0")
            if os.write(descriptor, page) != PAGE_BYTES:
                raise OSError(f"no space for {temporary}")
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:
            return _replace_stale(path, temporary, head)
    finally:
        temporary.unlink(missing_ok=True)


def _replace_stale(path: Path, temporary: Path, head: bytes) -> bool:
    try:
        with _opened(path, os.O_RDWR) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return False  # somebody else has replaced it meanwhile
            if os.pread(descriptor, len(head), 0) == head and (
                os.fstat(descriptor).st_size >= PAGE_BYTES
            ):
                return False  # not stale: it appeared between the look and the link
            temporary.rename(path)
            return True
    except FileNotFoundError:
        return False
