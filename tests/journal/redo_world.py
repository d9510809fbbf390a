"""A writer of the redo log with its frontier, and what it wrote."""

from __future__ import annotations

import random

from journal.follower import RedoFollower
from journal.format import BLOCK, Kind, payload_sums
from journal.recovery import recover
from journal.redo import RedoWriter
from journal.storage import Storage

DISK = b"follower test :)"


class FakeFrontier:
    """The two things of a frontier that a follower needs."""

    def __init__(self) -> None:
        self.durable = 0
        self.redo_generation = 0
        self.curator_generation = 0

    def generations(self) -> tuple[int, int]:
        return self.redo_generation, self.curator_generation


class Recorder:
    """A writer with a frontier, and the contents that it wrote."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.frontier = FakeFrontier()
        self.random = random.Random(0)
        self.contents: dict[int, bytes] = {}
        self.stamp = 1
        self.start()

    def start(self) -> None:
        self.stamp += 1
        recovered = recover(
            self.storage, DISK, durable_hint=self.frontier.durable, applied_hint=0,
            stamp=self.stamp, identity=lambda: self.random.randbytes(16),
        )  # fmt: skip
        self.writer = RedoWriter(
            self.storage, DISK, recovered.start, segment_bytes=32768,
            identity=lambda: self.random.randbytes(16), on_segment=self.appeared,
        )  # fmt: skip
        self.frontier.redo_generation += 1
        self.frontier.durable = recovered.durable

    def appeared(self, _: int) -> None:
        self.frontier.redo_generation += 1

    def write(self, count: int = 1) -> None:
        entries, sums, payloads = [], [], []
        for number in range(count):
            data = self.random.randbytes(BLOCK)
            self.contents[self.writer.last_seq + 1 + number] = data
            entries += [number, 0, 1, Kind.WRITE, 0, 0]
            sums += payload_sums(data)
            payloads.append(data)
        self.writer.append(
            entries, sums, payloads, BLOCK * count, stamp=self.stamp, barrier=0, applied=0,
            window_start=0,
        )  # fmt: skip

    def sync(self) -> None:
        self.frontier.durable = self.writer.sync()


def seqs(follower: RedoFollower, first: int = 1, last: int = 1 << 40) -> list[int]:
    return [
        table.first_seq + row
        for _, table in follower.tables(first, last)
        for row in range(len(table.rows))
    ]
