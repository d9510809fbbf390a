"""Masks, blocks written, rollbacks: any history, cut in any pieces, against the plain rules."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from journal.bitmaps import Bitmaps, Rollback, Rollbacks, blocks_of, void_refs
from journal.format import Kind
from journal.segment import ENDLESS, Table, TableBuilder
from tests.crash.redo_model import Record, masks


def table_of(records: dict[int, Record], first: int, last: int) -> Table:
    """A table of records, one batch each, as it would be read."""
    builder = TableBuilder(1, first)
    entries = bytearray()
    for seq in range(first, last + 1):
        record = records[seq]
        entries += b"".join(
            number.to_bytes(length, "little")
            for number, length in (
                (record.block, 8), (record.arg, 8), (record.nblocks, 4), (record.kind, 1), (0, 3),
            )
        )  # fmt: skip
    builder.add_parts(4096, first, 1, 0, 1, last - first + 1, bytes(entries), b"")
    return builder.table()


@st.composite
def histories(draw: st.DrawFn) -> dict[int, Record]:
    """Writes, zeroes and trims of all sizes; rollbacks with nothing but refs inside; gaps."""
    records: dict[int, Record] = {}
    inside = False
    for seq in range(1, draw(st.integers(1, 40)) + 1):
        if inside:
            kinds = [Kind.REF, Kind.REF, Kind.ROLLBACK_COMMIT, Kind.ROLLBACK_ABORT, Kind.CRASH]
        else:
            kinds = [Kind.WRITE, Kind.TRIM, Kind.ZERO, Kind.BOOKMARK, Kind.ROLLBACK_BEGIN]
        kind = draw(st.sampled_from(kinds))
        if kind in (Kind.ROLLBACK_BEGIN, Kind.ROLLBACK_COMMIT, Kind.ROLLBACK_ABORT):
            inside = kind == Kind.ROLLBACK_BEGIN
        if kind >= 16:
            records[seq] = Record(kind, 0, 0, 0, b"", 1)
            continue
        nblocks = draw(st.sampled_from([1, 1, 2, 5, 64, 65, 200]))
        records[seq] = Record(kind, draw(st.integers(0, 60)), nblocks, 1, b"", 1)
    return records


def committed(records: dict[int, Record]) -> set[int]:
    """Seqs of refs that are versions, in the plainest way."""
    result, refs = set(), set()
    for seq in sorted(records):
        kind = records[seq].kind
        if kind == Kind.REF:
            refs.add(seq)
        elif kind in (Kind.ROLLBACK_BEGIN, Kind.ROLLBACK_ABORT):
            refs = set()
        elif kind == Kind.ROLLBACK_COMMIT:
            result |= refs
            refs = set()
    return result


@given(histories(), st.data())
def test_bitmaps_of_any_history_in_any_pieces(
    records: dict[int, Record], data: st.DataObject
) -> None:
    bitmaps = Bitmaps()
    written = BitMap()
    last = max(records)
    first = 1
    while first <= last:
        end = data.draw(st.integers(first, last))
        written |= bitmaps.advance(table_of(records, first, end))
        assert set(bitmaps.masks) == masks(records, end)
        first = end + 1
    content = {
        block
        for record in records.values()
        if record.kind in (Kind.WRITE, Kind.ZERO)
        for block in range(record.block, record.block + record.nblocks)
    }
    refs = {
        block
        for seq in committed(records)
        for block in range(records[seq].block, records[seq].block + records[seq].nblocks)
    }
    assert content <= set(written) <= content | refs


@given(histories(), st.data())
def test_rollbacks_of_any_history_in_any_pieces(
    records: dict[int, Record], data: st.DataObject
) -> None:
    tables = []
    last, first = max(records), 1
    while first <= last:
        end = data.draw(st.integers(first, last))
        tables.append(table_of(records, first, end))
        first = end + 1
    rollbacks = Rollbacks()
    for table in tables:
        rollbacks.advance(table)
        rollbacks.advance(table)  # again, as a table of an open segment is
    valid = {
        table.first_seq + row
        for table in tables
        for row in rollbacks.valid(table).nonzero()[0].tolist()
    }
    undecided = {
        table.first_seq + row
        for table in tables
        for row in rollbacks.undecided(table).nonzero()[0].tolist()
    }
    void = {
        table.first_seq + row
        for table, rows in zip(tables, void_refs(tables), strict=True)
        for row in rows.nonzero()[0].tolist()
    }
    plain = {s for s, r in records.items() if r.kind in (Kind.WRITE, Kind.ZERO, Kind.TRIM)}
    refs = {s for s, r in records.items() if r.kind == Kind.REF}
    assert valid == plain | committed(records)
    assert void == refs - committed(records)
    begun = rollbacks.open.begin if rollbacks.open else last + 1
    assert undecided == {seq for seq in refs if seq > begun}


def test_rollbacks_whose_begin_was_reclaimed() -> None:
    refs = Record(Kind.REF, 1, 1, 1, b"", 1)
    records = {
        5: refs, 6: Record(Kind.ROLLBACK_COMMIT, 0, 0, 0, b"", 1),
        7: Record(Kind.ROLLBACK_BEGIN, 0, 0, 0, b"", 1), 8: refs,
    }  # fmt: skip
    table = table_of(records, 5, 8)
    (void,) = void_refs([table])
    assert void.tolist() == [False, False, False, True]
    # The catalog knows those that were reclaimed, and must not be counted twice.
    rollbacks = Rollbacks([Rollback(3, 6, True)])
    rollbacks.advance(table)
    assert rollbacks.list == [Rollback(3, 6, True), Rollback(7, ENDLESS, False)]
    assert rollbacks.valid(table).tolist() == [True, False, False, False]


def test_a_gap_voids_what_was_known_of_blocks() -> None:
    records = {
        1: Record(Kind.TRIM, 0, 5, 0, b"", 1), 2: Record(Kind.WRITE, 9, 1, 0, b"", 1),
        3: Record(Kind.GAP_BEGIN, 0, 0, 0, b"", 1), 4: Record(Kind.TRIM, 7, 1, 0, b"", 1),
        5: Record(Kind.WRITE, 8, 1, 0, b"", 1),
    }  # fmt: skip
    bitmaps = Bitmaps()
    assert bitmaps.advance(table_of(records, 1, 5)) == BitMap([8])
    assert bitmaps.masks == BitMap([7])


def test_blocks_of_ranges() -> None:
    starts, counts = np.array([5, 100, 1000, 5]), np.array([1, 64, 65, 2])
    assert blocks_of(starts, counts) == BitMap([5, 6, *range(100, 164), *range(1000, 1065)])
    top = (1 << 32) - 1
    assert blocks_of(np.array([top], "<u8"), np.array([1], "<u4")) == BitMap([top])
    assert not blocks_of(starts[:0], counts[:0])
