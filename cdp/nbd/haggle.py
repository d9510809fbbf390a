"""Option haggling, client side, over anything that can read and send. No socket in here.

Used by `client`; the server's side is `handshake`, and shares no code with it, so that one does not
repeat the other's misreadings in tests.
Source: proto.md, "Handshake", "Option types", "Option reply types".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from cdp.nbd.export import Negotiated
from cdp.nbd.wire import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_NO_ZEROES,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_EXPORT,
    NBD_INFO_NAME,
    NBD_MAGIC,
    NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME,
    NBD_OPT_GO,
    NBD_OPT_LIST,
    NBD_OPT_SET_META_CONTEXT,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_OPTS_MAGIC,
    NBD_PORTABLE_PAYLOAD,
    NBD_REP_ACK,
    NBD_REP_ERR_UNSUP,
    NBD_REP_FLAG_ERROR,
    NBD_REP_INFO,
    NBD_REP_MAGIC,
    NBD_REP_META_CONTEXT,
    NBD_REP_SERVER,
    OPTION,
    OPTION_REPLY,
    UINT16,
    UINT32,
    RemoteProtocolError,
)

# Far more than any honest reply: two strings and a few numbers.
_REPLY_SIZE_MAX: Final = 1 << 16
_REPLIES_MAX: Final = 1 << 20


class NbdNegotiationError(Exception):
    """The server refused an option: `code` is an NBD_REP_ERR_..., `message` the server's words."""

    def __init__(self, option: int, code: int, message: str) -> None:
        reason = message or f"error {code - NBD_REP_FLAG_ERROR}"
        super().__init__(f"the NBD server refused option {option}: {reason}")
        self.option = option
        self.code = code
        self.message = message


class Stream(Protocol):
    """What haggling needs of a connection. Both may raise OSError."""

    def read_exactly(self, size: int) -> bytes: ...
    def send(self, *parts: bytes) -> None: ...


