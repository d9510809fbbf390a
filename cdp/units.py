"""Sizes, durations and times, as people write them and as people read them.

Sizes are in bytes, durations and times in seconds (times since the UNIX epoch), as in the API.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, tzinfo
from functools import cache

from journal.errors import InvalidInput

_SIZE = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,6}))? ?([KMGTPE]?)(iB|B)?", re.IGNORECASE)
_POWERS = "KMGTPE"
SIZE_MAX = 1 << 63


def parse_size(text: str) -> int:
    """``4096``, ``512MiB``, ``10G``, ``1.5T`` -> bytes. All units are powers of 1024.

    :raises InvalidInput: no size, a fraction of a byte, or ``GB``, of which nobody knows whether it
        means 1000 or 1024.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise InvalidInput(f"{text!r} is no size: write bytes, or 512K, 64MiB, 10G, 1.5T")
    number, fraction, unit, suffix = found.groups()
    if unit and suffix and suffix.upper() == "B":
        both = f"{number}{unit.upper()}"
        raise InvalidInput(f"{text!r} can be read in two ways: write {both} or {both}iB (1024s)")
    if suffix and not unit and len(suffix) > 1:
        raise InvalidInput(f"{text!r} is no size: write bytes, or 512K, 64MiB, 10G, 1.5T")
    power: int = 1 << 10 * (_POWERS.index(unit.upper()) + 1) if unit else 1
    digits = fraction or ""
    parts: int = 10 ** len(digits)
    size, rest = divmod(int(number + digits) * power, parts)
    if rest:
        raise InvalidInput(f"{text!r} is no whole number of bytes")
    if size >= SIZE_MAX:
        raise InvalidInput(f"{text!r} is more than any disk has")
    return size


def format_size(size: float) -> str:
    """Three digits and a unit: ``0 B``, ``1.50 MiB``, ``512 GiB``."""
    if size < 1024:
        return f"{size:.0f} B"
    power = -1
    # 999.5 and more would be shown with four digits.
    while size >= 1023.5 and power < len(_POWERS) - 1:
        size /= 1024
        power += 1
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    number = f"{size:.{decimals}f}"
    if decimals and float(number) == int(float(number)):
        number = f"{float(number):.0f}"
    return f"{number} {_POWERS[power]}iB"


def parse_duration(text: str) -> float:
    """``10m``, ``2d``, ``1h30m``, ``0.5s`` or plain seconds -> seconds.

    :raises InvalidInput: anything else.
    """
    from replay.when import parse_duration_ns

    text = text.strip()
    plain = re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text)
    ns = parse_duration_ns(text + "s" if plain else text)
    return ns // 10**9 if ns % 10**9 == 0 else ns / 10**9


def format_duration(seconds: float) -> str:
    """Its two largest units: ``2 d 3 h``, ``1 h 30 min``, ``45 s``, ``0.35 s``."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 9.995:
        return f"{seconds:.2f}".rstrip("0").rstrip(".") + " s"
    whole = round(seconds)
    lengths = {"d": 86_400, "h": 3_600, "min": 60, "s": 1}
    counts = [(whole // length, name, length) for name, length in lengths.items()]
    at = next(number for number, (count, _, _) in enumerate(counts) if count)
    largest, name, length = counts[at]
    text, rest = f"{largest} {name}", whole - largest * length
    if at + 1 < len(counts) and rest // counts[at + 1][2]:
        text += f" {rest // counts[at + 1][2]} {counts[at + 1][1]}"
    return text


@cache
def local_zone() -> tzinfo:
    """The zone of local times: TZ, or /etc/localtime, or UTC.

    A zone and not an offset: that would be wrong on the other side of a change of clocks.

    :raises InvalidInput: TZ names no known zone.
    """
    from zoneinfo import ZoneInfo

    name = os.environ.get("TZ", "").removeprefix(":")
    path = name if name.startswith("/") else "/etc/localtime"
    if name and not name.startswith("/"):
        try:
            return ZoneInfo(name)
        except (OSError, ValueError, LookupError):
            raise InvalidInput(
                f"TZ={name} names no known zone: set it to a name such as Europe/Berlin"
            ) from None
    try:
        with open(path, "rb") as file:
            return ZoneInfo.from_file(file)
    except (OSError, ValueError):
        return UTC


def format_time(seconds: float | None, *, decimals: int = 0) -> str:
    """Local time with its offset, which is a SPEC as well; ``-`` for None.

    :param decimals: 0 or 3.
    """
    if seconds is None:
        return "-"
    # isoformat cuts and does not round: a point named by the time that was shown for it does not
    # include what came after it.
    try:
        zone = local_zone()
    except InvalidInput:
        zone = UTC  # the offset is shown; what a local time would mean is refused
    moment = datetime.fromtimestamp(seconds, zone)
    return moment.isoformat(" ", timespec="milliseconds" if decimals else "seconds")
