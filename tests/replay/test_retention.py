"""What is given up next, and when: decisions on plain numbers."""

from __future__ import annotations

import dataclasses

import pytest

from replay.retention import Action, Decision, Segment, Situation, Usage, decide

MIB = 1 << 20


def segments(count: int) -> list[Segment]:
    """So many closed ones of 1 MiB with ten records each, and an open one."""
    closed = [Segment(10 * at + 1, 10 * at + 10, MIB, True) for at in range(count)]
    return [*closed, Segment(10 * count + 1, 10 * count + 5, MIB // 2, False)]


def situation(redo: int, *, limit: int, undo: int = 0, window_start: int = 0) -> Situation:
    """``redo`` closed segments, all applied; bytes of the others."""
    logs = segments(redo)
    used = Usage(sum(each.size for each in logs), undo, 0, limit, MIB)
    last = logs[-1].last_seq
    return Situation(used, logs, applied=last, durable=last, window_start=window_start)


@pytest.mark.parametrize(("limit", "high"), [(10 << 30, 9420), (16, 13), (8, 5), (4, 2), (100, 92)])
def test_space_is_made_some_segments_before_the_limit(limit: int, high: int) -> None:
    """Of a large journal a small part, of a small one enough for what arrives meanwhile."""
    limit = limit if limit > 1 << 20 else limit * MIB
    assert not Usage(high * MIB, 0, 0, limit, MIB).high
    assert Usage(high * MIB, 0, 2 * MIB, limit, MIB).high


def test_nothing_is_done_without_need() -> None:
    assert decide(situation(12, limit=16 * MIB)).action is Action.NOTHING
    assert decide(situation(12, limit=16 * MIB, window_start=25)).action is Action.NOTHING


def test_what_has_begun_goes_on_for_another_segment() -> None:
    now = situation(12, limit=16 * MIB, window_start=45)
    assert decide(now).action is Action.RECLAIM  # a quarter of the log lies behind the window
    now = situation(12, limit=16 * MIB)
    assert decide(dataclasses.replace(now, freeing=True)).action is Action.SHRINK
    now = situation(11, limit=16 * MIB)
    assert decide(dataclasses.replace(now, freeing=True)).action is Action.NOTHING


def test_under_pressure_the_window_moves_well_ahead_of_what_is_reclaimed() -> None:
    """At its edge a segment is copied nearly whole, further behind hardly anything is."""
    assert decide(situation(14, limit=16 * MIB)) == Decision(Action.SHRINK, 41)
    assert decide(situation(14, limit=16 * MIB, window_start=41)).action is Action.RECLAIM
    assert decide(situation(14, limit=16 * MIB, window_start=11)) == Decision(Action.SHRINK, 41)
    kept = dataclasses.replace(situation(14, limit=16 * MIB, window_start=11), may_shrink=False)
    assert decide(kept).action is Action.RECLAIM


def test_what_is_not_applied_yet_can_be_given_up_soon() -> None:
    """! Only when there is really nothing left the administrator is told so."""
    now = situation(0, limit=16 * MIB, undo=15 * MIB, window_start=5)
    assert decide(now).action is Action.THROTTLE
    assert decide(dataclasses.replace(now, durable=9)).action is Action.WAIT
    assert decide(dataclasses.replace(now, durable=9, full=True)).action is Action.THROTTLE
    assert decide(dataclasses.replace(now, undo_garbage=0.1)).action is Action.SWEEP


def test_only_the_policy_shrink_moves_the_window() -> None:
    now = situation(14, limit=16 * MIB)
    assert decide(dataclasses.replace(now, may_shrink=False)).action is Action.THROTTLE
