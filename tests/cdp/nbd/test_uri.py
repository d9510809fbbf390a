"""NBD URIs, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdp.nbd.uri import NbdUri, format_uri, parse_uri


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd+unix:///disk0?socket=/run/cdp/nbd.sock", NbdUri("disk0", "/run/cdp/nbd.sock")),
        ("nbd+unix:///?socket=/run/x", NbdUri("", "/run/x")),
        ("nbd+unix://?socket=rel.sock", NbdUri("", "rel.sock")),
        ("nbd+unix:///disk0@-10m?socket=/x", NbdUri("disk0@-10m", "/x")),
        ("nbd+unix:///disk0@seq:17?socket=/x", NbdUri("disk0@seq:17", "/x")),
        (
            "nbd+unix:///disk0@bookmark:before%20update%3F?socket=/a%20b%26c",
            NbdUri("disk0@bookmark:before update?", "/a b&c"),
        ),
        ("nbd+unix:///a+b?socket=/c+d", NbdUri("a+b", "/c+d")),
        ("nbd+unix:////disk?socket=/x", NbdUri("/disk", "/x")),
        ("nbd+unix:///%C3%A9?socket=/x", NbdUri("é", "/x")),
        ("nbd://backup.example:10810/disk0", NbdUri("disk0", host="backup.example", port=10810)),
        ("nbd://backup.example", NbdUri("", host="backup.example")),
        ("nbd://[::1]/d", NbdUri("d", host="::1")),
        ("nbd:///d", NbdUri("d", host="localhost")),
    ],
)
def test_parse(text: str, expected: NbdUri) -> None:
    assert parse_uri(text) == expected
    again = format_uri(
        expected.export, socket_path=expected.socket_path, host=expected.host, port=expected.port
    )
    assert parse_uri(again) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://x/y",
        "/run/nbd.sock",
        "nbds://host/x",
        "nbds+unix:///x?socket=/y",
        "nbd+unix:///x",
        "nbd+unix:///x?socket=",
        "nbd+unix://host/x?socket=/y",
        "nbd://host/x?socket=/y",
        "nbd://host/x?sokcet=/y",
        "nbd+unix:///x?socket=/y&tls-verify-peer=1",
        "nbd://user@host/x",
        "nbd://host:99999/x",
        "nbd://host:0/x",
        "nbd://host:x/x",
        "nbd://host/x#y",
        "nbd://host/%ff",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_uri(text)


def test_format() -> None:
    assert format_uri("disk0@seq:5", socket_path=Path("/a b")) == (
        "nbd+unix:///disk0@seq:5?socket=/a%20b"
    )
    assert format_uri("a?b#c+d", host="::1", port=1) == "nbd://[::1]:1/a%3Fb%23c%2Bd"
    assert format_uri("", host="h") == "nbd://h/"
    for address in ({}, {"socket_path": "/x", "host": "h"}, {"host": "h", "port": 0}):
        with pytest.raises(ValueError):
            format_uri("x", **address)


@given(st.text(), st.text(min_size=1).filter(lambda s: "\0" not in s))
def test_round_trip(export: str, path: str) -> None:
    assert parse_uri(format_uri(export, socket_path=path)) == NbdUri(export, path)
