"""The curator's process: ``python -m cdp.curator --disk-dir DIR --fd N --clock-offset NS``."""

from __future__ import annotations

import gc
import logging
import os
import sys

import trio

from cdp.child import Child, start
from cdp.curator.service import Service
from cdp.rpc import RpcServer

log = logging.getLogger(__name__)
NICE = 10  # the recorder's latency comes first


async def run(child: Child) -> None:
    """Until `stop`, or until something fails: the next curator recovers."""
    service = Service(child)
    async with trio.open_nursery() as nursery:
        await nursery.start(RpcServer().serve, child.socket, service.handlers())
        await service.run()
        await service.stopped.wait()
        await trio.sleep(0.05)  # lets the answer to `stop` leave
        nursery.cancel_scope.cancel()


def main() -> None:
    """Entry point."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s curator %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    child = start("curator", waiting=lambda: log.info("waiting for the previous curator to end"))
    os.nice(NICE)
    gc.freeze()
    trio.run(run, child)


if __name__ == "__main__":
    main()
