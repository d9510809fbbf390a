"""Option haggling: every option, its errors, and the ends of a connection.

Each vector runs whole, byte by byte and in random cuts (`haggle`), and must come to the same.
"""

from __future__ import annotations

import dataclasses

import pytest

from cdp.nbd import wire
from cdp.nbd.export import ExportInfo, Negotiated
from cdp.nbd.handshake import Closed, Established, ExportQuery, ListQuery, ServerHandshake
from cdp.nbd.limits import Limits
from tests.cdp.nbd.vectors import (
    ABORT,
    BOTH_FLAGS,
    DISK,
    FLAGS,
    LIST,
    STRUCTURED,
    Host,
    client_flags,
    converse,
    cuttings,
    go,
    haggle,
    info,
    info_data,
    list_meta,
    meta_data,
    option,
    set_meta,
    split_replies,
    string,
)

ACK = wire.NBD_REP_ACK
INVALID = wire.NBD_REP_ERR_INVALID
UNKNOWN = wire.NBD_REP_ERR_UNKNOWN
META = wire.NBD_REP_META_CONTEXT
INFO = wire.NBD_REP_INFO
SMALL = Limits(max_option_bytes=8192, max_skipped_option_bytes=16384, max_options=5)


def contexts_of(replies: list[tuple[int, int, bytes]]) -> list[tuple[int, str]]:
    return [
        (wire.UINT32.unpack_from(data)[0], data[4:].decode())
        for _, kind, data in replies
        if kind == META
    ]


# ------------------------------------------------------------------------- greeting, client flags


def test_the_greeting_is_sent_before_anything_is_received() -> None:
    assert ServerHandshake().data_to_send() == [b"NBDMAGICIHAVEOPT\x00\x03"]


@pytest.mark.parametrize("flags", [4, 1 << 31, 0xFFFFFFFF, 7])
def test_unknown_client_flags_end_the_connection(flags: int) -> None:
    outcome = haggle(LIST, flags=flags)
    assert not outcome.closed.clean
    assert "client flags" in outcome.closed.reason
    assert outcome.kinds == []


def test_a_client_without_fixed_newstyle_is_served() -> None:
    outcome = haggle(option(wire.NBD_OPT_EXPORT_NAME, b"disk0"), flags=0)
    assert outcome.negotiated.export_name == "disk0"


def test_a_wrong_option_magic_ends_the_connection() -> None:
    outcome = haggle(b"X" * 16)
    assert not outcome.closed.clean


# ------------------------------------------------------------------------------------ EXPORT_NAME


@pytest.mark.parametrize(("flags", "zeroes"), [(BOTH_FLAGS, 0), (1, 124), (0, 124), (2, 0)])
def test_export_name_honours_no_zeroes(flags: int, zeroes: int) -> None:
    outcome = haggle(option(wire.NBD_OPT_EXPORT_NAME, b"disk0"), b"trailing", flags=flags)
    replies, rest = split_replies(outcome.sent)
    assert replies == []
    without_df = FLAGS & ~wire.NBD_FLAG_SEND_DF | wire.NBD_FLAG_HAS_FLAGS
    assert rest == wire.EXPORT_NAME_REPLY.pack(DISK.size, without_df) + bytes(zeroes)
    assert outcome.after == b"trailing"
    assert not outcome.negotiated.block_size_requested


@pytest.mark.parametrize("name", [b"nothing", b"\xff\xfe", b"a\0b", b"x" * 4097, b"x" * 20000])
def test_export_name_without_such_an_export_hangs_up(name: bytes) -> None:
    limits = dataclasses.replace(SMALL, max_skipped_option_bytes=1 << 20)
    outcome = haggle(option(wire.NBD_OPT_EXPORT_NAME, name), limits=limits)
    assert outcome.closed.reason
    assert outcome.kinds == []


# ------------------------------------------------------------------------------------ INFO and GO


def test_go_establishes_and_hands_over_what_follows() -> None:
    outcome = haggle(go("disk0"), b"first request")
    export = wire.INFO_EXPORT.pack(0, DISK.size, outcome.negotiated.flags)
    assert outcome.replies == [(wire.NBD_OPT_GO, INFO, export), (wire.NBD_OPT_GO, ACK, b"")]
    assert outcome.after == b"first request"
    assert outcome.negotiated == Negotiated(
        export_name="disk0",
        requested_name="disk0",
        size=DISK.size,
        flags=FLAGS & ~wire.NBD_FLAG_SEND_DF | wire.NBD_FLAG_HAS_FLAGS,
        structured_replies=False,
        meta_contexts={},
        min_block=1,
        preferred_block=4096,
        max_payload=1 << 25,
        block_size_requested=False,
    )


