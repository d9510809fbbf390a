"""SPECs by example: what each text means, what is refused, and what the refusal offers instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest

from journal.errors import CdpError, InvalidInput, NotFound, NotOpenable
from replay.target import (
    AtBookmark,
    AtSeq,
    AtTime,
    Bookmark,
    ClockTable,
    KeptPoint,
    Now,
    Point,
    Spec,
    check_label,
    format_spec,
    parse_spec,
    resolve,
)
from replay.when import AmbiguousTime, InvalidTime, format_iso, format_unix, parse_duration_ns

NS = 1_000_000_000
BERLIN = ZoneInfo("Europe/Berlin")
# A Monday, 13:30:15.123456789 in Berlin.
NOW = datetime(2025, 11, 24, 12, 30, 15, tzinfo=UTC)
NOW_NS = int(NOW.timestamp()) * NS + 123_456_789


def ns(text: str, fraction_ns: int = 0) -> int:
    """Nanoseconds of an ISO time that names its zone."""
    return round(datetime.fromisoformat(text).timestamp()) * NS + fraction_ns


def parse(text: str, now_ns: int = NOW_NS, zone: ZoneInfo = BERLIN) -> Spec:
    return parse_spec(text, now_ns=now_ns, zone=zone)


# ------------------------------------------------------------------------------------ strict forms
STRICT: list[tuple[str, Spec]] = [
    ("now", Now()),
    (" NOW ", Now()),
    ("seq:0", AtSeq(0)),
    ("seq:4711", AtSeq(4711)),
    ("seq:9223372036854775807", AtSeq((1 << 63) - 1)),
    ("bookmark:nightly", AtBookmark("nightly")),
    ("bookmark:5", AtBookmark("5")),
    ("bookmark:noon", AtBookmark("noon")),
    ("@1763892000", AtTime(1_763_892_000 * NS)),
    ("@1763892000.5", AtTime(1_763_892_000_500_000_000)),
    # As a float this would be ...000000238 away.
    ("@1763892000.123456789", AtTime(1_763_892_000_123_456_789)),
    ("@0", AtTime(0)),
    ("-10m", AtTime(NOW_NS - 600 * NS)),
    ("-10min", AtTime(NOW_NS - 600 * NS)),
    ("-1h30m", AtTime(NOW_NS - 5400 * NS)),
    ("-2d", AtTime(NOW_NS - 2 * 86_400 * NS)),
    ("-1w", AtTime(NOW_NS - 7 * 86_400 * NS)),
    ("-1.5h", AtTime(NOW_NS - 5400 * NS)),
    ("-0.000000001s", AtTime(NOW_NS - 1)),
    ("-1d2h3m4s5ms6us7ns", AtTime(NOW_NS - 93_784_005_006_007)),
    ("-0s", AtTime(NOW_NS)),
    ("2025-11-23", AtTime(ns("2025-11-23T00:00+01:00"))),
    ("2025-11-23T10", AtTime(ns("2025-11-23T10:00+01:00"))),
    ("2025-11-23T10:00", AtTime(ns("2025-11-23T10:00+01:00"))),
    ("2025-11-23 10:00", AtTime(ns("2025-11-23T10:00+01:00"))),
    ("2025-11-23T10:00:05", AtTime(ns("2025-11-23T10:00:05+01:00"))),
    ("2025-11-23T10:00:05.25", AtTime(ns("2025-11-23T10:00:05+01:00", 250_000_000))),
    ("2025-11-23T10:00:05,25", AtTime(ns("2025-11-23T10:00:05+01:00", 250_000_000))),
    ("2025-11-23T10:00:05.123456789Z", AtTime(ns("2025-11-23T10:00:05+00:00", 123_456_789))),
    ("2025-11-23T10:00Z", AtTime(ns("2025-11-23T10:00+00:00"))),
    ("2025-11-23 10:00 UTC", AtTime(ns("2025-11-23T10:00+00:00"))),
    ("2025-11-23T10:00+05:30", AtTime(ns("2025-11-23T10:00+05:30"))),
    ("2025-11-23T10:00-0800", AtTime(ns("2025-11-23T10:00-08:00"))),
    ("2025-11-23T10:00 +02", AtTime(ns("2025-11-23T10:00+02:00"))),
    # Summer time, an hour more.
    ("2025-07-01T10:00", AtTime(ns("2025-07-01T10:00+02:00"))),
]


@pytest.mark.parametrize(("text", "spec"), STRICT)
def test_strict_form(text: str, spec: Spec) -> None:
    assert parse(text) == spec


REFUSED: list[tuple[str, str]] = [
    ("", "no point in time"),
    ("seq:", "record's number"),
    ("seq:-1", "record's number"),
    ("seq:1.5", "record's number"),
    ("seq:٣", "record's number"),
    ("seq:9223372036854775808", "no record has"),
    ("seq:99999999999999999999", "record's number"),
    ("bookmark:", "bookmark's label"),
    ("bookmark:a b", "bookmark's label"),
    ("@", "UNIX seconds"),
    ("@-5", "UNIX seconds"),
    ("@1e9", "UNIX seconds"),
    ("@1763892000.1234567891", "finer than a nanosecond"),
    ("@1863892000", "in the future"),
    ("@1763987415.123456790", "in the future"),  # by one nanosecond
    ("-", "as in -10m"),
    ("-10x", "no duration"),
    ("-30m1h", "from large to small"),
    ("-1m1m", "from large to small"),
    ("-0.0000000001s", "finer than a nanosecond"),
    ("-100000d", "before 1970"),
    ("1969-12-31", "before 1970"),
    ("2025-11-25", "in the future"),
    ("2025-11-24T13:31", "in the future"),
    ("2025-02-29", "there is no time"),
    ("2025-13-01", "there is no time"),
    ("2025-11-23T24:00", "there is no time"),
    ("2025-11-23T10:60", "there is no time"),
    ("2025-11-23T10:00:60", "there is no time"),
    ("2025-11-23T10:00+25:00", "there is no zone"),
    ("2025-11-23T10:00:05.1234567891", "finer than a nanosecond"),
    ("0001-01-01", "too far away"),
    ("2025-11-23 10:00 CET", "no point in time"),  # abbreviations of zones are not unique
    ("x" * 201, "at most 200"),
    ("in 5 min", "no point in time"),
    ("tomorrow 10:00", "no point in time"),
    ("next week", "no point in time"),
    ("gestern 10:00", "no point in time"),
    ("a/b", "no point in time"),
    ("a\nb", "no point in time"),
    ("5 10:00", "no point in time"),
    ("5 march 25 14:00", "no point in time"),
    ("3 weeks ago monday", "no point in time"),
    ("10 min", "no point in time"),  # before or after now?
    ("yesterday evening", "no point in time"),
    ("last week", "no point in time"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.kind == "invalid"


# ------------------------------------------------------------------------------------ human times
HUMAN: list[tuple[str, str]] = [
    ("yesterday 14:00", "2025-11-23T14:00+01:00"),
    ("Yesterday at 2PM", "2025-11-23T14:00+01:00"),
    ("yesterday 2:30 pm", "2025-11-23T14:30+01:00"),
    ("yesterday, 12am", "2025-11-23T00:00+01:00"),
    ("yesterday noon", "2025-11-23T12:00+01:00"),
    ("10:00 yesterday", "2025-11-23T10:00+01:00"),
    ("10:00 on 5 march", "2025-03-05T10:00+01:00"),
    ("yesterday  14:00:05", "2025-11-23T14:00:05+01:00"),
    ("yesterday 14:00 utc", "2025-11-23T14:00+00:00"),
    ("the day before yesterday 10:00", "2025-11-22T10:00+01:00"),
    ("day before yesterday 10:00", "2025-11-22T10:00+01:00"),
    ("today 9:30", "2025-11-24T09:30+01:00"),
    ("9:30", "2025-11-24T09:30+01:00"),
    ("at 9:30", "2025-11-24T09:30+01:00"),
    ("sunday 10:00", "2025-11-23T10:00+01:00"),
    ("on tue 10:00", "2025-11-18T10:00+01:00"),
    ("2 days ago 14:00", "2025-11-22T14:00+01:00"),
    ("2 days ago at 14:00", "2025-11-22T14:00+01:00"),
    ("14:00 a week ago", "2025-11-17T14:00+01:00"),
    ("5 march 14:00", "2025-03-05T14:00+01:00"),
    ("5th of march 14:00", "2025-03-05T14:00+01:00"),
    ("5 dec 14:00", "2024-12-05T14:00+01:00"),  # the last one there was
    ("march 5 2024 2pm", "2024-03-05T14:00+01:00"),
    ("sept 1st, 2025 10:00", "2025-09-01T10:00+02:00"),
    ("29 feb 10:00", "2024-02-29T10:00+01:00"),
    ("25/12/2024 10:00", "2024-12-25T10:00+01:00"),
    ("12/25/2024 10:00", "2024-12-25T10:00+01:00"),
    ("25.12.2024 10:00", "2024-12-25T10:00+01:00"),
    ("11/11/2025 10:00", "2025-11-11T10:00+01:00"),
]


@pytest.mark.parametrize(("text", "moment"), HUMAN)
def test_human_time(text: str, moment: str) -> None:
    assert parse(text) == AtTime(ns(moment))


AGO: list[tuple[str, timedelta]] = [
    ("10 min ago", timedelta(minutes=10)),
    ("10 minutes ago", timedelta(minutes=10)),
    ("a minute ago", timedelta(minutes=1)),
    ("an hour ago", timedelta(hours=1)),
    ("1 hour 30 minutes ago", timedelta(minutes=90)),
    ("1 hour and 30 minutes ago", timedelta(minutes=90)),
    ("1 hour, 30 min ago", timedelta(minutes=90)),
    ("2h 5m ago", timedelta(minutes=125)),
    ("1 day ago", timedelta(days=1)),
    ("3 weeks ago", timedelta(weeks=3)),
    ("90 secs ago", timedelta(seconds=90)),
]


@pytest.mark.parametrize(("text", "ago"), AGO)
def test_elapsed_time_is_exact(text: str, ago: timedelta) -> None:
    assert parse(text) == AtTime(NOW_NS - ago // timedelta(microseconds=1) * 1_000)


def test_a_day_ago_is_24_hours_also_across_a_change_of_clocks() -> None:
    now = ns("2025-10-26T12:00+01:00")
    assert parse("1 day ago", now) == AtTime(ns("2025-10-25T13:00+02:00"))
    assert parse("1 day ago 12:00", now) == AtTime(ns("2025-10-25T12:00+02:00"))


def test_months_ago_keep_the_time_of_day() -> None:
    now = ns("2025-11-24T13:30:15+01:00", 123_456_000)
    assert parse("2 months ago", now) == AtTime(ns("2025-09-24T13:30:15+02:00", 123_456_000))
    assert parse("a year ago", now) == AtTime(ns("2024-11-24T13:30:15+01:00", 123_456_000))


INCOMPLETE: list[tuple[str, str]] = [
    ("2 days ago 25:00", "no such time of day"),
    ("yesterday 25:00", "no such time of day"),
    ("yesterday 14:30 pm", "no 14 pm"),
    ("yesterday 0:30 am", "no 0 am"),
    ("monday 10:00", "that is today"),  # today is a monday
    ("12/11/2025 10:00", "2025-11-12 or 2025-12-11"),
    ("30 feb 10:00", "no such day"),
    ("31 june 2025 10:00", "no such day"),
    ("29 feb 2025 10:00", "no such day"),
    ("5 march", "a whole day"),
    ("day before yesterday", "a whole day"),
    ("14:00", "in the future"),
    ("today 23:59", "in the future"),
]


@pytest.mark.parametrize(("text", "message"), INCOMPLETE)
def test_human_times_are_not_guessed(text: str, message: str) -> None:
    with pytest.raises(InvalidTime, match=message):
        parse(text)


def test_a_month_without_that_day_is_refused() -> None:
    with pytest.raises(InvalidTime, match="no day 31"):
        parse("1 month ago", ns("2025-03-31T12:00+02:00"))


# ------------------------------------------------------------------------------------------ labels
PLAIN = ["nightly", "before-upgrade-2", "5", "2024", "10m", "v1.2", "may", "a" * 64, "Q3_close"]
PLAIN += ["20251123T100000", "2025-11-23-nightly", "may-5", "before-2pm", "10min", "12.25.2024"]


@pytest.mark.parametrize("label", PLAIN)
def test_label_is_no_time(label: str) -> None:
    check_label(label)
    spec = parse(label)
    assert isinstance(spec, AtBookmark)
    assert (spec.label, spec.otherwise) == (label, None)


@pytest.mark.parametrize(
    ("word", "moment"), [("noon", "12:00"), ("2am", "02:00"), ("9AM", "09:00")]
)
def test_a_word_that_is_a_time_is_a_bookmark_first(word: str, moment: str) -> None:
    check_label(word)
    assert parse(word) == AtBookmark(word, AtTime(ns(f"2025-11-24T{moment}+01:00")))


@pytest.mark.parametrize(
    ("word", "hint"),
    [("yesterday", "whole day"), ("monday", "whole day"), ("5pm", "in the future")],
)
def test_a_word_that_is_nearly_a_time_is_a_bookmark_with_a_hint(word: str, hint: str) -> None:
    check_label(word)
    spec = parse(word)
    assert isinstance(spec, AtBookmark)
    assert spec.otherwise is None
    assert spec.hint is not None
    assert hint in spec.hint


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("", "1 to 64"),
        ("a" * 65, "65 characters"),
        ("a b", "use letters"),
        ("a:b", "use letters"),
        ("seq:5", "use letters"),
        ("a/b", "use letters"),
        ("a@b", "use letters"),
        ("grün", "use letters"),
        ("-10m", "begin with"),
        (".hidden", "begin with"),
        ("a\n", "use letters"),
        ("now", "means a point"),
        ("Now", "means a point"),
        ("last-clean", "means a point"),
        ("2025-11-23", "taken for a time"),
        ("2025-11-23T10", "taken for a time"),
        ("2025-13-99", "taken for a time"),
    ],
)
def test_label_refused(label: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_label(label)


def test_specs_are_written_so_that_they_mean_the_same_later() -> None:
    assert [format_spec(parse(text)) for text in ("now", "seq:5", "nightly", "@5.25")] == [
        *("now", "seq:5", "bookmark:nightly", "@5.25")
    ]
    assert format_spec(parse("2025-11-23T10:00")) == "@1763888400"


# -------------------------------------------------------------------------------- changes of clocks
def test_a_local_time_that_happened_twice_is_refused_with_both() -> None:
    with pytest.raises(AmbiguousTime, match="happened twice") as caught:
        parse("2025-10-26T02:30")
    assert "2025-10-26T02:30:00+02:00 (@1761438600)" in str(caught.value)
    assert "2025-10-26T02:30:00+01:00 (@1761442200)" in str(caught.value)
    assert caught.value.candidates == ("@1761438600", "@1761442200")
    for candidate in caught.value.candidates:
        assert isinstance(parse(candidate), AtTime)


def test_a_local_time_that_never_happened_is_refused_with_its_neighbours() -> None:
    with pytest.raises(AmbiguousTime, match="never happened") as caught:
        parse("2025-03-30 02:30")
    assert "2025-03-30T01:30:00+01:00 (@1743294600)" in str(caught.value)
    assert "2025-03-30T03:30:00+02:00 (@1743298200)" in str(caught.value)


@pytest.mark.parametrize("text", ["2025-10-26T01:59:59.9", "2025-10-26T03:00", "2025-03-30T03:00"])
def test_the_edges_of_a_change_are_clear(text: str) -> None:
    assert isinstance(parse(text), AtTime)


def test_a_day_without_midnight_is_refused() -> None:
    """In Santiago the clocks go forward at midnight."""
    with pytest.raises(AmbiguousTime, match="never happened"):
        parse("2025-09-07", zone=ZoneInfo("America/Santiago"))


def test_human_times_meet_changes_of_clocks_too() -> None:
    with pytest.raises(AmbiguousTime, match="happened twice"):
        parse("yesterday 2:30", ns("2025-10-27T12:00+01:00"))
    assert parse("yesterday 2:30 utc", ns("2025-10-27T12:00+01:00")) == AtTime(
        ns("2025-10-26T02:30+00:00")
    )


def test_formats() -> None:
    assert format_unix(1_500_000_000) == "1.5"
    assert format_unix(10 * NS) == "10"
    assert format_unix(-1_500_000_000) == "-1.5"
    assert format_iso(NOW_NS, BERLIN) == "2025-11-24T13:30:15.123456789+01:00"
    assert format_iso(NS, UTC) == "1970-01-01T00:00:01Z"
    assert format_iso(0, timezone(timedelta(hours=-3.5))) == "1969-12-31T20:30:00-03:30"
    assert format_iso(1 << 70, UTC).startswith("@1180591620717")
    assert parse_duration_ns("1h30m") == 5400 * NS


# ---------------------------------------------------------------------------------------- timeline
@dataclass
class FakeTimeline:
    """Records 1, 2, 3 ... stamped as listed; no ranges given: everything is the window."""

    stamps: list[int]
    ranges: list[tuple[int, int]] | None = None
    kept: list[KeptPoint] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)
    table: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    floor: int = 1
    window_start: int | None = None

    @property
    def durable_seq(self) -> int:
        return len(self.stamps)

    @property
    def window_start_seq(self) -> int | None:
        if self.window_start is not None:
            return self.window_start
        return self.openable_ranges[-1][0] if self.openable_ranges else None

    @property
    def openable_ranges(self) -> Sequence[tuple[int, int]]:
        return [(0, self.durable_seq)] if self.ranges is None else self.ranges

    @property
    def kept_points(self) -> Sequence[KeptPoint]:
        return self.kept

    @property
    def bookmarks(self) -> Mapping[str, Bookmark]:
        return {label: Bookmark(seq, self.stamp_of(seq)) for label, seq in self.marks.items()}

    @property
    def clock(self) -> ClockTable:
        return ClockTable(self.table)

    def seq_at_stamp(self, stamp_ns: int) -> int | None:
        seqs = [seq for seq, stamp in enumerate(self.stamps, 1) if stamp <= stamp_ns]
        if not seqs and self.floor == 1 and stamp_ns >= 0:
            return 0
        return seqs[-1] if seqs and seqs[-1] >= self.floor else None

    def stamp_of(self, seq: int) -> int:
        return self.stamps[seq - 1] if seq else 0


@pytest.fixture
def simple() -> FakeTimeline:
    """One write a second, at the second: 1 s to 9 s."""
    return FakeTimeline([second * NS for second in range(1, 10)], marks={"half": 5})


@pytest.mark.parametrize(
    ("spec", "seq"),
    [
        (Now(), 9),
        (AtSeq(0), 0),
        (AtSeq(7), 7),
        (AtBookmark("half"), 5),
        (AtBookmark("half", AtTime(2 * NS)), 5),  # the bookmark wins over the time
        (AtBookmark("noon", AtTime(2 * NS)), 2),
        (AtTime(0), 0),
        (AtTime(1 * NS - 1), 0),
        (AtTime(1 * NS), 1),
        (AtTime(2 * NS - 1), 1),
        (AtTime(100 * NS), 9),
    ],
)
def test_resolve(simple: FakeTimeline, spec: Spec, seq: int) -> None:
    assert resolve(spec, simple) == Point(seq, seq * NS, seq * NS)


def test_a_point_carries_both_times(simple: FakeTimeline) -> None:
    simple.table = [(0, 1000 * NS)]
    assert resolve(AtTime(1003 * NS + 5), simple) == Point(3, 3 * NS, 1003 * NS)


def refusal(spec: Spec, timeline: FakeTimeline, kind: type[CdpError] = NotOpenable) -> str:
    with pytest.raises(kind) as caught:
        resolve(spec, timeline)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_bookmark_names_the_newest_and_the_hint(simple: FakeTimeline) -> None:
    simple.marks = {"a": 1, "b": 2, "c": 3, "d": 4}
    assert refusal(AtBookmark("e"), simple, NotFound) == (
        "there is no bookmark 'e'; the newest are: d, c, b, ..."
    )
    spec = parse("yesterday")
    assert "add the time of day" in refusal(spec, simple, NotFound)
    simple.marks = {}
    assert "the disk has none" in refusal(spec, simple, NotFound)


def test_not_written_yet(simple: FakeTimeline) -> None:
    assert refusal(AtSeq(10), simple) == (
        "seq:10 has not been written yet; openable: seq:0 (1970-01-01T00:00:00Z) to "
        "seq:9 (1970-01-01T00:00:09Z); nearest before: seq:9 (1970-01-01T00:00:09Z); "
        "nearest bookmarks: half"
    )


def test_before_the_window_names_its_neighbours(simple: FakeTimeline) -> None:
    simple.ranges = [(7, 9)]
    simple.kept = [KeptPoint(2, 2 * NS, 2 * NS + 5), KeptPoint(5, 5 * NS, 5 * NS)]
    simple.marks = {"half": 5, "given-up": 3}
    message = refusal(AtTime(4 * NS), simple)
    assert message == (
        "1970-01-01T00:00:04Z (seq:4) is not kept; openable: seq:7 (1970-01-01T00:00:07Z) to "
        "seq:9 (1970-01-01T00:00:09Z); nearest before: seq:2 (1970-01-01T00:00:02Z); "
        "nearest after: seq:5 (1970-01-01T00:00:05Z); nearest bookmarks: half"
    )
    assert "bookmark:given-up (seq:3) is not kept" in refusal(AtBookmark("given-up"), simple)
    assert resolve(AtBookmark("half"), simple).seq == 5


def test_a_kept_point_stands_for_the_instants_it_is_known_for(simple: FakeTimeline) -> None:
    """The log around it is gone: only what the point says of itself is known."""
    simple.ranges, simple.floor = [(7, 9)], 7
    simple.kept = [KeptPoint(2, 2 * NS, 3 * NS - 1), KeptPoint(5, 5 * NS, 5 * NS)]
    assert resolve(AtTime(3 * NS - 1), simple) == Point(2, 2 * NS, 2 * NS)
    assert resolve(AtTime(2 * NS), simple).seq == 2
    message = refusal(AtTime(3 * NS), simple)
    assert "nearest before: seq:2" in message
    assert "nearest after: seq:5" in message
    assert "nearest after: seq:2" in refusal(AtTime(1 * NS), simple)


def test_a_record_that_changed_nothing_is_no_obstacle(simple: FakeTimeline) -> None:
    """seq 4 is a bookmark's own record; the thinned point before it is the same state."""
    simple.ranges = [(7, 9)]
    simple.kept = [KeptPoint(3, 3 * NS, 4 * NS + 10)]
    assert resolve(AtTime(4 * NS + 5), simple).seq == 3


