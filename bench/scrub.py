"""How fast a journal is verified when nothing bounds it: from the page cache, without a device.

A redo log is written by the product's own writer, once with records of 4 KiB in batches of 32 (a
checksum for each), once with records of 128 KiB (one per 64 KiB), once with batches of one record
of 4 KiB (a head for each). Then `replay.scrub` reads it as the scrubber's process does.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.report import Report, machine, parser, scratch
from journal.follower import RedoFollower
from journal.format import BLOCK, Kind, payload_sums
from journal.recovery import recover
from journal.redo import RedoWriter
from journal.storage import RealStorage
from journal.undo_follower import UndoFollower
from replay.facts import Told
from replay.scrub import Scrub

DISK = b"bench of scrubs."
GIB, MIB = 1 << 30, 1 << 20
SEGMENT_BYTES = 64 * MIB
SHAPES = (  # records of so many blocks, so many in a batch; what it must reach, GiB/s
    ("4 KiB records, 32 a batch", 1, 32, 1.0),
    ("128 KiB records", 32, 1, 1.0),
    ("4 KiB records, one a batch", 1, 1, 1.0),
)


class Frontier:
    """What a follower asks of the shared page."""

    def __init__(self, durable: int) -> None:
        self.durable = durable

    def generations(self) -> tuple[int, int]:
        return (1, 1)


def write(storage: RealStorage, total: int, blocks: int, batch: int) -> int:
    """A log of about so many bytes of content; its last seq."""
    recovered = recover(
        storage, DISK, durable_hint=0, applied_hint=0, stamp=1, identity=lambda: os.urandom(16)
    )
    writer = RedoWriter(
        storage, DISK, recovered.start, segment_bytes=SEGMENT_BYTES,
        identity=lambda: os.urandom(16),
    )  # fmt: skip
    content = os.urandom(blocks * BLOCK)
    entries = [
        number for at in range(batch) for number in (at * blocks, 0, blocks, Kind.WRITE, 0, 0)
    ]
    sums = payload_sums(content) * batch
    size = batch * blocks * BLOCK
    stamp = 2
    for _ in range(total // size):
        stamp += 1
        writer.append(
            entries, sums, [content] * batch, size, stamp=stamp, barrier=0, applied=0,
            window_start=1,
        )  # fmt: skip
    last = writer.last_seq
    writer.close()
    return last


def measure(storage: RealStorage, durable: int) -> tuple[float, float, int]:
    """Seconds, processor seconds and bytes of one pass."""
    scrub = Scrub(
        redo=RedoFollower(storage, DISK, Frontier(durable)),
        undo=UndoFollower(storage, DISK, lambda: 0), runs=[],
        catalog=lambda: (Told(), {}), durable=lambda: durable,
    )  # fmt: skip
    began = time.perf_counter(), time.process_time()
    for _ in scrub.steps():
        pass
    took = time.perf_counter() - began[0], time.process_time() - began[1]
    assert scrub.damaged == []
    return *took, scrub.done_bytes


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--mib", type=int, default=1024)
    arguments.add_argument("--repeat", type=int, default=5)
    chosen = arguments.parse_args()
    with scratch(chosen.directory) as root:
        report = Report(f"scrub, {chosen.mib} MiB in the page cache", chosen.rows)
        report.say(machine(root))
        for number, (what, blocks, batch, target) in enumerate(SHAPES):
            storage = RealStorage(root / str(number))
            durable = write(storage, chosen.mib * MIB, blocks, batch)
            measure(storage, durable)  # fetches what is not cached any more
            passes = [measure(storage, durable) for _ in range(chosen.repeat)]
            rates = [size / took / GIB for took, _, size in passes]
            cpu = statistics.median(size / busy / GIB for _, busy, size in passes)
            detail = f"{min(rates):.2f} to {max(rates):.2f}; {cpu:.2f} GiB a cpu second"
            report.at_least(
                f"scrub, {what}", statistics.median(rates), target, " GiB/s", detail=detail
            )


if __name__ == "__main__":
    main()
