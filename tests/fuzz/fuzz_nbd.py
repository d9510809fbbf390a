"""Fuzzes everything of the NBD codec that parses what a peer sends.

    python tests/fuzz/fuzz_nbd.py --inputs 1000000 --seed 1 [--only INDEX]

Input number i of a seed is always the same: `--only` replays one. Each is a valid stream, mutated,
or noise, cut at random, for one of three parsers:

* handshake: the server's side of option haggling. No exception is documented, so none may come.
* transmission: `scan` and `validate`. Documented: RemoteProtocolError.
* client: what servers say. Documented: RemoteProtocolError, NbdServerError, NbdNegotiationError and
  OSError.

The oracle is more than "no other exception": cuts may not change what comes out, `scan` must agree
with the plainest parser, what is held is bounded, replies are well formed, what `validate` lets
pass obeys the rules it stands for, and nothing is read beyond what was asked for.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cdp.nbd import wire
from cdp.nbd.client import NbdClient, NbdNegotiationError, NbdServerError
from cdp.nbd.export import Negotiated
from cdp.nbd.haggle import Haggler
from cdp.nbd.handshake import Closed, Established, ServerHandshake
from cdp.nbd.limits import Limits
from cdp.nbd.transmission import (
    Request,
    ScanResult,
    block_status_chunk,
    data_chunk_header,
    error_chunk,
    error_offset_chunk,
    hole_chunk,
    none_chunk,
    ok_reply,
    scan,
    simple_error,
)
from cdp.nbd.validate import ExportRules, find_invalid, validate
from tests.cdp.nbd import vectors

REQUEST_LIMITS = Limits(max_payload=4096, max_requests_per_scan=4)
OPTION_LIMITS = Limits(
    max_option_bytes=8192,
    max_skipped_option_bytes=10000,
    max_options=12,
    max_meta_contexts=2,
)


class Finding(Exception):
    """An input that the oracle does not accept."""


@dataclass(frozen=True)
class Subject:
    """What is fuzzed; a canary puts something broken here."""

    scan: Callable[[bytearray, int, int, Limits], ScanResult] = scan
    validate: Callable[[Request, ExportRules], int] = validate
    handshake: Callable[[Limits], ServerHandshake] = ServerHandshake


# ----------------------------------------------------------------------------------------- inputs

_INTERESTING = (0, 1, 2, 4, 7, 8, 12, 27, 28, 255, 256, 4095, 4096, 4097, 8192, 8193, 10001)
_EDGES = (*_INTERESTING, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_NAMES = ("disk0", "other", "", "nothing", "é" * 40, "x" * 4096, "x" * 4097, "a\0b", b"\xff\xfe")
_QUERIES = ("base:", "base:allocation", "qemu:", "qemu:dirty-bitmap:a", "x:y", "bad", "", b":\xff")


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four small injuries."""
    wounded = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(wounded) + 1)
        match rng.randrange(7):
            case 0 if wounded:
                wounded[place - 1] ^= 1 << rng.randrange(8)
            case 1 if wounded:
                wounded[place - 1] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                wounded[place:place] = rng.randbytes(rng.randint(1, 8))
            case 3:
                del wounded[place : place + rng.randint(1, 30)]
            case 4:
                wounded[place : place + 4] = wire.UINT32.pack(rng.choice(_EDGES))
            case 5:
                other = rng.randrange(len(wounded) + 1)
                wounded[place:place] = wounded[other : other + rng.randint(1, 60)]
            case _:
                del wounded[place:]
    return bytes(wounded)


def maybe_mutated(data: bytes, rng: random.Random) -> bytes:
    return mutate(data, rng) if rng.random() < 0.6 else data


def option_input(rng: random.Random) -> bytes:
    """One option, mostly as it should be."""
    number = rng.choice((1, 2, 3, 3, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 99))
    if number == wire.NBD_OPT_EXPORT_NAME:
        name = rng.choice(_NAMES)
        return vectors.option(number, name if isinstance(name, bytes) else name.encode())
    if number in {wire.NBD_OPT_INFO, wire.NBD_OPT_GO}:
        name = rng.choice(_NAMES[:4] if rng.random() < 0.9 else _NAMES)
        requests = [rng.randrange(5) for _ in range(rng.randrange(4))]
        return vectors.option(number, vectors.info_data(name, requests))
    if number in {wire.NBD_OPT_LIST_META_CONTEXT, wire.NBD_OPT_SET_META_CONTEXT}:
        queries: list[str | bytes] = [rng.choice(_QUERIES[:5]) for _ in range(rng.randrange(4))]
        if rng.random() < 0.1:
            queries.append(rng.choice(_QUERIES))
        return vectors.option(number, vectors.meta_data(rng.choice(_NAMES[:4]), queries))
    if rng.random() < 0.05:
        return vectors.option(number, bytes(rng.choice(_INTERESTING)))
    return vectors.option(number)