def test_in_a_gap(simple: FakeTimeline) -> None:
    simple.ranges = [(0, 3), (6, 9)]
    message = refusal(AtSeq(4), simple)
    assert message.startswith("seq:4 is not kept")
    assert "nearest before: seq:3" in message
    assert "nearest after: seq:6" in message
    simple.ranges = [(0, 7)]
    assert "lies in a gap or inside a rollback" in refusal(Now(), simple)


def test_the_window_is_named_as_a_whole(simple: FakeTimeline) -> None:
    """A rollback at 5 and 6 does not make 7 to 9 all there is."""
    simple.ranges, simple.window_start = [(0, 4), (7, 9)], 2
    assert (
        "; openable: seq:2 (1970-01-01T00:00:02Z) to seq:9 (1970-01-01T00:00:09Z), "
        "but not what lies in gaps and rollbacks; nearest before: seq:4 (1970-01-01T00:00:04Z); "
    ) in refusal(AtSeq(5), simple)
    assert "seq:5 lies in a gap" in refusal(AtSeq(5), simple)


def test_nothing_can_be_opened(simple: FakeTimeline) -> None:
    simple.ranges = []
    assert refusal(AtSeq(1), simple).endswith("and nothing else can be opened")


def test_times_in_messages_are_in_the_given_zone(simple: FakeTimeline) -> None:
    with pytest.raises(NotOpenable, match="1970-01-01T01:00:09\\+01:00"):
        resolve(AtSeq(10), simple, zone=BERLIN)


