"""What the commands print: tables, progress, questions, errors.

On a terminal tables and bars are drawn by rich; elsewhere a table is aligned text that ``awk`` can
read, and there is no bar. Data goes to stdout, everything about it to stderr.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from journal.errors import CdpError


class CliError(CdpError):
    """What was asked for cannot be done; one line that says what to do instead."""

    kind = "invalid"


def on_terminal() -> bool:
    """Whether a person reads stdout."""
    return sys.stdout.isatty()


def width() -> int:
    """Columns that there are to write in."""
    return shutil.get_terminal_size((100, 24)).columns if on_terminal() else 100


def unicode_works() -> bool:
    """Whether stdout can show block characters."""
    try:
        "▁█━".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def print_line(text: str = "") -> None:
    """One line of the answer."""
    sys.stdout.write(text + "\n")


def print_json(value: Any) -> None:
    """The answer as JSON."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def note(text: str) -> None:
    """A line about the answer, for whoever reads along."""
    sys.stdout.flush()
    sys.stderr.write(f"cdp: {' '.join(text.split())}\n")


# ------------------------------------------------------------------------------------------ tables
@dataclass
class Table:
    """Rows under titles. A title that begins with ``>`` is aligned to the right (without it)."""

    titles: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """One more row."""
        assert len(cells) == len(self.titles)
        self.rows.append(cells)

    def print(self, empty: str) -> None:
        """The table; ``empty`` on stderr when it has no rows."""
        if not self.rows:
            note(empty)
        elif on_terminal():
            self._print_rich()
        else:
            sys.stdout.write(self.plain())

    def _print_rich(self) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for title in self.titles:
            justify: Any = "right" if title.startswith(">") else "left"
            table.add_column(title.removeprefix(">"), justify=justify, overflow="fold")
        for row in self.rows:
            # Text, since names come from outside and must not be taken for markup.
            table.add_row(*(Text(cell) for cell in row))
        Console(highlight=False).print(table)

    def plain(self) -> str:
        """Aligned text, two spaces between columns; no trailing blanks."""
        right = [title.startswith(">") for title in self.titles]
        lines = [[title.removeprefix(">") for title in self.titles], *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(right))]
        text = ""
        for line in lines:
            cells = [
                cell.rjust(size) if flush else cell.ljust(size)
                for cell, size, flush in zip(line, widths, right, strict=True)
            ]
            text += "  ".join(cells).rstrip() + "\n"
        return text


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Names and values, one pair a line, aligned."""
    size = max(len(name) for name, _ in fields) + 2
    for name, value in fields:
        print_line(f"{name:<{size}}{value}")


# --------------------------------------------------------------------------------------- questions
def confirm(question: str) -> None:
    """Ask the person at the terminal; return if the answer is yes.

    :raises CliError: the answer is no.
    """
    sys.stdout.flush()
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise CliError("nothing was changed")


# ---------------------------------------------------------------------------------------- progress
@contextmanager
def progress(title: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on stderr while the block runs, if that is a terminal; nothing elsewhere.

    Yields a function that takes reports: ``phase`` (str), ``done`` and ``total`` (numbers; a total
    of 0 or None is unknown), ``unit`` (``bytes`` or the name of what is counted).
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from cdp.units import format_size

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )
    phases: dict[str, Any] = {}

    def update(report: dict[str, Any]) -> None:
        phase, unit = str(report.get("phase") or title), str(report.get("unit") or "")
        done, total = report.get("done") or 0, report.get("total") or None
        amount = format_size(done) if unit == "bytes" else f"{done:,} {unit}"
        if total:
            amount += f" of {format_size(total)}" if unit == "bytes" else f" of {total:,}"
        if phase not in phases:
            phases[phase] = bar.add_task(f"{title}: {phase}", total=total, amount=amount)
        bar.update(phases[phase], completed=done, total=total, amount=amount)

    with bar:
        yield update
