"""Rows of a measurement: what was reached, what it must reach, PASS or miss; and the machine.

Every row is printed with the load average of its moment. A row whose load is far above the others'
says something about the machine, not about the program.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

# Programs that are compared with or measured through, and the Debian packages that have them.
PACKAGES = {"fio": "fio", "qemu-nbd": "qemu-utils", "nbdkit": "nbdkit"}


@dataclass(frozen=True, slots=True)
class Row:
    """One result. ``verdict``: PASS, miss, void (the run proves nothing), or empty: no target."""

    what: str
    reached: str
    target: str
    verdict: str
    detail: str
    load: float


class Report:
    """Prints rows as they come; keeps them for whoever put several measurements together."""

    def __init__(self, title: str, rows_file: Path | None) -> None:
        self.rows: list[Row] = []
        self._file = rows_file
        print(f"# {title}", flush=True)

    def say(self, text: str) -> None:
        """A line that is no result."""
        print(text, flush=True)

    def at_least(
        self, what: str, value: float, least: float, unit: str = "", *, detail: str = ""
    ) -> None:
        """A row that passes from ``least`` upwards."""
        self._add(what, value, f">= {number(least)}{unit}", value >= least, unit, detail)

    def at_most(
        self, what: str, value: float, most: float, unit: str = "", *, detail: str = ""
    ) -> None:
        """A row that passes up to ``most``."""
        self._add(what, value, f"<= {number(most)}{unit}", value <= most, unit, detail)

    def void(self, what: str, why: str) -> None:
        """A row that could not be measured."""
        self._keep(Row(what, "-", "", "void", why, os.getloadavg()[0]))

    def _add(
        self, what: str, value: float, target: str, passed: bool, unit: str, detail: str
    ) -> None:
        verdict = "PASS" if passed else "miss"
        self._keep(Row(what, f"{number(value)}{unit}", target, verdict, detail, os.getloadavg()[0]))

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        detail = f"; {row.detail}" if row.detail else ""
        target = f" ({row.target})" if row.target else ""
        print(
            f"{row.verdict}  {row.what}: {row.reached}{target}{detail}; load {row.load:.2f}",
            flush=True,
        )
        if self._file is not None:
            self._file.write_text(json.dumps([asdict(each) for each in self.rows]))


def number(value: float) -> str:
    """Three digits that count, thousands apart."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| what | reached | target | | load |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.what} | {row.reached} | {row.target} | {row.verdict} | {row.load:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ the machine
def require(*programs: str) -> None:
    """End with one line when a program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        packages = " ".join(sorted({PACKAGES[program] for program in missing}))
        raise SystemExit(
            f"bench: {', '.join(missing)} not found; on Debian: apt-get install {packages}"
        )
    if "fio" in programs and "\tnbd" not in _said("fio", "--enghelp"):
        raise SystemExit("bench: this fio has no nbd engine; use one that was built with libnbd")


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def machine(directory: Path) -> str:
    """What the numbers depend on, a few lines."""
    processor = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    versions = [
        (_said(program, "--version").splitlines() or [""])[0]
        for program in PACKAGES
        if shutil.which(program)
    ]
    return (
        f"{os.cpu_count()} x {processor}, {memory} GiB, Linux {platform.release()}, "
        f"{_file_system(directory)}, Python {platform.python_version()}\n{', '.join(versions)}; "
        f"load {' '.join(f'{each:.2f}' for each in os.getloadavg())}"
    )


def _file_system(directory: Path) -> str:
    done = _said("stat", "--file-system", "--format=%T", str(directory)).strip()
    return f"{done} (its syncs cost nothing: misleading)" if done == "tmpfs" else done


# --------------------------------------------------------------------------------- command lines
def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the options that all measurements have."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n", maxsplit=1)[0])
    made.add_argument(
        "--directory", type=Path, help="where scratch files are made and removed (default: TMPDIR)"
    )
    made.add_argument("--rows", type=Path, help="a file that receives the rows as JSON")
    return made


@contextmanager
def scratch(directory: Path | None) -> Iterator[Path]:
    """A new directory, removed in the end. Its path is short: sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="cdp-bench-", dir=directory) as name:
        path = Path(name)
        if len(str(path / "state" / "control.sock")) > 100:
            raise SystemExit(f"bench: {path} is too long a path for sockets: use --directory")
        yield path
