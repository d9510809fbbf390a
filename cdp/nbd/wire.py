"""Constants, structs, errors and errnos of the NBD protocol.

Owns: every number of the protocol, under the name `doc/proto.md` gives it. Must not know: what a
message means for a disk. All integers on the wire are big-endian; sizes and offsets are bytes.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from struct import Struct
from typing import Final

# -------------------------------------------------------------------------------------- handshake
# proto.md, "Newstyle negotiation" and "Fixed newstyle negotiation"

NBD_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
NBD_OPTS_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
NBD_REP_MAGIC: Final = 0x0003E889045565A9

NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

# proto.md, "Option types"
NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10
NBD_OPT_EXTENDED_HEADERS: Final = 11

# proto.md, "Option reply types"
NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_FLAG_ERROR: Final = 1 << 31
NBD_REP_ERR_UNSUP: Final = NBD_REP_FLAG_ERROR + 1
NBD_REP_ERR_POLICY: Final = NBD_REP_FLAG_ERROR + 2
NBD_REP_ERR_INVALID: Final = NBD_REP_FLAG_ERROR + 3
NBD_REP_ERR_PLATFORM: Final = NBD_REP_FLAG_ERROR + 4
NBD_REP_ERR_TLS_REQD: Final = NBD_REP_FLAG_ERROR + 5
NBD_REP_ERR_UNKNOWN: Final = NBD_REP_FLAG_ERROR + 6
NBD_REP_ERR_SHUTDOWN: Final = NBD_REP_FLAG_ERROR + 7
NBD_REP_ERR_BLOCK_SIZE_REQD: Final = NBD_REP_FLAG_ERROR + 8
NBD_REP_ERR_TOO_BIG: Final = NBD_REP_FLAG_ERROR + 9
NBD_REP_ERR_EXT_HEADER_REQD: Final = NBD_REP_FLAG_ERROR + 10

NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

# proto.md, "Transmission flags"
NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_ROTATIONAL: Final = 1 << 4
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11

# Strings "MUST be no longer than 4096 bytes": proto.md, "Conventions".
NBD_MAX_STRING: Final = 4096
# Any payload up to here must not be taken for an attack: proto.md, "Size constraints".
NBD_PORTABLE_PAYLOAD: Final = 1 << 25
NBD_DEFAULT_PORT: Final = 10809

# ----------------------------------------------------------------------------------- transmission

NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

# proto.md, "Request types"
NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
NBD_CMD_CACHE: Final = 5
NBD_CMD_WRITE_ZEROES: Final = 6
NBD_CMD_BLOCK_STATUS: Final = 7

# proto.md, "Command flags"
NBD_CMD_FLAG_FUA: Final = 1 << 0
NBD_CMD_FLAG_NO_HOLE: Final = 1 << 1
NBD_CMD_FLAG_DF: Final = 1 << 2
NBD_CMD_FLAG_REQ_ONE: Final = 1 << 3
NBD_CMD_FLAG_FAST_ZERO: Final = 1 << 4

# proto.md, "Structured reply flags" and "Structured reply types"
NBD_REPLY_FLAG_DONE: Final = 1 << 0
NBD_REPLY_TYPE_NONE: Final = 0
NBD_REPLY_TYPE_OFFSET_DATA: Final = 1
NBD_REPLY_TYPE_OFFSET_HOLE: Final = 2
NBD_REPLY_TYPE_BLOCK_STATUS: Final = 5
NBD_REPLY_TYPE_FLAG_ERROR: Final = 1 << 15
NBD_REPLY_TYPE_ERROR: Final = NBD_REPLY_TYPE_FLAG_ERROR + 1
NBD_REPLY_TYPE_ERROR_OFFSET: Final = NBD_REPLY_TYPE_FLAG_ERROR + 2

# Extents in one BLOCK_STATUS chunk: proto.md, "Structured reply types".
NBD_MAX_EXTENTS: Final = 1 << 20

# proto.md, "base:allocation metadata context"
NBD_META_BASE_ALLOCATION: Final = "base:allocation"
NBD_STATE_HOLE: Final = 1 << 0
NBD_STATE_ZERO: Final = 1 << 1

# ---------------------------------------------------------------------------------------- structs

GREETING: Final = Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
assert GREETING.size == 18
CLIENT_FLAGS: Final = Struct(">I")
assert CLIENT_FLAGS.size == 4
OPTION: Final = Struct(">QII")  # IHAVEOPT, option, length of its data
assert OPTION.size == 16
OPTION_REPLY: Final = Struct(">QIII")  # magic, option, reply type, length of its data
assert OPTION_REPLY.size == 20
EXPORT_NAME_REPLY: Final = Struct(">QH")  # size, transmission flags
assert EXPORT_NAME_REPLY.size == 10
EXPORT_NAME_ZEROES: Final = 124
INFO_EXPORT: Final = Struct(">HQH")  # NBD_INFO_EXPORT, size, transmission flags
assert INFO_EXPORT.size == 12
INFO_BLOCK_SIZE: Final = Struct(">HIII")  # NBD_INFO_BLOCK_SIZE, minimum, preferred, maximum
assert INFO_BLOCK_SIZE.size == 14
UINT16: Final = Struct(">H")
assert UINT16.size == 2
UINT32: Final = Struct(">I")
assert UINT32.size == 4

# The cookie is opaque: as bytes it goes from request to reply without being converted.
COOKIE_SIZE: Final = 8
REQUEST: Final = Struct(">IHH8sQI")  # magic, command flags, type, cookie, offset, length
assert REQUEST.size == 28
SIMPLE_REPLY: Final = Struct(">II8s")  # magic, error, cookie
assert SIMPLE_REPLY.size == 16
CHUNK: Final = Struct(">IHH8sI")  # magic, reply flags, type, cookie, length of the payload
assert CHUNK.size == 20
CHUNK_OFFSET_DATA: Final = Struct(">IHH8sIQ")  # CHUNK, offset; the data follow
assert CHUNK_OFFSET_DATA.size == 28
CHUNK_OFFSET_HOLE: Final = Struct(">IHH8sIQI")  # CHUNK, offset, size of the hole
assert CHUNK_OFFSET_HOLE.size == 32
ERROR_PAYLOAD: Final = Struct(">IH")  # error, length of the message that follows
assert ERROR_PAYLOAD.size == 6
UINT64: Final = Struct(">Q")
assert UINT64.size == 8
EXTENT: Final = Struct(">II")  # length, status flags
assert EXTENT.size == 8

# ----------------------------------------------------------------------------------------- errors


class ProtocolError(Exception):
    """A rule of the protocol was broken; the subclass says by whom."""


class LocalProtocolError(ProtocolError):
    """We broke the rules: a mistake in this program."""


class RemoteProtocolError(ProtocolError):
    """The peer broke a rule that cannot be answered with an errno: disconnect."""


class NbdError(IntEnum):
    """Errors that may stand in a reply. proto.md, "Error values"."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


_NBD_OF_ERRNO: Final = {
    errno.EPERM: NbdError.EPERM,
    errno.EACCES: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.EINVAL: NbdError.EINVAL,
    # Both are reserved by the protocol for what only the codec can know (reads over the limit,
    # fast zeroes); from a system call they mean that it could not do what was asked.
    errno.EOVERFLOW: NbdError.EINVAL,
    errno.EOPNOTSUPP: NbdError.EINVAL,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}


def errno_to_nbd(number: int) -> int:
    """What to tell a client about the failure `number` (an errno) of a system call.

    Unknown ones become EIO: a client must never take a failed device for its own mistake.
    An `NbdError` chosen by the codec is sent as it is, not through here.
    proto.md, "Error values". Never raises.
    """
    return int(_NBD_OF_ERRNO.get(number, NbdError.EIO))
