"""Damage, as opposed to a torn tail: what was durable is reported, and never cut."""

from __future__ import annotations

import pytest

from journal.errors import Corruption
from journal.format import (
    Kind,
    Log,
)
from journal.segment import (
    open_segment,
    read_blocks,
    segment_name,
)
from tests.crash.sim_storage import SimStorage
from tests.journal.recovery_life import Life


@pytest.fixture
def log() -> Life:
    return Life()


def test_damage_below_the_watermark_is_reported_not_cut(log: Life) -> None:
    """! It is no torn tail: everything behind it was durable, and stays."""
    log.fill(60)
    log.writer.sync()
    last = log.writer.last_seq
    number = log.infos()[-1].segment
    offset, first, count = log.batches(number)[0]
    log.hurt(number, offset + 140)
    log.kill()
    found = log.recover(durable=last)
    (damage,) = found.corruptions
    assert (damage.file, damage.offset) == (segment_name(Log.REDO, number), offset)
    assert (damage.first_seq, damage.last_seq) == (first, first + count - 1)
    assert found.start.segment.header.cut == last
    assert found.lost is None
    contents = log.found(last)
    lost = set(range(first, first + count))
    assert {seq for seq, what in contents.items() if what == Kind.LOST} == lost
    assert all(contents[seq] == log.contents[seq] for seq in contents if seq not in lost)
    assert found.tail[-2][1].rows["kind"].tolist().count(Kind.LOST) == count


def test_the_watermark_may_stand_behind_the_damage(log: Life) -> None:
    """! Found nowhere else: a later batch says what was durable when it was written."""
    log.write(1, 2)
    log.write(3)
    log.writer.sync()
    log.write(4)
    last = log.writer.last_seq
    offset, first, count = log.batches(1)[1]
    log.hurt(1, offset + 8)
    log.storage.live["redo/00000001.seg"].pending.clear()
    found = log.recover()
    (damage,) = found.corruptions
    assert (damage.first_seq, damage.last_seq) == (first, first + count - 1)
    assert found.start.segment.header.cut == last
    assert log.found(last) == {
        1: log.contents[1], 2: log.contents[2], 3: Kind.LOST, 4: log.contents[4],
    }  # fmt: skip


def test_a_break_above_the_watermark_is_cut(log: Life) -> None:
    log.write(1, 2)
    log.writer.sync()
    log.write(3)
    log.write(4)
    offset = log.batches(1)[1][0]
    log.hurt(1, offset + 8)
    log.kill()
    found = log.recover(durable=2)
    assert found.corruptions == []
    assert found.lost is not None
    assert (found.lost.first_seq, found.lost.last_seq) == (3, 4)
    assert log.found(2) == {1: log.contents[1], 2: log.contents[2]}


def test_a_damaged_end_below_the_watermark(log: Life) -> None:
    log.write(1, 2)
    log.write(3)
    log.writer.sync()
    log.hurt(1, log.batches(1)[1][0] + 8)
    log.kill()
    found = log.recover(durable=3)
    (damage,) = found.corruptions
    assert (damage.first_seq, damage.last_seq) == (3, 3)
    assert found.start.segment.header.first_seq == 4


def test_damage_across_the_watermark(log: Life) -> None:
    """What was durable of it is reported, what was not is cut with what follows."""
    log.write(1, 2)
    log.write(3)
    log.writer.sync()
    log.write(4)
    log.write(5)
    second, third = log.batches(1)[1][0], log.batches(1)[2][0]
    log.hurt(1, second, third - second + 100)
    log.kill()
    found = log.recover(durable=3)
    (damage,) = found.corruptions
    assert (damage.first_seq, damage.last_seq) == (3, 3)
    assert found.lost is not None
    assert (found.lost.first_seq, found.lost.last_seq) == (4, 5)
    assert log.found(5) == {1: log.contents[1], 2: log.contents[2], 3: Kind.LOST}


def test_payloads_below_the_watermark_are_left_to_those_who_use_them(log: Life) -> None:
    log.write(1, 2)
    log.writer.sync()
    log.hurt(1, log.batches(1)[0][0] + 128 + 64 + 100)
    log.kill()
    found = log.recover(durable=2)
    assert found.corruptions == []
    info, table = found.tail[0]
    with pytest.raises(Corruption):
        read_blocks(open_segment(log.storage, info.name), table, 0, 0, 1, name=info.name)


def test_a_damaged_footer_costs_nothing(log: Life) -> None:
    log.fill(60)
    log.writer.sync()
    info = log.infos()[0]
    assert info.trailer is not None
    log.hurt(1, info.trailer.footer_offset + 90)
    log.kill()
    found = log.recover(durable=log.writer.durable)
    assert found.corruptions == []
    assert found.tail[0][1].first_seq == 1


