"""One disk served without a supervisor, for benches, tests and a look at the recorder alone.

    python -m cdp.recorder.standalone --disk-dir DIR --size BYTES --nbd SOCKET

makes the disk in DIR if it is not there, and serves it on a unix socket as the export NAME (and as
the default export). Nothing is applied unless a curator is started beside it; with ``--no-bound``
the tail is unbounded, also that of bytes that are not durable. It ends by SIGTERM.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from cdp.child import Child
from cdp.config import DISK_FILE, DiskConfig, load_disk, new_uuid, save_disk
from cdp.nbd.export import ExportInfo
from cdp.nbd.handshake import Closed, Established, ExportQuery, ListQuery, ServerHandshake
from cdp.nbd.wire import NBD_REP_ERR_UNKNOWN
from cdp.recorder.control import EXPORT_FLAGS, META_CONTEXTS
from cdp.recorder.process import Process

if TYPE_CHECKING:
    from cdp.nbd.export import Negotiated

log = logging.getLogger(__name__)

UNBOUNDED: Final = 1 << 50
UNBOUNDED_UNSYNCED: Final = 1 << 40


def make_disk(
    directory: Path,
    size: int,
    *,
    name: str = "disk0",
    backing: Path | None = None,
    **values: Any,
) -> DiskConfig:
    """The disk in a directory, made if need be; its backing is a sparse file."""
    if (directory / DISK_FILE).exists():
        return load_disk(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = backing or directory / "backing.img"
    if not path.exists():
        path.touch(0o600)
        os.truncate(path, size)
    config = DiskConfig(
        name=name, uuid=new_uuid(), size=size, block_size=512, backing=str(path.absolute()),
        journal=str((directory / "journal").absolute()), **values,
    )  # fmt: skip
    save_disk(directory, config)
    return config


def child_of(directory: Path, config: DiskConfig, *, clock_offset_ns: int = 0) -> Child:
    """As `cdp.child.start` would make it, without a lock of its own."""
    backing = os.open(config.backing, os.O_RDWR | os.O_CLOEXEC)
    return Child("recorder", directory, config, backing, clock_offset_ns, -1)


def export_of(process: Process) -> ExportInfo:
    """What the disk offers."""
    return ExportInfo(
        process.config.name, process.recorder.size, EXPORT_FLAGS, meta_contexts=META_CONTEXTS
    )


async def negotiate(stream: trio.SocketStream, process: Process) -> tuple[Negotiated, bytes] | None:
    """The handshake on one connection; None when the client went."""
    handshake = ServerHandshake()
    while True:
        events = handshake.events_received()
        result: Established | Closed | None = None
        for event in events:
            if isinstance(event, ListQuery):
                handshake.answer_list([(process.config.name, "")])
            elif isinstance(event, ExportQuery):
                if event.name in ("", process.config.name):
                    handshake.answer_export(export_of(process))
                else:
                    handshake.refuse_export(NBD_REP_ERR_UNKNOWN, "no such export")
            else:
                result = event
        try:
            if data := b"".join(handshake.data_to_send()):
                await stream.send_all(data)
            if isinstance(result, Established):
                return result.negotiated, result.leftover
            if result is not None:
                return None
            if events:
                continue
            received = await stream.receive_some()
        except trio.BrokenResourceError:
            return None
        if received:
            handshake.receive_data(received)
        else:
            handshake.receive_eof()


def attach(process: Process, sock: socket.socket, negotiated: Negotiated, leftover: bytes) -> None:
    """Hand a negotiated socket to the recorder, which owns it from here on."""
    process.attach(sock, negotiated, leftover=leftover)


async def welcome(process: Process, stream: trio.SocketStream) -> None:
    """Negotiate with one client and hand it over."""
    established = await negotiate(stream, process)
    if established is None or process.not_served() is not None:
        await stream.aclose()
        return
    sock = stream.socket
    fd = os.dup(sock.fileno())
    sock.close()
    plain = socket.socket(fileno=fd)
    attach(process, plain, *established)


async def serve_nbd(
    process: Process,
    path: Path,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """A front door for one disk on a unix socket."""
    path.unlink(missing_ok=True)
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    with listener:
        await listener.bind(os.fspath(path))
        listener.listen(64)
        task_status.started()
        async with trio.open_nursery() as nursery:
            while True:
                sock, _ = await listener.accept()
                nursery.start_soon(welcome, process, trio.SocketStream(sock))


async def run(directory: Path, config: DiskConfig, nbd: Path) -> int:
    """Until SIGTERM; the exit status."""
    child = child_of(directory, config)
    process = Process(child)
    async with trio.open_nursery() as nursery:
        await nursery.start(process.run)
        await process.settled.wait()
        if process.state != "ready":
            process.stop()
            return 1
        await nursery.start(serve_nbd, process, nbd)
        print(f"ready, backing is descriptor {child.backing_fd}", flush=True)
        await process.ended.wait()
        nursery.cancel_scope.cancel()
    return process.exit_code


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="cdp.recorder.standalone")
    parser.add_argument("--disk-dir", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--nbd", type=Path, required=True)
    parser.add_argument("--backing", type=Path)
    parser.add_argument("--no-bound", action="store_true")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    values: dict[str, Any] = {}
    if chosen.no_bound:
        values = {
            "tail_bytes": UNBOUNDED, "unsynced_bytes": UNBOUNDED_UNSYNCED,
            "journal_limit": UNBOUNDED,
        }  # fmt: skip
    config = make_disk(chosen.disk_dir, chosen.size, backing=chosen.backing, **values)
    sys.exit(trio.run(run, chosen.disk_dir, config, chosen.nbd))


if __name__ == "__main__":
    main()
