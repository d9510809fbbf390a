"""From what an administrator writes (a SPEC) to one openable point of a disk.

Two pure steps, neither of which reads a clock: :func:`parse_spec` says what a text means, and
:func:`resolve` finds the seq in a :class:`Timeline`.

SPEC, in the order in which a text is tried:

====================================  =============================================================
``now``                               the last durable record
``seq:N``                             the state after record N; ``seq:0`` is before the first write
``bookmark:LABEL``                    that bookmark and nothing else
``@SECONDS[.frac]``                   UNIX time, exact to the nanosecond
``-10m``, ``-1h30m``, ``-2d``         so long ago; units ``w d h m s ms us ns``, a day is 24 hours
``2025-11-23[T10:00[:05[.25]][Z]]``   ISO 8601; without a zone it is local, the date is midnight
a bare LABEL                          the bookmark of that name; **if there is none**, a human time
``10 min ago``, ``yesterday 14:00``   human times (:func:`replay.when.parse_human_ns`)
====================================  =============================================================

So a strict form is never a label (:func:`check_label` refuses such labels), and a bookmark called
``noon`` or ``2pm`` wins over the time, since somebody chose that name. ``nightly``,
``before-upgrade-2`` and ``5`` are labels and nothing else.

**A time means: after the last write stamped at or before it.** Times are wall-clock times, and
:class:`ClockTable` knows when somebody set the clock. A time that was shown twice, because the
clock was set back, is refused with the seqs it could mean (unless nothing was written in between:
then there is nothing to choose); a time that a clock set forward skipped means the state at that
step. Times in the future are refused.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, tzinfo
from typing import Protocol

from journal.errors import InvalidInput, NotFound, NotOpenable
from replay.when import (
    AmbiguousTime,
    InvalidTime,
    format_iso,
    format_unix,
    parse_duration_ns,
    parse_human_ns,
    parse_iso_ns,
    parse_unix_ns,
)

SPEC_CHARACTERS_MAX = 200
LABEL_CHARACTERS_MAX = 64
SEQ_MAX = (1 << 63) - 1
LISTED_BOOKMARKS_MAX = 3  # in an error message

_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
# Words that mean, or will mean, a point by themselves ("the last one found clean by a check").
RESERVED_LABELS = frozenset({"now", "latest", "newest", "oldest", "last-clean", "last-verified"})


class InvalidSpec(InvalidInput):
    """A text that is no SPEC."""


# ----------------------------------------------------------------------------------------- specs
@dataclass(frozen=True, slots=True)
class Now:
    """The last durable record, after whoever asks has had the log synced."""


@dataclass(frozen=True, slots=True)
class AtSeq:
    """The state after record ``seq``; 0 is the state before the first."""

    seq: int


@dataclass(frozen=True, slots=True)
class AtTime:
    """After the last write stamped at or before a wall-clock time (ns since the UNIX epoch)."""

    wall_ns: int


@dataclass(frozen=True, slots=True)
class AtBookmark:
    """The bookmark ``label``.

    Of a bare word that is also a human time, ``otherwise`` is that time, meant when there is no
    such bookmark; ``hint`` says why a word that looks like one is no time, for error messages.
    """

    label: str
    otherwise: AtTime | None = None
    hint: str | None = None


# A point that is found by what is known of it ("the last one found clean") is one more class here
# and one more case in `resolve`; the words for it are reserved already.
Spec = Now | AtSeq | AtTime | AtBookmark


def parse_spec(text: str, *, now_ns: int, zone: tzinfo) -> Spec:
    """What ``text`` means, by the table above.

    :param now_ns: wall-clock time, ns since the UNIX epoch.
    :param zone: of local times without a zone.
    :raises InvalidSpec: no known form.
    :raises InvalidTime: a time that does not exist, lies in the future or is not precise enough.
    :raises AmbiguousTime: a local time that the change of clocks repeats or skips.
    """
    spec = _strict(text.strip(), now_ns, zone) or _bare(text.strip(), now_ns, zone)
    if isinstance(spec, AtTime) and spec.wall_ns > now_ns:
        raise InvalidTime(
            f"{text!r} lies in the future, it is {format_iso(now_ns, zone)} now: "
            "name a time that has passed"
        )
    if isinstance(spec, AtTime) and spec.wall_ns < 0:
        raise InvalidTime(f"{text!r} lies before 1970: name a time since the disk is protected")
    return spec


def _strict(text: str, now_ns: int, zone: tzinfo) -> Spec | None:
    """The forms that no label can have; None when it is none of them."""
    if len(text) > SPEC_CHARACTERS_MAX:
        raise InvalidSpec(f"a point is named with at most {SPEC_CHARACTERS_MAX} characters")
    if text.lower() == "now":
        return Now()
    if text.startswith("seq:"):
        number = text[4:]
        if not (number.isascii() and number.isdigit() and len(number) < 20):
            raise InvalidSpec(f"{text!r}: seq: is followed by a record's number, as in seq:4711")
        if int(number) > SEQ_MAX:
            raise InvalidSpec(f"{text!r}: no record has such a number")
        return AtSeq(int(number))
    if text.startswith("bookmark:"):
        if not _is_label(text[9:]):
            raise InvalidSpec(f"{text!r}: bookmark: is followed by a bookmark's label")
        return AtBookmark(text[9:])
    if text.startswith("@"):
        wall_ns = parse_unix_ns(text)
        if wall_ns is None:
            raise InvalidSpec(f"{text!r}: @ is followed by UNIX seconds, as in @1763892000.5")
        return AtTime(wall_ns)
    if text == "-":
        raise InvalidSpec("'-' is followed by how long ago, as in -10m")
    if text.startswith("-"):
        return AtTime(now_ns - parse_duration_ns(text[1:]))
    wall_ns = parse_iso_ns(text, zone)
    return None if wall_ns is None else AtTime(wall_ns)


def _bare(text: str, now_ns: int, zone: tzinfo) -> Spec:
    """A bookmark's label, a human time, or a word that can be both."""
    wall_ns, hint = None, None
    try:
        wall_ns = parse_human_ns(text, now_ns=now_ns, zone=zone)
    except InvalidInput as error:
        if not _is_label(text):
            raise
        hint = str(error)
    at = None if wall_ns is None else AtTime(wall_ns)
    if _is_label(text):
        # A time of today that has not come yet is no reason to refuse a bookmark of that name.
        if at is not None and at.wall_ns > now_ns:
            return AtBookmark(text, hint=f"as a time, {text!r} lies in the future")
        return AtBookmark(text, at, hint)
    if at is None:
        raise InvalidSpec(
            f"{text!r} is no point in time: say now, -10m, '10 min ago', 2025-11-23T10:00, "
            "@1763892000, seq:4711 or a bookmark's label"
        )
    return at


