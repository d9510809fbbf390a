"""The soak (`make soak`) for a few steps, and its search for the shortest failure."""

from __future__ import annotations

import pytest

from tests.crash import soak


@pytest.mark.crash
@pytest.mark.needs_tool("nbdkit", "nbdfuse", "losetup")
def test_a_few_steps(seed: int) -> None:
    said: list[str] = []
    assert soak.run(seed, range(1, 26), float("inf"), said.append) == 25, said


def test_a_failure_is_made_short() -> None:
    tried: list[list[int]] = []

    def fails(steps: list[int]) -> bool:
        tried.append(steps)
        return {7, 8, 31} <= set(steps)

    assert soak.shrink(list(range(1, 101)), fails) == [7, 8, 31]
    assert len(tried) < 100


def test_steps_are_written_as_they_are_read() -> None:
    assert soak.format_steps([1, 2, 3, 7, 9, 10]) == "1-3,7,9-10"
    assert soak.parse_steps("1-3,7,9-10") == [1, 2, 3, 7, 9, 10]
