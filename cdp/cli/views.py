"""`cdp view ...`: a disk as it was, as an NBD export of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from cdp import units
from cdp.cli import completion
from cdp.cli.api_client import client_of, path_of
from cdp.cli.options import AsJson, Disk, spec_option
from cdp.cli.output import Table, print_json, print_line
from cdp.cli.specs import resolve

app = typer.Typer(no_args_is_help=True, help="Open a disk as it was.")


@app.command("open")
def open_view(
    ctx: typer.Context,
    name: Disk,
    at: Annotated[str, spec_option("--at", "The point")],
    writable: Annotated[
        bool, typer.Option("--writable", help="Writes go to a temporary overlay.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Open a point and print its NBD URI; it stays openable until the view is closed."""
    client = client_of(ctx)
    point = resolve(client, name, at)
    body = {"at": f"seq:{point['seq']}", "writable": writable}
    view = client.post(path_of("disks", name, "views"), body)
    if as_json:
        print_json(view)
    else:
        print_line(view["uri"])


@app.command("list")
def list_views(ctx: typer.Context, as_json: AsJson = False) -> None:
    """All open views."""
    views = client_of(ctx).get(path_of("views"))["views"]
    if as_json:
        print_json(views)
        return
    table = Table(["ID", "DISK", ">SEQ", "TIME", "MODE", ">OVERLAY", "OPENED", "URI"])
    for view in views:
        writable = view.get("writable")
        table.add(
            str(view["id"]),
            view["disk"],
            str(view["seq"]),
            units.format_time(view.get("time"), decimals=3),
            "writable" if writable else "read-only",
            units.format_size(view.get("overlay_bytes") or 0) if writable else "-",
            units.format_time(view.get("opened")),
            view["uri"],
        )
    table.print("no view is open; open one with 'cdp view open NAME --at SPEC'")


@app.command("close")
def close(
    ctx: typer.Context,
    view: Annotated[
        str, typer.Argument(metavar="ID", help="The view.", autocompletion=completion.view)
    ],
) -> None:
    """Close a view; what was written to it is lost."""
    client_of(ctx).delete(path_of("views", view))
    print_line(f"view {view} closed")
