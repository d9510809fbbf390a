"""The viewer's process: ``python -m cdp.viewer --disk-dir DIR --fd N --clock-offset NS``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import trio

from cdp.child import Child, start, wait_for_recorder
from cdp.rpc import RpcServer
from cdp.viewer.service import Service
from journal.catalog import Catalog
from journal.follower import RedoFollower
from journal.format import Log
from journal.frontier import Frontier
from journal.run_format import INDEX
from journal.runset import RunSet
from journal.undo_follower import UndoFollower
from replay.history import History, Told, UndoLog


def open_history(child: Child, frontier: Frontier) -> History:
    """The disk's logs, index and backing, for reading."""
    storage = child.storage()
    index = Path(child.config.journal) / INDEX
    redo_runs, undo_runs = (
        RunSet(storage, index, log=each, disk=child.disk, read_only=True)
        for each in (Log.REDO, Log.UNDO)
    )
    catalog = Catalog.open(storage, child.disk, read_only=True)

    def told() -> Told:
        catalog.refresh()
        return Told.by(catalog)

    return History(
        told=told,
        frontier=frontier,
        redo=RedoFollower(storage, child.disk, frontier),
        undo=UndoLog(UndoFollower.of(storage, child.disk, frontier, catalog.undo)),
        redo_runs=redo_runs, undo_runs=undo_runs, backing=child.backing(),
    )  # fmt: skip


async def run(child: Child) -> None:
    """Until `stop`."""
    frontier = await wait_for_recorder(child, read_only=True)
    history = await trio.to_thread.run_sync(open_history, child, frontier)
    async with trio.open_nursery() as nursery:
        service = Service(child, history, nursery)
        await nursery.start(RpcServer().serve, child.socket, service.handlers())
        nursery.start_soon(service.keep_prepared)
        await service.stopping.wait()
        await trio.sleep(0.05)  # lets the answer to `stop` leave
        nursery.cancel_scope.cancel()


def main() -> None:
    """Entry point."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s viewer %(levelname)s %(message)s", stream=sys.stderr
    )
    trio.run(run, start("viewer"))


if __name__ == "__main__":
    main()
