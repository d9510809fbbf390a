"""A redo log that is written, stopped in some way, hurt, and recovered."""

from __future__ import annotations

import itertools
import random

from journal.format import BLOCK, Kind, Log, payload_sums
from journal.recovery import Recovered, recover
from journal.redo import RedoWriter
from journal.segment import (
    SegmentInfo,
    SegmentLister,
    load_table,
    open_segment,
    read_blocks,
    segment_name,
)
from tests.crash.sim_storage import SimStorage

DISK = b"recovery test :)"


class Life:
    """See the module; every batch has the next stamp, ``contents`` what was written by seq."""

    def __init__(self, storage: SimStorage | None = None) -> None:
        self.storage = storage or SimStorage(0)
        self.numbers = itertools.count(1)
        self.stamp = 100
        self.contents: dict[int, bytes] = {}
        self.random = random.Random(0)
        self.writer = self.start(self.recover())

    def identity(self) -> bytes:
        return next(self.numbers).to_bytes(16, "little")

    def recover(self, durable: int = 0, applied: int = 0, **rest: int) -> Recovered:
        self.stamp += 100
        return recover(
            self.storage, DISK, durable_hint=durable, applied_hint=applied, stamp=self.stamp,
            identity=self.identity, **rest,
        )  # fmt: skip

    def start(self, recovered: Recovered) -> RedoWriter:
        self.writer = RedoWriter(
            self.storage, DISK, recovered.start, segment_bytes=65536, identity=self.identity
        )
        return self.writer

    def write(self, *blocks: int, applied: int = 0) -> int:
        self.stamp += 1
        entries, sums, payloads = [], [], []
        for number, block in enumerate(blocks):
            data = self.random.randbytes(BLOCK)
            self.contents[self.writer.last_seq + 1 + number] = data
            entries += [block, 0, 1, Kind.WRITE, 0, 0]
            sums += payload_sums(data)
            payloads.append(data)
        return self.writer.append(
            entries, sums, payloads, BLOCK * len(blocks), stamp=self.stamp,
            barrier=self.writer.durable, applied=applied, window_start=1,
        ).last_seq  # fmt: skip

    def record(self, kind: Kind, block: int = 0, nblocks: int = 0, arg: int = 0) -> int:
        self.stamp += 1
        return self.writer.append(
            [block, arg, nblocks, kind, 0, 0], [], [], 0, stamp=self.stamp,
            barrier=0, applied=0, window_start=1,
        ).last_seq  # fmt: skip

    def control(self, kind: Kind, body: dict[str, object]) -> int:
        self.stamp += 1
        return self.writer.append_control(
            kind, body, stamp=self.stamp, barrier=0, applied=0, window_start=1
        )

    def fill(self, upto: int) -> None:
        """Batches of three records, synced after every second one, up to a seq."""
        while self.writer.last_seq < upto:
            last = self.write(*self.random.sample(range(100), 3))
            if last % 2 == 0:
                self.writer.sync()

    def kill(self) -> None:
        """The process dies; nothing in the page cache is lost."""
        self.storage = self.storage.kill()

    def infos(self) -> list[SegmentInfo]:
        return SegmentLister(self.storage, Log.REDO, DISK).refresh()

    def file(self, number: int) -> bytearray:
        return self.storage.live[segment_name(Log.REDO, number)].live

    def hurt(self, number: int, offset: int, length: int = 1) -> None:
        content = self.file(number)
        for at in range(offset, offset + length):
            content[at] ^= 0x5A

    def found(self, durable: int) -> dict[int, int | bytes]:
        """Every record that a reader sees: contents of writes, kinds of others."""
        result: dict[int, int | bytes] = {}
        for info in self.infos():
            file = open_segment(self.storage, info.name)
            table = load_table(file, info, upto=durable)
            for row, entry in enumerate(table.rows):
                seq = table.first_seq + row
                assert seq not in result
                result[seq] = int(entry["kind"])
                if entry["kind"] == Kind.WRITE:
                    result[seq] = read_blocks(file, table, row, 0, 1, name=info.name)
        return dict(sorted(result.items()))

    def batches(self, number: int) -> list[tuple[int, int, int]]:
        """Offset, first seq and number of records of a segment's batches."""
        info = next(info for info in self.infos() if info.segment == number)
        table = load_table(open_segment(self.storage, info.name), info)
        return [(int(b["offset"]), int(b["first_seq"]), int(b["count"])) for b in table.batches]
