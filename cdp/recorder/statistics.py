"""What a recorder counts. Plain numbers, raised in the loop once per batch where possible."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

# Upper bounds of the buckets of all histograms: 16 us to 16 s, in steps of two.
BUCKET_SHIFT: Final = 14
BUCKETS: Final = 21
BUCKET_SECONDS: Final = tuple((1 << (BUCKET_SHIFT + n)) / 1e9 for n in range(BUCKETS))


class Histogram:
    """Durations by powers of two. ``counts[n]``: those below ``2 ** (BUCKET_SHIFT + n)`` ns."""

    __slots__ = ("counts", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * 64
        self.sum_ns = 0

    def add(self, duration_ns: int, times: int = 1) -> None:
        """Count `times` events that took `duration_ns` each. (The hot path has this in line.)"""
        self.counts[(duration_ns >> BUCKET_SHIFT).bit_length()] += times
        self.sum_ns += duration_ns * times

    def snapshot(self) -> dict[str, Any]:
        """As Prometheus likes it: cumulative counts up to each bound."""
        total = 0
        buckets = []
        for bound, count in zip(BUCKET_SECONDS, self.counts, strict=False):
            total += count
            buckets.append([bound, total])
        return {
            "buckets": buckets,
            "count": sum(self.counts),
            "sum_seconds": self.sum_ns / 1e9,
        }


@dataclass(slots=True)
class Statistics:
    """Since the start of the process. Sizes in bytes."""

    plain_writes: int = 0  # of one block each; not in the next two
    other_writes: int = 0
    other_written_bytes: int = 0
    reads: int = 0
    read_bytes: int = 0
    reads_waited: int = 0  # for a disk, in a thread
    flushes: int = 0
    trims: int = 0
    zeroes: int = 0
    partial_writes: int = 0
    partial_waits: int = 0  # for a disk, with their blocks locked
    block_statuses: int = 0
    refused: int = 0  # answered with an error of the protocol
    failed: int = 0  # answered with an error of ours: EIO, ENOSPC
    discarded_requests: int = 0
    discarded_connections: int = 0
    connections_total: int = 0
    syncs: int = 0
    throttled_ns: int = 0
    damaged_reads: int = 0
    protocol_errors: dict[str, int] = field(default_factory=dict)
    write_latency: Histogram = field(default_factory=Histogram)
    sync_latency: Histogram = field(default_factory=Histogram)

    def protocol_error(self, what: str) -> None:
        """A peer broke the protocol."""
        self.protocol_errors[what] = self.protocol_errors.get(what, 0) + 1
