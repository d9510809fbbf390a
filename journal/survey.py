"""What lies in the redo log's directory: the first, reading step of recovery. Nothing is decided
here.

Only headers and trailers of all segments are read, and the tables of those that hold records above
``applied`` or above what is known to be durable. Of records above that, payloads are verified too.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from journal.errors import Corruption, Unreadable
from journal.format import (
    BATCH_HEADER,
    HEADER_PAGE,
    BatchHeader,
    Log,
    batch_is_whole,
    segment_seed,
    unpack_batch_header,
)
from journal.segment import (
    DIRECTORY,
    ENDLESS,
    TEMPORARY,
    Break,
    Scanner,
    SegmentInfo,
    SegmentLister,
    Table,
    candidates,
    load_footer,
    open_segment,
    read_leniently,
    segment_name,
    verify_rows,
)
from journal.storage import File, Storage

_REDO: Final = DIRECTORY[Log.REDO]


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A segment whose table was read, up to its bound; LOST rows stand for what ``breaks`` lack.

    ``end`` is where its batches end, ``chain`` the last one's checksum.
    """

    info: SegmentInfo
    table: Table
    breaks: tuple[Break, ...]
    end: int
    chain: int


@dataclasses.dataclass(frozen=True, slots=True)
class FileFacts:
    """What is to be known of one name in the directory, to decide whether it stays.

    ``needed``: records at or below D are lacking where its number stands among the others: those
    ``first_seq``..``last_seq``.
    ``void``: its records, if any, are above the cut of a newer segment. ``empty``: it is known to
    hold no record. ``device_error``: it could not even be read.
    """

    name: str
    temporary: bool = False
    readable: bool = True
    device_error: bool = False
    needed: bool = False
    void: bool = False
    empty: bool = False
    first_seq: int = 0
    last_seq: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Survey:
    """Everything that recovery decides on.

    ``durable`` is D, the highest seq known to have been durable; ``applied`` at most D;
    ``reclaimed``: records up to there were given up, nobody misses them.
    ``highest``: the highest seq that any file holds or held. ``whole_upto``: payloads above D are
    what was written up to here. ``number``: the highest segment number in use. ``sealed``: the
    newest segment was sealed by a clean end.
    """

    infos: tuple[SegmentInfo, ...]
    loaded: tuple[Loaded, ...]
    files: tuple[FileFacts, ...]
    durable: int
    applied: int
    reclaimed: int
    window_start: int
    highest: int
    whole_upto: int
    number: int
    stamp: int
    sealed: bool
    corruptions: tuple[Corruption, ...]

    @property
    def floor(self) -> int:
        """Seq of the first record that any segment may hold."""
        return self.infos[0].first_seq if self.infos else self.highest + 1


def is_copy(info: SegmentInfo) -> bool:
    """Whether the segment was written by a recovery that has not come to its end in it."""
    return info.header.highest >= info.first_seq


