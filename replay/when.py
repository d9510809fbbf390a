"""What a text says about wall-clock time, as nanoseconds since the UNIX epoch: pure, no clock.

Three kinds of text, from strict to human:

* elapsed time: ``1h30m``, ``2d``, ``0.5s`` (:func:`parse_duration_ns`);
* a moment: ``@1763892000.25`` (exact to the nanosecond, never through a float) and ISO 8601
  (:func:`parse_unix_ns`, :func:`parse_iso_ns`);
* human English: ``10 min ago``, ``yesterday 14:00``, ``5 march 2pm utc`` (:func:`parse_human_ns`).

A restore to a moment that was only guessed destroys data as surely as a bug, so nothing here
guesses. dateparser, which knows the words for days, is only shown texts of a known shape, and what
it makes of them is compared with what they say: on its own it takes "5" for the fifth of this
month, drops the "25:00" of "yesterday 25:00", and on a Monday sends "monday 10:00" a week back. A
local time that a change of the clocks repeats or skips is refused with the moments that it could
mean.
"""

from __future__ import annotations

import re
import warnings
from datetime import UTC, date, datetime, time, timedelta, tzinfo

from journal.errors import InvalidInput

NS = 1_000_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_UNIT_NS = {
    "w": 7 * 86_400 * NS,
    "d": 86_400 * NS,
    "h": 3_600 * NS,
    "m": 60 * NS,
    "s": NS,
    "ms": 1_000_000,
    "us": 1_000,
    "ns": 1,
}
_DURATION_PART = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,15}))?(w|d|h|min|ms|us|ns|m|s)")


class InvalidTime(InvalidInput):
    """A text that means a time, and cannot be taken for one."""


class AmbiguousTime(InvalidTime):
    """A time that means several moments, or none; ``candidates`` are SPECs that mean one each."""

    def __init__(self, message: str, candidates: tuple[str, ...]) -> None:
        super().__init__(message)
        self.candidates = candidates


# --------------------------------------------------------------------------------- elapsed time
def parse_duration_ns(text: str) -> int:
    """``1h30m``, ``2d``, ``1.5h``, ``500ms`` -> nanoseconds; units from large to small, each once.

    Units are ``w d h m`` (or ``min``) ``s ms us ns``; a day is 24 hours.

    :raises InvalidTime: anything else, a number without unit, or a fraction of a nanosecond.
    """
    total, at, previous = 0, 0, 1 << 62
    while at < len(text):
        part = _DURATION_PART.match(text, at)
        if part is None:
            break
        number, fraction, unit = part.groups()
        unit_ns = _UNIT_NS["m" if unit == "min" else unit]
        if unit_ns >= previous:
            raise InvalidTime(f"{text!r} is no duration: name each unit once, from large to small")
        whole, rest = divmod(int(number + (fraction or "")) * unit_ns, 10 ** len(fraction or ""))
        if rest:
            raise InvalidTime(f"{text!r} is finer than a nanosecond")
        total, at, previous = total + whole, part.end(), unit_ns
    if not text or at < len(text):
        raise InvalidTime(f"{text!r} is no duration: write 90s, 10m, 1h30m, 2d or 1w")
    return total


# ------------------------------------------------------------------------------------- moments
_UNIX = re.compile(r"@([0-9]{1,12})(?:\.([0-9]+))?")
_ISO = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[Tt ]([0-9]{2})(?::([0-9]{2})(?::([0-9]{2})(?:[.,]([0-9]+))?)?)?"
    r"(?: ?([Zz]|UTC|utc|[+-][0-9]{2}(?::?[0-9]{2})?))?)?"
)


def _fraction_ns(digits: str | None, text: str) -> int:
    if not digits:
        return 0
    if len(digits) > 9:
        raise InvalidTime(f"{text!r} is finer than a nanosecond: give at most 9 decimals")
    return int(digits.ljust(9, "0"))


def parse_unix_ns(text: str) -> int | None:
    """``@SECONDS[.frac]`` -> ns, exact; None when the text has another shape.

    :raises InvalidTime: more than nine decimals.
    """
    found = _UNIX.fullmatch(text)
    if found is None:
        return None
    return int(found[1]) * NS + _fraction_ns(found[2], text)


