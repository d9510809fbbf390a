"""SPECs by property: what is written is read back, and a time is what a search by hand finds."""

from __future__ import annotations

import string
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from journal.errors import CdpError, InvalidInput, NotOpenable
from replay.target import (
    AtBookmark,
    AtSeq,
    AtTime,
    Bookmark,
    ClockTable,
    KeptPoint,
    check_label,
    format_spec,
    parse_spec,
    resolve,
)
from replay.when import AmbiguousTime, format_iso, parse_duration_ns

NOW_NS = 1_763_987_415_123_456_789
ZONES = ["UTC", "Europe/Berlin", "America/St_Johns", "Asia/Kathmandu", "Australia/Lord_Howe"]

zones: st.SearchStrategy[tzinfo] = st.one_of(
    st.sampled_from([ZoneInfo(name) for name in ZONES]),
    st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes))),
)
walls = st.integers(0, NOW_NS)


# ------------------------------------------------------------------------------------------- texts
@given(walls, zones, zones)
def test_iso_with_a_zone_is_exact_wherever_it_is_read(wall_ns: int, a: tzinfo, b: tzinfo) -> None:
    text = format_iso(wall_ns, a)
    assert parse_spec(text, now_ns=NOW_NS, zone=b) == AtTime(wall_ns)


@given(walls, zones)
def test_specs_are_read_back(wall_ns: int, zone: tzinfo) -> None:
    for spec in (AtTime(wall_ns), AtSeq(wall_ns), AtBookmark("x")):
        assert parse_spec(format_spec(spec), now_ns=NOW_NS, zone=zone) == spec


@given(walls, st.sampled_from([ZoneInfo(name) for name in ZONES]))
def test_a_local_time_is_found_or_its_candidates_are(wall_ns: int, zone: ZoneInfo) -> None:
    text = format_iso(wall_ns, zone)
    text = text[:-1] if text.endswith("Z") else text[:-6]  # the local time alone
    try:
        assert parse_spec(text, now_ns=NOW_NS, zone=zone) == AtTime(wall_ns)
    except AmbiguousTime as error:
        readings = [parse_spec(c, now_ns=NOW_NS, zone=UTC) for c in error.candidates]
        assert AtTime(wall_ns) in readings


@given(
    st.datetimes(datetime(1970, 1, 2), datetime(2025, 11, 23)), st.sampled_from(ZONES).map(ZoneInfo)
)
@example(datetime(2025, 3, 30, 2, 30), ZoneInfo("Europe/Berlin"))
@example(datetime(2025, 4, 6, 1, 45), ZoneInfo("Australia/Lord_Howe"))  # by half an hour
def test_a_skipped_or_repeated_local_time_is_never_guessed(
    moment: datetime, zone: ZoneInfo
) -> None:
    """Told by searching all the offsets that the zone has around the time."""
    offsets = {
        (moment + timedelta(hours=hours)).replace(tzinfo=zone).utcoffset() or timedelta(0)
        for hours in range(-30, 31)
    }
    exact = {
        utc
        for utc in ((moment - offset).replace(tzinfo=UTC) for offset in offsets)
        if utc.astimezone(zone).replace(tzinfo=None) == moment
    }
    try:
        spec = parse_spec(moment.isoformat(), now_ns=NOW_NS, zone=zone)
    except AmbiguousTime:
        assert len(exact) != 1
    else:
        assert isinstance(spec, AtTime)
        epoch = datetime(1970, 1, 1, tzinfo=UTC)
        assert {epoch + timedelta(microseconds=spec.wall_ns // 1000)} == exact


@given(st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=64), zones)
@example("noon", UTC)
@example("2pm", UTC)
def test_a_label_that_is_allowed_can_be_used_bare(label: str, zone: tzinfo) -> None:
    try:
        check_label(label)
    except InvalidInput:
        return
    spec = parse_spec(label, now_ns=NOW_NS, zone=zone)
    assert isinstance(spec, AtBookmark)
    assert spec.label == label
    assert parse_spec(f"bookmark:{label}", now_ns=NOW_NS, zone=zone) == AtBookmark(label)


WORDS = ["now", "ago", "yesterday", "2pm", "14:00", "march", "monday", "5", "31", "2025-11-23"]
WORDS += ["@", "seq:", "-10m", "T10:00", "1.5", "days", "utc", "at", "12/11/2025", " ", ",", "an"]


@given(st.one_of(st.text(max_size=210), st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join)))
def test_any_text_is_understood_or_refused_in_one_line(text: str) -> None:
    try:
        spec = parse_spec(text, now_ns=NOW_NS, zone=ZoneInfo("Europe/Berlin"))
    except CdpError as error:
        spec, kind, message = None, error.kind, str(error)
    if spec is None:
        assert kind == "invalid"
        assert message.isprintable()
    elif isinstance(spec, AtTime):
        assert 0 <= spec.wall_ns <= NOW_NS


@given(st.lists(st.integers(0, 999), min_size=8, max_size=8))
def test_durations_add_up(counts: list[int]) -> None:
    units = {"w": 7 * 86_400, "d": 86_400, "h": 3_600, "m": 60, "s": 1}
    parts = dict(zip([*units, "ms", "us", "ns"], counts, strict=True))
    text = "".join(f"{count}{unit}" for unit, count in parts.items() if count)
    assume(text)
    seconds = sum(parts[unit] * length for unit, length in units.items())
    small = parts["ms"] * 10**6 + parts["us"] * 10**3 + parts["ns"]
    assert parse_duration_ns(text) == seconds * 10**9 + small


