"""The process that reads a journal and verifies it: ``python -m cdp.curator.scrubber``.

A process of its own, started by the curator for one pass: hashing in a thread of the curator would
take its interpreter's lock from apply, and what is not applied slows writers down; and what damage
may do to LMDB is then done to nobody who is needed. It asks for the processor and the disk only
when nobody else wants them, keeps to a rate, is away from the disk at least half of the time, and
leaves nothing in the page cache that was not there before. It reads only, holds no lock, and ends
with the curator: at the first line that nobody takes.

On standard output, an object a line: ``{"damage": {...}}`` for each damaged place, ``{"progress":
{...}}`` now and then, ``{"finished": {...}}`` at the end. On standard input: a new rate, a line.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import select
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from cdp.child import Child
from cdp.config import load_disk
from journal.catalog import Catalog
from journal.follower import RedoFollower
from journal.format import Log
from journal.run_format import INDEX
from journal.runset import RunSet
from journal.storage import File
from journal.undo_follower import UndoFollower
from replay.facts import Told
from replay.scrub import Place, Scrub

REPORT_SECONDS: Final = 0.5
SLEEP_SECONDS_MAX: Final = 0.5  # then a new rate is looked for
BURST_SECONDS: Final = 1.0  # of the rate, at the start and after a wait: a small journal is quick
NICE: Final = 19
_IOPRIO_WHO_PROCESS: Final = 1
_IOPRIO_IDLE: Final = 3 << 13
_SYS_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30, "riscv64": 30}


class Pacer:
    """Keeps to ``rate`` bytes a second; 0: as fast as can be."""

    def __init__(self, rate: int, now: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self.rate = rate
        self._now, self._sleep = now, sleep
        self._due = now() - BURST_SECONDS  # when what was read so far should have been
        self._since = now()

    def pace(self, size: int, listen: Callable[[], None]) -> None:
        """Wait after ``size`` bytes were read; ``listen`` is called now and then and may change the
        rate.
        """
        if not size:
            return
        now = self._now()
        worked = now - self._since
        if not self.rate:
            self._due = self._since = now
            return
        self._due = max(self._due, now - BURST_SECONDS) + size / self.rate
        # A device that others use takes longer: then it has as much more time without us.
        until = max(self._due, now + worked)
        while self.rate and (left := until - self._now()) > 0:
            self._sleep(min(left, SLEEP_SECONDS_MAX))
            listen()
        self._since = self._now()


def be_humble() -> None:
    """Take processor and disk only when nobody else wants them, as far as the kernel helps."""
    os.nice(NICE)
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    number = _SYS_IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)
    with contextlib.suppress(OSError):  # when memory runs out: it can be started again
        Path("/proc/self/oom_score_adj").write_text("900")


def read_beside_others(file: File, offset: int, buffer: memoryview) -> int:
    """What is cached is read from there; what is not is not left there either.

    Else the journal would push out of memory what somebody needs, and the next scrub would look at
    memory instead of at the disk.
    """
    descriptor = file.fileno()
    try:
        if os.preadv(descriptor, (buffer,), offset, os.RWF_NOWAIT) == len(buffer):
            return len(buffer)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EIO):
            raise
    # Without readahead: it would bring in what the next look takes for cached.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    got = file.read_into(offset, buffer)
    os.posix_fadvise(descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)
    return got


def open_scrub(child: Child, after: Place, *, cached: bool = False) -> Scrub:
    """A pass over a disk's journal. ``cached``: read through the page cache.

    :raises FrontierMissing: its recorder has not come up in this boot.
    """
    storage = child.storage()
    frontier = child.frontier(create=False, read_only=True)
    catalog = Catalog.open(storage, child.disk, read_only=True)

    def told() -> tuple[Told, Mapping[int, int]]:
        catalog.refresh()
        return Told.by(catalog), catalog.undo()

    index = Path(child.config.journal) / INDEX
    runs = [
        RunSet(storage, index, log=each, disk=child.disk, read_only=True)
        for each in (Log.REDO, Log.UNDO)
    ]
    reading = {} if cached else {"read": read_beside_others}
    return Scrub(
        redo=RedoFollower(storage, child.disk, frontier),
        undo=UndoFollower.of(storage, child.disk, frontier, catalog.undo),
        runs=runs, catalog=told, durable=lambda: frontier.durable, after=after, **reading,
    )  # fmt: skip


class Teller:
    """Says on standard output how a scrub goes, and hears on standard input."""

    def __init__(self, scrub: Scrub, pacer: Pacer) -> None:
        self._scrub, self._pacer = scrub, pacer
        self._told = 0
        self._last = float("-inf")
        self._heard = b""

    def tell(self, *, finished: bool = False) -> None:
        """What is new, if it is time."""
        scrub, now = self._scrub, time.monotonic()
        if not finished and now - self._last < REPORT_SECONDS:
            return
        self._last = now
        # All of it, before the place says that it need not be looked for again.
        for damage in scrub.damaged[self._told :]:
            self._say({"damage": dataclasses.asdict(damage)})
        self._told = len(scrub.damaged)
        self._say(
            {
                "finished" if finished else "progress": {
                    "done": scrub.done_bytes, "total": scrub.total_bytes,
                    "records": scrub.records, "more": scrub.more, "undo": scrub.place.undo,
                    "redo": scrub.place.redo,
                }
            }
        )  # fmt: skip

    @staticmethod
    def _say(what: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    def listen(self) -> None:
        """Take a new rate."""
        self.tell()
        while select.select([0], [], [], 0)[0]:
            data = os.read(0, 4096)
            if not data:
                return
            self._heard += data
            *lines, self._heard = self._heard.split(b"\n")
            for line in lines:
                self._pacer.rate = int(line)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="cdp.curator.scrubber")
    parser.add_argument("--disk-dir", type=Path, required=True)
    parser.add_argument("--rate", type=int, required=True)
    parser.add_argument("--after-undo", type=int, default=0)
    parser.add_argument("--after-redo", type=int, default=0)
    chosen = parser.parse_args()
    be_humble()
    config = load_disk(chosen.disk_dir)
    child = Child("scrubber", chosen.disk_dir, config, -1, 0, -1)
    scrub = open_scrub(child, Place(chosen.after_undo, chosen.after_redo))
    pacer = Pacer(chosen.rate, time.monotonic, time.sleep)
    teller = Teller(scrub, pacer)
    try:
        for size in scrub.steps():
            teller.listen()
            pacer.pace(size, teller.listen)
        teller.tell(finished=True)
    except BrokenPipeError:  # the curator is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