def handshake_input(rng: random.Random) -> bytes:
    if rng.random() < 0.05:
        return vectors.client_flags() + rng.randbytes(rng.randrange(200))
    flags = rng.choice((3, 3, 3, 3, 1, 0, 2)) if rng.random() < 0.98 else rng.randrange(16)
    options = [option_input(rng) for _ in range(rng.randrange(7))]
    data = vectors.client_flags(flags) + b"".join(options)
    return maybe_mutated(data, rng) + rng.randbytes(rng.choice((0, 0, 0, 5)))


def request_input(rng: random.Random) -> bytes:
    kind = rng.choice((0, 1, 1, 1, 3, 4, 5, 6, 7, 8))
    flags = rng.choice((0, 0, 0, 1, 2, 4, 8, 16, 32, 0xFFFF))
    offset = rng.choice((0, 512, 4096, 1 << 29, (1 << 30) - 4096, 1 << 30, (1 << 64) - 4096))
    number = rng.getrandbits(64)
    if kind == wire.NBD_CMD_WRITE:
        data = bytes(rng.choice((0, 1, 28, 512, 512, 4096)))
        return vectors.write(offset, data, flags=flags, number=number)
    length = 0 if kind == wire.NBD_CMD_FLUSH else rng.choice((0, 1, 512, 4096, 4097, 0xFFFFFFFF))
    return vectors.request(kind, offset, length, flags=flags, number=number)


def transmission_input(rng: random.Random) -> bytes:
    if rng.random() < 0.03:
        return rng.randbytes(rng.randrange(200))
    parts = [request_input(rng) for _ in range(rng.randrange(9))]
    if rng.random() < 0.1:
        parts.insert(rng.randrange(len(parts) + 1), vectors.request(wire.NBD_CMD_DISC))
    return maybe_mutated(b"".join(parts), rng)


def reply_input(rng: random.Random) -> bytes:
    """What a server may answer to a read of 64 bytes at 0 and a block status of the same."""
    name = vectors.cookie(rng.choice((0, 0, 0, 1, 2)))
    done = rng.random() < 0.5
    offset, length = rng.choice(((0, 64), (0, 32), (32, 32), (0, 1), (63, 1), (60, 8), (0, 65)))
    match rng.randrange(9):
        case 0 | 1 | 2:
            return data_chunk_header(name, offset, length, done) + rng.randbytes(length)
        case 3:
            return hole_chunk(name, offset, length, done)
        case 4:
            return none_chunk(name)
        case 5:
            return error_chunk(name, rng.choice((5, 22, 9999)), "x" * rng.randrange(9), done)
        case 6:
            return error_offset_chunk(name, 5, offset, "", done)
        case 7:
            extents = [(rng.choice((1, 32, 64, 4096)), 0) for _ in range(rng.randint(1, 3))]
            return block_status_chunk(name, rng.choice((1, 1, 2)), extents, done)
        case _:
            return ok_reply(name) + rng.randbytes(64) if done else simple_error(name, 5)


# ---------------------------------------------------------------------------------------- oracles


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise Finding(complaint)


def fuzz_handshake(subject: Subject, rng: random.Random) -> None:
    data = handshake_input(rng)
    whole = _converse(subject, [data])
    pieces = _converse(subject, vectors.random_cuts(data, rng))
    _require(whole == pieces, f"cuts make a difference: {whole} {pieces}")
    replies, rest = vectors.split_replies(whole.sent)
    _require(len(rest) in {0, 10, 134}, f"sent something that is no reply: {rest!r}")
    _require(len(replies) <= 3 * OPTION_LIMITS.max_options * 4, "replies without end")
    last = whole.events[-1]
    if isinstance(last, Established):
        agreed = last.negotiated
        _require(Negotiated.from_json(agreed.to_json()) == agreed, "JSON changes what was agreed")
        _require(data.endswith(whole.after), "what is left over was not received")
        _require(len(agreed.meta_contexts) <= OPTION_LIMITS.max_meta_contexts, "too many contexts")
        df = bool(agreed.flags & wire.NBD_FLAG_SEND_DF)
        _require(df <= agreed.structured_replies, "DF without structured replies")
    else:
        _require(isinstance(last, Closed), f"ended with {last}")
    if rng.random() < 0.2:
        _never_answer(subject, vectors.random_cuts(data + data, rng))