# ----------------------------------------------------------------------------------- the wall clock
def test_clock_set_forward(simple: FakeTimeline) -> None:
    """At stamp 5 s the clock, which shows 5, is set to 105."""
    simple.table = [(0, 0), (5 * NS, 100 * NS)]
    clock = simple.clock
    assert clock.wall_of(5 * NS - 1) == 5 * NS - 1
    assert clock.wall_of(5 * NS) == 105 * NS
    assert clock.stamps_at(104 * NS) == [5 * NS - 1]
    # What was skipped is the state at the step; the write at the step is already after it.
    for skipped in (5 * NS, 60 * NS, 105 * NS - 1):
        assert resolve(AtTime(skipped), simple).seq == 4
    assert resolve(AtTime(105 * NS), simple).seq == 5
    assert resolve(AtTime(107 * NS), simple) == Point(7, 7 * NS, 107 * NS)


def test_clock_set_back_is_refused_with_both(simple: FakeTimeline) -> None:
    """At stamp 5 s the clock, which shows 5, is set back to 2."""
    simple.table = [(0, 0), (5 * NS, -3 * NS)]
    assert simple.clock.stamps_at(3 * NS) == [3 * NS, 6 * NS]
    with pytest.raises(AmbiguousTime) as caught:
        resolve(AtTime(3 * NS), simple)
    assert caught.value.candidates == ("seq:3", "seq:6")
    assert "say seq:3 or seq:6" in str(caught.value)
    assert resolve(AtTime(2 * NS - 1), simple).seq == 1
    assert resolve(AtTime(5 * NS), simple).seq == 8


