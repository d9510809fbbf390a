"""Option haggling, server side, sans IO: fixed newstyle.

Words: the *host* is the code that owns the socket and knows the exports. It feeds bytes, sends what
`data_to_send` returns, and answers events:

    handshake = ServerHandshake(limits)
    loop:  for each event in handshake.events_received():
               ListQuery    -> answer_list or refuse_list, now or later
               ExportQuery  -> answer_export or refuse_export, now or later
               Established  -> the last event: transmission follows, beginning with `leftover`
               Closed       -> the last event: close the socket
           send everything in handshake.data_to_send(), also after the last event (a client that
               gave up may be gone by then: that is no error)
           if there was an event: begin the loop again (an answer may lead to the next event)
           receive_data(bytes from the socket), or receive_eof()

States, and what leads out of each:

    CLIENT_FLAGS  4 bytes of client flags   -> OPTION; unknown flags: ENDED
    OPTION        a header and its data     -> OPTION, HOST or ENDED, as the option demands
                  data over a limit         -> SKIP; absurdly over: ENDED
    SKIP          data arrive, are dropped  -> OPTION, with ERR_TOO_BIG
    HOST          an answer of the host     -> OPTION, or ENDED after GO and EXPORT_NAME
    ENDED         Established or Closed was reported; nothing is parsed any more

One question at a time: in HOST nothing is parsed, however long the host takes. An honest
client sends nothing then; what a dishonest one sends is bounded, as is everything else held here.

SELECTIVETLS and FORCEDTLS are not offered yet: STARTTLS is answered ERR_POLICY.
Source: proto.md, "Handshake", "Option types", "Option reply types", "Metadata querying".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Literal, TypeAlias

from cdp.nbd.export import ExportInfo, Negotiated, check_string
from cdp.nbd.limits import DEFAULT_LIMITS, Limits
from cdp.nbd.options import InvalidOption, decode_string, matches, parse_info, parse_meta
from cdp.nbd.wire import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_NO_ZEROES,
    NBD_FLAG_SEND_DF,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_EXPORT,
    NBD_INFO_NAME,
    NBD_MAGIC,
    NBD_MAX_STRING,
    NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME,
    NBD_OPT_GO,
    NBD_OPT_INFO,
    NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_SET_META_CONTEXT,
    NBD_OPT_STARTTLS,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_OPTS_MAGIC,
    NBD_REP_ACK,
    NBD_REP_ERR_POLICY,
    NBD_REP_ERR_TOO_BIG,
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
    LocalProtocolError,
)

_KNOWN_CLIENT_FLAGS: Final = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES


@dataclass(frozen=True, slots=True)
class ExportQuery:
    """The client asks about the export `name` ("" is the default one): does it exist, what is it?

    `option` is what the client wants with it: NBD_OPT_GO or NBD_OPT_EXPORT_NAME (use it now: the
    answer promises that it is ready), NBD_OPT_INFO, NBD_OPT_LIST_META_CONTEXT or
    NBD_OPT_SET_META_CONTEXT (look at it). Answer with `answer_export` or `refuse_export`.
    """

    name: str
    option: int


@dataclass(frozen=True, slots=True)
class ListQuery:
    """The client asks for all exports. Answer with `answer_list` or `refuse_list`."""


@dataclass(frozen=True, slots=True)
class Established:
    """Transmission begins. `leftover` are bytes already received that belong to it."""

    negotiated: Negotiated
    leftover: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection ends without transmission. `clean`: by a client that kept to the rules."""

    reason: str
    clean: bool


Event: TypeAlias = ExportQuery | ListQuery | Established | Closed


class _State(Enum):
    CLIENT_FLAGS = auto()
    OPTION = auto()
    SKIP = auto()
    HOST = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class _Question:
    """The option the host is being asked about; `name` is None for NBD_OPT_LIST."""

    option: int
    name: str | None = None
    info_requests: frozenset[int] = frozenset()
    context_queries: tuple[str, ...] = ()


