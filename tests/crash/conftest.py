"""What the crash tests have in common."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.curator_model import World


@pytest.fixture
def roots(tmp_path: Path) -> Iterator[Iterator[Path]]:
    """New directories; in memory if possible, for LMDB syncs what it writes."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    root = Path(tempfile.mkdtemp(prefix="cdp-crash-", dir=memory if usable else tmp_path))

    def directories() -> Iterator[Path]:
        for number in itertools.count():
            path = root / str(number)
            path.mkdir()
            yield path
            shutil.rmtree(path)

    try:
        yield directories()
    finally:
        shutil.rmtree(root)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A new disk, with a recorder and a curator."""
    return World(tmp_path, 1)
