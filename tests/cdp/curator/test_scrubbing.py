"""When scrubs begin, go on and are given up; what is done about what they find."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from cdp.config import DiskConfig, new_uuid
from cdp.curator.scrubber import BURST_SECONDS, Pacer
from cdp.curator.scrubbing import (
    LOOK_SECONDS,
    POSTPONED_SECONDS,
    RETRY_SECONDS,
    STATE_FILE,
    Pass,
    Scrubbing,
)
from journal.errors import CdpError, Conflict, Corruption

DAY = 86400.0
MIB = 1 << 20
STEP_SECONDS = 1.0  # of a clock that jumps
Clock = trio.testing.MockClock


class Player:
    """Stands in for the process that reads: says what is in its script; "wait" is for a new rate,
    "die" for its end.
    """

    def __init__(self) -> None:
        self.script: list[str] = []
        self.asked: list[tuple[int, tuple[int, int]]] = []
        self.rates: list[int] = []

    async def read(
        self, rate: int, after: tuple[int, int], on_message: Callable[[dict[str, Any]], None]
    ) -> None:
        self.asked.append((rate, after))
        for line in self.script:
            await trio.sleep(STEP_SECONDS)
            if line == "wait":
                while not self.rates:  # noqa: ASYNC110
                    await trio.sleep(STEP_SECONDS)
            elif line == "die":
                raise CdpError("it ended with status 9")
            else:
                on_message(json.loads(line))

    async def set_rate(self, rate: int) -> None:
        await trio.lowlevel.checkpoint()
        self.rates.append(rate)


def message(kind: str, done: int, **more: int) -> str:
    numbers = {"done": done, "total": 100, "records": 3, "more": 0, "undo": 2, "redo": 7}
    return json.dumps({kind: numbers | more})


def damage(file: str, effect: str = "lost") -> str:
    place = {"what": "checksum mismatch", "file": file, "offset": 512, "length": 4096}
    return json.dumps({"damage": place | {"first_seq": 5, "last_seq": 6, "effect": effect}})


class Curator:
    """Stands in for who may change something."""

    def __init__(self) -> None:
        self.dropped: list[str] = []
        self.catalog: list[Corruption] = []

    async def repair_catalog(self) -> list[Corruption]:
        await trio.lowlevel.checkpoint()
        return self.catalog

    async def drop_runs(self, files: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        self.dropped += files


class Bench:
    """A disk's directory and a wall clock that goes with trio's."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.curator = directory, Curator()
        self.config = DiskConfig(
            name="d", uuid=new_uuid(), size=MIB, block_size=512, backing="/b", journal="/j"
        )
        self.ahead = 1e9
        self.player = Player()
        self.script(message("finished", 100))

    def wall(self) -> float:
        return self.ahead + trio.current_time()

    def script(self, *lines: str) -> None:
        self.player.script = list(lines)
        self.player.rates = []

    def asked(self) -> list[tuple[int, tuple[int, int]]]:
        return self.player.asked

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Scrubbing]:
        one = Scrubbing(self.directory, self.config, wall=self.wall, reader=self.player)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run, self.curator)
            yield one
            nursery.cancel_scope.cancel()

    async def until(self, what: Callable[[], bool]) -> None:
        with trio.fail_after(100 * DAY):
            while not what():  # noqa: ASYNC110
                await trio.sleep(LOOK_SECONDS)


@pytest.fixture
def bench(short_tmp: Path) -> Bench:
    return Bench(short_tmp)


async def test_one_that_is_asked_for(bench: Bench, autojump_clock: Clock) -> None:
    reports: list[dict[str, Any]] = []
    async with bench.running() as scrubbing:
        await scrubbing.start(5 * MIB)
        found = await scrubbing.wait(reports.append)
        assert (found.bytes, found.records, found.damaged) == (100, 3, [])
        status = scrubbing.status()
        assert status["last"]["finished"] == found.finished
        assert (status["running"], status["bytes"]) == (None, 100)
    assert bench.asked() == [(5 * MIB, (0, 0))]


