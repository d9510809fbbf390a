"""Every rule of `validate`, in the order that decides; the batch form agrees with it throughout."""

from __future__ import annotations

import dataclasses
import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdp.nbd import wire
from cdp.nbd.export import Negotiated
from cdp.nbd.transmission import Request
from cdp.nbd.validate import ExportRules, find_invalid, validate
from cdp.nbd.wire import NbdError

READ = wire.NBD_CMD_READ
WRITE = wire.NBD_CMD_WRITE
DISC = wire.NBD_CMD_DISC
FLUSH = wire.NBD_CMD_FLUSH
TRIM = wire.NBD_CMD_TRIM
CACHE = wire.NBD_CMD_CACHE
ZEROES = wire.NBD_CMD_WRITE_ZEROES
STATUS = wire.NBD_CMD_BLOCK_STATUS
RANGED = [READ, WRITE, TRIM, CACHE, ZEROES, STATUS]

FUA = wire.NBD_CMD_FLAG_FUA
NO_HOLE = wire.NBD_CMD_FLAG_NO_HOLE
DF = wire.NBD_CMD_FLAG_DF
REQ_ONE = wire.NBD_CMD_FLAG_REQ_ONE
FAST = wire.NBD_CMD_FLAG_FAST_ZERO
PAYLOAD_LEN = 1 << 5

SIZE = 1 << 30
EVERYTHING = (
    wire.NBD_FLAG_HAS_FLAGS
    | wire.NBD_FLAG_SEND_FLUSH
    | wire.NBD_FLAG_SEND_FUA
    | wire.NBD_FLAG_SEND_TRIM
    | wire.NBD_FLAG_SEND_WRITE_ZEROES
    | wire.NBD_FLAG_SEND_DF
    | wire.NBD_FLAG_SEND_CACHE
    | wire.NBD_FLAG_SEND_FAST_ZERO
)
FULL = Negotiated(
    export_name="disk0",
    requested_name="disk0",
    size=SIZE,
    flags=EVERYTHING,
    structured_replies=True,
    meta_contexts={1: "base:allocation"},
    min_block=1,
    preferred_block=4096,
    max_payload=1 << 20,
    block_size_requested=True,
)
BARE = dataclasses.replace(
    FULL, flags=wire.NBD_FLAG_HAS_FLAGS, structured_replies=False, meta_contexts={}
)


def judge(
    kind: int, offset: int = 0, length: int = 4096, flags: int = 0, *, export: Negotiated = FULL
) -> int:
    request: Request = (kind, flags, b"cookie!!", offset, length, 0)
    rules = ExportRules(export)
    error = validate(request, rules)
    assert find_invalid([request], rules) == ([(0, error)] if error else [])
    return error


def without(flag: int) -> Negotiated:
    return dataclasses.replace(FULL, flags=FULL.flags & ~flag)


# ------------------------------------------------------------------------------------- 1: flags


@pytest.mark.parametrize("kind", [8, 9, 100, 0xFFFF])
@pytest.mark.parametrize("flags", [0, FUA])
def test_unknown_types(kind: int, flags: int) -> None:
    assert judge(kind, flags=flags) == NbdError.EINVAL
    assert judge(kind, SIZE, 1, flags) == NbdError.EINVAL


ALLOWED = {
    READ: {FUA, DF},
    WRITE: {FUA},
    FLUSH: {FUA},
    TRIM: {FUA},
    CACHE: {FUA},
    ZEROES: {FUA, NO_HOLE, FAST},
    STATUS: {FUA, REQ_ONE},
}


@pytest.mark.parametrize("kind", ALLOWED)
@pytest.mark.parametrize("bit", range(16))
def test_each_flag_on_each_type(kind: int, bit: int) -> None:
    flag = 1 << bit
    length = 0 if kind == FLUSH else 4096
    expected = 0 if flag in ALLOWED[kind] else NbdError.EINVAL
    assert judge(kind, 0, length, flag) == expected
    assert judge(kind, 0, length, flag | PAYLOAD_LEN) == NbdError.EINVAL


def test_all_allowed_flags_together() -> None:
    for kind, flags in ALLOWED.items():
        assert judge(kind, 0, 0 if kind == FLUSH else 512, sum(flags)) == 0


@pytest.mark.parametrize("kind", ALLOWED)
def test_fua_needs_send_fua(kind: int) -> None:
    length = 0 if kind == FLUSH else 4096
    assert judge(kind, 0, length, FUA) == 0
    export = without(wire.NBD_FLAG_SEND_FUA)
    assert judge(kind, 0, length, FUA, export=export) == NbdError.EINVAL
    assert judge(kind, 0, length, export=export) == 0


