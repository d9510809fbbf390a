"""Every rule a request must obey, and the error for each: validated once, at the door.

Below this door an invalid request is a programming error. `validate` returns 0 or an NbdError; the
common case, a READ or WRITE inside the export, passes in one expression.

In order, the first that fails decides:
 1. an unknown type, or a flag that is unknown, not negotiated or not for this type: EINVAL
 2. something that changes a read-only export: EPERM, also where the type was not advertised
 3. a type that was not advertised, BLOCK_STATUS without a selected context: EINVAL
 4. FLUSH with an offset or a length: EINVAL (both "MUST be set to all-zero")
 5. length zero: EINVAL. The protocol leaves it open; a request for nothing has no answer that is
    a valid chunk, and a record for nothing would be odd history
 6. beyond the end: ENOSPC for WRITE and WRITE_ZEROES, EINVAL for all others
 7. not aligned to the advertised minimum block size: EINVAL
 8. more than the advertised maximum payload: READ: EOVERFLOW where DF is offered, else EINVAL;
    WRITE: EINVAL. Types without payload are not limited

FUA is accepted on every type once SEND_FUA is advertised, DISC is always accepted.
Source: proto.md, "Command flags", "Request types", "Error values", "Size constraints".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cdp.nbd.export import Negotiated
from cdp.nbd.transmission import Request
from cdp.nbd.wire import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NbdError,
)

_CHANGING: Final = frozenset({NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES})

_EPERM: Final = int(NbdError.EPERM)
_EINVAL: Final = int(NbdError.EINVAL)
_ENOSPC: Final = int(NbdError.ENOSPC)
_EOVERFLOW: Final = int(NbdError.EOVERFLOW)


class ExportRules:
    """What `validate` compares with, worked out once per connection.

    Not frozen and slotted: the hot path reads its fields. A disk that was resized gets its
    new size by `resize`; what was agreed on with the client otherwise stays.
    """

    __slots__ = (
        "align_mask",
        "allowed_flags",
        "available",
        "fast_refused_flags",
        "fast_type_max",
        "max_payload",
        "read_only",
        "read_overflow",
        "size",
    )

    def __init__(self, negotiated: Negotiated) -> None:
        flags = negotiated.flags
        self.size = negotiated.size
        self.max_payload = negotiated.max_payload
        self.align_mask = negotiated.min_block - 1
        self.read_only = bool(flags & NBD_FLAG_READ_ONLY)
        self.read_overflow = _EOVERFLOW if flags & NBD_FLAG_SEND_DF else _EINVAL
        fua = NBD_CMD_FLAG_FUA if flags & NBD_FLAG_SEND_FUA else 0
        # The flags each known type takes.
        self.allowed_flags = {
            NBD_CMD_READ: fua | (NBD_CMD_FLAG_DF if flags & NBD_FLAG_SEND_DF else 0),
            NBD_CMD_WRITE: fua,
            NBD_CMD_FLUSH: fua,
            NBD_CMD_TRIM: fua,
            NBD_CMD_CACHE: fua,
            NBD_CMD_WRITE_ZEROES: fua
            | NBD_CMD_FLAG_NO_HOLE
            | (NBD_CMD_FLAG_FAST_ZERO if flags & NBD_FLAG_SEND_FAST_ZERO else 0),
            NBD_CMD_BLOCK_STATUS: fua | NBD_CMD_FLAG_REQ_ONE,
        }
        self.available = frozenset(
            kind
            for kind, offered in (
                (NBD_CMD_READ, True),
                (NBD_CMD_WRITE, True),
                (NBD_CMD_FLUSH, flags & NBD_FLAG_SEND_FLUSH),
                (NBD_CMD_TRIM, flags & NBD_FLAG_SEND_TRIM),
                (NBD_CMD_CACHE, flags & NBD_FLAG_SEND_CACHE),
                (NBD_CMD_WRITE_ZEROES, flags & NBD_FLAG_SEND_WRITE_ZEROES),
                (NBD_CMD_BLOCK_STATUS, negotiated.meta_contexts),
            )
            if offered
        )
        # READ is 0 and WRITE 1: `type <= fast_type_max` means either, or READ alone.
        self.fast_type_max = NBD_CMD_READ if self.read_only else NBD_CMD_WRITE
        self.fast_refused_flags = 0xFFFF ^ fua

    def resize(self, size: int) -> None:
        """Requests are compared with `size` bytes from now on; a multiple of the minimum block."""
        assert size >= 0
        assert size & self.align_mask == 0
        self.size = size


def validate(request: Request, rules: ExportRules) -> int:
    """0 if `request` may be executed, else the NbdError to answer. Never raises. 0.2 us.

    Offsets and lengths are Python's integers, so their sum cannot overflow.
    """
    kind, flags, _, offset, length, _ = request
    if (
        kind <= rules.fast_type_max
        and not flags & rules.fast_refused_flags
        and 0 < length <= rules.max_payload
        and offset + length <= rules.size
        and not (offset | length) & rules.align_mask
    ):
        return 0
    return _judge(kind, flags, offset, length, rules)


def find_invalid(requests: Sequence[Request], rules: ExportRules) -> list[tuple[int, int]]:
    """`validate` for a whole batch: (index, NbdError) of those that may not be executed.

    An empty list, the common case, clears the batch for a loop without checks.
    """
    invalid: list[tuple[int, int]] = []
    fast_type_max = rules.fast_type_max
    refused_flags = rules.fast_refused_flags
    max_payload = rules.max_payload
    size = rules.size
    align_mask = rules.align_mask
    for index, (kind, flags, _, offset, length, _) in enumerate(requests):
        if (
            kind <= fast_type_max
            and not flags & refused_flags
            and 0 < length <= max_payload
            and offset + length <= size
            and not (offset | length) & align_mask
        ):
            continue
        error = _judge(kind, flags, offset, length, rules)
        if error:
            invalid.append((index, error))
    return invalid


def _judge(kind: int, flags: int, offset: int, length: int, rules: ExportRules) -> int:
    """The rules in the order of this module's docstring."""
    if kind == NBD_CMD_DISC:
        return 0
    allowed_flags = rules.allowed_flags.get(kind)
    if allowed_flags is None or flags & ~allowed_flags:
        return _EINVAL
    if rules.read_only and kind in _CHANGING:
        return _EPERM
    if kind not in rules.available:
        return _EINVAL
    if kind == NBD_CMD_FLUSH:
        return _EINVAL if offset or length else 0
    if length == 0:
        return _EINVAL
    if offset + length > rules.size:
        return _ENOSPC if kind in {NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES} else _EINVAL
    if (offset | length) & rules.align_mask:
        return _EINVAL
    if length > rules.max_payload:
        if kind == NBD_CMD_READ:
            return rules.read_overflow
        if kind == NBD_CMD_WRITE:
            return _EINVAL
    return 0
