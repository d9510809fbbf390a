"""Scrub: verify every checksum that both logs carry, in steps of one segment.

Reads only. What is damaged is reported with file, offset and the seqs affected; all else stays
available.
"""

from __future__ import annotations

import numpy as np

from journal.errors import Corruption, Vanished
from journal.format import BLOCK, Kind, checksum, sum_count, sum_unit
from journal.segment import SegmentInfo, Table, load_footer, payload_sizes
from replay.history import History, Log

READ_BYTES = 8 << 20


class Scrub:
    """One pass over the segments there were at its start."""

    def __init__(self, history: History) -> None:
        snapshot = history.refresh()
        self._todo: list[tuple[Log, SegmentInfo]] = [
            *((history.redo, info) for info in snapshot.redo_infos.values()),
            *((history.undo, info) for info in snapshot.undo_infos.values()),
        ]
        self.total_bytes = sum(info.size for _, info in self._todo)
        self.done_bytes = self.records = 0
        self.damaged: list[Corruption] = []

    def step(self) -> bool:
        """Verify one segment; False when all were."""
        if not self._todo:
            return False
        log, info = self._todo.pop()
        try:
            self._segment(log, info)
        except Vanished:
            pass  # reclaimed or swept meanwhile
        except Corruption as error:
            self.damaged.append(error)
        self.done_bytes += info.size
        return True

    def _segment(self, log: Log, info: SegmentInfo) -> None:
        file = log.file(info)
        if info.sealed:
            try:
                load_footer(file, info)
            except Corruption as error:  # the batches say the same
                self.damaged.append(error)
        table = log.table(info)
        self.records += len(table.rows)
        if info.trailer is not None and table.last_seq < min(info.trailer.last_seq, info.bound):
            raise Corruption(
                "records are missing", file=info.name, first_seq=table.last_seq + 1,
                last_seq=min(info.trailer.last_seq, info.bound),
            )  # fmt: skip
        self._payloads(log, info, table)

    def _payloads(self, log: Log, info: SegmentInfo, table: Table) -> None:
        """All payloads in the order of the file, in large reads."""
        file = log.file(info)
        sizes = payload_sizes(table.rows)
        rows = np.flatnonzero(sizes)
        at = 0
        while at < len(rows):
            start = int(table.rows["payload"][rows[at]])
            to = at + 1
            while (
                to < len(rows)
                and int(table.rows["payload"][rows[to]]) + int(sizes[rows[to]]) - start
                <= READ_BYTES
            ):
                to += 1
            end = int(table.rows["payload"][rows[to - 1]]) + int(sizes[rows[to - 1]])
            window = memoryview(file.read(start, end - start))
            for row in rows[at:to].tolist():
                place = int(table.rows["payload"][row]) - start
                self._record(info, table, row, window[place : place + int(sizes[row])])
            at = to

    def _record(self, info: SegmentInfo, table: Table, row: int, content: memoryview) -> None:
        entry = table.rows[row]
        control = 16 <= int(entry["kind"]) < 32
        nbytes = int(entry["arg"]) if control else int(entry["nblocks"]) * BLOCK
        unit, first = sum_unit(nbytes), int(entry["sum"])
        for number in range(sum_count(nbytes)):
            piece = content[number * unit : (number + 1) * unit]
            whole = min(unit, nbytes - number * unit)
            if len(piece) != whole or checksum(piece) != int(table.sums[first + number]):
                seq = table.first_seq + row
                if int(entry["kind"]) in (Kind.IMAGE, Kind.IMAGE_ZERO):
                    seq = int(entry["arg"])
                self.damaged.append(
                    Corruption(
                        "checksum mismatch", file=info.name,
                        offset=int(entry["payload"]) + number * unit, first_seq=seq, last_seq=seq,
                    )
                )  # fmt: skip
