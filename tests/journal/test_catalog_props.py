"""The catalog against a dictionary, and against arbitrary damage."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from journal.catalog import Catalog
from journal.catalog_copies import COPIES, pack_entry, unpack_entry
from journal.catalog_state import (
    Bookmark,
    Gap,
    Hole,
    Pin,
    apply_op,
    check_op,
    decode_ops,
    encode_ops,
    problems,
    put,
)
from journal.errors import Corruption, JournalError
from tests.crash.sim_storage import SimStorage

DISK = b"d" * 16
COPY_BYTES = 4096

numbers = st.integers(0, (1 << 64) - 1)
small = st.integers(0, 5)
texts = st.text(max_size=8)
bookmarks = st.builds(
    Bookmark, st.sampled_from(["a", "b.c", "ü", ""]), numbers, numbers, numbers, texts, texts,
    st.dictionaries(st.sampled_from(["freeze", "providers"]), st.one_of(texts, st.none())),
)  # fmt: skip
pins = st.builds(
    Pin, st.sampled_from(["p", "q"]), numbers, texts, numbers, st.floats(0, 1e9)
)  # fmt: skip
gaps = st.builds(Gap, small, st.one_of(st.none(), st.integers(5, 9)), texts)
holes = st.builds(Hole, small, st.integers(5, 9))
ops = st.one_of(
    st.tuples(st.sampled_from(["applied", "window_start", "scanned"]), numbers),
    st.tuples(st.sampled_from(["applied", "bookmarks", "gaps", "unknown"]), st.none()),
    st.one_of(bookmarks, pins, gaps, holes).map(put),
    st.one_of(bookmarks, pins, gaps, holes).map(lambda item: (put(item)[0], None)),
    st.tuples(
        st.tuples(st.just("undo"), small.map(str)), st.one_of(st.none(), numbers)
    ),
    st.tuples(st.just("unknown"), st.recursive(
        st.one_of(st.booleans(), st.integers(), texts),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner)),
        max_leaves=5,
    )),
)  # fmt: skip


def apply_plainly(model: dict[str, Any], op: Any) -> None:
    """What an op means, in the fewest words."""
    path, value = op
    *above, last = (path,) if isinstance(path, str) else path
    if above and value is None and above[0] not in model:
        return
    holder = model.setdefault(above[0], {}) if above else model
    if value is None:
        holder.pop(last, None)
    else:
        holder[last] = copy.deepcopy(value)


class CatalogMachine(RuleBasedStateMachine):
    """Commits, reopenings, and one copy that is lost or damaged before an opening."""

    def __init__(self) -> None:
        super().__init__()
        self.storage = SimStorage(1)
        self.model: dict[str, Any] = {}
        self.known = self.open()

    def open(self) -> Catalog:
        return Catalog.open(self.storage, DISK, file_bytes_min=COPY_BYTES)

    def teardown(self) -> None:
        self.known.close()
        assert not self.storage.open_files

    @rule(changes=st.lists(ops, max_size=4))
    def commit(self, changes: list) -> None:
        self.known.commit(*changes)
        for change in changes:
            apply_plainly(self.model, change)

    @rule()
    def reopen(self) -> None:
        self.known.close()
        self.known = self.open()
        assert self.known.damage == ()

    @rule(which=st.sampled_from(COPIES), data=st.data())
    def damage(self, which: str, data: st.DataObject) -> None:
        """Whatever is done to one of them."""
        content = self.storage.live[which].live
        how = data.draw(st.sampled_from(["flip", "cut", "gone", "zeroes"]))
        at = data.draw(st.integers(0, len(content) - 1))
        if how == "gone":
            del self.storage.live[which]
        elif how == "cut":
            del content[at:]
        else:
            for place in range(at, min(len(content), at + data.draw(st.integers(1, 600)))):
                content[place] = 0 if how == "zeroes" else content[place] ^ 0x5A
        self.reopen()

    @invariant()
    def same(self) -> None:
        assert self.known.state() == self.model
        reader = Catalog.open(self.storage, DISK, read_only=True)
        assert reader.damage == ()
        assert reader.state() == self.model
        assert problems(self.model) == []


CatalogMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=15)
TestCatalogMachine = CatalogMachine.TestCase


@given(st.lists(ops, max_size=5))
def test_ops_survive_their_encoding(changes: list) -> None:
    for change in changes:
        check_op(change)
    again = decode_ops(encode_ops(changes))
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    for one, other in zip(changes, again, strict=True):
        apply_op(first, one)
        apply_op(second, other)
    assert first == second
    assert problems(first) == []


@given(st.binary(max_size=200), numbers, st.sampled_from([1, 2]), st.binary(max_size=60))
def test_an_entry_is_found_where_it_is_and_nowhere_else(
    before: bytes, number: int, kind: int, body: bytes
) -> None:
    value = {"x": body.hex()}
    data = pack_entry(DISK, number, kind, value)
    found = unpack_entry(before + data, len(before), disk=DISK, file="")
    assert found is not None
    assert found[0] == (number, kind, value)
    length = 56 + len(b'{"x":""}') + 2 * len(body)
    assert unpack_entry(data[: length - 1], 0, disk=DISK, file="") is None
    for at in range(0, length, 7):
        bad = bytearray(data)
        bad[at] ^= 1
        assert unpack_entry(bytes(bad), 0, disk=DISK, file="") is None
    with pytest.raises(Corruption, match="another disk"):
        unpack_entry(data, 0, disk=b"e" * 16, file="")


def images(storage: SimStorage) -> dict[str, bytearray]:
    return {name: storage.live[name].live for name in COPIES}


@given(st.data())
@settings(max_examples=150)
def test_whatever_is_done_to_both_an_opening_reports_it_or_finds_all(data: st.DataObject) -> None:
    """! Nothing is missing without a word, and nothing but the documented errors is raised."""
    storage = SimStorage(1)
    known = Catalog.open(storage, DISK, file_bytes_min=COPY_BYTES)
    for number in range(1, data.draw(st.integers(1, 6)) + 1):
        known.commit(("applied", number), (("verdicts", str(number)), {"n": number}))
    want = known.state()
    for name, content in images(storage).items():
        # Not the end alone: the last entry that is zeroed in both copies has never been.
        high = max(at for at in range(0, len(content), 512) if any(content[at : at + 512]))
        for _ in range(data.draw(st.integers(0, 3), label=name)):
            at = data.draw(st.integers(0, high + 56))
            for place in range(at, min(high + 60, at + data.draw(st.integers(1, 300)))):
                content[place] ^= data.draw(st.integers(1, 255)) if place == at else 0x11
    try:
        found = Catalog.open(storage, DISK, file_bytes_min=COPY_BYTES)
    except JournalError:
        return
    assert found.damage or found.state() == want
