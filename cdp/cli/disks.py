"""`cdp status`, `cdp disk ...`, `cdp scrub`, `cdp doctor`: disks and how they are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cdp import units
from cdp.cli import completion
from cdp.cli.api_client import ApiClient, Json, client_of, path_of, state_dir_of
from cdp.cli.options import (
    DURATION,
    SIZE,
    AsJson,
    Disk,
    SizeArgument,
    Yes,
    duration_option,
    size_option,
)
from cdp.cli.output import (
    Table,
    confirm,
    note,
    print_fields,
    print_json,
    print_line,
    progress,
)
from cdp.cli.status import details, print_disks, show_status
from journal.errors import InvalidInput

DAMAGE_FOUND = 3  # exit status

app = typer.Typer(no_args_is_help=True, help="Protect disks, and change how they are protected.")


def status(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="One disk.", autocompletion=completion.disk),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The daemon and its disks: state, lag, window, journal."""
    show_status(client_of(ctx), name, as_json=as_json)


# -------------------------------------------------------------------------------------------- disks
@app.command("add")
def add(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, '.', '_', '-'.")],
    size: Annotated[int | None, size_option("Default: the backing's.")] = None,
    backing: Annotated[
        Path | None, typer.Option(help="File or device with the content; default: a new file.")
    ] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Directory of the history; default: in the state directory.")
    ] = None,
    window: Annotated[
        float | None, duration_option("Every write of so long stays openable.")
    ] = None,
    journal_limit: Annotated[int | None, size_option("Most that the history may take.")] = None,
    overflow: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="At the limit: shrink, throttle or block.",
            autocompletion=completion.policy,
        ),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Of a logical block; default: the backing's, 512 for files.")
    ] = None,
    segment_bytes: Annotated[int | None, size_option("Size of one file of the log.")] = None,
    as_json: AsJson = False,
) -> None:
    """Protect a disk, at once and without copying it."""
    if size is None and backing is None:
        raise typer.BadParameter("give the --size, or a --backing that has one")
    body = {
        "name": name,
        "size": size,
        # The daemon's working directory is not the caller's.
        "backing": None if backing is None else str(backing.absolute()),
        "journal": None if journal is None else str(journal.absolute()),
        "window": window,
        "journal_limit": journal_limit,
        "overflow": overflow,
        "segment_bytes": segment_bytes,
        "block_size": block_size,
    }
    disk = client_of(ctx).post(path_of("disks"), body)
    if as_json:
        print_json(disk)
    else:
        print_line(f"{disk['name']}: {units.format_size(disk['size'])}, protected, {disk['uri']}")


@app.command("list")
def list_disks(ctx: typer.Context, as_json: AsJson = False) -> None:
    """All disks."""
    disks = client_of(ctx).get(path_of("disks"))["disks"]
    if as_json:
        print_json(disks)
    else:
        print_disks(disks)


@app.command("remove")
def remove(
    ctx: typer.Context,
    name: Disk,
    force: Annotated[bool, typer.Option(help="Also while clients or views use it.")] = False,
    purge: Annotated[
        bool, typer.Option(help="Delete the content too, if the daemon made its file.")
    ] = False,
    yes: Yes = False,
) -> None:
    """End the protection of a disk: its content stays in the backing, its history is deleted."""
    if not yes:
        what = "its history and its content" if purge else "its history"
        _ask_on_terminal(f"{name}: delete {what}?")
    query = {"force": int(force), "purge": int(purge)}
    _long(client_of(ctx), "DELETE", path_of("disks", name), name, query=query)
    print_line(f"{name}: no longer protected")


def _ask_on_terminal(question: str) -> None:
    """Asks a person only: scripts call these commands without --yes."""
    if sys.stdin.isatty():
        confirm(question)


def _long(
    client: ApiClient,
    method: str,
    path: str,
    title: str,
    *,
    body: Json | None = None,
    query: Json | None = None,
) -> Json:
    with progress(title) as report:
        return client.long_call(method, path, body, query=query, progress=report)


@app.command("resize")
def resize(ctx: typer.Context, name: Disk, size: SizeArgument, as_json: AsJson = False) -> None:
    """Change a disk's size. Points before keep the size they had."""
    disk = client_of(ctx).post(path_of("disks", name, "resize"), {"size": size})
    if as_json:
        print_json(disk)
    else:
        print_line(f"{name}: {units.format_size(disk['size'])}")


_DURATIONS = frozenset({"window", "sync-age", "scrub-interval"})
_SIZES = frozenset({"journal-limit", "tail", "scrub-rate"})


def _settings(pairs: list[str]) -> Json:
    """``KEY=VALUE`` -> the values in the API's units; ``none`` is no limit."""
    body: Json = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{pair!r}: write KEY=VALUE, as in window=2d")
        try:
            if value.lower() == "none":
                body[key] = None
            elif key in _DURATIONS:
                body[key] = units.parse_duration(value)
            elif key in _SIZES:
                body[key] = units.parse_size(value)
            else:
                body[key] = value
        except InvalidInput as error:
            raise typer.BadParameter(f"{key}: {error}") from None
    return body


