"""What can be changed while a disk is in use: `cdp disk set NAME KEY=VALUE`.

Values are in the API's units (bytes, seconds), or texts with units, as in a configuration file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from cdp.config import OVERFLOWS
from cdp.units import parse_duration, parse_size
from journal.errors import InvalidInput

# Fields of DiskConfig.
Settings = dict[str, Any]

_DURATIONS: Final = {
    "window": "window_seconds",
    "sync-age": "sync_age_seconds",
    "scrub-interval": "scrub_interval_seconds",
}
_SIZES: Final = {
    "journal-limit": "journal_limit",
    "tail": "tail_bytes",
    "segment": "segment_bytes",
    "scrub-rate": "scrub_rate",
}
_OPTIONAL: Final = frozenset({"window", "scrub-interval", "scrub-rate"})  # may be 'none'
_WORDS: Final = {
    "overflow": ("overflow", OVERFLOWS),
    "after-loss": ("after_loss", ("auto", "hold", "offer")),
}
CHANGEABLE: Final = (
    *("window", "journal-limit", "overflow", "tail", "sync-age", "after-loss"),
    *("scrub-interval", "scrub-rate"),
)
# Which process has to hear of a change.
FOR_RECORDER: Final = frozenset({"sync_age_seconds", "tail_bytes"})
FOR_CURATOR: Final = frozenset(
    {
        *("window_seconds", "journal_limit", "overflow", "tail_bytes"),
        *("scrub_interval_seconds", "scrub_rate"),
    }
)


def parse_settings(values: Mapping[str, Any]) -> Settings:
    """Keys as an administrator writes them -> fields of a disk's configuration.

    :raises InvalidInput: an unknown key, or a value that it cannot have.
    """
    return dict(_parse(key.replace("_", "-"), value) for key, value in values.items())


def _parse(key: str, value: Any) -> tuple[str, Any]:
    if key in _WORDS:
        field, words = _WORDS[key]
        if value == "gap":
            raise InvalidInput("overflow=gap is not there yet: choose shrink, throttle or block")
        if value not in words:
            raise InvalidInput(f"{key} is one of {', '.join(words)}, not {value!r}")
        return field, value
    if key not in _DURATIONS and key not in _SIZES:
        raise InvalidInput(f"there is no setting {key!r}: choose {', '.join(CHANGEABLE)}")
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if key in _OPTIONAL:
            return {**_DURATIONS, **_SIZES}[key], None
        raise InvalidInput(f"{key} cannot be 'none'")
    try:
        if key in _DURATIONS:
            seconds = parse_duration(value) if isinstance(value, str) else value
            return _DURATIONS[key], float(_number(seconds))
        size = parse_size(value) if isinstance(value, str) else value
        return _SIZES[key], int(_number(size))
    except InvalidInput as error:
        raise InvalidInput(f"{key}: {error}") from error


def _number(value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidInput(f"{value!r} is no number")
    return value
