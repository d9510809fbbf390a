"""`cdp restore`: a disk as it was, copied to a file or a device."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from cdp import units
from cdp.cli import image
from cdp.cli.api_client import ApiClient, Json, client_of, path_of
from cdp.cli.options import AsJson, Disk, Yes, spec_option
from cdp.cli.output import CliError, confirm, note, print_json, print_line, progress
from cdp.cli.specs import resolve

FORMATS = ("raw", "qcow2")


def restore(
    ctx: typer.Context,
    name: Disk,
    to: Annotated[str, spec_option("--to", "The point to restore")],
    output: Annotated[
        Path, typer.Option("--output", metavar="PATH", help="A new file, or a block device.")
    ],
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="raw or qcow2 (needs qemu-img).")
    ] = "raw",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Copy a disk as it was to an image file or a device; the disk itself is not touched."""
    if form not in FORMATS:
        raise typer.BadParameter(f"--format is one of {', '.join(FORMATS)}")
    client, output = client_of(ctx), output.absolute()
    device = image.is_device(output)
    if device and form != "raw":
        raise CliError(f"{output} is a device: restore it raw, and qcow2 into a file")
    if device and not yes and sys.stdin.isatty():
        confirm(f"overwrite all of {output}?")
    if not device and output.exists() and not output.is_file():
        raise CliError(f"{output} is neither a file nor a block device: name another output")
    if not device:
        _refuse_own(client, output, force=force)
    with _sigterm_as_exception():
        point = resolve(client, name, to)
        if device:
            _to_device(client, name, point, output)
        elif form == "raw":
            _to_file(client, name, point, output, force=force)
        else:
            _to_qcow2(client, name, point, output, force=force)
    result = {
        "disk": name,
        "seq": point["seq"],
        "time": point["time"],
        "output": str(output),
        "format": form,
    }
    if as_json:
        print_json(result)
    else:
        when = units.format_time(point["time"], decimals=3)
        print_line(f"{output}: {name} as it was at seq:{point['seq']} ({when})")


def _refuse_own(client: ApiClient, output: Path, *, force: bool) -> None:
    """:raises CliError: it is a file of the daemon, or of a disk."""
    real = output.resolve()
    places = [client.state_dir / "disks"]
    if force and output.exists():
        for disk in client.get(path_of("disks"))["disks"]:
            places += [Path(disk["journal"]), Path(disk["backing"])]
    if any(real.is_relative_to(place.resolve()) for place in places):
        raise CliError(f"{output} is the daemon's own, or a disk's backing: name another file")


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """A SIGTERM closes the view and removes the partial file, as an interrupt does."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _view(client: ApiClient, name: str, point: Json) -> Iterator[str]:
    """The URI of a read-only view, closed at the end; until then its point cannot be given up."""
    body = {"at": f"seq:{point['seq']}", "writable": False}
    view = client.post(path_of("disks", name, "views"), body)
    try:
        yield view["uri"]
    finally:
        try:
            client.delete(path_of("views", str(view["id"])))
        except Exception as error:
            # What happened before says more than this.
            note(f"view {view['id']} is still open ({error}): cdp view close {view['id']}")


def _to_file(client: ApiClient, name: str, point: Json, path: Path, *, force: bool) -> None:
    with image.Partial(path, force=force) as partial, _view(client, name, point) as uri:
        fd = partial.create()
        try:
            _copy(uri, lambda size: image.SparseFile(fd, size), name)
        finally:
            os.close(fd)
        partial.finish()


def _to_device(client: ApiClient, name: str, point: Json, path: Path) -> None:
    written = False

    def sink(size: int) -> image.Sink:
        nonlocal written
        device.check_room(size)
        written = True
        return device

    # Opened first: a device that is in use needs no view.
    with image.BlockDevice(path) as device, _view(client, name, point) as uri:
        try:
            _copy(uri, sink, name)
            device.sync()
        except BaseException:
            if written:
                note(f"{path} holds a part of {name} now, and the rest of its old content")
            raise


def _copy(uri: str, sink_of: Callable[[int], image.Sink], name: str) -> None:
    from cdp.nbd.client import NbdClient, NbdNegotiationError, NbdServerError
    from cdp.nbd.wire import RemoteProtocolError

    try:
        with NbdClient.connect(uri) as source, progress(f"restore {name}") as report:
            image.copy(
                source,
                sink_of(source.size),
                lambda done: report(
                    {"phase": "copy", "done": done, "total": source.size, "unit": "bytes"}
                ),
            )
    except (NbdServerError, NbdNegotiationError, RemoteProtocolError) as error:
        raise CliError(f"reading {name} failed ({error}): look with 'cdp scrub {name}'") from None


def _to_qcow2(client: ApiClient, name: str, point: Json, path: Path, *, force: bool) -> None:
    with image.Partial(path, force=force) as partial, _view(client, name, point) as uri:
        os.close(partial.create())
        command = ["qemu-img", "convert", "-p", "-f", "raw", "-O", "qcow2", uri]
        _run_qemu_img([*command, str(partial.partial)], name)
        partial.finish()


_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")


def _run_qemu_img(command: list[str], name: str) -> None:
    """Run it, with its progress as ours and its complaints as one line.

    :raises CliError: it is not installed, or it failed.
    """
    with tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints)
        except FileNotFoundError:
            raise CliError(
                "qcow2 needs qemu-img: install it (qemu-utils), or restore --format raw"
            ) from None
        with process, progress(f"restore {name}") as report:
            assert process.stdout is not None
            try:
                while text := os.read(process.stdout.fileno(), 4096):
                    for found in _PERCENT.findall(text):
                        done = float(found)
                        report({"phase": "convert", "done": done, "total": 100.0, "unit": "%"})
            except BaseException:
                process.terminate()
                raise
        if process.returncode:
            complaints.seek(0)
            complaint = complaints.read().decode(errors="replace").strip()
            raise CliError(f"qemu-img failed: {complaint or process.returncode}")
