"""When a disk's journal is scrubbed, how it goes, and what is done about what it finds.

The reading is done by a process of its own (`cdp.curator.scrubber`, which says why). Here it is
started, at the intervals configured or when somebody asks, and here is written down what came of
it: in ``scrub.json`` beside the disk's configuration. That file is worth nothing to the data;
without it the disk counts as never scrubbed. A scrub that was interrupted goes on behind the last
segment it has done, for these do not change; one older than the interval begins anew.

What lies twice is repaired: a damaged copy of the catalog is replaced, a damaged run of the index
thrown away. Segments are never written to; what is lost stays refused to who reads it.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import trio

from cdp.config import DiskConfig, read_json, write_json
from cdp.curator.scrub_reader import Reader
from journal.errors import CdpError, Conflict, Corruption, InvalidInput, JournalFull
from replay.scrub import PLACES_MAX, Effect

log = logging.getLogger(__name__)

STATE_FILE: Final = "scrub.json"
SAVE_SECONDS: Final = 60.0
LOOK_SECONDS: Final = 300.0  # between looks at the clock, which somebody may set
SETTLE_SECONDS: Final = 120.0  # after a start; clients that come back come first
RETRY_SECONDS: Final = 3600.0  # after a scrub that failed
POSTPONED_SECONDS: Final = 86400.0  # after one that was stopped
JITTER_PART: Final = 20  # an interval is longer or shorter by at most such a part of it

Json = dict[str, Any]


class Pass(msgspec.Struct):
    """One scrub. Times are UNIX seconds; ``damaged``: places as in `replay.scrub.Damage`, of which
    there were ``more`` than are listed; ``undo``, ``redo``: the last segments done.
    """

    started: float
    finished: float | None = None
    bytes: int = 0
    total: int = 0
    records: int = 0
    damaged: list[Json] = []
    more: int = 0
    undo: int = 0
    redo: int = 0

    def count(self, effect: Effect) -> int:
        """How many places of a kind were found; those that are not listed count as lost."""
        listed = [each for each in self.damaged if each["effect"] == effect]
        return len(listed) + (self.more if effect is Effect.LOST else 0)

    def note(self, damage: Json) -> None:
        """One more damaged place, unless it is known."""
        key = damage["file"], damage["offset"], damage["what"]
        if any((each["file"], each["offset"], each["what"]) == key for each in self.damaged):
            return
        if len(self.damaged) < PLACES_MAX:
            self.damaged.append(damage)
        else:
            self.more += 1


class Memory(msgspec.Struct):
    """What is in the file. ``since``: when it was made; ``bytes``: read by all passes."""

    since: float
    last: Pass | None = None
    unfinished: Pass | None = None
    postponed: float = 0.0
    bytes: int = 0
    repaired: int = 0


class Hands(Protocol):
    """What may change something: the curator."""

    async def repair_catalog(self) -> list[Corruption]:
        """Compare its copies, replace what is damaged."""
        ...

    async def drop_runs(self, files: Sequence[str]) -> None:
        """Throw away runs of the index, by their names in the journal."""
        ...


class Reading(Protocol):
    """Who reads: `Reader`, or what a test has in its place."""

    async def read(
        self, rate: int, after: tuple[int, int], on_message: Callable[[Json], None]
    ) -> None:
        """One pass."""
        ...

    async def set_rate(self, rate: int) -> None:
        """Another rate for the one that runs."""
        ...


class Scrubbing:
    """See the module. ``interval_seconds`` None: only when somebody asks; ``rate``: bytes a second
    that a scheduled scrub reads at most, None for as many as it can.
    """

    def __init__(
        self,
        directory: Path,
        config: DiskConfig,
        *,
        wall: Callable[[], float] = time.time,
        reader: Reading | None = None,
    ) -> None:
        self._directory, self._wall = directory, wall
        self._reader: Reading = reader or Reader(directory)
        self._uuid = config.uuid
        self.interval_seconds, self.rate = config.scrub_interval_seconds, config.scrub_rate
        self._memory = self._load()
        self._asked: int | None = None  # for a scrub at this rate; 0: any
        self._wake, self._ended = trio.Event(), trio.Event()
        self._current: Pass | None = None
        self._scope: trio.CancelScope | None = None
        self._failure: str | None = None
        self._not_before = trio.current_time() + SETTLE_SECONDS
        self._saved = 0.0

    # -------------------------------------------------------------------------------------- memory
    def _load(self) -> Memory:
        path = self._directory / STATE_FILE
        try:
            return read_json(path, Memory)
        except InvalidInput as error:
            if path.exists():
                log.warning("%s; this disk counts as never scrubbed", error)
            memory = Memory(since=self._wall())
        self._memory = memory
        self._save()
        return memory

    def _save(self) -> None:
        self._saved = trio.current_time()
        try:
            write_json(self._directory / STATE_FILE, self._memory)
        except OSError as error:  # then a scrub comes too early, some time: that is all
            log.warning("what was scrubbed cannot be written down: %s", error)

    # -------------------------------------------------------------------------------------- asking
    def status(self) -> Json:
        """For `cdp status` and metrics; without the places."""
        memory, running = self._memory, self._current
        last = memory.last
        return {
            "running": None if running is None else {
                "started": running.started, "done": running.bytes, "total": running.total,
                "damaged": running.count(Effect.LOST),
            },
            "last": None if last is None else {
                "started": last.started, "finished": last.finished, "bytes": last.bytes,
                **{effect.value: last.count(effect) for effect in Effect},
            },
            "next": self.due(), "failure": self._failure,
            "bytes": memory.bytes, "repaired": memory.repaired,
        }  # fmt: skip

    @property
    def last(self) -> Pass | None:
        """The last one that came to its end."""
        return self._memory.last

    def due(self) -> float | None:
        """When the next one is scheduled (UNIX seconds); None: not at all."""
        interval, memory = self.interval_seconds, self._memory
        if interval is None:
            return None
        if memory.unfinished is not None:
            return memory.unfinished.started
        # Different for each disk and time, so that those of a host do not all come at once.
        base = memory.since if memory.last is None else memory.last.started
        part = zlib.crc32(f"{self._uuid} {base}".encode()) / (1 << 32)
        if memory.last is None:
            due = base + interval * (0.1 + 0.9 * part)
        else:
            due = base + interval * (1 + (2 * part - 1) / JITTER_PART)
        due = max(due, memory.postponed)
        # Not for ever later after a clock was set back.
        return min(due, self._wall() + interval * (1 + 1 / JITTER_PART))

    async def start(self, rate: int | None) -> None:
        """Begin one now, or go on with the one that runs; ``rate``: 0 for no bound, None for the
        disk's.
        """
        self._failure = None
        asked = (self.rate or 0) if rate is None else rate
        if self._current is None:
            self._asked = asked
            self._ended = trio.Event()
            self._wake.set()
        elif rate is not None:
            await self._reader.set_rate(asked)

    async def wait(self, report: Callable[[Json], None], seconds: float = 0.2) -> Pass:
        """Until the one that runs, or was asked for, has ended.

        :raises CdpError: it did not come to its end.
        """
        ended = self._ended
        while not ended.is_set():
            running = self._current
            if running is not None:
                report({"phase": "scrubbing", "done": running.bytes, "total": running.total,
                        "unit": "bytes"})  # fmt: skip
            with trio.move_on_after(seconds):
                await ended.wait()
        if self._failure is not None or self._memory.last is None:
            raise CdpError(f"the scrub did not come to its end: {self._failure}")
        return self._memory.last

    def stop(self) -> None:
        """End the one that runs.

        :raises Conflict: none does.
        """
        if self._scope is None and self._asked is None:
            raise Conflict("no scrub runs")
        self._asked = None
        self._failure = "it was stopped"
        self._memory.unfinished = None
        self._memory.postponed = self._wall() + POSTPONED_SECONDS
        if self._scope is not None:
            self._scope.cancel()
        else:
            self._ended.set()
        self._save()

    async def set(self, interval_seconds: float | None, rate: int | None) -> None:
        """What the administrator has changed; counts at once."""
        self.interval_seconds, self.rate = interval_seconds, rate
        await self._reader.set_rate(rate or 0)
        self._wake.set()

    # ------------------------------------------------------------------------------------- running
    async def run(self, hands: Hands) -> None:
        """One after the other, until cancelled."""
        while True:
            rate = await self._wait_until_due()
            self._ended = self._ended if not self._ended.is_set() else trio.Event()
            try:
                with trio.CancelScope() as self._scope:
                    await self._one(hands, rate)
                if self._failure is not None:
                    log.info("the scrub ended early: %s", self._failure)
            finally:
                self._scope = self._current = None
                self._ended.set()

    async def _wait_until_due(self) -> int:
        """The rate at which to begin."""
        while True:
            if self._asked is not None:
                return self._asked
            due = self.due()
            left = LOOK_SECONDS
            if due is not None:
                left = max(due - self._wall(), self._not_before - trio.current_time())
                if left <= 0:
                    return self.rate or 0
            with trio.move_on_after(min(left, LOOK_SECONDS)):
                await self._wake.wait()
            self._wake = trio.Event()

    async def _one(self, hands: Hands, rate: int) -> None:
        memory, now = self._memory, self._wall()
        self._asked, self._failure = None, None
        found = memory.unfinished
        if found is None or not 0 <= now - found.started < (self.interval_seconds or 0):
            found = Pass(started=now)
        memory.unfinished = self._current = found
        self._save()
        await self._repair_catalog(hands, found)
        try:
            await self._read(found, rate)
        except (OSError, ValueError, CdpError) as error:
            self._failure = str(error)
            self._not_before = trio.current_time() + RETRY_SECONDS
            self._save()
            log.error("a scrub did not come to its end, and is tried again later: %s", error)
            return
        await self._repair_index(hands, found)
        found.finished = self._wall()
        memory.last, memory.unfinished, memory.postponed = found, None, 0.0
        memory.repaired += found.count(Effect.REPAIRED)
        self._save()
        self._say(found)

    @staticmethod
    def _say(found: Pass) -> None:
        lost, others = found.count(Effect.LOST), len(found.damaged) - found.count(Effect.LOST)
        log.log(
            logging.ERROR if lost else logging.WARNING if others > 0 else logging.INFO,
            "scrubbed %d bytes: %d damaged places cost content, %d do not", found.bytes, lost,
            max(others, 0),
        )  # fmt: skip

    @staticmethod
    async def _repair_catalog(hands: Hands, found: Pass) -> None:
        damage: Json = {"length": 0, "first_seq": 0, "last_seq": 0, "effect": Effect.REPAIRED.value}
        try:
            for error in await hands.repair_catalog():
                place = {"what": error.what, "file": error.file, "offset": error.offset}
                found.note(damage | place)
        except JournalFull as error:
            log.warning("a copy of the catalog is damaged and could not be replaced: %s", error)
            place = {"what": "damaged copy", "file": "catalog.0", "offset": 0}
            found.note(damage | place | {"effect": Effect.COVERED.value})

    @staticmethod
    async def _repair_index(hands: Hands, found: Pass) -> None:
        runs = [each for each in found.damaged if each["file"].startswith("index/")]
        await hands.drop_runs([each["file"] for each in runs])
        for each in runs:
            each["effect"] = Effect.REPAIRED.value

    async def _read(self, found: Pass, rate: int) -> None:
        """Have the journal read, and take in what is said of it."""
        before = found.bytes, found.records, found.more

        def take_in(said: Json) -> None:
            if "damage" in said:
                found.note(said["damage"])
            else:
                self._take_progress(found, before, said.popitem()[1])

        try:
            await self._reader.read(rate, (found.undo, found.redo), take_in)
        finally:
            self._save()

    def _take_progress(self, found: Pass, before: tuple[int, int, int], said: Json) -> None:
        done = before[0] + int(said["done"])
        self._memory.bytes += done - found.bytes
        found.bytes, found.total = done, before[0] + int(said["total"])
        found.records, found.more = before[1] + int(said["records"]), before[2] + int(said["more"])
        found.undo, found.redo = int(said["undo"]), int(said["redo"])
        if trio.current_time() - self._saved >= SAVE_SECONDS:
            self._save()
