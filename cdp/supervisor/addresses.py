"""Addresses to listen on, and the refusal to let strangers in by accident."""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from cdp.nbd.uri import format_uri
from cdp.nbd.wire import NBD_DEFAULT_PORT
from journal.errors import Busy, InvalidInput

BACKLOG: Final = 128


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port; port 0 lets the kernel choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_nbd(text: str) -> Address:
    """``tcp://HOST[:PORT]``, PORT 10809 unless given.

    :raises InvalidInput: anything else.
    """
    if not text.startswith("tcp://"):
        raise InvalidInput(f"{text!r}: write tcp://HOST:PORT")
    return _parse(text, text, NBD_DEFAULT_PORT)


def parse_http(text: str) -> Address:
    """``HOST:PORT``.

    :raises InvalidInput: anything else.
    """
    return _parse(text, f"tcp://{text}", None)


def _parse(text: str, url: str, default_port: int | None) -> Address:
    try:
        parts = urlsplit(url)
        port = parts.port if parts.port is not None else default_port
    except ValueError as error:
        raise InvalidInput(f"{text!r} is no address: {error}") from error
    extra = parts.path.strip("/") or parts.query or parts.fragment or parts.username
    if not parts.hostname or port is None or extra:
        raise InvalidInput(f"{text!r} is no address: write HOST:PORT, as in 127.0.0.1:{port or 80}")
    return Address(parts.hostname, port)


def listen(address: Address, *, allow_remote: bool, what: str) -> list[socket.socket]:
    """Listening sockets for all addresses of a host, not blocking.

    :raises InvalidInput: no such host, no permission, or reachable by others without being allowed.
    :raises Busy: somebody listens there already.
    """
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise InvalidInput(f"{what} cannot listen on {address}: {error.strerror}") from error
    targets = list(dict.fromkeys((family, where) for family, _, _, _, where in found))
    for _, where in targets:
        loopback = ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback
        if not loopback and not allow_remote:
            raise InvalidInput(
                f"{what} would be open to everybody who can reach {address}, without a password "
                "and unencrypted: use 127.0.0.1, or say --allow-remote-without-tls"
            )
    sockets: list[socket.socket] = []
    try:
        for family, where in targets:
            # One port for all of them, also if the kernel chooses it.
            port = sockets[0].getsockname()[1] if sockets else address.port
            sockets.append(_listen(family, (where[0], port, *where[2:])))
    except OSError as error:
        for one in sockets:
            one.close()
        if error.errno == errno.EADDRINUSE:
            raise Busy(f"{what} cannot listen on {address}: another program does") from error
        raise InvalidInput(f"{what} cannot listen on {address}: {error.strerror}") from error
    return sockets


def _listen(family: int, where: tuple[object, ...]) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.setblocking(False)
        one.bind(where)
        one.listen(BACKLOG)
    except BaseException:
        one.close()
        raise
    return one


def bound_address(one: socket.socket, host: str) -> Address:
    """Where a socket listens, by the name that was asked for."""
    return Address(host, int(one.getsockname()[1]))


def nbd_uri(address: Address, export: str = "") -> str:
    """The NBD URI of an export on a TCP listener."""
    return format_uri(export, host=address.host, port=address.port)
