"""What every `journal.storage.Storage` promises: run on the real one and on the simulated one."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from journal.storage import IOV_MAX, RealStorage, Storage
from tests.crash.sim_storage import Crash, SimStorage

Make = Callable[[], Storage]


@pytest.fixture(params=["real", "simulated"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "real":
        return RealStorage(tmp_path)
    return SimStorage(0)


def test_create_write_read(storage: Storage) -> None:
    file = storage.open("redo/one", "create")
    assert file.size() == 0
    file.write(0, [b"abc", bytearray(b"def"), memoryview(b"ghi")])
    assert file.read(0, 9) == b"abcdefghi"
    assert file.read(2, 3) == b"cde"
    assert file.size() == 9
    file.close()


def test_read_ends_at_the_end(storage: Storage) -> None:
    file = storage.open("one", "create")
    file.write(0, [b"abc"])
    assert file.read(1, 100) == b"bc"
    assert file.read(3, 10) == b""
    assert file.read(1000, 10) == b""
    file.close()


def test_read_into_a_buffer(storage: Storage) -> None:
    file = storage.open("one", "create")
    file.write(0, [b"abcdef"])
    buffer = memoryview(bytearray(b"........"))
    assert file.read_into(1, buffer[:3]) == 3
    assert bytes(buffer) == b"bcd....."
    assert file.read_into(4, buffer[3:]) == 2
    assert bytes(buffer) == b"bcdef..."
    assert file.read_into(100, buffer) == 0
    file.close()


def test_write_behind_the_end_leaves_zeroes(storage: Storage) -> None:
    file = storage.open("one", "create")
    file.write(10, [b"x"])
    assert file.read(0, 11) == bytes(10) + b"x"
    file.write(4, [b"yy", b""])
    assert file.read(0, 11) == bytes(4) + b"yy" + bytes(4) + b"x"
    file.close()


def test_more_buffers_than_one_call_takes(storage: Storage) -> None:
    file = storage.open("one", "create")
    parts = [bytes([number % 251]) * 3 for number in range(2 * IOV_MAX + 7)]
    file.write(5, parts)
    assert file.read(5, 3 * len(parts)) == b"".join(parts)
    file.close()


def test_create_refuses_what_is_there(storage: Storage) -> None:
    storage.open("a/b", "create").close()
    with pytest.raises(FileExistsError):
        storage.open("a/b", "create")


@pytest.mark.parametrize("mode", ["read", "write"])
def test_what_is_not_there_cannot_be_opened(storage: Storage, mode: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.open("nothing", mode)  # type: ignore[arg-type]


def test_read_only_means_it(storage: Storage) -> None:
    storage.open("one", "create").close()
    file = storage.open("one", "read")
    with pytest.raises(OSError) as caught:
        file.write(0, [b"x"])
    assert caught.value.errno == errno.EBADF
    file.close()


def test_two_openings_see_the_same(storage: Storage) -> None:
    one = storage.open("one", "create")
    two = storage.open("one", "write")
    three = storage.open("one", "read")
    one.write(0, [b"aaaa"])
    two.write(1, [b"bb"])
    assert three.read(0, 4) == b"abba"
    for file in (one, two, three):
        file.close()


def test_rename_replaces_and_open_files_stay(storage: Storage) -> None:
    old = storage.open("one", "create")
    old.write(0, [b"old"])
    new = storage.open("one.tmp", "create")
    new.write(0, [b"new"])
    storage.rename("one.tmp", "one")
    assert old.read(0, 3) == b"old"
    again = storage.open("one", "read")
    assert again.read(0, 3) == b"new"
    new.write(0, [b"yet"])
    assert again.read(0, 3) == b"yet"
    assert storage.list("") == ["one"]
    for file in (old, new, again):
        file.close()


def test_rename_of_nothing(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.rename("nothing", "something")


def test_unlink_and_open_files_stay(storage: Storage) -> None:
    file = storage.open("d/one", "create")
    file.write(0, [b"abc"])
    storage.unlink("d/one")
    assert file.read(0, 3) == b"abc"
    assert storage.list("d") == []
    with pytest.raises(FileNotFoundError):
        storage.open("d/one", "read")
    with pytest.raises(FileNotFoundError):
        storage.unlink("d/one")
    file.close()


def test_list_is_sorted_and_of_one_directory(storage: Storage) -> None:
    for name in ("redo/b", "redo/a", "undo/c", "redo/10"):
        storage.open(name, "create").close()
    assert storage.list("redo") == ["10", "a", "b"]
    assert storage.list("undo") == ["c"]
    assert storage.list("index") == []


def test_allocate_grows_and_cuts(storage: Storage) -> None:
    file = storage.open("one", "create")
    file.write(0, [b"abcdef"])
    file.allocate(10)
    assert file.read(0, 20) == b"abcdef" + bytes(4)
    file.allocate(3)
    assert file.size() == 3
    file.allocate(6)
    assert file.read(0, 20) == b"abc" + bytes(3)
    file.close()


def test_zero(storage: Storage) -> None:
    file = storage.open("one", "create")
    file.write(0, [b"x" * 20000])
    file.zero(100, 9000)
    assert file.read(0, 20000) == b"x" * 100 + bytes(9000) + b"x" * 10900
    file.zero(0, 0)
    file.zero(19000, 5000)
    assert file.read(19000, 6000) == bytes(5000)
    assert file.size() == 24000
    file.close()


def test_extents_cover_the_data(storage: Storage) -> None:
    file = storage.open("one", "create")
    file.allocate(1 << 20)
    file.write(300_000, [b"data"])
    covered = bytearray(1 << 20)
    for offset, length in file.extents():
        covered[offset : offset + length] = b"x" * length
    assert covered[300_000:300_004] == b"xxxx"
    assert len(covered) == 1 << 20
    file.close()


def test_sync_and_advice_return(storage: Storage) -> None:
    file = storage.open("redo/one", "create")
    file.write(0, [b"x" * 100_000])
    file.writeback(0, 100_000)
    file.sync()
    storage.sync_dir("redo")
    storage.sync_dir("")
    assert file.read(99_999, 1) == b"x"
    file.close()


# ------------------------------------------------- what only the simulated one can be asked for


def test_a_crash_keeps_what_was_synced_and_only_what_was_written() -> None:
    """Of an unsynced write any part of any sector may be there, and nothing else ever."""
    seen = set()
    for seed in range(200):
        storage = SimStorage(seed)
        file = storage.open("one", "create")
        file.write(0, [b"a" * 2048])
        file.sync()
        storage.sync_dir("")
        file.write(512, [b"b" * 1024])
        found = storage.crash().open("one", "read").read(0, 4096)
        assert found[:512] == b"a" * 512
        assert found[1536:] == b"a" * 512
        seen.add(found[512:1536])
    assert {b"a" * 1024, b"b" * 1024, b"a" * 512 + b"b" * 512, b"b" * 512 + b"a" * 512} < seen
    assert any(set(content) - set(b"ab") for content in seen)  # garbage


def test_a_crash_may_take_names() -> None:
    outcomes = set()
    for seed in range(100):
        storage = SimStorage(seed)
        storage.open("d/kept", "create").close()
        storage.open("d/gone", "create").close()
        storage.sync_dir("d")
        storage.open("d/new", "create").close()
        storage.rename("d/new", "d/newer")
        storage.unlink("d/gone")
        outcomes.add(tuple(storage.crash().list("d")))
    assert ("gone", "kept") in outcomes
    assert ("kept", "newer") in outcomes
    assert all("kept" in names for names in outcomes)


def test_a_failed_sync_cleans_the_pages() -> None:
    """Like the kernel: the next sync succeeds and makes nothing of it durable."""
    lost = 0
    for seed in range(20):
        storage = SimStorage(seed)
        storage.faults["sync", 1] = errno.EIO
        file = storage.open("one", "create")
        storage.sync_dir("")
        file.write(0, [b"x" * 4096])
        with pytest.raises(OSError):
            file.sync()
        file.sync()
        assert file.read(0, 1) == b"x"
        lost += storage.crash().open("one", "read").read(0, 4096) != b"x" * 4096
    assert 0 < lost < 20


def test_a_sync_covers_what_was_written_before_it_was_called() -> None:
    for seed in range(20):
        storage = SimStorage(seed)
        file = storage.open("one", "create")
        storage.sync_dir("")
        file.write(0, [b"a" * 512])
        storage.during_sync = lambda file=file: file.write(0, [b"b" * 512])
        file.sync()
        found = storage.crash().open("one", "read").read(0, 512)
        assert found[:1] in (b"a", b"b") or set(found) - set(b"ab")


def test_a_crash_decides_of_each_change_by_itself() -> None:
    """A write, a size, a new name, another name, a removed one: every combination is met."""
    outcomes = set()
    for seed in range(600):
        storage = SimStorage(seed)
        for name in ("d/size", "d/write", "d/old", "d/removed"):
            file = storage.open(name, "create")
            file.write(0, [b"a" * 512])
            file.sync()
        storage.sync_dir("d")
        storage.open("d/size", "write").allocate(100)
        storage.open("d/write", "write").write(0, [b"b" * 512])
        storage.open("d/created", "create")
        storage.rename("d/old", "d/renamed")
        storage.unlink("d/removed")
        after = storage.crash()
        names = after.list("d")
        assert ("old" in names) != ("renamed" in names), "a rename is one change"
        outcomes.add(
            (after.open("d/size", "read").size() == 100,
             after.open("d/write", "read").read(0, 512) == b"b" * 512,
             "created" in names, "renamed" in names, "removed" in names)
        )  # fmt: skip
    assert len(outcomes) == 32


def test_the_same_seed_leaves_the_same() -> None:
    def left(seed: int) -> bytes:
        storage = SimStorage(seed)
        file = storage.open("one", "create")
        storage.sync_dir("")
        file.write(0, [bytes([number % 256 for number in range(20_000)])])
        return storage.crash().open("one", "read").read(0, 20_000)

    assert left(1) == left(1)
    assert len({left(seed) for seed in range(20)}) > 10


def test_a_failed_sync_of_a_directory_says_nothing_of_its_names() -> None:
    """The next one succeeds and makes none of them durable."""
    outcomes = set()
    for seed in range(40):
        storage = SimStorage(seed)
        storage.faults["sync_dir", 1] = errno.EIO
        for name in ("d/one", "d/two"):
            storage.open(name, "create").sync()
        with pytest.raises(OSError):
            storage.sync_dir("d")
        storage.sync_dir("d")
        assert storage.list("d") == ["one", "two"]
        outcomes.add(tuple(storage.crash().list("d")))
    assert outcomes == {(), ("one",), ("two",), ("one", "two")}


def test_a_power_loss_may_take_one_side_only() -> None:
    storage = SimStorage(0)
    for name in ("a/synced", "b/synced"):
        file = storage.open(name, "create")
        file.write(0, [b"old"])
        file.sync()
        storage.sync_dir(name[0])
        file.write(0, [b"new"])
        storage.open(f"{name[0]}/created", "create")
    after = storage.lose(lambda name: name.startswith("a/"))
    assert after.open("a/synced", "read").read(0, 3) == b"old"
    assert after.open("b/synced", "read").read(0, 3) == b"new"
    assert (after.list("a"), after.list("b")) == (["synced"], ["created", "synced"])


def test_an_operation_that_a_crash_interrupts_has_happened_in_part() -> None:
    """As a process sees it that is killed in the middle of a write."""
    lengths = set()
    for seed in range(100):
        storage = SimStorage(seed, crash_at=2)
        file = storage.open("one", "create")
        with pytest.raises(Crash):
            file.write(0, [b"x" * 1000])
        lengths.add(storage.kill().open("one", "read").size())
    assert len(lengths) > 30
    assert max(lengths) <= 1000