async def test_they_come_by_themselves_and_not_all_at_once(
    bench: Bench, autojump_clock: Clock
) -> None:
    """The first within the interval, the others an interval after; different for each disk."""
    async with bench.running() as scrubbing:
        began = bench.wall()
        first = scrubbing.due()
        assert first is not None
        assert 0.1 * 7 * DAY <= first - began <= 7 * DAY
        await bench.until(lambda: scrubbing.last is not None)
        assert scrubbing.last is not None
        assert 0 <= scrubbing.last.started - first <= 2 * LOOK_SECONDS
        second = scrubbing.due()
        assert second is not None
        assert 0.95 * 7 * DAY <= second - scrubbing.last.started <= 1.05 * 7 * DAY
        await bench.until(lambda: len(bench.asked()) == 2)
    (bench.directory / STATE_FILE).unlink()
    dues = set()
    for _ in range(9):
        bench.config = msgspec.structs.replace(bench.config, uuid=new_uuid())
        async with bench.running() as another:
            dues.add(another.due())
    assert len(dues) == 9


async def test_none_is_scheduled_without_an_interval(bench: Bench, autojump_clock: Clock) -> None:
    async with bench.running() as scrubbing:
        await scrubbing.set(None, None)
        await trio.sleep(9 * DAY)
        assert (scrubbing.due(), bench.asked()) == (None, [])
        await scrubbing.set(DAY, None)
        await bench.until(lambda: scrubbing.last is not None)
    assert bench.asked() == [(0, (0, 0))]


@pytest.mark.expect_log("6 damaged places cost content")
async def test_what_is_found_is_remembered(bench: Bench, autojump_clock: Clock) -> None:
    bench.script(damage("redo/1.seg"), message("progress", 9), damage("undo/1.seg"),
                 damage("redo/1.seg"), message("finished", 100, more=4))  # fmt: skip
    async with bench.running() as scrubbing:
        await scrubbing.start(None)
        found = await scrubbing.wait(lambda report: None)
        assert [each["file"] for each in found.damaged] == ["redo/1.seg", "undo/1.seg"]
        assert scrubbing.status()["last"]["lost"] == 6
    async with bench.running() as scrubbing:
        assert scrubbing.last is not None
        assert scrubbing.last.damaged == found.damaged
        assert scrubbing.status()["bytes"] == 100


@pytest.mark.expect_log("0 damaged places cost content, 2 do not")
async def test_what_lies_twice_is_repaired(bench: Bench, autojump_clock: Clock) -> None:
    bench.curator.catalog = [Corruption("damaged copy", file="catalog.1", offset=512)]
    bench.script(damage("index/redo-1.run", "covered"), message("finished", 100))
    async with bench.running() as scrubbing:
        await scrubbing.start(None)
        found = await scrubbing.wait(lambda report: None)
        assert [(each["file"], each["effect"]) for each in found.damaged] == [
            ("catalog.1", "repaired"), ("index/redo-1.run", "repaired"),
        ]  # fmt: skip
        assert bench.curator.dropped == ["index/redo-1.run"]
        assert scrubbing.status()["repaired"] == 2


@pytest.mark.expect_log("damaged places", required=False)
async def test_an_interrupted_one_goes_on_where_it_was(bench: Bench, autojump_clock: Clock) -> None:
    bench.script(damage("redo/1.seg"), message("progress", 40), "wait")
    async with bench.running() as scrubbing:
        await scrubbing.start(None)
        await bench.until(lambda: (scrubbing.status()["running"] or {}).get("done") == 40)
    bench.script(message("finished", 60))
    async with bench.running() as scrubbing:
        await bench.until(lambda: scrubbing.last is not None)
        assert scrubbing.last is not None
        assert (scrubbing.last.bytes, len(scrubbing.last.damaged)) == (100, 1)
        assert scrubbing.status()["bytes"] == 100
    assert [after for _, after in bench.asked()] == [(0, 0), (2, 7)]


async def test_an_old_unfinished_one_begins_anew(bench: Bench, autojump_clock: Clock) -> None:
    bench.script(message("progress", 40), "wait")
    async with bench.running() as scrubbing:
        await scrubbing.start(None)
        await bench.until(lambda: (scrubbing.status()["running"] or {}).get("done") == 40)
    bench.ahead += 8 * DAY
    bench.script(message("finished", 100))
    async with bench.running() as scrubbing:
        await bench.until(lambda: scrubbing.last is not None)
    assert [after for _, after in bench.asked()] == [(0, 0), (0, 0)]


