"""Recovery of the undo log: what may not be durable is copied before anything rests on it.

`undo` says what the words mean and why this is enough. A recovery writes at most one new segment,
under a temporary name until it is whole and synced, and changes no other file, so it may be
interrupted anywhere and done again. What it reads is judged here and never asserted: damage below
what was published is reported, not cut; a torn end above it is what a crash leaves.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Mapping
from itertools import chain as chained
from typing import Final, NamedTuple

from journal.errors import Corruption, JournalError, JournalFull
from journal.format import (
    BATCH_HEADER,
    ENTRY,
    HEADER_PAGE,
    U64,
    BatchHeader,
    Log,
    SegmentHeader,
    batch_is_whole,
    payload_bytes,
    payload_sums,
    segment_seed,
    unpack_batch_header,
)
from journal.frontier import pack_position, unpack_position
from journal.segment import (
    DIRECTORY,
    TEMPORARY,
    Scanner,
    SegmentInfo,
    SegmentLister,
    open_segment,
    segment_name,
)
from journal.storage import File, Storage
from journal.undo import UndoFailed, UndoSegment, scan_to

_UNDO: Final = DIRECTORY[Log.UNDO]
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass(frozen=True, slots=True)
class RecoveredUndo:
    """What a recovery found and did.

    Before ``published`` is shown, ``ends`` must be on the list, durably. ``lost``: listed segments
    that are gone or unreadable. ``void``: files that are not on the list; nothing rests on them,
    and they may be deleted. ``damage``: what was published and is not whole: affected points must
    be refused, and apply must stop for those blocks until told otherwise.
    """

    next_segment: int
    next_number: int
    predecessor: int
    published: int
    ends: dict[int, int]
    copied: int
    dropped: int
    lost: tuple[int, ...]
    void: tuple[int, ...]
    damage: tuple[Corruption, ...]


def recover_undo(
    storage: Storage,
    disk: bytes,
    listed: Mapping[int, int],
    *,
    identity: Callable[[], bytes],
    highest: int = 0,
    published_hint: int = 0,
) -> RecoveredUndo:
    """Bring the undo log into a state that decisions may rest on; call it at every start.

    Only the newest listed segment can hold anything in doubt: when it was put on the list, all
    older ones had been synced. What it holds above what is known to be durable is copied to a new
    segment.

    :param listed: the catalog's list, segment -> published end.
    :param highest: the highest number that was ever on the list. A number is never used twice: the
        index names segments by their numbers.
    :param published_hint: ``undo_published`` of the frontier, if it is of this boot.
    :raises JournalFull: no space for the copy; nothing has changed.
    :raises UndoFailed: the copy could not be made durable.
    """
    names = storage.list(_UNDO)
    for name in names:
        if name.endswith(TEMPORARY):
            storage.unlink(f"{_UNDO}/{name}")
    numbers = _numbers(names)
    lister = SegmentLister(storage, Log.UNDO, disk)
    infos = {info.segment: info for info in lister.refresh()}
    known = dict(listed)
    hinted, hinted_end = unpack_position(published_hint)
    if hinted in known:  # else it has been swept since
        known[hinted] = max(hinted_end, known[hinted])
    lost = tuple(sorted(known.keys() - infos.keys()))
    damage = [_lost(lister, segment) for segment in lost]
    next_segment = max(*numbers, *known, hinted, highest, 0) + 1
    newest = max(known.keys() & infos.keys(), default=0)
    found = _NOTHING
    if newest:
        # If that is not the newest listed one (which is lost then), all of it was synced.
        end = known[newest] if newest == max(known) else None
        found = _examine(storage, infos[newest], end)
        damage += found.damage
    last, ends, copied, dropped = found.last, dict[int, int](), 0, 0
    position = _position(newest, max(found.end, known.get(newest, 0)), lost)
    if found.doubtful:
        try:
            copy = _copy(storage, disk, infos[newest], next_segment, found, identity())
        except OSError as error:
            raise _refused(error) from error
        dropped = sum(batch.count for batch in found.doubtful)
        if copy is not None:
            copied = copy.next_number - 1 - found.last
            dropped -= copied
            ends[copy.number] = copy.offset
            last = copy.next_number - 1
            newest, next_segment = copy.number, copy.number + 1
            position = pack_position(copy.number, copy.offset)
    return RecoveredUndo(
        next_segment=next_segment,
        next_number=last + 1,
        predecessor=newest,
        published=max(position, published_hint),
        ends=ends,
        copied=copied,
        dropped=dropped,
        lost=lost,
        void=tuple(sorted(_numbers(storage.list(_UNDO)) - known.keys() - ends.keys())),
        damage=tuple(damage),
    )


def _position(newest: int, end: int, lost: tuple[int, ...]) -> int:
    """Up to where readers look. ! They miss a listed segment, or the end of one, only up to there:
    what is lost must lead to errors, not to older content. (All below the newest that is listed was
    synced before that was put on the list.)
    """
    position = pack_position(newest, end) if newest else 0
    return max(position, pack_position(lost[-1], HEADER_PAGE)) if lost else position


def _numbers(names: list[str]) -> set[int]:
    return {int(stem) for name in names if (stem := name.partition(".")[0]).isdecimal()}


def _refused(error: OSError) -> JournalError:
    if error.errno in _NO_SPACE:
        return JournalFull("no space to recover the undo log: free some on the journal's device")
    return UndoFailed(
        f"the undo log could not be recovered ({error}): look at the journal's device"
    )


def _lost(lister: SegmentLister, segment: int) -> Corruption:
    name = segment_name(Log.UNDO, segment)
    what = "unreadable undo segment" if name in lister.damaged else "an undo segment is gone"
    return Corruption(what, file=name)


class _Examined(NamedTuple):
    """``last``, ``end``: of what is known to be durable. ``doubtful``: whole batches above it."""

    last: int
    end: int
    doubtful: list[BatchHeader]
    damage: list[Corruption]


_NOTHING: Final = _Examined(0, HEADER_PAGE, [], [])


def _examine(storage: Storage, info: SegmentInfo, published: int | None) -> _Examined:
    """Divide a segment; all up to offset ``published`` was durable, or, if None, all of it."""
    end = info.size if published is None else published
    file = open_segment(storage, info.name)
    try:
        if info.trailer is not None:
            # Only what was durable got a footer.
            return _Examined(info.trailer.last_seq, info.trailer.footer_offset, [], [])
        scanner = Scanner(file, info)
        scan_to(scanner, end)
        batches = scanner.builder.table().batches
        headers = [
            found for offset in batches["offset"].tolist()
            if (found := _header(file, info, offset)) is not None
        ]  # fmt: skip
    finally:
        file.close()
    durable = max(scanner.durable, info.header.durable)
    sure = [
        header for header in headers
        if header.offset < end or header.first_seq + header.count - 1 <= durable
    ]  # fmt: skip
    damage = [_damage(info, place.offset, place.last_seq) for place in scanner.breaks]
    # Behind the last batch, or inside it, the file ends before what was published does.
    if published is not None and min(scanner.offset, info.size) < published:
        damage.append(_damage(info, scanner.offset, scanner.builder.next_seq - 1))
    if not sure:
        return _Examined(info.first_seq - 1, HEADER_PAGE, headers, damage)
    last = sure[-1]
    return _Examined(
        last.first_seq + last.count - 1, last.offset + last.size, headers[len(sure) :], damage
    )


def _damage(info: SegmentInfo, offset: int, after: int) -> Corruption:
    what = "published before-images are damaged"
    return Corruption(what, file=info.name, offset=offset, first_seq=after + 1, last_seq=after + 1)


def _header(file: File, info: SegmentInfo, offset: int) -> BatchHeader | None:
    """A batch's header; None where there is none (the place of a break)."""
    head = file.read(offset, BATCH_HEADER.size)
    header = unpack_batch_header(head)
    if header is None:
        return None
    table = file.read(offset, header.table_bytes)
    return header if batch_is_whole(header, table, segment_seed(info.header)) else None


