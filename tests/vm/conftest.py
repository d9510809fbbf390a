"""`boot(script, ...)`: a guest runs a script; see guest.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.vm import guest


@pytest.fixture
def boot(tmp_path: Path, not_here: Callable[[str], NoReturn]) -> guest.Boot:
    def run(script: str, **options: Any) -> guest.GuestRun:
        try:
            return guest.run(script, folder=tmp_path, **options)
        except guest.GuestUnavailable as error:
            not_here(str(error))

    return run
