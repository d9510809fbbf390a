"""Any table against the list of its facts: all kinds of records, all levels, all lookups."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from journal.entries import Entries, entries_of, merged, merged_slices
from journal.format import Kind
from tests.journal.index_model import (
    Record,
    check,
    edges,
    facts_of,
    is_sorted,
    table_of,
    triples,
)

MIB, GIB = 1 << 8, 1 << 18  # in blocks
near = st.sampled_from([0, 16, 256, 512, 3 * MIB, GIB, 2 * GIB, (1 << 32) - 2 * GIB])
blocks = st.builds(lambda base, offset: max(0, base + offset), near, st.integers(-20, 20))
sizes = st.one_of(
    st.just(1), st.integers(1, 40), st.integers(MIB - 2, 2 * MIB), st.integers(GIB - 2, GIB + 40)
)
redo = st.builds(
    Record, st.sampled_from([Kind.WRITE, Kind.ZERO, Kind.TRIM, Kind.REF]), blocks, sizes
)
control = st.builds(
    Record, st.sampled_from([Kind.BOOKMARK, Kind.GAP_BEGIN]), st.just(0), st.just(0)
)
ends = st.one_of(st.integers(1, 30), st.integers(1 << 40, (1 << 40) + 3))
undo = st.builds(Record, st.sampled_from([Kind.IMAGE, Kind.IMAGE_ZERO]), blocks, sizes, ends)
first_seqs = st.sampled_from([1, 1000, 1 << 50])
redo_tables = st.builds(
    lambda records, first_seq: table_of(records, first_seq=first_seq),
    st.lists(st.one_of(redo, redo, control), max_size=25),
    first_seqs,
)
undo_tables = st.builds(table_of, st.lists(undo, max_size=25))


def probes(entries: Entries) -> list[int]:
    """Seqs at, before and behind those there are."""
    found = {1}
    for seq in entries.seq.tolist():
        found |= {seq - 1, seq, seq + 1}
    return some(sorted(found), 6)


def some(values: list[int], count: int) -> list[int]:
    """About so many of them, spread evenly."""
    return values[:: len(values) // count + 1]


@given(redo_tables, st.data())
def test_versions(table, data: st.DataObject) -> None:
    valid = data.draw(st.lists(st.booleans(), min_size=len(table.rows), max_size=len(table.rows)))
    entries = entries_of(table, valid=np.array(valid, bool))
    facts = facts_of(table, valid)
    assert is_sorted(entries)
    check(entries, facts, some(edges(facts), 50), probes(entries))


@given(undo_tables)
def test_images(table) -> None:
    entries, facts = entries_of(table), facts_of(table)
    assert is_sorted(entries)
    check(entries, facts, some(edges(facts), 50), probes(entries))


@given(st.lists(st.lists(undo, max_size=12), min_size=1, max_size=4), st.data())
def test_several_merged(lists, data: st.DataObject) -> None:
    tables = [table_of(records, segment=number + 1) for number, records in enumerate(lists)]
    parts = [entries_of(table) for table in tables]
    facts = [fact for table in tables for fact in facts_of(table)]
    together = merged(parts)
    check(together, facts, some(edges(facts), 50), probes(together))

    def sliced(entries: Entries):
        size = data.draw(st.sampled_from([1, 3, 50, 1000]) if len(entries) < 50 else st.just(300))
        return (entries[at : at + size] for at in range(0, len(entries), size))

    slices = list(merged_slices([sliced(part) for part in parts]))
    assert sorted(triple for part in slices for triple in triples(part)) == triples(together)
    pairs = [
        pair for part in slices for pair in zip(part.key.tolist(), part.seq.tolist(), strict=True)
    ]
    assert pairs == sorted(pairs)


@given(redo_tables, blocks, sizes)
def test_overlapping(table, first: int, count: int) -> None:
    entries = entries_of(table)
    starts, lengths = entries.ranges()
    wanted = entries[(starts < first + count) & (starts + lengths > first)]
    assert triples(entries.overlapping(first, first + count)) == triples(wanted)
