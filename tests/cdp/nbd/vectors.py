"""What a client writes, as bytes; a host that answers; and a conversation between the two.

The builders share only constants and structs with the codec under test.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from cdp.nbd import wire
from cdp.nbd.export import ExportInfo, Negotiated
from cdp.nbd.handshake import (
    Closed,
    Established,
    Event,
    ExportQuery,
    ListQuery,
    ServerHandshake,
)
from cdp.nbd.limits import DEFAULT_LIMITS, Limits

FLAGS = (
    wire.NBD_FLAG_SEND_FLUSH
    | wire.NBD_FLAG_SEND_FUA
    | wire.NBD_FLAG_SEND_TRIM
    | wire.NBD_FLAG_SEND_WRITE_ZEROES
    | wire.NBD_FLAG_SEND_DF
)
DISK = ExportInfo(
    "disk0",
    1 << 30,
    FLAGS,
    description="the first",
    meta_contexts=("base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"),
)
OTHER = ExportInfo("other", 4096, wire.NBD_FLAG_READ_ONLY, meta_contexts=("base:allocation",))
BOTH_FLAGS = wire.NBD_FLAG_C_FIXED_NEWSTYLE | wire.NBD_FLAG_C_NO_ZEROES


# --------------------------------------------------------------------------------- client's bytes


def client_flags(flags: int = BOTH_FLAGS) -> bytes:
    return wire.CLIENT_FLAGS.pack(flags)


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    announced = len(data) if length is None else length
    return wire.OPTION.pack(wire.NBD_OPTS_MAGIC, number, announced) + data


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return wire.UINT32.pack(len(raw)) + raw


def info_data(name: str | bytes, requests: Iterable[int] = ()) -> bytes:
    numbers = list(requests)
    packed = b"".join(map(wire.UINT16.pack, numbers))
    return string(name) + wire.UINT16.pack(len(numbers)) + packed


def go(name: str | bytes = "disk0", requests: Iterable[int] = ()) -> bytes:
    return option(wire.NBD_OPT_GO, info_data(name, requests))


def info(name: str | bytes = "disk0", requests: Iterable[int] = ()) -> bytes:
    return option(wire.NBD_OPT_INFO, info_data(name, requests))


def meta_data(name: str | bytes, queries: Iterable[str | bytes] = ()) -> bytes:
    strings = list(map(string, queries))
    return string(name) + wire.UINT32.pack(len(strings)) + b"".join(strings)


def set_meta(name: str | bytes = "disk0", *queries: str | bytes) -> bytes:
    return option(wire.NBD_OPT_SET_META_CONTEXT, meta_data(name, queries))


def list_meta(name: str | bytes = "disk0", *queries: str | bytes) -> bytes:
    return option(wire.NBD_OPT_LIST_META_CONTEXT, meta_data(name, queries))


STRUCTURED = option(wire.NBD_OPT_STRUCTURED_REPLY)
LIST = option(wire.NBD_OPT_LIST)
ABORT = option(wire.NBD_OPT_ABORT)


def cookie(number: int) -> bytes:
    return number.to_bytes(wire.COOKIE_SIZE, "big")


def request(
    kind: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    number: int = 0,
    data: bytes = b"",
    magic: int = wire.NBD_REQUEST_MAGIC,
) -> bytes:
    return wire.REQUEST.pack(magic, flags, kind, cookie(number), offset, length) + data


def write(offset: int, data: bytes, *, flags: int = 0, number: int = 0) -> bytes:
    return request(wire.NBD_CMD_WRITE, offset, len(data), flags=flags, number=number, data=data)


# ------------------------------------------------------------------------------------------- cuts


def whole(data: bytes) -> list[bytes]:
    return [data] if data else []


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def random_cuts(data: bytes, rng: random.Random) -> list[bytes]:
    places = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(8)))
    edges = [0, *places, len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def cuttings(data: bytes) -> Iterator[list[bytes]]:
    """The same bytes as a network may deliver them."""
    yield whole(data)
    yield bytewise(data)
    rng = random.Random(len(data))
    for _ in range(20):
        yield random_cuts(data, rng)


# ------------------------------------------------------------------------------------ conversation


@dataclass
class Outcome:
    """What a conversation came to: bytes sent, and events, with what came after the end."""

    sent: bytes
    events: list[Event]
    after: bytes = b""

    @property
    def negotiated(self) -> Negotiated:
        last = self.events[-1]
        assert isinstance(last, Established), last
        return last.negotiated

    @property
    def closed(self) -> Closed:
        last = self.events[-1]
        assert isinstance(last, Closed), last
        return last

    @property
    def replies(self) -> list[tuple[int, int, bytes]]:
        """(option, type, data) of every reply, which must be all there is after the greeting."""
        found, rest = split_replies(self.sent)
        assert rest == b""
        return found

    @property
    def kinds(self) -> list[int]:
        return [kind for _, kind, _ in self.replies]


def split_replies(sent: bytes) -> tuple[list[tuple[int, int, bytes]], bytes]:
    """Replies to options, and what does not look like one (the reply to EXPORT_NAME)."""
    magic, opts, flags = wire.GREETING.unpack_from(sent)
    assert (magic, opts, flags) == (wire.NBD_MAGIC, wire.NBD_OPTS_MAGIC, 3)
    position = wire.GREETING.size
    found = []
    while len(sent) - position >= wire.OPTION_REPLY.size:
        magic, number, kind, length = wire.OPTION_REPLY.unpack_from(sent, position)
        if magic != wire.NBD_REP_MAGIC:
            break
        begin = position + wire.OPTION_REPLY.size
        assert begin + length <= len(sent)
        found.append((number, kind, sent[begin : begin + length]))
        position = begin + length
    return found, sent[position:]


@dataclass
class Host:
    """Answers every query at once; `""` is an alias of the first export."""

    exports: list[ExportInfo] = field(default_factory=lambda: [DISK, OTHER])

    def answer(self, handshake: ServerHandshake, event: Event) -> None:
        if isinstance(event, ListQuery):
            handshake.answer_list([(e.name, e.description) for e in self.exports])
        elif isinstance(event, ExportQuery):
            by_name = {e.name: e for e in self.exports} | {"": self.exports[0]}
            if event.name in by_name:
                handshake.answer_export(by_name[event.name])
            else:
                handshake.refuse_export(wire.NBD_REP_ERR_UNKNOWN, f"no export {event.name!r}")


def converse(
    chunks: Iterable[bytes],
    *,
    host: Host | None = None,
    limits: Limits = DEFAULT_LIMITS,
    eof: bool = False,
    handshake: ServerHandshake | None = None,
) -> Outcome:
    """Feeds `chunks` (after the client's flags, if the caller put them there) and answers."""
    host = host or Host()
    handshake = handshake or ServerHandshake(limits)
    outcome = Outcome(b"", [])

    def pump() -> bool:
        while True:
            outcome.sent += b"".join(handshake.data_to_send())
            events = handshake.events_received()
            outcome.events += events
            if not events:
                return not outcome.events or not isinstance(
                    outcome.events[-1], Established | Closed
                )
            for event in events:
                host.answer(handshake, event)

    alive = pump()
    for chunk in chunks:
        if alive:
            handshake.receive_data(chunk)
            alive = pump()
        else:
            outcome.after += chunk
    if alive and eof:
        handshake.receive_eof()
        pump()
    if outcome.events and isinstance(outcome.events[-1], Established):
        outcome.after = outcome.events[-1].leftover + outcome.after
        outcome.events[-1] = Established(outcome.events[-1].negotiated, b"")
    else:
        outcome.after = b""
    return outcome


def haggle(*options: bytes, flags: int = BOTH_FLAGS, **details) -> Outcome:
    """A conversation in which every cutting of the same bytes has had the same outcome."""
    data = client_flags(flags) + b"".join(options)
    outcomes = [converse(chunks, **details) for chunks in cuttings(data)]
    for other in outcomes[1:]:
        assert other == outcomes[0]
    return outcomes[0]
