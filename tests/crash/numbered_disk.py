"""A small disk whose content tells which operations it is made of.

Operation number n fills each of the blocks it writes with n, so that what is read can be compared
with the state after every operation there was. A trim or a zero leaves 0.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

from cdp.nbd.client import NbdClient, NbdNegotiationError, NbdServerError
from tests.interop.daemon import Daemon

BLOCK: Final = 4096
BLOCKS: Final = 128
SIZE: Final = BLOCKS * BLOCK
WAIT_SECONDS: Final = 60.0
GONE: Final = (OSError, NbdServerError, NbdNegotiationError, EOFError)

State = tuple[int, ...]  # what each block holds

EMPTY: Final[State] = (0,) * BLOCKS


@dataclass(frozen=True, slots=True)
class Change:
    """One write, trim or zero of some blocks."""

    kind: str
    start: int
    length: int
    fua: bool

    @classmethod
    def random(cls, rng: random.Random) -> Change:
        """One of all kinds."""
        length = rng.randrange(1, 17)
        start, draw = rng.randrange(BLOCKS - length), rng.random()
        kind = "trim" if draw < 0.1 else "zero" if draw < 0.15 else "write"
        return cls(kind, start, length, rng.random() < 0.02)

    def after(self, state: State, number: int) -> State:
        """The disk, when this is operation ``number``."""
        value = number if self.kind == "write" else 0
        end = self.start + self.length
        return (*state[: self.start], *(value,) * self.length, *state[end:])

    def send(self, client: NbdClient, number: int) -> None:
        """Do it; returns when it is acknowledged."""
        at, size = self.start * BLOCK, self.length * BLOCK
        if self.kind == "trim":
            client.trim(at, size, fua=self.fua)
        elif self.kind == "zero":
            client.write_zeroes(at, size, fua=self.fua)
        else:
            client.write(at, number.to_bytes(8, "little") * (size // 8), fua=self.fua)


class States:
    """The disk after each operation. The newest may be unknown until it is read (`settle`)."""

    def __init__(self) -> None:
        self._states: list[State] = [EMPTY]
        self._numbers: dict[State, list[int]] = defaultdict(list, {EMPTY: [0]})

    @property
    def last(self) -> int:
        """The number of the newest operation."""
        return len(self._states) - 1

    @property
    def newest(self) -> State:
        """The disk after all of them."""
        return self._states[-1]

    def __getitem__(self, number: int) -> State:
        return self._states[number]

    def add(self, state: State) -> int:
        """One more operation; its number."""
        self._states.append(state)
        self._numbers[state].append(self.last)
        return self.last

    def find(self, state: State, least: int, most: int) -> list[int]:
        """The operations in this range that left the disk like this, in order; fails without.

        There are several when some changed nothing.
        """
        found = [number for number in self._numbers.get(state, []) if least <= number <= most]
        assert found, (
            f"not the state after any of the operations {least} to {most}, but after "
            f"{self._numbers.get(state, [])}; in some blocks it differs from the former: "
            f"{differences(state, self._states[min(least, self.last)])}"
        )
        return found

    def forget_after(self, number: int) -> None:
        """The operations behind it never happened."""
        while self.last > number:
            self._numbers[self._states.pop()].pop()


def differences(state: State, other: State) -> dict[int, tuple[int, int]]:
    """Blocks that differ: what they hold in both."""
    return {n: pair for n, pair in enumerate(zip(state, other, strict=True)) if pair[0] != pair[1]}


def numbers(content: bytes) -> State:
    """What each block holds; fails if one is made of two."""
    found = []
    for at in range(0, len(content), BLOCK):
        block = content[at : at + BLOCK]
        assert block == block[:8] * (BLOCK // 8), f"block {at // BLOCK} is torn"
        found.append(int.from_bytes(block[:8], "little"))
    return tuple(found)


def connected(daemon: Daemon, export: str) -> NbdClient:
    """A connection, as soon as there can be one."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return NbdClient.connect(daemon.uri(export), timeout=WAIT_SECONDS)
        except GONE:
            assert time.monotonic() < deadline, daemon.said()
            time.sleep(0.05)


def read(daemon: Daemon, export: str) -> State:
    """All of an export, as soon as it is served."""
    with connected(daemon, export) as client:
        return numbers(client.read(0, SIZE))


def read_point(daemon: Daemon, export: str) -> State | None:
    """All of a point, None if there is no such point."""
    try:
        client = NbdClient.connect(daemon.uri(export), timeout=WAIT_SECONDS)
    except NbdNegotiationError:
        return None
    with client:
        return numbers(client.read(0, SIZE))
