"""Looks at a disk once a second while something else loads it: memory, space, lag."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peers import Protected
from journal.errors import CdpError

ROLES = ("recorder", "curator")
KIB, MIB = 1 << 10, 1 << 20
SECOND = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """``memory``: bytes by process. ``allocated``: what the journal takes of the file system."""

    at: float
    memory: dict[str, int]
    allocated: int
    journal_bytes: int
    journal_limit: int
    redo_bytes: int
    undo_bytes: int
    lag_records: int
    lag_bytes: int
    window_start: int
    throttled: bool


def memory_of(pid: int) -> dict[str, int]:
    """Bytes by the kernel's names. VmRSS counts mapped files, which the page cache has anyway;
    RssAnon does not; VmHWM is the highest VmRSS so far.
    """
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM", "RssAnon"):
            found[name] = int(value.split()[0]) * KIB
    return found


def allocated(directory: Path) -> int:
    """Bytes that all files below take of the file system."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            pass
    return total


class Watch:
    """Samples in a thread of its own, except while `paused`."""

    def __init__(self, disk: Protected) -> None:
        self.samples: list[Sample] = []
        self.ended = ""
        self._disk = disk
        self._pids = {role: disk.process(role) for role in ROLES}
        self._journal = Path(str(disk.status()["journal"]))
        self._stop = threading.Event()
        self._free = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._stop.set()
        self._thread.join()

    @property
    def paused(self) -> threading.Lock:
        """Held while the disk's processes stand still and cannot answer."""
        return self._free

    def _run(self) -> None:
        while not self._stop.wait(SECOND):
            with self._free:
                try:
                    self.samples.append(self._sample())
                except FileNotFoundError:
                    self.ended = "a process of the disk ended meanwhile"
                    return
                except CdpError as error:
                    print(f"watch: {error}", file=sys.stderr)

    def check(self) -> None:
        """Whoever goes on measuring a disk whose processes were restarted measures something else.

        :raises RuntimeError: they were.
        """
        if self.ended:
            raise RuntimeError(self.ended)

    def _sample(self) -> Sample:
        status = self._disk.status()
        return Sample(
            at=time.monotonic(),
            memory={role: memory_of(pid)["RssAnon"] for role, pid in self._pids.items()},
            allocated=allocated(self._journal),
            journal_bytes=status["journal_bytes"],
            journal_limit=status["journal_limit"],
            redo_bytes=status["redo_bytes"],
            undo_bytes=status["undo_bytes"],
            lag_records=status["apply_lag_records"],
            lag_bytes=status["apply_lag_bytes"],
            window_start=status["window_start_seq"],
            throttled=status["state"] == "throttled",
        )

    def highest(self, value: Callable[[Sample], float]) -> float:
        """The largest value of all samples."""
        return max((value(each) for each in self.samples), default=0.0)

    def peak(self, role: str) -> int:
        """The most memory a process has ever had, mapped files included."""
        return memory_of(self._pids[role])["VmHWM"]
