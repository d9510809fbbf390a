"""The demo is the first thing that a new user runs: it must hold, be quick, and leave nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS_MAX = 100
POLL_SECONDS = 0.02


# A demo whose ransomware does nothing: what it claims does not hold.
FALSE_DEMO = "import cdp.demo as d; d.Office.attack = lambda *_: None; raise SystemExit(d.main())"


def _start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    # The state directory of whoever runs the tests must not matter.
    environment = {**os.environ, "CDP_STATE_DIR": str(tmp_path / "not-this-one"), "TZ": "UTC"}
    return subprocess.Popen(
        [sys.executable, *(arguments or ("-m", "cdp.demo"))],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _scratch(output: str) -> Path:
    found = re.search(r"export CDP_STATE_DIR=(/tmp/cdp-demo-\S+)/state", output)
    assert found is not None, output
    return Path(found[1])


def _left_over(scratch: Path) -> list[str]:
    """Command lines of processes that name the scratch directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(scratch) in arguments:
                found.append(f"{entry.name}: {arguments!r}")
    return found


@pytest.mark.slow
def test_the_demo_holds_and_leaves_nothing(tmp_path: Path) -> None:
    with _start(tmp_path) as demo:
        try:
            output, errors = demo.communicate(timeout=SECONDS_MAX)
        finally:
            demo.terminate()  # no-op if it has ended; it cleans up after itself otherwise
    assert demo.returncode == 0, f"{output}\n{errors}"
    assert errors == ""
    assert "\x1b" not in output, "styled although it is no terminal"
    for line in (
        "ready",
        "$ cdp disk add disk0 ",
        "$ cdp bookmark add disk0 before-attack",
        "[ok] no file is left: 150 encrypted, 50 deleted",
        "$ cdp timeline disk0",
        "$ cdp view open disk0 --at before-attack",
        "$ cdp rollback disk0 --to before-attack --dry-run",
        "[ok] all 200 files are back",
        "[ok] every byte of the disk is as it was at before-attack",
        "[ok] every byte of the disk is as the attack left it",
        "[ok] every byte of the image is as the attack left it",
        "[ok] cdpd has stopped with status 0",
        "[ok] all 200 files are in backing.img",
    ):
        assert line in output
    assert re.search(r"\[ok\] demo: \d+ claims checked, all hold, in [0-9.]+ s\n$", output)
    scratch = _scratch(output)
    assert not scratch.exists()
    assert _left_over(scratch) == []
    assert not (tmp_path / "not-this-one").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_cleans_up(tmp_path: Path, number: signal.Signals) -> None:
    with _start(tmp_path) as demo:
        try:
            assert demo.stdout is not None
            said = ""
            for line in demo.stdout:
                said += line
                if "It is used" in line:
                    break
            demo.send_signal(number)
            rest, errors = demo.communicate(timeout=SECONDS_MAX)
        finally:
            demo.terminate()
    assert demo.returncode == 130, f"{said}{rest}\n{errors}"
    assert errors.endswith("demo: interrupted\n")
    scratch = _scratch(said)
    end = time.monotonic() + SECONDS_MAX
    while (left := _left_over(scratch)) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)  # the kernel has not taken away yet what was killed
    assert left == []
    assert not scratch.exists()


@pytest.mark.slow
def test_a_claim_that_does_not_hold_is_a_failure(tmp_path: Path) -> None:
    with _start(tmp_path, "-c", FALSE_DEMO) as demo:
        try:
            output, errors = demo.communicate(timeout=SECONDS_MAX)
        finally:
            demo.terminate()
    assert demo.returncode == 1, f"{output}\n{errors}"
    assert "demo: FAILED: this should hold and does not: no file is left" in errors
    scratch = _scratch(output)
    assert not scratch.exists()
    assert _left_over(scratch) == []
