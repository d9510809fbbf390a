"""`cdp timeline` and `cdp points`: when something was written, and what can be asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated

import typer

from cdp import units
from cdp.cli.api_client import ApiClient, Json, client_of, path_of
from cdp.cli.options import AsJson, Disk, spec_option
from cdp.cli.output import Table, on_terminal, print_json, print_line, unicode_works, width
from cdp.cli.specs import canonical

CHART_ROWS = 4
MARGIN = 9  # columns to the left of the chart
BOOKMARKS_MAX = 20  # in the legend
POINTS_DEFAULT = 200

From = Annotated[str | None, spec_option("--from", "Begin there")]
To = Annotated[str | None, spec_option("--to", "End there")]


def _bounds(client: ApiClient, name: str, since: str | None, until: str | None) -> Json:
    return {
        "from": None if since is None else canonical(client, name, since),
        "to": None if until is None else canonical(client, name, until),
    }


# ------------------------------------------------------------------------------------------ points
def points(
    ctx: typer.Context,
    name: Disk,
    since: From = None,
    until: To = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = POINTS_DEFAULT,
    as_json: AsJson = False,
) -> None:
    """The points of a stretch of time, one a line: writes, barriers, bookmarks."""
    client = client_of(ctx)
    bounds = _bounds(client, name, since, until)
    answer = client.get(path_of("disks", name, "points"), **bounds, limit=limit)
    if as_json:
        print_json(answer)
        return
    table = Table([">SEQ", "TIME", "KIND", ">RECORDS", ">BYTES", "LABEL"])
    for point in answer["points"]:
        table.add(
            str(point["seq"]),
            units.format_time(point["time"], decimals=3),
            point["kind"],
            str(point.get("records", "-")),
            units.format_size(point.get("bytes") or 0),
            point.get("label") or "",
        )
    table.print(f"{name} has no points there")


# ---------------------------------------------------------------------------------------- timeline
def timeline(
    ctx: typer.Context,
    name: Disk,
    since: From = None,
    until: To = None,
    buckets: Annotated[
        int | None, typer.Option(min=1, max=2000, help="Columns; default: the terminal's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw when writes happened, and what of it can be opened."""
    client = client_of(ctx)
    columns = buckets or max(10, min(400, width() - MARGIN - 1))
    bounds = _bounds(client, name, since, until)
    answer = client.get(path_of("disks", name, "timeline"), buckets=columns, **bounds)
    if as_json:
        print_json(answer)
        return
    lines = draw({"disk": name, **answer}, unicode=unicode_works())
    for line in _coloured(lines) if on_terminal() and "NO_COLOR" not in os.environ else lines:
        print_line(line)


_COLOURS = {"writes": 36, "barriers": 90, "marks": 33, "gaps": 31, "pins": 35, "openable": 32}


def _coloured(lines: list[str]) -> Iterator[str]:
    """The rows of a drawing in their colours; the rest as it is."""
    colour = None
    for line in lines:
        # A row without a label goes on with the one above it.
        label = line[:MARGIN].strip()
        colour = _COLOURS.get(label) if label else colour
        yield line if colour is None else f"{line[:MARGIN]}\x1b[{colour}m{line[MARGIN:]}\x1b[0m"


