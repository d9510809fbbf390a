"""The reserve: all of it or nothing, and what it is for."""

from __future__ import annotations

import pytest

from journal import reserve
from tests.crash.sim_storage import Crash, SimStorage

SIZE = 5 << 20


def test_it_is_made_once_and_given_away_once() -> None:
    storage = SimStorage(1)
    assert not reserve.release(storage)
    assert reserve.make(storage, SIZE)
    assert storage.used() == SIZE
    before = storage.operations
    assert reserve.make(storage, SIZE)
    assert storage.operations <= before + 1  # it is only looked at
    assert reserve.make(storage, SIZE // 2)
    assert storage.used() == SIZE // 2
    assert reserve.release(storage)
    assert storage.used() == 0
    assert not reserve.release(storage)


def test_without_space_there_is_none_and_nothing_is_left() -> None:
    storage = SimStorage(1, space=SIZE - 1)
    assert not reserve.make(storage, SIZE)
    assert storage.used() == 0
    assert storage.open_files == 0
    storage.space = SIZE
    assert reserve.make(storage, SIZE)


@pytest.mark.parametrize("operation", range(1, 9))
def test_after_a_crash_it_is_made_anew(operation: int) -> None:
    storage = SimStorage(operation, crash_at=operation)
    with pytest.raises(Crash):
        reserve.make(storage, SIZE)
    after = storage.crash()
    assert reserve.make(after, SIZE)
    assert after.used() == SIZE
