"""The viewer ahead of its first view."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from cdp.viewer.service import PREPARE_SECONDS, PREPARE_SECONDS_MAX, Service
from journal.errors import JournalError
from replay.history import History
from tests.cdp.curator.disk_model import Disk

MANY_PERIODS = 1000 * PREPARE_SECONDS


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps when all tasks wait would jump while a thread is at work."""

    async def run_sync(function: Callable[..., object], *arguments: object, **_: bool) -> object:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    disk = Disk(tmp_path)
    disk.write(0, 3)
    disk.sync()
    disk.settle()
    return disk


class Counted(History):
    """Counts the snapshots that are taken, and fails if told so."""

    taken = 0
    error: Exception | None = None

    def prepare(self) -> None:
        self.taken += 1
        if self.error is not None:
            raise self.error
        super().prepare()


def counted(disk: Disk) -> Counted:
    history = disk.new_reader()
    history.__class__ = Counted
    assert isinstance(history, Counted)
    return history


@asynccontextmanager
async def serving(disk: Disk, history: History) -> AsyncIterator[Service]:
    async with trio.open_nursery() as nursery:
        child = dataclasses.replace(disk.child, role="viewer")
        service = Service(child, history, nursery)
        nursery.start_soon(service.keep_prepared)
        yield service
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(MANY_PERIODS):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(PREPARE_SECONDS / 10)


async def call(method: Any, **params: Any) -> None:
    await method(params, [], None)


def files_of_another_segment(disk: Disk) -> None:
    """The journal gets files."""
    generation = disk.frontier.generations()
    while disk.frontier.generations() == generation:
        disk.write(0, 64)
    disk.sync()


async def test_a_snapshot_is_ready_and_stays_so(disk: Disk, autojump_clock: object) -> None:
    history = counted(disk)
    async with serving(disk, history):
        await until(lambda: history.is_prepared)
        assert history.read(0, 0, 3) == b"".join(
            value.to_bytes(8, "little") * 512 for value in (1_000_000, 1_000_001, 1_000_002)
        )
        taken = history.taken
        await trio.sleep(MANY_PERIODS)
        assert history.taken == taken, "nothing has changed"
        files_of_another_segment(disk)
        assert not history.is_prepared
        await until(lambda: history.is_prepared)


async def test_readers_are_left_alone(disk: Disk, autojump_clock: object) -> None:
    history = counted(disk)
    async with serving(disk, history) as service:
        await until(lambda: history.is_prepared)
        await call(service.open, id="v", seq=1)
        taken = history.taken
        files_of_another_segment(disk)
        await trio.sleep(MANY_PERIODS)
        assert history.taken == taken
        await call(service.close, id="v")
        await until(lambda: history.is_prepared)


@pytest.mark.parametrize("error", [JournalError("spoilt"), OSError(5, "no")])
async def test_a_disk_that_cannot_be_read_is_tried_now_and_then(
    disk: Disk, autojump_clock: object, error: Exception
) -> None:
    history = counted(disk)
    history.error = error
    async with serving(disk, history):
        await trio.sleep(100 * PREPARE_SECONDS_MAX)
        assert 100 <= history.taken < 110
        history.error = None
        await until(lambda: history.is_prepared)