def draw(answer: Json, *, unicode: bool = True) -> list[str]:
    """The lines of a timeline: a histogram of bytes written, and rows of marks under it.

    :param answer: as the API gives it; one column a bucket.
    :param unicode: False: only ASCII characters.
    """
    buckets = answer["buckets"]
    if not buckets:
        return [f"{answer['disk']}: nothing was written yet"]
    start, end = float(answer["from"]), float(answer["to"])
    levels = " ▁▂▃▄▅▆▇█" if unicode else " .:-=+*#@"
    heights = [int(bucket["bytes"]) for bucket in buckets]
    seconds = max(end - start, 1e-9) / len(buckets)
    top = max(heights)
    records = sum(int(bucket["records"]) for bucket in buckets)
    lines = [
        f"{answer['disk']}: {units.format_size(sum(heights))} in {records} records, "
        f"{units.format_time(start)} to {units.format_time(end)}",
        f"{'':{MARGIN}}one column: {units.format_duration(seconds)}; "
        f"highest: {units.format_size(top / seconds)}/s",
    ]
    for row in range(CHART_ROWS - 1, -1, -1):
        cells = "".join(levels[_eighths(height, top, row)] for height in heights)
        lines.append(_row("writes" if row == CHART_ROWS - 1 else "", cells))
    mark, gap, pin, reach = "▲░◆━" if unicode else "^x*="
    flush = "╵" if unicode else "'"
    lines.append(_row("barriers", "".join(flush if b["barriers"] else " " for b in buckets)))
    scale = _Scale(start, end, len(buckets))
    bookmarks, gaps = answer.get("bookmarks") or [], answer.get("gaps") or []
    pins = answer.get("pins") or []
    if bookmarks:
        lines.append(_row("marks", scale.marks([b["time"] for b in bookmarks], mark)))
    if gaps:
        spans = [(g["from"], end if g.get("to") is None else g["to"]) for g in gaps]
        lines.append(_row("gaps", scale.spans(spans, gap)))
    if any(p.get("time") is not None for p in pins):
        times = [p["time"] for p in pins if p.get("time") is not None]
        lines.append(_row("pins", scale.marks(times, pin)))
    if answer.get("window_start") is not None:
        lines.append(_row("openable", scale.spans([(answer["window_start"], end)], reach)))
    return [line.rstrip() for line in [*lines, *_legend(answer, bookmarks, gaps)]]


def _row(label: str, cells: str) -> str:
    return f"{label:<{MARGIN}}{cells}"


def _eighths(height: int, top: int, row: int) -> int:
    """How much of a chart's row a bar fills, 0-8; whatever was written shows at least one."""
    if not height:
        return 0
    filled = max(1, round(height * CHART_ROWS * 8 / top))
    return max(0, min(8, filled - row * 8))


class _Scale:
    """Columns of times; what lies outside is at the edge, or not there."""

    def __init__(self, start: float, end: float, columns: int) -> None:
        self._start, self._columns = start, columns
        self._per_second = columns / max(end - start, 1e-9)

    def _column(self, time: float) -> int:
        return int((float(time) - self._start) * self._per_second)

    def marks(self, times: list[float], symbol: str) -> str:
        cells = [" "] * self._columns
        for time in times:
            # The end itself belongs to the last column.
            column = min(self._column(time), self._columns - 1)
            if float(time) >= self._start and self._column(time) <= self._columns:
                cells[column] = symbol
        return "".join(cells)

    def spans(self, spans: list[tuple[float, float]], symbol: str) -> str:
        cells = [" "] * self._columns
        for first, last in spans:
            low = max(0, self._column(first))
            high = min(self._columns - 1, self._column(last))
            for column in range(low, high + 1):
                cells[column] = symbol
        return "".join(cells)


def _legend(answer: Json, bookmarks: list[Json], gaps: list[Json]) -> list[str]:
    lines = []
    if answer.get("window_start") is not None:
        lines.append(
            f"every write openable since {units.format_time(answer['window_start'], decimals=3)} "
            f"(seq:{answer['window_start_seq']}), up to seq:{answer['durable_seq']}"
        )
    for entry in bookmarks[-BOOKMARKS_MAX:]:
        lines.append(
            f"bookmark {entry['label']}: seq:{entry['seq']}, "
            f"{units.format_time(entry['time'], decimals=3)}, {entry.get('consistency', 'crash')}"
        )
    if len(bookmarks) > BOOKMARKS_MAX:
        older = len(bookmarks) - BOOKMARKS_MAX
        lines.append(f"and {older} older ones: cdp bookmark list {answer['disk']}")
    for entry in gaps:
        last = entry.get("to")
        until = "now" if last is None else units.format_time(last)
        reason = entry.get("reason") or "no reason known"
        lines.append(f"gap: {units.format_time(entry['from'])} to {until}: {reason}")
    return lines