def test_flags_that_were_not_negotiated() -> None:
    assert judge(READ, flags=DF, export=without(wire.NBD_FLAG_SEND_DF)) == NbdError.EINVAL
    slow = without(wire.NBD_FLAG_SEND_FAST_ZERO)
    assert judge(ZEROES, flags=FAST, export=slow) == NbdError.EINVAL
    assert judge(ZEROES, flags=NO_HOLE, export=slow) == 0


# ------------------------------------------------------------------------------- 2, 3: permission


@pytest.mark.parametrize("kind", [WRITE, TRIM, ZEROES])
def test_a_read_only_export_is_not_changed(kind: int) -> None:
    read_only = dataclasses.replace(FULL, flags=FULL.flags | wire.NBD_FLAG_READ_ONLY)
    bare = dataclasses.replace(BARE, flags=BARE.flags | wire.NBD_FLAG_READ_ONLY)
    for export in (read_only, bare):
        assert judge(kind, export=export) == NbdError.EPERM
        assert judge(kind, SIZE, 1, export=export) == NbdError.EPERM
        assert judge(kind, 0, 0, export=export) == NbdError.EPERM


def test_a_read_only_export_is_read() -> None:
    read_only = dataclasses.replace(FULL, flags=FULL.flags | wire.NBD_FLAG_READ_ONLY)
    for kind in (READ, CACHE, STATUS):
        assert judge(kind, export=read_only) == 0
    assert judge(FLUSH, 0, 0, export=read_only) == 0


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        (FLUSH, wire.NBD_FLAG_SEND_FLUSH),
        (TRIM, wire.NBD_FLAG_SEND_TRIM),
        (CACHE, wire.NBD_FLAG_SEND_CACHE),
        (ZEROES, wire.NBD_FLAG_SEND_WRITE_ZEROES),
    ],
)
def test_types_that_were_not_advertised(kind: int, flag: int) -> None:
    length = 0 if kind == FLUSH else 4096
    assert judge(kind, 0, length) == 0
    assert judge(kind, 0, length, export=without(flag)) == NbdError.EINVAL


def test_block_status_needs_a_context() -> None:
    assert judge(STATUS) == 0
    bare = dataclasses.replace(FULL, meta_contexts={})
    assert judge(STATUS, export=bare) == NbdError.EINVAL


def test_reading_and_writing_need_nothing() -> None:
    assert judge(READ, export=BARE) == 0
    assert judge(WRITE, export=BARE) == 0
    assert judge(DISC, export=BARE) == 0


# ---------------------------------------------------------------------------------- 4, 5: numbers


def test_flush_has_no_range() -> None:
    assert judge(FLUSH, 0, 0) == 0
    assert judge(FLUSH, 1, 0) == NbdError.EINVAL
    assert judge(FLUSH, 0, 1) == NbdError.EINVAL


def test_disc_is_never_an_error() -> None:
    assert judge(DISC, 5, 6, 0xFFFF) == 0


@pytest.mark.parametrize("kind", RANGED)
@pytest.mark.parametrize("offset", [0, SIZE, SIZE + 1])
def test_nothing_is_not_a_range(kind: int, offset: int) -> None:
    assert judge(kind, offset, 0) == NbdError.EINVAL


# --------------------------------------------------------------------------------------- 6: bounds

BEYOND = {kind: NbdError.EINVAL for kind in RANGED} | {
    WRITE: NbdError.ENOSPC,
    ZEROES: NbdError.ENOSPC,
}


@pytest.mark.parametrize("kind", RANGED)
def test_the_end_of_the_export(kind: int) -> None:
    assert judge(kind, SIZE - 512, 512) == 0
    assert judge(kind, SIZE - 1, 1) == 0
    for offset, length in [
        (SIZE - 512, 513),
        (SIZE, 1),
        (SIZE + 1, 1),
        (1 << 63, 1),
        ((1 << 64) - 1, 1),
        # In 64 bits the sum of these would be 0, and 1.
        ((1 << 64) - 4096, 4096),
        ((1 << 64) - 1, 2),
        ((1 << 64) - 1, (1 << 32) - 1),
    ]:
        assert judge(kind, offset, length) == BEYOND[kind]


def test_an_empty_export() -> None:
    empty = dataclasses.replace(FULL, size=0)
    for kind in RANGED:
        assert judge(kind, 0, 1, export=empty) == BEYOND[kind]


