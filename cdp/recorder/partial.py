"""Changes that do not cover whole blocks: widened by what the blocks held before.

Records are of whole 4 KiB blocks. A change with a ragged edge becomes one record of whole blocks,
whose edges are filled with the old content: of the batch that is being built, else of the overlay,
else of the backing. If that content has to come from a disk, the change is *parked*, its edge
blocks are *locked*, and whatever else wants to change a locked block waits for it: it would
otherwise be undone by old content written over it. Reads do not wait: what is parked has not
happened yet.

One request is one record, with these exceptions, all of requests that no client can expect to be
atomic; their records are in one batch, which a crash leaves or takes as a whole:

* a write-zeroes with ragged edges that is larger than the largest write: its edges are write
  records of one block, what lies between is a zero record (a smaller one is a write record, as if
  the client had sent the zeroes);
* a write with ragged edges that covers more blocks than a record may: two write records.

A trim leaves parts of blocks alone; one that covers no whole block changes nothing and is no
record. The last block of a disk may be short: it counts as whole when it is covered up to the
disk's end, and its record is padded with zeroes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from journal.format import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cdp.recorder.connection import Connection

_MASK: Final = BLOCK - 1


def ragged_edges(offset: int, length: int, size: int) -> list[int]:
    """Blocks that a change covers only in part, at most two, on a disk of `size` bytes."""
    end = offset + length
    first, last = offset // BLOCK, (end - 1) // BLOCK
    edges = []
    if offset & _MASK:
        edges.append(first)
    if end & _MASK and end != size and not (edges and last == first):
        edges.append(last)
    return edges


def whole_blocks(offset: int, length: int, size: int) -> tuple[int, int]:
    """First and number of the blocks that a range covers completely."""
    end = offset + length
    first = -(-offset // BLOCK)
    stop = -(-end // BLOCK) if end == size else end // BLOCK
    return first, max(0, stop - first)


def touched_blocks(offset: int, length: int) -> tuple[int, int]:
    """First and number of the blocks that a range touches."""
    first = offset // BLOCK
    return first, (offset + length - 1) // BLOCK + 1 - first


def widen(
    offset: int,
    payload: bytes | bytearray | memoryview | None,
    length: int,
    edges: dict[int, bytes | bytearray | memoryview],
) -> bytearray:
    """Whole blocks: the old content of `edges`, overlaid with the payload (None: zeroes)."""
    first, count = touched_blocks(offset, length)
    whole = bytearray(count * BLOCK)
    for block, content in edges.items():
        at = (block - first) * BLOCK
        whole[at : at + len(content)] = content
    at = offset - first * BLOCK
    whole[at : at + length] = bytes(length) if payload is None else payload
    return whole


class Parked:
    """A change that was taken out of its connection's buffer and is not executed yet.

    ``edges``: old contents that are being read, by block; ``missing`` how many are not there yet.
    Without edges it waits for blocks that another one has locked.
    """

    __slots__ = (
        "connection", "cookie", "edges", "error", "flags", "kind", "length", "missing", "offset",
        "payload",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        kind: int,
        flags: int,
        cookie: bytes,
        offset: int,
        length: int,
        payload: bytes | None,
    ) -> None:
        self.connection = connection
        self.kind, self.flags, self.cookie = kind, flags, cookie
        self.offset, self.length, self.payload = offset, length, payload
        self.edges: dict[int, bytes | bytearray | memoryview] = {}
        self.missing = 0
        self.error: OSError | None = None
        connection.in_flight += 1
        connection.parked += 1

    def unpark(self) -> None:
        """It is about to be executed, or given up."""
        self.connection.in_flight -= 1
        self.connection.parked -= 1


class Locks:
    """Locked blocks, and who waits for them. ``ready``: parked changes whose turn has come."""

    def __init__(self) -> None:
        self._holders: dict[int, Parked] = {}
        self._waiting: list[Parked] = []
        self.ready: list[Parked] = []
        self.bytes = 0  # of payloads that are parked

    def __bool__(self) -> bool:
        return bool(self._holders)

    def locked(self, first: int, count: int) -> bool:
        """Whether any of the blocks is locked."""
        holders = self._holders
        if count <= len(holders):
            return any(block in holders for block in range(first, first + count))
        return any(first <= block < first + count for block in holders)

    def lock(self, parked: Parked, blocks: Iterable[int]) -> None:
        """A change waits for the old content of these blocks."""
        for block in blocks:
            assert block not in self._holders
            self._holders[block] = parked
        self.bytes += len(parked.payload or b"")

    def wait(self, parked: Parked) -> None:
        """A change waits for locked blocks."""
        self._waiting.append(parked)
        self.bytes += len(parked.payload or b"")

    def release(self, parked: Parked) -> None:
        """The old contents are there, or cannot be had: its turn has come.

        Its blocks stay locked until it is taken: others that are ready must not slip in before it.
        """
        self.ready.append(parked)

    def take_ready(self) -> Parked | None:
        """The next one whose turn has come, unlocked; those who waited for it come after it.

        The caller executes it at once, or has it wait again.
        """
        if not self.ready:
            return None
        parked = self.ready.pop(0)
        self.bytes -= len(parked.payload or b"")
        held = [block for block, holder in self._holders.items() if holder is parked]
        if held:
            for block in held:
                del self._holders[block]
            self.ready.extend(self._waiting)
            self._waiting = []
        return parked

    def forget(self, connection: Connection) -> int:
        """Give up what a discarded connection has waiting for others' locks; how many.

        What has locked blocks itself is given up when its turn has come.
        """
        mine = [parked for parked in self._waiting if parked.connection is connection]
        for parked in mine:
            self._waiting.remove(parked)
            self.bytes -= len(parked.payload or b"")
            parked.unpark()
        return len(mine)
