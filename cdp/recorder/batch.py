"""Records that are about to be appended with one write: built request by request, then committed.

A batch belongs to one connection and holds views of its receive buffer, so it lives only until its
`commit`, without an await in between (or longer, without those views: `nospace`). Small contents
that follow each other form a *run*: in the segment they lie one after the other, so one call tells
the overlay where all of them are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from cdp.recorder.overlay import EXTENT_BLOCKS_MIN, Extent
from cdp.recorder.tail import RECORD_WORK_MIN
from journal.format import BLOCK, SUM_LARGE, Kind, checksum
from journal.limits import RECORD_BYTES_MAX

if TYPE_CHECKING:
    from cdp.recorder.overlay import Generation
    from journal.redo import Appended

# What apply must do for a block: write it, and at worst save what it overwrites.
BLOCK_WORK: Final = 2 * BLOCK
RECORD_BLOCKS_MAX: Final = RECORD_BYTES_MAX // BLOCK

_WRITE: Final = int(Kind.WRITE)


class Batch:
    """Records of one connection. ``cookies``: whom to answer at once, ``fua``: when durable."""

    __slots__ = (
        "blocks", "cookies", "entries", "fua", "larges", "newest", "payload_bytes", "payloads",
        "places", "run_blocks", "run_offset", "run_sums", "sums", "work", "written_bytes",
    )  # fmt: skip

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.entries: list[int] = []
        self.payloads: list[bytes | bytearray | memoryview] = []
        self.sums: list[int] = []
        self.payload_bytes = 0
        self.work = 0
        self.written_bytes = 0
        self.cookies: list[bytes] = []
        self.fua: list[bytes] = []
        # What the overlay is told: (first, count, kind, offset, sums); the run is not in it yet.
        self.places: list[tuple[int, int, int, int, list[int]]] = []
        self.blocks: list[list[int]] = []
        self.run_blocks: list[int] = []
        self.run_sums = 0
        self.run_offset = 0
        # Content of blocks as of here, for who must widen a write; None: not needed so far.
        self.newest: dict[int, bytes | bytearray | memoryview] | None = None
        self.larges: list[tuple[int, int]] = []

    def take_over(self) -> Batch:
        """All of it as another batch, with contents of its own; this one begins anew."""
        other = Batch()
        for name in Batch.__slots__:
            setattr(other, name, getattr(self, name))
        other.payloads = [
            bytes(each) if isinstance(each, memoryview) else each for each in self.payloads
        ]
        other.newest = None
        self.clear()
        return other

    def add_write(self, first: int, count: int, payload: bytes | bytearray | memoryview) -> None:
        """A write of whole blocks. A record too large for one is cut (see `partial`)."""
        assert len(payload) == count * BLOCK
        while count > RECORD_BLOCKS_MAX:
            view = memoryview(payload)
            self.add_write(first, RECORD_BLOCKS_MAX, view[:RECORD_BYTES_MAX])
            payload = view[RECORD_BYTES_MAX:]
            first += RECORD_BLOCKS_MAX
            count -= RECORD_BLOCKS_MAX
        self.entries += (first, 0, count, _WRITE, 0, 0)
        self.payloads.append(payload)
        if count == 1:
            self.run_blocks.append(first)
            self.sums.append(checksum(payload))
        elif count < EXTENT_BLOCKS_MIN:
            self.run_blocks.extend(range(first, first + count))
            view = memoryview(payload)
            self.sums.extend(
                [checksum(view[at : at + BLOCK]) for at in range(0, count * BLOCK, BLOCK)]
            )
        else:
            self._end_run()
            view = memoryview(payload)
            sums = [
                checksum(view[at : at + SUM_LARGE]) for at in range(0, count * BLOCK, SUM_LARGE)
            ]
            self.places.append((first, count, _WRITE, self.payload_bytes, sums))
            self.sums.extend(sums)
            self.run_sums = len(self.sums)
            self.run_offset = self.payload_bytes + count * BLOCK
            self.larges.append((first, first + count))
        self.payload_bytes += count * BLOCK
        self.work += count * BLOCK_WORK
        if self.newest is not None and count < EXTENT_BLOCKS_MIN:
            self._note(first, count, payload)

    def add_without_content(self, kind: Kind, first: int, count: int) -> None:
        """A zero or a trim of whole blocks."""
        assert count
        self._end_run()
        self.entries += (first, 0, count, int(kind), 0, 0)
        self.places.append((first, count, int(kind), 0, []))
        self.run_sums = len(self.sums)
        self.run_offset = self.payload_bytes
        self.larges.append((first, first + count))
        self.work += RECORD_WORK_MIN if kind == Kind.TRIM else count * BLOCK_WORK
        if self.newest is not None:
            for block in [block for block in self.newest if first <= block < first + count]:
                del self.newest[block]

    def _end_run(self) -> None:
        if self.run_blocks:
            sums = self.sums[self.run_sums :]
            self.places.append((0, 0, 0, self.run_offset, sums))
            self.blocks.append(self.run_blocks)
            self.run_blocks = []

    def _note(self, first: int, count: int, payload: bytes | bytearray | memoryview) -> None:
        assert self.newest is not None
        if count == 1:
            self.newest[first] = payload
            return
        view = memoryview(payload)
        for number in range(count):
            self.newest[first + number] = view[number * BLOCK : (number + 1) * BLOCK]

    # -------------------------------------------------------------------- for partial writes
    def content_of(self, block: int) -> bytes | bytearray | memoryview | None:
        """What this batch makes of a block, if it is in a small record of it."""
        if self.newest is None:
            self.newest = {}
            entries = self.entries
            payloads: Iterator[bytes | bytearray | memoryview] = iter(self.payloads)
            for at in range(0, len(entries), 6):
                if entries[at + 3] == _WRITE:
                    payload = next(payloads)
                    if entries[at + 2] < EXTENT_BLOCKS_MIN:
                        self._note(entries[at], entries[at + 2], payload)
        return self.newest.get(block)

    def must_commit_before(self, block: int) -> bool:
        """Whether a record without small contents covers the block: the overlay can tell then."""
        return any(first <= block < end for first, end in self.larges)

    # --------------------------------------------------------------------------- once appended
    def tell(self, generation: Generation, appended: Appended) -> None:
        """Tell the overlay where everything is."""
        self._end_run()
        base = appended.payload
        runs = iter(self.blocks)
        for first, count, kind, offset, sums in self.places:
            if not count:
                generation.add_run(next(runs), base + offset, sums, appended.last_seq)
            elif kind == _WRITE:
                extent = Extent(kind, first, base + offset, count * BLOCK, sums)
                generation.add_extent(first, count, extent)
            else:
                generation.add_without_content(kind, first, count)
        generation.last_seq = appended.last_seq
