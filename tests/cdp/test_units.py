"""Sizes, durations and times, as they are written and as they are shown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdp import units
from journal.errors import InvalidInput
from replay.target import AtTime, parse_spec


@pytest.fixture(autouse=True)
def _berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    units.local_zone.cache_clear()
    yield
    units.local_zone.cache_clear()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("4096 b", 4096),
        ("1K", 1024),
        ("1k", 1024),
        ("1KiB", 1024),
        ("512MiB", 512 << 20),
        ("512 mib", 512 << 20),
        ("10G", 10 << 30),
        ("1.5T", 3 << 39),
        ("0.5K", 512),
        ("2P", 2 << 50),
        (" 7G ", 7 << 30),
    ],
)
def test_size(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "G",
        "-1",
        "1.0001K",
        "10GB",
        "10 MB",
        "10iB",
        "1e9",
        "0x10",
        "1 0",
        "10X",
        "9E",
        "٣",
        "1,5G",
    ],
)
def test_no_size(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        units.parse_size(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.50 KiB"),
        (10 << 30, "10 GiB"),
        (12_345_678, "11.8 MiB"),
        (1023 * 1024, "1023 KiB"),
        ((1 << 20) - 1, "1 MiB"),
        (1 << 62, "4 EiB"),
    ],
)
def test_size_shown(size: int, text: str) -> None:
    assert units.format_size(size) == text


@given(st.integers(0, (1 << 62) - 1))
def test_a_shown_size_is_nearly_the_size(size: int) -> None:
    again = units.parse_size(_whole(units.format_size(size)))
    assert abs(again - size) <= max(1, size // 190)


def _whole(text: str) -> str:
    """Without decimals that would be fractions of a byte."""
    number, unit = text.split()
    factor = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
    factor |= {"PiB": 1 << 50, "EiB": 1 << 60}
    return str(round(float(number) * factor[unit]))


DURATIONS = [("0", 0), ("90", 90), ("1.5", 1.5), ("10m", 600), ("1h30m", 5400), ("2d", 172_800)]
DURATIONS += [("0.5s", 0.5), ("250ms", 0.25), ("1w", 604_800), (" 10m ", 600)]


@pytest.mark.parametrize(("text", "seconds"), DURATIONS)
def test_duration(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-10m", "10 m", "10x", "30m1h", "soon"])
def test_no_duration(text: str) -> None:
    with pytest.raises(InvalidInput, match="duration"):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.25, "0.25 s"),
        (9.5, "9.5 s"),
        (9.999, "10 s"),
        (59.9, "1 min"),
        (90, "1 min 30 s"),
        (3600, "1 h"),
        (3660, "1 h 1 min"),
        (3605, "1 h"),
        (90_000, "1 d 1 h"),
        (-90, "-1 min 30 s"),
        (86_400 * 1000, "1000 d"),
    ],
)
def test_duration_shown(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text


def test_time_shown_is_local_and_a_spec() -> None:
    moment = datetime(2025, 11, 24, 12, 30, 15, 678_900, tzinfo=UTC).timestamp()
    assert units.format_time(None) == "-"
    assert units.format_time(moment) == "2025-11-24 13:30:15+01:00"
    shown = units.format_time(moment, decimals=3)
    assert shown == "2025-11-24 13:30:15.678+01:00"  # cut, not rounded
    spec = parse_spec(shown, now_ns=time.time_ns(), zone=UTC)
    assert spec == AtTime(1_763_987_415_678_000_000)


def test_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    def zone(name: str) -> object:
        monkeypatch.setenv("TZ", name)
        units.local_zone.cache_clear()
        return units.local_zone()

    assert zone("Europe/Berlin") == ZoneInfo("Europe/Berlin")
    assert zone(":Europe/Berlin") == ZoneInfo("Europe/Berlin")
    assert zone("/nonexistent/file") is UTC
    with pytest.raises(InvalidInput, match="TZ=Nowhere/Town names no known zone"):
        zone("Nowhere/Town")
    monkeypatch.delenv("TZ")
    units.local_zone.cache_clear()
    units.local_zone()  # /etc/localtime, or UTC without one