@app.command("set")
def set_options(
    ctx: typer.Context,
    name: Disk,
    pairs: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE...",
            help="window=DURATION, journal-limit=SIZE, overflow=POLICY, tail=SIZE, "
            "sync-age=DURATION, after-loss=auto|hold|offer, scrub-interval=DURATION, "
            "scrub-rate=SIZE (a second). window=none: all that fits; the last two: none, too. "
            f"DURATION: {DURATION} SIZE: {SIZE}",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Change how a disk is protected, while it is in use."""
    disk = client_of(ctx).post(path_of("disks", name, "set"), _settings(pairs))
    if as_json:
        print_json(disk)
    else:
        print_fields(details(disk))


@app.command("drain")
def drain(ctx: typer.Context, name: Disk, as_json: AsJson = False) -> None:
    """Apply everything that is durable now to the backing."""
    result = _long(client_of(ctx), "POST", path_of("disks", name, "drain"), name)
    if as_json:
        print_json(result)
    else:
        print_line(f"{name}: applied up to seq {result['applied_seq']}")


@app.command("release")
def release(ctx: typer.Context, name: Disk, yes: Yes = False, as_json: AsJson = False) -> None:
    """Let go of the backing, so that it can be used without the daemon.

    The disk is not served and nothing is captured until 'cdp disk resume'.
    """
    if not yes:
        _ask_on_terminal(f"{name}: stop serving it, and stop capturing?")
    result = _long(client_of(ctx), "POST", path_of("disks", name, "release"), name)
    if as_json:
        print_json(result)
    else:
        print_line(
            f"{name}: released; take it back with: cdp disk resume {name} --unchanged, "
            "or --give-up-history if its backing was written to"
        )


@app.command("resume")
def resume(
    ctx: typer.Context,
    name: Disk,
    unchanged: Annotated[
        bool, typer.Option("--unchanged", help="Nobody wrote to the backing: keep the history.")
    ] = False,
    give_up_history: Annotated[
        bool, typer.Option("--give-up-history", help="It was written to: begin a new history.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take a released disk back.

    Say which: what was written behind the daemon's back falsifies every older point.
    """
    if unchanged == give_up_history:
        raise typer.BadParameter("say --unchanged or --give-up-history, and be sure of it")
    body = {"unchanged": unchanged, "give_up_history": give_up_history}
    path = path_of("disks", name, "resume")
    result = _long(client_of(ctx), "POST", path, name, body=body)
    if as_json:
        print_json(result)
    else:
        print_line(f"{name}: protected again")


@app.command("offer")
def offer(ctx: typer.Context, name: Disk, as_json: AsJson = False) -> None:
    """Serve a disk again that is held because a crash lost writes (after-loss)."""
    disk = client_of(ctx).post(path_of("disks", name, "offer"))
    if as_json:
        print_json(disk)
    else:
        print_line(f"{name}: {disk['state']}")


# ------------------------------------------------------------------------------------------- checks
def scrub(
    ctx: typer.Context,
    name: Disk,
    wait: Annotated[
        bool, typer.Option(help="Wait for its end. It goes on when you do not.")
    ] = True,
    rate: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes a second, or none; default: its scrub-rate."),
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", help="How it goes, and what the last one found.")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the one that runs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Verify every checksum of a disk's journal, in the background; repair what lies twice.

    Exit status: 0 nothing is damaged, 3 damage was found, also if it was repaired.
    """
    from cdp.cli.scrubs import begin_scrub, show_last, show_scrub

    if status and stop:
        raise typer.BadParameter("say --status or --stop")
    client, path = client_of(ctx), path_of("disks", name, "scrub")
    if stop:
        client.delete(path)
        print_line(f"{name}: no scrub runs any more")
        return
    if status:
        damaged = show_last(name, client.get(path), as_json=as_json)
    else:
        body = {"wait": wait, "rate": None if rate is None else _rate(rate)}
        result = _long(client, "POST", path, name, body=body)
        if not wait:
            begin_scrub(name, as_json=as_json)
            return
        damaged = show_scrub(name, result, as_json=as_json)
    if damaged:
        raise typer.Exit(DAMAGE_FOUND)


def _rate(text: str) -> int:
    try:
        return 0 if text.lower() == "none" else units.parse_size(text)
    except InvalidInput as error:
        raise typer.BadParameter(f"--rate: {error}") from None


def doctor(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Look for what endangers the data; exit status 1 if something does.

    Without a daemon the checks that need none are made.
    """
    from cdp.cli.api_client import DaemonUnreachable

    try:
        checks = client_of(ctx).get(path_of("doctor"))["checks"]
    except DaemonUnreachable as error:
        from cdp.cli.local_checks import local_checks

        first = {"name": "daemon", "disk": None, "level": "fail", "message": str(error)}
        checks = [first, *local_checks(state_dir_of(ctx))]
    if as_json:
        print_json(checks)
    else:
        table = Table(["LEVEL", "CHECK", "DISK", "MESSAGE"])
        for check in checks:
            table.add(check["level"], check["name"], check["disk"] or "-", check["message"])
        table.print("nothing was checked")
    failed = [check["name"] for check in checks if check["level"] == "fail"]
    if failed:
        note(f"failed: {', '.join(failed)}")
        raise typer.Exit(1)