def test_go_never_sends_zeroes() -> None:
    assert haggle(go("disk0"), flags=1).kinds == [INFO, ACK]


def test_every_information_that_was_asked_for_and_nothing_else() -> None:
    outcome = haggle(go("", [1, 2, 3, 0, 77, 3]))
    payloads = [data for _, kind, data in outcome.replies if kind == INFO]
    assert payloads[1:] == [
        b"\0\1disk0",
        b"\0\2the first",
        wire.INFO_BLOCK_SIZE.pack(3, 1, 4096, 1 << 25),
    ]
    assert len(payloads) == 4
    assert outcome.negotiated.export_name == "disk0"
    assert outcome.negotiated.requested_name == ""
    assert outcome.negotiated.block_size_requested


def test_an_empty_description_is_left_out() -> None:
    assert haggle(info("other", [2])).kinds == [INFO, ACK]


@pytest.mark.parametrize("requests", [[], [3], [1, 2, 3]])
@pytest.mark.parametrize("before", [b"", STRUCTURED])
def test_info_and_then_go_answer_the_same(requests: list[int], before: bytes) -> None:
    outcome = haggle(before, info("disk0", requests), go("disk0", requests))
    of_info = [r[1:] for r in outcome.replies if r[0] == wire.NBD_OPT_INFO]
    of_go = [r[1:] for r in outcome.replies if r[0] == wire.NBD_OPT_GO]
    assert of_info == of_go
    queries = [event.option for event in outcome.events if isinstance(event, ExportQuery)]
    assert queries == [wire.NBD_OPT_INFO, wire.NBD_OPT_GO]


def test_an_unknown_export_leaves_the_client_its_chance() -> None:
    outcome = haggle(go("nothing"), info("nothing"), go("disk0"))
    assert outcome.kinds == [UNKNOWN, UNKNOWN, INFO, ACK]
    assert outcome.replies[0][2] == b"no export 'nothing'"


BAD_INFO_DATA = [
    b"",
    b"\0",
    string("disk0"),
    string("disk0") + b"\0",
    string("disk0") + b"\0\1",
    string("disk0") + b"\0\1\0",
    string("disk0") + b"\0\0\0\0",
    b"\0\0\0\xffdisk0\0\0",
    b"\xff\xff\xff\xff" + b"disk0\0\0",
    info_data(b"\xff"),
    info_data("a\0b"),
]


@pytest.mark.parametrize("data", BAD_INFO_DATA)
@pytest.mark.parametrize("number", [wire.NBD_OPT_INFO, wire.NBD_OPT_GO])
def test_malformed_info_and_go(number: int, data: bytes) -> None:
    outcome = haggle(option(number, data), go("disk0"))
    assert outcome.kinds == [INVALID, INFO, ACK]


def test_a_name_may_have_4096_bytes_and_no_more() -> None:
    assert haggle(info("n" * 4096)).kinds == [UNKNOWN]
    assert haggle(info("n" * 4097)).kinds == [wire.NBD_REP_ERR_TOO_BIG]


# --------------------------------------------------------------------------------- simple options


def test_abort_is_acknowledged_and_its_data_ignored() -> None:
    for data in (b"", b"good-bye", bytes(10000)):
        outcome = haggle(option(wire.NBD_OPT_ABORT, data), limits=SMALL)
        assert outcome.replies == [(wire.NBD_OPT_ABORT, ACK, b"")]
        assert outcome.closed.clean


def test_list() -> None:
    outcome = haggle(LIST, LIST)
    one = [
        (wire.NBD_OPT_LIST, wire.NBD_REP_SERVER, string("disk0") + b"the first"),
        (wire.NBD_OPT_LIST, wire.NBD_REP_SERVER, string("other")),
        (wire.NBD_OPT_LIST, ACK, b""),
    ]
    assert outcome.replies == one + one
    assert outcome.events == [ListQuery(), ListQuery()]


@pytest.mark.parametrize(
    "number", [wire.NBD_OPT_LIST, wire.NBD_OPT_STARTTLS, wire.NBD_OPT_STRUCTURED_REPLY]
)
def test_options_that_take_no_data(number: int) -> None:
    assert haggle(option(number, b"x"), LIST).kinds[0] == INVALID