def parse_iso_ns(text: str, zone: tzinfo) -> int | None:
    """ISO 8601 -> ns; None when the text has another shape.

    The date alone means its midnight; ``T`` or a space before the time; seconds, their fraction
    (1-9 digits) and the zone (``Z``, ``UTC``, ``+02:00``, ``+02``) may be missing: without one it
    is a local time of ``zone``.

    :raises InvalidTime: no such day or time of day, or finer than a nanosecond.
    :raises AmbiguousTime: a change of the clocks repeats or skips that local time.
    """
    found = _ISO.fullmatch(text)
    if found is None:
        return None
    year, month, day, hour, minute, second, fraction, offset = found.groups()
    try:
        moment = datetime(
            int(year), int(month), int(day), int(hour or 0), int(minute or 0), int(second or 0)
        )
    except ValueError as error:
        raise InvalidTime(f"there is no time {text!r}: {error}") from None
    fraction_ns = _fraction_ns(fraction, text)
    if offset is None:
        return local_ns(moment, fraction_ns, zone)
    ahead = timedelta(0)
    if offset.upper() not in {"Z", "UTC"}:
        digits = offset[1:].replace(":", "").ljust(4, "0")
        hours, minutes = int(digits[:2]), int(digits[2:])
        if hours > 23 or minutes > 59:
            raise InvalidTime(f"there is no zone {offset!r}, in {text!r}")
        ahead = timedelta(hours=hours, minutes=minutes) * (-1 if offset[0] == "-" else 1)
    return _since_epoch_ns(moment.replace(tzinfo=UTC)) - _delta_ns(ahead) + fraction_ns


def _delta_ns(delta: timedelta) -> int:
    return delta // timedelta(microseconds=1) * 1_000


def _since_epoch_ns(moment: datetime) -> int:
    return _delta_ns(moment - EPOCH)


def local_ns(moment: datetime, fraction_ns: int, zone: tzinfo) -> int:
    """A naive local time of ``zone``, plus a fraction of a second -> ns.

    :raises AmbiguousTime: a change of the clocks repeats or skips it; with the candidates.
    :raises InvalidTime: outside the years that can be computed with.
    """
    readings: list[int] = []  # first and second pass, or before and after the jump
    exact: list[int] = []
    try:
        for fold in (0, 1):
            utc = moment.replace(tzinfo=zone, fold=fold).astimezone(UTC)
            reading = _since_epoch_ns(utc) + fraction_ns
            if reading not in readings:
                readings.append(reading)
                if utc.astimezone(zone).replace(tzinfo=None, fold=0) == moment:
                    exact.append(reading)
    except OverflowError:
        raise InvalidTime(f"{moment.isoformat(' ')} is too far away") from None
    if len(exact) == 1:
        return exact[0]
    what = "happened twice" if exact else "never happened"
    candidates = tuple(f"@{format_unix(reading)}" for reading in sorted(readings))
    listed = " or ".join(
        f"{format_iso(reading, zone)} (@{format_unix(reading)})" for reading in sorted(readings)
    )
    raise AmbiguousTime(
        f"the local time {moment.isoformat(' ')} {what}, the clocks were changed: say {listed}",
        candidates,
    )


def format_unix(wall_ns: int) -> str:
    """Seconds since the epoch, exact, without needless zeroes: ``1763892000.25``."""
    seconds, fraction = divmod(abs(wall_ns), NS)
    return ("-" if wall_ns < 0 else "") + f"{seconds}.{fraction:09d}".rstrip("0").rstrip(".")


def format_iso(wall_ns: int, zone: tzinfo) -> str:
    """ISO 8601 with the offset of ``zone``, exact: ``2025-11-23T10:00:00.25+01:00``.

    What lies outside the calendar (a damaged clock table) is given as ``@SECONDS``.
    """
    seconds, fraction = divmod(wall_ns, NS)
    try:
        moment = (EPOCH + timedelta(seconds=seconds)).astimezone(zone)
    except OverflowError:
        return f"@{format_unix(wall_ns)}"
    text = moment.replace(tzinfo=None).isoformat(timespec="seconds")
    if fraction:
        text += f".{fraction:09d}".rstrip("0")
    offset = moment.isoformat(timespec="seconds")[19:]
    return text + ("Z" if offset == "+00:00" else offset)


