"""`cdp attach` and `cdp detach`: the kernel's NBD device. Not there yet; they say what does it."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from cdp.cli.api_client import state_dir_of
from cdp.cli.options import Disk
from cdp.cli.output import CliError

DEVICE = "/dev/nbd0"


def attach(
    ctx: typer.Context,
    name: Disk,
    device: Annotated[
        str, typer.Option("--device", metavar="/dev/nbdN", help="The device to use.")
    ] = DEVICE,
) -> None:
    """Connect a disk to a device of the kernel (not there yet: says what does it)."""
    sock = state_dir_of(ctx).absolute() / "nbd.sock"
    words = ["nbd-client", "-unix", str(sock), "-N", name, device, "-persist"]
    raise CliError(f"cdp attach is not there yet: run '{shlex.join(words)}' as root")


def detach(ctx: typer.Context, name: Disk) -> None:
    """Disconnect a disk from the kernel (not there yet: says what does it)."""
    raise CliError(f"cdp detach is not there yet: run 'nbd-client -d {DEVICE}' as root")
