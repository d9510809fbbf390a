"""What the catalog knows of a disk, as plain values and as typed ones; pure functions only.

The state is a JSON-able mapping. At its top are a few numbers and several *tables*, mappings from a
key to one item. Whatever grows with history is a table, never a list, so that a commit names just
the items it changes; and items are keyed by the seq (or stamp, or label) that they are about, so
that taking in the same control record twice changes nothing.

==============  ==================  ==============================================================
applied         number              highest seq whose effects are in the backing, synced
window_start    number              first seq of the window
reclaimed       number              highest seq of the redo segments given up for reclaim
voided          number              what the logs say of up to this seq is void: others wrote after
scanned         number              control records up to this seq are in here
clean           bool                the last curator ended by a clean stop
fingerprint     mapping             of the backing at that stop; absent while it runs
undo_highest    number              highest segment that was ever in ``undo``: none is used twice
undo            segment -> number   undo segments there are, with their published ends (bytes)
bookmarks       label -> Bookmark   named points
thinned         seq -> Thinned      points kept by thinning
pins            id -> Pin           open views, rollbacks' sources
gaps            seq -> Gap          writes were not captured from that seq on
sizes           seq -> number       bytes of the disk from that seq on
clock           stamp -> number     wall-clock time minus stamp (ns) from that stamp on
rollbacks       seq -> Rollback     by the seq of their begin
holes           seq -> number       first and last seq of records that never were, or were lost
crashes         seq -> Crash        by the seq of the crash record
damaged         id -> mapping       what was found damaged, as reported
verdicts        id -> mapping       what checks of points found
==============  ==================  ==============================================================

An *op* is ``(path, value)``: path names a number, a table, or a table and a key; None deletes. What
was read from a disk is validated (:func:`problems`), not trusted; unknown names at the top are kept
as they are, for they may be of a later version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

Where = str | tuple[str, ...]
Op = tuple[Where, Any]
State = dict[str, Any]

_U64: Final = 1 << 64


class Bookmark(NamedTuple):
    """A named point: the state after ``seq``. ``more``: providers, freeze time and the like."""

    label: str
    seq: int
    stamp: int
    record_seq: int
    requested: str
    consistency: str
    more: Mapping[str, Any] = {}


class Thinned(NamedTuple):
    """The state at the aligned instant ``until``, which is the one after ``seq``."""

    seq: int
    stamp: int
    until: int


class Pin(NamedTuple):
    """A point that must stay openable while somebody uses it. ``max_age_s`` 0: no limit."""

    id: str
    seq: int
    owner: str
    opened_ns: int
    max_age_s: float


class Gap(NamedTuple):
    """Writes were not captured from seq ``begin`` until ``end`` (None: still so)."""

    begin: int
    end: int | None
    reason: str


class Rollback(NamedTuple):
    """Records ``begin``..``end`` (None: not closed), valid if ``committed``."""

    begin: int
    end: int | None
    committed: bool


class Hole(NamedTuple):
    """Seqs ``first``..``last`` have no record: lost in a crash, or skipped by its recovery."""

    first: int
    last: int


class Crash(NamedTuple):
    """A tail was lost: kept up to ``kept``, of what was stamped in ``stamp_from``..``stamp_to``."""

    seq: int
    kept: int
    highest_seen: int
    stamp_from: int
    stamp_to: int


# -------------------------------------------------------------------------------- items <-> values
def put(item: Bookmark | Thinned | Pin | Gap | Rollback | Hole | Crash) -> Op:
    """The op that sets one item."""
    match item:
        case Bookmark(label, seq, stamp, record_seq, requested, consistency, more):
            value = {
                **more, "seq": seq, "stamp": stamp, "record_seq": record_seq,
                "requested": requested, "consistency": consistency,
            }  # fmt: skip
            return ("bookmarks", label), value
        case Thinned(seq, stamp, until):
            return ("thinned", str(seq)), {"stamp": stamp, "until": until}
        case Pin(name, seq, owner, opened_ns, max_age_s):
            value = {"seq": seq, "owner": owner, "opened_ns": opened_ns, "max_age_s": max_age_s}
            return ("pins", name), value
        case Gap(begin, end, reason):
            return ("gaps", str(begin)), {"end": end, "reason": reason}
        case Rollback(begin, end, committed):
            return ("rollbacks", str(begin)), {"end": end, "committed": committed}
        case Hole(first, last):
            return ("holes", str(first)), last
        case Crash(seq, kept, highest_seen, stamp_from, stamp_to):
            return ("crashes", str(seq)), [kept, highest_seen, stamp_from, stamp_to]


def drop(item: Bookmark | Thinned | Pin | Gap | Rollback | Hole | Crash) -> Op:
    """The op that removes one item."""
    return put(item)[0], None


def _number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _U64:
        raise ValueError(f"{value!r} is no number from 0 to 2**64 - 1")
    return value


def _signed(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -_U64 < value < _U64:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _optional(value: object) -> int | None:
    return None if value is None else _number(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise ValueError(f"{value!r} is no number of seconds")
    return value


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no mapping")
    return value


def _key(key: str) -> int:
    if not (key.isascii() and key.isdigit() and str(int(key)) == key):
        raise ValueError(f"key {key!r} is no number")
    return _number(int(key))


def _bookmark(label: str, value: object) -> Bookmark:
    own = dict(_mapping(value))
    return Bookmark(
        label, _number(own.pop("seq")), _number(own.pop("stamp")), _number(own.pop("record_seq")),
        _text(own.pop("requested")), _text(own.pop("consistency")), own,
    )  # fmt: skip


def _thinned(key: str, value: object) -> Thinned:
    own = _mapping(value)
    return Thinned(_key(key), _number(own["stamp"]), _number(own["until"]))


def _pin(key: str, value: object) -> Pin:
    own = _mapping(value)
    return Pin(
        key, _number(own["seq"]), _text(own["owner"]), _number(own["opened_ns"]),
        _seconds(own["max_age_s"]),
    )  # fmt: skip


def _range(begin: int, end: int | None) -> int | None:
    if end is not None and end < begin:
        raise ValueError(f"{end} lies before {begin}")
    return end


def _gap(key: str, value: object) -> Gap:
    own, begin = _mapping(value), _key(key)
    return Gap(begin, _range(begin, _optional(own["end"])), _text(own["reason"]))


def _rollback(key: str, value: object) -> Rollback:
    own, begin = _mapping(value), _key(key)
    end, committed = _range(begin, _optional(own["end"])), _flag(own["committed"])
    if committed and end is None:
        raise ValueError("a rollback that is committed has an end")
    return Rollback(begin, end, committed)


def _hole(key: str, value: object) -> Hole:
    first, last = _key(key), _number(value)
    _range(first, last)
    return Hole(first, last)


def _crash(key: str, value: object) -> Crash:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"{value!r} are not four numbers")
    return Crash(_key(key), *map(_number, value))


def _by_number(item: Callable[[object], Any]) -> Callable[[str, object], tuple[int, Any]]:
    return lambda key, value: (_key(key), item(value))


_TABLES: Final[Mapping[str, Callable[[str, object], Any]]] = {
    "undo": _by_number(_number),
    "bookmarks": _bookmark,
    "thinned": _thinned,
    "pins": _pin,
    "gaps": _gap,
    "sizes": _by_number(_number),
    "clock": _by_number(_signed),
    "rollbacks": _rollback,
    "holes": _hole,
    "crashes": _crash,
    "damaged": lambda key, value: (key, _mapping(value)),
    "verdicts": lambda key, value: (key, _mapping(value)),
}
_SINGLE: Final[Mapping[str, Callable[[object], Any]]] = {
    "applied": _number,
    "window_start": _number,
    "reclaimed": _number,
    "voided": _number,
    "scanned": _number,
    "undo_highest": _number,
    "clean": _flag,
    "fingerprint": _mapping,
}


# ------------------------------------------------------------------------------------------- state
def items(state: Mapping[str, Any], table: str) -> list[Any]:
    """A table's items, typed, in no particular order; ``state`` has been validated."""
    parse = _TABLES[table]
    return [parse(key, value) for key, value in state.get(table, {}).items()]


