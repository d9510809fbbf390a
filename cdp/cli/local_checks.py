"""What `cdp doctor` can look at when no daemon answers: the state directory, disks, tools.

It reads, and writes nothing. Its checks have the shape of the daemon's: ``name``, ``disk``,
``level`` (``ok``, ``warn``, ``fail``), ``message``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cdp.units import format_size

Check = dict[str, Any]
FREE_SHARE_MIN = 0.05
TOOLS = {"qemu-img": "restoring to qcow2", "nbdinfo": "looking at exports"}


def local_checks(state_dir: Path) -> list[Check]:
    """All checks that need no daemon."""
    return [*_state_dir(state_dir), *_disks(state_dir), *_tools()]


def _check(name: str, level: str, message: str, disk: str | None = None) -> Check:
    return {"name": name, "disk": disk, "level": level, "message": message}


def _state_dir(state_dir: Path) -> Iterator[Check]:
    if not state_dir.is_dir():
        yield _check("state-dir", "fail", f"{state_dir} does not exist: name it with --state-dir")
        return
    if not os.access(state_dir, os.R_OK | os.X_OK):
        yield _check("state-dir", "fail", f"{state_dir} cannot be read: run it as its owner")
        return
    mode = state_dir.stat().st_mode
    if mode & 0o022:
        yield _check(
            "state-dir",
            "warn",
            f"others may write to {state_dir}: chmod go-w, or they can replace what it holds",
        )
    else:
        yield _check("state-dir", "ok", str(state_dir))


def _disks(state_dir: Path) -> Iterator[Check]:
    try:
        directories = sorted((state_dir / "disks").iterdir())
    except OSError:
        return
    for directory in directories:
        if not (directory / "disk.json").exists():
            continue
        name = directory.name
        try:
            config = json.loads((directory / "disk.json").read_text())
            backing, journal = Path(config["backing"]), Path(config["journal"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{directory / 'disk.json'} cannot be read: {error}"
            yield _check("config", "fail", message, name)
            continue
        yield from _backing(name, backing)
        yield from _journal(name, journal)


def _backing(name: str, backing: Path) -> Iterator[Check]:
    if backing.exists():
        yield _check("backing", "ok", str(backing), name)
    else:
        message = f"{backing} does not exist: attach it before the daemon is started"
        yield _check("backing", "fail", message, name)


def _journal(name: str, journal: Path) -> Iterator[Check]:
    if not (journal / "redo").is_dir():
        message = f"{journal} holds no journal: mount it before the daemon is started"
        yield _check("journal", "fail", message, name)
        return
    usage = shutil.disk_usage(journal)
    free = f"{format_size(usage.free)} free below {journal}"
    low = usage.free < usage.total * FREE_SHARE_MIN
    yield _check("space", "warn" if low else "ok", free, name)


def _tools() -> Iterator[Check]:
    for tool, purpose in TOOLS.items():
        path = shutil.which(tool)
        if path is None:
            yield _check("tools", "warn", f"{tool} is not installed; it is for {purpose}")
        else:
            yield _check("tools", "ok", path)
