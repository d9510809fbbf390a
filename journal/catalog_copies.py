"""The catalog's two files as bytes and as what they tell together; reading only.

`catalog` explains the words, the layout of an entry, and why what is found here is the truth.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from journal.catalog_state import State, apply_op, decode_ops, problems
from journal.errors import Corruption, UnknownVersion
from journal.format import U64, checksum
from journal.limits import CATALOG_ALIGN, CATALOG_ENTRY_BYTES_MAX
from journal.storage import File, Storage

VERSION: Final = 1
COPIES: Final = ("catalog.0", "catalog.1")
CHANGES, STATE = 1, 2  # kinds of entries
_MAGIC: Final = b"CDPCATLG"
_HEAD: Final = struct.Struct("<8sII16sQII")
assert _HEAD.size == 48
_BODY_AT: Final = _HEAD.size + 8
_ATTEMPTS: Final = 5


class Entry(NamedTuple):
    """One entry as read: ``body`` is the decoded JSON, not validated yet."""

    number: int
    kind: int
    body: Any


def pack_entry(disk: bytes, number: int, kind: int, value: Any) -> bytes:
    """An entry's bytes, padded to CATALOG_ALIGN."""
    body = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    assert len(body) <= CATALOG_ENTRY_BYTES_MAX, "a commit is small, and so is the state"
    head = _HEAD.pack(_MAGIC, VERSION, len(body), disk, number, kind, 0)
    data = head + U64.pack(checksum(head + body)) + body
    return data.ljust(-(-len(data) // CATALOG_ALIGN) * CATALOG_ALIGN, b"\0")


def unpack_entry(data: bytes, at: int, *, disk: bytes, file: str) -> tuple[Entry, int] | None:
    """The entry at ``at`` and where the next one begins; None when there is no whole one.

    :raises Corruption: it is of another disk.
    :raises UnknownVersion: written by a newer format.
    """
    if data[at : at + 8] != _MAGIC or len(data) - at < _BODY_AT:
        return None
    _, version, length, owner, number, kind, _ = _HEAD.unpack_from(data, at)
    body = data[at + _BODY_AT : at + _BODY_AT + length]
    (own,) = U64.unpack_from(data, at + _HEAD.size)
    if own != checksum(data[at : at + _HEAD.size] + body):
        return None
    if owner != disk:
        raise Corruption("catalog of another disk", file=file, offset=at)
    if version > VERSION:
        raise UnknownVersion(file, version, VERSION)
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return Entry(number, kind, value), -(-(at + _BODY_AT + length) // CATALOG_ALIGN) * CATALOG_ALIGN


class _Found:
    """What was found in one copy's file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.exists = False
        self.states: list[Entry] = []
        self.changes: dict[int, Entry] = {}
        self.rubbish: list[int] = []  # offsets of what is neither an entry nor zero
        self.torn = False  # the last thing in it is rubbish
        self.begun = False  # and begins as an entry does

    @property
    def whole(self) -> bool:
        """Whether there is any whole entry in it."""
        return bool(self.states or self.changes)

    @property
    def highest(self) -> int:
        """Number of the last commit in it; 0 when there is none."""
        return max([*self.changes, *(state.number for state in self.states)], default=0)


def read_all(file: File) -> bytes:
    """The file's bytes; what cannot be read becomes rubbish, which is never taken for an end."""
    size = file.size()
    try:
        return file.read(0, size)
    except OSError:
        pass
    parts = []
    for at in range(0, size, CATALOG_ALIGN):
        length = min(CATALOG_ALIGN, size - at)
        try:
            parts.append(file.read(at, length).ljust(length, b"\xff"))
        except OSError:
            parts.append(b"\xff" * length)
    return b"".join(parts)


def _read_copy(storage: Storage, name: str, disk: bytes) -> _Found:
    copy = _Found(name)
    try:
        file = storage.open(name, "read")
    except FileNotFoundError:
        return copy
    copy.exists = True
    try:
        data = read_all(file)
    finally:
        file.close()
    for at, entry in _entries(data, disk, name):
        copy.torn = entry is None
        copy.begun = entry is None and data[at : at + 8] == _MAGIC
        if entry is None:
            copy.rubbish.append(at)
        elif entry.kind == STATE:
            copy.states.append(entry)
        else:
            copy.changes[entry.number] = entry
    return copy


_ROOM: Final = bytes(8 * CATALOG_ALIGN)


def _entries(data: bytes, disk: bytes, name: str) -> Iterator[tuple[int, Entry | None]]:
    """Every whole entry with its place; None once for each stretch that is neither that nor zero.

    Behind damage the next whole entry is looked for: these files are never overwritten, so whatever
    carries the right checksum was a commit.
    """
    at, rubbish = 0, False
    end = len(data)
    while data[end - len(_ROOM) : end] == _ROOM:  # most of a file is room for more
        end -= len(_ROOM)
    while at < end:
        found = unpack_entry(data, at, disk=disk, file=name)
        if found is not None:
            yield at, found[0]
            at, rubbish = found[1], False
            continue
        if any(data[at : at + CATALOG_ALIGN]) and not rubbish:
            rubbish = True
            yield at, None
        at += CATALOG_ALIGN


class Loaded(NamedTuple):
    """What both copies together tell; the fields are those of `catalog.Catalog`."""

    state: State
    number: int
    damage: list[Corruption]
    notes: list[str]
    found: bool


def load(storage: Storage, disk: bytes) -> Loaded:
    """The state that both copies together tell. Reads copy 1 first, see above."""
    second = _read_copy(storage, COPIES[1], disk)
    first = _read_copy(storage, COPIES[0], disk)
    damage: list[Corruption] = []
    state, base = _newest_state((first, second), damage)
    missing = _replay(state, base, first.changes | second.changes, damage)
    highest = max(first.highest, second.highest)
    found = first.exists or second.exists
    both = " and ".join(COPIES)
    if found and base < 0:
        damage.append(Corruption("no whole state", file=both))
    if missing:
        damage.append(Corruption(f"commits {', '.join(missing)} are lost", file=both))
    if _end_is_lost(first, second):
        what = f"what followed commit {highest} is lost"
        damage.append(Corruption(what, file=both, offset=(second.rubbish or first.rubbish)[-1]))
    return Loaded(state, highest, damage, _notes(first, second), found)


def load_beside_a_writer(storage: Storage, disk: bytes) -> Loaded:
    """The same, again if a commit was under way in the one copy and then the next in the other."""
    loaded = load(storage, disk)
    for _ in range(_ATTEMPTS):
        if not loaded.damage:
            break
        loaded = load(storage, disk)
    return loaded


def first_difference(
    storage: Storage, name: str, disk: bytes, *, number: int, end: int, size: int
) -> int | None:
    """Where a copy is not what its only writer made of it: a state, all commits after it up to
    ``number``, which end at ``end``, and zeroes up to ``size``. None: it is.
    """
    try:
        file = storage.open(name, "read")
    except FileNotFoundError:
        return 0
    try:
        data = read_all(file)
    finally:
        file.close()
    if len(data) != size:
        return min(len(data), size)
    at, before = 0, -1
    while at < end:
        try:
            found = unpack_entry(data, at, disk=disk, file=name)
        except (Corruption, UnknownVersion):
            return at
        if found is None or (found[0].kind == STATE) != (at == 0):
            return at
        if before >= 0 and found[0].number != before + 1:
            return at
        padding = data[at + _BODY_AT + _body_bytes(data, at) : found[1]]
        if any(padding):
            return at
        before, at = found[0].number, found[1]
    if at != end or before != number:
        return at
    rest = data[end:].rstrip(b"\0")
    return end if rest else None


def _body_bytes(data: bytes, at: int) -> int:
    return int(_HEAD.unpack_from(data, at)[2])


def _end_is_lost(first: _Found, second: _Found) -> bool:
    """Whether there was a newer commit than any that is whole. A crash tears one copy's end only.

    Copy 1 is written to when copy 0 has the same, synced: if copy 1's end is torn, copy 0 goes
    further; if copy 0's is, copy 1 goes as far and ends well. (A flipped bit where nothing has been
    written yet is no commit's beginning.)
    """
    if second.torn and not first.torn:
        return second.begun and second.whole and first.highest <= second.highest
    if second.torn:
        return True
    return first.torn and not second.whole


def _newest_state(copies: tuple[_Found, _Found], damage: list[Corruption]) -> tuple[State, int]:
    """The newest state that is valid, and its number; -1 when there is none."""
    state: State = {}
    base = -1
    for copy in copies:
        for entry in copy.states:
            complaints = problems(entry.body)
            if complaints:
                damage.append(Corruption(f"invalid state ({complaints[0]})", file=copy.name))
            elif entry.number > base:
                state, base = entry.body, entry.number
    return state, base


def _replay(
    state: State, base: int, changes: dict[int, Entry], damage: list[Corruption]
) -> list[str]:
    """Apply the commits after ``base``, in order; returns which are missing in between."""
    missing = []
    last = base
    for number in sorted(number for number in changes if number > base):
        if number != last + 1 and last >= 0:
            missing.append(f"{last + 1}..{number - 1}")
        last = number
        try:
            for op in decode_ops(changes[number].body):
                apply_op(state, op)
        except ValueError as error:
            damage.append(Corruption(f"invalid commit {number} ({error})", file=COPIES[0]))
    return missing


def _notes(first: _Found, second: _Found) -> list[str]:
    """One line for each copy that needs the other."""
    notes = []
    for copy, other in ((first, second), (second, first)):
        if not copy.exists and other.exists:
            notes.append(f"{copy.name} was missing")
        elif copy.rubbish:
            notes.append(f"{copy.name} has no whole entry at byte {copy.rubbish[0]}")
    return notes
