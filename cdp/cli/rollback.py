"""`cdp rollback`: a disk becomes what it was, and that can be undone."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cdp import units
from cdp.cli.api_client import Json, client_of, path_of
from cdp.cli.options import AsJson, Disks, Yes, names_of, spec_option
from cdp.cli.output import CliError, Table, confirm, print_json, print_line, progress
from cdp.cli.specs import canonical


def rollback(
    ctx: typer.Context,
    names: Disks,
    to: Annotated[str, spec_option("--to", "The point to go back to")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")
    ] = False,
    yes: Yes = False,
    disconnect: Annotated[
        bool, typer.Option("--disconnect", help="Disconnect clients that hold the disk.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make disks what they were; only what differs is changed, and it can be undone."""
    disks, client = names_of(names), client_of(ctx)
    if len(disks) > 1 and to.strip().startswith("seq:"):
        raise typer.BadParameter("a seq is one disk's: for several disks name a time or a bookmark")
    if not (yes or dry_run or sys.stdin.isatty()):
        raise CliError("nobody is here to confirm the rollback: see --dry-run, then say --yes")
    spec = canonical(client, disks[0], to)
    body: Json = {"disks": disks, "to": spec, "dry_run": False, "disconnect": disconnect}
    if dry_run or not yes:
        with progress("planning") as report:
            answer = client.long_call(
                "POST", path_of("rollback"), {**body, "dry_run": True}, progress=report
            )
        plans = answer["plans"]
        if dry_run and as_json:
            print_json(answer)
        elif dry_run or not as_json:
            _print_plans(plans)
        if dry_run:
            return
        confirm(f"roll back {', '.join(disks)}?")
        if len(plans) == 1:
            # What was shown is what is done, whatever the SPEC would mean by now.
            body["to"] = f"seq:{plans[0]['to_seq']}"
    with progress("rolling back") as report:
        answer = client.long_call("POST", path_of("rollback"), body, progress=report)
    if as_json:
        print_json(answer)
        return
    for done in answer["rollbacks"]:
        print_line(
            f"{done['disk']}: as it was at seq:{done['to_seq']}; "
            f"{units.format_size(done['bytes'])} in {done['extents']} extents changed"
        )
        print_line(f"undo with: cdp rollback {done['disk']} --to {done['undo_with']}")


def _print_plans(plans: list[Json]) -> None:
    table = Table(["DISK", ">TO SEQ", "TO TIME", ">EXTENTS", ">CHANGES", ">TAKES ABOUT"])
    for plan in plans:
        seconds = plan.get("seconds_estimate")
        table.add(
            plan["disk"],
            str(plan["to_seq"]),
            units.format_time(plan.get("to_time"), decimals=3),
            str(plan["extents"]),
            units.format_size(plan["bytes"]),
            "-" if seconds is None else units.format_duration(seconds),
        )
    if not plans:
        raise CliError("the daemon planned nothing: is it of another version?")
    table.print("")
