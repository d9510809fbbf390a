"""The timeline's drawing, and the list of points."""

from __future__ import annotations

from typing import Any

import pytest

from cdp.cli.points import draw
from tests.cdp.cli.conftest import Cdp
from tests.cdp.cli.fake_api import NOW, FakeApi


def bucket(start: float, records: int = 0, size: int = 0, barriers: int = 0) -> dict[str, Any]:
    """Ten seconds of a timeline."""
    return {
        "start": start,
        "end": start + 10,
        "records": records,
        "bytes": size,
        "barriers": barriers,
        "first_seq": 0,
        "last_seq": 0,
    }


START = 1_763_987_400.0  # 2025-11-24 13:30:00 in Berlin


def timeline(**changes: Any) -> dict[str, Any]:
    """Eight times ten seconds."""
    sizes = [0, 1, 1 << 20, 2 << 20, 4 << 20, 0, 0, 1 << 20]
    buckets = [
        bucket(START + 10 * number, 1 if size else 0, size, number % 2)
        for number, size in enumerate(sizes)
    ]
    answer = {
        "disk": "disk0",
        "from": START,
        "to": START + 80,
        "window_start": START + 20.5,
        "window_start_seq": 17,
        "durable_seq": 99,
        "buckets": buckets,
        "bookmarks": [{"label": "b1", "seq": 40, "time": START + 45, "consistency": "filesystem"}],
        "gaps": [{"from": START + 55, "to": START + 69, "reason": "released"}],
        "pins": [{"id": "p", "seq": 40, "owner": "view v1", "time": START + 80}],
    }
    return {**answer, **changes}


def test_drawing() -> None:
    assert draw(timeline()) == [
        "disk0: 8 MiB in 5 records, 2025-11-24 13:30:00+01:00 to 2025-11-24 13:31:20+01:00",
        "         one column: 10 s; highest: 410 KiB/s",
        "writes       █",
        "             █",
        "            ██",
        "          ▁███  █",
        "barriers  ╵ ╵ ╵ ╵",
        "marks        ▲",
        "gaps          ░░",
        "pins            ◆",
        "openable   ━━━━━━",
        "every write openable since 2025-11-24 13:30:20.500+01:00 (seq:17), up to seq:99",
        "bookmark b1: seq:40, 2025-11-24 13:30:45.000+01:00, filesystem",
        "gap: 2025-11-24 13:30:55+01:00 to 2025-11-24 13:31:09+01:00: released",
    ]


def test_drawing_without_unicode() -> None:
    lines = draw(timeline(), unicode=False)
    assert "\n".join(lines).isascii()
    assert lines[2:5] == ["writes       @", "             @", "            @@"]


def test_drawing_of_little() -> None:
    nothing = timeline(buckets=[])
    assert draw(nothing) == ["disk0: nothing was written yet"]
    idle = timeline(bookmarks=[], gaps=[], pins=[], window_start=None)
    idle["buckets"] = [bucket(START + 10 * number) for number in range(8)]
    lines = draw(idle)
    assert lines[0].startswith("disk0: 0 B in 0 records")
    assert lines[2:] == ["writes", "", "", "", "barriers"]


def test_a_gap_that_is_not_over_reaches_to_the_end() -> None:
    lines = draw(timeline(gaps=[{"from": START - 100, "to": None, "reason": None}]))
    assert "gaps     ░░░░░░░░" in lines
    assert lines[-1].endswith("to now: no reason known")


def test_marks_outside_are_not_drawn() -> None:
    marks = [{"label": str(at), "seq": at, "time": START + at} for at in (-1, 200)]
    lines = draw(timeline(bookmarks=marks))
    assert "marks" in lines
    assert sum(line.startswith("bookmark ") for line in lines) == 2


def test_many_bookmarks_are_not_all_listed() -> None:
    marks = [{"label": f"b{at}", "seq": at, "time": START + at} for at in range(30)]
    lines = draw(timeline(bookmarks=marks))
    assert sum(line.startswith("bookmark ") for line in lines) == 20
    assert "and 10 older ones: cdp bookmark list disk0" in lines


def test_timeline(cdp: Cdp, api: FakeApi) -> None:
    api.answer("GET", "/v1/disks/disk0/timeline", timeline())
    ran = cdp("timeline", "disk0")
    assert ran.out == "\n".join(draw(timeline())) + "\n"
    assert "\x1b" not in ran.out
    assert api.calls[0].query == {"buckets": "90"}
    arguments = ["--from", "2025-11-24T12:00Z", "--to", "seq:9", "--buckets", "5"]
    assert cdp("timeline", "disk0", *arguments, "--json").json == timeline()
    assert api.calls[1].query == {"buckets": "5", "from": "@1763985600", "to": "seq:9"}


POINT = {"seq": 40, "time": NOW, "kind": "bookmark", "label": "b1", "records": 3, "bytes": 4096}
WRITE = {"seq": 41, "time": NOW + 0.25, "kind": "write", "label": None, "records": 1, "bytes": 512}


def test_points(cdp: Cdp, api: FakeApi) -> None:
    answer = {"disk": "disk0", "points": [POINT, WRITE]}
    api.answer("GET", "/v1/disks/disk0/points", answer)
    assert cdp("points", "disk0", "--from", "seq:1", "--to", "now").out == (
        "SEQ  TIME                           KIND      RECORDS  BYTES  LABEL\n"
        " 40  2025-11-24 13:30:15.500+01:00  bookmark        3  4 KiB  b1\n"
        " 41  2025-11-24 13:30:15.750+01:00  write           1  512 B\n"
    )
    assert api.calls[0].query == {"from": "seq:1", "to": "now", "limit": "200"}
    assert cdp("points", "disk0", "--limit", "5", "--json").json == answer
    assert api.calls[1].query == {"limit": "5"}
    api.answer("GET", "/v1/disks/disk0/points", {"disk": "disk0", "points": []})
    assert cdp("points", "disk0").err == "cdp: disk0 has no points there\n"


@pytest.mark.parametrize("count", [1, 7, 400])
def test_any_number_of_columns(count: int) -> None:
    buckets = [bucket(START + 10 * at, 1, at, 1) for at in range(count)]
    for line in draw(timeline(buckets=buckets)):
        if line.startswith(("writes", "barriers", "marks", "gaps", "openable")):
            assert len(line) <= 9 + count