class Haggler:
    """Negotiates as a client; ends with `go`, `export_name` or `abort`.

    RemoteProtocolError when the server breaks the protocol.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.structured_replies = False
        self.meta_contexts: dict[int, str] = {}
        self.description = ""
        nbd, opts, flags = GREETING.unpack(stream.read_exactly(GREETING.size))
        if nbd != NBD_MAGIC or opts != NBD_OPTS_MAGIC:
            raise RemoteProtocolError("this is no NBD server of the newstyle protocol")
        if not flags & NBD_FLAG_FIXED_NEWSTYLE:
            raise RemoteProtocolError("the NBD server does not speak the fixed newstyle protocol")
        answer = flags & (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)
        self._no_zeroes = bool(answer & NBD_FLAG_C_NO_ZEROES)
        stream.send(CLIENT_FLAGS.pack(answer))

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Sends one option; the replies (type, data) before the final ACK.

        NbdNegotiationError if the final one is an error.
        """
        self._stream.send(OPTION.pack(NBD_OPTS_MAGIC, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while True:
            header = self._stream.read_exactly(OPTION_REPLY.size)
            magic, about, kind, size = OPTION_REPLY.unpack(header)
            if magic != NBD_REP_MAGIC or about != option:
                raise RemoteProtocolError(f"no reply to option {option}: {header.hex()}")
            if size > _REPLY_SIZE_MAX or len(replies) >= _REPLIES_MAX:
                raise RemoteProtocolError(f"too much in reply to option {option}")
            payload = self._stream.read_exactly(size)
            if kind & NBD_REP_FLAG_ERROR:
                raise NbdNegotiationError(option, kind, payload.decode(errors="replace"))
            if kind == NBD_REP_ACK:
                return replies
            replies.append((kind, payload))

    def ask_structured_replies(self) -> bool:
        """Whether the server uses structured replies from now on."""
        try:
            self.option(NBD_OPT_STRUCTURED_REPLY)
        except NbdNegotiationError:
            return False
        self.structured_replies = True
        return True

    def select_contexts(self, export: str, names: Sequence[str]) -> None:
        """Selects those of `names` that the server has for `export`, into `meta_contexts`.

        None without structured replies: they could not be answered.
        """
        self.meta_contexts = {}
        if not self.structured_replies:
            return
        data = [_string(export), UINT32.pack(len(names)), *map(_string, names)]
        try:
            replies = self.option(NBD_OPT_SET_META_CONTEXT, b"".join(data))
        except NbdNegotiationError:
            return
        for kind, payload in replies:
            if kind != NBD_REP_META_CONTEXT or len(payload) < UINT32.size:
                raise RemoteProtocolError(f"a reply of type {kind} to SET_META_CONTEXT")
            (identifier,) = UINT32.unpack_from(payload)
            self.meta_contexts[identifier] = _text(payload[UINT32.size :])

    def list_exports(self) -> list[tuple[str, str]]:
        """(name, description) of every export the server lists."""
        exports = []
        for kind, payload in self.option(NBD_OPT_LIST):
            if kind != NBD_REP_SERVER or len(payload) < UINT32.size:
                raise RemoteProtocolError(f"a reply of type {kind} to LIST")
            (length,) = UINT32.unpack_from(payload)
            if UINT32.size + length > len(payload):
                raise RemoteProtocolError("the name of a listed export is cut off")
            end = UINT32.size + length
            exports.append((_text(payload[UINT32.size : end]), _text(payload[end:])))
        return exports

    def abort(self) -> None:
        """Ends haggling without an export."""
        self.option(NBD_OPT_ABORT)

    def go(self, export: str) -> Negotiated:
        """Chooses `export`: transmission begins. NbdNegotiationError if there is none."""
        wanted = (NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE)
        data = [_string(export), UINT16.pack(len(wanted)), *map(UINT16.pack, wanted)]
        try:
            replies = self.option(NBD_OPT_GO, b"".join(data))
        except NbdNegotiationError as error:
            if error.code != NBD_REP_ERR_UNSUP:
                raise
            return self.export_name(export)
        name = export
        size_and_flags: tuple[int, int] | None = None
        blocks = (1, 4096, NBD_PORTABLE_PAYLOAD)
        for kind, payload in replies:
            if kind != NBD_REP_INFO or len(payload) < UINT16.size:
                raise RemoteProtocolError(f"a reply of type {kind} to GO")
            (info,) = UINT16.unpack_from(payload)
            # "The client MUST ignore information replies it does not understand."
            if info == NBD_INFO_EXPORT and len(payload) == INFO_EXPORT.size:
                _, size, flags = INFO_EXPORT.unpack(payload)
                size_and_flags = (size, flags)
            elif info == NBD_INFO_BLOCK_SIZE and len(payload) == INFO_BLOCK_SIZE.size:
                _, least, preferred, most = INFO_BLOCK_SIZE.unpack(payload)
                blocks = (least, preferred, most)
            elif info == NBD_INFO_NAME:
                name = _text(payload[UINT16.size :])
            elif info == NBD_INFO_DESCRIPTION:
                self.description = _text(payload[UINT16.size :])
        if size_and_flags is None:
            raise RemoteProtocolError("GO was acknowledged without a size")
        return self._negotiated(export, name, size_and_flags, blocks, asked=True)

    def export_name(self, export: str) -> Negotiated:
        """As `go`, the old way: a server that refuses hangs up (OSError)."""
        name = export.encode()
        self._stream.send(OPTION.pack(NBD_OPTS_MAGIC, NBD_OPT_EXPORT_NAME, len(name)) + name)
        size, flags = EXPORT_NAME_REPLY.unpack(self._stream.read_exactly(EXPORT_NAME_REPLY.size))
        if not self._no_zeroes:
            self._stream.read_exactly(EXPORT_NAME_ZEROES)
        blocks = (1, 4096, NBD_PORTABLE_PAYLOAD)
        return self._negotiated(export, export, (size, flags), blocks, asked=False)

    def _negotiated(
        self,
        requested: str,
        name: str,
        size_and_flags: tuple[int, int],
        blocks: tuple[int, int, int],
        *,
        asked: bool,
    ) -> Negotiated:
        size, flags = size_and_flags
        return Negotiated(
            export_name=name,
            requested_name=requested,
            size=size,
            # Servers from before this flag existed have no others either.
            flags=flags | NBD_FLAG_HAS_FLAGS,
            structured_replies=self.structured_replies,
            meta_contexts=self.meta_contexts,
            min_block=blocks[0],
            preferred_block=blocks[1],
            max_payload=blocks[2],
            block_size_requested=asked,
        )


def _string(text: str) -> bytes:
    raw = text.encode()
    return UINT32.pack(len(raw)) + raw


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RemoteProtocolError(f"the server sent a string that is not UTF-8: {raw!r}") from error
