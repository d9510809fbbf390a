"""What the curator's jobs share: the logs, the backing, what is known of its blocks, and saving
images.

Apply, release, reclaim and sweep exclude each other from the first decision to the last step (R4):
the curator runs them one after the other in one thread, each with the same `Work`.
"""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Protocol

import numpy as np
from pyroaring import BitMap

from journal.bitmaps import blocks_of
from journal.catalog import Catalog
from journal.catalog_state import Op
from journal.errors import JournalFull
from journal.format import BLOCK, Kind
from journal.frontier import Frontier
from journal.storage import File, Storage
from journal.undo import UndoWriter
from replay.history import History
from replay.images import Images
from replay.openable import Openable
from replay.plan import stretches

BUFFER_BYTES = 4 << 20  # of content at once: it stays in the processor's cache
BUFFER_BLOCKS = BUFFER_BYTES // BLOCK
_FEW_TRIMS = 64
SPARE_BYTES = 64 << 10  # for headers, and what others need meanwhile


class Flight(Protocol):
    """A sync that was begun."""

    def done(self) -> bool:
        """Whether it has ended."""
        ...

    def result(self) -> None:
        """Wait for its end; raises what it raised."""
        ...


def at_once(sync: Callable[[], None]) -> Flight:
    """Begin and end a sync; the curator's process begins it in a thread instead."""
    flight: Future[None] = Future()
    try:
        sync()
    except OSError as error:
        flight.set_exception(error)
    else:
        flight.set_result(None)
    return flight


def bitmap(blocks: np.ndarray) -> BitMap:
    """A bitmap of these blocks."""
    return BitMap(array.array("I", blocks.astype(np.uint32).tobytes()))


def members(blocks: np.ndarray, of: BitMap, *, known: BitMap | None = None) -> np.ndarray:
    """Which of the blocks (sorted u64, unique) are in a bitmap (bool); ``known``: the same blocks
    as a bitmap, if there is one.
    """
    result = np.zeros(len(blocks), bool)
    if len(blocks) and of:
        common = (bitmap(blocks) if known is None else known) & of
        if len(common) == len(blocks):
            result[:] = True
        elif common:
            result[np.searchsorted(blocks, to_blocks(common))] = True
    return result


def to_blocks(of: BitMap) -> np.ndarray:
    """A bitmap's blocks, sorted (u64)."""
    return (
        np.frombuffer(of.to_array(), np.uint32).astype(np.uint64) if of else np.zeros(0, np.uint64)
    )