def _converse(subject: Subject, chunks: list[bytes]) -> vectors.Outcome:
    return vectors.converse(chunks, handshake=subject.handshake(OPTION_LIMITS), eof=True)


def _never_answer(subject: Subject, chunks: list[bytes]) -> None:
    """A host that does not answer, whatever comes."""
    handshake = subject.handshake(OPTION_LIMITS)
    for chunk in chunks:
        handshake.receive_data(chunk)
        held = len(handshake._buffer)
        bound = OPTION_LIMITS.max_option_bytes + wire.OPTION.size + len(chunk)
        _require(held <= bound, f"{held} bytes are held")
    handshake.receive_eof()
    _require(isinstance(handshake.events_received()[-1], Closed), "no end")


def plain_scan(data: bytes) -> tuple[list[tuple], str]:
    """The plainest parser: one request at a time, by slicing."""
    found: list[tuple] = []
    while len(data) >= 28:
        magic, flags, kind, name, offset, length = wire.REQUEST.unpack(data[:28])
        if magic != wire.NBD_REQUEST_MAGIC:
            return found, "error"
        size = length if kind == wire.NBD_CMD_WRITE else 0
        if size > REQUEST_LIMITS.max_payload:
            return found, "error"
        if len(data) < 28 + size:
            return found, f"{28 + size - len(data)} needed"
        found.append((kind, flags, name, offset, length, data[28 : 28 + size]))
        data = data[28 + size :]
        if kind == wire.NBD_CMD_DISC:
            return found, "disconnected"
    return found, f"{28 - len(data)} needed"


def drive_scan(subject: Subject, chunks: list[bytes]) -> tuple[list[tuple], str]:
    """Scans as a host does, with a buffer that is moved up and may not grow without end."""
    buffer = bytearray()
    found: list[tuple] = []
    needed = 28
    for chunk in chunks:
        buffer += chunk
        while True:
            try:
                requests, start, needed = subject.scan(buffer, 0, len(buffer), REQUEST_LIMITS)
            except wire.RemoteProtocolError:
                return found, "error"
            _require(0 <= start <= len(buffer), f"goes on at {start} of {len(buffer)}")
            _require(len(requests) <= REQUEST_LIMITS.max_requests_per_scan, "more than the limit")
            _require(bool(requests) or needed > 0, "neither requests nor a need")
            for kind, flags, name, offset, length, position in requests:
                size = length if kind == wire.NBD_CMD_WRITE else 0
                payload = bytes(buffer[position : position + size])
                found.append((kind, flags, name, offset, length, payload))
                if kind == wire.NBD_CMD_DISC:
                    return found, "disconnected"
            del buffer[:start]
            if needed:
                break
        held = len(buffer)
        _require(held < REQUEST_LIMITS.max_payload + 28, f"{held} bytes are held")
    return found, f"{needed} needed"


def fuzz_transmission(subject: Subject, rng: random.Random) -> None:
    data = transmission_input(rng)
    chunks = vectors.random_cuts(data, rng)
    found, end = drive_scan(subject, chunks)
    expected = plain_scan(data)
    _require((found, end) == expected, f"found {found} {end}, expected {expected}")
    rules = rng.choice(_RULES)
    requests: list[Request] = [(*request[:5], 0) for request in found]
    errors = [subject.validate(request, rules) for request in requests]
    invalid = [(index, error) for index, error in enumerate(errors) if error]
    _require(find_invalid(requests, rules) == invalid, "the batch is judged otherwise")
    for request, error in zip(requests, errors, strict=True):
        _check_judgement(request, error, rules)


def _check_judgement(request: Request, error: int, rules: ExportRules) -> None:
    kind, flags, _, offset, length, _ = request
    if error:
        _require(error in set(wire.NbdError), f"error {error}")
        _require(kind != wire.NBD_CMD_DISC, "DISC refused")
    elif kind in {0, 1, 4, 5, 6, 7}:
        _require(length > 0 and offset + length <= rules.size, f"passes: {request}")
        _require(not (offset | length) & rules.align_mask, f"passes: {request}")
        _require(kind in {0, 5, 7} or not rules.read_only, f"passes: {request}")
        _require(flags < 1 << 5, f"passes: {request}")
    else:
        _require(kind in {wire.NBD_CMD_DISC, wire.NBD_CMD_FLUSH}, f"passes: {request}")


