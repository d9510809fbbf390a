"""A daemon under everything at once, for as long as asked, beside a model: `make soak`.

    python -m tests.crash.soak [--minutes 10] [--seed N] [--steps N] [--only 1-20,35]

One disk, random steps: writes, trims and flushes, bookmarks, rollbacks (also of rollbacks), views,
settings, drains, releases, clean restarts, SIGKILL of any process or of all, also while a client
writes, and a backing device that fails for a while. After each step what must be true is asked for:
the newest content is exactly what was acknowledged (what was under way when a recorder was killed
is there up to some operation), every point that is looked at is what it was, bookmarks are exact.

The steps follow from the seed. A failure is tried again with fewer steps, as long as it comes back:
what is printed at the end is the command that repeats the shortest found.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from cdp.nbd.client import NbdClient
from tests.crash.numbered_disk import (
    GONE,
    SIZE,
    Change,
    State,
    States,
    connected,
    differences,
    numbers,
    read,
    read_point,
)
from tests.interop.commands import Commands
from tests.interop.daemon import ROLES, Daemon, wait_gone
from tests.interop.faulty_device import Faulty, faulty

CHUNK_STEPS: Final = 200  # a new daemon and disk after so many
SEQS_MAX: Final = 2000  # points whose content is remembered
BOOKMARKS_MAX: Final = 5  # what they keep must fit the journal, or writes wait for ever


class Soak:
    """One daemon, one disk, and what it must hold."""

    def __init__(self, daemon: Daemon, backing: Faulty | None) -> None:
        self.daemon, self.cdp = daemon, Commands(daemon.directory)
        self.backing = backing
        self.states = States()
        self.points: dict[int, State] = {0: self.states.newest}
        self.bookmarks: dict[str, State] = {}
        self.said = 0
        words = ["--segment-bytes", "1M", "--journal-limit", "8M"]
        words += ["--backing", backing.loop] if backing else ["--size", str(SIZE)]
        self.cdp("disk", "add", "d", *words)

    # --------------------------------------------------------------------------------- writing
    def _change(self, change: Change) -> int:
        return self.states.add(change.after(self.states.newest, self.states.last + 1))

    def write(self, rng: random.Random) -> None:
        """Some changes, all acknowledged, perhaps flushed."""
        with connected(self.daemon, "d") as client:
            for _ in range(rng.randrange(1, 150)):
                change = Change.random(rng)
                change.send(client, self._change(change))
            if rng.random() < 0.5:
                client.flush()
        self._remember()

    def _remember(self) -> None:
        """The point that is the newest now: a flush, so that it is one."""
        with connected(self.daemon, "d") as client:
            client.flush()
        seq = int(self.cdp.disk("d")["durable_seq"])
        self.points[seq] = self.states.newest
        for old in sorted(self.points)[:-SEQS_MAX]:
            del self.points[old]

    def write_and_kill(self, rng: random.Random) -> None:
        """A process, or all, are killed while a client writes."""
        victim = rng.choice((*ROLES, "supervisor", "all"))
        changes = [Change.random(rng) for _ in range(rng.randrange(20, 400))]
        first, acknowledged = self.states.last, [0]

        # Connected before anything is killed: nobody would start what it would wait for.
        client = connected(self.daemon, "d")

        def work() -> None:
            with contextlib.suppress(*GONE), client:
                for change in changes:
                    change.send(client, self._change(change))
                    acknowledged[0] += 1

        enough = rng.randrange(len(changes))
        writer = threading.Thread(target=work)
        writer.start()
        while acknowledged[0] < enough and writer.is_alive():
            time.sleep(0)
        self._kill(victim)
        writer.join()
        if self.daemon.process is None:
            self.daemon.start()
        found = self.states.find(
            read(self.daemon, "d"), first + acknowledged[0], self.states.last
        )  # fmt: skip
        self.states.forget_after(found[-1])
        # What was sent and is not there may be tried by its client again, and is another operation.
        self._remember()

    def _kill(self, victim: str) -> None:
        if victim == "all":
            self.daemon.kill_all()
        elif victim == "supervisor":
            self.daemon.kill()
        else:
            pid = self.daemon.children().get(f"d/{victim}")
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                wait_gone(pid)

    # ------------------------------------------------------------------------------------ past
    def bookmark(self, rng: random.Random) -> None:
        """A new one; the oldest goes when there are many."""
        label = f"b{self.said}"
        self.said += 1
        self.cdp("bookmark", "add", "d", label)
        self.bookmarks[label] = self.states.newest
        if len(self.bookmarks) > BOOKMARKS_MAX:
            gone = rng.choice(sorted(self.bookmarks))
            self.cdp("bookmark", "remove", "d", gone)
            del self.bookmarks[gone]

    def look_back(self, rng: random.Random) -> None:
        """Points: each is what it was, or is not kept any more."""
        for label in rng.sample(sorted(self.bookmarks), min(3, len(self.bookmarks))):
            found = differences(read(self.daemon, f"d@{label}"), self.bookmarks[label])
            assert not found, f"bookmark {label}, blocks as they are and were: {found}"
        first = int(self.cdp.disk("d")["window_start_seq"])
        for seq in rng.sample(sorted(self.points), min(5, len(self.points))):
            state = read_point(self.daemon, f"d@seq:{seq}")
            if state is None:
                moved = int(self.cdp.disk("d")["window_start_seq"])
                assert seq < moved, f"seq {seq} is in the window from {first}, and not openable"
                del self.points[seq]
            else:
                found = differences(state, self.points[seq])
                assert not found, f"seq {seq}, blocks as they are and were: {found}"

    def roll_back(self, rng: random.Random) -> None:
        """To a bookmark or a seq."""
        first = int(self.cdp.disk("d")["window_start_seq"])
        seqs = sorted(seq for seq in self.points if seq > first)
        if self.bookmarks and (not seqs or rng.random() < 0.5):
            label = rng.choice(sorted(self.bookmarks))
            spec, state = label, self.bookmarks[label]
        elif seqs:
            seq = rng.choice(seqs)
            spec, state = f"seq:{seq}", self.points[seq]
        else:
            return
        ran = self.cdp.run("rollback", "d", "--to", spec, "--yes", "--disconnect")
        if ran.status and "not kept" in ran.err:
            return  # the window moved meanwhile
        assert ran.status == 0, ran
        self.states.add(state)
        self._remember()

    def write_view(self, rng: random.Random) -> None:
        """A writable view takes writes, and nobody else sees them."""
        if not self.bookmarks:
            return
        label = rng.choice(sorted(self.bookmarks))
        view = self.cdp.json("view", "open", "d", "--at", label, "--writable")
        number = self.states.last + 1_000_000
        change = Change("write", rng.randrange(100), 7, fua=False)
        with NbdClient.connect(view["uri"]) as client:
            change.send(client, number)
            seen = numbers(client.read(0, SIZE))
        assert seen == change.after(self.bookmarks[label], number)
        self.cdp("view", "close", view["id"])

    # ------------------------------------------------------------------------------- operation
    def settle(self, _: random.Random) -> None:
        """Everything is applied."""
        self.cdp("disk", "drain", "d")

    def scrub(self, _: random.Random) -> None:
        """Nothing is damaged."""
        self.cdp("scrub", "d")

    def restart(self, _: random.Random) -> None:
        """A clean stop."""
        assert self.daemon.stop() == 0
        self.daemon.start()

    def release(self, _: random.Random) -> None:
        """The backing alone is the disk."""
        backing = Path(self.cdp.disk("d")["backing"])
        self.cdp("disk", "release", "d", "--yes")
        content = backing.read_bytes()
        assert numbers(content) == self.states.newest
        self.cdp("disk", "resume", "d", "--unchanged")

    def configure(self, rng: random.Random) -> None:
        """Policies that give up history, or stop doing so."""
        setting = rng.choice(
            ("window=2s", "window=none", "journal-limit=8M", "journal-limit=16M", "tail=64M",
             "tail=1G", "sync-age=100ms", "sync-age=1s")
        )  # fmt: skip
        self.cdp("disk", "set", "d", setting)

    def fail_backing(self, rng: random.Random) -> None:
        """The backing takes no writes for a while: its clients see nothing but a delay."""
        if self.backing is None:
            return
        # Not for long: when the journal is full, nothing is given up before it is applied.
        mended = threading.Timer(rng.uniform(0.1, 1.0), self.backing.fails)
        self.backing.fails("pwrite")
        mended.start()
        try:
            self.write(rng)
            self.check()
        finally:
            mended.join()

    def check(self) -> None:
        """After each step."""
        found = differences(read(self.daemon, "d"), self.states.newest)
        assert not found, f"blocks as they are and should be: {found}"


STEPS: Final[dict[Callable[[Soak, random.Random], None], int]] = {
    Soak.write: 40, Soak.write_and_kill: 12, Soak.bookmark: 8, Soak.look_back: 14,
    Soak.roll_back: 6, Soak.write_view: 3, Soak.settle: 4, Soak.scrub: 3, Soak.restart: 3,
    Soak.release: 2, Soak.configure: 5, Soak.fail_backing: 2,
}  # fmt: skip


def may_mount() -> bool:
    """Whether there can be a device that fails."""
    tools = all(map(shutil.which, ("nbdkit", "nbdfuse", "losetup")))
    return os.geteuid() == 0 and Path("/dev/fuse").exists() and tools


def run(seed: int, steps: Iterable[int], deadline: float, say: Callable[[str], None]) -> int:
    """Those steps of this seed, on a new daemon; how many were done."""
    place = Path(tempfile.mkdtemp(prefix="cdp-", dir="/tmp"))
    done = 0
    try:
        with contextlib.ExitStack() as stack:
            device = stack.enter_context(faulty(place / "dev", SIZE)) if may_mount() else None
            daemon = stack.enter_context(Daemon(place / "state"))
            soak = Soak(daemon, device)
            for number in steps:
                if time.monotonic() > deadline:
                    break
                rng = random.Random(f"{seed}/{number}")
                (step,) = rng.choices(list(STEPS), list(STEPS.values()))
                say(f"{seed}/{number} {step.__name__}")
                try:
                    step(soak, rng)
                    soak.check()
                except BaseException as error:
                    error.add_note(f"step {number}, {step.__name__}, of seed {seed}")
                    error.add_note(soak.cdp.run("status", "d", "--json").out)
                    error.add_note(daemon.said())
                    raise
                done += 1
            assert daemon.stop() == 0, daemon.said()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return done


def shrink(steps: list[int], fails: Callable[[list[int]], bool]) -> list[int]:
    """The fewest of these steps that are found to fail, by leaving out ever smaller parts."""
    size = len(steps) // 2
    while size:
        at = 0
        while at < len(steps):
            fewer = steps[:at] + steps[at + size :]
            if fewer and fails(fewer):
                steps = fewer
            else:
                at += size
        size //= 2
    return steps


def parse_steps(text: str) -> list[int]:
    """``1-20,35``."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


