"""The commands of `cdp`, put together with typer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

# Typer's usage errors are click's, or those of the click inside typer, depending on its version.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
ClickException: type[Exception] = typer.BadParameter.__mro__[2]

# Where each command is, in the order of the help: a module and a function of it, or its group.
COMMANDS = {
    "status": "disks:status",
    "disk": "disks:app",
    "timeline": "points:timeline",
    "points": "points:points",
    "bookmark": "bookmarks:app",
    "rollback": "rollback:rollback",
    "restore": "restore:restore",
    "view": "views:app",
    "scrub": "disks:scrub",
    "journal": "journal:app",
    "doctor": "disks:doctor",
}
# One that has another name as well, and those that are not there yet.
HIDDEN = {
    "release": "disks:release",
    "attach": "attach:attach",
    "detach": "attach:detach",
}


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            known = version("cdp-journal")
        except PackageNotFoundError:
            known = "of a source tree that is not installed"
        sys.stdout.write(f"cdp {known}\n")
        raise typer.Exit()


def root(
    state_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="CDP_STATE_DIR",
            metavar="DIR",
            help="The daemon's; default: /var/lib/cdp for root, else $XDG_STATE_HOME/cdp.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Continuous data protection: every write of a disk is a point to go back to."""


def build(only: str | None = None) -> typer.Typer:
    """The program with all commands, or, to start quickly, with the one that will be run."""
    app = typer.Typer(
        name="cdp",
        no_args_is_help=True,
        # Plain help: it can be piped, and needs no import of rich.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(root)
    for name, place in (COMMANDS | HIDDEN).items():
        if only is not None and name != only:
            continue
        module, _, attribute = place.partition(":")
        found = getattr(importlib.import_module(f"cdp.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name, hidden=name in HIDDEN)(found)
    return app


def command_of(arguments: Sequence[str]) -> str | None:
    """The command that will be run, if that is plain to see; None: build everything."""
    words = iter(arguments)
    for word in words:
        if word == "--state-dir":
            next(words, None)
        elif not word.startswith("--state-dir="):
            return word if word in COMMANDS | HIDDEN else None
    return None
