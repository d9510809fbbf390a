"""Arguments and options that several commands share, and the types of their values."""

from __future__ import annotations

from typing import Annotated

import typer

from cdp import units
from cdp.cli import completion
from journal.errors import InvalidInput


def _size(text: str) -> int:
    try:
        return units.parse_size(text)
    except InvalidInput as error:
        raise typer.BadParameter(str(error)) from None


def _duration(text: str) -> float:
    try:
        return units.parse_duration(text)
    except InvalidInput as error:
        raise typer.BadParameter(str(error)) from None


def names_of(text: str) -> list[str]:
    """``a,b,c`` -> a list.

    :raises typer.BadParameter: an empty name, or one twice.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise typer.BadParameter(f"{text!r}: name each disk once, with a comma between two")
    return names


SIZE = "Bytes, or with K, M, G, T (powers of 1024): 512MiB, 10G."
DURATION = "10m, 1h30m, 2d, or plain seconds."
SPEC = (
    "now, seq:N, a bookmark's label, -10m, '10 min ago', 'yesterday 14:00', "
    "2025-11-23T10:00[Z], @UNIXSECONDS."
)


def size_option(help: str) -> object:
    """An option whose value is a size in bytes."""
    return typer.Option(help=f"{help} {SIZE}", metavar="SIZE", parser=_size)


def duration_option(help: str) -> object:
    """An option whose value is a duration in seconds."""
    return typer.Option(help=f"{help} {DURATION}", metavar="DURATION", parser=_duration)


def spec_option(name: str, help: str) -> object:
    """An option whose value is a SPEC."""
    return typer.Option(
        name, help=f"{help}: {SPEC}", metavar="SPEC", autocompletion=completion.spec
    )


Disk = Annotated[
    str, typer.Argument(metavar="NAME", help="The disk.", autocompletion=completion.disk)
]
Disks = Annotated[
    str,
    typer.Argument(
        metavar="NAME[,NAME...]", help="One disk or several.", autocompletion=completion.disks
    ),
]
SizeArgument = Annotated[int, typer.Argument(metavar="SIZE", help=SIZE, parser=_size)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
