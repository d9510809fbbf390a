"""SIGKILL of each process, and of all at once, under load: an exact prefix survives, all flushed
in it.

Write number i goes to block i modulo BLOCKS and carries i, so a disk's content tells which writes
it is made of: it must be exactly those up to some number.
"""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from cdp.nbd.client import NbdClient, NbdNegotiationError, NbdServerError
from tests.interop.daemon import Daemon

BLOCKS = 61
BLOCK = 4096
GONE = (OSError, NbdServerError, NbdNegotiationError, EOFError)
ROUNDS = int(os.environ.get("CDP_KILL_ROUNDS", "2"))
WRITES = 400  # before each kill


def content(number: int) -> bytes:
    """What write ``number`` writes."""
    return number.to_bytes(8, "little") * (BLOCK // 8)


def state(upto: int) -> bytes:
    """The disk after the writes 1 .. ``upto``."""
    newest = [0] * BLOCKS
    for number in range(max(1, upto - BLOCKS + 1), upto + 1):
        newest[number % BLOCKS] = number
    return b"".join(content(number) for number in newest)


def prefix_of(disk: bytes) -> int:
    """The number of writes it consists of; fails if it is not exactly a prefix."""
    upto = max(int.from_bytes(disk[at : at + 8], "little") for at in range(0, len(disk), BLOCK))
    assert disk == state(upto), f"not the state after write {upto}"
    return upto


class Writer(threading.Thread):
    """Writes on and on, flushes now and then, until its connection is gone."""

    def __init__(self, uri: str, first: int, rng: random.Random) -> None:
        super().__init__()
        self.uri, self.rng = uri, rng
        self.sent = self.acknowledged = first - 1
        self.flushed = 0
        self.enough = threading.Event()
        self.stop = threading.Event()

    def run(self) -> None:
        """See the class."""
        try:
            with NbdClient.connect(self.uri, timeout=60) as client:
                start = self.sent
                while not self.stop.is_set():
                    self.sent += 1
                    fua = self.rng.random() < 0.02
                    client.write(self.sent % BLOCKS * BLOCK, content(self.sent), fua=fua)
                    self.acknowledged = self.sent
                    if self.rng.random() < 0.02:
                        client.flush()
                        self.flushed = self.acknowledged
                    if self.sent - start >= WRITES:
                        self.enough.set()
        except GONE:
            pass
        finally:
            self.enough.set()


def read_disk(uri: str) -> bytes:
    """All of an export, once it can be had."""
    for _ in range(200):
        try:
            with NbdClient.connect(uri, timeout=60) as client:
                return client.read(0, BLOCKS * BLOCK)
        except GONE:
            threading.Event().wait(0.05)
    raise AssertionError("the disk is not served again")


@pytest.mark.parametrize("victim", ["recorder", "curator", "viewer", "supervisor", "all"])
def test_a_prefix_with_all_that_was_flushed_survives(
    daemon: Daemon, seed: int, victim: str
) -> None:
    rng = random.Random(f"{seed}/{victim}")
    daemon.cdp("disk", "add", "d", "--size", str(BLOCKS * BLOCK))
    daemon.cdp("bookmark", "add", "d", "start")
    done = 0
    for _ in range(ROUNDS):
        if victim == "viewer":
            assert prefix_of(read_disk(daemon.uri("d@now"))) == done
        writer = Writer(daemon.uri("d"), done + 1, rng)
        writer.start()
        writer.enough.wait(60)
        children = daemon.children()
        if victim == "supervisor":
            daemon.kill()
        elif victim == "all":
            daemon.kill_all()
        else:
            os.kill(children[f"d/{victim}"], 9)
        if victim in ("curator", "viewer", "supervisor"):
            # The recorder goes on, and so does its client.
            before = writer.acknowledged
            while writer.acknowledged < before + 50 and writer.is_alive():
                threading.Event().wait(0.005)
            assert writer.is_alive(), f"the client lost its disk with the {victim}"
            writer.stop.set()
        writer.join(60)
        if victim in ("supervisor", "all"):
            daemon.start()
        survived = prefix_of(read_disk(daemon.uri("d")))
        assert writer.flushed <= survived <= writer.sent
        if victim in ("curator", "viewer", "supervisor"):
            assert survived == writer.sent
        done = survived
        last = daemon.status("d")["durable_seq"]
        found = 0
        for seq in sorted(rng.sample(range(1, last), 6)):
            try:
                with NbdClient.connect(daemon.uri(f"d@seq:{seq}"), timeout=60) as view:
                    upto = prefix_of(view.read(0, BLOCKS * BLOCK))
            except NbdNegotiationError:
                continue  # a seq lost in the crash
            assert found <= upto <= done
            found = upto
    daemon.cdp("rollback", "d", "--to", "start", "--yes")
    assert prefix_of(read_disk(daemon.uri("d"))) == 0


@pytest.mark.crash
def test_a_recorder_dies_with_prepared_segments(daemon: Daemon, seed: int) -> None:
    """Whether they are in use already or not: its successor removes those that are nobody's."""
    rng = random.Random(seed)
    daemon.cdp("disk", "add", "d", "--size", str(BLOCKS * BLOCK), "--segment-bytes", "1M",
               "--journal-limit", "128M")  # fmt: skip
    done = 0
    for _ in range(ROUNDS):
        writer = Writer(daemon.uri("d"), done + 1, rng)
        writer.start()
        prepared: set[Path] = set()
        deadline = time.monotonic() + 60
        while not prepared and time.monotonic() < deadline:
            # Those of a process before this one would have been there before it wrote anything.
            writer.enough.wait(60)
            prepared = set(daemon.directory.glob("**/redo/spare-*.tmp"))
            threading.Event().wait(0.005)
        assert prepared, "nothing is prepared in a minute"
        os.kill(daemon.children()["d/recorder"], 9)
        writer.join(60)
        survived = prefix_of(read_disk(daemon.uri("d")))
        assert writer.flushed <= survived <= writer.sent
        assert not set(daemon.directory.glob("**/redo/spare-*.tmp")) & prepared
        done = survived
