"""The overlay against a list of blocks: what every block's newest content is, and where."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from cdp.recorder import overlay as module
from cdp.recorder.batch import Batch
from cdp.recorder.overlay import BACKING, LARGE, SMALL, ZERO, Extent, Overlay, Piece
from journal.format import BLOCK, Kind
from journal.redo import Appended

BLOCKS = 200


def no_file(_segment: int) -> Any:
    """Nothing is read here."""
    return None


def overlay(masks: BitMap | None = None) -> Overlay:
    return Overlay(masks or BitMap(), no_file)


def append(target: Overlay, seq: int, offset: int, kind: Kind, first: int, count: int) -> int:
    """One record as the recorder tells of it; where the next payload would be."""
    batch = Batch()
    if kind == Kind.WRITE:
        batch.add_write(first, count, bytes(count * BLOCK))
    else:
        batch.add_without_content(kind, first, count)
    batch.tell(target.generation(seq // 7 + 1), Appended(seq, seq, seq // 7 + 1, offset))
    return offset + batch.payload_bytes


def place(piece: Piece, block: int) -> object:
    """What a piece says of one of its blocks: "backing", "zero" or an offset in a segment."""
    kind, first, _, generation, where = piece
    if kind in (BACKING, ZERO):
        return "zero" if kind == ZERO else "backing"
    assert generation is not None
    if kind == SMALL:
        assert isinstance(where, int)
        return generation.segment, where + (block - first) * BLOCK
    assert kind == LARGE
    assert isinstance(where, Extent)
    return generation.segment, where.offset + (block - where.first) * BLOCK


records = st.lists(
    st.tuples(
        st.sampled_from([Kind.WRITE, Kind.WRITE, Kind.ZERO, Kind.TRIM]),
        st.integers(0, BLOCKS - 1),
        st.one_of(st.just(1), st.integers(1, 20), st.integers(1, BLOCKS)),
    ),
    max_size=40,
)


@given(records, st.data())
def test_newest_content(changes: list[tuple[Kind, int, int]], data: st.DataObject) -> None:
    target = overlay()
    newest: list[object] = ["backing"] * BLOCKS
    masked: list[list[bool]] = [[False] * BLOCKS]  # as of each seq
    offset = 4096
    for seq, (kind, first, count) in enumerate(changes, 1):
        count = min(count, BLOCKS - first)
        masks = list(masked[-1])
        for block in range(first, first + count):
            in_place = (seq // 7 + 1, offset + (block - first) * BLOCK)
            newest[block] = in_place if kind == Kind.WRITE else "zero"
            masks[block] = kind == Kind.TRIM
        masked.append(masks)
        offset = append(target, seq, offset, kind, first, count)
    applied = data.draw(st.integers(0, len(changes)))
    target.drop(applied)
    # What was dropped is in the backing, or masked.
    dropped = target.generations[0].last_seq if target.generations else len(changes) + 1
    assert all(generation.last_seq > applied for generation in target.generations)
    found = {}
    first = data.draw(st.integers(0, BLOCKS - 1))
    count = data.draw(st.integers(1, BLOCKS - first))
    pieces = target.resolve(first, count)
    at = first
    for piece in pieces:
        assert piece[1] == at
        for block in range(at, at + piece[2]):
            found[block] = place(piece, block)
            assert place(target.find(block), block) == found[block]
        at += piece[2]
    assert at == first + count
    assert dropped
    for block, where in found.items():
        if where == "backing":
            # Nothing unapplied touches it, and it is not masked.
            assert not masked[applied][block]
            assert not any(low <= block < low + size for _, low, size in changes[applied:])
        else:
            assert where == newest[block]


@given(st.sets(st.integers(0, 300)), st.integers(0, 299), st.data())
def test_masked_ranges(masks: set[int], first: int, data: st.DataObject) -> None:
    target = overlay(BitMap(masks))
    count = data.draw(st.integers(1, 301 - first))
    for piece in target.resolve(first, count):
        for block in range(piece[1], piece[1] + piece[2]):
            assert place(piece, block) == ("zero" if block in masks else "backing")


def test_generations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GENERATION_BLOCKS_MAX", 100)
    target = overlay()
    rng = random.Random(1)
    offset = 4096
    for seq in range(1, 500):
        first = rng.randrange(10_000)
        batch = Batch()
        batch.add_write(first, 1, bytes(BLOCK))
        batch.tell(target.generation(1), Appended(seq, seq, 1, offset))
        offset += BLOCK
    assert len(target.generations) == 5
    assert max(len(generation.blocks) for generation in target.generations) <= 100
    target.drop(499)
    assert target.empty


def test_a_record_of_a_whole_disk_is_one_extent() -> None:
    target = overlay()
    append(target, 1, 4096, Kind.ZERO, 0, 1 << 32)
    assert target.resolve(5, 1 << 20) == [(ZERO, 5, 1 << 20, None, None)]
    target.drop(1)
    assert target.empty
