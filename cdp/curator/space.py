"""How much the journal may take: its limit, or less while its file system is full; and the reserve.

As long as nobody was refused space, the configured limit counts, whatever the file system has left:
history is not given up because somebody else fills it while nothing is written here. From the first
refusal on the journal is *confined* to what it has and what is left: so at its limit before the
file system is full again, with all that follows from that, also that writes are slowed down before
they are refused. That ends when there is plenty of space.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from journal import reserve
from journal.storage import Storage

log = logging.getLogger(__name__)

RESERVE_PART: Final = 8  # of the limit at most
RESERVE_STEP: Final = 256 << 10  # it is rarely made larger
# So much of what could be taken must be left, and so many segments, before the limit counts again:
# more than is made free by giving up history, else one would follow the other for ever.
PLENTY_PART: Final = 2
PLENTY_SEGMENTS: Final = 10
# So many are left to the curator, who needs space to make some.
MARGIN_SEGMENTS: Final = 2
# With less than so many left the file system may be full before the next look.
NEAR_SEGMENTS: Final = 64


class Space:
    """See the module. ``confined``: whether less than the configured limit counts."""

    def __init__(
        self, storage: Storage, available: Callable[[], int], *, segment_bytes: int
    ) -> None:
        self._storage, self.available = storage, available
        self._segment_bytes = segment_bytes
        self._reserved = 0
        self.confined = False

    def confine(self) -> None:
        """Something was refused space. If that was a quota's doing, nobody knows what it leaves."""
        if not self.confined and self.scarce:
            log.warning("the journal's file system is full: free some space there")
            self.confined = True

    @property
    def scarce(self) -> bool:
        """Whether not even a segment would fit on the file system."""
        return self.available() < self._segment_bytes

    def limit(self, total: int, configured: int) -> int:
        """The limit of a journal that takes ``total`` bytes now."""
        if not self.confined:
            return configured
        left = self.available()
        there = total + left
        plenty = max(there // PLENTY_PART, PLENTY_SEGMENTS * self._segment_bytes)
        if left > plenty:
            self.confined = False
            log.info("the journal's file system has space again")
            return configured
        return min(configured, there - MARGIN_SEGMENTS * self._segment_bytes)

    # ----------------------------------------------------------------------------- the reserve
    def keep_reserve(self, configured: int, largest: int) -> None:
        """Have one, if there is space for it and for some writes more.

        ``largest``: bytes of the largest segment that may have to be given up. Whatever is still
        needed of that fits, and new copies of the catalog. Where there is little left it is made
        for a full one at once: there may be no other time.
        """
        left = self.available()
        if left < NEAR_SEGMENTS * self._segment_bytes:
            largest = max(largest, self._segment_bytes)
        wanted = -(-largest // RESERVE_STEP) * RESERVE_STEP * 5 // 4 + RESERVE_STEP
        size = self._reserved = max(self._reserved, min(configured // RESERVE_PART, wanted))
        if left >= size + 2 * self._segment_bytes:
            reserve.make(self._storage, size)

    def release_reserve(self) -> bool:
        """Give it away; whether there was one. The recorder has been held before."""
        if not reserve.release(self._storage):
            return False
        log.warning("no space: what was kept in reserve is used to make some")
        return True