def format_spec(spec: Spec) -> str:
    """A text that means the same to whoever reads it later, in whatever zone.

    A bare word's second meaning is lost: decide between the two first.
    """
    match spec:
        case Now():
            return "now"
        case AtSeq(seq):
            return f"seq:{seq}"
        case AtTime(wall_ns):
            return f"@{format_unix(wall_ns)}"
        case AtBookmark(label):
            return f"bookmark:{label}"


# ---------------------------------------------------------------------------------------- labels
def _is_label(text: str) -> bool:
    return len(text) <= LABEL_CHARACTERS_MAX and _LABEL.fullmatch(text) is not None


def check_label(label: str) -> None:
    """Refuse a label that could not be used as a bare SPEC, or in an export's name.

    1-64 of the ASCII letters, digits, ``.``, ``_`` and ``-``, not beginning with ``-`` or ``.``; no
    reserved word; nothing that is an ISO date or time.

    :raises InvalidInput: with the rule that is broken.
    """
    if not label:
        raise InvalidInput("a bookmark needs a label of 1 to 64 characters")
    if len(label) > LABEL_CHARACTERS_MAX:
        raise InvalidInput(
            f"label {label[:16] + '...'!r} has {len(label)} characters: "
            f"use at most {LABEL_CHARACTERS_MAX}"
        )
    if not _is_label(label):
        raise InvalidInput(
            f"label {label!r}: use letters, digits, '.', '_' and '-', and begin with none of '.-'"
        )
    if label.lower() in RESERVED_LABELS:
        raise InvalidInput(f"label {label!r} means a point by itself: choose another one")
    try:
        is_time = parse_iso_ns(label, UTC) is not None
    except InvalidTime:
        is_time = True
    if is_time:
        raise InvalidInput(f"label {label!r} would be taken for a time: choose another one")