def test_a_damaged_trailer_makes_it_an_unsealed_one(log: Life) -> None:
    log.fill(60)
    log.writer.sync()
    log.hurt(1, len(log.file(1)) - 20)
    log.kill()
    found = log.recover(durable=log.writer.durable)
    assert found.corruptions == []
    assert found.tail[0][1].first_seq == 1


@pytest.mark.parametrize("how", ["header", "gone", "unreadable"])
@pytest.mark.parametrize("place", ["oldest", "middle", "newest"])
def test_a_segment_lost_below_the_watermark(log: Life, how: str, place: str) -> None:
    """! Whether by damage or as a whole, what was durable is reported with file and seqs."""
    log.fill(80)
    log.writer.sync()
    last = log.writer.last_seq
    infos = log.infos()
    assert len(infos) >= 4
    at = {"oldest": 0, "middle": 1, "newest": len(infos) - 1}[place]
    number, name = infos[at].segment, infos[at].name
    log.kill()
    if how == "header":
        log.hurt(number, 60)
    elif how == "gone":
        del log.storage.live[name]
    else:
        log.storage.bad_pages.add((name, 0))
    found = log.recover(durable=last)
    if place == "oldest" and how == "gone":
        assert found.corruptions == []  # it may have been reclaimed: the catalog knows
        assert found.floor == infos[1].first_seq
        return
    assert found.corruptions
    if place != "newest" or how != "gone":
        assert {damage.file for damage in found.corruptions} >= {name}
    seqs = [d for d in found.corruptions if d.last_seq]
    if place == "newest":
        assert [(d.first_seq, d.last_seq) for d in seqs] == [(infos[at].first_seq, last)]
    elif place == "middle":
        assert (seqs[0].first_seq, seqs[0].last_seq) == (infos[1].first_seq, infos[1].bound)
    assert found.start.segment.header.first_seq == last + 1
    if how != "gone":
        assert name in log.storage.live  # kept as evidence
    contents = log.found(found.durable)
    gone = range(infos[at].first_seq, min(infos[at].bound, last) + 1)
    assert all(contents[seq] == log.contents[seq] for seq in range(1, last + 1) if seq not in gone)


def test_a_torn_new_segment_is_no_damage(log: Life) -> None:
    """A crash while a segment was begun: its header never became durable."""
    log.fill(12)
    log.writer.sync()
    log.storage.open("redo/00000007.seg", "create").write(0, [b"CDPSEGMT" + bytes(600)])
    log.kill()
    found = log.recover(durable=log.writer.durable)
    assert found.corruptions == []
    assert "redo/00000007.seg" not in log.storage.live
    assert found.start.segment.number > 7


def test_the_whole_log_lost(log: Life) -> None:
    log.storage = SimStorage(1)
    found = log.recover(durable=50, applied=40, segment_hint=9)
    (damage,) = found.corruptions
    assert damage.last_seq == 50
    assert not found.clean
    assert found.start.segment.header.first_seq == 51
    assert found.start.segment.number == 10


