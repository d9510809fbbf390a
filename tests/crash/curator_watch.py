"""What must hold in a `World` at every operation of its storage, and not only when it is asked.

* `applied` is never ahead of a successful sync of the backing: what it says is there is durable.
* Nothing of the backing is overwritten before the before-images that were published are durable:
  those on the catalog's list, up to where they were published, with their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from journal.format import BLOCK, Kind, Log
from journal.frontier import unpack_position
from journal.segment import segment_name
from tests.crash.curator_storage import BACKING, values

if TYPE_CHECKING:
    from tests.crash.curator_model import World


class Watch:
    """See the module. ``applied``: up to where it was looked at in this boot."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.applied = -1
        self.published = -1

    def look(self) -> None:
        """At the beginning of each operation."""
        world = self.world
        applied = world.frontier.applied
        if applied > self.applied and world.frontier.epoch:
            self.applied = applied
            self._check_applied(applied)

    def _check_applied(self, applied: int) -> None:
        """A block that no trim hides holds, durably, what it held at ``applied``.

        Unless there is something newer for it, which may be there already, or torn.
        """
        world = self.world
        if applied < world.last_gap() or applied >= len(world.model):
            return  # nobody knows what others wrote; or it is not taken in yet
        newest = _newest(world)
        disk = next(disk for disk in reversed(world.model[: applied + 1]) if disk is not None)
        durable = bytes(world.sim.live[BACKING].durable).ljust(world.blocks * BLOCK, b"\0")
        for block, value in enumerate(values(durable)):
            seq, kind = newest.get(block, (0, 0))
            whole = value != -1 or not world.short or block < world.blocks - 1
            assert seq > applied or kind == Kind.TRIM or value == disk[block] or not whole, (
                f"applied is {applied}, block {block} is durably {value}, not {disk[block]} "
                f"(after {world.failures})"
            )

    def before_write(self, _offset: int, _length: int) -> None:
        """Before the backing is changed."""
        world = self.world
        published = world.frontier.undo_published
        if published == self.published or world.engine is None:
            return
        self.published = published
        newest, end = unpack_position(published)
        ends = {int(segment): int(upto) for segment, upto in world.engine.catalog.undo().items()}
        if newest in ends:
            ends[newest] = max(ends[newest], end)
        for segment, upto in ends.items():
            name = segment_name(Log.UNDO, segment)
            inode = world.sim.live.get(name)
            if inode is None:
                continue  # swept: listed no more after the next commit
            assert world.sim.durable.get(name) is inode, f"{name} is published and not durable"
            dirty = [at for kind, at, _ in inode.pending if kind == "write" and at < upto]
            assert not dirty, f"{name} is published up to {upto} and dirty at {dirty}"


def _newest(world: World) -> dict[int, tuple[int, int]]:
    """Of each block the newest version: its seq and kind."""
    return {
        block: (seq, record.kind)
        for seq, record in sorted(world.valid().items())
        for block in range(record.block, record.block + record.count)
    }
