"""What an export offers, what was agreed on, limits: impossible ones are refused."""

from __future__ import annotations

import pytest

from cdp.nbd import wire
from cdp.nbd.export import ExportInfo, Negotiated
from cdp.nbd.limits import Limits
from tests.cdp.nbd.vectors import DISK, STRUCTURED, go, haggle, set_meta

ALL = DISK.meta_contexts


def test_negotiated_survives_json() -> None:
    outcome = haggle(STRUCTURED, set_meta("disk0", *ALL), go("disk0", [3]))
    text = outcome.negotiated.to_json()
    assert "\n" not in text
    assert Negotiated.from_json(text) == outcome.negotiated
    assert Negotiated.from_json(text.encode()) == outcome.negotiated


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"size": ', '"size": "x", "was": '),
        ('"size": 1073741824', '"size": "1073741824"'),
        ('"size": 1073741824', '"size": true'),
        ('"structured_replies": true', '"structured_replies": 1'),
        ('"flags": ', '"flagz": '),
        ('"1": "base:allocation"', '"one": "base:allocation"'),
        ('"1": "base:allocation"', '"1": 2'),
        ("{", "["),
        ('"structured_replies": true', '"structured_replies": false'),
    ],
)
def test_a_foreign_negotiated_is_refused(old: str, new: str) -> None:
    text = haggle(STRUCTURED, set_meta("disk0", *ALL), go()).negotiated.to_json()
    assert old in text
    with pytest.raises(wire.LocalProtocolError):
        Negotiated.from_json(text.replace(old, new))
    with pytest.raises(wire.LocalProtocolError):
        Negotiated.from_json("3")


@pytest.mark.parametrize(
    "details",
    [
        {"name": "x" * 4097},
        {"name": "a\0b"},
        {"name": "\ud800"},
        {"description": "x" * 5000},
        {"size": -1},
        {"size": 1 << 63},
        {"flags": 1 << 16},
        {"flags": wire.NBD_FLAG_SEND_FAST_ZERO},
        {"min_block": 0},
        {"min_block": 3},
        {"min_block": 1 << 17, "preferred_block": 1 << 17},
        {"min_block": 4096, "preferred_block": 512},
        {"min_block": 4096, "size": 4097},
        {"preferred_block": 256},
        {"preferred_block": 5000},
        {"max_block": 4095},
        {"max_block": 1 << 32},
        {"meta_contexts": ("allocation",)},
        {"meta_contexts": (":allocation",)},
        {"meta_contexts": ("base:",)},
        {"meta_contexts": ("a:b", "a:b")},
    ],
)
def test_impossible_exports(details: dict) -> None:
    with pytest.raises(wire.LocalProtocolError):
        ExportInfo(**({"name": "d", "size": 4096, "flags": 0} | details))


@pytest.mark.parametrize(
    "details",
    [
        {"max_payload": 0},
        {"max_requests_per_scan": 0},
        {"max_option_bytes": 100},
        {"max_skipped_option_bytes": 100},
        {"max_options": 0},
        {"max_meta_contexts": -1},
    ],
)
def test_impossible_limits(details: dict) -> None:
    with pytest.raises(ValueError):
        Limits(**details)


@pytest.mark.parametrize("least", [1, 512, 4096, 65536])
def test_the_smallest_preferred_block(least: int) -> None:
    smallest = max(least, 512)
    info = ExportInfo("d", 65536, 0, min_block=least, preferred_block=smallest, max_block=smallest)
    assert info.max_block == smallest