@dataclasses.dataclass(slots=True)
class _Surveyor:
    """The marks as they rise while segments are read."""

    storage: Storage
    durable: int
    applied: int
    reclaimed: int
    window_start: int = 0
    stamp: int = 0
    highest: int = 0
    loaded: dict[int, Loaded] = dataclasses.field(default_factory=dict)

    def take_header(self, info: SegmentInfo) -> None:
        header = info.header
        self.durable = max(self.durable, header.durable)
        self.highest = max(self.highest, header.highest, header.first_seq - 1)
        self.stamp = max(self.stamp, header.stamp)
        if info.trailer is not None:  # written only after a sync of all before it had succeeded
            self.durable = max(self.durable, min(info.trailer.last_seq, info.bound))
            self.highest = max(self.highest, info.trailer.last_seq)

    def take_claims(self, name: str, disk: bytes) -> None:
        """What batches say behind a header that cannot be read.

        Without it their checksums mean nothing. But a segment whose header never became durable
        holds none that knows of a durable record in the same segment; so one that is linked to the
        first of its segment, and does, says that this was no torn beginning.
        """
        number = _number(name.rpartition("/")[2])
        file = open_segment(self.storage, name)
        try:
            first = last = chain = None
            for offset in candidates(file, HEADER_PAGE, file.size()):
                head = unpack_batch_header(read_leniently(file, offset, BATCH_HEADER.size))
                if head is None or (head.disk, head.segment, head.offset) != (disk, number, offset):
                    continue
                if last is None or (head.previous, head.first_seq) != (chain, last + 1):
                    first = head.first_seq
                chain, last = head.chain, head.first_seq + head.count - 1
                said = max(head.durable, head.barrier)
                if first is not None and first <= said < head.first_seq:
                    self.durable = max(self.durable, said)
                    self.highest = max(self.highest, last)
        finally:
            file.close()

    def scan(self, info: SegmentInfo) -> None:
        """All batches of a segment, also behind breaks: that proves nothing, but it names seqs."""
        file = open_segment(self.storage, info.name)
        try:
            scanner = Scanner(file, info)
            table = scanner.advance(ENDLESS, known=ENDLESS)
        finally:
            file.close()
        self.highest = max(self.highest, table.last_seq)
        self.stamp = max(self.stamp, scanner.stamp)
        # What a header says was true when it was written, whatever became of the batches before it;
        # only a void batch speaks of seqs that have got another meaning since.
        self.durable = max(self.durable, min(max(scanner.durable, scanner.barrier), info.bound))
        self.applied = max(self.applied, min(scanner.applied, info.bound))
        self.window_start = max(self.window_start, scanner.window_start)
        breaks = tuple(b for b in scanner.breaks if b.last_seq < info.bound)
        self.loaded[info.segment] = Loaded(
            info, table.upto(info.bound), breaks, scanner.offset, scanner.chain
        )

    def read_footer(self, info: SegmentInfo) -> None:
        """A sealed segment's table, and what its last batch knew."""
        assert info.trailer is not None
        file = open_segment(self.storage, info.name)
        try:
            table = load_footer(file, info).table
            last = _last_header(file, info, table)
        except Corruption:
            # A crash while it was sealed leaves this, too: the batches were synced before, and say
            # the same. If it is damage, scrub finds it.
            self.scan(info)
            return
        finally:
            file.close()
        if last is not None:
            self.stamp = max(self.stamp, last.stamp)
            self.applied = max(self.applied, min(last.applied, info.bound))
            self.window_start = max(self.window_start, last.window_start)
        trailer = info.trailer
        self.loaded[info.segment] = Loaded(
            info, table.upto(info.bound), (), trailer.footer_offset, trailer.chain
        )


def _last_header(file: File, info: SegmentInfo, table: Table) -> BatchHeader | None:
    """None as well when it is damaged: the footer says the rest, and `applied` may be too low.

    ! Not when it is too high: what lies between would be missing from the disk.
    """
    if not len(table.batches):
        return None
    offset = int(table.batches["offset"][-1])
    header = unpack_batch_header(read_leniently(file, offset, BATCH_HEADER.size))
    if header is None or header.chain != int(table.batches["chain"][-1]):
        return None
    whole = batch_is_whole(
        header, read_leniently(file, offset, header.table_bytes), segment_seed(info.header)
    )
    return header if whole else None


def survey(
    storage: Storage,
    disk: bytes,
    *,
    durable_hint: int = 0,
    applied_hint: int = 0,
    segment_hint: int = 0,
    reclaimed_hint: int | None = None,
) -> Survey:
    """Read what there is. The hints are what others know: the highest seq known durable,
    ``applied``, the highest segment number ever used, up to where records were given up (None: not
    known).

    :raises UnknownVersion: something was written by a newer program.
    """
    lister = SegmentLister(storage, Log.REDO, disk)
    infos = lister.refresh()
    marks = _Surveyor(
        storage, max(durable_hint, applied_hint, reclaimed_hint or 0), applied_hint,
        reclaimed_hint or 0,
    )  # fmt: skip
    for info in infos:
        marks.take_header(info)
    for name in lister.damaged:
        marks.take_claims(name, disk)
    live = [info for info in infos if info.first_seq <= info.bound]
    for info in reversed(live):
        if not info.sealed and info.bound > marks.durable:
            marks.scan(info)
    for info in reversed(live):  # the newest table also tells `applied`, where headers have it
        done = marks.loaded and marks.applied >= min(info.bound, _last_seq(info))
        if info.segment not in marks.loaded and not done:
            if info.sealed:
                marks.read_footer(info)
            else:
                marks.scan(info)
    marks.durable = max(marks.durable, marks.applied)
    marks.highest = max(marks.highest, marks.durable)
    loaded = tuple(marks.loaded[number] for number in sorted(marks.loaded))
    names = storage.list(_REDO)
    numbers = [_number(name) for name in names]
    return Survey(
        infos=tuple(infos),
        loaded=loaded,
        files=_facts(names, infos, live, lister.damaged, marks),
        durable=marks.durable,
        applied=marks.applied,
        reclaimed=marks.reclaimed,
        window_start=marks.window_start,
        highest=marks.highest,
        whole_upto=_whole_upto(storage, loaded, marks.durable),
        number=max([segment_hint, *numbers], default=0),
        stamp=marks.stamp,
        sealed=not infos or (infos[-1].sealed and not is_copy(infos[-1])),
        corruptions=_missing_files(
            live, lister.damaged, marks, reclaimed_known=reclaimed_hint is not None
        ),
    )


