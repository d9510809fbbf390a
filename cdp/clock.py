"""The host's clock: stamps never go backwards, not even over a reboot; and what time they were.

A stamp is CLOCK_BOOTTIME plus an offset. The offset is fixed as long as the host runs, so stamps of
all disks are comparable and no adjustment of the wall clock disturbs them. After a reboot it is
chosen anew, above the *ceiling*: a stamp that is made durable before any process may reach it. So
no journal has to be read before the clock can be used. Stamps begin near the wall clock's time,
merely so that a lost state directory does not make them begin below those in its journals.

What time a stamp was, says the *wall table*: from each of its stamps on, the wall clock was `delta`
ahead. BOOTTIME is slewed together with the wall clock, so a new entry means that somebody set it.
"""

from __future__ import annotations

import bisect
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from msgspec import Struct

from cdp.config import read_json, write_json
from journal.errors import InvalidInput

log = logging.getLogger(__name__)

HOST_FILE: Final = "host.json"
WALL_FILE: Final = "clock.json"
SECOND_NS: Final = 1_000_000_000
# How far ahead of the clock the ceiling is made durable, and when that is done again. A recorder
# goes on without its supervisor: it has at least the difference before it passes the ceiling.
CEILING_AHEAD_NS: Final = 3600 * SECOND_NS
CEILING_RENEW_NS: Final = 1800 * SECOND_NS
# Differences below this are noise of reading two clocks one after the other.
STEP_NS_MIN: Final = 2_000_000
WALL_ENTRIES_MAX: Final = 4096
_SAMPLES: Final = 5

_T = TypeVar("_T")


def boottime_ns() -> int:
    """CLOCK_BOOTTIME: runs through suspends, is never set."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def read_boot_id() -> str:
    """The kernel's name for this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def boot_id_bytes(boot_id: str | None = None) -> bytes:
    """The same in 16 bytes, as the frontier page carries it."""
    return uuid.UUID(boot_id or read_boot_id()).bytes


class StampClock:
    """What a process of a disk needs: it is told the offset on its command line."""

    __slots__ = ("_boottime_ns", "offset_ns")

    def __init__(self, offset_ns: int, boottime: Callable[[], int] = boottime_ns) -> None:
        self.offset_ns = offset_ns
        self._boottime_ns = boottime

    def now(self) -> int:
        """The stamp of this moment."""
        return self._boottime_ns() + self.offset_ns


@dataclass(frozen=True, slots=True)
class Sources:
    """Where time comes from; tests bring their own."""

    boottime_ns: Callable[[], int] = boottime_ns
    wall_ns: Callable[[], int] = time.time_ns
    boot_id: Callable[[], str] = read_boot_id


class HostState(Struct, frozen=True, forbid_unknown_fields=True):
    """host.json: whose state this is, and the clock of the boot it was last used in."""

    host_id: str
    boot_id: str
    offset_ns: int
    ceiling_ns: int


class WallTable:
    """From stamps to the wall clock. Entries are (stamp, wall clock minus stamp), both in ns."""

    def __init__(self, entries: list[tuple[int, int]]) -> None:
        self.entries = entries

    def add(self, stamp: int, delta: int) -> None:
        """From `stamp` on, the wall clock is `delta` ahead."""
        self.entries.append((stamp, delta))
        del self.entries[:-WALL_ENTRIES_MAX]

    @property
    def delta(self) -> int | None:
        """The newest entry's."""
        return self.entries[-1][1] if self.entries else None

    def wall_of(self, stamp: int) -> int:
        """What the wall clock showed at a stamp, in ns since the epoch.

        A stamp older than the table is counted with its first entry.
        """
        at = bisect.bisect_right(self.entries, stamp, key=lambda entry: entry[0])
        return stamp + self.entries[max(at - 1, 0)][1] if self.entries else stamp