def test_a_resized_export() -> None:
    rules = ExportRules(FULL)
    beyond: Request = (WRITE, 0, b"", SIZE, 4096, 0)
    assert validate(beyond, rules) == NbdError.ENOSPC
    rules.resize(2 * SIZE)
    assert validate(beyond, rules) == 0
    assert find_invalid([beyond], rules) == []
    rules.resize(4096)
    assert find_invalid([beyond], rules) == [(0, NbdError.ENOSPC)]


# ------------------------------------------------------------------------ 7, 8: blocks and payload


@pytest.mark.parametrize("kind", RANGED)
def test_alignment_to_the_minimum_block(kind: int) -> None:
    export = dataclasses.replace(FULL, min_block=512)
    assert judge(kind, 512, 1024, export=export) == 0
    for offset, length in [(1, 512), (512, 1), (256, 512), (512, 768), (513, 511)]:
        assert judge(kind, offset, length) == 0
        assert judge(kind, offset, length, export=export) == NbdError.EINVAL


def test_more_than_the_maximum_payload() -> None:
    most = FULL.max_payload
    for kind in RANGED:
        assert judge(kind, 0, most) == 0
    assert judge(READ, 0, most + 1) == NbdError.EOVERFLOW
    assert judge(READ, 0, most + 1, DF) == NbdError.EOVERFLOW
    assert judge(READ, 0, most + 1, export=BARE) == NbdError.EINVAL
    assert judge(WRITE, 0, most + 1) == NbdError.EINVAL
    for kind in (TRIM, CACHE, ZEROES, STATUS):
        assert judge(kind, 0, SIZE) == 0
    # Bounds are judged first: an errno that invites a retry with less would be wrong.
    assert judge(READ, SIZE - 1, most + 1) == NbdError.EINVAL


# --------------------------------------------------------------------------------------- in batches


@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.sampled_from([0, 0, 0, FUA, NO_HOLE, DF, REQ_ONE, FAST, 64]),
            st.just(b"cookie!!"),
            st.sampled_from([0, 1, 512, 4096, SIZE - 4096, SIZE - 1, SIZE, (1 << 64) - 1]),
            st.sampled_from([0, 1, 512, 4096, 1 << 20, (1 << 20) + 512, (1 << 32) - 1]),
            st.just(0),
        )
    ),
    st.sampled_from([0, wire.NBD_FLAG_READ_ONLY]),
    st.integers(0, EVERYTHING),
    st.sampled_from([1, 512]),
)
def test_batches_and_what_passes(
    requests: list[Request], extra: int, mask: int, min_block: int
) -> None:
    flags = FULL.flags & mask | extra | wire.NBD_FLAG_HAS_FLAGS
    export = dataclasses.replace(FULL, flags=flags, min_block=min_block)
    rules = ExportRules(export)
    errors = [validate(request, rules) for request in requests]
    assert find_invalid(requests, rules) == [(i, e) for i, e in enumerate(errors) if e]
    assert set(errors) <= {0, *NbdError}
    for (kind, _, _, offset, length, _), error in zip(requests, errors, strict=True):
        if error == 0 and kind not in {DISC, FLUSH}:
            assert length > 0
            assert offset + length <= SIZE
            assert offset % min_block == length % min_block == 0
            assert kind in RANGED
            assert not (extra and kind in {WRITE, TRIM, ZEROES})


# ------------------------------------------------------------------------------------------ errnos


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EPERM, NbdError.EPERM),
        (errno.EACCES, NbdError.EPERM),
        (errno.EROFS, NbdError.EPERM),
        (errno.EIO, NbdError.EIO),
        (errno.ENOMEM, NbdError.ENOMEM),
        (errno.EINVAL, NbdError.EINVAL),
        (errno.ENOSPC, NbdError.ENOSPC),
        (errno.EDQUOT, NbdError.ENOSPC),
        (errno.EFBIG, NbdError.ENOSPC),
        (errno.ESHUTDOWN, NbdError.ESHUTDOWN),
        (errno.EOVERFLOW, NbdError.EINVAL),
        (errno.EOPNOTSUPP, NbdError.EINVAL),
        (errno.ENXIO, NbdError.EIO),
        (errno.ETIMEDOUT, NbdError.EIO),
        (0, NbdError.EIO),
        (-1, NbdError.EIO),
        (99999, NbdError.EIO),
    ],
)
def test_errno_to_nbd(number: int, expected: NbdError) -> None:
    assert wire.errno_to_nbd(number) == expected
