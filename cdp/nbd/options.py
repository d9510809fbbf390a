"""What the data of an option say: parsed and checked, without any state.

Source: proto.md, "Option types", "Metadata querying", and "Conventions" for strings.
"""

from __future__ import annotations

from cdp.nbd.wire import (
    NBD_MAX_STRING,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_TOO_BIG,
    UINT16,
    UINT32,
)


class InvalidOption(Exception):
    """The data of an option break its syntax, or its meaning: answer, and go on."""

    def __init__(self, message: str, code: int = NBD_REP_ERR_INVALID) -> None:
        super().__init__(message)
        self.code = code


def decode_string(raw: bytes, what: str) -> str:
    if len(raw) > NBD_MAX_STRING:
        raise InvalidOption(f"{what} is longer than {NBD_MAX_STRING} bytes", NBD_REP_ERR_TOO_BIG)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise InvalidOption(f"{what} is not valid UTF-8") from None
    if "\0" in text:
        raise InvalidOption(f"{what} holds a NUL")
    return text


def take_string(data: bytes, position: int, what: str) -> tuple[str, int]:
    """The string at `position`, after its 32-bit length, and where it ends."""
    begin = position + UINT32.size
    if begin > len(data):
        raise InvalidOption(f"the data end before {what}")
    (length,) = UINT32.unpack_from(data, position)
    if begin + length > len(data):
        raise InvalidOption(f"{what} reaches beyond the data")
    return decode_string(data[begin : begin + length], what), begin + length


def parse_info(data: bytes) -> tuple[str, frozenset[int]]:
    """Name and information requests of INFO and GO."""
    name, position = take_string(data, 0, "the name of the export")
    if position + UINT16.size > len(data):
        raise InvalidOption("the data end before the information requests")
    (count,) = UINT16.unpack_from(data, position)
    position += UINT16.size
    if position + count * UINT16.size != len(data):
        raise InvalidOption(f"the data do not hold exactly {count} information requests")
    return name, frozenset(number for (number,) in UINT16.iter_unpack(data[position:]))


def parse_meta(data: bytes) -> tuple[str, tuple[str, ...]]:
    """Name and queries of LIST_META_CONTEXT and SET_META_CONTEXT."""
    name, position = take_string(data, 0, "the name of the export")
    if position + UINT32.size > len(data):
        raise InvalidOption("the data end before the number of queries")
    (count,) = UINT32.unpack_from(data, position)
    position += UINT32.size
    queries = []
    # A wrong count ends at the end of the data, which are bounded; it allocates nothing.
    for _ in range(count):
        query, position = take_string(data, position, "a query")
        if ":" not in query:
            raise InvalidOption(f"the query {query[:80]!r} names no namespace")
        queries.append(query)
    if position != len(data):
        raise InvalidOption("data follow the last query")
    return name, tuple(queries)


def matches(query: str, name: str) -> bool:
    """Whether LIST_META_CONTEXT lists `name` for `query`: one that ends in ":" is a wildcard."""
    return name == query or (query.endswith(":") and name.startswith(query))
