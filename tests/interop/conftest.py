"""The daemon for a test: one scratch state directory, everything ended and removed afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.daemon import Daemon


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[Daemon]:
    """A running `cdpd`."""
    with Daemon(short_tmp / "state") as running:
        yield running


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """A running `cdpd` for all tests of a module, which use disks of their own."""
    place = Path(tempfile.mkdtemp(prefix="cdp-", dir="/tmp"))
    try:
        with Daemon(place / "state") as running:
            yield running
    finally:
        shutil.rmtree(place, ignore_errors=True)
