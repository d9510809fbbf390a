"""Requests of all kinds, in order: what is not a plain write of one block each.

Changes become records of a `Batch`, which is appended with one write; reads are looked up after it.
A change that must be widened by old content goes on when that is at hand, or is parked (`partial`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from cdp.nbd.transmission import error_reply
from cdp.nbd.validate import validate
from cdp.nbd.wire import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NbdError,
)
from cdp.recorder.batch import BLOCK_WORK, RECORD_BLOCKS_MAX, Batch
from cdp.recorder.partial import (
    Locks,
    Parked,
    ragged_edges,
    touched_blocks,
    whole_blocks,
    widen,
)
from cdp.recorder.reads import NOWAIT, Damaged, Fetch, fetch
from journal.format import BLOCK, Kind

if TYPE_CHECKING:
    from cdp.nbd.transmission import Request
    from cdp.recorder.connection import Connection
    from cdp.recorder.engine import Recorder

# A batch is committed when it holds so much, so that its buffers stay small.
BATCH_BYTES_MAX: Final = 16 << 20
_EIO: Final = int(NbdError.EIO)

Edges: TypeAlias = dict[int, bytes | bytearray | memoryview]


class Changes:
    """Executes requests for one recorder. ``locks``: blocks that wait for their old content."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.locks = Locks()

    def execute(self, connection: Connection, requests: list[Request]) -> int:
        """Execute requests in order, or a prefix there is room for; how many were taken."""
        recorder = self._recorder
        if recorder.poisoned is not None:
            return self._refuse_all(connection, requests)
        batch: Batch | None = None
        reads: list[Request] = []
        flushes: list[bytes] = []
        taken = 0
        view = connection.view
        for request in requests:
            kind, flags, cookie, offset, length, at = request
            error = validate(request, connection.rules)
            if error:
                recorder.statistics.refused += 1
                connection.send(error_reply(cookie, error, connection.structured))
            elif kind == NBD_CMD_READ:
                reads.append(request)
            elif kind == NBD_CMD_FLUSH:
                flushes.append(cookie)
            elif kind == NBD_CMD_DISC:
                connection.closing = True
                taken += 1
                break
            elif kind in (NBD_CMD_BLOCK_STATUS, NBD_CMD_CACHE):
                reads.append(request)
            else:
                batch = batch or Batch()
                if not self._admit(batch, kind, offset, length):
                    break
                payload = view[at : at + length] if kind == NBD_CMD_WRITE else None
                if not self._change(
                    batch, connection, kind, flags, cookie, offset, length, payload, {}
                ):
                    break
            taken += 1
        if batch is not None and (batch.cookies or batch.fua):
            recorder.commit(batch, connection)
        if reads:
            recorder.reads.execute(connection, reads)
        if flushes:
            recorder.statistics.flushes += len(flushes)
            recorder.wait_durable(connection, flushes)
        return taken

    def _refuse_all(self, connection: Connection, requests: list[Request]) -> int:
        """The journal is poisoned: nothing is acknowledged."""
        recorder = self._recorder
        reason = str(recorder.poisoned)
        for number, (kind, _, cookie, *_rest) in enumerate(requests):
            if kind == NBD_CMD_DISC:
                connection.closing = True
                return number + 1
            recorder.fail(connection, [cookie], _EIO, reason)
        return len(requests)

    def _admit(self, batch: Batch, kind: int, offset: int, length: int) -> bool:
        """Whether a change has room; nothing of it is done yet."""
        content = work = 0
        if kind in (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES):
            _, count = touched_blocks(offset, length)
            work = count * BLOCK_WORK
            if kind == NBD_CMD_WRITE:
                content = count * BLOCK
        recorder = self._recorder
        tail = recorder.tail
        if tail.total + batch.work + work > tail.limit and (batch.work or not tail.admits(work)):
            return False
        unsynced = recorder.unsynced + batch.payload_bytes
        if unsynced and unsynced + content > recorder.unsynced_max:
            recorder.syncer.want(recorder.writer.last_seq)
            return False
        return True

    def has_room(self) -> bool:
        """Whether a change that was admitted before may go on."""
        recorder = self._recorder
        return (
            recorder.tail.total < recorder.tail.limit and recorder.unsynced < recorder.unsynced_max
        )

    # ------------------------------------------------------------------------------- one change
    def _change(
        self,
        batch: Batch,
        connection: Connection,
        kind: int,
        flags: int,
        cookie: bytes,
        offset: int,
        length: int,
        payload: bytes | memoryview | None,
        edges: Edges,
    ) -> bool:
        """Add one valid write, zero or trim to the batch, or park it, or answer it: it is damaged.

        ``edges``: old contents of ragged edges that are known already. False: not now, for what
        they hold is in a batch for which there is no space.
        """
        recorder = self._recorder
        if self.locks and self.locks.locked(*touched_blocks(offset, length)):
            self.locks.wait(_parked(connection, kind, flags, cookie, offset, length, payload))
            return True
        if kind in (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES):
            ragged = ragged_edges(offset, length, recorder.size)
            missing = [block for block in ragged if block not in edges]
            if any(batch.must_commit_before(block) for block in missing):
                recorder.commit(batch, connection)
                if recorder.no_space.holds:
                    return False
            if missing and not self._find_edges(batch, connection, missing, edges, cookie):
                return True
            missing = [block for block in missing if block not in edges]
            if missing:
                parked = _parked(connection, kind, flags, cookie, offset, length, payload)
                parked.edges = {block: bytes(content) for block, content in edges.items()}
                # All of them: what was found already must not change meanwhile, either.
                self.locks.lock(parked, ragged)
                self._read_edges(parked, missing)
                return True
            recorder.statistics.partial_writes += bool(edges)
        self._add(batch, kind, offset, length, payload, edges)
        (batch.fua if flags & NBD_CMD_FLAG_FUA else batch.cookies).append(cookie)
        if batch.payload_bytes > BATCH_BYTES_MAX:
            recorder.commit(batch, connection)
        return True

    def _add(
        self,
        batch: Batch,
        kind: int,
        offset: int,
        length: int,
        payload: bytes | memoryview | None,
        edges: Edges,
    ) -> None:
        """Add the record, or records, of one change whose edges are known."""
        statistics = self._recorder.statistics
        first, count = touched_blocks(offset, length)
        if kind == NBD_CMD_WRITE:
            assert payload is not None
            statistics.other_writes += 1
            statistics.other_written_bytes += length
            if edges or length != count * BLOCK:
                batch.add_write(first, count, widen(offset, payload, length, edges))
            else:
                batch.add_write(first, count, payload)
            return
        if kind == NBD_CMD_WRITE_ZEROES:
            statistics.zeroes += 1
            if edges and count <= RECORD_BLOCKS_MAX:
                batch.add_write(first, count, widen(offset, None, length, edges))
                return
            for block, content in sorted(edges.items()):
                low, high = max(offset, block * BLOCK), min(offset + length, (block + 1) * BLOCK)
                batch.add_write(block, 1, widen(low, None, high - low, {block: content}))
        else:
            statistics.trims += 1
        first, count = whole_blocks(offset, length, self._recorder.size)
        if count:
            zero = kind == NBD_CMD_WRITE_ZEROES
            batch.add_without_content(Kind.ZERO if zero else Kind.TRIM, first, count)

    def _find_edges(
        self, batch: Batch, connection: Connection, blocks: list[int], edges: Edges, cookie: bytes
    ) -> bool:
        """Look for old contents without waiting; False when the request was answered: damage."""
        recorder = self._recorder
        for block in blocks:
            content = batch.content_of(block)
            if content is None:
                old = bytearray(BLOCK)
                try:
                    if not self._fetch_block(block, old):
                        continue
                except OSError as error:
                    if isinstance(error, Damaged):
                        recorder.damage(error)
                    recorder.fail(connection, [cookie], _EIO, str(error))
                    return False
                content = old
            edges[block] = content
        return True

    def _fetch_block(self, block: int, into: bytearray) -> bool:
        recorder = self._recorder
        part = memoryview(into)[: min(BLOCK, recorder.size - block * BLOCK)]
        piece = recorder.overlay.find(block)
        return fetch([piece], recorder.backing, block * BLOCK, part, NOWAIT)

    # ----------------------------------------------------------------------------- parked changes
    def _read_edges(self, parked: Parked, missing: list[int]) -> None:
        """Have old contents read by a thread."""
        recorder = self._recorder
        recorder.statistics.partial_waits += 1
        parked.missing = len(missing)

        def done(error: OSError | None) -> None:
            parked.missing -= 1
            parked.error = parked.error or error
            if not parked.missing:
                self.locks.release(parked)

        for block in missing:
            content = bytearray(BLOCK)
            parked.edges[block] = content
            into = memoryview(content)[: min(BLOCK, recorder.size - block * BLOCK)]
            pieces = [recorder.overlay.find(block)]
            recorder.readers.submit(Fetch(pieces, recorder.backing, block * BLOCK, into, done))

    def resume_parked(self, gone: Callable[[Connection], bool]) -> bool:
        """Execute parked changes whose turn has come; `gone` tells of a client that has hung up.

        Whether there were any. Each has a batch of its own.
        """
        recorder, locks = self._recorder, self.locks
        if not locks.ready:
            return False
        if recorder.poisoned is None and not self.has_room():
            recorder.advance()
            recorder.syncer.want(recorder.writer.last_seq)
            return False
        while not recorder.no_space.holds and (parked := locks.take_ready()) is not None:
            connection = parked.connection
            parked.unpark()
            if connection.closed or gone(connection):
                recorder.statistics.discarded_requests += 1
            elif recorder.poisoned is not None:
                recorder.fail(connection, [parked.cookie], _EIO, str(recorder.poisoned))
            elif parked.error is not None:
                if isinstance(parked.error, Damaged):
                    recorder.damage(parked.error)
                recorder.fail(connection, [parked.cookie], _EIO, str(parked.error))
            else:
                batch = Batch()
                self._change(
                    batch, connection, parked.kind, parked.flags, parked.cookie, parked.offset,
                    parked.length, parked.payload, parked.edges,
                )  # fmt: skip
                if batch.cookies or batch.fua:
                    recorder.commit(batch, connection)
        return True


def _parked(
    connection: Connection,
    kind: int,
    flags: int,
    cookie: bytes,
    offset: int,
    length: int,
    payload: bytes | memoryview | None,
) -> Parked:
    """A parked change with a payload of its own."""
    copy = None if payload is None else bytes(payload)
    return Parked(connection, kind, flags, cookie, offset, length, copy)