def test_clock_set_back_with_nothing_written_in_between() -> None:
    timeline = FakeTimeline([1 * NS, 9 * NS], table=[(0, 0), (5 * NS, -3 * NS)])
    assert resolve(AtTime(3 * NS), timeline).seq == 1


def test_clock_set_back_and_the_first_pass_forgotten(simple: FakeTimeline) -> None:
    simple.table = [(0, 0), (5 * NS, -3 * NS)]
    simple.ranges, simple.floor = [(6, 9)], 6
    with pytest.raises(AmbiguousTime, match="no longer kept") as caught:
        resolve(AtTime(3 * NS), simple)
    assert caught.value.candidates == ("seq:6",)


def test_a_time_skipped_twice_has_two_meanings(simple: FakeTimeline) -> None:
    """Set from 2 to 12, back from 14 to 4 ... and forward over it again."""
    simple.table = [(0, 0), (2 * NS, 10 * NS), (4 * NS, -1 * NS), (6 * NS, 20 * NS)]
    assert simple.clock.stamps_at(10 * NS) == [2 * NS - 1, 6 * NS - 1]
    with pytest.raises(AmbiguousTime) as caught:
        resolve(AtTime(10 * NS), simple)
    assert caught.value.candidates == ("seq:1", "seq:5")


@pytest.mark.parametrize("entries", [[], [(5, 0), (5, 1)], [(5, 0), (4, 1)]])
def test_a_clock_table_is_sorted_and_not_empty(entries: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="clock table"):
        ClockTable(entries)


# ------------------------------------------------------------------------------- the whole way once
def test_from_text_to_point(simple: FakeTimeline) -> None:
    simple.table = [(0, NOW_NS - 9 * NS)]  # the last write is now

    def find(text: str) -> int:
        return resolve(parse(text), simple, zone=BERLIN).seq

    assert [find(text) for text in ("now", "-0s", "-1s", "3 secs ago", "half")] == [9, 9, 8, 6, 5]
    assert find(f"@{format_unix(NOW_NS - 4 * NS)}") == 5
    assert find(format_iso(NOW_NS - 4 * NS - 1, UTC)) == 4