def format_steps(steps: Sequence[int]) -> str:
    """The same the other way round."""
    parts: list[tuple[int, int]] = []
    for step in steps:
        if parts and parts[-1][1] == step - 1:
            parts[-1] = (parts[-1][0], step)
        else:
            parts.append((step, step))
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in parts)


def seeds(first: int | None) -> Iterator[int]:
    """The one that was asked for, and others behind it; each can be named again."""
    yield secrets.randbits(32) if first is None else first
    while True:
        yield secrets.randbits(32)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int, default=CHUNK_STEPS, help="before a new disk")
    parser.add_argument("--only", type=parse_steps, help="of one seed, 1-20,35")
    parser.add_argument("--verbose", action="store_true")
    chosen = parser.parse_args()

    def say(line: str) -> None:
        if chosen.verbose:
            print(line, flush=True)

    deadline = time.monotonic() + 60 * chosen.minutes
    total = 0
    for seed in seeds(chosen.seed):
        steps = chosen.only or list(range(1, chosen.steps + 1))
        try:
            total += run(seed, steps, deadline, say)
        except Exception:
            traceback.print_exc()
            print(f"failed with seed {seed}; looking for fewer steps", flush=True)

            def fails(fewer: list[int], seed: int = seed) -> bool:
                try:
                    run(seed, fewer, float("inf"), say)
                except Exception as error:
                    print(f"{len(fewer)} steps: {error!r:.200}", flush=True)
                    return True
                return False

            short = format_steps(shrink(steps, fails))
            print(f"repeat: python -m tests.crash.soak --seed {seed} --only {short}")
            return 1
        if chosen.only or time.monotonic() > deadline:
            print(f"{total} steps, nothing found")
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
