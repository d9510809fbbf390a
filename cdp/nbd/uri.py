"""NBD URIs: nbd://HOST[:PORT]/EXPORT and nbd+unix:///EXPORT?socket=PATH.

Source: doc/uri.md of https://github.com/NetworkBlockDevice/nbd. TLS (nbds) is refused for now.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from cdp.nbd.wire import NBD_DEFAULT_PORT

# What may stand unquoted in a path, for every client. "@" and ":" keep `disk0@seq:17` readable.
_EXPORT_SAFE = "/@:"


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is: `socket_path` for a unix socket, else `host` and `port`. ValueError
    unless it is exactly one of them."""

    export: str = ""
    socket_path: str | None = None
    host: str | None = None
    port: int = NBD_DEFAULT_PORT

    def __post_init__(self) -> None:
        if (self.socket_path is None) is (self.host is None):
            raise ValueError("an NBD address is either a socket's path or a host")
        if not 0 < self.port <= 0xFFFF:
            raise ValueError(f"port {self.port} is out of range")


def parse_uri(text: str) -> NbdUri:
    """The address in `text`, percent-decoded. ValueError says what is wrong with it."""
    parts = urlsplit(text)
    if parts.scheme in {"nbds", "nbds+unix"}:
        raise ValueError(f"TLS is not supported: {text}")
    if parts.scheme not in {"nbd", "nbd+unix"}:
        raise ValueError(f"not an NBD URI (nbd://... or nbd+unix:///...): {text}")
    if parts.fragment:
        raise ValueError(f"an NBD URI has no fragment, write # as %23: {text}")
    # The first slash separates, it does not belong to the name.
    export = unquote(parts.path.removeprefix("/"), errors="strict")
    query = dict(parse_qsl(parts.query.replace("+", "%2B"), errors="strict"))
    socket_path = query.pop("socket", None)
    if query:
        raise ValueError(f"unknown parameters {sorted(query)}: {text}")
    if parts.scheme == "nbd+unix":
        if not socket_path:
            raise ValueError(f"?socket=PATH is missing: {text}")
        if parts.netloc:
            raise ValueError(f"a unix socket has no host; write nbd+unix:///EXPORT: {text}")
        return NbdUri(export, socket_path=socket_path)
    if socket_path is not None:
        raise ValueError(f"?socket= belongs to nbd+unix: {text}")
    if parts.username is not None:
        raise ValueError(f"a user name means nothing without TLS: {text}")
    port = parts.port if parts.port is not None else NBD_DEFAULT_PORT
    return NbdUri(export, host=parts.hostname or "localhost", port=port)


def format_uri(
    export: str,
    *,
    socket_path: str | os.PathLike[str] | None = None,
    host: str | None = None,
    port: int = NBD_DEFAULT_PORT,
) -> str:
    """The URI that `parse_uri` turns back into the same address. ValueError as in NbdUri."""
    path = None if socket_path is None else os.fspath(socket_path)
    uri = NbdUri(export, path, host, port)
    name = quote(uri.export, safe=_EXPORT_SAFE)
    if uri.socket_path is not None:
        return f"nbd+unix:///{name}?socket={quote(uri.socket_path, safe='/')}"
    assert uri.host is not None
    authority = f"[{uri.host}]" if ":" in uri.host else uri.host
    if uri.port != NBD_DEFAULT_PORT:
        authority += f":{uri.port}"
    return f"nbd://{authority}/{name}"