def check_op(op: Op) -> None:
    """
    :raises ValueError: it would make a state that :func:`problems` complains about.
    """
    path, value = op
    names = (path,) if isinstance(path, str) else path
    if not 1 <= len(names) <= 2 or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path!r} names neither an item nor a table")
    if value is None:
        if len(names) == 2 and names[0] in _SINGLE:
            raise ValueError(f"{names[0]} is no table")
        return
    try:
        if names[0] in _SINGLE:
            if len(names) == 2:
                raise ValueError(f"{names[0]} is no table")
            _SINGLE[names[0]](value)
        elif names[0] in _TABLES:
            table = {names[1]: value} if len(names) == 2 else _mapping(value)
            for key, item in table.items():
                _TABLES[names[0]](key, item)
    except KeyError as error:
        raise ValueError(f"{'/'.join(names)} lacks {error}") from error


def apply_op(state: State, op: Op) -> None:
    """Change the state by one op.

    :raises ValueError: the path leads through something that is no table.
    """
    path, value = op
    names = (path,) if isinstance(path, str) else path
    holder = state
    if len(names) == 2:
        if value is None and names[0] not in state:
            return
        holder = _mapping(state.setdefault(names[0], {}))
    if value is None:
        holder.pop(names[-1], None)
    else:
        holder[names[-1]] = value


def decode_ops(value: object) -> list[Op]:
    """Ops as read from JSON.

    :raises ValueError: they are none, or not ones that may be.
    """
    if not isinstance(value, list):
        raise ValueError("no list of changes")
    ops: list[Op] = []
    for entry in value:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], list):
            raise ValueError(f"{entry!r} is no change")
        op = (tuple(entry[0]), entry[1])
        check_op(op)
        ops.append(op)
    return ops


def encode_ops(ops: Iterable[Op]) -> list[list[Any]]:
    """Ops as JSON has them."""
    return [[[path] if isinstance(path, str) else list(path), value] for path, value in ops]


def problems(state: object) -> list[str]:
    """What is wrong with a state that was read from a disk; empty: nothing."""
    if not isinstance(state, dict):
        return ["it is no mapping"]
    found = []
    for name, value in state.items():
        try:
            if value is None:
                raise ValueError("it is null")
            check_op((name, value))
        except ValueError as error:
            found.append(f"{name}: {error}")
    return found
