"""What an export offers (`ExportInfo`), and what client and server agreed on (`Negotiated`).

`Negotiated` leaves the process that negotiated: it is sent, as JSON and together with the socket,
to the one that serves the disk. So it holds everything the transmission phase depends on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from cdp.nbd.wire import (
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_MAX_STRING,
    NBD_PORTABLE_PAYLOAD,
    LocalProtocolError,
)

# A size is an unsigned 64-bit number on the wire, and a signed one in every client.
MAX_EXPORT_SIZE: Final = (1 << 63) - 1
MAX_MIN_BLOCK: Final = 1 << 16
MIN_PREFERRED_BLOCK: Final = 512


def check_string(text: str, what: str) -> None:
    """LocalProtocolError unless `text` is a string as proto.md, "Conventions", defines it."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise LocalProtocolError(f"{what} is not valid UTF-8: {text!r}") from error
    if len(encoded) > NBD_MAX_STRING:
        raise LocalProtocolError(f"{what} is longer than {NBD_MAX_STRING} bytes: {text[:80]!r}...")
    if "\0" in text:
        raise LocalProtocolError(f"{what} holds a NUL: {text!r}")


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """One export, as its host describes it. LocalProtocolError when that breaks a rule.

    `name` is canonical and may differ from what was asked for ("" asks for the default).
    `size` and blocks in bytes. `flags` are transmission flags; HAS_FLAGS is implied, and SEND_DF
    reaches the client only if it negotiated structured replies. `max_block` is what proto.md calls
    the maximum payload size. `meta_contexts` are the names that may be selected.
    Source: proto.md, "Transmission flags", "Size constraints", "Metadata querying".
    """

    name: str
    size: int
    flags: int
    min_block: int = 1
    preferred_block: int = 4096
    max_block: int = NBD_PORTABLE_PAYLOAD
    description: str = ""
    meta_contexts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_string(self.name, "the name of an export")
        check_string(self.description, "the description of an export")
        if not 0 <= self.size <= MAX_EXPORT_SIZE:
            raise LocalProtocolError(f"export {self.name!r}: size {self.size} is out of range")
        if not 0 <= self.flags <= 0xFFFF:
            raise LocalProtocolError(f"export {self.name!r}: flags {self.flags:#x} are not 16 bits")
        if self.flags & NBD_FLAG_SEND_FAST_ZERO and not self.flags & NBD_FLAG_SEND_WRITE_ZEROES:
            raise LocalProtocolError(f"export {self.name!r}: FAST_ZERO without WRITE_ZEROES")
        self._check_blocks()
        for context in self.meta_contexts:
            check_string(context, "the name of a metadata context")
            namespace, _, leaf = context.partition(":")
            # A name that ends in ":" would be a wildcard.
            if not namespace or not leaf or leaf.endswith(":"):
                raise LocalProtocolError(f"metadata context {context!r} is not NAMESPACE:LEAF")
        if len(set(self.meta_contexts)) != len(self.meta_contexts):
            raise LocalProtocolError(f"export {self.name!r}: a metadata context is offered twice")

    def _check_blocks(self) -> None:
        if not _is_power_of_two(self.min_block) or self.min_block > MAX_MIN_BLOCK:
            raise LocalProtocolError(f"export {self.name!r}: minimum block {self.min_block}")
        least = max(self.min_block, MIN_PREFERRED_BLOCK)
        if not _is_power_of_two(self.preferred_block) or self.preferred_block < least:
            raise LocalProtocolError(
                f"export {self.name!r}: preferred block {self.preferred_block}"
            )
        if not self.preferred_block <= self.max_block <= 0xFFFFFFFF:
            raise LocalProtocolError(f"export {self.name!r}: maximum block {self.max_block}")
        if self.size % self.min_block:
            # The client could not reach the end.
            raise LocalProtocolError(
                f"export {self.name!r}: size {self.size} is no multiple of {self.min_block}"
            )


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What the transmission phase of one connection obeys.

    `export_name` is canonical, `requested_name` what the client wrote. `flags` are the transmission
    flags as sent. `meta_contexts` maps the identifiers told to the client to names, in the order of
    selection. `max_payload` is the advertised maximum, bytes; `block_size_requested` says that the
    client asked for the block sizes and so must obey them.
    """

    export_name: str
    requested_name: str
    size: int
    flags: int
    structured_replies: bool
    meta_contexts: Mapping[int, str]
    min_block: int
    preferred_block: int
    max_payload: int
    block_size_requested: bool

    def __post_init__(self) -> None:
        if not self.flags & NBD_FLAG_HAS_FLAGS:
            raise LocalProtocolError(f"transmission flags {self.flags:#x} lack HAS_FLAGS")
        if self.meta_contexts and not self.structured_replies:
            raise LocalProtocolError("metadata contexts without structured replies")

    def to_json(self) -> str:
        """One line of JSON that `from_json` turns into an equal object."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["meta_contexts"] = {str(key): name for key, name in self.meta_contexts.items()}
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Negotiated:
        """The object `to_json` wrote; LocalProtocolError for anything else.

        Only processes of ours exchange this, so a mismatch means that their versions differ.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise LocalProtocolError(f"negotiated state is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise LocalProtocolError("negotiated state is no JSON object")
        expected = {field.name: _TYPES[str(field.type)] for field in fields(cls)}
        if values.keys() != expected.keys():
            odd = sorted(values.keys() ^ expected.keys())
            raise LocalProtocolError(f"negotiated state of another version, see fields {odd}")
        for name, kind in expected.items():
            if type(values[name]) is not kind:
                raise LocalProtocolError(f"negotiated state: {name} is {values[name]!r}")
        values["meta_contexts"] = _contexts(values["meta_contexts"])
        return cls(**values)


# Keyed by annotation, so that a field of a new kind fails at once instead of going unchecked.
_TYPES: Final[dict[str, type]] = {"str": str, "int": int, "bool": bool, "Mapping[int, str]": dict}


def _contexts(raw: dict[str, Any]) -> dict[int, str]:
    contexts = {}
    for key, name in raw.items():
        if not key.isdecimal() or not isinstance(name, str):
            raise LocalProtocolError(f"negotiated state: metadata context {key!r}: {name!r}")
        contexts[int(key)] = name
    return contexts
