"""Addresses to listen on, and the refusal to let strangers in by accident."""

from __future__ import annotations

import socket

import pytest

from cdp.supervisor import addresses
from cdp.supervisor.addresses import Address
from journal.errors import Busy, InvalidInput


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("tcp://127.0.0.1:10810", "127.0.0.1", 10810),
        ("tcp://localhost", "localhost", 10809),
        ("tcp://[::1]:1", "::1", 1),
        ("tcp://127.0.0.1:0", "127.0.0.1", 0),
    ],
)
def test_nbd_addresses(text: str, host: str, port: int) -> None:
    assert addresses.parse_nbd(text) == Address(host, port)


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1:1", "unix:///x", "tcp://", "tcp://:1", "tcp://h:x", "tcp://h:1/x", "tcp://u@h"],
)
def test_what_is_no_nbd_address(text: str) -> None:
    with pytest.raises(InvalidInput):
        addresses.parse_nbd(text)


@pytest.mark.parametrize("text", ["", "9464", "localhost", ":1", "h:70000", "h:1?x"])
def test_what_is_no_http_address(text: str) -> None:
    with pytest.raises(InvalidInput):
        addresses.parse_http(text)


def test_addresses_are_written_as_they_are_read() -> None:
    for text in ("127.0.0.1:80", "[::1]:80"):
        assert str(addresses.parse_http(text)) == text
    assert addresses.nbd_uri(Address("::1", 10809), "disk0") == "nbd://[::1]/disk0"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_are_only_let_in_when_that_is_said(host: str) -> None:
    with pytest.raises(InvalidInput, match="--allow-remote-without-tls"):
        addresses.listen(Address(host, 0), allow_remote=False, what="NBD")
    for one in addresses.listen(Address(host, 0), allow_remote=True, what="NBD"):
        one.close()


def test_all_addresses_of_a_name_get_one_port() -> None:
    sockets = addresses.listen(Address("localhost", 0), allow_remote=False, what="NBD")
    assert len({one.getsockname()[1] for one in sockets}) == 1
    for one in sockets:
        one.close()


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(Busy, match="another program does"):
            address = Address("127.0.0.1", taken.getsockname()[1])
            addresses.listen(address, allow_remote=False, what="HTTP")


def test_a_host_that_is_none() -> None:
    with pytest.raises(InvalidInput, match="cannot listen on"):
        addresses.listen(Address("no.such.host.invalid", 1), allow_remote=False, what="NBD")
