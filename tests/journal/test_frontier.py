"""The frontier page: who sees what, what is replaced, and that nobody is left with an orphan."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import struct
from pathlib import Path

import pytest

from journal import frontier as module
from journal.errors import Conflict
from journal.frontier import (
    PAGE_BYTES,
    Frontier,
    FrontierMissing,
    pack_position,
    unpack_position,
)

DISK, BOOT = b"d" * 16, b"b" * 16
FIELDS = (
    "epoch",
    "durable",
    "durable_stamp",
    "applied",
    "window_start",
    "redo_generation",
    "curator_generation",
    "undo_published",
    "stamp_ceiling",
)


def open_page(path: Path, *, create: bool = True, boot: bytes = BOOT, **more: bool) -> Frontier:
    return Frontier.open(path, disk=DISK, boot_id=boot, create=create, **more)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shm" / "cdp.frontier"


def test_a_new_page_is_zeroed_and_not_fresh(path: Path) -> None:
    with open_page(path) as page:
        assert not page.fresh
        assert [getattr(page, name) for name in FIELDS] == [0] * len(FIELDS)
        assert path.stat().st_size == PAGE_BYTES
        assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == [path.name]


def test_numbers_are_seen_by_others_at_once_and_stay(path: Path) -> None:
    with open_page(path) as writer, open_page(path, create=False, read_only=True) as reader:
        for value, name in enumerate(FIELDS, 1):
            setattr(writer, name, (1 << 64) - value)
        assert [getattr(reader, name) for name in FIELDS] == [
            (1 << 64) - value for value in range(1, len(FIELDS) + 1)
        ]
        assert reader.generations() == (reader.redo_generation, reader.curator_generation)
    with open_page(path) as again:
        assert again.fresh
        assert again.durable == (1 << 64) - 2


def test_the_page_is_mapped_and_its_words_are_aligned(path: Path) -> None:
    with open_page(path) as page:
        page.epoch, page.durable = 3, 0x0102030405060708
        words = struct.unpack_from("=2Q", path.read_bytes(), 64)
        assert words == (3, 0x0102030405060708)
        assert module._HEAD.size % 8 == 0
        assert module._STAMP_CEILING * 8 + 8 <= PAGE_BYTES


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "window_start"])
def test_numbers_never_fall(path: Path, name: str) -> None:
    """Above all `applied`: the recorder has dropped what it overlaid the backing with."""
    with open_page(path) as page:
        setattr(page, name, 7)
        setattr(page, name, 7)
        with pytest.raises(AssertionError, match="must not fall"):
            setattr(page, name, 6)
        assert getattr(page, name) == 7


def test_the_window_may_grow_backwards(path: Path) -> None:
    with open_page(path) as page:
        page.window_start = 7
        page.window_start = 6
        assert page.window_start == 6


def test_a_reader_cannot_write(path: Path) -> None:
    open_page(path).close()
    with open_page(path, create=False, read_only=True) as page:
        with pytest.raises(TypeError):
            page.epoch = 1


def test_nobody_but_the_recorder_makes_a_page(path: Path) -> None:
    with pytest.raises(FrontierMissing, match="start the disk's recorder"):
        open_page(path, create=False)
    assert not path.exists()
    open_page(path, boot=b"x" * 16).close()
    before = path.read_bytes()
    with pytest.raises(FrontierMissing):
        open_page(path, create=False)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda page: b"", id="empty"),
        pytest.param(lambda page: page[:100], id="short"),
        pytest.param(lambda page: page[: PAGE_BYTES - 1], id="one byte short"),
        pytest.param(lambda page: b"X" + page[1:], id="magic"),
        pytest.param(lambda page: page[:8] + b"\x02" + page[9:], id="layout"),
        pytest.param(lambda page: page[:16] + b"X" + page[17:], id="boot"),
        pytest.param(lambda page: page[:32] + b"X" + page[33:], id="disk"),
    ],
)
def test_what_is_not_of_this_boot_disk_and_layout_is_replaced(path: Path, spoil) -> None:
    """And never cleaned in place: who has the old one mapped would see its numbers fall."""
    with open_page(path) as old:
        old.durable = 7
        page = path.read_bytes()
        stale = path.with_name("stale")
        stale.write_bytes(spoil(page))
        stale.rename(path)
        with open_page(path) as new:
            assert not new.fresh
            assert new.durable == 0
            assert old.durable == 7
            new.durable = 1
            with open_page(path) as third:
                assert third.fresh
                assert third.durable == 1
    assert os.listdir(path.parent) == [path.name]


def test_a_mapped_page_of_another_boot_keeps_its_numbers(path: Path) -> None:
    with open_page(path, boot=b"x" * 16) as old:
        old.applied = 9
        with open_page(path) as new:
            assert (old.applied, new.applied) == (9, 0)


def test_a_page_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_page(path).close()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(Conflict, match="remove it"):
        open_page(path)


def test_a_link_is_not_followed(path: Path) -> None:
    open_page(path.with_name("elsewhere")).close()
    path.symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        open_page(path)


def test_no_space_is_an_error_and_not_a_signal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is a hole would end the process by SIGBUS at the first store on a full tmpfs."""
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) // 2)
    with pytest.raises(OSError, match="no space"):
        open_page(path)
    assert os.listdir(path.parent) == []
    monkeypatch.undo()
    open_page(path).close()
    assert path.stat().st_blocks * 512 >= PAGE_BYTES


