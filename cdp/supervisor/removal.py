"""Ending the protection of a disk: its history is deleted, its content stays.

The configuration is renamed to a marker first, durably. From then on the disk is none, and whatever
interrupts the rest, the next start finishes it. Only what a journal consists of is deleted: the
directory may have been the administrator's.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Final

from cdp.child import frontier_path
from cdp.config import DISK_FILE, DiskConfig, read_json, sync_directory

log = logging.getLogger(__name__)

MARKER: Final = "removing.json"
PURGE: Final = "removing.purge"
_JOURNAL_DIRECTORIES: Final = ("redo", "undo", "index")
_JOURNAL_FILES: Final = ("catalog.*", "reserve", "reserve.*")
_OWN_FILES: Final = (
    "*.sock",
    "*.lock",
    "frontier",
    "*.new",
    "held.json",
    "network-client",
    "scrub.json",
)


def mark(directory: Path, *, purge: bool) -> None:
    """From here on the disk is being removed, durably. `purge`: with its own backing file."""
    if purge:
        (directory / PURGE).touch()
        sync_directory(directory)
    os.rename(directory / DISK_FILE, directory / MARKER)
    sync_directory(directory)


def is_marked(directory: Path) -> bool:
    """Whether a removal was begun."""
    return (directory / MARKER).exists()


def finish(directory: Path) -> None:
    """Deletes what is left of a marked disk. May be repeated. OSError when something resists."""
    config = read_json(directory / MARKER, DiskConfig)
    journal = Path(config.journal)
    for name in _JOURNAL_DIRECTORIES:
        if (journal / name).is_dir():
            shutil.rmtree(journal / name)
    for pattern in _JOURNAL_FILES:
        _unlink_all(journal, pattern)
    _remove_if_empty(journal)
    frontier_path(directory, config).unlink(missing_ok=True)
    if (directory / PURGE).exists() and config.backing_is_own:
        Path(config.backing).unlink(missing_ok=True)
    for pattern in _OWN_FILES:
        _unlink_all(directory, pattern)
    (directory / PURGE).unlink(missing_ok=True)
    (directory / MARKER).unlink()
    sync_directory(directory)
    _remove_if_empty(directory)


def _unlink_all(directory: Path, pattern: str) -> None:
    for path in directory.glob(pattern):
        path.unlink(missing_ok=True)


def _remove_if_empty(directory: Path) -> None:
    """A directory that still holds something of somebody stays, and is named."""
    try:
        directory.rmdir()
        sync_directory(directory.parent)
    except FileNotFoundError:
        pass
    except OSError:
        left = ", ".join(sorted(path.name for path in directory.iterdir())[:5])
        log.info("%s stays: it holds %s", directory, left)
