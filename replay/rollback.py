"""R6, the plan of a rollback: which ranges differ from a point, and where each one's data are.

Blocks changed between two points = versions and ends with a seq in between. A ref never names
another ref's seq: chains are flattened, it names the point at which the data themselves were
written.
"""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Iterator

import numpy as np
from pyroaring import BitMap

from journal.entries import kinds_of
from journal.format import BLOCK, Kind
from replay.history import History
from replay.plan import stretches

SLICE_BLOCKS = 65536


@dataclasses.dataclass(frozen=True, slots=True)
class Ref:
    """``blocks`` blocks from ``start`` on become what they were at ``source``."""

    start: int
    blocks: int
    source: int


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What a rollback to ``seq`` appends."""

    seq: int
    tip: int
    refs: list[Ref]

    @property
    def size(self) -> int:
        """Bytes of the disk that it changes."""
        return sum(ref.blocks for ref in self.refs) * BLOCK

    def pack(self) -> bytes:
        """The refs as u64 triples: start, blocks, source."""
        flat = array.array("Q")
        for ref in self.refs:
            flat.extend((ref.start, ref.blocks, ref.source))
        return flat.tobytes()


def changed_blocks(history: History, seq: int, tip: int) -> BitMap:
    """Blocks with a version, or a before-image's end, in (seq, tip]."""
    result = BitMap()
    for starts, ends in history.changed(seq + 1, tip):
        single = ends == starts + np.uint64(1)
        result |= BitMap(array.array("I", starts[single].astype(np.uint32).tobytes()))
        for start, end in zip(starts[~single].tolist(), ends[~single].tolist(), strict=True):
            result.add_range(start, end)
    return result


def plan(history: History, seq: int, tip: int) -> Plan:
    """The rollback of a disk at ``tip`` to the openable point ``seq``."""
    changed = changed_blocks(history, seq, tip)
    refs: list[Ref] = []
    for blocks in _slices(changed):
        sources = _sources(history, blocks, seq)
        bounds = stretches(blocks, sources)
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            start, source = int(blocks[low]), int(sources[low])
            last = refs[-1] if refs else None
            if last and last.start + last.blocks == start and last.source == source:
                refs[-1] = dataclasses.replace(last, blocks=last.blocks + high - low)
            else:
                refs.append(Ref(start, high - low, source))
    return Plan(seq, tip, refs)


def _slices(changed: BitMap) -> Iterator[np.ndarray]:
    """The blocks in order, bounded slices of them (u64)."""
    count = len(changed)
    for at in range(0, count, SLICE_BLOCKS):
        part = changed[at : at + SLICE_BLOCKS]
        yield np.frombuffer(part.to_array(), np.uint32).astype(np.uint64)


def _sources(history: History, blocks: np.ndarray, seq: int) -> np.ndarray:
    """For each block the point that its ref names: ``seq``, or where a ref there points to."""
    sources = np.full(len(blocks), seq, np.uint64)
    _, locs = history.newest_le(blocks, seq)
    refs = np.flatnonzero(kinds_of(locs) == Kind.REF)
    for loc in np.unique(locs[refs]).tolist():
        sources[refs[locs[refs] == loc]] = history.ref_source(int(loc))
    return sources
