"""What endangers the data, looked for: `cdp doctor`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from cdp.supervisor.backing import inspect, is_at
from cdp.supervisor.children import State
from cdp.supervisor.disk import Disk
from journal.errors import InvalidInput

Check = dict[str, Any]

FREE_SHARE_MIN: Final = 0.05
LAG_SECONDS_MAX: Final = 5.0
# Super blocks of file systems that do not survive a reboot.
_VOLATILE: Final = frozenset({"tmpfs", "ramfs"})


def check(name: str, level: str, message: str, disk: str | None = None) -> Check:
    """One finding; `level` is ok, warn or fail."""
    return {"name": name, "disk": disk, "level": level, "message": message}


def state_directory(path: Path) -> Iterator[Check]:
    """Whether others could replace what the daemon relies on."""
    if path.stat().st_mode & 0o022:
        yield check(
            "state-dir", "warn", f"others may write to {path}: chmod go-w, or they can replace it"
        )
    else:
        yield check("state-dir", "ok", str(path))


def broken(disks: Mapping[str, str]) -> Iterator[Check]:
    """Disks whose configuration cannot be used."""
    for name, reason in disks.items():
        yield check("config", "fail", reason, name)


def processes(disk: Disk) -> Iterator[Check]:
    """Whether a disk's processes work."""
    for child in (disk.recorder, disk.curator):
        if disk.config.released:
            continue
        if child.state is State.READY:
            yield check(str(child.role), "ok", f"process {child.pid}", disk.name)
        else:
            reason = child.reason or str(child.state)
            yield check(str(child.role), "fail", f"{child.state}: {reason}", disk.name)


def description(disk: Disk, facts: Mapping[str, Any]) -> Iterator[Check]:
    """What the API's description of a disk says that should worry somebody."""
    if disk.config.released:
        message = "is released, nothing is captured: take it back with 'cdp disk resume'"
        yield check("capture", "warn", message, disk.name)
        return
    level = "ok" if facts["served"] else "fail"
    yield check("served", level, str(facts["reason"] or facts["state"]), disk.name)
    if facts["poisoned"]:
        message = "a sync of its journal failed: nothing is acknowledged; look at that device"
        yield check("journal-sync", "fail", message, disk.name)
    if facts["degraded"]:
        yield check("backing-sync", "fail", str(facts["reason"]), disk.name)
    if facts["lag_seconds"] > LAG_SECONDS_MAX:
        message = f"writes are not durable for {facts['lag_seconds']:.0f} s: the journal is slow"
        yield check("journal-lag", "warn", message, disk.name)
    limit = facts["journal_limit"]
    if limit and facts["journal_bytes"] > 0.95 * limit:
        message = f"its journal is at its limit; when full: {facts['overflow']}"
        yield check("journal-limit", "warn", message, disk.name)


def places(disk: Disk) -> Iterator[Check]:
    """Where the journal lies: it must be at least as safe as the backing."""
    journal, backing = Path(disk.config.journal), Path(disk.config.backing)
    try:
        facts = inspect(backing)
        if disk.backing.fd is None or is_at(backing, disk.backing.fd):
            yield check("backing", "ok", f"{backing}, {facts.size} bytes", disk.name)
        else:
            message = (
                f"{backing} was replaced: writes go to what had that name before; stop cdpd, put "
                "that back, or decide with 'cdp disk resume' after the next start"
            )
            yield check("backing", "fail", message, disk.name)
    except InvalidInput as error:
        yield check("backing", "fail", str(error), disk.name)
    try:
        numbers = os.statvfs(journal)
    except OSError as error:
        yield check("journal", "fail", f"{journal}: {error.strerror}", disk.name)
        return
    free = numbers.f_bavail / max(1, numbers.f_blocks)
    kind = _file_system(journal)
    if kind in _VOLATILE:
        message = f"{journal} lies on {kind}: a reboot deletes it, and with it newest writes"
        yield check("journal", "fail", message, disk.name)
    elif free < FREE_SHARE_MIN:
        message = f"the file system of {journal} has {free:.0%} free: make room, or lower the limit"
        yield check("journal", "warn", message, disk.name)
    else:
        yield check("journal", "ok", f"{journal}, {free:.0%} free", disk.name)


def _file_system(path: Path) -> str | None:
    """The type of the file system that holds `path`, by the longest mount point above it."""
    real = os.path.realpath(path)
    best, kind = "", None
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount_point, name, *_ = line.split(" ")
        mount_point = mount_point.encode().decode("unicode_escape")
        inside = real == mount_point or real.startswith(mount_point.rstrip("/") + "/")
        if inside and len(mount_point) >= len(best):
            best, kind = mount_point, name
    return kind
