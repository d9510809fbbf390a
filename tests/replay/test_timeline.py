"""Histograms and candidate points, from the tables of a redo log."""

from __future__ import annotations

import numpy as np

from journal.format import BATCH_DTYPE, BLOCK, ROW_DTYPE, Kind, Log, SegmentHeader
from journal.segment import SegmentInfo, Table
from replay.openable import Openable
from replay.target import ClockTable
from replay.timeline import JournalTimeline

# Near UNIX time in ns: too large for floating point to tell neighbours apart.
START = 1_772_370_300_123_456_789


class OneSegment:
    """A redo log of one segment; batches are (stamp, blocks of each write)."""

    def __init__(self, *batches: tuple[int, list[int]]) -> None:
        rows = np.zeros(sum(len(writes) for _, writes in batches), ROW_DTYPE)
        rows["kind"] = Kind.WRITE
        rows["nblocks"] = [blocks for _, writes in batches for blocks in writes]
        columns = np.zeros(len(batches), BATCH_DTYPE)
        row = 0
        for batch, (stamp, writes) in zip(columns, batches, strict=True):
            batch["first_seq"], batch["first_row"], batch["count"] = row + 1, row, len(writes)
            batch["stamp"] = stamp
            row += len(writes)
        header = SegmentHeader(Log.REDO, bytes(16), 1, bytes(16), 1, 0, 0, 0, START)
        self.info = SegmentInfo("redo/00000001.seg", header, 0, 0, None, row)
        self.only = Table(1, 1, rows, np.zeros(0, np.uint64), columns)

    def segments(self) -> list[SegmentInfo]:
        return [self.info]

    def table(self, info: SegmentInfo) -> Table:
        return self.only

    def timeline(self) -> JournalTimeline:
        durable = len(self.only.rows)
        return JournalTimeline(
            tables=self,
            durable_seq=durable,
            window_start_seq=0,
            openable=Openable(window_start=0, durable=durable),
            kept_points=[],
            bookmarks={},
            clock=ClockTable([(0, 0)]),
            start_stamp=START,
        )


def test_a_batch_at_the_very_start_is_counted() -> None:
    """Edges computed as floating point lay up to 128 ns behind it, and the first write was lost."""
    for shift in range(0, 512, 7):
        start = START + shift
        line = OneSegment((start, [1]), (start + 1_000_000, [2])).timeline()
        buckets = line.buckets(start, start + 2_000_000, 90)
        assert sum(bucket.records for bucket in buckets) == 2
        assert buckets[0].bytes == BLOCK


def test_batches_without_records() -> None:
    """An idle disk appends empty batches, for the watermark. They have no bytes: not those of the
    batch behind them, and at the end of a table they were an IndexError."""
    log = OneSegment((START, [3]), (START + 1, []), (START + 2, [5, 7]), (START + 3, []))
    line = log.timeline()
    counted = line.buckets(START, START + 4, 4)
    assert [bucket.bytes // BLOCK for bucket in counted] == [3, 0, 12, 0]
    assert [bucket.records for bucket in counted] == [1, 0, 2, 0]
    points = line.candidates(0, 3, 100)
    assert sum(point.bytes for point in points) == 15 * BLOCK
    assert [point.seq for point in points] == [1, 3]
