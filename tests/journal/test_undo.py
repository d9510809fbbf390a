"""The undo log's writer: what is published, when, in which order, and what a failure does."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from journal.errors import JournalFull
from journal.format import BLOCK, Log
from journal.frontier import unpack_position
from journal.segment import SegmentLister, load_footer, segment_name
from journal.undo import UndoFailed
from tests.journal.undo_world import (
    DISK,
    World,
    image,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.recover()
    return made


# ------------------------------------------------------------------------------------- publishing
def test_what_was_synced_is_read_again(world: World) -> None:
    images = [image(1, 5), image(2, 5), (9, 6, bytes(3 * BLOCK)), image(3, 7, 40)]
    where = world.append(*images[:2])
    assert where[:3] == (1, 2, 1)
    assert world.append(*images[2:]).first_number == 3
    world.sync()
    assert world.images() == images
    assert world.verify() == []
    with world.path(1).open("rb") as file:
        file.seek(where.first_payload_offset)
        assert file.read(BLOCK) == images[0][2]


def test_a_sync_syncs_the_older_first_then_the_directory_then_lists_then_seals(
    world: World,
) -> None:
    """! Sealed segments and the directory belong to it; the list comes before the publish; a footer
    says that nothing in its segment is in doubt."""
    assert world.writer is not None
    world.append(image(1, 5))
    world.writer.roll()
    world.append(image(2, 5))
    first, second = (segment_name(Log.UNDO, number) for number in (1, 2))
    before = world.published
    seen: list[int] = []
    writer = world.writer

    def look(call: str, name: str) -> int:
        if call == "list":
            seen.append(writer.published)
        return 0

    world.storage.fail = look
    world.storage.done.clear()
    world.sync()
    assert world.storage.done == [
        ("sync", first),
        ("sync", second),
        ("sync_dir", "undo"),
        ("list", first),
        ("list", second),
        ("write", first),
        ("sync", first),
    ]
    assert seen == [before, before]
    assert unpack_position(world.published) == (2, world.list[2])


def test_a_sync_always_syncs(world: World) -> None:
    """! Also when nothing was appended since: what lies there may not be durable."""
    world.append(image(1, 5))
    world.sync()
    world.storage.done.clear()
    world.sync()
    assert world.storage.done == [("sync", segment_name(Log.UNDO, 1)), ("sync_dir", "undo")]
    world.recover()
    world.storage.done.clear()
    world.sync()
    assert world.storage.done == [("sync_dir", "undo")]


def test_a_sync_of_nothing_at_all(world: World) -> None:
    world.sync()
    assert (world.published, world.images()) == (0, [])


def test_a_segment_that_could_not_be_listed_is_not_published(world: World) -> None:
    """! Only what the list names can be told from what was reclaimed, when it is lost."""
    world.append(image(1, 5))
    assert world.writer is not None
    before = world.writer.published
    world.storage.fail = lambda call, name: errno.EIO if call == "list" else 0
    with pytest.raises(OSError, match="told"):
        world.writer.sync()
    assert world.writer.published == before
    assert world.writer.take_ends() == {}
    world.storage.fail = lambda call, name: 0
    world.sync()
    assert world.images() == [image(1, 5)]


def test_segments_are_rolled_when_full_and_sealed(world: World) -> None:
    for number in range(40):
        world.append(image(number, 5), image(number + 100, 5))
    world.sync()
    assert len(world.list) == 6
    assert world.images() == [
        image(block, 5) for number in range(40) for block in (number, number + 100)
    ]
    infos = SegmentLister(world.storage, Log.UNDO, DISK).refresh()
    assert [info.sealed for info in infos] == [True] * 5 + [False]
    with_footer = world.storage.open(infos[0].name, "read")
    footer = load_footer(with_footer, infos[0])
    assert set(footer.written) == {*range(7), *range(100, 107)}
    assert not footer.masks
    assert [info.header.predecessor for info in infos] == [0, 1, 2, 3, 4, 5]
    assert all(info.header.cut == info.first_seq - 1 for info in infos)
    assert world.verify() == []


def test_a_batch_larger_than_a_segment_gets_one_of_its_own(world: World) -> None:
    world.append(image(1, 5))
    world.append(image(2, 6, 100))
    world.append(image(3, 7))
    world.sync()
    assert len(world.images()) == 3
    assert len(world.list) == 3


def test_closing_seals_everything(world: World) -> None:
    world.append(image(1, 5))
    assert world.writer is not None
    world.writer.close()
    world.published = world.writer.published
    world.list |= world.writer.take_ends()
    assert world.images() == [image(1, 5)]
    assert [i.sealed for i in SegmentLister(world.storage, Log.UNDO, DISK).refresh()] == [True]
    found = world.recover()
    assert (found.copied, found.next_segment, found.next_number) == (0, 2, 2)


# ------------------------------------------------------------------------------------------ failing
@pytest.mark.parametrize("call", ["sync", "sync_dir"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_sync_poisons(world: World, call: str, code: int) -> None:
    """! It is never repeated: the kernel may call those pages clean."""
    world.append(image(1, 5))
    world.sync()
    before = world.published
    world.append(image(2, 6))
    assert world.writer is not None
    world.storage.fail = lambda what, name: code if what == call else 0
    with pytest.raises(UndoFailed, match="restarted") as first:
        world.sync()
    world.storage.fail = lambda what, name: 0
    world.storage.done.clear()
    for again in (world.sync, lambda: world.append(image(3, 7)), world.writer.close):
        with pytest.raises(UndoFailed) as second:
            again()
        assert second.value is first.value
    assert world.storage.done == []
    assert world.writer.published == before
    assert world.images() == [image(1, 5)]
    world.writer.abandon()


def test_after_a_failed_sync_the_images_are_copied_and_not_synced_again(world: World) -> None:
    """! "Nothing to save, it is there already" must not rest on pages whose sync failed."""
    world.append(image(1, 5))
    world.sync()
    world.append(image(2, 6), image(3, 6))
    world.append((4, 6, bytes(BLOCK)))
    world.storage.fail = lambda what, name: errno.EIO if what == "sync" else 0
    with pytest.raises(UndoFailed):
        world.sync()
    world.storage.fail = lambda what, name: 0
    world.storage.done.clear()
    found = world.recover()
    name = segment_name(Log.UNDO, 2)
    assert world.storage.done == [
        ("create", name + ".tmp"),
        ("write", name + ".tmp"),
        ("write", name + ".tmp"),
        ("write", name + ".tmp"),
        ("write", name + ".tmp"),
        ("sync", name + ".tmp"),
        ("rename", name),
        ("sync_dir", "undo"),
    ]
    assert (found.copied, found.dropped, found.damage, found.lost) == (3, 0, (), ())
    assert world.images() == [image(1, 5), image(2, 6), image(3, 6), (4, 6, bytes(BLOCK))]
    assert world.verify() == []
    assert unpack_position(world.published)[0] == 2
    world.append(image(5, 7))
    world.sync()
    assert len(world.images()) == 5
    assert world.verify() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("at", ["batch", "segment"])
def test_without_space_nothing_is_appended_and_it_can_be_tried_again(
    world: World, code: int, at: str
) -> None:
    if at == "batch":
        world.append(image(1, 5))
    world.storage.fail = lambda what, name: code if what == "write" else 0
    for _ in range(2):
        with pytest.raises(JournalFull, match="before-images"):
            world.append(image(2, 6))
    world.storage.fail = lambda what, name: 0
    number = world.append(image(2, 6)).first_number
    assert number == (2 if at == "batch" else 1)
    world.sync()
    assert world.images()[-1] == image(2, 6)
    assert len(list(world.path(1).parent.iterdir())) == 1


def test_any_other_failed_write_poisons(world: World) -> None:
    world.append(image(1, 5))
    world.storage.fail = lambda what, name: errno.EIO if what == "write" else 0
    with pytest.raises(UndoFailed):
        world.append(image(2, 6))
    world.storage.fail = lambda what, name: 0
    with pytest.raises(UndoFailed):
        world.sync()


def test_without_space_for_its_footer_a_segment_stays_unsealed(world: World) -> None:
    world.append(image(1, 5))
    assert world.writer is not None
    world.writer.roll()
    world.storage.fail = lambda what, name: errno.ENOSPC if what == "write" else 0
    world.sync()
    world.storage.fail = lambda what, name: 0
    world.append(image(2, 6))
    world.sync()
    assert world.images() == [image(1, 5), image(2, 6)]
    assert world.verify() == []
    world.recover()
    assert world.images() == [image(1, 5), image(2, 6)]
