"""Scrub: verify every checksum of a journal, a megabyte at a time.

Reads only, and never above what is durable (redo) or published (undo). What is damaged is reported
with file, offset and what it costs; all else stays available. What lies twice - a footer and its
batches, the index and the tables it was made of - is told from what is lost. (The two copies of the
catalog are compared by who writes them: `journal.catalog`.)

Bytes without a checksum mean nothing to anybody: padding, zeroes behind the last batch, the reserve
and files that are to become segments. They are not looked at.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from journal.errors import Corruption, Vanished
from journal.follower import RedoFollower
from journal.format import (
    BATCH_HEADER,
    CHAIN_AT,
    ENTRY,
    SUM_LARGE,
    SUM_SMALL,
    U64,
    Kind,
    Log,
    checksum,
    segment_seed,
)
from journal.frontier import unpack_position
from journal.run_format import RunDamaged
from journal.runset import RunSet
from journal.segment import (
    Scanner,
    SegmentInfo,
    Table,
    load_footer,
    payload_sizes,
    read_leniently,
    segment_name,
)
from journal.storage import File
from journal.undo_follower import UndoFollower, UndoSnapshot, verify_undo
from replay.facts import Told, lost_records

WINDOW_BYTES: Final = 1 << 20
ATTEMPTS: Final = 100
PLACES_MAX: Final = 1000  # that are told one by one; of what goes beyond only the number

_U64: Final = U64.unpack_from
_NOTHING: Final = bytes(8)

Read = Callable[[File, int, memoryview], int]


class Effect(enum.StrEnum):
    """What damage costs."""

    LOST = "lost"  # content: who needs it gets an error
    COVERED = "covered"  # nothing now: the same is said elsewhere
    REPAIRED = "repaired"  # nothing any more


@dataclasses.dataclass(frozen=True, slots=True)
class Damage:
    """One damaged place. ``offset``, ``length``: bytes of ``file``, which is relative to the
    journal's directory.

    In the redo log records ``first_seq``..``last_seq`` are concerned (0, 0: none); in the undo log
    points before ``last_seq``: those at which a block was what its damaged image says, or, if it is
    not known which images are lost, all. Later points are, too, where a rollback refers to those.
    """

    what: str
    file: str
    offset: int
    length: int
    first_seq: int
    last_seq: int
    effect: Effect

    def followed_by(self, other: Damage) -> Damage | None:
        """Both as one, if they are of a piece."""
        same = (self.what, self.file, self.effect) == (other.what, other.file, other.effect)
        if not same or not self.offset <= other.offset <= self.offset + self.length:
            return None
        if other.first_seq > self.last_seq + 1 and other.first_seq:
            return None
        end = max(self.offset + self.length, other.offset + other.length)
        firsts, lasts = (self.first_seq, other.first_seq), (self.last_seq, other.last_seq)
        return dataclasses.replace(
            self, length=end - self.offset, first_seq=min(firsts), last_seq=max(lasts)
        )


class Place(NamedTuple):
    """How far a scrub has come: the last segment of either log that is done."""

    undo: int = 0
    redo: int = 0


def read_plainly(file: File, offset: int, buffer: memoryview) -> int:
    """Through the page cache."""
    return file.read_into(offset, buffer)


class Scrub:
    """One pass over what there was at its start. `steps` does it; the fields say how it goes.

    ``done_bytes`` of ``total_bytes``; ``records``; ``damaged``: the places, at most PLACES_MAX, and
    ``more``: how many there were beyond. ``place``: where another one may go on after this one.

    :param catalog: what it says now, and its list of undo segments with their published ends.
    :param read: how content is read.
    :param after: what an earlier one has done.
    """

    def __init__(
        self,
        *,
        redo: RedoFollower,
        undo: UndoFollower,
        runs: Sequence[RunSet],
        catalog: Callable[[], tuple[Told, Mapping[int, int]]],
        durable: Callable[[], int],
        read: Read = read_plainly,
        after: Place | None = None,
    ) -> None:
        self._redo, self._undo, self._runs = redo, undo, runs
        self._catalog, self._read = catalog, read
        self._buffer = memoryview(bytearray(WINDOW_BYTES))
        self.place = after or Place()
        self.records = self.done_bytes = self.more = 0
        self.damaged: list[Damage] = []
        # Before all else: what was durable now must be in every later listing.
        self._durable = durable()
        infos = redo.segments(), undo.snapshot().segments
        self._redo_infos = [info for info in infos[0] if info.segment > self.place.redo]
        self._undo_infos = [info for info in infos[1] if info.segment > self.place.undo]
        for each in runs:
            self._refresh(each)
        self.total_bytes = sum(info.size for info in (*self._redo_infos, *self._undo_infos))
        self.total_bytes += sum(run.size for each in runs for run in each.runs)

    @staticmethod
    def _refresh(runs: RunSet) -> None:
        for _ in range(ATTEMPTS):
            try:
                return runs.refresh()
            except Vanished:
                continue
        raise Vanished("the index changes faster than it can be listed: try again")

    def steps(self) -> Iterator[int]:
        """Verify everything; yields how many bytes were read, after each piece of work."""
        yield from self._indexes()
        yield from self._undo_log()
        yield from self._redo_log()

    def note(self, damage: Damage) -> None:
        """One more damaged place."""
        joined = self.damaged[-1].followed_by(damage) if self.damaged else None
        if joined is not None:  # (who was told of it meanwhile is not told that it has grown)
            self.damaged[-1] = joined
        elif len(self.damaged) < PLACES_MAX:
            self.damaged.append(damage)
        else:
            self.more += 1

    def _note(self, error: Corruption, effect: Effect, length: int = 0) -> None:
        seqs = error.first_seq, error.last_seq
        self.note(Damage(error.what, error.file, error.offset, length, *seqs, effect))

    def _advance(self, size: int) -> int:
        self.done_bytes += size
        return size

    # ------------------------------------------------------------------------------------- index
    def _indexes(self) -> Iterator[int]:
        for runs in self._runs:
            for problem in list(runs.problems.values()):
                if isinstance(problem, RunDamaged):
                    self._note(problem, Effect.COVERED)
            for run in list(runs.runs):
                try:
                    for _ in run.verify():
                        yield 0
                except RunDamaged as error:
                    runs.throw_away(run, error)
                    self._note(error, Effect.COVERED)
                except Vanished:
                    pass  # merged meanwhile
                yield self._advance(run.size)

    # ----------------------------------------------------------------------------------- the logs
    def _undo_log(self) -> Iterator[int]:
        before = self._catalog()[1]
        snapshot = self._undo.snapshot()
        highest = unpack_position(snapshot.published)[0]
        after = self._catalog()[1]
        # Neither one that was swept around the listing, nor one that is not published yet.
        listed = {
            number: min(before[number], after[number])
            for number in before.keys() & after.keys() if number <= highest
        }  # fmt: skip
        try:
            missing = verify_undo(self._undo, snapshot, listed)
        except Vanished:  # swept meanwhile: the next scrub sees what there is then
            missing = []
        for error in missing:
            # Nobody can say which blocks: every point that needs before-images is refused them.
            seqs = 0, self._durable + 1
            self.note(Damage(error.what, error.file, error.offset, 0, *seqs, Effect.LOST))
        for info in self._undo_infos:
            yield from self._one(info, listed.keys(), snapshot)
            self.place = self.place._replace(undo=info.segment)

    def _redo_log(self) -> Iterator[int]:
        self._missing_segments()
        for info in self._redo_infos:
            yield from self._one(info, {info.segment}, None)
            self.place = self.place._replace(redo=info.segment)

    def _one(
        self, info: SegmentInfo, wanted: Collection[int], snapshot: UndoSnapshot | None
    ) -> Iterator[int]:
        """One segment, if it is wanted: nothing rests on one that is on no list."""
        if info.segment not in wanted:
            yield self._advance(info.size)
            return
        try:
            file = self._redo.file(info) if snapshot is None else self._undo.file(info)
            table, footer = self._table(file, info, snapshot)
            if snapshot is None:
                self._missing_records(info, table)
            yield from self._segment(file, info, table, footer)
        except Vanished:
            yield self._advance(info.size)

    def _missing_segments(self) -> None:
        """Segments that are not there, or cannot be told from rubbish."""
        infos = self._redo.segments()
        damaged = self._redo.damaged
        told, _ = self._catalog()  # after the listing: it says so before one is given up
        for first, last in lost_records(infos, {}, reclaimed=told.reclaimed, durable=self._durable):
            if last <= told.voided:
                continue
            newer = next((info for info in infos if info.first_seq > last), None)
            older = max((info.segment for info in infos if info.first_seq < first), default=0)
            names = [
                name for name in damaged
                if older < _number(name) and (newer is None or _number(name) < newer.segment)
            ]  # fmt: skip
            number = newer.header.predecessor if newer is not None else older + 1
            for name in names or [segment_name(Log.REDO, number)]:
                what = damaged[name].what if name in damaged else "segment is missing"
                self.note(Damage(what, name, 0, 0, first, last, Effect.LOST))
                damaged.pop(name, None)
        for name, error in damaged.items():  # nothing that was durable lacks
            self.note(Damage(error.what, name, 0, 0, 0, 0, Effect.COVERED))

    def _missing_records(self, info: SegmentInfo, table: Table) -> None:
        """The end of a segment, if it is not there."""
        last = min(info.bound, self._durable)
        if info.trailer is not None:
            last = min(last, info.trailer.last_seq)
        if table.last_seq >= last:
            return
        seqs = table.last_seq + 1, last
        newer = [
            each.header.predecessor for each in self._redo_infos if each.segment > info.segment
        ]
        if newer and newer[0] > info.segment:  # they are in one between, which is not there
            name = segment_name(Log.REDO, newer[0])
            self.note(Damage("segment is missing", name, 0, 0, *seqs, Effect.LOST))
        else:
            at = int(table.batches["offset"][-1]) if len(table.batches) else 0
            self.note(Damage("records are missing", info.name, at, 0, *seqs, Effect.LOST))

    def _table(
        self, file: File, info: SegmentInfo, snapshot: UndoSnapshot | None
    ) -> tuple[Table, bool]:
        """A segment's table, and whether it is its footer's; what is wrong with it is noted."""
        if info.trailer is not None:
            try:
                return load_footer(file, info).table.upto(info.bound), True
            except Corruption as error:
                self._note(error, Effect.COVERED, info.trailer.footer_bytes)
            table = Scanner(file, info).advance(min(info.bound, info.trailer.last_seq))
        elif snapshot is not None:
            table = self._undo.table(snapshot, info)
        else:
            table = self._redo.table(info)
        lost = table.rows["kind"] == Kind.LOST
        for batch in table.batches[table.batches["count"] > 0]:
            first, count = int(batch["first_row"]), int(batch["count"])
            if lost[first : first + count].any():
                seqs = table.first_seq + first, table.first_seq + first + count - 1
                self._lost_batch(info, int(batch["offset"]), 0, seqs, Effect.LOST)
        return table, False

    def _lost_batch(
        self, info: SegmentInfo, offset: int, length: int, seqs: tuple[int, int], effect: Effect
    ) -> None:
        if info.header.log == Log.UNDO:  # its numbers mean nothing to anybody
            seqs = 0, self._durable + 1
        self.note(Damage("damaged batch", info.name, offset, length, *seqs, effect))

    # ----------------------------------------------------------------------------------- content
    def _segment(self, file: File, info: SegmentInfo, table: Table, footer: bool) -> Iterator[int]:
        """Everything in a segment that carries a checksum, in the order of the file."""
        self.records += len(table.rows)
        # Heads of batches that made the table are whole.
        heads = len(table.batches) if footer else 0
        if footer and info.trailer is not None and info.bound < info.trailer.last_seq:
            heads -= 1  # of the last one a part is void: its head covers more than the table
        pieces = _Pieces.of(table, max(heads, 0))
        seed = segment_seed(info.header)
        at = done = 0
        while at < len(pieces.low):
            start = int(pieces.low[at])
            to = max(at + 1, int(pieces.high.searchsorted(start + WINDOW_BYTES, "right")))
            length = int(pieces.high[to - 1]) - start
            if length > len(self._buffer):
                self._buffer = memoryview(bytearray(length))
            window = self._buffer[:length]
            whole = self._fill(file, start, window)
            for number in pieces.bad(at, to, window, start, seed):
                self._bad_piece(info, table, pieces, number, whole)
            at = to
            done += length
            yield self._advance(length)
        self._advance(max(0, info.size - done))

    def _fill(self, file: File, offset: int, window: memoryview) -> bool:
        """Read a stretch of a file; whether the device could."""
        try:
            got = self._read(file, offset, window)
            window[got:] = bytes(len(window) - got)
            return True
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        data = read_leniently(file, offset, len(window))
        window[: len(data)] = data
        window[len(data) :] = bytes(len(window) - len(data))
        return False

    def _bad_piece(
        self, info: SegmentInfo, table: Table, pieces: _Pieces, number: int, whole: bool
    ) -> None:
        low, high, row = (int(column[number]) for column in pieces[:3])
        if row < 0:  # the footer says the same
            batch = table.batches[-row - 1]
            first = int(batch["first_seq"])
            seqs = first, first + max(int(batch["count"]), 1) - 1
            self._lost_batch(info, low, high - low, seqs, Effect.COVERED)
            return
        seqs = table.first_seq + row, table.first_seq + row
        if info.header.log == Log.UNDO:
            seqs = 0, int(table.rows["arg"][row])
        what = "checksum mismatch" if whole else "cannot be read"
        self.note(Damage(what, info.name, low, high - low, *seqs, Effect.LOST))


class _Pieces(NamedTuple):
    """What carries a checksum in a segment, in the order of the file.

    ``row``: of the table, for a piece of a payload; for the head of a batch minus its number,
    minus 1.
    """

    low: np.ndarray
    high: np.ndarray
    row: np.ndarray
    wanted: np.ndarray

    @classmethod
    def of(cls, table: Table, heads: int) -> _Pieces:
        """All payloads of a table, and the heads of its first so many batches."""
        rows, batches = table.rows, table.batches[:heads]
        sizes = payload_sizes(rows)
        unit = np.where(sizes < SUM_LARGE, SUM_SMALL, SUM_LARGE)
        counts = (sizes + unit - 1) // unit
        row = np.repeat(np.arange(len(rows)), counts)
        ends = np.concatenate([[0], np.cumsum(counts)])
        within = np.arange(len(row)) - ends[row]
        payload = rows["payload"].astype(np.int64)
        low = payload[row] + within * unit[row]
        high = np.minimum(low + unit[row], (payload + sizes)[row])
        wanted = table.sums[rows["sum"].astype(np.int64)[row] + within]
        start, first = batches["offset"].astype(np.int64), batches["first_row"].astype(np.int64)
        count = batches["count"].astype(np.int64)
        sums = ends[first + count] - ends[first]
        lows = np.concatenate([start, low])
        order = lows.argsort(kind="stable")
        return cls(
            lows[order],
            np.concatenate([start + BATCH_HEADER.size + count * ENTRY.size + sums * 8, high])[
                order
            ],
            np.concatenate([-np.arange(len(batches)) - 1, row])[order],
            np.concatenate([batches["chain"], wanted])[order],
        )

    def bad(self, at: int, to: int, window: memoryview, start: int, seed: int) -> list[int]:
        """Which of the pieces ``at``..``to - 1`` lack their checksum. ``window``, the file from
        ``start`` on, is changed.
        """
        low, high = (self.low[at:to] - start).tolist(), (self.high[at:to] - start).tolist()
        wanted = self.wanted[at:to].tolist()
        head = self.row[at:to] < 0
        false = set()
        for each in np.flatnonzero(head).tolist():
            chain = low[each] + CHAIN_AT
            if _U64(window, chain)[0] != wanted[each]:
                false.add(each)
            window[chain : chain + 8] = _NOTHING  # as when the sum was taken
        seeds = np.where(head, np.uint64(seed), np.uint64(0)).tolist()  # 0: as without one
        found = [
            checksum(window[one:end], seed) for one, end, seed in zip(low, high, seeds, strict=True)
        ]
        if found == wanted and not false:
            return []
        return [
            at + each for each in range(to - at) if found[each] != wanted[each] or each in false
        ]


def _number(name: str) -> int:
    digits = name.rpartition("/")[2].partition(".")[0]
    return int(digits) if digits.isdecimal() else 0
