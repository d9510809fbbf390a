"""How disks are, for people and for programs. Imports no typer: see `cdp.cli.main`."""

from __future__ import annotations

from typing import Any

from cdp import units
from cdp.cli.api_client import ApiClient, Json, path_of
from cdp.cli.output import CliError, Table, print_fields, print_json, print_line
from cdp.cli.scrubs import describe


def show_status(client: ApiClient, name: str | None, *, as_json: bool) -> None:
    """Print how the daemon and its disks are, or one of them.

    :raises CliError: no disk of that name.
    """
    answer = client.get(path_of("status"))
    if name is not None:
        known = [disk["name"] for disk in answer["disks"]]
        answer["disks"] = [disk for disk in answer["disks"] if disk["name"] == name]
        if not answer["disks"]:
            if name in (answer.get("broken") or {}):
                raise CliError(f"{name} is not usable: {answer['broken'][name]}")
            there = f"there are: {', '.join(known)}" if known else "none is"
            raise CliError(f"no disk {name!r} is protected; {there}")
    if as_json:
        print_json(answer)
    elif name is not None:
        print_fields(details(answer["disks"][0]))
    else:
        uptime = units.format_duration(answer.get("uptime_seconds") or 0)
        print_line(f"cdpd {answer.get('version')}, pid {answer.get('pid')}, up {uptime}")
        print_disks(answer["disks"])
        for broken, reason in (answer.get("broken") or {}).items():
            print_line(f"{broken}: not usable: {reason}")


def print_disks(disks: list[Json]) -> None:
    """One line a disk, and below why one is not served."""
    titles = ["NAME", "STATE", ">SIZE", ">SEQ", ">LAG", ">WINDOW", ">JOURNAL", ">OF", ">CLIENTS"]
    table = Table(titles)
    for disk in disks:
        table.add(
            disk["name"],
            _state(disk),
            units.format_size(disk["size"]),
            str(disk["durable_seq"]),
            units.format_duration(disk.get("lag_seconds") or 0),
            units.format_duration(disk.get("window_seconds") or 0),
            units.format_size(disk.get("journal_bytes") or 0),
            units.format_size(disk["journal_limit"]) if disk.get("journal_limit") else "-",
            str(disk.get("connections", "-")),
        )
    table.print("no disk is protected; add one with 'cdp disk add NAME --size SIZE'")
    for disk in disks:
        if disk.get("reason"):
            print_line(f"{disk['name']}: {disk['reason']}")


def _state(disk: Json) -> str:
    """The state, with what it may hide."""
    words = [str(disk["state"])]
    words += [word for word in ("poisoned", "degraded") if disk.get(word) and word not in words]
    return ", ".join(words)


def details(disk: Json) -> list[tuple[str, str]]:
    """Everything about one disk, as names and values."""
    size, duration = units.format_size, units.format_duration

    def number(key: str, form: Any = str) -> str:
        value = disk.get(key)
        return "-" if value is None else str(form(value))

    configured = disk.get("window_configured")
    limit = disk.get("journal_limit")
    restarts: Json = disk.get("restarts") or {}
    return [
        ("name", str(disk["name"])),
        ("state", _state(disk) + (f": {disk['reason']}" if disk.get("reason") else "")),
        ("size", f"{size(disk['size'])} ({disk['size']} bytes)"),
        ("export", number("uri")),
        ("backing", number("backing")),
        ("journal", number("journal")),
        (
            "window",
            f"{number('window_seconds', duration)} since "
            f"{units.format_time(disk.get('window_start'))} (seq {number('window_start_seq')}), "
            f"configured: {'all that fits' if configured is None else duration(configured)}",
        ),
        (
            "journal size",
            f"{number('journal_bytes', size)} of {size(limit) if limit else 'no limit'}: "
            f"redo {number('redo_bytes', size)}, undo {number('undo_bytes', size)}, "
            f"index and reserves {number('index_bytes', size)}; when full: {number('overflow')}",
        ),
        (
            "seq",
            f"last {number('last_seq')}, durable {number('durable_seq')}, "
            f"applied {number('applied_seq')}, oldest {number('floor_seq')}",
        ),
        (
            "not durable",
            f"{number('lag_bytes', size)}, {number('lag_seconds', duration)}",
        ),
        (
            "not applied",
            f"{number('apply_lag_bytes', size)}, {number('apply_lag_records')} records",
        ),
        ("scrub", describe(disk.get("scrub"))),
        ("clients", number("connections")),
        ("views", number("views")),
        ("bookmarks", number("bookmarks")),
        ("restarts", ", ".join(f"{name} {count}" for name, count in restarts.items()) or "-"),
    ]
