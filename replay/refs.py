"""Which refs are versions: those of rollbacks that were committed (R6).

Between a rollback's begin and its commit or abort a redo log holds nothing but refs. So what
becomes of a ref is told by the next control record of a rollback behind it: commit - it is a
version; abort - it never was one; none yet - undecided, and nobody may act on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from journal.format import Kind


@dataclasses.dataclass(frozen=True, slots=True)
class Decided:
    """``valid`` (bool): rows that are versions. Rows from ``undecided`` on must not be used yet."""

    valid: np.ndarray
    undecided: int


def decide(rows: np.ndarray, behind: Iterable[np.ndarray] = ()) -> Decided:
    """For the rows (ROW_DTYPE) of one table, up to what is durable.

    ``behind``: the rows of the tables that follow it, oldest first; only looked at if a rollback is
    open at this one's end, and then as far as its end.
    """
    kind = np.ascontiguousarray(rows["kind"])
    valid = (kind >= Kind.WRITE) & (kind <= Kind.TRIM)
    refs = np.flatnonzero(kind == Kind.REF)
    controls = _controls(kind)
    last = int(controls[-1]) if len(controls) else -1
    open_refs = refs[refs > last]
    begun = last >= 0 and kind[last] == Kind.ROLLBACK_BEGIN
    undecided, after = len(rows), 0
    if begun or len(open_refs):
        after = _next_control(behind)
        if not after:
            undecided = last if begun else int(open_refs[0])
    if len(refs):
        following = np.append(kind[controls], np.uint8(after))
        # Behind a begin that comes instead of an end they are none either.
        valid[refs] = following[np.searchsorted(controls, refs)] == Kind.ROLLBACK_COMMIT
    return Decided(valid, undecided)


def _controls(kind: np.ndarray) -> np.ndarray:
    return np.flatnonzero((kind >= Kind.ROLLBACK_BEGIN) & (kind <= Kind.ROLLBACK_ABORT))


def _next_control(tables: Iterable[np.ndarray]) -> int:
    """The kind of the first control record of a rollback; 0 if there is none."""
    for rows in tables:
        kind = rows["kind"]
        controls = _controls(kind)
        if len(controls):
            return int(kind[controls[0]])
    return 0
