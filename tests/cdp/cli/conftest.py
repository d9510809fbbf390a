"""Fixtures of the command line's tests: an API with canned answers, and a way to run commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cdp import units
from cdp.cli.main import run
from tests.cdp.cli.fake_api import FakeApi


@pytest.fixture(autouse=True)
def _berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test's local time, whatever the machine's."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    monkeypatch.delenv("CDP_STATE_DIR", raising=False)
    units.local_zone.cache_clear()
    yield
    units.local_zone.cache_clear()


@pytest.fixture
def api(short_tmp: Path) -> Iterator[FakeApi]:
    """A daemon's API in ``short_tmp``."""
    fake = FakeApi(short_tmp)
    yield fake
    fake.close()


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output, parsed."""
        assert self.status == 0, self.err
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """Its one line of complaint."""
        assert self.status != 0
        assert self.err.startswith("cdp: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        return self.err[5:-1]


class Cdp:
    """Runs `cdp --state-dir DIR ...` in this process."""

    def __init__(self, state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._state_dir, self._capsys = state_dir, capsys

    def __call__(self, *arguments: str) -> Ran:
        self._capsys.readouterr()
        status = run(["--state-dir", str(self._state_dir), *arguments])
        captured = self._capsys.readouterr()
        return Ran(status, captured.out, captured.err)


@pytest.fixture
def cdp(short_tmp: Path, capsys: pytest.CaptureFixture[str]) -> Cdp:
    """The program, for the state directory ``short_tmp``."""
    return Cdp(short_tmp, capsys)