@pytest.mark.expect_log("did not come to its end")
async def test_one_that_fails_is_tried_again_later(bench: Bench, autojump_clock: Clock) -> None:
    bench.script(message("progress", 40), "die")
    async with bench.running() as scrubbing:
        await scrubbing.start(None)
        with pytest.raises(CdpError, match="ended with status 9"):
            await scrubbing.wait(lambda report: None)
        assert "status 9" in scrubbing.status()["failure"]
        bench.script(message("finished", 60))
        began = trio.current_time()
        await bench.until(lambda: scrubbing.last is not None)
        assert trio.current_time() - began >= RETRY_SECONDS - LOOK_SECONDS
        assert scrubbing.status()["failure"] is None


async def test_stopping_one_puts_it_off(bench: Bench, autojump_clock: Clock) -> None:
    bench.script(message("progress", 40), "wait")
    async with bench.running() as scrubbing:
        with pytest.raises(Conflict):
            scrubbing.stop()
        await bench.until(lambda: scrubbing.status()["running"] is not None)
        ended = trio.Event()

        async def wait() -> None:
            with pytest.raises(CdpError, match="stopped"):
                await scrubbing.wait(lambda report: None)
            ended.set()

        stopped = bench.wall()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            scrubbing.stop()
            await ended.wait()
        due = scrubbing.due()
        assert due is not None
        assert due >= stopped + POSTPONED_SECONDS - 1


async def test_a_new_rate_is_told(bench: Bench, autojump_clock: Clock) -> None:
    bench.script(message("progress", 1), "wait", message("finished", 100))
    async with bench.running() as scrubbing:
        await scrubbing.start(MIB)
        await bench.until(lambda: (scrubbing.status()["running"] or {}).get("done") == 1)
        await scrubbing.start(3 * MIB)  # joins it
        await scrubbing.wait(lambda report: None)
    assert bench.player.rates == [3 * MIB]
    assert len(bench.asked()) == 1


@pytest.mark.expect_log("counts as never scrubbed")
@pytest.mark.parametrize("content", ["", "{", '{"since": "then"}', "[1]"])
async def test_a_damaged_memory_is_none(bench: Bench, content: str, autojump_clock: Clock) -> None:
    (bench.directory / STATE_FILE).write_text(content)
    async with bench.running() as scrubbing:
        assert scrubbing.last is None
        assert scrubbing.due() is not None


async def test_a_clock_that_was_set_back_does_not_put_it_off_for_ever(
    bench: Bench, autojump_clock: Clock
) -> None:
    async with bench.running() as scrubbing:
        await scrubbing.start(None)
        await scrubbing.wait(lambda report: None)
        bench.ahead -= 1000 * DAY
        due = scrubbing.due()
        assert due is not None
        assert due <= bench.wall() + 1.05 * 7 * DAY


def test_only_so_many_places_are_kept() -> None:
    found = Pass(started=0.0)
    for number in range(1003):
        found.note({"file": "redo/1.seg", "offset": number, "what": "x", "effect": "lost"})
    assert (len(found.damaged), found.more) == (1000, 3)


# ------------------------------------------------------------------------------------------- pacing
class Time:
    """A clock that only sleeping, and work, move on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def read(pacer: Pacer, time: Time, pieces: int, work: float, listen=lambda: None) -> float:
    began = time.now
    for _ in range(pieces):
        time.now += work
        pacer.pace(MIB, listen)
    return time.now - began


def test_the_rate_is_kept() -> None:
    time = Time()
    pacer = Pacer(10 * MIB, time, time.sleep)
    took = read(pacer, time, 200, 0.001)
    assert took == pytest.approx(200 / 10 - BURST_SECONDS, abs=0.3)


def test_a_device_that_is_slow_is_left_alone_half_of_the_time() -> None:
    time = Time()
    took = read(Pacer(10 * MIB, time, time.sleep), time, 200, 0.5)
    assert took == pytest.approx(200, rel=0.02)


def test_without_a_rate_nothing_waits() -> None:
    time = Time()
    assert read(Pacer(0, time, time.sleep), time, 200, 0.01) == pytest.approx(2)


def test_a_new_rate_counts_at_once() -> None:
    time = Time()
    pacer = Pacer(MIB // 100, time, time.sleep)

    def listen() -> None:
        if time.now > 110:
            pacer.rate = 0

    assert read(pacer, time, 200, 0.01, listen) < 15