# --------------------------------------------------------------------------------------- human
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
)
_WEEKDAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_WEEKDAY = (
    r"(?:mon(?:day)?|tue(?:s(?:day)?)?|wed(?:nesday)?|thu(?:rs(?:day)?)?|fri(?:day)?"
    r"|sat(?:urday)?|sun(?:day)?)"
)
_ELAPSED_UNITS = {
    "w": r"weeks?|w",
    "d": r"days?|d",
    "h": r"hours?|hrs?|h",
    "m": r"minutes?|mins?|m",
    "s": r"seconds?|secs?|s",
}
_ELAPSED_PART = re.compile(
    r"(?:and )?([0-9]{1,9}|an?) ?(?:"
    + "|".join(f"(?P<{unit}>{names})" for unit, names in _ELAPSED_UNITS.items())
    + r")(?:, ?| |$)"
)
_CLOCK = (
    r"(?:at )?(?:(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})"
    r"(?::(?P<second>[0-9]{2})(?:\.(?P<fraction>[0-9]{1,9}))?)?(?: ?(?P<half>[ap])m)?"
    r"|(?P<hour12>[0-9]{1,2}) ?(?P<half12>[ap])m|(?P<noon>noon))"
)
_CLOCK_LAST = re.compile(rf"(?P<day>.*?)[, ]*\b{_CLOCK}")
_CLOCK_FIRST = re.compile(rf"{_CLOCK}(?:,? on)?[, ]+(?P<day>.+)")
_DAY = re.compile(
    r"(?:on )?(?:(?P<near>today|yesterday|(?:the )?day before yesterday)"
    rf"|(?P<weekday>{_WEEKDAY})"
    r"|(?P<ago>(?:[0-9]{1,4}|an?) (?:day|week|month|year)s? ago)"
    r"|(?:the )?(?P<day1>[0-9]{1,2})(?:st|nd|rd|th)?(?: of)? "
    rf"(?P<month1>{_MONTH})(?:,? (?P<year1>[0-9]{{4}}))?"
    rf"|(?P<month2>{_MONTH}) (?P<day2>[0-9]{{1,2}})(?:st|nd|rd|th)?(?:,? (?P<year2>[0-9]{{4}}))?"
    r"|(?P<numeric>[0-9]{1,2}[/.][0-9]{1,2}[/.][0-9]{4}))"
)
_CALENDAR_AGO = re.compile(r"(?:[0-9]{1,4}|an?) (?:month|year)s? ago")