def _terms(flags: int, min_block: int, contexts: dict[int, str]) -> Negotiated:
    return Negotiated("d", "d", 1 << 30, flags | 1, True, contexts, min_block, 4096, 4096, True)


_TERMS = _terms(0xFFFD & ~(1 << 12), 1, {1: "base:allocation"})
_RULES = [
    ExportRules(terms)
    for terms in (_TERMS, _terms(0, 1, {}), _terms(2, 512, {}), _terms(0xFFD, 512, {1: "a:b"}))
]


class _Script:
    """A server that has said everything already, and remembers how much was read."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self.largest = 0

    def read_exactly(self, size: int) -> bytes:
        self.largest = max(self.largest, size)
        end = self._position + size
        if end > len(self._data):
            raise ConnectionResetError
        piece = self._data[self._position : end]
        self._position = end
        return piece

    def read_into(self, view: memoryview) -> None:
        view[:] = self.read_exactly(len(view))

    def send(self, *parts: bytes | memoryview) -> None:
        pass

    def close(self) -> None:
        pass


def fuzz_client(subject: Subject, rng: random.Random) -> None:
    if rng.random() < 0.4:
        _fuzz_haggler(subject, rng)
        return
    data = b"".join(reply_input(rng) for _ in range(rng.randint(1, 5)))
    script = _Script(maybe_mutated(data, rng))
    client = NbdClient(script, _TERMS, "")  # type: ignore[arg-type]
    try:
        if rng.random() < 0.7:
            _require(len(client.read(0, 64)) == 64, "a read of another length")
        extents = client.block_status(0, 64)
        _require(sum(length for length, _ in extents) == 64, "extents of another length")
    except (wire.RemoteProtocolError, NbdServerError, OSError):
        pass
    client.close()
    _require(script.largest <= 4 + (8 << 20), f"{script.largest} bytes in one read")


def _fuzz_haggler(subject: Subject, rng: random.Random) -> None:
    """Our own server's words, mutated."""
    options = [
        vectors.STRUCTURED,
        vectors.set_meta("disk0", "base:allocation"),
        vectors.LIST,
        vectors.go("disk0", [1, 2, 3]),
    ]
    sent = vectors.converse([vectors.client_flags(), *options]).sent
    script = _Script(mutate(sent, rng))
    try:
        haggler = Haggler(script)
        haggler.ask_structured_replies()
        haggler.select_contexts("disk0", ["base:allocation"])
        haggler.list_exports()
        haggler.go("disk0")
    except (wire.RemoteProtocolError, NbdNegotiationError, OSError):
        pass
    _require(script.largest <= 1 << 16, f"{script.largest} bytes in one read")


# -------------------------------------------------------------------------------------------- runs

_FUZZERS = (fuzz_handshake, fuzz_transmission, fuzz_transmission, fuzz_client)


def run_one(seed: int, index: int, subject: Subject) -> None:
    """Input `index` of `seed`; Finding, with how to replay it, if the oracle objects."""
    rng = random.Random((seed << 40) + index)
    fuzzer = _FUZZERS[index % len(_FUZZERS)]
    try:
        fuzzer(subject, rng)
    except Exception as error:
        complaint = f"{fuzzer.__name__}, --seed {seed} --only {index}: {error!r}"
        raise Finding(complaint) from error


def run(seed: int, inputs: int, subject: Subject | None = None) -> None:
    """Inputs 0 to `inputs` - 1 of `seed`. Finding at the first that the oracle does not accept."""
    for index in range(inputs):
        run_one(seed, index, subject or Subject())


def main() -> int:
    parser = argparse.ArgumentParser(description="fuzzes the NBD codec")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    parser.add_argument("--only", type=int, default=None, metavar="INDEX", help="replay one input")
    options = parser.parse_args()
    seed = random.SystemRandom().getrandbits(31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    start = time.monotonic()
    try:
        if options.only is not None:
            run_one(seed, options.only, Subject())
        else:
            run(seed, options.inputs)
    except Finding as finding:
        print(f"FOUND {finding}")
        return 1
    seconds = time.monotonic() - start
    count = 1 if options.only is not None else options.inputs
    print(f"{count} inputs, nothing found, {seconds:.1f} s, {count / seconds:.0f} inputs/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
