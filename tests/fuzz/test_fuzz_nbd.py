"""A sample of the NBD fuzzer, and canaries: parsers broken on purpose, which it must find."""

from __future__ import annotations

import pytest

from cdp.nbd import wire
from cdp.nbd.handshake import ServerHandshake
from cdp.nbd.limits import Limits
from cdp.nbd.transmission import Request, ScanResult, scan
from cdp.nbd.validate import ExportRules, validate
from tests.fuzz.fuzz_nbd import Finding, Subject, run

SAMPLE = 6000


def test_a_sample(seed: int) -> None:
    run(seed, SAMPLE)


def scan_off_by_one(buffer: bytearray, start: int, end: int, limits: Limits) -> ScanResult:
    """Takes a write for complete one byte early."""
    generous = buffer + b"?"
    result = scan(generous, start, end + 1, limits)
    begin = min(result.start, end)
    return ScanResult(result.requests, begin, result.needed + end - begin + 1)


def scan_without_limit(buffer: bytearray, start: int, end: int, limits: Limits) -> ScanResult:
    """Accepts whatever a client announces."""
    return scan(buffer, start, end, Limits(max_requests_per_scan=limits.max_requests_per_scan))


def validate_in_64_bits(request: Request, rules: ExportRules) -> int:
    """Adds offset and length as C would."""
    _, _, _, offset, length, _ = request
    if (offset + length) % (1 << 64) <= rules.size < offset:
        return 0
    return validate(request, rules)


class HandshakeThatBuffers(ServerHandshake):
    """Holds whatever arrives while the host is being asked."""

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        if self._question is not None:
            self._buffer += data
        else:
            super().receive_data(data)


class HandshakeThatForgets(ServerHandshake):
    """Loses the last byte of a piece that ends inside an option."""

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        super().receive_data(data)
        if 8 < len(self._buffer) < wire.OPTION.size:
            del self._buffer[-1]


class HandshakeThatCrashes(ServerHandshake):
    """Decodes names without thinking."""

    def _handle(self, option: int, data: bytes) -> None:
        if option == wire.NBD_OPT_GO:
            data[wire.UINT32.size :].partition(b"\0")[0].decode()
        super()._handle(option, data)


CANARIES = [
    (Subject(scan=scan_off_by_one), "found "),
    (Subject(scan=scan_without_limit), "found |bytes are held"),
    (Subject(validate=validate_in_64_bits), "judged otherwise|passes"),
    (Subject(handshake=HandshakeThatBuffers), "bytes are held"),
    (Subject(handshake=HandshakeThatForgets), "cuts make a difference"),
    (Subject(handshake=HandshakeThatCrashes), "UnicodeDecodeError"),
]


@pytest.mark.parametrize(("canary", "complaint"), CANARIES)
def test_canaries_are_found(canary: Subject, complaint: str) -> None:
    with pytest.raises(Finding, match=rf"--seed 1 --only \d+: .*({complaint})"):
        run(1, 40_000, canary)
