"""Brings a curator up: catalog, undo log, index, in the order that PROTOCOLS of the journal demand.

Nothing is touched before the recorder has shown its epoch: it recovers the redo log and says how
far `applied` is known; until then the frontier of this boot means nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cdp.child import Child, is_free
from cdp.curator.controls import Controls
from cdp.curator.engine import Engine, Policy
from cdp.curator.points import Points
from cdp.curator.space import Space
from cdp.disk_identity import identity_of
from journal.catalog import Catalog
from journal.catalog_state import Bookmark, Pin, Thinned, drop
from journal.errors import Conflict
from journal.follower import RedoFollower
from journal.format import HEADER_PAGE, Log
from journal.frontier import Frontier
from journal.limits import CATALOG_ALIGN, CATALOG_FILE_BYTES_MIN, CATALOG_FILE_BYTES_TIGHT
from journal.run_format import INDEX
from journal.runset import RunSet
from journal.segment import DIRECTORY, SUFFIX, segment_name
from journal.storage import RealStorage
from journal.undo import UndoWriter
from journal.undo_follower import UndoFollower
from journal.undo_recovery import recover_undo
from replay import fingerprint
from replay.history import UndoLog
from replay.work import Flight, at_once

log = logging.getLogger(__name__)

CATALOG_PART: Final = 64  # of the journal's limit at most is a new copy of the catalog


class ForeignWrite(Conflict):
    """The backing is not as the last clean stop left it: somebody else wrote to it."""


def open_catalog(child: Child) -> Catalog:
    """The catalog, for writing; what is damaged in it is logged."""
    catalog = Catalog.open(
        child.storage(), child.disk, file_bytes_min=_catalog_bytes(child.config.journal_limit)
    )
    for damage in catalog.damage:
        log.error("%s", damage)
    if not catalog.sizes():
        catalog.commit((("sizes", "0"), child.config.size))
    return catalog


def _catalog_bytes(journal_limit: int) -> int:
    """How large a copy of it is at least: little against the journal."""
    part = journal_limit // CATALOG_PART // CATALOG_ALIGN * CATALOG_ALIGN
    return min(CATALOG_FILE_BYTES_MIN, max(CATALOG_FILE_BYTES_TIGHT, part))


def check_backing(child: Child, catalog: Catalog) -> None:
    """Compare the backing with the fingerprint of the last clean stop, if there was one.

    :raises ForeignWrite: it differs: nothing may be applied or served until somebody decides.
    """
    if catalog.fingerprint is None:
        return
    what = fingerprint.differs(
        catalog.fingerprint, child.backing(), identity=identity_of(child.backing_fd)
    )
    if what is not None:
        raise ForeignWrite(
            f"{child.config.backing} was changed while cdpd did not run ({what}): run 'cdp disk "
            f"resume {child.config.name}' and say whether history must be given up"
        )


def open_engine(
    child: Child, frontier: Frontier, catalog: Catalog | None = None,
    *, launch: Callable[[Callable[[], None]], Flight] = at_once,
) -> tuple[Engine, Points]:  # fmt: skip
    """Everything but the loop; blocks while the undo log is recovered and tables are read.

    ``launch``: begins a sync of the backing.
    """
    config, storage = child.config, child.storage()
    catalog = catalog or open_catalog(child)
    redo, points_redo, controls_redo = (
        RedoFollower(storage, child.disk, frontier) for _ in range(3)
    )
    _distrust(catalog, redo, frontier)
    undo = _undo(child, storage, catalog, frontier)
    if catalog.clean or catalog.fingerprint is not None:
        catalog.commit(("clean", False), ("fingerprint", None))
    controls = Controls(catalog, controls_redo)

    def appeared() -> None:
        frontier.curator_generation += 1

    index = Path(config.journal) / INDEX
    runs = [
        RunSet(storage, index, log=each, disk=child.disk, read_only=False, appeared=appeared)
        for each in (Log.REDO, Log.UNDO)
    ]
    window = config.window_seconds
    engine = Engine(
        storage=storage, frontier=frontier, catalog=catalog, redo=redo, undo=undo,
        undo_log=UndoLog(UndoFollower.of(storage, child.disk, frontier, catalog.undo)),
        redo_runs=runs[0], undo_runs=runs[1], backing=child.backing(), controls=controls,
        policy=Policy(
            None if window is None else int(window * 1e9), config.journal_limit, config.overflow,
            config.segment_bytes, config.tail_bytes,
        ),
        other_bytes=lambda: other_bytes(Path(config.journal)),
        identity=lambda: identity_of(child.backing_fd),
        launch=launch, viewer_gone=lambda: is_free(child.directory, "viewer"),
        space=Space(storage, child.available_bytes, segment_bytes=config.segment_bytes),
    )  # fmt: skip
    points = Points(
        engine, points_redo, controls, clock=[(0, 0)], start_stamp=_start_stamp(points_redo)
    )
    return engine, points


def _start_stamp(redo: RedoFollower) -> int:
    infos = redo.segments()
    return infos[0].header.stamp if infos else 0


def _distrust(catalog: Catalog, redo: RedoFollower, frontier: Frontier) -> None:
    """A catalog that has lost something cannot say which points are still exact, nor which undo
    segments there are: only now is openable.
    """
    infos = redo.segments()
    begun = frontier.applied > 0 or (bool(infos) and infos[0].first_seq > 1)
    if not catalog.damage and (catalog.found or not begun):
        return
    log.error("the catalog is damaged or gone: all points before seq %d are given up",
              frontier.durable)  # fmt: skip
    kept: list[Bookmark | Thinned | Pin] = [
        *catalog.bookmarks().values(), *catalog.thinned(), *catalog.pins().values(),
    ]  # fmt: skip
    catalog.commit(
        *map(drop, kept),
        ("window_start", frontier.durable),
        ("reclaimed", infos[0].header.cut if infos else frontier.durable),
    )


def _undo(child: Child, storage: RealStorage, catalog: Catalog, frontier: Frontier) -> UndoWriter:
    """The undo log, recovered; what is listed is durable before anything is published."""
    recovered = recover_undo(
        storage, child.disk, catalog.undo(), identity=lambda: os.urandom(16),
        highest=catalog.undo_highest, published_hint=frontier.undo_published,
    )  # fmt: skip
    for damage in recovered.damage:
        log.error("%s", damage)
    catalog.commit(
        ("undo_highest", max(catalog.undo_highest, recovered.next_segment - 1)),
        *((("undo", str(segment)), end) for segment, end in recovered.ends.items()),
        *(
            (("damaged", damage.file), {"what": damage.what, "file": damage.file,
             "offset": damage.offset, "first_seq": 0, "last_seq": 0})
            for damage in recovered.damage
        ),
    )  # fmt: skip
    frontier.undo_published = max(frontier.undo_published, recovered.published)
    frontier.curator_generation += 1
    if catalog.found and not catalog.damage:
        for segment in recovered.void:  # without a trusted list they might be all there is
            storage.unlink(segment_name(Log.UNDO, segment))
    return UndoWriter(
        storage, child.disk, next_segment=recovered.next_segment,
        next_number=recovered.next_number, predecessor=recovered.predecessor,
        segment_bytes=child.config.segment_bytes, identity=lambda: os.urandom(16),
        listed=lambda segment: _list(catalog, frontier, segment),
        published=recovered.published,
    )  # fmt: skip


def _list(catalog: Catalog, frontier: Frontier, segment: int) -> None:
    catalog.commit((("undo", str(segment)), HEADER_PAGE), ("undo_highest", segment))
    frontier.curator_generation += 1


def other_bytes(journal: Path) -> int:
    """Bytes of the index, the catalog, the reserve, and of files that are to become segments."""
    total = 0
    for directory in (journal, journal / INDEX, journal / DIRECTORY[Log.REDO]):
        try:
            entries = list(os.scandir(directory))
        except FileNotFoundError:
            continue
        for entry in entries:
            try:
                if entry.is_file() and not entry.name.endswith(SUFFIX):
                    total += entry.stat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total
