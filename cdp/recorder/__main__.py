"""The recorder's process: ``python -m cdp.recorder --disk-dir DIR --fd N --clock-offset NS``."""

from __future__ import annotations

import logging
import sys

import trio

from cdp.child import start
from cdp.recorder.process import Process

log = logging.getLogger(__name__)


async def serve(process: Process) -> None:
    """Until `stop`, SIGTERM, or something that must not be survived."""
    await process.run()


def main() -> None:
    """Entry point."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s recorder %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    # Whoever reads the log may be gone: that must not concern us.
    logging.raiseExceptions = False
    child = start("recorder", waiting=lambda: log.info("waiting for the last recorder to end"))
    process = Process(child)
    trio.run(serve, process)
    sys.exit(process.exit_code)


if __name__ == "__main__":
    main()