def test_structured_replies_are_not_negotiated_by_an_invalid_option() -> None:
    outcome = haggle(option(wire.NBD_OPT_STRUCTURED_REPLY, b"x"), go())
    assert not outcome.negotiated.structured_replies


def test_df_is_offered_only_with_structured_replies() -> None:
    outcome = haggle(STRUCTURED, go())
    assert outcome.negotiated.structured_replies
    assert outcome.negotiated.flags & wire.NBD_FLAG_SEND_DF
    assert wire.INFO_EXPORT.unpack(outcome.replies[1][2])[2] == outcome.negotiated.flags


def test_starttls_is_against_policy() -> None:
    assert haggle(option(wire.NBD_OPT_STARTTLS)).kinds == [wire.NBD_REP_ERR_POLICY]


@pytest.mark.parametrize("number", [0, 4, 11, 12, 4096, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"payload", bytes(300)])
def test_unknown_options_are_refused_and_their_data_consumed(number: int, data: bytes) -> None:
    outcome = haggle(option(number, data), go())
    assert outcome.kinds == [wire.NBD_REP_ERR_UNSUP, INFO, ACK]
    assert outcome.replies[0][0] == number


# ------------------------------------------------------------------------------ metadata contexts

ALL = ["base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], ALL),
        (["base:"], ALL[:1]),
        (["base:allocation"], ALL[:1]),
        (["base:allocation", "base:"], ALL[:1]),
        (["base:nothing"], []),
        (["qemu:"], ALL[1:]),
        (["qemu:dirty-bitmap:"], ALL[1:]),
        (["qemu:dirty-bitmap:b"], ALL[2:]),
        (["qemu:dirty-bitmap:b", "base:"], [ALL[0], ALL[2]]),
        (["unknown:", "x-cdp:whatever"], []),
        (["base:alloc"], []),
        ([":"], []),
    ],
)
def test_list_meta_context(queries: list[str], expected: list[str]) -> None:
    outcome = haggle(STRUCTURED, list_meta("disk0", *queries))
    assert contexts_of(outcome.replies) == [(0, name) for name in expected]
    assert outcome.kinds[-1] == ACK


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], []),
        (["base:"], []),
        (["base:allocation"], ALL[:1]),
        (["base:allocation", "base:allocation"], ALL[:1]),
        (["qemu:dirty-bitmap:"], []),
        (["qemu:dirty-bitmap:b", "base:allocation", "other:thing"], [ALL[0], ALL[2]]),
    ],
)
def test_set_meta_context(queries: list[str], expected: list[str]) -> None:
    outcome = haggle(STRUCTURED, set_meta("disk0", *queries), go())
    selected = contexts_of(outcome.replies)
    assert [name for _, name in selected] == expected
    assert dict(selected) == outcome.negotiated.meta_contexts
    assert len({number for number, _ in selected}) == len(selected)


BAD_META_DATA = [
    b"",
    string("disk0"),
    string("disk0") + b"\0\0\0",
    string("disk0") + b"\0\0\0\1",
    string("disk0") + b"\0\0\0\0x",
    string("disk0") + b"\xff\xff\xff\xff" + string("base:allocation"),
    meta_data("disk0", ["base:allocation"])[:-1],
    meta_data("disk0", ["base:allocation"]) + b"x",
    meta_data("disk0", ["no namespace"]),
    meta_data("disk0", [""]),
    meta_data("disk0", [b"base:\xff"]),
    meta_data(b"\xff", ["base:allocation"]),
]


@pytest.mark.parametrize("data", BAD_META_DATA)
def test_malformed_meta_context_options(data: bytes) -> None:
    for number in (wire.NBD_OPT_LIST_META_CONTEXT, wire.NBD_OPT_SET_META_CONTEXT):
        outcome = haggle(STRUCTURED, option(number, data), LIST)
        assert outcome.kinds[1] == INVALID
        assert outcome.kinds[-1] == ACK


def test_set_needs_structured_replies_and_list_does_not() -> None:
    outcome = haggle(set_meta("disk0", "base:allocation"), list_meta("disk0"), go())
    assert outcome.kinds == [INVALID, META, META, META, ACK, INFO, ACK]
    assert outcome.negotiated.meta_contexts == {}


FAILING_SETS = [
    set_meta("disk0"),
    set_meta("nothing", "base:allocation"),
    set_meta("disk0", "no namespace"),
    set_meta("disk0", "base:"),
    option(wire.NBD_OPT_SET_META_CONTEXT, b"short"),
    option(wire.NBD_OPT_SET_META_CONTEXT, bytes(10000)),
]


