"""`cdp` commands against a running daemon, in the test's own process: a hundred cost seconds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from cdp import units
from cdp.cli.main import run

WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    status: int
    out: str
    err: str


class Commands:
    """Runs `cdp --state-dir DIR ...` as from a script: nobody is at the terminal."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def run(self, *arguments: str) -> Ran:
        """Any command, whatever becomes of it."""
        out, err = io.StringIO(), io.StringIO()
        units.local_zone.cache_clear()  # a test may have set TZ
        with (
            open(os.devnull) as nobody,
            mock.patch.object(sys, "stdin", nobody),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                status = run(["--state-dir", str(self.directory), *arguments])
            finally:
                units.local_zone.cache_clear()
        return Ran(status, out.getvalue(), err.getvalue())

    def __call__(self, *arguments: str) -> str:
        """A command that must succeed; what it printed."""
        ran = self.run(*arguments)
        assert ran.status == 0, (arguments, ran)
        return ran.out

    def json(self, *arguments: str) -> Any:
        """A command's ``--json``."""
        return json.loads(self(*arguments, "--json"))

    def refused(self, *arguments: str, says: str, status: int = 1) -> str:
        """A command that must fail with this status and one line that matches ``says``."""
        ran = self.run(*arguments)
        assert ran.status == status, (arguments, ran)
        assert ran.out == "", (arguments, ran)
        assert re.fullmatch(r"cdp: [^\n]+\n", ran.err), (arguments, ran)
        assert re.search(says, ran.err), (arguments, ran)
        return ran.err[5:-1]

    def disk(self, name: str) -> dict[str, Any]:
        """`cdp status` of one disk."""
        (found,) = self.json("status", name)["disks"]
        assert isinstance(found, dict)
        return found


def eventually(
    holds: Callable[[], object], what: str | Callable[[], object], seconds: float = WAIT_SECONDS
) -> Any:
    """Asks again and again until something holds that other processes bring about; its value."""
    deadline = time.monotonic() + seconds
    while True:
        found = holds()
        if found:
            return found
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.02)
