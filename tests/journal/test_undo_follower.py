"""What a reader of the undo log is shown, and what it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from journal.errors import Vanished
from journal.frontier import Frontier
from journal.storage import RealStorage
from journal.undo_follower import UndoFollower
from journal.undo_recovery import recover_undo
from tests.journal.undo_world import (
    DISK,
    World,
    image,
    images_of,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.recover()
    return made


def test_nothing_above_the_published_position_is_seen(world: World) -> None:
    """! An image whose sync has not happened, or has failed, must not reach anybody."""
    follower = world.follower()
    world.append(image(1, 5))
    assert images_of(follower) == []
    world.sync()
    world.append(image(2, 6))
    assert images_of(follower) == [image(1, 5)]
    world.sync()
    assert images_of(follower) == [image(1, 5), image(2, 6)]


def test_nothing_above_it_is_seen_even_in_a_sealed_segment(world: World) -> None:
    """! A footer tells all that a segment holds, whatever of it a reader may know by now."""
    world.append(image(1, 5))
    world.sync()
    old = world.published
    world.append(image(2, 6))
    assert world.writer is not None
    world.writer.roll()
    world.sync()
    follower = UndoFollower(world.storage, DISK, lambda: old)
    assert follower.snapshot().segments[0].sealed
    assert images_of(follower) == [image(1, 5)]
    world.append(image(3, 7))
    world.sync()
    assert images_of(UndoFollower(world.storage, DISK, lambda: old)) == [image(1, 5)]
    assert len(world.images()) == 3


def test_the_follower_goes_by_the_frontier(world: World, tmp_path: Path) -> None:
    page = Frontier.open(tmp_path / "page", disk=DISK, boot_id=b"b" * 16, create=True)
    follower = UndoFollower.of(world.storage, DISK, page)
    world.append(image(1, 5))
    world.sync()
    assert images_of(follower) == []
    page.undo_published = world.published
    assert images_of(follower) == [image(1, 5)]
    page.close()


def test_a_listing_during_a_change_is_repeated(world: World) -> None:
    """! A directory listing misses names that come and go meanwhile."""
    world.append(image(1, 5))
    world.sync()
    generation = [0]
    listings: list[str] = []

    class Changing(RealStorage):
        def list(self, directory: str) -> list[str]:
            listings.append(directory)
            if len(listings) < 3:
                generation[0] += 1
                return []
            return super().list(directory)

    follower = UndoFollower(
        Changing(world.storage.root), DISK, lambda: world.published, lambda: generation[0]
    )
    assert len(follower.snapshot().segments) == 1
    assert len(listings) == 3


def test_a_swept_segment_is_vanished_and_not_empty(world: World) -> None:
    """! A file that is gone means a new snapshot, never "skip"."""
    world.append(image(1, 5))
    world.sync()
    follower = world.follower()
    snapshot = follower.snapshot()
    world.path(1).unlink()
    with pytest.raises(Vanished):
        follower.table(snapshot, snapshot.segments[0])
    with pytest.raises(Vanished):
        follower.file(snapshot.segments[0])
    assert images_of(follower) == []


def test_many_files_are_not_all_kept_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("journal.segment_cache.FILES_OPEN_MAX", 3)
    monkeypatch.setattr("journal.segment_cache.TABLE_ROWS_CACHED_MAX", 30)
    assert world.writer is not None
    for number in range(60):
        world.append(image(number, 5), image(number, 5))
        if number % 6 == 5:
            world.writer.roll()
    world.sync()
    follower = world.follower()
    snapshot = follower.snapshot()
    for _ in range(2):
        assert sum(len(table.rows) for _, table in follower.tables(snapshot)) == 120
        assert all(follower.file(info).size() for info in snapshot.segments)
        assert len(follower.cache._files) <= 4
        assert sum(len(table.rows) for table in follower.cache._tables.values()) <= 30
    follower.close()
    assert not follower.cache._files


def test_what_was_published_is_seen_while_its_copy_is_not_published_yet(world: World) -> None:
    """! The copy makes the original void only when it can be read itself."""
    world.append(image(1, 5))
    world.sync()
    world.append(image(2, 6))
    world.sync(note_ends=False)  # published, the catalog's list knows less
    old = world.published
    found = recover_undo(world.storage, DISK, world.list, identity=world.identity)
    assert found.copied == 1
    assert found.published > old
    for published in (old, found.published):
        world.published = published
        assert world.images() == [image(1, 5), image(2, 6)]
