"""Bringing a recorder up: recovery of the redo log, the overlay, and the frontier, in that order.

Everything here blocks, and runs in a thread while the process already answers `hello`. What other
processes may see of it is in the order that the protocol of `applied` demands: the overlay holds
everything above `applied`; then `applied`, then `durable`, then the epoch, which says that both
count.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from cdp.recorder.batch import BLOCK_WORK
from cdp.recorder.engine import Recorder, now_ns
from cdp.recorder.overlay import Overlay, load_table
from cdp.recorder.preparing import count_for
from cdp.recorder.reads import Readers
from cdp.recorder.rollback import Open, Rollbacks
from cdp.recorder.sync import Syncer
from cdp.recorder.tail import Tail
from journal.bitmaps import Rollback
from journal.bitmaps import Rollbacks as RollbackTables
from journal.errors import Corruption
from journal.format import Kind
from journal.hints import gather
from journal.recovery import Lost, Recovered, recover
from journal.redo import RedoWriter
from journal.run_format import INDEX
from journal.spares import Spares
from journal.storage import Storage

if TYPE_CHECKING:
    from collections.abc import Callable

    from cdp.config import DiskConfig
    from journal.frontier import Frontier

log = logging.getLogger(__name__)

IDENTITY_BYTES: Final = 16
# With less room than so many segments in the journal clients are slowed down.
ROOM_SEGMENTS: Final = 2
# Nothing of what is not durable can be given up: it must be little against the journal's limit.
UNSYNCED_PART: Final = 8
UNSYNCED_MIN: Final = 1 << 20


@dataclasses.dataclass(slots=True)
class Started:
    """A recorder that may begin to serve, and what its recovery has to say.

    ``rebooted``: the end before was not clean, and of another boot.
    """

    recorder: Recorder
    rollbacks: Rollbacks
    lost: Lost | None
    corruptions: list[Corruption]
    clean: bool
    rebooted: bool
    size: int | None


def identity() -> bytes:
    """A segment's random identity."""
    return secrets.token_bytes(IDENTITY_BYTES)


def start_recorder(
    config: DiskConfig,
    storage: Storage,
    frontier: Frontier,
    backing: int,
    clock_offset_ns: int,
    notify: Callable[[], None],
) -> Started:
    """Recover the redo log and show where it stands.

    :raises JournalError: it cannot be recovered, or not now (no space).
    """
    began = time.monotonic()
    hints = gather(storage, Path(config.journal) / INDEX, config.id_bytes)
    if frontier.fresh:
        hints = hints.and_frontier(frontier.durable, frontier.applied)
    recovered = recover(
        storage, config.id_bytes,
        durable_hint=hints.durable, applied_hint=hints.applied, segment_hint=hints.segment,
        reclaimed_hint=hints.reclaimed,
        stamp=now_ns(time.CLOCK_BOOTTIME) + clock_offset_ns, identity=identity,
        copy_limit=config.unsynced_bytes,
    )  # fmt: skip
    syncer = Syncer(notify)

    def new_segment(_number: int) -> None:
        frontier.redo_generation += 1

    writer = RedoWriter(
        storage, config.id_bytes, recovered.start, segment_bytes=config.segment_bytes,
        identity=identity, on_segment=new_segment, on_durable=syncer.on_durable,
        spares=Spares(
            storage, config.segment_bytes, count_for(config.journal_limit, config.segment_bytes)
        ),
    )  # fmt: skip
    overlay = Overlay(recovered.masks, writer.file)
    tail = Tail(config.tail_bytes, span=ROOM_SEGMENTS * config.segment_bytes)
    size = recovered.size or config.size
    recorder = Recorder(
        size=size, writer=writer, frontier=frontier, overlay=overlay, backing=backing,
        clock_offset_ns=clock_offset_ns, tail=tail, syncer=syncer, readers=Readers(notify),
        unsynced_max=min(
            config.unsynced_bytes, max(UNSYNCED_MIN, config.journal_limit // UNSYNCED_PART)
        ),
    )  # fmt: skip
    recorder.last_stamp = recovered.highest_stamp
    rollbacks = Rollbacks(recorder)
    tail.start(recovered.applied, recovered.applied)
    _load_tail(recovered, overlay, tail, rollbacks)
    tail.start(recovered.applied, writer.last_seq)
    _show(recorder, recovered)
    syncer.start(writer)
    _report(config, recovered, began)
    return Started(
        recorder, rollbacks, recovered.lost, recovered.corruptions, recovered.clean,
        not recovered.clean and not frontier.fresh, recovered.size,
    )  # fmt: skip


def _load_tail(recovered: Recovered, overlay: Overlay, tail: Tail, rollbacks: Rollbacks) -> None:
    """Everything above `applied` into the overlay; refs keep the disk from being served."""
    open_rollback = recovered.open_rollback
    known = [Rollback(open_rollback.begin_seq, (1 << 64) - 1, False)] if open_rollback else []
    tables = RollbackTables(known)
    for _, table in recovered.tail:
        tables.advance(table)
    pending: list[tuple[int, int]] = []
    last_ref = 0
    for _, table in recovered.tail:
        rows = table.rows
        valid = tables.valid(table)
        gaps = np.flatnonzero((rows["kind"] == Kind.GAP_BEGIN) | (rows["kind"] == Kind.GAP_END))
        if len(gaps):
            # Before a gap everything was applied, and in it the backing was written by others.
            overlay.forget_all()
            valid[: int(gaps[-1]) + 1] = False
        load_table(overlay, table, valid)
        changing = valid & (rows["kind"] != Kind.TRIM)
        tail.add(table.last_seq, int(rows["nblocks"][changing].sum()) * BLOCK_WORK)
        refs = np.flatnonzero(valid & (rows["kind"] == Kind.REF))
        if len(refs):
            last_ref = table.first_seq + int(refs[-1])
        undecided = tables.undecided(table)
        pending += zip(
            rows["block"][undecided].tolist(), rows["nblocks"][undecided].tolist(), strict=True
        )
    if last_ref:
        rollbacks.unapplied = next(
            (each.end for each in tables.list if each.committed and each.end > last_ref), last_ref
        )
    if open_rollback is not None:
        identity = str(open_rollback.body.get("id", ""))
        rollbacks.open = Open(identity, open_rollback.begin_seq, recovered.durable, pending)


def _show(recorder: Recorder, recovered: Recovered) -> None:
    """Tell the other processes: what they see is true from here on."""
    frontier = recorder.frontier
    frontier.applied = max(frontier.applied, recovered.applied)
    frontier.window_start = max(frontier.window_start, recovered.window_start)
    recorder.window_start = frontier.window_start
    stamp = recovered.highest_stamp
    frontier.durable_stamp = max(frontier.durable_stamp, stamp)
    # First the segments, then the seqs in them: whoever sees `durable` looks for those.
    frontier.redo_generation += 1
    frontier.durable = max(frontier.durable, recovered.durable)
    frontier.epoch += 1


def _report(config: DiskConfig, recovered: Recovered, began: float) -> None:
    for damage in recovered.corruptions:
        log.error("%s", damage)
    if recovered.lost is not None:
        log.error(
            "%s: writes %d..%d were acknowledged, not flushed, and did not survive",
            config.name, recovered.lost.first_seq, recovered.lost.last_seq,
        )  # fmt: skip
    log.info(
        "%s: recovered up to seq %d in %.2f s (%s, %d records not applied, %d bytes copied)",
        config.name, recovered.durable, time.monotonic() - began,
        "clean stop" if recovered.clean else "unclean end",
        recovered.durable - recovered.applied, recovered.copied_bytes,
    )  # fmt: skip
