"""The index: building runs of random writes, merges included, and looking blocks up.

Two million 4 KiB records at random on 64 GiB, in segments of 16,384, each made a run with a sync of
its own and merged in tiers as it comes; then lookups in what that leaves, and in one run of all.

    python bench/index.py [--records N] [--directory DIR]

What counts is a ratio of two runs on one machine, and the bytes, which are the same on all: those
handed to write calls, from /proc/self/io.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bench.report import Report, machine, parser, scratch
from journal.entries import entries_of
from journal.format import BATCH_DTYPE, ROW_DTYPE, Kind, Log
from journal.run_format import INDEX
from journal.runset import RunSet
from journal.segment import Table
from journal.storage import RealStorage

SEGMENT_RECORDS = 16_384
DISK_BLOCKS = 1 << 24
LOOKUPS = 10_000
NOW = 1 << 62


def tables(records: int, seed: int = 1) -> list[Table]:
    """Segments of random one-block writes."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(records // SEGMENT_RECORDS):
        rows = np.zeros(SEGMENT_RECORDS, ROW_DTYPE)
        rows["kind"], rows["nblocks"] = Kind.WRITE, 1
        rows["block"] = rng.integers(0, DISK_BLOCKS, SEGMENT_RECORDS)
        first_seq = 1 + number * SEGMENT_RECORDS
        sums, batches = np.zeros(0, "<u8"), np.zeros(0, BATCH_DTYPE)
        made.append(Table(number + 1, first_seq, rows, sums, batches))
    return made


def written() -> int:
    """Bytes that this process has handed to write calls."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The best of a few."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def build(runs: RunSet, segments: list[Table]) -> dict[str, float]:
    """Add and merge everything: rates and bytes."""
    records = sum(len(table.rows) for table in segments)
    before = written()
    add = 0.0
    start, cpu = time.perf_counter(), time.process_time()
    for table in segments:
        begin = time.perf_counter()
        runs.add(table)
        add += time.perf_counter() - begin
        while runs.merge():
            pass
    total, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "entries_of_records_per_s": len(segments[0].rows)
        / seconds(lambda: entries_of(segments[0]), 20),
        "index_records_per_s": records / total,
        "cpu_us_per_record": cpu / records * 1e6,
        "add_us_per_record": add / records * 1e6,
        "merges_us_per_record": (total - add) / records * 1e6,
        "written_bytes_per_record": (written() - before) / records,
        "kept_bytes_per_record": runs.statistics().bytes / records,
        "runs": len(runs.runs),
    }


def one_by_one(lookup: Callable[[int, int], object], blocks: list[int]) -> None:
    """A lookup for each block."""
    for block in blocks:
        lookup(block, NOW)


def look_up(runs: RunSet) -> dict[str, float]:
    """Costs of a lookup, one block at a time and in columns, in all runs and in a single one."""
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, DISK_BLOCKS, LOOKUPS).astype(np.uint64)
    ascending, single = np.sort(blocks), blocks.tolist()
    dense = np.arange(LOOKUPS, dtype=np.uint64)
    result = {}
    for name, source in (("set", runs), ("run", runs.runs[0])):
        newest, oldest, one = source.newest_le, source.oldest, source.newest_le_one
        costs = {
            "one": seconds(partial(one_by_one, one, single)),
            "sorted_column": seconds(partial(newest, ascending, NOW)),
            "oldest_column": seconds(partial(oldest, ascending)),
            "neighbours_column": seconds(partial(newest, dense, NOW)),
        }
        for what, cost in costs.items():
            result[f"{name}_{what}_us_per_block"] = cost / LOOKUPS * 1e6
    return result


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--records", type=int, default=2_000_000)
    chosen = arguments.parse_args()
    with scratch(chosen.directory) as root:
        report = Report(f"index alone: {chosen.records:,} records", chosen.rows)
        report.say(machine(root))
        (root / INDEX).mkdir()
        runs = RunSet(
            RealStorage(root), root / INDEX,
            log=Log.REDO, disk=bytes(16), read_only=False,
        )  # fmt: skip
        segments = tables(chosen.records)
        result = build(runs, segments)
        result |= look_up(runs)
        entries = runs.statistics().entries
        start = time.perf_counter()
        for _ in runs.merge_steps(runs.runs):
            pass
        result["merge_of_all_us_per_entry"] = (time.perf_counter() - start) / entries * 1e6
        result |= {f"merged_{name}": cost for name, cost in look_up(runs).items() if "run" in name}
        start = time.perf_counter()
        damaged = runs.verify()
        result["verify_us_per_entry"] = (time.perf_counter() - start) / entries * 1e6
        assert not damaged
        runs.close()
    for name, value in result.items():
        report.say(f"{name:36} {value:14,.3f}")
    report.at_least("index", result["index_records_per_s"], 1_000_000, " records/s")
    report.at_most("index, written", result["written_bytes_per_record"], 90, " B/record")


if __name__ == "__main__":
    main()
