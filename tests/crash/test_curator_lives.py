"""A disk through many lives: long stories with failures of every kind in between.

At the end everything a reader may see equals a plain model, the index can be made anew, the backing
alone is the disk, and both logs shrink to nothing. `CDP_TEST_SEED` replays a run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.curator_checks import check, check_backing, check_emptied, check_index
from tests.crash.curator_story import ALL, fail, in_pieces, make, story

pytestmark = [
    pytest.mark.crash,
    pytest.mark.expect_log("were acknowledged|history before seq", required=False),
]


@pytest.mark.parametrize("number", range(3))
def test_a_disk_through_all_its_lives(roots: Iterator[Path], seed: int, number: int) -> None:
    """Longer stories; at the end both logs shrink to nothing, and the index can be made anew."""
    live_through(next(roots), f"{seed}/{number}", short=512 * (number % 2) * 3)


@pytest.mark.parametrize("number", range(3))
def test_a_disk_whose_work_is_done_in_pieces(roots: Iterator[Path], seed: int, number: int) -> None:
    with in_pieces():
        live_through(next(roots), f"{seed}/{number}", blocks=9)


def live_through(root: Path, seed: str, **options: int) -> None:
    rng = random.Random(seed)
    world = make(root, rng.randrange(1 << 32), **options)
    for turn in range(12):
        story(world, f"{seed}/{turn}", 25)
        check(world)
        fail(world, rng.choice(ALL), rng)
        check(world)
    check_index(world)
    check(world)
    check_backing(world)
    check(world)
    check_emptied(world)
    world.close()