@pytest.mark.parametrize("second", FAILING_SETS)
def test_set_replaces_the_earlier_selection_even_when_it_fails(second: bytes) -> None:
    first = set_meta("disk0", "base:allocation")
    assert haggle(STRUCTURED, first, go(), limits=SMALL).negotiated.meta_contexts
    outcome = haggle(STRUCTURED, first, second, go(), limits=SMALL)
    assert outcome.negotiated.meta_contexts == {}


def test_list_leaves_the_selection_alone() -> None:
    outcome = haggle(STRUCTURED, set_meta("disk0", "base:allocation"), list_meta("disk0"), go())
    assert list(outcome.negotiated.meta_contexts.values()) == ["base:allocation"]


@pytest.mark.parametrize("last", [go("other"), go(""), option(wire.NBD_OPT_EXPORT_NAME, b"other")])
def test_going_to_another_export_drops_the_selection(last: bytes) -> None:
    outcome = haggle(STRUCTURED, set_meta("disk0", "base:allocation"), last)
    assert outcome.negotiated.meta_contexts == {}


def test_a_failed_go_elsewhere_keeps_the_selection() -> None:
    outcome = haggle(STRUCTURED, set_meta("disk0", "base:allocation"), go("nothing"), go("disk0"))
    assert outcome.negotiated.meta_contexts


def test_too_many_contexts() -> None:
    limits = Limits(max_meta_contexts=2)
    many = haggle(STRUCTURED, set_meta("disk0", *ALL), go(), limits=limits)
    assert many.kinds == [ACK, wire.NBD_REP_ERR_TOO_BIG, INFO, ACK]
    assert many.negotiated.meta_contexts == {}
    assert haggle(STRUCTURED, set_meta("disk0", *ALL[:2]), limits=limits).kinds[-1] == ACK


# ----------------------------------------------------------------------------------------- limits


def test_data_over_the_limit_are_skipped_without_being_held() -> None:
    handshake = ServerHandshake(SMALL)
    handshake.receive_data(client_flags() + option(wire.NBD_OPT_GO, length=16384))
    for _ in range(16):
        handshake.receive_data(bytes(1000))
        assert len(handshake._buffer) == 0
    handshake.receive_data(bytes(384))
    outcome = converse([ABORT], handshake=handshake)
    assert outcome.kinds == [wire.NBD_REP_ERR_TOO_BIG, ACK]


@pytest.mark.parametrize(
    ("number", "kind"),
    [(wire.NBD_OPT_INFO, wire.NBD_REP_ERR_TOO_BIG), (999, wire.NBD_REP_ERR_UNSUP)],
)
def test_haggling_goes_on_behind_skipped_data(number: int, kind: int) -> None:
    outcome = haggle(option(number, bytes(8193)), go(), b"trail", limits=SMALL)
    assert outcome.kinds == [kind, INFO, ACK]
    assert outcome.after == b"trail"


def test_absurd_data_end_the_connection_before_they_arrive() -> None:
    outcome = haggle(option(wire.NBD_OPT_GO, length=16385), limits=SMALL)
    assert not outcome.closed.clean
    assert not haggle(option(wire.NBD_OPT_ABORT, length=(1 << 32) - 1)).closed.clean


def test_the_number_of_options_is_limited() -> None:
    outcome = haggle(*[STRUCTURED] * 6, limits=SMALL)
    assert outcome.kinds == [ACK] * 5
    assert "more than 5 options" in outcome.closed.reason


def test_a_client_that_does_not_wait_for_the_host_is_cut_off() -> None:
    handshake = ServerHandshake(SMALL)
    handshake.receive_data(client_flags() + LIST)
    assert handshake.events_received() == [ListQuery()]
    for _ in range(9):
        handshake.receive_data(bytes(1000))
        assert len(handshake._buffer) <= 8192 + 16
    (event,) = handshake.events_received()
    assert isinstance(event, Closed)
    handshake.answer_list([])  # too late, and no error
    assert handshake.events_received() == []


# --------------------------------------------------------------------------------- the host's side


def test_parsing_pauses_until_the_host_answers() -> None:
    handshake = ServerHandshake()
    handshake.receive_data(client_flags() + LIST + go() + b"rest")
    assert handshake.events_received() == [ListQuery()]
    assert handshake.events_received() == []
    handshake.answer_list([])
    assert handshake.events_received() == [ExportQuery("disk0", wire.NBD_OPT_GO)]
    handshake.answer_export(DISK)
    (event,) = handshake.events_received()
    assert isinstance(event, Established)
    assert event.leftover == b"rest"