def _copy(
    storage: Storage,
    disk: bytes,
    source: SegmentInfo,
    number: int,
    found: _Examined,
    identity: bytes,
) -> UndoSegment | None:
    """Copy what is in doubt to a new segment; None if nothing of it is whole."""
    name = segment_name(Log.UNDO, number)
    header = SegmentHeader(
        log=Log.UNDO, disk=disk, segment=number, identity=identity, first_seq=found.last + 1,
        predecessor=source.segment, predecessor_chain=source.chain, cut=found.last, stamp=0,
        durable=found.last,
    )  # fmt: skip
    copy = UndoSegment(storage, name + TEMPORARY, header)
    try:
        file = open_segment(storage, source.name)
        try:
            for batch in found.doubtful:
                records = _read_batch(file, batch)
                if records is None:
                    break  # its sync cannot have succeeded, nor that of any later one
                copy.append(*records, durable=found.last)
        finally:
            file.close()
        if copy.offset == HEADER_PAGE:
            storage.unlink(name + TEMPORARY)
            return None
        copy.write_footer()
        copy.file.sync()
        storage.rename(name + TEMPORARY, name)
        storage.sync_dir(_UNDO)
    finally:
        copy.file.close()
    return copy


class _Records(NamedTuple):
    entries: list[int]
    sums: list[int]
    payloads: list[bytes]
    payload_bytes: int


def _read_batch(file: File, header: BatchHeader) -> _Records | None:
    """A batch as it is to be appended again; None unless the content of every record is whole."""
    middle = BATCH_HEADER.size + header.count * ENTRY.size
    table = file.read(header.offset, header.table_bytes)
    data = file.read(header.offset + header.table_bytes, header.payload_bytes)
    entries = list(ENTRY.iter_unpack(table[BATCH_HEADER.size : middle]))
    sums = [number for (number,) in U64.iter_unpack(table[middle:])]
    found: list[int] = []
    at = 0
    for _, arg, nblocks, kind, _, _ in entries:
        size = payload_bytes(kind, nblocks, arg)
        found += payload_sums(data[at : at + size])
        at += -(-size // 8) * 8
    if found != sums or len(data) != header.payload_bytes:
        return None
    return _Records(list(chained(*entries)), sums, [data], len(data))
