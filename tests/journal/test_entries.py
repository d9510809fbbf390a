"""Entries from tables: which records count, how ranges are cut, what a loc says."""

from __future__ import annotations

import numpy as np
import pytest

from journal.entries import (
    EQUALS_MAX,
    LEVEL_SHIFTS,
    Entries,
    concatenated,
    entries_of,
    kinds_of,
    merged,
    merged_slices,
    piece_key,
    rows_of,
    segments_of,
    unpack_loc,
    without_surplus,
)
from journal.errors import Corruption
from journal.format import BLOCKS_MAX, SEGMENT_ID_MAX, Kind
from tests.journal.index_model import Record, check, facts_of, is_sorted, table_of, triples, writes


def column(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def test_nothing_comes_of_nothing() -> None:
    entries = entries_of(table_of([]))
    assert len(entries) == 0
    assert entries.levels == []
    check(entries, [], [0, 5], [0, 7])


def test_only_versions_and_images_have_entries() -> None:
    records = [Record(kind, 8, 1, 5) for kind in Kind]
    entries = entries_of(table_of(records))
    kinds = {Kind.WRITE, Kind.ZERO, Kind.TRIM, Kind.REF, Kind.IMAGE, Kind.IMAGE_ZERO}
    assert set(kinds_of(entries.loc).tolist()) == kinds
    assert len(entries) == len(kinds)


@pytest.mark.parametrize("kind", [Kind.WRITE, Kind.TRIM, Kind.REF, Kind.IMAGE, Kind.IMAGE_ZERO])
def test_a_loc_names_kind_segment_and_row(kind: Kind) -> None:
    records = [Record(Kind.BOOKMARK, 0, 0), Record(kind, BLOCKS_MAX - 1, 1, 77)]
    entries = entries_of(table_of(records, segment=SEGMENT_ID_MAX - 1, first_seq=40))
    assert unpack_loc(int(entries.loc[0])) == (kind, SEGMENT_ID_MAX - 1, 1)
    assert kinds_of(entries.loc).tolist() == [kind]
    assert segments_of(entries.loc).tolist() == [SEGMENT_ID_MAX - 1]
    assert rows_of(entries.loc).tolist() == [1]
    assert entries.seq.tolist() == [77 if kind >= Kind.IMAGE else 41]
    assert kinds_of(column(0)).tolist() == [0]


def test_rows_that_are_not_valid_are_left_out() -> None:
    table = table_of([Record(Kind.WRITE, 1, 1), Record(Kind.REF, 1, 4), Record(Kind.TRIM, 2, 1)])
    entries = entries_of(table, valid=np.array([True, False, True]))
    assert rows_of(entries.loc).tolist() == [0, 2]


def test_a_record_beyond_the_largest_disk_is_corruption() -> None:
    entries_of(table_of([Record(Kind.TRIM, BLOCKS_MAX - 5, 5)]))
    with pytest.raises(Corruption, match="seq 12"):
        entries_of(
            table_of(
                [Record(Kind.WRITE, 0, 1)] * 2 + [Record(Kind.TRIM, BLOCKS_MAX - 5, 6)],
                first_seq=10,
            )
        )
    with pytest.raises(Corruption):
        entries_of(table_of([Record(Kind.TRIM, (1 << 64) - 5, 6)]))


def test_a_large_trim_is_few_entries() -> None:
    tebibyte = 1 << 28
    aligned = entries_of(table_of([Record(Kind.TRIM, tebibyte, tebibyte)]))
    assert len(aligned) == 1024
    assert [level for level, _, _ in aligned.levels] == [3]
    ragged = entries_of(table_of([Record(Kind.TRIM, tebibyte + 1, tebibyte)]))
    assert [level for level, _, _ in ragged.levels] == [0, 1, 2, 3]
    assert len(ragged) == 1023 + 15 + 15 + 1023 + 1
    whole = entries_of(table_of([Record(Kind.ZERO, 0, BLOCKS_MAX - 1)]))
    assert int(whole.ranges()[1].sum()) == BLOCKS_MAX - 1


@pytest.mark.parametrize("first", [0, 1, 15, 16, 17, 255, 256, 4095, (1 << 18) - 1, 1 << 18])
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 32, 255, 256, 257, 4096, (1 << 18) + 33])
def test_pieces_are_aligned_and_tile_the_range(first: int, count: int) -> None:
    entries = entries_of(table_of([Record(Kind.TRIM, first, count)]))
    starts, sizes = entries.ranges()
    pieces = sorted(zip(starts.tolist(), sizes.tolist(), strict=True))
    at = first
    for start, size in pieces:
        assert start == at
        assert start % size == 0
        at += size
    assert at == first + count
    # The largest that fit: no sixteen (or four, or ...) neighbours that would be one piece.
    keys = set(entries.key.tolist())
    for level in range(len(LEVEL_SHIFTS) - 1):
        step = 1 << LEVEL_SHIFTS[level + 1]
        for start in {piece[0] // step * step for piece in pieces if piece[1] < step}:
            inside = range(start, start + step, 1 << LEVEL_SHIFTS[level])
            assert not all(piece_key(level, block) in keys for block in inside)


def test_the_best_of_all_levels_counts() -> None:
    records = [
        Record(Kind.WRITE, 20, 1),
        Record(Kind.TRIM, 16, 16),
        Record(Kind.WRITE, 20, 1),
        Record(Kind.ZERO, 0, 1 << 18),
        Record(Kind.WRITE, 20, 1),
    ]
    table = table_of(records, first_seq=100)
    check(entries_of(table), facts_of(table), [0, 15, 16, 20, 21, 32, 300, 1 << 18], range(98, 107))


def test_a_hot_block_and_many_levels_of_history() -> None:
    table = writes(np.array([7] * 500 + [6, 8] * 250), first_seq=1)
    check(
        entries_of(table), facts_of(table), [5, 6, 7, 8, 9], [1, 2, 255, 256, 500, 501, 999, 5000]
    )


def test_images_in_no_order() -> None:
    ends = [90, 20, 50, 20, 1 << 60, 3]
    table = table_of([Record(Kind.IMAGE, 4, 3, end) for end in ends], segment=9)
    entries = entries_of(table)
    assert is_sorted(entries)
    check(entries, facts_of(table), [3, 4, 6, 7], [1, 2, 3, 19, 20, 21, 90, 1 << 60, (1 << 64) - 2])


def test_seqs_far_apart_are_sorted_too() -> None:
    """Where key and seq do not fit 64 bits together the slower way gives the same order."""
    far = [
        Entries(column(1, 2 << 60), column(1 << 63, 5), column(1, 2)),
        Entries(column(1, 2 << 60), column(7, (1 << 64) - 2), column(3, 4)),
    ]
    assert merged(far).loc.tolist() == [3, 1, 2, 4]


def test_merging_keeps_equal_entries() -> None:
    left = Entries(column(3, 3, 5), column(1, 2, 1), column(10, 11, 12))
    right = Entries(column(3, 4), column(2, 9), column(13, 14))
    slices = list(merged_slices([iter([left]), iter([right])]))
    for both in (merged([left, right, Entries.empty()]), concatenated(slices)):
        assert both.key.tolist() == [3, 3, 3, 4, 5]
        assert both.loc.tolist() == [10, 11, 13, 14, 12]


def test_slices_of_many_sources_come_out_sorted_once() -> None:
    rng = np.random.default_rng(3)
    parts = []
    for number in range(6):
        table = writes(rng.integers(0, 40, 300), segment=number + 1, first_seq=1 + 300 * number)
        parts.append(entries_of(table))

    def sliced(entries: Entries, size: int):
        return (entries[at : at + size] for at in range(0, len(entries), size))

    sources = [
        sliced(part, size) for part, size in zip(parts, (1, 7, 50, 299, 300, 301), strict=True)
    ]
    slices = list(merged_slices([*sources, iter([]), iter([Entries.empty()])]))
    together = concatenated(slices)
    assert is_sorted(together)
    assert triples(together) == triples(merged(parts))
    assert max(map(len, slices)) < len(together)


def test_surplus_of_equal_entries_is_the_oldest_segments() -> None:
    count = EQUALS_MAX + 6
    locs = np.arange(count, dtype=np.uint64) << np.uint64(32)
    equal = Entries(np.full(count, 5, np.uint64), np.full(count, 9, np.uint64), locs[::-1].copy())
    kept = without_surplus(equal)
    assert sorted(segments_of(kept.loc).tolist()) == list(range(6, count))
    assert without_surplus(kept) is kept


def test_parts_by_blocks_and_by_seqs() -> None:
    table = table_of(
        [Record(Kind.WRITE, 10, 1), Record(Kind.TRIM, 0, 512), Record(Kind.WRITE, 300, 2)],
        first_seq=5,
    )
    entries = entries_of(table)
    assert rows_of(entries.overlapping(10, 11).loc).tolist() == [0, 1]
    assert rows_of(entries.overlapping(11, 300).loc).tolist() == [1, 1]
    assert rows_of(entries.overlapping(301, 600).loc).tolist() == [2, 1]
    assert len(entries.overlapping(600, 700)) == len(entries.overlapping(10, 10)) == 0
    assert set(entries.between(5, 5).seq.tolist()) == {5}
    assert set(entries.between(6, 7).seq.tolist()) == {6, 7}
    assert len(entries.between(0, (1 << 64) - 1)) == len(entries)