def test_one_that_loses_the_race_for_a_missing_page_uses_the_winners(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find none, one links its page first: a rename would take it away from him again."""
    link = os.link
    winners: list[Frontier] = []

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        winners.append(open_page(path))
        winners[0].durable = 5
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with open_page(path) as loser:
        assert loser.durable == 5
        loser.durable = 6
    assert winners[0].durable == 6
    winners[0].close()


def test_one_that_loses_the_race_for_a_stale_page_uses_the_winners(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_page(path, boot=b"x" * 16).close()
    flock = fcntl.flock
    winners: list[Frontier] = []

    def late(descriptor: int, operation: int) -> None:
        if not winners:
            monkeypatch.setattr(fcntl, "flock", flock)
            winners.append(open_page(path))
            winners[0].durable = 5
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with open_page(path) as loser:
        assert loser.durable == 5
        loser.durable = 6
    assert winners[0].durable == 6
    winners[0].close()


def _open_and_note(path: str, number: int, start, ready) -> None:
    start.wait()
    with open_page(Path(path)) as page:
        page._words[100 + number] = 1
        ready.wait()
        seen = [page._words[100 + other] for other in range(4)]
    os._exit(0 if seen == [1] * 4 else 1)


@pytest.mark.parametrize("stale", [False, True])
def test_processes_that_open_at_once_share_one_page(path: Path, stale: bool) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(10):
        path.unlink(missing_ok=True)
        if stale:
            open_page(path, boot=b"x" * 16).close()
        start, ready = context.Barrier(4), context.Barrier(4)
        children = [
            context.Process(target=_open_and_note, args=(str(path), number, start, ready))
            for number in range(4)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(20)
        assert [child.exitcode for child in children] == [0] * 4
    assert os.listdir(path.parent) == [path.name]


def test_positions_compare_as_places_do() -> None:
    places = [(1, 4096), (1, 4608), (2, 0), (2, 4096), ((1 << 28) - 1, (1 << 36) - 512)]
    packed = [pack_position(*place) for place in places]
    assert packed == sorted(packed)
    assert [unpack_position(position) for position in packed] == places
    assert max(packed) < 1 << 64
    assert unpack_position(0) == (0, 0)
    for bad in ((0, 512), (1 << 28, 512), (1, 511), (1, -512)):
        with pytest.raises(AssertionError):
            pack_position(*bad)