def _last_seq(info: SegmentInfo) -> int:
    return info.trailer.last_seq if info.trailer is not None else ENDLESS


def _whole_upto(storage: Storage, loaded: tuple[Loaded, ...], durable: int) -> int:
    """The seq up to which all payloads above ``durable`` carry their checksums."""
    last = durable
    for item in loaded:
        if item.table.last_seq <= durable:
            continue
        table = item.table.above(durable)
        file = open_segment(storage, item.info.name)
        try:
            whole = verify_rows(file, table)
        finally:
            file.close()
        if whole < len(table.rows):
            return max(last, table.first_seq + whole - 1)
        last = table.last_seq
    return last


def _facts(
    names: list[str],
    infos: list[SegmentInfo],
    live: list[SegmentInfo],
    damaged: dict[str, Corruption],
    marks: _Surveyor,
) -> tuple[FileFacts, ...]:
    known = {info.name: info for info in infos}
    facts = []
    for base in names:
        name = f"{_REDO}/{base}"
        if base.endswith(TEMPORARY):
            facts.append(FileFacts(name, temporary=True))
        elif name in damaged:
            first, last = _place(name, live, marks)
            last = min(last, marks.durable)
            needed = first <= last
            facts.append(
                FileFacts(
                    name, readable=False, device_error=isinstance(damaged[name], Unreadable),
                    needed=needed, first_seq=first if needed else 0, last_seq=last if needed else 0,
                )
            )  # fmt: skip
        elif name in known:
            info = known[name]
            end = _end(info, marks.loaded)
            empty = end is not None and end < info.first_seq
            facts.append(FileFacts(name, void=info.first_seq > info.bound, empty=empty))
    return tuple(facts)


def _end(info: SegmentInfo, loaded: dict[int, Loaded]) -> int | None:
    """The last seq that is in a segment, or None when it was not read."""
    if info.trailer is not None:
        return info.trailer.last_seq
    item = loaded.get(info.segment)
    return item.table.last_seq if item is not None else None


def _number(base: str) -> int:
    """The segment number in a name, 0 if it has none."""
    digits = base.partition(".")[0]
    return int(digits) if digits.isdecimal() else 0


def _place(name: str, infos: list[SegmentInfo], marks: _Surveyor) -> tuple[int, int]:
    """The seqs that a file without a readable header should hold, by what stands around it.

    An empty range (first > last) where it should hold none.
    """
    number = _number(name.rpartition("/")[2])
    older = [info for info in infos if info.segment < number]
    newer = [info for info in infos if info.segment > number]
    last = newer[0].header.cut if newer else ENDLESS
    named = bool(newer) and newer[0].header.predecessor == number
    if not older:  # it may be what is left of the oldest, or all that is left
        return (marks.reclaimed + 1, last) if named or not newer else (1, 0)
    end = _end(older[-1], marks.loaded)
    if end is None:  # all of that is known to be durable and applied: only the names tell
        return (last, last) if named else (1, 0)
    return end + 1, last


def _missing_files(
    live: list[SegmentInfo],
    damaged: dict[str, Corruption],
    marks: _Surveyor,
    *,
    reclaimed_known: bool,
) -> tuple[Corruption, ...]:
    """Segments with durable records that newer ones name and that are not there.

    Of the oldest segment's predecessor only what was not given up.
    """
    found = []
    present = {info.segment for info in live}
    for info in live if reclaimed_known else live[1:]:
        number = info.header.predecessor
        name = segment_name(Log.REDO, number)
        if number and number not in present and name not in damaged:
            first, last = _place(name, live, marks)
            if first <= min(last, marks.durable):
                found.append(
                    Corruption(
                        "segment is missing",
                        file=name,
                        first_seq=first,
                        last_seq=min(last, marks.durable),
                    )
                )
    return tuple(found)
