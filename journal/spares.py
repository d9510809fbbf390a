"""Files of zeroes that redo segments are made of: appending to them is cheap.

An append to a file that grows has the file system find space for it, and a sync must make that
durable as well. Into blocks that are written already an append takes a third to half of the time,
and a sync half. So in quiet times some files of a segment's size are filled with zeroes and made
durable; a new segment is one of them, renamed. What has not been written of it stays zero until it
is sealed, which cuts the rest off: the format knows nothing of this (FORMAT.md, "zeroes up to").

They have temporary names in the redo log's directory: a recovery removes those that are left, and
no reader takes them for segments. The name of a segment made of one becomes durable with the
directory, as that of any other. If a power loss takes the renaming back, the file is removed with
all that was appended to it: that was not durable, for `durable` passes nothing of a segment whose
name is not.

Threads: `prepare` runs in one thread at a time, `take` and `discard` also in the loop's, beside it;
what they share is a deque, whose ends are taken and added to by one step.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Final

from journal.format import Log
from journal.limits import MIB
from journal.segment import DIRECTORY, TEMPORARY
from journal.storage import File, Storage

_DIRECTORY: Final = DIRECTORY[Log.REDO]
# Not larger: what is written in pieces so large is cached in pieces so large, and a small write
# into those takes longer.
_PIECE_BYTES: Final = 64 << 10
_ZEROES: Final = bytes(_PIECE_BYTES)
_STEP_BYTES: Final = MIB


class Spares:
    """At most ``count`` files of ``segment_bytes``; none when ``count`` is 0."""

    def __init__(self, storage: Storage, segment_bytes: int, count: int) -> None:
        self._storage = storage
        self.segment_bytes, self.count = segment_bytes, count
        self._ready: deque[tuple[str, File]] = deque()
        self._number = 0

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def wanted(self) -> bool:
        """Whether there are fewer than there should be."""
        return len(self._ready) < self.count

    def prepare(self, may_go_on: Callable[[], bool]) -> bool:
        """Make one; False: ``may_go_on`` said no in between, and nothing is left of it.

        That is asked after each MiB, and pauses for a moment, so that neither clients nor their
        syncs notice.

        :raises OSError: it could not be made; nothing is left of it either.
        """
        self._number += 1
        name = f"{_DIRECTORY}/spare-{self._number}{TEMPORARY}"
        file = self._storage.open(name, "create")
        try:
            whole = self._fill(file, may_go_on)
        except OSError:
            self._remove(name, file)
            raise
        if whole:
            self._ready.append((name, file))
        else:
            self._remove(name, file)
        return whole

    def _fill(self, file: File, may_go_on: Callable[[], bool]) -> bool:
        for at in range(0, self.segment_bytes, _PIECE_BYTES):
            file.write(at, [_ZEROES[: self.segment_bytes - at]])
            if at % _STEP_BYTES == _STEP_BYTES - _PIECE_BYTES:
                file.writeback(at + _PIECE_BYTES - _STEP_BYTES, _STEP_BYTES)
                if not may_go_on():
                    return False
        file.sync()
        return True

    def take(self) -> tuple[str, File] | None:
        """One of them with its present name, the caller's from now on; None: there is none."""
        try:
            return self._ready.popleft()
        except IndexError:
            return None

    def discard(self) -> bool:
        """Give their space back; whether there was any."""
        found = False
        while (spare := self.take()) is not None:
            self._remove(*spare)
            found = True
        return found

    def _remove(self, name: str, file: File) -> None:
        file.close()
        with contextlib.suppress(OSError):  # the next recovery does it
            self._storage.unlink(name)
