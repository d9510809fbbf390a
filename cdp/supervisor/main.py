"""`cdpd`: arguments, logging, signals."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import sdnotify
import trio

from cdp.config import LimitsConfig, load_daemon
from cdp.supervisor.daemon import Daemon, Options
from journal.errors import CdpError, InvalidInput
from journal.limits import FILES_OPEN_MAX

log = logging.getLogger(__name__)

LOG_LEVEL_VARIABLE: Final = "CDP_LOG_LEVEL"
STATUS_INTERRUPTED: Final = 1
# What a process has open besides connections and overlays of views: segments of both logs, two
# descriptors for one that is mapped; the index, sockets and pages.
OTHER_FILES: Final = 4 * FILES_OPEN_MAX + 128


def parse_arguments(arguments: Sequence[str] | None = None) -> Options:
    """The command line over the configuration file.

    :raises CdpError: the configuration file cannot be used. SystemExit for wrong usage.
    """
    parser = argparse.ArgumentParser(
        prog="cdpd",
        description="Continuous data protection: every write to a disk can be gone back to.",
        epilog=f"{LOG_LEVEL_VARIABLE}=DEBUG in the environment logs more.",
    )
    parser.add_argument(
        "--state-dir", type=Path, required=True, metavar="DIR", help="what the daemon keeps"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="limits and defaults, TOML")
    parser.add_argument(
        "--nbd",
        action="append",
        default=[],
        metavar="tcp://HOST:PORT",
        help="serve NBD there as well; DIR/nbd.sock is always there",
    )
    parser.add_argument("--http", metavar="HOST:PORT", help="serve metrics there")
    parser.add_argument(
        "--allow-remote-without-tls",
        action="store_true",
        help="let --nbd and --http be reachable by other hosts, unencrypted",
    )
    given = parser.parse_args(arguments)
    config = load_daemon(given.config)
    return Options(
        state_dir=given.state_dir.absolute(),
        config=config,
        nbd=tuple(given.nbd) or ((config.nbd,) if config.nbd else ()),
        http=given.http if given.http is not None else config.http,
        allow_remote_without_tls=given.allow_remote_without_tls or config.allow_remote_without_tls,
    )


def _set_up_logging() -> None:
    # The journal of systemd has its own time stamps.
    times = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    level = os.environ.get(LOG_LEVEL_VARIABLE, "INFO").upper()
    logging.basicConfig(
        stream=sys.stderr,
        level=level if level in logging.getLevelNamesMapping() else "INFO",
        format=f"{times}%(levelname)s %(name)s: %(message)s",
    )


def _provide_open_files(limits: LimitsConfig) -> None:
    """See that every process may open as many files as it needs at the most.

    One that runs out of them halfway cannot begin a segment, nor be told of a client.

    :raises InvalidInput: they are not allowed.
    """
    needed = limits.nbd_connections + limits.views + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        if hard != unlimited and hard < needed:
            raise InvalidInput(
                f"limits.nbd-connections={limits.nbd_connections} needs {needed} open files, and "
                f"{hard} are allowed: raise LimitNOFILE (ulimit -n), or lower the limit"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def _run(options: Options) -> int:
    notifier = sdnotify.SystemdNotifier()
    status = 0

    def on_ready(line: str) -> None:
        print(f"cdpd: {line}", flush=True)
        notifier.notify(f"READY=1\nSTATUS={line}")

    try:
        daemon = Daemon(options)
    except OSError as error:
        raise InvalidInput(
            f"the state directory {options.state_dir} cannot be used: {error.strerror}"
        ) from error

    async def watch_signals(scope: trio.CancelScope) -> None:
        nonlocal status
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                name = signal.Signals(number).name
                if daemon.stopping.is_set():
                    log.warning("%s again: the disks' processes are left running", name)
                    status = STATUS_INTERRUPTED
                    scope.cancel()
                    return
                log.info("%s", name)
                notifier.notify("STOPPING=1")
                daemon.stopping.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_signals, nursery.cancel_scope)
        await daemon.run(on_ready)
        nursery.cancel_scope.cancel()
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    _set_up_logging()
    try:
        options = parse_arguments(arguments)
        _provide_open_files(options.config.limits)
        return trio.run(_run, options)
    except CdpError as error:
        print(f"cdpd: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