# ------------------------------------------------------------------------------------------- clocks
@st.composite
def clock_tables(draw: st.DrawFn, *, forward_only: bool = False) -> list[tuple[int, int]]:
    steps = draw(st.lists(st.integers(1, 40), max_size=5))
    jumps = st.integers(0, 40) if forward_only else st.integers(-40, 40)
    table, stamp, offset = [(0, draw(st.integers(-20, 20)))], 0, 0
    for step in steps:
        stamp += step
        offset = table[-1][1] + draw(jumps)
        table.append((stamp, offset))
    return table


@given(clock_tables(), st.integers(0, 250))
def test_a_stamp_is_among_those_at_its_wall_time(table: list[tuple[int, int]], stamp: int) -> None:
    clock = ClockTable(table)
    assert stamp in clock.stamps_at(clock.wall_of(stamp))


@given(clock_tables(), st.integers(-100, 400))
def test_all_stamps_of_a_wall_time_are_found(table: list[tuple[int, int]], wall: int) -> None:
    clock = ClockTable(table)
    shown = [stamp for stamp in range(-500, 900) if clock.wall_of(stamp) == wall]
    found = clock.stamps_at(wall)
    assert found == sorted(set(found))
    if shown:
        assert found == shown
    else:
        assert found == [
            stamp
            for stamp in range(-500, 900)
            if clock.wall_of(stamp) < wall < clock.wall_of(stamp + 1)
        ]


# -------------------------------------------------------------------------------------- resolution
@dataclass
class ListedTimeline:
    """A timeline with every list written out; the records are stamped ``stamps``, from seq 1."""

    stamps: list[int]
    table: list[tuple[int, int]]
    openable: set[int]

    def __post_init__(self) -> None:
        self.durable_seq = len(self.stamps)
        self.clock = ClockTable(self.table)
        self.bookmarks: Mapping[str, Bookmark] = {}
        # Isolated seqs become kept points, runs become ranges.
        self.openable_ranges: Sequence[tuple[int, int]] = []
        self.kept_points: Sequence[KeptPoint] = []
        runs: list[list[int]] = []
        for seq in sorted(self.openable):
            if runs and runs[-1][-1] == seq - 1:
                runs[-1].append(seq)
            else:
                runs.append([seq])
        self.openable_ranges = [(run[0], run[-1]) for run in runs if len(run) > 1]
        self.kept_points = [
            KeptPoint(run[0], self.stamp_of(run[0]), self.stamp_of(run[0]))
            for run in runs
            if len(run) == 1
        ]
        self.window_start_seq = self.openable_ranges[-1][0] if self.openable_ranges else None

    def seq_at_stamp(self, stamp_ns: int) -> int | None:
        return bisect_right(self.stamps, stamp_ns)

    def stamp_of(self, seq: int) -> int:
        return self.stamps[seq - 1] if seq else -1


stamps = st.lists(st.integers(0, 200), min_size=1, max_size=20).map(sorted)


@given(stamps, clock_tables(forward_only=True), st.integers(-50, 500))
def test_a_time_is_the_last_write_at_or_before_it(
    stamps: list[int], table: list[tuple[int, int]], wall: int
) -> None:
    timeline = ListedTimeline(stamps, table, set(range(len(stamps) + 1)))
    expected = sum(1 for stamp in stamps if timeline.clock.wall_of(stamp) <= wall)
    assert resolve(AtTime(wall), timeline).seq == expected


@given(stamps, clock_tables(), st.integers(-50, 500))
def test_a_time_is_unambiguous_or_refused_with_what_it_can_mean(
    stamps: list[int], table: list[tuple[int, int]], wall: int
) -> None:
    timeline = ListedTimeline(stamps, table, set(range(len(stamps) + 1)))
    meanings = {bisect_right(stamps, stamp) for stamp in timeline.clock.stamps_at(wall)}
    if len(meanings) == 1:
        assert {resolve(AtTime(wall), timeline).seq} == meanings
        return
    with pytest.raises(AmbiguousTime) as caught:
        resolve(AtTime(wall), timeline)
    assert caught.value.candidates == tuple(f"seq:{seq}" for seq in sorted(meanings))


@given(stamps, st.data())
def test_only_openable_points_are_given_and_the_neighbours_are_named(
    stamps: list[int], data: st.DataObject
) -> None:
    openable = data.draw(st.sets(st.integers(0, len(stamps))))
    seq = data.draw(st.integers(0, len(stamps) + 2))
    timeline = ListedTimeline(stamps, [(0, 0)], openable)
    if seq in openable:
        assert resolve(AtSeq(seq), timeline).seq == seq
        return
    with pytest.raises(NotOpenable) as caught:
        resolve(AtSeq(seq), timeline)
    message = str(caught.value)
    assert message.isprintable()
    before, after = [s for s in openable if s < seq], [s for s in openable if s > seq]
    assert ("nearest before" in message) == bool(before)
    assert ("nearest after" in message) == bool(after)
    if before:
        assert f"nearest before: seq:{max(before)} (" in message
    if after:
        assert f"nearest after: seq:{min(after)} (" in message