def parse_human_ns(text: str, *, now_ns: int, zone: tzinfo) -> int | None:
    """English such as ``10 min ago`` or ``yesterday 14:00`` -> ns; None when it is no time at all.

    Known shapes: ``N UNIT [N UNIT...] ago`` (elapsed time, a day is 24 hours; a month or a year is
    the same day and time of day of that month); a time of day (``14:00[:05[.25]]``, ``2pm``,
    ``2:30 pm``, ``noon``), which means today's, or that of a day: ``today``, ``yesterday``, a
    weekday (the last one, not today), ``N days ago``, ``5 march [2026]``, ``25.12.2026``. ``utc``
    at the end: both are meant in UTC, else in ``zone``.

    :raises InvalidTime: a day without time of day, a day or time of day that does not exist, or one
        that can be read in several ways.
    :raises AmbiguousTime: a change of the clocks repeats or skips that local time.
    """
    words = " ".join(text.lower().split())
    if words.endswith((" utc", " gmt")):
        words, zone = words[:-4], UTC
    if words.endswith(" ago"):
        elapsed_ns = _elapsed_ns(words[:-4])
        if elapsed_ns is not None:
            return now_ns - elapsed_ns
    try:
        now = (EPOCH + timedelta(microseconds=now_ns // 1_000)).astimezone(zone)
    except OverflowError:
        raise InvalidTime("this machine's clock is out of range") from None
    now = now.replace(tzinfo=None)
    if _CALENDAR_AGO.fullmatch(words):
        day = _months_ago(text, words, now)
        return local_ns(day.replace(microsecond=0), day.microsecond * 1_000, zone)
    if _DAY.fullmatch(words):
        raise InvalidTime(f"{text!r} is a whole day: add the time of day, as in '{words} 14:00'")
    found = _CLOCK_LAST.fullmatch(words) or _CLOCK_FIRST.fullmatch(words)
    shape = _DAY.fullmatch(found["day"]) if found and found["day"] else None
    if found is None or (found["day"] and shape is None):
        return None
    clock, fraction_ns = _time_of_day(text, found)
    on = now.date() if shape is None else _day(text, shape, now)
    return local_ns(datetime.combine(on, clock), fraction_ns, zone)


def _elapsed_ns(words: str) -> int | None:
    """``1 hour and 30 min`` -> ns; None when it is something else."""
    total, at = 0, 0
    while at < len(words):
        part = _ELAPSED_PART.match(words, at)
        if part is None:
            return None
        assert part.lastgroup is not None
        count = 1 if part[1].startswith("a") else int(part[1])
        total, at = total + count * _UNIT_NS[part.lastgroup], part.end()
    return total


def _time_of_day(text: str, found: re.Match[str]) -> tuple[time, int]:
    """Time of day and ns within its second."""
    if found["noon"]:
        return time(12), 0
    hour = int(found["hour"] or found["hour12"])
    half = found["half"] or found["half12"]
    if half:
        if not 1 <= hour <= 12:
            raise InvalidTime(f"{text!r}: there is no {hour} {half}m")
        hour = hour % 12 + (12 if half == "p" else 0)
    try:
        clock = time(hour, int(found["minute"] or 0), int(found["second"] or 0))
    except ValueError as error:
        raise InvalidTime(f"{text!r} has no such time of day: {error}") from None
    return clock, _fraction_ns(found["fraction"], text)


def _dateparser(words: str, now: datetime, order: str) -> datetime | None:
    """What dateparser makes of ``words``, of which the shape is known to be one that it knows."""
    # Not at the top: it takes longer to import than most commands take to run.
    import dateparser

    with warnings.catch_warnings():
        # It warns that a day without a year is ambiguous; here that is compared with the text.
        warnings.simplefilter("ignore")
        return dateparser.parse(
            words,
            languages=["en"],
            settings={
                "RELATIVE_BASE": now,
                "PREFER_DATES_FROM": "past",
                "RETURN_AS_TIMEZONE_AWARE": False,
                "DATE_ORDER": order,
                "PARSERS": ["relative-time", "absolute-time"],
            },
        )


def _months_ago(text: str, words: str, now: datetime) -> datetime:
    day = _dateparser(words, now, "DMY")
    if day is None or day.day != now.day:
        raise InvalidTime(f"{text!r}: that month has no day {now.day}, name the date")
    return day


def _day(text: str, shape: re.Match[str], now: datetime) -> date:
    """The day that was named; ``now`` is the local time.

    :raises InvalidTime: no such day, or more than one reading.
    """
    words = shape[0].removeprefix("on ").removeprefix("the ")
    weekday = shape["weekday"]
    if weekday and _WEEKDAYS[now.weekday()] == weekday[:3]:
        raise InvalidTime(f"{text!r}: that is today; say 'today', or '7 days ago', or the date")
    if shape["day1"]:
        words = f"{shape['day1']} {shape['month1'][:3]} {shape['year1'] or ''}".rstrip()
    elif shape["day2"]:
        words = f"{shape['day2']} {shape['month2'][:3]} {shape['year2'] or ''}".rstrip()
    readings = {_dateparser(words, now, order) for order in ("DMY", "MDY")}
    days = {reading.date() for reading in readings if reading is not None}
    if len(days) > 1:
        listed = " or ".join(sorted(day.isoformat() for day in days))
        raise InvalidTime(f"{text!r} has two readings: say {listed}, and the time")
    if not days or None in readings or not _agrees(shape, min(days), now.date()):
        raise InvalidTime(f"{text!r}: there is no such day; write it as {now.date()} 14:00")
    return min(days)


def _agrees(shape: re.Match[str], day: date, today: date) -> bool:
    """Whether the day that was computed is the one that was written."""
    if shape["near"]:
        back = {"today": 0, "yesterday": 1}.get(shape["near"], 2)
        return day == today - timedelta(days=back)
    if shape["weekday"]:
        named = _WEEKDAYS[day.weekday()] == shape["weekday"][:3]
        return named and 0 < (today - day).days < 7
    number, month = shape["day1"] or shape["day2"], shape["month1"] or shape["month2"]
    year = shape["year1"] or shape["year2"]
    if number is None:
        return True  # "ago" was computed; of a numeric date both orders agreed
    if (day.day, _MONTHS[day.month - 1]) != (int(number), month[:3]):
        return False
    return day.year == int(year) if year else day <= today