# ----------------------------------------------------------------------------------------- clock
class ClockTable:
    """When the wall clock was what: ``wall = stamp + offset``, the offset changing at known stamps.

    Entries are ``(stamp_ns, wall_minus_stamp_ns)`` sorted by stamp: from that stamp on (inclusive)
    up to the next entry's, the offset holds. The first one also holds before its stamp.
    """

    def __init__(self, entries: Sequence[tuple[int, int]]) -> None:
        """:raises ValueError: no entry, or not sorted by stamp."""
        if not entries:
            raise ValueError("a clock table has at least one entry")
        self._stamps = [stamp for stamp, _ in entries]
        self._offsets = [offset for _, offset in entries]
        if any(b <= a for a, b in zip(self._stamps, self._stamps[1:], strict=False)):
            raise ValueError("a clock table is sorted by stamp")

    def wall_of(self, stamp_ns: int) -> int:
        """The wall-clock time at a stamp."""
        return stamp_ns + self._offsets[max(0, bisect_right(self._stamps, stamp_ns) - 1)]

    def stamps_at(self, wall_ns: int) -> list[int]:
        """The stamps at which the wall clock showed ``wall_ns``, ascending; never empty.

        Of a time that was only ever skipped, the last stamps before the steps that skipped it.
        """
        found = []
        last = len(self._stamps) - 1
        for number, offset in enumerate(self._offsets):
            stamp = wall_ns - offset
            begun = number == 0 or stamp >= self._stamps[number]
            if begun and (number == last or stamp < self._stamps[number + 1]):
                found.append(stamp)
        if found:
            return found
        # The clock came from before it and has gone beyond it, without showing it: over a step.
        return [
            step - 1
            for step, before, after in zip(
                self._stamps[1:], self._offsets, self._offsets[1:], strict=False
            )
            if step + before <= wall_ns < step + after
        ]


# -------------------------------------------------------------------------------------- timeline
@dataclass(frozen=True, slots=True)
class KeptPoint:
    """A single openable point: a bookmark's target, a thinned point, a pin.

    The disk was in this state from ``stamp_ns`` (of record ``seq``) at least up to ``until_ns``; a
    thinned point is the state at an aligned instant, which is its ``until_ns``.
    """

    seq: int
    stamp_ns: int
    until_ns: int


@dataclass(frozen=True, slots=True)
class Bookmark:
    """What a bookmark names: the state after ``seq``, which was stamped ``stamp_ns``."""

    seq: int
    stamp_ns: int


class Timeline(Protocol):
    """What a disk's curator knows of its points: one consistent state, taken after a sync.

    ``seq_at_stamp`` answers for all times up to the last durable record; whoever wants a time near
    the present makes sure first that nothing later can be stamped at or before it.
    """

    @property
    def durable_seq(self) -> int:
        """The last record that can be asked for."""

    @property
    def window_start_seq(self) -> int | None:
        """The first seq of the window, in which every write is openable; None: no window."""

    @property
    def openable_ranges(self) -> Sequence[tuple[int, int]]:
        """Ranges (first, last) of openable seqs, inclusive, ascending, disjoint."""

    @property
    def kept_points(self) -> Sequence[KeptPoint]:
        """Further openable points, ascending by seq."""

    @property
    def bookmarks(self) -> Mapping[str, Bookmark]:
        """All bookmarks by label."""

    @property
    def clock(self) -> ClockTable:
        """When the wall clock was what."""

    def seq_at_stamp(self, stamp_ns: int) -> int | None:
        """The last record stamped at or before; None: before all that is still known."""

    def stamp_of(self, seq: int) -> int:
        """The stamp of any record in an openable range."""


@dataclass(frozen=True, slots=True)
class Point:
    """An openable point: the state after ``seq``, and when that was, by stamp and by wall clock."""

    seq: int
    stamp_ns: int
    wall_ns: int


def resolve(spec: Spec, timeline: Timeline, *, zone: tzinfo = UTC) -> Point:
    """The openable point that ``spec`` means.

    :param zone: of the times in error messages.
    :raises NotFound: no bookmark of that label.
    :raises AmbiguousTime: the clock was set back and showed that time more than once; the
        candidates are ``seq:N``.
    :raises NotOpenable: it cannot be opened; the message names what can.
    """
    if isinstance(spec, AtBookmark) and spec.otherwise and spec.label not in timeline.bookmarks:
        spec = spec.otherwise
    match spec:
        case Now():
            return _open(timeline, timeline.durable_seq, "now", zone)
        case AtSeq(seq):
            return _open(timeline, seq, f"seq:{seq}", zone)
        case AtTime(wall_ns):
            return _at_time(timeline, wall_ns, zone)
        case AtBookmark(label):
            if label not in timeline.bookmarks:
                raise NotFound(_no_bookmark(timeline, label, spec.hint))
            return _open(timeline, timeline.bookmarks[label].seq, f"bookmark:{label}", zone)


def _at_time(timeline: Timeline, wall_ns: int, zone: tzinfo) -> Point:
    asked = format_iso(wall_ns, zone)
    stamps = timeline.clock.stamps_at(wall_ns)
    seqs = [_seq_at(timeline, stamp_ns) for stamp_ns in stamps]
    if len(set(seqs)) > 1:
        candidates = tuple(f"seq:{seq}" for seq in sorted({s for s in seqs if s is not None}))
        lost = " (the other is no longer kept)" if None in seqs else ""
        raise AmbiguousTime(
            f"the clock was set and {asked} can mean more than one moment: "
            f"say {' or '.join(candidates)}{lost}",
            candidates,
        )
    (seq,) = set(seqs)
    if seq is None:
        before = [p.seq for p in timeline.kept_points if p.stamp_ns <= stamps[0]]
        raise NotOpenable(_not_openable(timeline, asked, None, max(before, default=-1), zone))
    return _open(timeline, seq, asked, zone)


