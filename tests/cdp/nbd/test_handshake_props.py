"""Haggling with clients that keep to nothing: cuts and delays change no outcome, ends are final."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from cdp.nbd import wire
from cdp.nbd.export import Negotiated
from cdp.nbd.handshake import Closed, Established, Event, ServerHandshake
from cdp.nbd.limits import Limits
from tests.cdp.nbd.vectors import (
    client_flags,
    converse,
    info_data,
    meta_data,
    option,
    random_cuts,
    split_replies,
)

names = st.sampled_from(["disk0", "other", "", "nothing", "é" * 10])
queries = st.sampled_from(
    ["base:", "base:allocation", "qemu:", "qemu:dirty-bitmap:a", "x:", "bad", "", "a:b"]
)
infos = st.builds(info_data, names, st.lists(st.integers(0, 9), max_size=4))
metas = st.builds(meta_data, names, st.lists(queries, max_size=4))
EXPORT_NAME_DATA = names.map(str.encode)
payloads = st.one_of(st.just(b""), infos, metas, EXPORT_NAME_DATA, st.binary(max_size=40))
honest = st.one_of(
    st.builds(option, st.sampled_from([6, 7]), infos),
    st.builds(option, st.sampled_from([9, 10]), metas),
    st.builds(option, st.sampled_from([3, 5, 8]), st.just(b"")),
)
odd = st.builds(option, st.integers(0, 12), payloads)
streams = st.tuples(
    st.sampled_from([0, 1, 2, 3, 3, 3, 3, 4]).map(client_flags),
    st.lists(st.one_of(honest, odd), max_size=8).map(b"".join),
    st.binary(max_size=30),
).map(b"".join)


@given(streams, st.randoms(use_true_random=False))
def test_cuts_change_nothing(stream: bytes, rng: random.Random) -> None:
    expected = converse([stream], eof=True)
    assert converse(random_cuts(stream, rng), eof=True) == expected


@given(streams)
def test_a_slow_host_changes_nothing(stream: bytes) -> None:
    """All bytes are there before the first answer."""
    handshake = ServerHandshake()
    handshake.receive_data(stream)
    late = converse([], handshake=handshake)
    assert late == converse([stream])


@given(streams)
def test_replies_are_well_formed_and_the_end_is_final(stream: bytes) -> None:
    outcome = converse([stream], eof=True)
    replies, rest = split_replies(outcome.sent)
    assert all(number <= 0xFFFFFFFF for number, _, _ in replies)
    assert len(rest) in {0, 10, 134}
    ends = [event for event in outcome.events if isinstance(event, Established | Closed)]
    assert ends == outcome.events[-1:]
    if isinstance(ends[0], Established):
        negotiated = ends[0].negotiated
        assert Negotiated.from_json(negotiated.to_json()) == negotiated
        assert bool(negotiated.flags & wire.NBD_FLAG_SEND_DF) <= negotiated.structured_replies
        assert stream.endswith(outcome.after)


@given(st.binary(max_size=200), st.randoms(use_true_random=False))
def test_noise(stream: bytes, rng: random.Random) -> None:
    data = client_flags() + stream
    assert converse(random_cuts(data, rng), eof=True) == converse([data], eof=True)


@given(st.lists(st.binary(min_size=1, max_size=3000), max_size=20))
def test_what_is_held_is_bounded(chunks: list[bytes]) -> None:
    """Also while the host does not answer, and while an option is skipped."""
    limits = Limits(max_option_bytes=8192, max_skipped_option_bytes=10000)
    for beginning in (option(3), option(6, length=9000), option(6, length=8192)):
        handshake = ServerHandshake(limits)
        handshake.receive_data(client_flags() + beginning)
        for chunk in chunks:
            handshake.receive_data(chunk)
            assert len(handshake._buffer) <= 8192 + wire.OPTION.size
        events: list[Event] = handshake.events_received()
        assert len(events) <= 2
