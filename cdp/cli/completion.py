"""What the shell offers for a half-typed word: names of disks, bookmarks, views.

A completion that fails or is slow is worse than none: nothing is printed, and the daemon gets one
second.
"""

from __future__ import annotations

from typing import Any

import typer

from cdp.cli.api_client import ApiClient, path_of, state_dir_of
from journal.errors import CdpError

SECONDS_MAX = 1.0
POLICIES = ("shrink", "throttle", "block")
LEVELS = ("crash", "filesystem", "application")


def _ask(ctx: typer.Context, path: str, key: str) -> list[dict[str, Any]]:
    try:
        answer = ApiClient(state_dir_of(ctx), timeout=SECONDS_MAX).get(path)
    except CdpError:
        return []
    found = answer.get(key)
    return found if isinstance(found, list) else []


def disk(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Names of disks."""
    return [
        (entry["name"], str(entry.get("state", "")))
        for entry in _ask(ctx, path_of("disks"), "disks")
        if entry["name"].startswith(incomplete)
    ]


def disks(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Names of disks, several with commas between them, none of them twice."""
    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    return [(before + comma + name, state) for name, state in disk(ctx, last) if name not in given]


def _labels(ctx: typer.Context, incomplete: str, prefix: str) -> list[tuple[str, str]]:
    # Behind an option without its value the arguments have not been taken apart yet.
    first = ctx.args[0] if ctx.args else ""
    names = str(ctx.params.get("name") or ctx.params.get("names") or first)
    if not names:
        return []
    path = path_of("disks", names.split(",", maxsplit=1)[0], "bookmarks")
    return [
        (prefix + entry["label"], f"{entry.get('consistency', '')} bookmark, seq {entry['seq']}")
        for entry in _ask(ctx, path, "bookmarks")
        if (prefix + entry["label"]).startswith(incomplete)
    ]


def label(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Labels of the bookmarks of the disk that was named before."""
    return _labels(ctx, incomplete, "")


def spec(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Points: bookmarks, and examples of the other forms."""
    found = _labels(ctx, incomplete, "")
    if incomplete.startswith("bookmark:"):
        found = _labels(ctx, incomplete, "bookmark:")
    forms = [("now", "the last write"), ("-10m", "ten minutes ago"), ("seq:", "after a record")]
    return found + [(form, help) for form, help in forms if form.startswith(incomplete)]


def view(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Ids of open views."""
    return [
        (str(entry["id"]), f"{entry['disk']} at seq {entry['seq']}")
        for entry in _ask(ctx, path_of("views"), "views")
        if str(entry["id"]).startswith(incomplete)
    ]


def policy(incomplete: str) -> list[str]:
    """Overflow policies."""
    return [name for name in POLICIES if name.startswith(incomplete)]


def level(incomplete: str) -> list[str]:
    """Consistency levels."""
    return [name for name in LEVELS if name.startswith(incomplete)]
