"""What catalog and index tell a recovery, and what it would lose without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from journal.format import Log
from journal.hints import Hints, gather
from journal.run_format import INDEX, run_name
from journal.runset import RunSet
from journal.segment import SegmentLister
from journal.storage import RealStorage
from tests.crash.curator_model import World
from tests.crash.curator_storage import DISK
from tests.crash.sim_storage import SimStorage


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A disk whose oldest segment was reclaimed; nothing that is left says that it was durable."""
    world = World(tmp_path, 1, understate=True)
    while world.writer is not None and world.writer.segment == 1:
        world.write(0)  # and no sync before the second segment is begun
    world.apply_all()
    assert world.reclaim()
    return world


def hints(world: World) -> Hints:
    return gather(world.routed, world.root / f"life-{world.lives}" / INDEX, DISK)


def test_a_fresh_disk_says_nothing(tmp_path: Path) -> None:
    assert gather(SimStorage(1), tmp_path / INDEX, DISK) == Hints()


def test_the_catalog_tells_what_was_applied_and_reclaimed(world: World) -> None:
    """! What lies behind a reclaimed segment is no torn tail."""
    said = hints(world)
    assert said.applied == world.running.catalog.applied == world.frontier.durable
    assert said.durable >= world.running.catalog.reclaimed > 0
    durable = world.frontier.durable
    world.lose_power("backing")  # `_judge` misses nothing that was durable
    assert world.frontier.durable >= durable


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_without_a_catalog_the_oldest_segment_is_taken_at_its_word(world: World, how: str) -> None:
    reclaimed = world.running.catalog.reclaimed
    world.stop_curator()
    for name in [name for name in world.sim.live if name.startswith("catalog")]:
        if how == "lost":
            world.sim.unlink(name)
        else:
            world.sim.live[name].live[:] = b"\xff" * 100
    said = hints(world)
    assert said.applied == 0
    assert said.durable == reclaimed


def test_the_index_tells_seqs_and_segments(tmp_path: Path) -> None:
    storage = RealStorage(tmp_path)
    (tmp_path / INDEX).mkdir()
    runs = RunSet(storage, tmp_path / INDEX, log=Log.REDO, disk=DISK, read_only=False)
    runs.refresh()
    world = World(tmp_path / "world", 1)
    world.fill_segments(2)
    info = SegmentLister(world.routed, Log.REDO, DISK).refresh()[1]
    table = world.running.redo.table(info)
    runs.add(table)
    runs.close()
    assert gather(storage, tmp_path / INDEX, DISK) == Hints(table.last_seq, 0, info.segment)
    world.close()


def test_a_damaged_run_says_nothing(tmp_path: Path) -> None:
    (tmp_path / INDEX).mkdir()
    (tmp_path / INDEX / run_name(Log.REDO, 1)).write_bytes(b"rubbish" * 4096)
    assert gather(RealStorage(tmp_path), tmp_path / INDEX, DISK) == Hints()


def test_the_frontier_counts_too() -> None:
    assert Hints(3, 5, 2).and_frontier(4, 4) == Hints(4, 5, 2)
