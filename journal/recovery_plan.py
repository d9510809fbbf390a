"""What recovery decides about the redo log it found: pure functions on a `Survey`.

RECOVERY.md holds the two decision tables and why each case is right; `STRETCH_CASES` and
`FILE_CASES` are the same tables, and a test walks through all combinations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final, Literal

import numpy as np

from journal.errors import Corruption
from journal.format import HEADER_PAGE, Log
from journal.segment import DIRECTORY, SegmentInfo
from journal.survey import FileFacts, Loaded, Survey

_REDO: Final = DIRECTORY[Log.REDO]
Unknown = Literal["*"]
Case = tuple[str, tuple[bool | Unknown, ...], str]

# name, (known, linked, whole, cut), decision
STRETCH_CASES: Final[tuple[Case, ...]] = (
    ("@KNOWN", (True, True, "*", "*"), "keep"),
    ("@DAMAGE", (True, False, "*", "*"), "keep and report"),
    ("@TAIL", (False, True, True, False), "copy"),
    ("@PAYLOAD", (False, True, False, False), "cut"),
    ("@BREAK", (False, False, "*", False), "cut"),
    ("@VOID", (False, "*", "*", True), "void"),
)

# name, (temporary, readable, device_error, needed, void, empty), decision
FILE_CASES: Final[tuple[Case, ...]] = (
    ("@TEMPORARY", (True, "*", "*", "*", "*", "*"), "remove"),
    ("@EMPTY", (False, True, "*", "*", "*", True), "remove"),
    ("@REPLACED", (False, True, "*", "*", True, False), "remove"),
    ("@SEGMENT", (False, True, "*", "*", False, False), "keep"),
    ("@UNREADABLE", (False, False, True, "*", "*", "*"), "keep and report"),
    ("@DAMAGED", (False, False, False, True, "*", "*"), "keep and report"),
    ("@TORN", (False, False, False, False, "*", "*"), "remove"),
)


def _match(cases: tuple[Case, ...], inputs: tuple[bool, ...]) -> tuple[str, str]:
    found = [
        (name, decision)
        for name, pattern, decision in cases
        if all(want in ("*", got) for want, got in zip(pattern, inputs, strict=True))
    ]
    assert len(found) == 1, f"{inputs} matches {found}"
    return found[0]


def classify_stretch(*, known: bool, linked: bool, whole: bool, cut: bool) -> tuple[str, str]:
    """Case and decision for a stretch of records: see RECOVERY.md."""
    return _match(STRETCH_CASES, (known, linked, whole, cut))


def classify_file(facts: FileFacts, *, void: bool) -> tuple[str, str]:
    """Case and decision for a file; ``void``: above the cut that the new segment makes."""
    return _match(
        FILE_CASES,
        (
            facts.temporary, facts.readable, facts.device_error, facts.needed,
            facts.void or void, facts.empty,
        ),
    )  # fmt: skip


# ----------------------------------------------------------------------------------- decisions
@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What `apply` will do.

    ``end``: the last record kept; ``cut``: the last one that stays where it is, those behind it are
    copied first. ``highest``: all seqs up to here are used up. ``remove``: files that go, once the
    new segment is durable. ``clean``: nothing can have been lost.
    """

    durable: int
    cut: int
    copy_from: int
    end: int
    highest: int
    clean: bool
    predecessor: int
    predecessor_chain: int
    number: int
    temporary: tuple[str, ...]
    remove: tuple[str, ...]
    corruptions: tuple[Corruption, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Stretch:
    """Records in a row; or (``linked`` is false) a place where the chain breaks, and the records
    that are lacking there, if any: those ``first``..``last``, none when that is an empty range.
    """

    item: Loaded
    first: int
    last: int
    linked: bool
    offset: int = 0


def _stretches(loaded: tuple[Loaded, ...], durable: int, whole_upto: int) -> list[_Stretch]:
    """The records read, in order, divided where one of the inputs of the table may change."""
    found: list[_Stretch] = []
    before: Loaded | None = None
    for item in loaded:
        first = item.table.first_seq
        if not _follows(item.info, before, durable):
            found.append(_Stretch(item, first, first - 1, False, HEADER_PAGE))
        for at in item.breaks:
            found += _divided(item, first, at.last_seq, (durable, whole_upto))
            first = min(at.next_seq, item.table.last_seq + 1)
            if at.last_seq < durable < first - 1:
                found.append(_Stretch(item, at.last_seq + 1, durable, False, at.offset))
                found.append(_Stretch(item, durable + 1, first - 1, False, at.offset))
            else:
                found.append(_Stretch(item, at.last_seq + 1, first - 1, False, at.offset))
        found += _divided(item, first, item.table.last_seq, (durable, whole_upto))
        before = item
    return found


def _divided(item: Loaded, first: int, last: int, edges: tuple[int, ...]) -> Iterator[_Stretch]:
    for edge in sorted({min(last, edge) for edge in (*edges, last)}):
        if edge >= first:
            yield _Stretch(item, first, edge, True)
            first = edge + 1


def _follows(info: SegmentInfo, before: Loaded | None, durable: int) -> bool:
    """Whether a segment goes on where the chain of the one before it ended."""
    header = info.header
    if header.cut <= durable:
        return True  # what comes before is known to be there, or its lack is reported elsewhere
    return (
        before is not None
        and before.info.segment == header.predecessor
        and before.chain == header.predecessor_chain
        and before.table.last_seq == header.cut
    )


def classify(found: Survey) -> Plan:
    """What to do about what was found: nothing is read or written here."""
    durable = found.durable
    corruptions = list(found.corruptions)
    # Behind the last record that was not read there may be a hole: it must stay void. (If more is
    # lacking before the first segment than is known to be durable, that is not kept either.)
    end = min(found.loaded[0].info.header.cut, durable) if found.loaded else durable
    cut, copy_from, stopped = end, 0, False
    for stretch in _stretches(found.loaded, durable, found.whole_upto):
        _, decision = classify_stretch(
            known=stretch.first <= durable,
            linked=stretch.linked,
            whole=stretch.last <= found.whole_upto,
            cut=stopped,
        )
        if decision == "keep and report":
            corruptions.append(_damage(stretch))
        if decision in ("cut", "void"):
            stopped = True
            continue
        if decision == "copy":
            copy_from = copy_from or stretch.first
        else:
            cut = max(cut, stretch.last)
        end = max(end, stretch.last)
    missing = _missing_ends(found)
    corruptions += missing
    # ! What was durable and is not there is lost for ever, and no hole: not cut, or only this
    # recovery would know. (Where D itself is a number in a hole, nothing is missing.)
    ends = [each.last_seq for each in missing] + [each.last_seq for each in found.files]
    lost_end = max(ends, default=0)
    end, cut = max(end, lost_end), max(cut, lost_end)
    remove, reports = _sort_files(found, cut if copy_from else end)
    predecessor, predecessor_chain = _predecessor(found, cut, remove)
    return Plan(
        durable=durable,
        cut=cut,
        copy_from=copy_from,
        end=end,
        highest=max(found.highest, end),
        clean=found.sealed and not copy_from and _last_found(found) >= durable,
        predecessor=predecessor,
        predecessor_chain=predecessor_chain,
        number=found.number + 1,
        temporary=tuple(facts.name for facts in found.files if facts.temporary),
        remove=tuple(remove),
        corruptions=(*corruptions, *reports),
    )


def _damage(stretch: _Stretch) -> Corruption:
    """A break at or below D. No records are lacking if it was an empty batch."""
    some = stretch.first <= stretch.last
    return Corruption(
        "damaged batches",
        file=stretch.item.info.name,
        offset=stretch.offset,
        first_seq=stretch.first if some else 0,
        last_seq=stretch.last if some else 0,
    )


def _last_found(found: Survey) -> int:
    """The last seq that is accounted for: by a record, or as a hole before a segment."""
    ends = [info.header.highest for info in found.infos]
    ends += [info.first_seq - 1 for info in found.infos]
    ends += [info.trailer.last_seq for info in found.infos if info.trailer is not None]
    ends += [item.table.last_seq for item in found.loaded]
    return max(ends, default=0)


def _missing_ends(found: Survey) -> list[Corruption]:
    """Records at or below D that should be at the end of a segment."""
    reported = {error.last_seq for error in found.corruptions}
    reported |= {facts.last_seq for facts in found.files}
    missing = []
    for item in found.loaded:
        expected = min(item.info.bound, found.durable)
        if item.table.last_seq < expected and expected not in reported:
            missing.append(
                Corruption(
                    "records are missing",
                    file=item.info.name,
                    offset=item.end,
                    first_seq=item.table.last_seq + 1,
                    last_seq=expected,
                )
            )
    if not found.infos and found.durable > found.reclaimed:
        missing.append(
            Corruption(
                "no segments", file=_REDO, first_seq=found.reclaimed + 1, last_seq=found.durable
            )
        )
    return missing


def _sort_files(found: Survey, cut: int) -> tuple[list[str], list[Corruption]]:
    """Which files go when ``cut`` is the new segment's, and which are damaged."""
    first = {info.name: info.first_seq for info in found.infos}
    remove, reports = [], []
    for facts in found.files:
        _, decision = classify_file(facts, void=first.get(facts.name, 0) > cut)
        if decision == "remove" and not facts.temporary:
            remove.append(facts.name)
        elif decision == "keep and report":
            what, seqs = "damaged segment header", (facts.first_seq, facts.last_seq)
            reports.append(Corruption(what, file=facts.name, first_seq=seqs[0], last_seq=seqs[1]))
    return remove, reports


def _predecessor(found: Survey, cut: int, remove: list[str]) -> tuple[int, int]:
    """The segment that holds the newest record up to ``cut``, and the chain there."""
    for info in reversed(found.infos):
        if info.name in remove:
            continue
        for item in found.loaded:
            if item.info is info:
                batches = item.table.batches
                number = int(np.searchsorted(batches["first_seq"], cut, "right")) - 1
                return info.segment, int(batches["chain"][number]) if number >= 0 else info.chain
        return info.segment, info.trailer.chain if info.trailer is not None else 0
    return 0, 0
