"""The set of openable points, against a set of numbers put together by hand."""

from __future__ import annotations

from collections.abc import Iterable

import hypothesis.strategies as st
import numpy as np
from hypothesis import example, given

from journal.catalog_state import Bookmark, Gap, Hole, Pin, Rollback, Thinned
from replay.openable import NONE, SEQ_END, Openable, closed_off

HIGH = 40  # beyond every seq of the small worlds below


def u64(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), np.uint64)


def naive(window_start: int, durable: int, unopenable, points) -> set[int]:
    found = {seq for seq in (*range(window_start, durable + 1), *points) if seq <= durable}
    return {seq for seq in found if not any(lo <= seq < hi for lo, hi in unopenable)}


seqs = st.integers(0, HIGH - 1)
intervals = st.tuples(seqs, st.one_of(seqs, st.just(SEQ_END)))


@given(seqs, seqs, st.lists(intervals, max_size=6), st.lists(seqs, max_size=6))
@example(0, 0, [], [])
@example(5, 3, [(0, 4)], [1, 9])
@example(0, 30, [(3, 5), (5, 9), (4, 7), (29, SEQ_END)], [4, 9, 31])
def test_every_question_against_a_naive_set(window_start, durable, unopenable, points) -> None:
    real = Openable(
        window_start=window_start, durable=durable, unopenable=unopenable, points=points
    )
    want = naive(window_start, durable, unopenable, points)
    every = u64(range(HIGH))
    assert real.contains(every).tolist() == [seq in want for seq in range(HIGH)]
    assert real.first_at_or_after(every).tolist() == [
        min((s for s in want if s >= seq), default=NONE) for seq in range(HIGH)
    ]
    assert real.last_at_or_before(every).tolist() == [
        max((s for s in want if s <= seq), default=NONE) for seq in range(HIGH)
    ]
    lo, hi = (side.ravel() for side in np.meshgrid(every, every))
    assert real.wanted(lo, hi).tolist() == [
        any(a <= s < b for s in want) for a, b in zip(lo.tolist(), hi.tolist(), strict=True)
    ]
    listed = [seq for first, last in real.ranges() for seq in range(first, last + 1)]
    assert listed == sorted(want)
    firsts_and_lasts = [seq for bounds in real.ranges() for seq in bounds]
    assert firsts_and_lasts == sorted(firsts_and_lasts)
    assert all(a[1] + 1 < b[0] for a, b in zip(real.ranges(), real.ranges()[1:], strict=False))
    assert len(real) == len(real.ranges())


def test_single_numbers_are_answered_too() -> None:
    real = Openable(window_start=10, durable=20, points=[3])
    assert real.wanted(0, 4)
    assert not real.wanted(4, 10)
    assert bool(real.contains(3)) is True
    assert int(real.first_at_or_after(4)) == 10
    assert int(real.last_at_or_before(9)) == 3
    assert int(real.last_at_or_before(2)) == NONE


def test_one_bound_for_many() -> None:
    real = Openable(window_start=10, durable=20)
    assert real.wanted(0, u64([10, 11])).tolist() == [False, True]
    assert real.wanted(u64([20, 21]), 100).tolist() == [True, False]
    none = Openable(window_start=1, durable=0)
    assert none.wanted(0, u64([10, 11])).tolist() == [False, False]
    assert none.contains(u64([0, 1])).tolist() == [False, False]
    assert none.first_at_or_after(u64([0])).tolist() == [NONE]
    assert none.last_at_or_before(u64([0])).tolist() == [NONE]
    assert none.ranges() == []


def test_large_numbers_are_exact() -> None:
    """As floating point, which numpy makes of signed and unsigned, these would be equal."""
    seq = (1 << 63) + 3
    real = Openable(window_start=seq, durable=seq)
    assert real.contains(u64([seq - 1, seq, seq + 1])).tolist() == [False, True, False]
    assert real.wanted(u64([seq + 1, seq, seq - 1]), u64([SEQ_END, seq + 1, seq])).tolist() == [
        False,
        True,
        False,
    ]
    assert real.ranges() == [(seq, seq)]


def test_a_rollback_closes_off_its_inside_and_neither_its_source_nor_its_end() -> None:
    """! No seq from begin up to the commit is openable; an aborted or open one never becomes so."""
    begun = {
        "committed": (Rollback(10, 15, True), [9, 15, 16]),
        "aborted": (Rollback(10, 15, False), [9, 15, 16]),
        "open": (Rollback(10, None, False), [9]),
    }
    for name, (rollback, openable) in begun.items():
        real = Openable.of(window_start=9, durable=16, rollbacks=[rollback])
        assert [s for s in range(20) if real.contains(s)] == openable, name
        named = Openable.of(
            window_start=100, durable=16, rollbacks=[rollback],
            named=[Bookmark("b", 12, 1, 12, "crash", "crash"), Pin("p", 10, "me", 1, 0)],
        )  # fmt: skip
        assert named.ranges() == [], name


def test_a_gap_closes_off_all_up_to_the_end_of_the_resynchronisation() -> None:
    """! No point after a gap's start exists until it is complete, whatever names it."""
    thinned = [Thinned(11, 1, 2)]
    real = Openable.of(window_start=9, durable=16, gaps=[Gap(10, 15, "")], named=thinned)
    assert real.ranges() == [(9, 9), (15, 16)]
    real = Openable.of(window_start=9, durable=16, gaps=[Gap(10, None, "")], named=thinned)
    assert real.ranges() == [(9, 9)]


def test_a_hole_has_no_states() -> None:
    real = Openable.of(window_start=9, durable=16, holes=[Hole(10, 12)], refs=[11])
    assert real.ranges() == [(9, 9), (13, 16)]


def test_sources_of_refs_are_openable_by_definition() -> None:
    """! Also before the refs are durable: what they need must not go in the meantime."""
    real = Openable.of(window_start=100, durable=120, refs=[3, 50, 50])
    assert real.ranges() == [(3, 3), (50, 50), (100, 120)]


def test_nothing_above_durable_is_openable() -> None:
    """! A seq shown once never changes its meaning, so none is shown before it is durable."""
    real = Openable(window_start=5, durable=7, points=[8, 9])
    assert real.ranges() == [(5, 7)]
    assert not real.wanted(8, SEQ_END)


def test_intervals_come_in_any_order() -> None:
    assert closed_off([Rollback(5, 7, True)], [Gap(1, None, "")], [Hole(2, 3)]) == [
        (2, 4),
        (5, 7),
        (1, SEQ_END),
    ]