def test_a_page_that_cannot_be_read_is_damage_not_the_end(log: Life) -> None:
    log.write(1, 2)
    log.write(3)
    log.writer.sync()
    offset, first, _ = log.batches(1)[0]
    log.kill()
    log.storage.bad_pages.add(("redo/00000001.seg", offset // 4096))
    found = log.recover(durable=3)
    assert [(d.first_seq, d.last_seq) for d in found.corruptions] == [(first, 2)]
    assert log.found(3) == {1: Kind.LOST, 2: Kind.LOST, 3: log.contents[3]}


def test_a_device_error_in_the_tail_cuts_it(log: Life) -> None:
    log.write(1)
    log.write(2)
    offset = log.batches(1)[1][0]
    log.kill()
    log.storage.bad_pages.add(("redo/00000001.seg", (offset + 4000) // 4096))
    found = log.recover()
    assert found.lost is not None
    assert found.lost.first_seq == 2


# ----------------------------------------------------------------------- what others know
@pytest.fixture
def unsynced(log: Life) -> tuple[Life, int]:
    """Four segments of which nothing says that they are durable; the last seq of the first."""
    ends: dict[int, int] = {}
    while log.writer.segment < 4:
        log.write(1, 2)
        ends[log.writer.segment] = log.writer.last_seq
    return log, ends[1]


def remove(log: Life, *numbers: int) -> None:
    for number in numbers:
        log.storage.unlink(segment_name(Log.REDO, number))
    log.kill()


def test_nobody_misses_what_was_reclaimed(unsynced: tuple[Life, int]) -> None:
    log, reclaimed = unsynced
    remove(log, 1, 2, 3, 4)
    found = log.recover(applied=reclaimed, reclaimed_hint=reclaimed)
    assert found.corruptions == []
    assert found.start.segment.header.cut == reclaimed


def test_all_behind_a_reclaimed_segment_is_kept(unsynced: tuple[Life, int]) -> None:
    """! Without that knowledge it would look like a log whose beginning was never written."""
    log, reclaimed = unsynced
    last = log.writer.last_seq
    remove(log, 1)
    found = log.recover(applied=reclaimed, reclaimed_hint=reclaimed)
    assert found.start.segment.header.cut == last
    assert set(log.found(found.durable)) >= set(range(reclaimed + 1, last + 1))


def test_a_log_without_its_first_segments_is_cut_where_they_were(
    unsynced: tuple[Life, int],
) -> None:
    """! They were never durable: what follows them is no part of a prefix, nor is the hole."""
    log, reclaimed = unsynced
    remove(log, 1, 2)
    found = log.recover(applied=reclaimed, reclaimed_hint=reclaimed)
    assert found.start.segment.header.cut == reclaimed
    assert found.lost is not None
    assert found.lost.first_seq == reclaimed + 1
    assert set(log.found(found.durable).values()) == {Kind.CRASH}


def test_an_oldest_segment_that_was_not_reclaimed_is_missing(log: Life) -> None:
    """! Only who knows what was reclaimed can tell that it was not."""
    log.fill(60)
    log.writer.sync()
    assert len(log.infos()) > 2
    last = log.infos()[1].header.cut
    remove(log, 1)
    assert log.recover().corruptions == []
    found = log.recover(reclaimed_hint=last - 1)
    (damage,) = found.corruptions
    assert (damage.file, damage.first_seq, damage.last_seq) == (
        segment_name(Log.REDO, 1), last, last,
    )  # fmt: skip


# ---------------------------------------------------- found by damaging every place (tests/crash)
def test_the_next_start_still_knows_what_is_lost_at_the_end(log: Life) -> None:
    """! It was reported once, and cut: from the next start on the disk was served without it."""
    log.write(1, 2)
    log.write(3)
    log.writer.sync()
    log.hurt(1, log.batches(1)[1][0] + 8)
    for durable in (3, 0, 0):
        log.kill()
        found = log.recover(durable=durable)
        assert [(each.first_seq, each.last_seq) for each in found.corruptions] == [(3, 3)]
        assert found.applied == 0


def test_a_lost_header_is_reported_with_its_seqs(log: Life) -> None:
    """! Without them nobody saw that records above `applied` were among them, and the disk was
    served. What is applied is not looked at, so the segment before it tells nothing either.
    """
    log.fill(80)
    log.writer.sync()
    last, infos = log.writer.last_seq, log.infos()
    number = infos[-2].segment
    log.write(1, applied=infos[-2].first_seq)
    log.writer.sync()
    log.hurt(number, 60)
    for _ in range(2):
        log.kill()
        found = log.recover(durable=last, applied=infos[-2].first_seq)
        assert [(each.file, each.first_seq, each.last_seq) for each in found.corruptions] == [
            (infos[-2].name, infos[-2].first_seq, infos[-1].first_seq - 1)
        ]


def test_the_header_of_the_newest_segment(log: Life) -> None:
    """! It looks like one that was begun in a crash, and was removed, with all that it held, if
    nobody else knew of that. But its batches know of durable ones in the same segment.
    """
    log.fill(80)
    log.write(5)
    log.writer.sync()
    known = log.writer.last_seq
    log.write(6)
    log.writer.sync()
    last, newest = log.writer.last_seq, log.infos()[-1]
    log.hurt(newest.segment, 60)
    for _ in range(2):
        log.kill()
        found = log.recover()
        (damage,) = found.corruptions
        assert (damage.file, damage.first_seq) == (newest.name, newest.first_seq)
        assert damage.last_seq == known
        assert found.start.segment.header.first_seq > last
        assert newest.name in log.storage.live
    assert not found.clean


def test_batches_that_know_nothing_of_their_segment_do_not_save_it(log: Life) -> None:
    """Begun in a crash, with batches behind a header that never got there."""
    log.fill(12)
    log.writer.sync()
    while len(log.infos()) < 2:
        log.write(1, 2, 3)
    log.write(4)
    newest = log.infos()[-1]
    log.hurt(newest.segment, 60)
    log.kill()
    found = log.recover()
    assert found.corruptions == []
    assert newest.name not in log.storage.live


@pytest.mark.parametrize("bit", range(0, 64, 9))
def test_a_damaged_batch_beside_a_whole_footer_tells_nothing(log: Life, bit: int) -> None:
    """! The last batch of a sealed segment was asked for `applied`, and believed without a look at
    its checksum: an `applied` too high leaves records out of the disk that are only in the log.
    """
    log.fill(12)
    log.writer.sync()
    while len(log.infos()) < 2:
        log.write(1, applied=2)
        log.writer.sync()
    log.writer.close()
    for info in log.infos():
        content = log.file(info.segment)
        offset = log.batches(info.segment)[-1][0]
        content[offset + 80 + bit // 8] ^= 1 << bit % 8
    log.kill()
    assert log.recover().applied <= 2
