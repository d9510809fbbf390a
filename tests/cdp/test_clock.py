"""The host's clock: stamps over reboots, and the wall clock over steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp import clock
from cdp.clock import SECOND_NS, HostClock, Sources, StampClock, WallTable
from journal.errors import InvalidInput

WALL = 1_764_000_000 * SECOND_NS


class FakeHost:
    """A machine whose clocks tick only when told."""

    def __init__(self) -> None:
        self.boottime, self.wall, self.boot = 5 * SECOND_NS, WALL, "boot-1"

    def sources(self) -> Sources:
        return Sources(lambda: self.boottime, lambda: self.wall, lambda: self.boot)

    def pass_time(self, seconds: float) -> None:
        self.boottime += int(seconds * SECOND_NS)
        self.wall += int(seconds * SECOND_NS)

    def reboot(self) -> None:
        self.boot += "+"
        self.boottime = SECOND_NS


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


def test_the_first_stamp_is_near_the_wall_clock(tmp_path: Path, host: FakeHost) -> None:
    assert HostClock.open(tmp_path, host.sources()).now() == WALL


def test_children_are_told_the_offset(tmp_path: Path, host: FakeHost) -> None:
    mine = HostClock.open(tmp_path, host.sources())
    theirs = StampClock(mine.offset_ns, lambda: host.boottime)
    host.pass_time(3)
    assert theirs.now() == mine.now() == WALL + 3 * SECOND_NS


def test_a_restart_in_the_same_boot_goes_on(tmp_path: Path, host: FakeHost) -> None:
    first = HostClock.open(tmp_path, host.sources())
    host.pass_time(10)
    host.wall = 0  # nobody asks it again
    second = HostClock.open(tmp_path, host.sources())
    assert second.offset_ns == first.offset_ns
    assert second.host_id == first.host_id


def test_the_ceiling_is_durable_before_the_clock_is_used(tmp_path: Path, host: FakeHost) -> None:
    used = HostClock.open(tmp_path, host.sources())
    stored = json.loads((tmp_path / "host.json").read_text())
    assert stored["ceiling_ns"] == used.ceiling_ns >= used.now() + clock.CEILING_RENEW_NS
    assert stored["boot_id"] == "boot-1"


@settings(max_examples=25)
@given(
    boots=st.lists(
        st.tuples(
            st.integers(0, 10**4),  # seconds the boot lasts
            st.integers(-(10**9), 10**9),  # by how much somebody sets the wall clock before it
            st.booleans(),  # whether it ends cleanly
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_stamp_of_a_boot_is_given_again_in_a_later_one(
    tmp_path_factory: pytest.TempPathFactory, boots: list[tuple[int, int, bool]]
) -> None:
    """Whatever the wall clock does, and even if the supervisor dies as soon as it can."""
    directory, host = tmp_path_factory.mktemp("clock"), FakeHost()
    highest = 0
    for seconds, step, clean in boots:
        host.wall = max(0, host.wall + step * SECOND_NS)
        used = HostClock.open(directory, host.sources())
        assert used.now() > highest
        for _ in range(0, seconds, 600):
            host.pass_time(min(600, seconds))
            if used.must_renew:
                used.renew()
            assert used.now() < used.ceiling_ns
        highest = used.now()
        if clean:
            used.lower(highest)
        host.reboot()


def test_after_a_clean_stop_stamps_stay_near_the_wall_clock(tmp_path: Path, host: FakeHost) -> None:
    for _ in range(20):
        used = HostClock.open(tmp_path, host.sources())
        host.pass_time(60)
        used.lower(used.now() + SECOND_NS)
        host.reboot()
        host.wall += 10 * SECOND_NS
    assert abs(HostClock.open(tmp_path, host.sources()).now() - host.wall) < 2 * SECOND_NS


def test_the_ceiling_is_renewed_well_before_it_is_reached(tmp_path: Path, host: FakeHost) -> None:
    used = HostClock.open(tmp_path, host.sources())
    needed = [used.must_renew]
    host.pass_time(1801)
    needed.append(used.must_renew)
    used.renew()
    needed.append(used.must_renew)
    assert needed == [False, True, False]


@pytest.mark.parametrize("name", ["host.json", "clock.json"])
def test_a_damaged_file_is_named_and_nothing_is_guessed(
    tmp_path: Path, host: FakeHost, name: str
) -> None:
    HostClock.open(tmp_path, host.sources())
    (tmp_path / name).write_text("{")
    with pytest.raises(InvalidInput, match=rf"{name}.*move it away") as caught:
        HostClock.open(tmp_path, host.sources())
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- wall clock


def test_a_step_is_noticed_and_kept(tmp_path: Path, host: FakeHost) -> None:
    used = HostClock.open(tmp_path, host.sources())
    host.pass_time(100)
    assert used.observe() is None
    before = used.now()
    host.pass_time(1)
    host.wall -= 3600 * SECOND_NS
    noticed = used.observe()
    assert noticed == (used.now(), -3600 * SECOND_NS)
    assert used.observe() is None
    assert used.wall.wall_of(before) == WALL + 100 * SECOND_NS
    assert used.wall.wall_of(used.now()) == WALL + (101 - 3600) * SECOND_NS
    again = HostClock.open(tmp_path, host.sources())
    assert again.wall.entries == used.wall.entries


def test_noise_is_no_step(tmp_path: Path, host: FakeHost) -> None:
    used = HostClock.open(tmp_path, host.sources())
    host.wall += clock.STEP_NS_MIN - 1
    assert used.observe() is None
    host.wall += 2
    assert used.observe() is not None


def test_the_wall_clock_of_each_boot_is_known(tmp_path: Path, host: FakeHost) -> None:
    HostClock.open(tmp_path, host.sources())
    host.reboot()
    host.wall += 30 * SECOND_NS
    used = HostClock.open(tmp_path, host.sources())
    assert used.wall.wall_of(used.now()) == host.wall
    assert used.wall.wall_of(WALL) == WALL


def test_stamps_before_the_table_count_with_its_first_entry() -> None:
    assert WallTable([]).wall_of(7) == 7
    assert WallTable([(100, 5), (200, 50)]).wall_of(7) == 12


def test_the_table_is_bounded() -> None:
    table = WallTable([])
    for number in range(clock.WALL_ENTRIES_MAX + 10):
        table.add(number, number)
    assert len(table.entries) == clock.WALL_ENTRIES_MAX
    assert table.entries[-1][0] == clock.WALL_ENTRIES_MAX + 9


def test_real_clocks_agree() -> None:
    assert len(clock.boot_id_bytes()) == 16
    first = clock.boottime_ns()
    assert StampClock(1000).now() >= first + 1000
