"""All facts of one disk's logs that a reader may use, and what a block held at a point (R1).

A `Snapshot` is a consistent view of which files there are: redo segments and runs listed first,
undo afterwards, taken again when the frontier's generation moved meanwhile. It may be old for
hits, since journal facts only say what was true; never for the last step, the backing: there the
undo log is looked at once more afterwards (`History.read_into`). A file that is gone means: start
again with a new snapshot; a bad checksum is an error, never "the next one".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from journal.entries import Entries, kinds_of, merged, unpack_loc
from journal.errors import Corruption, Vanished
from journal.format import BLOCK, Kind
from journal.format import Log as Logs
from journal.frontier import unpack_position
from journal.run_format import RunDamaged
from journal.runset import RunSet
from journal.segment import SegmentInfo, Table, read_blocks, segment_name
from journal.storage import File
from replay.facts import (
    Generations,
    Log,
    Pair,
    Range,
    Snapshot,
    Source,
    Told,
    UndoLog,
    Unindexed,
    lost_records,
    source_of_runs,
)
from replay.plan import stretches
from replay.refs import decide

__all__ = ["ATTEMPTS", "History", "Log", "Piece", "Told", "UndoLog", "fill_zero"]

Piece = tuple[int, int, int]  # an offset in a file; start and end in the output

FEW_BLOCKS = 64  # so few, and scattered, are looked up one by one
# Of a read whose snapshot went stale; each retry means that a file was deleted meanwhile.
ATTEMPTS = 100


class History:
    """One disk's logs, their index and the backing, for reading. Not for use by two threads at
    once.
    """

    def __init__(
        self,
        *,
        frontier: Generations,
        redo: Log,
        undo: Log,
        redo_runs: RunSet,
        undo_runs: RunSet,
        backing: File,
        told: Callable[[], Told],
    ) -> None:
        self._told = told
        self.frontier = frontier
        self.redo, self.undo = redo, undo
        self.redo_runs, self.undo_runs = redo_runs, undo_runs
        self.backing = backing
        self._redo_tables, self._undo_tables = Unindexed(), Unindexed()
        self._snapshot: Snapshot | None = None

    # ------------------------------------------------------------------------------- snapshots
    @property
    def snapshot(self) -> Snapshot:
        """The newest one taken."""
        return self._snapshot or self.refresh()

    def refresh(self) -> Snapshot:
        """Take a new snapshot."""
        for _ in range(ATTEMPTS):
            generation = self.frontier.generations()
            published, durable = self.frontier.undo_published, self.frontier.durable
            known = self._snapshot
            # What it says of files changes only together with the generation.
            told = known.told if known and known.generation == generation else self._told()
            try:
                redo = self._redo_facts(told, durable)
                undo = self._undo_facts(told, published)
            except (Vanished, RunDamaged):
                continue  # a damaged run is thrown away: its tables are read instead
            if self.frontier.generations() == generation:
                break
        else:
            raise Vanished("the journal's files change faster than they can be listed: try again")
        infos, floor, decided, lost, versions = redo
        self._snapshot = Snapshot(
            generation=generation, published=published, told=told, lost=lost, images_lost=undo[1],
            floor=floor, decided=decided, redo=versions, undo=undo[2],
            redo_infos={info.segment: info for info in infos},
            undo_infos={info.segment: info for info in undo[0]},
        )  # fmt: skip
        return self._snapshot

    def current(self) -> Snapshot:
        """The newest one, if nothing has changed since it was taken; else a new one.

        Decisions about what to save must know every image that was published.
        """
        snapshot = self._snapshot
        return self.refresh() if snapshot is None or self._stale(snapshot) else snapshot

    @property
    def is_prepared(self) -> bool:
        """Whether no file came or went since the newest snapshot was taken."""
        snapshot = self._snapshot
        return snapshot is not None and self.frontier.generations() == snapshot.generation

    def prepare(self) -> None:
        """Take a snapshot for whoever reads next, and keep little else until then."""
        self.refresh()
        self.redo.cache.rest()
        self.undo.cache.rest()

    def _redo_facts(
        self, told: Told, durable: int
    ) -> tuple[list[SegmentInfo], int, int, tuple[Range, ...], tuple[Source, ...]]:
        """Segments, floor, decided, lost, facts."""
        infos = self.redo.segments()
        self.redo_runs.refresh()
        floor = max(infos[0].first_seq if infos else durable + 1, told.voided + 1)
        self.redo_runs.retain((info.segment for info in infos), floor=floor)
        covered = self.redo_runs.covered
        usable: list[tuple[Table, np.ndarray | None, int]] = []
        tables: dict[int, Table] = {}
        last = self.redo_runs.last_seq
        for place, info in enumerate(infos):
            if info.segment in covered:
                continue
            table = tables[info.segment] = self.redo.table(info)
            behind = (self.redo.table(each).rows for each in infos[place + 1 :])
            verdict = decide(table.rows, behind)
            usable.append((table, verdict.valid, verdict.undecided))
            last = max(last, table.first_seq + verdict.undecided - 1)
            if verdict.undecided < len(table.rows):
                break
        found = [
            *self._redo_tables.update(usable, told.voided), *source_of_runs(self.redo_runs)
        ]  # fmt: skip
        found.sort(key=lambda source: source.last_seq, reverse=True)
        lost = lost_records(infos, tables, reclaimed=told.reclaimed, durable=min(durable, last))
        lost = [each for each in lost if each[1] > told.voided]
        return infos, floor, last, tuple(lost), tuple(found)

    def _undo_facts(
        self, told: Told, published: int
    ) -> tuple[list[SegmentInfo], Corruption | None, tuple[Source, ...]]:
        """Segments, whether any are lost, facts."""
        infos = self.undo.segments()
        self.undo_runs.refresh()
        # What the catalog lists and is not there was lost: its entries must lead to an error, not
        # to an older image or the backing.
        there = {info.segment for info in infos}
        self.undo_runs.retain(told.undo | there)
        covered = self.undo_runs.covered
        tables = [self.undo.table(info) for info in infos if info.segment not in covered]
        usable = [(table, None, len(table.rows)) for table in tables]
        highest = unpack_position(published)[0]
        lost = {segment for segment in told.undo - there - covered if segment <= highest}
        lost |= {table.segment for table in tables if (table.rows["kind"] == Kind.LOST).any()}
        error = None
        if lost:
            error = Corruption(
                "before-images are damaged or gone", file=segment_name(Logs.UNDO, min(lost))
            )
        facts = (*self._undo_tables.update(usable), *source_of_runs(self.undo_runs))
        return infos, error, facts

    def _stale(self, snapshot: Snapshot) -> bool:
        return (
            self.frontier.generations() != snapshot.generation
            or self.frontier.undo_published != snapshot.published
        )

    # --------------------------------------------------------------------------------- lookups
    def newest_le(self, blocks: np.ndarray, seq: int) -> Pair:
        """The newest version <= ``seq`` of each block (sorted u64) in redo: (seqs, locs)."""
        if _scattered(blocks):
            return _columns([self._newest_le_one(block, seq) for block in blocks.tolist()])
        seqs, locs = np.zeros(len(blocks), np.uint64), np.zeros(len(blocks), np.uint64)
        for first_seq, last_seq, facts in self.snapshot.redo:
            if first_seq > seq:
                continue
            todo = np.flatnonzero(seqs < min(last_seq, seq))  # where it can know a newer one
            if not len(todo):
                break
            found, where = facts.newest_le(blocks[todo], seq)
            better = found > seqs[todo]
            seqs[todo[better]], locs[todo[better]] = found[better], where[better]
        return seqs, locs

    def smallest_gt(self, blocks: np.ndarray, seq: int) -> Pair:
        """The before-image with the smallest end > ``seq`` of each block: (ends, locs)."""
        if _scattered(blocks):
            return _columns([self._smallest_gt_one(block, seq) for block in blocks.tolist()])
        ends, locs = np.zeros(len(blocks), np.uint64), np.zeros(len(blocks), np.uint64)
        for _, last_end, facts in self.snapshot.undo:
            if last_end <= seq:
                continue
            found, where = facts.smallest_gt(blocks, seq)
            better = (found > 0) & ((ends == 0) | (found < ends))
            ends[better], locs[better] = found[better], where[better]
        return ends, locs

    def _newest_le_one(self, block: int, seq: int) -> tuple[int, int]:
        best = (0, 0)
        for first_seq, last_seq, facts in self.snapshot.redo:
            if best[0] >= last_seq:
                break  # the others end before it
            if first_seq <= seq:
                best = max(best, facts.newest_le_one(block, seq))
        return best

    def _smallest_gt_one(self, block: int, seq: int) -> tuple[int, int]:
        best = (0, 0)
        for _, last_end, facts in self.snapshot.undo:
            if last_end > seq:
                found = facts.smallest_gt_one(block, seq)
                if found[0] and (not best[0] or found < best):
                    best = found
        return best

    def oldest(self, blocks: np.ndarray) -> np.ndarray:
        """Seq of each block's oldest version in the redo log, trims included; 0 = none."""
        result = np.zeros(len(blocks), np.uint64)
        for _, _, facts in self.current().redo:
            found = facts.oldest(blocks)
            older = (found > 0) & ((result == 0) | (found < result))
            result[older] = found[older]
        return result

    def ends_le(self, blocks: np.ndarray, seqs: np.ndarray) -> np.ndarray:
        """Each block's largest end <= its element of ``seqs`` in the undo log; 0 = none."""
        result = np.zeros(len(blocks), np.uint64)
        for _, _, facts in self.current().undo:
            np.maximum(result, facts.ends_le(blocks, seqs), out=result)
        return result

    def successors(self, blocks: np.ndarray, seqs: np.ndarray, upto: int) -> Pair:
        """Each block's next version after its element of ``seqs``, <= ``upto``: (seqs, locs)."""
        found, locs = np.zeros(len(blocks), np.uint64), np.zeros(len(blocks), np.uint64)
        for first_seq, last_seq, facts in reversed(self.current().redo):
            todo = np.flatnonzero(((found == 0) | (found > first_seq)) & (seqs < last_seq))
            if not len(todo) or first_seq > upto:
                continue
            nexts, where = facts.successors(blocks[todo], seqs[todo], upto)
            better = (nexts > 0) & ((found[todo] == 0) | (nexts < found[todo]))
            found[todo[better]], locs[todo[better]] = nexts[better], where[better]
        return found, locs

    def overlapping(
        self, first_block: int, end_block: int, *, first_seq: int, last_seq: int
    ) -> Entries:
        """The versions in redo with a block in [first_block, end_block) and a seq in the range."""
        parts = [
            source.facts.overlapping(first_block, end_block).between(first_seq, last_seq)
            for source in self.current().redo
            if source.first_seq <= last_seq and source.last_seq >= first_seq
        ]
        return merged(parts)

    def images(self, first_block: int, end_block: int) -> Entries:
        """The before-images with a block in [first_block, end_block)."""
        return merged(
            [source.facts.overlapping(first_block, end_block) for source in self.current().undo]
        )

    def changed(self, first_seq: int, last_seq: int) -> Iterator[Pair]:
        """(starts, ends) of ranges of blocks with a version, or an image's end, in the range of
        seqs.
        """
        snapshot = self.refresh()
        for runs, sources in (
            (self.redo_runs, snapshot.redo), (self.undo_runs, snapshot.undo),
        ):  # fmt: skip
            extra = [source.facts for source in sources if isinstance(source.facts, Entries)]
            for part in runs.versions_in(first_seq, last_seq, extra=extra):
                starts, counts = part.ranges()
                yield starts, starts + counts

    def ref_source(self, loc: int) -> int:
        """The point that the ref record at ``loc`` names."""
        table, row, _ = self._where(loc, self.redo)
        return int(table.rows["arg"][row])

    # ------------------------------------------------------------------------------------ reads
    def read(self, seq: int, first: int, count: int) -> bytearray:
        """``count`` blocks from block ``first`` as they were at the openable point ``seq``."""
        out = bytearray(count * BLOCK)
        blocks = np.arange(first, first + count, dtype=np.uint64)
        self.read_into(out, blocks, seq)
        return out

    def read_into(self, out: bytearray | memoryview, blocks: np.ndarray, seq: int) -> None:
        """Content of ``blocks`` (sorted u64) at ``seq``, one after the other, into zeroed
        ``out``.

        :raises Corruption: what holds the content is damaged.
        :raises OSError: a file or the backing could not be read.
        """
        for _ in range(ATTEMPTS):
            try:
                self._resolve(out, np.arange(len(blocks)), blocks, seq)
                return
            except (Vanished, RunDamaged):
                self.refresh()
                memoryview(out)[:] = bytes(len(out))
        raise Vanished("the journal's files change faster than they can be read: try again")

    def zeroes(self, first: int, count: int, seq: int) -> np.ndarray:
        """Which of ``count`` blocks from ``first`` on are known to be zero at ``seq`` without a
        look at content (bool); False is always a safe answer.
        """
        blocks = np.arange(first, first + count, dtype=np.uint64)
        result = np.zeros(count, bool)
        for _ in range(ATTEMPTS):
            try:
                self._zeroes(result, np.arange(count), blocks, seq)
                return result
            except (Vanished, RunDamaged):
                self.refresh()
            except Corruption:
                break  # the read will tell
        return np.zeros(count, bool)

    def _snapshot_for(self, seq: int) -> Snapshot:
        """One that knows every record up to an openable point.

        :raises Corruption: there is none: the log should have more than it has.
        """
        snapshot = self.snapshot if seq <= self.snapshot.decided else self.refresh()
        if seq > snapshot.decided:  # ! or the newest of what is left would be taken for it
            raise Corruption(
                "records are damaged or gone", file="redo", first_seq=snapshot.decided + 1,
                last_seq=seq,
            )  # fmt: skip
        return snapshot

    def _zeroes(self, out: np.ndarray, at: np.ndarray, blocks: np.ndarray, seq: int) -> None:
        snapshot = self._snapshot_for(seq)
        seqs, locs = self.newest_le(blocks, seq)
        self._refuse_lost(seqs, seq)
        kind = kinds_of(locs)
        out[at] = (kind == Kind.ZERO) | (kind == Kind.TRIM)
        refs, rest = kind == Kind.REF, locs == 0
        if refs.any():
            sources = np.zeros(len(blocks), np.uint64)
            for loc in np.unique(locs[refs]).tolist():
                sources[locs == loc] = self.ref_source(int(loc))
            for source in np.unique(sources[refs]).tolist():
                same = refs & (sources == source)
                self._zeroes(out, at[same], blocks[same], int(source))
        if rest.any():
            _, images = self.smallest_gt(blocks[rest], seq)
            zero = kinds_of(images) == Kind.IMAGE_ZERO
            below = np.flatnonzero(images == 0)
            zero[below] = self._holes(blocks[rest][below])
            out[at[rest]] = zero
            if self._stale(snapshot):  # as after a read of the backing: look again
                raise Vanished("the snapshot became stale")

    def _holes(self, blocks: np.ndarray) -> np.ndarray:
        """Which of the blocks (sorted u64) are holes of the backing (bool)."""
        result = np.ones(len(blocks), bool)
        if len(blocks):
            end = int(blocks[-1]) + 1
            for start, length in self.backing.extents(int(blocks[0]) * BLOCK):
                if start >= end * BLOCK:
                    break
                low, high = np.searchsorted(
                    blocks, [start // BLOCK, -(-(start + length) // BLOCK)]
                ).tolist()
                result[low:high] = False
        return result

    def _resolve(
        self, out: bytearray | memoryview, at: np.ndarray, blocks: np.ndarray, seq: int
    ) -> None:
        snapshot = self._snapshot_for(seq)
        seqs, locs = self.newest_le(blocks, seq)
        self._refuse_lost(seqs, seq)
        hit = locs > 0
        if hit.any():
            self._redo_content(out, at[hit], blocks[hit], locs[hit])
            at, blocks = at[~hit], blocks[~hit]
        while len(blocks):
            if self.snapshot.images_lost is not None:
                raise self.snapshot.images_lost
            _, locs = self.smallest_gt(blocks, seq)
            hit = locs > 0
            if hit.any():
                self._images(out, at[hit], blocks[hit], locs[hit])
                at, blocks = at[~hit], blocks[~hit]
            if not len(blocks):
                return
            self.read_backing(out, _pieces(at, blocks))
            if not self._stale(snapshot):
                return
            snapshot = self.refresh()

    def _refuse_lost(self, seqs: np.ndarray, seq: int) -> None:
        """
        :raises Corruption: a record that is lost may be a newer version than one of those found.
        """
        for first, last in self.snapshot.lost:
            if first <= seq and (seqs < min(last, seq)).any():
                raise Corruption("records are damaged or gone", file="redo", first_seq=first,
                                 last_seq=last)  # fmt: skip

    def read_backing(self, out: bytearray | memoryview, pieces: Iterable[Piece]) -> None:
        """What the backing holds there. It means nothing before the undo log was looked at once
        more (R1).
        """
        view = memoryview(out)
        read = self.backing.read_into
        for offset, start, end in pieces:
            part = view[start:end]
            got = read(offset, part)
            if got < end - start:  # the end of a short last block
                part[got:] = bytes(end - start - got)

    def _images(
        self, out: bytearray | memoryview, at: np.ndarray, blocks: np.ndarray, locs: np.ndarray
    ) -> None:
        content = kinds_of(locs) == Kind.IMAGE
        self.read_payloads(out, at[content], blocks[content], locs[content], self.undo)
        fill_zero(out, at[~content])

    def _redo_content(
        self, out: bytearray | memoryview, at: np.ndarray, blocks: np.ndarray, locs: np.ndarray
    ) -> None:
        kind = kinds_of(locs)
        write, ref = kind == Kind.WRITE, kind == Kind.REF
        self.read_payloads(out, at[write], blocks[write], locs[write], self.redo)
        fill_zero(out, at[~write & ~ref])
        if ref.any():
            self._refs(out, at[ref], blocks[ref], locs[ref])

    def _refs(
        self, out: bytearray | memoryview, at: np.ndarray, blocks: np.ndarray, locs: np.ndarray
    ) -> None:
        snapshot = self.snapshot
        sources = np.zeros(len(blocks), np.uint64)
        oldest_ref = 1 << 63
        for loc in np.unique(locs):
            table, row, _ = self._where(int(loc), self.redo)
            sources[locs == loc] = table.rows[row]["arg"]
            oldest_ref = min(oldest_ref, table.first_seq + row)
        for source in np.unique(sources):
            same = sources == source
            self._resolve(out, at[same], blocks[same], int(source))
        # The source is openable by the ref in the redo log. If that was reclaimed meanwhile, what
        # was just read may be from after the source's facts were dropped.
        if self._stale(snapshot) and self.refresh().floor > oldest_ref:
            raise Vanished("a ref was reclaimed while it was followed")

    def places(self, blocks: np.ndarray, seq: int) -> tuple[Snapshot, np.ndarray, np.ndarray]:
        """Where what ``blocks`` (sorted u64) held at the openable point ``seq`` lies: locs, and
        whether they are of the redo log (bool). No loc: in the backing, if no image was published
        since the snapshot.
        """
        snapshot = self._snapshot_for(seq)
        seqs, locs = self.newest_le(blocks, seq)
        self._refuse_lost(seqs, seq)
        redo = locs > 0
        if not redo.all():
            if snapshot.images_lost is not None:
                raise snapshot.images_lost
            locs[~redo] = self.smallest_gt(blocks[~redo], seq)[1]
        return snapshot, locs, redo

    def locate(self, loc: int, *, redo: bool) -> tuple[Table, int, SegmentInfo]:
        """Table, row and segment of what an index names, which must be what is there."""
        return self._where(loc, self.redo if redo else self.undo)

    def _where(self, loc: int, log: Log) -> tuple[Table, int, SegmentInfo]:
        kind, segment, row = unpack_loc(loc)
        redo = log is self.redo
        infos = self.snapshot.redo_infos if redo else self.snapshot.undo_infos
        info = infos.get(segment)
        if info is None:
            # One that the catalog lists, or that lies above the oldest, did not go: it was lost.
            if (
                min(infos, default=segment) < segment
                if redo
                else segment in self.snapshot.told.undo
            ):
                name = segment_name(Logs.REDO if redo else Logs.UNDO, segment)
                raise Corruption("a segment is gone or unreadable", file=name)
            raise Vanished("a segment of the snapshot is gone")
        table = log.table(info)
        if row >= len(table.rows) or table.rows["kind"][row] != kind:
            raise Corruption("index names a record that the segment lacks", file=info.name)
        return table, row, info

    def read_payloads(
        self,
        out: bytearray | memoryview,
        at: np.ndarray,
        blocks: np.ndarray,
        locs: np.ndarray,
        log: Log,
    ) -> None:
        """Copy the verified content of WRITE or IMAGE records, stretch by stretch."""
        view = memoryview(out)
        bounds = stretches(blocks, locs, at - np.arange(len(at)))
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            table, row, info = self._where(int(locs[low]), log)
            skip = int(blocks[low]) - int(table.rows[row]["block"])
            data = read_blocks(log.file(info), table, row, skip, high - low, name=info.name)
            start = int(at[low]) * BLOCK
            view[start : start + len(data)] = data


def _scattered(blocks: np.ndarray) -> bool:
    """Whether these (sorted u64) are so few and far apart that one look-up each is the faster
    way.
    """
    count = len(blocks)
    return 0 < count <= FEW_BLOCKS and int(blocks[-1]) - int(blocks[0]) >= 4 * (count - 1)


def _pieces(at: np.ndarray, blocks: np.ndarray) -> Iterator[Piece]:
    """Where in the backing, and where at their places ``at``, blocks are that follow each other."""
    bounds = stretches(blocks, at - np.arange(len(at)))
    starts = at[bounds[:-1]] * BLOCK
    return zip(
        (blocks[bounds[:-1]] * np.uint64(BLOCK)).tolist(), starts.tolist(),
        (starts + np.diff(bounds) * BLOCK).tolist(), strict=True,
    )  # fmt: skip


def _columns(found: list[tuple[int, int]]) -> Pair:
    columns = np.array(found, np.uint64)
    return columns[:, 0], columns[:, 1]


def fill_zero(out: bytearray | memoryview, at: np.ndarray) -> None:
    """Zeroes at places ``at`` (ascending), in blocks."""
    view = memoryview(out)
    bounds = stretches(at.astype(np.uint64))
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        start = int(at[low]) * BLOCK
        view[start : start + (high - low) * BLOCK] = bytes((high - low) * BLOCK)