def test_answers_that_nobody_asked_for() -> None:
    handshake = ServerHandshake()
    handshake.receive_data(client_flags() + LIST)
    for answer in (
        lambda: handshake.answer_export(DISK),
        lambda: handshake.refuse_export(UNKNOWN),
        lambda: handshake.refuse_list(ACK),
    ):
        with pytest.raises(wire.LocalProtocolError):
            answer()
    fresh = ServerHandshake()
    with pytest.raises(wire.LocalProtocolError):
        fresh.answer_list([])
    fresh.receive_data(client_flags() + go())
    with pytest.raises(wire.LocalProtocolError):
        fresh.answer_list([])
    fresh.answer_export(DISK)
    with pytest.raises(wire.LocalProtocolError):
        fresh.answer_export(DISK)


def test_a_mistaken_answer_can_be_corrected() -> None:
    handshake = ServerHandshake(Limits(max_payload=1 << 20))
    handshake.receive_data(client_flags() + go())
    with pytest.raises(wire.LocalProtocolError, match="advertises"):
        handshake.answer_export(DISK)
    with pytest.raises(wire.LocalProtocolError, match="no error reply"):
        handshake.refuse_export(ACK)
    handshake.events_received()
    handshake.refuse_export(UNKNOWN)
    assert converse([], handshake=handshake).kinds == [UNKNOWN]


def test_a_list_with_an_impossible_name() -> None:
    handshake = ServerHandshake()
    handshake.receive_data(client_flags() + LIST)
    with pytest.raises(wire.LocalProtocolError):
        handshake.answer_list([("good", ""), ("x" * 5000, "")])
    handshake.events_received()
    handshake.refuse_list(wire.NBD_REP_ERR_SHUTDOWN, "going down")
    outcome = converse([], handshake=handshake)
    assert outcome.replies == [(wire.NBD_OPT_LIST, wire.NBD_REP_ERR_SHUTDOWN, b"going down")]


def test_long_messages_are_cut_at_a_character() -> None:
    handshake = ServerHandshake()
    handshake.receive_data(client_flags() + LIST)
    handshake.events_received()
    handshake.refuse_list(wire.NBD_REP_ERR_POLICY, "x" + "é" * 4000)
    ((_, _, message),) = converse([], handshake=handshake).replies
    assert message.decode() == "x" + "é" * 2047


def test_an_answer_after_the_client_has_gone_is_ignored() -> None:
    for answer in (
        lambda h: h.answer_export(DISK),
        lambda h: h.refuse_export(UNKNOWN),
    ):
        handshake = ServerHandshake()
        handshake.receive_data(client_flags() + go())
        handshake.data_to_send()
        handshake.events_received()
        handshake.receive_eof()
        (closed,) = handshake.events_received()
        assert isinstance(closed, Closed)
        assert not closed.clean
        answer(handshake)
        assert handshake.events_received() == []
        assert handshake.data_to_send() == []


def test_hanging_up() -> None:
    assert haggle(eof=True).closed.clean
    assert haggle(LIST, eof=True).closed.clean
    assert not haggle(LIST[:-1], eof=True).closed.clean
    assert not converse([b"\0"], eof=True).closed.clean
    assert haggle(go(), eof=True).negotiated.size == DISK.size


def test_after_the_end() -> None:
    handshake = ServerHandshake()
    handshake.receive_data(client_flags() + ABORT)
    handshake.events_received()
    handshake.receive_data(LIST)
    handshake.receive_eof()
    assert handshake.events_received() == []
    established = ServerHandshake()
    established.receive_data(client_flags() + go())
    established.answer_export(DISK)
    with pytest.raises(wire.LocalProtocolError):
        established.receive_data(b"x")


def test_tls_is_not_offered() -> None:
    with pytest.raises(wire.LocalProtocolError):
        ServerHandshake(tls_mode="require")  # type: ignore[arg-type]


def test_bytes_wait_for_the_rest_without_effect() -> None:
    """One byte less than a message changes nothing that can be seen."""
    data = client_flags() + STRUCTURED + set_meta("disk0", "base:allocation")
    for cut in cuttings(data[:-1]):
        assert converse(cut).kinds == [ACK]


def test_the_host_may_know_many_exports() -> None:
    exports = [ExportInfo(f"disk{i}", 4096, 0) for i in range(500)]
    outcome = converse([client_flags() + LIST], host=Host(exports))
    assert len(outcome.kinds) == 501