class HostClock:
    """The clock of the supervisor, which alone keeps it. Every method that writes says so."""

    def __init__(
        self, directory: Path, state: HostState, wall: WallTable, sources: Sources
    ) -> None:
        self._directory = directory
        self._state = state
        self._sources = sources
        self.wall = wall

    @classmethod
    def open(cls, directory: Path, sources: Sources | None = None) -> HostClock:
        """The clock of this state directory, usable at once: its ceiling is durable. Writes.

        :raises InvalidInput: a file of it cannot be read.
        """
        sources = sources or Sources()
        path, boot_id = directory / HOST_FILE, sources.boot_id()
        now = sources.boottime_ns()
        if path.exists():
            state = _read(path, HostState)
        else:
            state = HostState(uuid.uuid4().hex, "", 0, 0)
        if state.boot_id != boot_id:
            first = max(state.ceiling_ns + 1, sources.wall_ns())
            state = HostState(state.host_id, boot_id, first - now, state.ceiling_ns)
        wall_path = directory / WALL_FILE
        entries = _read(wall_path, list[tuple[int, int]]) if wall_path.exists() else []
        clock = cls(directory, state, WallTable(entries), sources)
        clock.renew()
        clock.observe()
        return clock

    @property
    def host_id(self) -> str:
        """Names this state directory, 32 hex digits: journals of another have other stamps."""
        return self._state.host_id

    @property
    def boot_id(self) -> str:
        """The boot that the offset belongs to."""
        return self._state.boot_id

    @property
    def offset_ns(self) -> int:
        """What processes of this host add to CLOCK_BOOTTIME."""
        return self._state.offset_ns

    @property
    def ceiling_ns(self) -> int:
        """The durable stamp that no process has reached; the next boot begins above it."""
        return self._state.ceiling_ns

    def now(self) -> int:
        """The stamp of this moment."""
        return self._sources.boottime_ns() + self._state.offset_ns

    def wall_now(self) -> int:
        """The wall clock, in ns since the epoch."""
        return self._sources.wall_ns()

    @property
    def must_renew(self) -> bool:
        """Whether it is time for `renew`."""
        return self._state.ceiling_ns - self.now() < CEILING_RENEW_NS

    def renew(self) -> None:
        """Makes a ceiling durable that is well ahead of the clock. Writes and syncs."""
        self._save(self.now() + CEILING_AHEAD_NS)

    def lower(self, highest: int) -> None:
        """Takes the ceiling back to the clock, or to `highest`, the largest stamp given out since.

        Only when all processes of all disks have ended: the next boot then begins near its wall
        clock. Writes and syncs.
        """
        self._save(max(self.now(), highest))

    def _save(self, ceiling: int) -> None:
        state = HostState(self._state.host_id, self._state.boot_id, self._state.offset_ns, ceiling)
        write_json(self._directory / HOST_FILE, state)
        self._state = state

    def observe(self) -> tuple[int, int] | None:
        """Compares with the wall clock; the new entry of the wall table if it was set.

        Writes and syncs then, and only then.
        """
        delta, error = self._measure()
        known = self.wall.delta
        if known is not None and abs(delta - known) < STEP_NS_MIN + error:
            return None
        stamp = self.now()
        if known is not None:
            log.info("the wall clock was set by %+.3f s", (delta - known) / SECOND_NS)
        self.wall.add(stamp, delta)
        write_json(self._directory / WALL_FILE, self.wall.entries)
        return stamp, delta

    def _measure(self) -> tuple[int, int]:
        """Wall clock minus stamp, and how wrong that may be: the best of a few readings."""
        best, error = 0, 1 << 62
        for _ in range(_SAMPLES):
            before = self.now()
            wall = self._sources.wall_ns()
            after = self.now()
            if after - before < error:
                best, error = wall - (before + after) // 2, after - before
        return best, error


def _read(path: Path, kind: type[_T]) -> _T:
    try:
        return read_json(path, kind)
    except InvalidInput as error:
        raise InvalidInput(
            f"{error}; without it the order of writes of different disks is unknown: restore it, "
            "or move it away to begin a new clock"
        ) from error
