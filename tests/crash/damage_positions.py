"""Every place of a frozen journal at which something can be damaged, and what stands there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from journal.format import BATCH_HEADER, ENTRY, HEADER_PAGE, TRAILER, Log, sum_count, sum_unit
from journal.segment import (
    SegmentInfo,
    SegmentLister,
    load_table,
    payload_sizes,
)
from tests.crash.curator_storage import DISK
from tests.crash.damage_world import Frozen
from tests.crash.sim_storage import Inode, SimStorage

SECTOR, PAGE, WORD = 512, 4096, 8


@dataclass(frozen=True)
class Region:
    """What stands at bytes ``low``..``high - 1`` of a file.

    ``seqs``: of the records (the ends, of before-images) that it is about. ``needed``: whether
    anything is lost with it alone.
    """

    kind: str
    low: int
    high: int
    seqs: tuple[int, ...] = ()
    needed: bool = False


@dataclass(frozen=True)
class Hurt:
    """One way to damage one file: ``kind`` is flip, sector, page, gone or unreadable."""

    file: str
    kind: str
    at: int = 0
    length: int = 0
    bit: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.file} @{self.at}" + (f" bit {self.bit}" if self.bit else "")

    def done(self, content: bytes) -> bytes | None:
        """The file's content afterwards."""
        if self.kind == "gone":
            return None
        changed = bytearray(content)
        if self.kind == "flip":
            changed[self.at + self.bit // 8] ^= 1 << self.bit % 8
        else:
            changed[self.at : self.at + self.length] = bytes(len(changed[self.at :][: self.length]))
        return bytes(changed)


@dataclass
class Map:
    """The regions of every file of a frozen journal."""

    frozen: Frozen
    regions: dict[str, list[Region]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sim = SimStorage(0)
        for name, data in self.frozen.files.items():
            sim.live[name] = Inode(bytearray(data), bytearray(data))
        for log in (Log.REDO, Log.UNDO):
            infos = SegmentLister(sim, log, DISK).refresh()
            for info in infos:
                self.regions[info.name] = list(_segment(sim, info))
        for name in ("catalog.0", "catalog.1"):
            used = len(self.frozen.files[name].rstrip(b"\0"))
            self.regions[name] = [Region("catalog", 0, used)]
        for name in self.frozen.index:
            size = len(self.frozen.content(f"index/{name}"))
            self.regions[f"index/{name}"] = [Region("index", 0, size)]

    def at(self, hurt: Hurt) -> list[Region]:
        """What is hit."""
        found = self.regions.get(hurt.file, [])
        if hurt.kind == "gone":
            return found
        low, high = hurt.at, hurt.at + hurt.length
        if hurt.kind == "flip":
            low = hurt.at + hurt.bit // 8
            high = low + 1
        return [each for each in found if each.low < high and low < each.high]

    def all(self, seed: int) -> list[Hurt]:
        """Every place, every way; which bit of a word is flipped comes from the seed."""
        rng = random.Random(seed)
        found = []
        for name in self.regions:
            content = self.frozen.content(name)
            for at in self._words(name, content):
                found.append(Hurt(name, "flip", at, 1, rng.randrange(64)))
            for size, kind in ((SECTOR, "sector"), (PAGE, "page")):
                for at in range(0, len(content), size):
                    if any(content[at : at + size]):
                        found.append(Hurt(name, kind, at, size))
            if not name.startswith("index/"):
                found += [Hurt(name, "unreadable", at, PAGE) for at in range(0, len(content), PAGE)]
            found.append(Hurt(name, "gone"))
        found += [Hurt("reserve", "gone"), Hurt("reserve", "flip", 0, 1)]
        return found

    def _words(self, name: str, content: bytes) -> Iterator[int]:
        """Where bits are flipped: every word that says something, some of all others."""
        words: set[int] = set(range(0, len(content) - WORD + 1, SECTOR))
        for region in self.regions.get(name, []):
            step = {"payload": SECTOR, "index": 8 * WORD}.get(region.kind, WORD)
            words |= set(range(region.low // WORD * WORD, region.high, step))
            words.add((region.high - 1) // WORD * WORD)
        if name.startswith("index/"):  # LMDB's own pages, and the guard behind them
            first = name.removeprefix("index/") in (self.frozen.index[0], self.frozen.index[-1])
            words |= set(range(0, 2 * PAGE, WORD if first else 16 * WORD))
            words |= set(range((len(content) - 1) // PAGE * PAGE, len(content), WORD))
        yield from sorted(words)


def _segment(sim: SimStorage, info: SegmentInfo) -> Iterator[Region]:
    """One segment's. A table lies in the batches and, sealed, in the footer: one of both does."""
    sealed = info.trailer is not None
    file = sim.open(info.name, "read")
    table = load_table(file, info)
    undo = info.header.log == Log.UNDO
    seqs = [
        int(table.rows["arg"][row]) if undo else table.first_seq + row
        for row in range(len(table.rows))
    ]
    yield Region("header", 0, 120, tuple(seqs), bool(seqs))
    yield Region("rest of the header", 120, HEADER_PAGE)
    sizes = payload_sizes(table.rows).tolist()
    for batch in table.batches:
        first, count = int(batch["first_row"]), int(batch["count"])
        rows = range(first, first + count)
        start = int(batch["offset"])
        sums = sum(sum_count(sizes[row]) if sizes[row] else 0 for row in rows)
        end = start + BATCH_HEADER.size + count * ENTRY.size + sums * 8
        yield Region("batch", start, end, tuple(seqs[row] for row in rows), not sealed)
        for row in rows:
            at = int(table.rows["payload"][row])
            unit = sum_unit(sizes[row]) if sizes[row] else 1
            for piece in range(0, sizes[row], unit):
                high = min(piece + unit, sizes[row])
                yield Region("payload", at + piece, at + high, (seqs[row],), True)
    if info.trailer is not None:
        footer = info.trailer.footer_offset
        yield Region("footer", footer, footer + info.trailer.footer_bytes, tuple(seqs))
        yield Region("trailer", info.size - TRAILER.size, info.size, tuple(seqs))
    file.close()


def sample(places: list[Hurt], count: int, seed: int) -> list[Hurt]:
    """Some of them, of every file and every way."""
    rng = random.Random(seed)
    groups: dict[tuple[str, str], list[Hurt]] = {}
    for place in places:
        groups.setdefault((place.file.partition("/")[0], place.kind), []).append(place)
    chosen: list[Hurt] = []
    while len(chosen) < count and groups:
        for key in sorted(groups):
            chosen.append(groups[key].pop(rng.randrange(len(groups[key]))))
            if not groups[key]:
                del groups[key]
    return chosen[:count]