def _seq_at(timeline: Timeline, stamp_ns: int) -> int | None:
    """The last record at or before a stamp; if not openable, a kept point of the same state."""
    seq = timeline.seq_at_stamp(stamp_ns)
    assert seq is None or seq <= timeline.durable_seq, "nobody looks above durable"
    if seq is not None and _stamp_if_openable(timeline, seq) is not None:
        return seq
    for point in reversed(timeline.kept_points):
        if point.stamp_ns <= stamp_ns <= point.until_ns:
            return point.seq
    return seq


def _stamp_if_openable(timeline: Timeline, seq: int) -> int | None:
    ranges = timeline.openable_ranges
    at = bisect_right(ranges, seq, key=lambda bounds: bounds[0]) - 1
    if at >= 0 and seq <= ranges[at][1]:
        return timeline.stamp_of(seq)
    at = bisect_left(timeline.kept_points, seq, key=lambda point: point.seq)
    if at < len(timeline.kept_points) and timeline.kept_points[at].seq == seq:
        return timeline.kept_points[at].stamp_ns
    return None


def _open(timeline: Timeline, seq: int, asked: str, zone: tzinfo) -> Point:
    stamp_ns = _stamp_if_openable(timeline, seq)
    if stamp_ns is None:
        raise NotOpenable(_not_openable(timeline, asked, seq, seq, zone))
    return Point(seq, stamp_ns, timeline.clock.wall_of(stamp_ns))


# -------------------------------------------------------------------------------------- messages
def _seq_and_time(timeline: Timeline, seq: int, zone: tzinfo) -> str:
    stamp_ns = _stamp_if_openable(timeline, seq)
    assert stamp_ns is not None
    return f"seq:{seq} ({format_iso(timeline.clock.wall_of(stamp_ns), zone)})"


def _no_bookmark(timeline: Timeline, label: str, hint: str | None) -> str:
    there = sorted(timeline.bookmarks, key=lambda known: -timeline.bookmarks[known].seq)
    listed = ", ".join(there[:LISTED_BOOKMARKS_MAX]) + (", ..." if there[3:] else "")
    return (
        f"there is no bookmark {label!r}"
        + (f", and {hint}" if hint else "")
        + (f"; the newest are: {listed}" if there else "; the disk has none")
    )


def _not_openable(timeline: Timeline, asked: str, seq: int | None, near: int, zone: tzinfo) -> str:
    """One line: why not, and what can be opened instead.

    :param seq: what was asked for; None: a time of which no record is known.
    :param near: the seq whose neighbours to name; itself only when ``seq`` is None.
    """
    name = asked if seq is None or asked == f"seq:{seq}" else f"{asked} (seq:{seq})"
    start = timeline.window_start_seq
    if seq is not None and seq > timeline.durable_seq:
        why = "has not been written yet"
    elif seq is None or (start is not None and seq < start):
        why = "is not kept"
    else:
        why = "lies in a gap or inside a rollback"
    ranges, points = timeline.openable_ranges, [point.seq for point in timeline.kept_points]
    before = [min(last, near) for first, last in ranges if first <= near]
    before += [point for point in points if point <= near]
    after = [max(first, near + 1) for first, last in ranges if last > near]
    after += [point for point in points if point > near]
    can = []
    window = [(max(low, start or 0), high) for low, high in ranges if high >= (start or 0)]
    if window:
        first, last = _seq_and_time(timeline, window[0][0], zone), window[-1][1]
        holes = ", but not what lies in gaps and rollbacks" if len(window) > 1 else ""
        can.append(f"{first} to {_seq_and_time(timeline, last, zone)}{holes}")
    if before:
        can.append(f"nearest before: {_seq_and_time(timeline, max(before), zone)}")
    if after:
        can.append(f"nearest after: {_seq_and_time(timeline, min(after), zone)}")
    labels = sorted(
        (label for label, mark in timeline.bookmarks.items() if _is_openable(timeline, mark)),
        key=lambda label: (abs(timeline.bookmarks[label].seq - near), label),
    )
    if labels:
        can.append("nearest bookmarks: " + ", ".join(labels[:LISTED_BOOKMARKS_MAX]))
    if not can:
        return f"{name} {why}, and nothing else can be opened"
    return f"{name} {why}; openable: {'; '.join(can)}"


def _is_openable(timeline: Timeline, bookmark: Bookmark) -> bool:
    return _stamp_if_openable(timeline, bookmark.seq) is not None
