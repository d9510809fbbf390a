"""`cdp bookmark ...`: named points."""

from __future__ import annotations

from typing import Annotated

import typer

from cdp import units
from cdp.cli import completion
from cdp.cli.api_client import client_of, path_of
from cdp.cli.options import AsJson, Disk, Disks, names_of
from cdp.cli.output import Table, note, print_json, print_line

app = typer.Typer(no_args_is_help=True, help="Name points, so that they are kept and found.")


@app.command("add")
def add(
    ctx: typer.Context,
    names: Disks,
    label: Annotated[
        str, typer.Argument(metavar="LABEL", help="1-64 letters, digits, '.', '_', '-'.")
    ],
    consistency: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="crash, filesystem or application.",
            autocompletion=completion.level,
        ),
    ] = "crash",
    as_json: AsJson = False,
) -> None:
    """Bookmark this moment, on several disks the same one."""
    from replay.target import check_label

    if consistency not in completion.LEVELS:
        raise typer.BadParameter(f"--consistency is one of {', '.join(completion.LEVELS)}")
    check_label(label)
    body = {"disks": names_of(names), "label": label, "consistency": consistency}
    bookmarks = client_of(ctx).post(path_of("bookmarks"), body)["bookmarks"]
    if as_json:
        print_json(bookmarks)
    else:
        for entry in bookmarks:
            when = units.format_time(entry["time"], decimals=3)
            print_line(
                f"{entry['disk']}: {entry['label']} is seq:{entry['seq']}, {when}, "
                f"{entry['consistency']}-consistent"
            )
    for entry in bookmarks:
        asked = entry.get("requested", consistency)
        if entry["consistency"] != asked:
            reached = entry["consistency"]
            note(f"{entry['disk']}: asked for {asked} consistency, reached {reached} only")


@app.command("list")
def list_bookmarks(ctx: typer.Context, name: Disk, as_json: AsJson = False) -> None:
    """A disk's bookmarks."""
    bookmarks = client_of(ctx).get(path_of("disks", name, "bookmarks"))["bookmarks"]
    if as_json:
        print_json(bookmarks)
        return
    table = Table(["LABEL", ">SEQ", "TIME", "CONSISTENCY", "REQUESTED", ">FROZEN", "BY"])
    for entry in bookmarks:
        frozen = entry.get("freeze_seconds")
        table.add(
            entry["label"],
            str(entry["seq"]),
            units.format_time(entry["time"], decimals=3),
            entry["consistency"],
            str(entry.get("requested") or "-"),
            "-" if frozen is None else units.format_duration(frozen),
            ", ".join(map(str, entry.get("providers") or [])) or "-",
        )
    table.print(f"{name} has no bookmarks; add one with 'cdp bookmark add {name} LABEL'")


@app.command("remove")
def remove(
    ctx: typer.Context,
    name: Disk,
    label: Annotated[
        str,
        typer.Argument(metavar="LABEL", help="The bookmark.", autocompletion=completion.label),
    ],
) -> None:
    """Forget a bookmark; its point is kept only as long as any other."""
    client_of(ctx).delete(path_of("disks", name, "bookmarks", label))
    print_line(f"{name}: bookmark {label} removed")