@dataclasses.dataclass(slots=True)
class Blocks:
    """What is known of the backing's blocks, in memory only.

    ``held``: an applied version in the redo log is no trim, so the redo log has what the backing
    has and nothing needs saving; wrongly absent costs a lookup, wrongly present loses data.
    ``masked``: the newest applied (or being applied) version is a trim; exact. ``zero``: masked
    blocks known to be zero in the backing, durably. ``data``: blocks that may be anything but a
    hole in the backing.
    """

    held: BitMap = dataclasses.field(default_factory=BitMap)
    masked: BitMap = dataclasses.field(default_factory=BitMap)
    zero: BitMap = dataclasses.field(default_factory=BitMap)
    data: BitMap = dataclasses.field(default_factory=BitMap)

    def load_extents(self, extents: Iterable[tuple[int, int]]) -> None:
        """Note where the backing may hold data: (offset, length) in bytes."""
        for offset, length in extents:
            self.data.add_range(offset // BLOCK, -(-(offset + length) // BLOCK))

    def distrust(self, size: int) -> None:
        """What the backing's ``size`` bytes hold is not known any more: a sync of it failed."""
        self.zero.clear()
        self.data.add_range(0, -(-size // BLOCK))

    def forget(self, size: int) -> None:
        """Others may have written to the backing: what the redo log says of it is void."""
        self.held.clear()
        self.masked.clear()
        self.distrust(size)

    def advance(self, rows: np.ndarray, valid: np.ndarray) -> None:
        """Bring ``masked`` forward over rows in seq order."""
        trim = valid & (rows["kind"] == Kind.TRIM)
        trims = np.flatnonzero(trim)
        if not len(trims):
            if self.masked:
                self.masked -= _blocks_of(rows[valid])
        elif len(trims) <= _FEW_TRIMS:
            content = valid & ~trim
            at = 0
            for turn in [*trims.tolist(), len(rows)]:
                if self.masked and turn > at:
                    self.masked -= _blocks_of(rows[at:turn][content[at:turn]])
                if turn < len(rows):
                    start = int(rows["block"][turn])
                    self.masked.add_range(start, start + int(rows["nblocks"][turn]))
                at = turn + 1
        else:
            self._advance_mixed(rows[valid])

    def _advance_mixed(self, rows: np.ndarray) -> None:
        """Many trims between writes: large records in turn, and of small ones the newest."""
        done = 0
        large = np.flatnonzero(rows["nblocks"] > _FEW_TRIMS).tolist()
        for at in [*large, len(rows)]:
            part = rows[done:at]
            if len(part):
                count = part["nblocks"].astype(np.int64)
                number = np.repeat(np.arange(len(part)), count)
                within = np.arange(len(number)) - np.repeat(np.cumsum(count) - count, count)
                blocks = part["block"][number] + within.astype(np.uint64)
                order = np.argsort(blocks, kind="stable")
                blocks, trim = blocks[order], (part["kind"] == Kind.TRIM)[number[order]]
                last = np.append(blocks[1:] != blocks[:-1], True)
                self.masked -= bitmap(blocks[last & ~trim])
                self.masked |= bitmap(blocks[last & trim])
            if at < len(rows):
                start, end = int(rows["block"][at]), int(rows["block"][at] + rows["nblocks"][at])
                if rows["kind"][at] == Kind.TRIM:
                    self.masked.add_range(start, end)
                else:
                    self.masked.remove_range(start, end)
            done = at + 1


def _blocks_of(rows: np.ndarray) -> BitMap:
    return blocks_of(rows["block"], rows["nblocks"])


@dataclasses.dataclass(slots=True)
class Work:
    """One disk as its curator holds it.

    ``available``: bytes that the journal's file system has left, as far as that is known.
    ``buffer``: for content, of whoever works at the moment. ``launch``: begins a sync of the
    backing.
    """

    storage: Storage
    history: History
    undo: UndoWriter
    backing: File
    catalog: Catalog
    frontier: Frontier
    blocks: Blocks
    openable: Callable[[], Openable]
    available: Callable[[], int] = lambda: 1 << 62
    buffer: memoryview = dataclasses.field(
        default_factory=lambda: memoryview(bytearray(BUFFER_BYTES))
    )
    launch: Callable[[Callable[[], None]], Flight] = at_once

    def publish(self) -> None:
        """Make the appended before-images durable and visible.

        Always syncs, also when nothing was appended: after a process death what lies there already
        may not be durable, and "nothing to save, it is there" must not rest on it.
        """
        self.undo.sync()
        self.frontier.undo_published = self.undo.published

    def take_ends(self) -> list[Op]:
        """Changes to the catalog: how far its undo segments go now."""
        listed = self.catalog.undo()
        ends = self.undo.take_ends().items()
        # Not of one that was dropped since: it must not come back on the list.
        return [(("undo", str(segment)), end) for segment, end in ends if segment in listed]

    def sync_backing(self) -> None:
        """Sync the backing. If that fails, what it holds is not known."""
        self.take_in(self.launch(self.backing.sync))

    def take_in(self, flight: Flight) -> None:
        """Wait for the end of a sync of the backing. If it failed, what that holds is not known."""
        try:
            flight.result()
        except OSError:
            self.blocks.distrust(self.backing.size())
            raise

    def unsaved(
        self, blocks: np.ndarray, ends: np.ndarray, *, fresh: np.ndarray | None = None
    ) -> np.ndarray:
        """The save rule for blocks about to change, ``ends`` their oldest versions: which to save
        (bool).

        Save when an openable point lies in [p, end), p the largest end <= ``end`` in the undo log.
        ``fresh`` (bool): no image with that end can exist yet; then an openable end - 1 decides
        alone.

        :raises Corruption: images are lost, so "there is none" is not to be believed.
        """
        openable = self.openable()
        result = np.zeros(len(blocks), bool)
        if fresh is not None:
            result |= fresh & openable.wanted(ends - np.uint64(1), ends)
        rest = np.flatnonzero(~result)
        if len(rest):
            have = self.history.ends_le(blocks[rest], ends[rest])
            lost = self.history.snapshot.images_lost
            result[rest] = openable.wanted(have, ends[rest])
            if lost is not None and result[rest].any():
                raise lost
        return result

    def require(self, blocks: int) -> None:
        """That there is space for the before-images of so many blocks.

        Asked before the first is appended: half of them would use up space for nothing.

        :raises JournalFull: there is not.
        """
        content = blocks * BLOCK
        if content and self.available() < content + content // 32 + SPARE_BYTES:
            raise JournalFull(
                f"no space for before-images of {content} bytes: free some on the journal's device"
            )

    def save_backing(self, blocks: np.ndarray, ends: np.ndarray) -> None:
        """Append what the backing holds of these blocks (sorted u64) as before-images."""
        data = members(blocks, self.blocks.data)
        self.require(int(np.count_nonzero(data)))
        images = Images(self.undo)
        images.zeroes(blocks[~data], ends[~data])
        blocks, ends = blocks[data], ends[data]
        for at in range(0, len(blocks), BUFFER_BLOCKS):
            part = blocks[at : at + BUFFER_BLOCKS]
            content = self.buffer[: len(part) * BLOCK]
            self._read_backing(part, content)
            images.add(part, ends[at : at + BUFFER_BLOCKS], content)

    def _read_backing(self, blocks: np.ndarray, content: memoryview) -> None:
        """What the backing holds of these blocks; behind its end there are zeroes."""
        bounds = stretches(blocks)
        read = self.backing.read_into
        places = (bounds * BLOCK).tolist()
        offsets = (blocks[bounds[:-1]] * np.uint64(BLOCK)).tolist()
        for offset, start, end in zip(offsets, places[:-1], places[1:], strict=True):
            got = read(offset, content[start:end])
            if got < end - start:
                content[start + got : end] = bytes(end - start - got)
