"""The core of a recorder: append, acknowledge, know what is durable and what is applied.

Everything here is synchronous. There is no await between the look at a request and the append of
its record, so the order of appends is the order in which changes become visible, over all
connections.

`execute_plain` is the path that decides the speed of everything: aligned writes of one block, and
nothing else, straight out of the receive buffer. After each system call the processor runs Python
code cold, so what counts there is the number of byte codes; that is why it takes requests, looks at
them, and does the accounts in one function. Everything else goes through `changes` and `live`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import or_
from struct import Struct
from typing import TYPE_CHECKING, Final, TypeAlias

from cdp.nbd.transmission import error_reply, ok_replies, ok_reply
from cdp.nbd.wire import NBD_CMD_WRITE, NBD_REQUEST_MAGIC, REQUEST, NbdError
from cdp.recorder.batch import BLOCK_WORK, Batch
from cdp.recorder.changes import Changes
from cdp.recorder.live import LiveReads
from cdp.recorder.nospace import NoSpace
from cdp.recorder.statistics import BUCKET_SHIFT, Statistics
from journal.errors import JournalFull, Poisoned
from journal.format import BLOCK, Kind, checksum

if TYPE_CHECKING:
    import trio

    from cdp.nbd.transmission import Request
    from cdp.recorder.connection import Connection
    from cdp.recorder.overlay import Overlay
    from cdp.recorder.reads import Damaged, Readers
    from cdp.recorder.sync import Syncer
    from cdp.recorder.tail import Tail
    from journal.frontier import Frontier
    from journal.redo import RedoWriter

log = logging.getLogger(__name__)

# Bytes appended between two hints to the kernel to begin writing.
HINT_BYTES: Final = 8 << 20
_MASK: Final = BLOCK - 1
_EIO: Final = int(NbdError.EIO)
# A request's header with magic, flags and type as one number.
_HEAD: Final = Struct(">Q8sQI")
_HEADER: Final = REQUEST.size
assert _HEAD.size == _HEADER
_PLAIN: Final = NBD_REQUEST_MAGIC << 32 | NBD_CMD_WRITE
_STRIDE: Final = _HEADER + BLOCK
_FEW: Final = 8
# So many headers are unpacked in one call.
_MANY: Final = 8
_MANY_MAX: Final = 256
_HEADS: Final = [Struct(">" + f"Q8sQI{BLOCK}x" * count) for count in range(_MANY_MAX + 1)]
_PLAINS: Final = [(_PLAIN,) * count for count in range(_MANY_MAX + 1)]
_BLOCKS: Final = [(BLOCK,) * count for count in range(_MANY_MAX + 1)]
_ENTRY: Final = [0, 0, 1, int(Kind.WRITE), 0, 0]
_TEMPLATES: Final = [_ENTRY * count for count in range(257)]
_BOOTTIME: Final = time.CLOCK_BOOTTIME
now_ns = time.clock_gettime_ns

# Plain writes of one block, found in the buffer: blocks, cookies, payloads, checksums, their end.
Found: TypeAlias = tuple[list[int], Sequence[bytes], list[memoryview], list[int], int]


def _few(view: memoryview, at: int, end: int, last: int) -> Found:
    """The plain writes at the front of `view[at:end]`, one by one."""
    stop = end - _STRIDE
    unpack = _HEAD.unpack_from
    blocks, cookies, payloads, sums = [], [], [], []
    while at <= stop:
        head, cookie, offset, length = unpack(view, at)
        if head != _PLAIN or length != BLOCK or offset & _MASK or offset > last:
            break
        payload = view[at + _HEADER : at + _STRIDE]
        blocks.append(offset >> 12)
        cookies.append(cookie)
        payloads.append(payload)
        sums.append(checksum(payload))
        at += _STRIDE
    return blocks, cookies, payloads, sums, at


def _many(view: memoryview, at: int, end: int, last: int) -> Found | None:
    """The same, if it is nothing else and many: half the time for each, in few byte codes."""
    count = (end - at) // _STRIDE
    if not _MANY <= count <= _MANY_MAX:
        return None
    fields = _HEADS[count].unpack_from(view, at)
    offsets = fields[2::4]
    if (
        fields[::4] != _PLAINS[count]
        or fields[3::4] != _BLOCKS[count]
        or reduce(or_, offsets) & _MASK
        or max(offsets) > last
    ):
        return None
    end = at + count * _STRIDE
    payloads = [view[place : place + BLOCK] for place in range(at + _HEADER, end, _STRIDE)]
    blocks = [offset >> 12 for offset in offsets]
    return blocks, fields[1::4], payloads, list(map(checksum, payloads)), end


class Recorder:
    """One disk's write path and live reads.

    ``clock_offset_ns`` turns CLOCK_BOOTTIME into stamps; all other times are CLOCK_BOOTTIME.
    """

    def __init__(
        self,
        *,
        size: int,
        writer: RedoWriter,
        frontier: Frontier,
        overlay: Overlay,
        backing: int,
        clock_offset_ns: int,
        tail: Tail,
        syncer: Syncer,
        readers: Readers,
        unsynced_max: int,
    ) -> None:
        self.size = size
        self.writer = writer
        self.frontier = frontier
        self.overlay = overlay
        self.backing = backing
        self.tail = tail
        self.syncer = syncer
        self.readers = readers
        self.statistics = Statistics()
        self.changes = Changes(self)
        self.reads = LiveReads(self)
        self.no_space = NoSpace(self, lambda: now_ns(_BOOTTIME))
        self.barrier = 0
        self.last_stamp = 0
        self.ceiling = 1 << 64
        self.window_start = frontier.window_start
        self.watermark = writer.durable
        self.poisoned: Poisoned | None = None
        self.on_poison: Callable[[Poisoned], None] = _nothing
        self.active_at = 0
        # Flushes and FUA: (seq that must be durable, whom to answer, cookies).
        self.waits: deque[tuple[int, Connection, list[bytes]]] = deque()
        self.events: list[tuple[int, trio.Event]] = []
        self.unsynced_max = unsynced_max
        self.unsynced = 0
        self._offset = clock_offset_ns
        self._stamps: deque[tuple[int, int]] = deque()  # (last seq, stamp) of unsynced batches
        self._hint_step = min(HINT_BYTES, unsynced_max // 8)
        self._hint_at = self._hint_step
        self._damaged: set[str] = set()
        # What earlier recorders of this boot have counted, and what was said about it last.
        self._counted_before = frontier.redo_bytes
        self._room_for = (0, 0)
        tail.noted = self.count_bytes

    # ------------------------------------------------------------------------------------- stamps
    def stamp(self) -> int:
        """A stamp above all earlier ones, as long as the ceiling allows."""
        stamp = now_ns(_BOOTTIME) + self._offset
        if stamp <= self.last_stamp:
            stamp = self.last_stamp + 1
        if stamp > self.ceiling:
            # Nobody has renewed it for long. The next boot's stamps begin above it, so none of ours
            # may pass it: order is seq, stamps merely stand still.
            stamp = max(self.last_stamp, self.ceiling)
        self.last_stamp = stamp
        return stamp

    @property
    def stamps_stand_still(self) -> bool:
        """Whether the ceiling has been reached: instants can no longer be told apart."""
        return self.last_stamp >= self.ceiling

    def age_ns(self, stamp: int) -> int:
        """How long ago a stamp was."""
        return max(0, now_ns(_BOOTTIME) + self._offset - stamp)

    # ------------------------------------------------------------------------------- the hot path
    def execute_plain(self, connection: Connection) -> int:
        """Execute the aligned writes of one block at the front of the buffer; how many.

        0: there are none, or no room for them. Whether the client has hung up was asked before.
        """
        start, end = connection.start, connection.end
        found = _many(connection.view, start, end, connection.plain_end)
        if found is None:
            found = _few(connection.view, start, end, connection.plain_end)
        blocks, cookies, payloads, sums, at = found
        count = len(blocks)
        if count < _FEW and at <= end - _STRIDE:
            return 0  # others follow: one append for all of them is better
        size = at - start - _HEADER * count
        tail = self.tail
        work = 2 * size
        if not count or tail.total + work > tail.limit or self.unsynced + size > self.unsynced_max:
            return 0
        entries = _TEMPLATES[count].copy() if count <= 256 else _ENTRY * count
        entries[::6] = blocks
        began = now_ns(_BOOTTIME)
        stamp = began + self._offset
        if not self.last_stamp < stamp < self.ceiling:
            stamp = self.stamp()
        self.last_stamp = stamp
        writer = self.writer
        try:
            _, last_seq, segment, place = writer.append(
                entries, sums, payloads, size, stamp=stamp, barrier=self.barrier,
                applied=tail.applied, window_start=self.window_start,
            )  # fmt: skip
        except JournalFull as error:
            self.no_space.refused(error)
            return 0  # they stay where they are
        except Poisoned as error:
            connection.executed(at)
            self.poison(error)
            self.fail(connection, cookies, _EIO, str(error))
            return count
        # Its client goes on while the accounts are done; nothing else is executed before.
        connection.send(ok_replies(cookies) if count > 1 else ok_reply(cookies[0]))
        self.active_at = now = now_ns(_BOOTTIME)
        self.overlay.generation(segment).add_run(blocks, place, sums, last_seq)
        tail.last_seq = last_seq
        tail.total = total = tail.total + work
        if total >= tail.note_at:
            tail.note()
        if total > tail.gentle:
            connection.resume_at = tail.delay(work, began)
        self._stamps.append((last_seq, stamp))
        self.unsynced = unsynced = writer.unsynced_bytes
        if unsynced > self._hint_at:
            self._hint(unsynced, last_seq)
        connection.start = at
        statistics = self.statistics
        statistics.plain_writes += count
        latency = statistics.write_latency
        latency.counts[(now - began >> BUCKET_SHIFT).bit_length()] += count
        latency.sum_ns += (now - began) * count
        return count

    def _hint(self, unsynced: int, last_seq: int) -> None:
        """Much has been appended: the kernel should begin to write, or a sync begin."""
        self._hint_at = unsynced + self._hint_step
        self.syncer.hint()
        if unsynced * 4 > self.unsynced_max:
            self.syncer.want(last_seq)

    # --------------------------------------------------------------------------- all other appends
    def execute(self, connection: Connection, requests: list[Request]) -> int:
        """Execute requests of any kind, in order; how many were taken (the tail may be full)."""
        return self.changes.execute(connection, requests)

    def commit(self, batch: Batch, connection: Connection) -> None:
        """Append what a batch holds and answer for it; it is empty afterwards.

        If there is no space for it, it waits (`no_space.holds`), and nothing else is admitted.
        """
        try:
            self.append_batch(batch, connection)
        except JournalFull as error:
            self.no_space.keep(connection, batch, error)
        except Poisoned as error:
            cookies = batch.cookies + batch.fua
            batch.clear()
            self.poison(error)
            self.fail(connection, cookies, _EIO, str(error))

    def append_batch(self, batch: Batch, connection: Connection) -> None:
        """The same, once.

        :raises JournalFull: there is no space; nothing has happened.
        :raises Poisoned: nothing is appended any more; nobody was answered.
        """
        if batch.entries:
            began = now_ns(_BOOTTIME)
            stamp = self.stamp()
            appended = self.writer.append(
                batch.entries, batch.sums, batch.payloads, batch.payload_bytes, stamp=stamp,
                barrier=self.barrier, applied=self.tail.applied, window_start=self.window_start,
            )  # fmt: skip
            batch.tell(self.overlay.generation(appended.segment), appended)
            self._appended(appended.last_seq, stamp, batch.work)
            if self.tail.total > self.tail.gentle:
                connection.resume_at = self.tail.delay(batch.work, began)
        # Without entries: a trim of no whole block. Nothing to record, nothing that could fail.
        if batch.cookies:
            connection.send(ok_replies(batch.cookies))
        if batch.fua:
            self.wait_durable(connection, batch.fua)
        if batch.entries:
            self.statistics.write_latency.add(now_ns(_BOOTTIME) - began, len(batch.entries) // 6)
        batch.clear()

    def _appended(self, last_seq: int, stamp: int, work: int) -> None:
        """The accounts of one append."""
        self.tail.add(last_seq, work)
        self._stamps.append((last_seq, stamp))
        self.unsynced = self.writer.unsynced_bytes
        if self.unsynced > self._hint_at:
            self._hint(self.unsynced, last_seq)

    def fail(
        self, connection: Connection, cookies: Sequence[bytes], code: int, reason: str
    ) -> None:
        """Answer with an error that is not the client's fault."""
        self.statistics.failed += len(cookies)
        for cookie in cookies:
            connection.send(error_reply(cookie, code, connection.structured, reason))

    def append_control(self, kind: Kind, body: dict[str, object]) -> tuple[int, int]:
        """Append a record that is no version; its seq and stamp.

        :raises JournalFull: there is no space; who asked for it is told so.
        """
        stamp = self.stamp()
        with self._said_to_the_curator():
            seq = self.writer.append_control(
                kind, body, stamp=stamp, barrier=self.barrier, applied=self.tail.applied,
                window_start=self.window_start,
            )  # fmt: skip
        self._appended(seq, stamp, 0)
        return seq, stamp

    def append_refs(self, entries: list[int]) -> int:
        """Append refs of a rollback that is open; they are no versions yet. The last one's seq.

        :raises JournalFull: there is no space; who asked for it is told so.
        """
        stamp = self.stamp()
        with self._said_to_the_curator():
            appended = self.writer.append(
                entries, [], [], 0, stamp=stamp, barrier=self.barrier, applied=self.tail.applied,
                window_start=self.window_start,
            )  # fmt: skip
        self._appended(appended.last_seq, stamp, 0)
        return appended.last_seq

    @contextlib.contextmanager
    def _said_to_the_curator(self) -> Iterator[None]:
        """That there was no space: it may make some before somebody asks again."""
        try:
            yield
        except JournalFull:
            self.frontier.redo_refused += 1
            raise

    def tell_refs(self, refs: list[tuple[int, int]], commit_seq: int) -> None:
        """A rollback was committed: its refs count as versions up to the commit."""
        self.overlay.begin_generation(self.writer.segment)
        for first, count in refs:
            generation = self.overlay.generation(self.writer.segment)
            generation.add_without_content(Kind.REF, first, count)
            generation.last_seq = commit_seq
        self.tail.add(commit_seq, sum(count for _, count in refs) * BLOCK_WORK)

    def append_watermark(self) -> None:
        """An empty batch that says in its header what is durable."""
        durable = self.writer.durable
        self.writer.append(
            [], [], [], 0, stamp=self.stamp(), barrier=self.barrier, applied=self.tail.applied,
            window_start=self.window_start,
        )  # fmt: skip
        self.watermark = durable

    # ------------------------------------------------------------------------------------ durable
    def wait_durable(self, connection: Connection, cookies: list[bytes]) -> None:
        """Answer these when everything appended so far is durable."""
        target = self.writer.last_seq
        if self.writer.durable >= target:
            self.barrier = max(self.barrier, target)
            connection.send(ok_replies(cookies))
            return
        connection.in_flight += len(cookies)
        self.waits.append((target, connection, cookies))
        self.syncer.want(target)

    def wait_event(self, target: int, event: trio.Event) -> None:
        """Have an event set when ``target`` is durable (or the journal poisoned)."""
        if self.writer.durable >= target or self.poisoned is not None:
            event.set()
            return
        self.events.append((target, event))
        self.syncer.want(target)

    def collect_sync(self) -> None:
        """A sync has ended: publish what is durable, answer those who wait for it."""
        self.syncer.finished = False
        statistics = self.statistics
        durations = self.syncer.durations
        while durations:
            statistics.syncs += 1
            statistics.sync_latency.add(durations.popleft())
        if self.writer.poisoned is not None:
            self.poison(self.writer.poisoned)
            return
        self.publish_durable()
        durable = self.writer.durable
        self.unsynced = self.writer.unsynced_bytes
        self._hint_at = self.unsynced + self._hint_step
        waits = self.waits
        while waits and waits[0][0] <= durable:
            target, connection, cookies = waits.popleft()
            self.barrier = max(self.barrier, target)
            connection.in_flight -= len(cookies)
            connection.send(ok_replies(cookies))
        if self.events:
            for target, event in self.events:
                if target <= durable:
                    event.set()
            self.events = [entry for entry in self.events if entry[0] > durable]

    def publish_durable(self) -> None:
        """Show the other processes how far they may look: the stamp first, then the seq."""
        durable = self.writer.durable
        stamps = self._stamps
        stamp = 0
        while stamps and stamps[0][0] <= durable:
            stamp = stamps.popleft()[1]
        frontier = self.frontier
        if stamp:
            frontier.durable_stamp = stamp
        frontier.durable = max(frontier.durable, durable)

    # ------------------------------------------------------------------------------ what is wrong
    def poison(self, error: Poisoned) -> None:
        """The redo log can no longer be trusted to become durable: acknowledge nothing any more."""
        if self.poisoned is not None:
            return
        self.poisoned = error
        self.unsynced_max = -1  # no room for anything
        log.critical("%s", error)
        waits, self.waits = self.waits, deque()
        for _, connection, cookies in waits:
            connection.in_flight -= len(cookies)
            self.fail(connection, cookies, _EIO, str(error))
        for _, event in self.events:
            event.set()
        self.events = []
        self.no_space.fail(str(error), _EIO)
        self.on_poison(error)

    def damage(self, error: Damaged) -> None:
        """A record that is not applied has lost its content: say so, once for each."""
        self.statistics.damaged_reads += 1
        if str(error) not in self._damaged:
            self._damaged.add(str(error))
            log.error("%s", error)

    # ------------------------------------------------------------------------------------ applied
    def advance(self) -> bool:
        """Look how far the curator has come, and drop what it applied: one step. If it moved.

        Or if there is more room in the journal: those who wait may go on then, too.
        """
        frontier, tail = self.frontier, self.tail
        applied = frontier.applied
        room_for = frontier.redo_bytes_max, self.count_bytes()
        if applied == tail.applied:
            return room_for != self._room_for and self._find_room(room_for)
        tail.advance(applied, now_ns(_BOOTTIME))
        self._find_room(room_for)
        if self.overlay.drop(applied):
            needed = [self.writer.segment]
            for oldest in (self.overlay.oldest_segment, self.readers.oldest_segment):
                if oldest is not None:
                    needed.append(oldest)
            self.writer.forget_below(min(needed))
        return True

    def count_bytes(self) -> int:
        """Show how much was appended in this boot: the curator says how far that may go."""
        count = self._counted_before + self.writer.appended_bytes
        self.frontier.redo_bytes = count
        return count

    def _find_room(self, room_for: tuple[int, int]) -> bool:
        """What the journal has room for; whether it has become more."""
        self._room_for = allowed, count = room_for
        if not allowed:
            return False
        tail = self.tail
        before = tail.limit
        tail.set_room(allowed - count, allowed, now_ns(_BOOTTIME))
        if tail.cramped and self.writer.durable < self.writer.last_seq:
            # Only what is durable can be applied, and given up.
            self.syncer.want(self.writer.last_seq)
        return tail.limit > before


def _nothing(_: Poisoned) -> None:
    pass