def _check_error_code(code: int) -> None:
    if not code & NBD_REP_FLAG_ERROR:
        raise LocalProtocolError(f"{code:#x} is no error reply")


class ServerHandshake:
    """One connection from greeting to Established or Closed. See the module's docstring."""

    def __init__(
        self, limits: Limits = DEFAULT_LIMITS, *, tls_mode: Literal["none"] = "none"
    ) -> None:
        if tls_mode != "none":
            raise LocalProtocolError(f"TLS mode {tls_mode!r} is not offered")
        self._limits = limits
        self._state = _State.CLIENT_FLAGS
        self._buffer = bytearray()
        self._events: list[Event] = []
        flags = NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES
        self._output = [GREETING.pack(NBD_MAGIC, NBD_OPTS_MAGIC, flags)]
        self._no_zeroes = False
        self._option_count = 0
        self._skip_option = 0
        self._skip_left = 0
        self._question: _Question | None = None
        self._structured_replies = False
        # Selected contexts, and the name of the export they were selected for.
        self._contexts: dict[int, str] = {}
        self._contexts_export: str | None = None
        self._established = False

    # ------------------------------------------------------------------------- the host's side

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Takes bytes from the client. Ignored after Closed; LocalProtocolError after Established.

        What is held is bounded by `limits.max_option_bytes`, a header, and the `data` of one call:
        a client that goes on sending while the host is being asked is cut off.
        """
        if self._state is _State.ENDED:
            if self._established:
                raise LocalProtocolError("data of the transmission phase, given to the handshake")
            return
        if self._state is _State.HOST:
            held = len(self._buffer) + len(data)
            if held > self._limits.max_option_bytes + OPTION.size:
                self._close("the client sends data instead of waiting for an answer")
                return
        if self._skip_left:
            taken = min(self._skip_left, len(data))
            self._skip_left -= taken
            data = memoryview(data)[taken:]
        self._buffer += data
        self._advance()

    def receive_eof(self) -> None:
        """The client will send nothing more."""
        if self._state is _State.ENDED:
            return
        between = self._state in {_State.OPTION, _State.CLIENT_FLAGS} and not self._buffer
        self._close("the client hung up", clean=between)

    def events_received(self) -> list[Event]:
        """What happened since the last call. At most one query is ever unanswered."""
        events, self._events = self._events, []
        return events

    def data_to_send(self) -> list[bytes]:
        """What must be sent to the client, in order, since the last call."""
        output, self._output = self._output, []
        return output

    def answer_export(self, info: ExportInfo) -> None:
        """Answers an ExportQuery: the export exists (and, for GO and EXPORT_NAME, is ready).

        The same `info` gives INFO and GO the same answer; it is the host's part to give the same
        one for the same name unless the export changed. Ignored if the client has gone meanwhile.
        LocalProtocolError without such a query, or if `info` allows payloads over our limit.
        """
        if info.max_block > self._limits.max_payload:
            raise LocalProtocolError(
                f"export {info.name!r} advertises {info.max_block} bytes of payload, "
                f"the limit is {self._limits.max_payload}"
            )
        question = self._take_question(of_export=True)
        if question is not None:
            _ANSWERS[question.option](self, question, info)
            self._advance()

    def refuse_export(self, code: int, message: str = "") -> None:
        """Answers an ExportQuery with an error, an NBD_REP_ERR_...; UNKNOWN if there is none.

        EXPORT_NAME has no way to answer: there, the connection is Closed.
        """
        _check_error_code(code)
        question = self._take_question(of_export=True)
        if question is None:
            return
        if question.option == NBD_OPT_EXPORT_NAME:
            self._close(f"export {question.name!r} was refused: {message}", clean=True)
            return
        self._refuse(question.option, code, message)
        self._advance()

    def answer_list(self, exports: Iterable[tuple[str, str]]) -> None:
        """Answers a ListQuery with (name, description) of each export."""
        payloads = []
        for name, description in exports:
            check_string(name, "the name of an export")
            check_string(description, "the description of an export")
            raw_name = name.encode()
            payloads.append(UINT32.pack(len(raw_name)) + raw_name + description.encode())
        if self._take_question(of_export=False) is None:
            return
        for payload in payloads:
            self._reply(NBD_OPT_LIST, NBD_REP_SERVER, payload)
        self._reply(NBD_OPT_LIST, NBD_REP_ACK)
        self._advance()

    def refuse_list(self, code: int, message: str = "") -> None:
        """Answers a ListQuery with an error, an NBD_REP_ERR_..."""
        _check_error_code(code)
        if self._take_question(of_export=False) is None:
            return
        self._refuse(NBD_OPT_LIST, code, message)
        self._advance()

    def _take_question(self, *, of_export: bool) -> _Question | None:
        """The question being answered; None when the client is gone, then nobody is told."""
        question = self._question
        if question is None or (question.name is not None) is not of_export:
            raise LocalProtocolError("the client did not ask this, or has been answered")
        self._question = None
        if self._state is _State.ENDED:
            return None
        self._state = _State.OPTION
        return question

    # -------------------------------------------------------------------------------- parsing

    def _advance(self) -> None:
        """Parses until more bytes or an answer are needed."""
        while self._step():
            pass

    def _step(self) -> bool:
        """One move of the state machine; whether another may be possible."""
        match self._state:
            case _State.CLIENT_FLAGS:
                return self._step_client_flags()
            case _State.OPTION:
                return self._step_option()
            case _State.SKIP:
                return self._step_skip()
            case _State.HOST | _State.ENDED:
                return False

    def _step_client_flags(self) -> bool:
        if len(self._buffer) < CLIENT_FLAGS.size:
            return False
        (flags,) = CLIENT_FLAGS.unpack_from(self._buffer)
        del self._buffer[: CLIENT_FLAGS.size]
        if flags & ~_KNOWN_CLIENT_FLAGS:
            self._close(f"unknown client flags {flags:#x}")
            return False
        # A client without C_FIXED_NEWSTYLE is served as well: it will use EXPORT_NAME.
        self._no_zeroes = bool(flags & NBD_FLAG_C_NO_ZEROES)
        self._state = _State.OPTION
        return True

    def _step_option(self) -> bool:
        if len(self._buffer) < OPTION.size:
            return False
        magic, option, length = OPTION.unpack_from(self._buffer)
        if magic != NBD_OPTS_MAGIC:
            self._close(f"an option begins with {magic:#018x}")
            return False
        if length > self._limits.max_skipped_option_bytes:
            self._close(f"option {option} announces {length} bytes")
            return False
        fits = length <= self._limits.max_option_bytes
        if fits and len(self._buffer) < OPTION.size + length:
            return False
        self._option_count += 1
        if self._option_count > self._limits.max_options:
            self._close(f"more than {self._limits.max_options} options")
            return False
        if option == NBD_OPT_SET_META_CONTEXT:
            # It replaces the earlier selection whatever becomes of it.
            self._contexts = {}
        if not fits:
            return self._begin_skip(option, length)
        data = bytes(self._buffer[OPTION.size : OPTION.size + length])
        del self._buffer[: OPTION.size + length]
        self._handle(option, data)
        return True

    def _begin_skip(self, option: int, length: int) -> bool:
        if option == NBD_OPT_EXPORT_NAME:
            self._close(f"a name of {length} bytes for an export")
            return False
        if option == NBD_OPT_ABORT:
            self._on_abort(b"")
            return False
        del self._buffer[: OPTION.size]
        present = min(length, len(self._buffer))
        del self._buffer[:present]
        self._skip_option = option
        self._skip_left = length - present
        self._state = _State.SKIP
        return True

    def _step_skip(self) -> bool:
        if self._skip_left:
            return False
        self._state = _State.OPTION
        code = NBD_REP_ERR_TOO_BIG if self._skip_option in _HANDLERS else NBD_REP_ERR_UNSUP
        self._refuse(self._skip_option, code, "too many bytes of data for an option")
        return True

    def _handle(self, option: int, data: bytes) -> None:
        handler = _HANDLERS.get(option)
        if handler is None:
            self._refuse(option, NBD_REP_ERR_UNSUP, f"option {option} is not known here")
            return
        try:
            handler(self, data)
        except InvalidOption as error:
            if option == NBD_OPT_EXPORT_NAME:
                self._close(str(error))
            else:
                self._refuse(option, error.code, str(error))

    # -------------------------------------------------------------------------------- options

    def _on_export_name(self, data: bytes) -> None:
        name = decode_string(data, "the name of the export")
        self._ask(_Question(NBD_OPT_EXPORT_NAME, name))

    def _on_abort(self, data: bytes) -> None:
        self._reply(NBD_OPT_ABORT, NBD_REP_ACK)
        self._close("the client gave up", clean=True)

    def _on_list(self, data: bytes) -> None:
        if data:
            raise InvalidOption("LIST takes no data")
        self._ask(_Question(NBD_OPT_LIST))

    def _on_starttls(self, data: bytes) -> None:
        if data:
            raise InvalidOption("STARTTLS takes no data")
        self._refuse(NBD_OPT_STARTTLS, NBD_REP_ERR_POLICY, "TLS is not offered here")

    def _on_info(self, data: bytes) -> None:
        name, requests = parse_info(data)
        self._ask(_Question(NBD_OPT_INFO, name, requests))

    def _on_go(self, data: bytes) -> None:
        name, requests = parse_info(data)
        self._ask(_Question(NBD_OPT_GO, name, requests))

    def _on_structured_reply(self, data: bytes) -> None:
        if data:
            raise InvalidOption("STRUCTURED_REPLY takes no data")
        self._structured_replies = True
        self._reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK)

    def _on_list_meta_context(self, data: bytes) -> None:
        name, queries = parse_meta(data)
        self._ask(_Question(NBD_OPT_LIST_META_CONTEXT, name, context_queries=queries))

    def _on_set_meta_context(self, data: bytes) -> None:
        if not self._structured_replies:
            raise InvalidOption("structured replies must be negotiated first")
        name, queries = parse_meta(data)
        self._ask(_Question(NBD_OPT_SET_META_CONTEXT, name, context_queries=queries))

    def _ask(self, question: _Question) -> None:
        self._question = question
        self._state = _State.HOST
        if question.name is None:
            self._events.append(ListQuery())
        else:
            self._events.append(ExportQuery(question.name, question.option))

    # ---------------------------------------------------------------------- the host's answers

    def _answer_export_name(self, question: _Question, info: ExportInfo) -> None:
        reply = EXPORT_NAME_REPLY.pack(info.size, self._flags(info))
        self._output.append(reply if self._no_zeroes else reply + bytes(EXPORT_NAME_ZEROES))
        self._establish(question, info)

    def _answer_info(self, question: _Question, info: ExportInfo) -> None:
        option, requests = question.option, question.info_requests
        export = INFO_EXPORT.pack(NBD_INFO_EXPORT, info.size, self._flags(info))
        self._reply(option, NBD_REP_INFO, export)
        if NBD_INFO_NAME in requests:
            self._reply(option, NBD_REP_INFO, UINT16.pack(NBD_INFO_NAME) + info.name.encode())
        if NBD_INFO_DESCRIPTION in requests and info.description:
            payload = UINT16.pack(NBD_INFO_DESCRIPTION) + info.description.encode()
            self._reply(option, NBD_REP_INFO, payload)
        if NBD_INFO_BLOCK_SIZE in requests:
            sizes = (info.min_block, info.preferred_block, info.max_block)
            payload = INFO_BLOCK_SIZE.pack(NBD_INFO_BLOCK_SIZE, *sizes)
            self._reply(option, NBD_REP_INFO, payload)
        self._reply(option, NBD_REP_ACK)
        if option == NBD_OPT_GO:
            self._establish(question, info)

    def _answer_list_meta(self, question: _Question, info: ExportInfo) -> None:
        """Without a query all contexts; a query that ends in ":" matches all that begin so."""
        queries = question.context_queries
        for name in info.meta_contexts:
            if not queries or any(matches(query, name) for query in queries):
                # The identifier is reserved here and zero.
                payload = UINT32.pack(0) + name.encode()
                self._reply(question.option, NBD_REP_META_CONTEXT, payload)
        self._reply(question.option, NBD_REP_ACK)

    def _answer_set_meta(self, question: _Question, info: ExportInfo) -> None:
        """Exact names only: what is unknown, and the wildcard "base:", selects nothing."""
        wanted = frozenset(question.context_queries)
        names = [name for name in info.meta_contexts if name in wanted]
        if len(names) > self._limits.max_meta_contexts:
            most = self._limits.max_meta_contexts
            self._refuse(question.option, NBD_REP_ERR_TOO_BIG, f"at most {most} contexts")
            return
        self._contexts = dict(enumerate(names, start=1))
        self._contexts_export = question.name
        for identifier, name in self._contexts.items():
            payload = UINT32.pack(identifier) + name.encode()
            self._reply(question.option, NBD_REP_META_CONTEXT, payload)
        self._reply(question.option, NBD_REP_ACK)

    def _flags(self, info: ExportInfo) -> int:
        flags = info.flags | NBD_FLAG_HAS_FLAGS
        return flags if self._structured_replies else flags & ~NBD_FLAG_SEND_DF

    def _establish(self, question: _Question, info: ExportInfo) -> None:
        assert question.name is not None
        selected = self._contexts if self._contexts_export == question.name else {}
        negotiated = Negotiated(
            export_name=info.name,
            requested_name=question.name,
            size=info.size,
            flags=self._flags(info),
            structured_replies=self._structured_replies,
            meta_contexts=selected,
            min_block=info.min_block,
            preferred_block=info.preferred_block,
            max_payload=info.max_block,
            block_size_requested=NBD_INFO_BLOCK_SIZE in question.info_requests,
        )
        self._state = _State.ENDED
        self._established = True
        self._events.append(Established(negotiated, bytes(self._buffer)))
        self._buffer.clear()

    # --------------------------------------------------------------------------------- output

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._output.append(OPTION_REPLY.pack(NBD_REP_MAGIC, option, kind, len(data)) + data)

    def _refuse(self, option: int, code: int, message: str) -> None:
        text = message.encode(errors="replace")[:NBD_MAX_STRING]
        self._reply(option, code, text.decode(errors="ignore").encode())

    def _close(self, reason: str, clean: bool = False) -> None:
        self._state = _State.ENDED
        self._buffer.clear()
        self._events.append(Closed(reason, clean))


_HANDLERS: Final[dict[int, Callable[[ServerHandshake, bytes], None]]] = {
    NBD_OPT_EXPORT_NAME: ServerHandshake._on_export_name,
    NBD_OPT_ABORT: ServerHandshake._on_abort,
    NBD_OPT_LIST: ServerHandshake._on_list,
    NBD_OPT_STARTTLS: ServerHandshake._on_starttls,
    NBD_OPT_INFO: ServerHandshake._on_info,
    NBD_OPT_GO: ServerHandshake._on_go,
    NBD_OPT_STRUCTURED_REPLY: ServerHandshake._on_structured_reply,
    NBD_OPT_LIST_META_CONTEXT: ServerHandshake._on_list_meta_context,
    NBD_OPT_SET_META_CONTEXT: ServerHandshake._on_set_meta_context,
}

_ANSWERS: Final[dict[int, Callable[[ServerHandshake, _Question, ExportInfo], None]]] = {
    NBD_OPT_EXPORT_NAME: ServerHandshake._answer_export_name,
    NBD_OPT_INFO: ServerHandshake._answer_info,
    NBD_OPT_GO: ServerHandshake._answer_info,
    NBD_OPT_LIST_META_CONTEXT: ServerHandshake._answer_list_meta,
    NBD_OPT_SET_META_CONTEXT: ServerHandshake._answer_set_meta,
}
