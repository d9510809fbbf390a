"""Random histories through the real engine: every openable point and the backing equal a plain
model.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from journal.format import Kind
from tests.cdp.curator.disk_model import Disk


def act(disk: Disk, rng: random.Random) -> None:
    """One random act of a client, the administrator, the curator or fate."""
    block = rng.randrange(disk.blocks)
    small = min(rng.choice((1, 1, 1, 2, 5)), disk.blocks - block)
    large = min(rng.choice((16, 24, 40)), disk.blocks - block)
    match rng.choices(
        ("write", "large", "zero", "trim", "sync", "step", "kill", "bookmark", "unbookmark",
         "window", "release", "rollback", "abort", "finish"),
        (40, 6, 6, 10, 10, 30, 2, 3, 1, 3, 2, 2, 1, 3),
    )[0]:  # fmt: skip
        case "write":
            disk.write(block, small)
        case "large":
            disk.write(block, large)
        case "zero":
            disk.zero(block, rng.choice((small, large)), Kind.ZERO)
        case "trim":
            disk.zero(block, rng.choice((small, large)), Kind.TRIM)
        case "sync":
            disk.sync()
        case "step":
            disk.step()
        case "kill":
            disk.kill()
        case "bookmark":
            disk.bookmark(f"mark-{len(disk.model)}")
        case "unbookmark":
            disk.sync()
            if disk.bookmarks:
                label = rng.choice(sorted(disk.bookmarks))
                del disk.bookmarks[label]
                disk.points.unbookmark(label)
        case "window":
            disk.sync()
            seqs = disk.openable()
            disk.engine.move_window(rng.choice(seqs))
        case "release":
            if disk.engine.applier.settled:
                disk.engine.release_step()
        case "rollback" | "abort" as what:
            disk.sync()
            disk.rollback(rng.choice(disk.openable()), commit=what == "rollback")
        case "finish":
            disk.engine.applier.finish()


@pytest.mark.parametrize("number", range(12))
def test_every_openable_point_equals_the_model(tmp_path: Path, seed: int, number: int) -> None:
    rng = random.Random(f"{seed}/{number}")
    disk = Disk(tmp_path, sparse=number % 3 == 2)
    for count in range(150):
        act(disk, rng)
        if count % 10 == 9:
            disk.check(rng, points=4)
    disk.sync()
    disk.check(rng, points=40)
    disk.settle()
    disk.check(rng, points=40)
    disk.check_backing()
    disk.check(rng, points=40)


@pytest.mark.expect_log("history before seq", required=False)
def test_both_logs_shrink_when_nothing_is_kept(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    rng = random.Random(1)
    for _ in range(1500):
        disk.write(rng.randrange(disk.blocks), 1)
    disk.sync()
    disk.settle()
    assert len(disk.engine.redo.segments()) > 4
    disk.engine.move_window(disk.frontier.durable)
    disk.engine.policy.journal_limit = 1
    for _ in range(200):
        disk.stamp += 2_000_000_000
        disk.engine.step(disk.stamp)
    assert len(disk.engine.redo.segments()) <= 1
    assert sum(info.size for info in disk.engine.history.snapshot.undo_infos.values()) <= 2 << 20
    disk.check(rng)
    disk.check_backing()


@pytest.mark.expect_log("history before seq")
def test_a_bookmark_stays_exact_while_the_window_moves_past(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    disk = Disk(tmp_path)
    for turn in range(6):
        for _ in range(300):
            disk.write(rng.randrange(disk.blocks - 1), rng.choice((1, 2)))
        disk.bookmark(f"turn-{turn}")
        disk.zero(rng.randrange(60), 30, Kind.TRIM)
        disk.sync()
        disk.settle()
        disk.engine.policy.journal_limit = 6 << 20
        for _ in range(60):
            disk.stamp += 2_000_000_000
            disk.engine.step(disk.stamp)
        disk.engine.policy.journal_limit = 1 << 40
        disk.check(rng, points=5)
    assert disk.engine.catalog.reclaimed > 600
    disk.check_backing()
