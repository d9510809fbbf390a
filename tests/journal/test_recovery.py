"""Recovery: the decision tables, ends and starts, copies, open rollbacks, bitmaps."""

from __future__ import annotations

import errno
import itertools
import json
from pathlib import Path

import pytest

from journal import recovery
from journal.errors import Corruption, JournalFull, UnknownVersion
from journal.format import (
    BLOCK,
    HEADER_PAGE,
    Kind,
    Log,
    SegmentHeader,
    pack_segment_header,
    payload_sums,
)
from journal.recovery import apply, classify, survey
from journal.recovery_plan import FILE_CASES, STRETCH_CASES, classify_file, classify_stretch
from journal.segment import (
    load_table,
    open_segment,
    read_blocks,
    read_body,
)
from journal.storage import Mode
from journal.survey import FileFacts
from tests.crash.sim_storage import SimFile, SimStorage
from tests.journal.recovery_life import DISK, Life


@pytest.fixture
def log() -> Life:
    return Life()


# -------------------------------------------------------------------------------------- tables


def test_every_stretch_matches_exactly_one_case() -> None:
    hit = set()
    for inputs in itertools.product((False, True), repeat=4):
        known, linked, whole, cut = inputs
        case, decision = classify_stretch(known=known, linked=linked, whole=whole, cut=cut)
        hit.add(case)
        # ! What is known to have been durable is never cut, whatever is wrong with it.
        assert not known or decision.startswith("keep")
        # ! Above that nothing is kept unless the chain to it is whole, and then it is copied.
        assert known or decision != "copy" or (linked and whole and not cut)
        assert known or decision in ("copy", "cut", "void")
    assert hit == {name for name, _, _ in STRETCH_CASES}


def test_every_file_matches_exactly_one_case() -> None:
    hit = set()
    for inputs in itertools.product((False, True), repeat=6):
        temporary, readable, device_error, needed, void, empty = inputs
        facts = FileFacts(
            "redo/00000001.seg", temporary=temporary, readable=readable,
            device_error=device_error, needed=needed, empty=empty,
        )  # fmt: skip
        case, decision = classify_file(facts, void=void)
        hit.add(case)
        # ! A segment with records that count is not removed; nor is one that cannot be read, if
        # it may hold what was durable.
        if not temporary and readable and not void and not empty:
            assert decision == "keep"
        if not temporary and not readable and (needed or device_error):
            assert decision == "keep and report"
    assert hit == {name for name, _, _ in FILE_CASES}


def documented_cases() -> dict[str, tuple[tuple[bool | str, ...], str]]:
    """The rows of RECOVERY.md's tables."""
    words: dict[str, bool | str] = {"yes": True, "no": False, "any": "*"}
    found = {}
    for line in Path(recovery.__file__).with_name("RECOVERY.md").read_text().splitlines():
        if line.startswith("| `@"):
            name, *inputs, decision = [cell.strip() for cell in line.strip("|").split("|")]
            found[name.strip("`")] = (tuple(words[word] for word in inputs), decision)
    return found


def test_the_document_has_the_same_tables() -> None:
    in_code = {name: (inputs, what) for name, inputs, what in STRETCH_CASES + FILE_CASES}
    assert documented_cases() == in_code


# ------------------------------------------------------------------------------- ends and starts


def test_a_new_journal(log: Life) -> None:
    (info,) = log.infos()
    assert (info.first_seq, info.segment, info.header.predecessor) == (1, 1, 0)
    assert log.storage.list("redo") == ["00000001.seg"]


def test_a_clean_stop_loses_and_adds_nothing(log: Life) -> None:
    log.fill(20)
    log.writer.close()
    last = log.writer.last_seq
    found = log.recover(durable=last, applied=last)
    assert found.clean
    assert (found.durable, found.applied, found.copied_bytes) == (last, last, 0)
    assert found.tail == []
    assert found.lost is None
    assert log.infos()[-1].first_seq == last + 1


def test_an_unclean_end_is_noted_in_the_log(log: Life) -> None:
    last = log.write(1, 2)
    stamp = log.stamp
    log.writer.sync()
    log.kill()
    found = log.recover(durable=last)
    assert not found.clean
    assert found.copied_bytes == 0
    assert found.durable == last + 1
    info, table = found.tail[-1]
    body = json.loads(read_body(open_segment(log.storage, info.name), table, 0, name=info.name))
    assert table.rows["kind"].tolist() == [Kind.CRASH]
    assert body == {
        "kept": last, "highest_seen": last, "stamp_from": stamp, "stamp_to": log.stamp,
    }  # fmt: skip
    assert found.highest_stamp == log.stamp


def test_seqs_are_never_given_twice(log: Life) -> None:
    """! New ones begin above the highest in any file, also of records that did not survive."""
    log.write(1, 2)
    log.writer.sync()
    last = log.write(3, 4, 5)
    (batch,) = [at for at, first, _ in log.batches(1) if first == 3]
    log.hurt(1, batch + 128 + 3 * 32 + 10)  # the first payload of the last batch
    log.kill()
    found = log.recover(durable=2)
    assert found.lost is not None
    assert (found.lost.first_seq, found.lost.last_seq) == (3, last)
    assert found.start.segment.header.first_seq == last + 1
    assert list(log.found(found.durable)) == [1, 2, last + 1]


def test_hints_count(log: Life) -> None:
    """What the frontier, runs and the catalog know, files may not."""
    last = log.write(1, 2, 3)
    log.kill()
    assert survey(log.storage, DISK).durable == 0
    assert survey(log.storage, DISK, durable_hint=last).durable == last
    assert survey(log.storage, DISK, applied_hint=last).durable == last
    found = log.recover(applied=last, segment_hint=77)
    assert found.copied_bytes == 0
    assert found.applied == last
    assert found.start.segment.number == 78


def test_a_segment_says_what_was_durable_when_it_was_begun(log: Life) -> None:
    """What a recovery knew from the frontier outlives it, also when its own record is damaged."""
    log.write(1, 2, 3)
    log.kill()
    log.recover(durable=3)
    log.hurt(2, HEADER_PAGE + 30)
    log.kill()
    assert survey(log.storage, DISK).durable == 3
    assert log.recover().copied_bytes == 0


def test_applied_is_the_highest_that_anyone_knows(log: Life) -> None:
    log.write(1)
    log.writer.sync()
    log.write(2, applied=1)
    log.writer.sync()
    log.kill()
    assert log.recover(durable=2).applied == 1


@pytest.mark.parametrize("sealed", [True, False])
def test_applied_is_found_in_the_newest_batch(log: Life, sealed: bool) -> None:
    log.fill(30)
    log.write(1, applied=17)
    if sealed:
        log.writer.close()
    log.kill()
    found = log.recover()
    assert found.applied == 17
    assert found.tail[0][1].first_seq == 18


def test_the_newest_size_is_told(log: Life) -> None:
    log.control(Kind.RESIZE, {"size": 1 << 30})
    log.control(Kind.RESIZE, {"size": 1 << 31})
    log.writer.close()
    assert log.recover().size == 1 << 31
    assert Life().recover().size is None


def test_temporary_files_are_removed(log: Life) -> None:
    log.storage.open("redo/00000009.seg.tmp", "create").write(0, [b"half"])
    log.recover()
    assert not [name for name in log.storage.live if name.endswith(".tmp")]


def test_a_newer_format_is_refused_and_left_alone(log: Life) -> None:
    head = SegmentHeader(Log.REDO, DISK, 5, b"n" * 16, 9, 1, 0, 8, 1, version=2)
    log.storage.open("redo/00000005.seg", "create").write(0, [pack_segment_header(head)])
    before = log.storage.operations
    with pytest.raises(UnknownVersion, match="use the cdpd that wrote it"):
        log.recover()
    assert log.storage.operations == before


# ------------------------------------------------------------------------------------- the copy


def test_what_is_not_known_durable_is_copied(log: Life) -> None:
    """! Same seqs, stamps and contents, in a new file; the old one is never written again."""
    log.fill(12)
    durable = log.writer.durable
    log.write(1, 2, 3)
    last = log.write(4)
    stamps: dict[int, int] = {}
    for info in log.infos():
        table = load_table(open_segment(log.storage, info.name), info)
        stamps |= {table.first_seq + row: int(s) for row, s in enumerate(table.stamps())}
    log.kill()
    old = {name: bytes(inode.live) for name, inode in log.storage.live.items()}
    found = log.recover(durable=durable)
    assert found.copied_bytes > 4 * BLOCK
    copy = next(info for info in log.infos() if info.first_seq == durable + 1)
    assert copy.sealed
    assert (copy.header.cut, copy.header.durable) == (durable, durable)
    contents = log.found(last)
    assert contents == {seq: log.contents[seq] for seq in range(1, last + 1)}
    for info in log.infos():
        table = load_table(open_segment(log.storage, info.name), info, upto=last)
        for row, stamp in enumerate(table.stamps().tolist()):
            assert stamps[table.first_seq + row] == stamp
    for name, content in old.items():
        if name in log.storage.live:
            assert log.storage.live[name].live == content
    assert not any(line.split()[1] in old for line in log.storage.log if line[:5] == "write")


def test_the_copy_appears_only_when_it_is_durable(log: Life) -> None:
    """! Written and synced under a temporary name; renamed; the directory synced; then the rest."""
    log.write(1, 2, 3)
    log.kill()
    log.recover()
    calls = log.storage.log
    rename = calls.index("rename redo/00000002.seg.tmp redo/00000002.seg")
    writes = [n for n, line in enumerate(calls) if line == "write redo/00000002.seg.tmp"]
    syncs = [n for n, line in enumerate(calls) if line == "sync redo/00000002.seg.tmp"]
    assert max(writes) < max(syncs) < rename
    assert calls[rename + 1] == "sync_dir redo"
    assert calls[rename + 2] == "create redo/00000003.seg.tmp"
    assert calls.index("sync redo/00000003.seg.tmp") < calls.index(
        "rename redo/00000003.seg.tmp redo/00000003.seg"
    )
    unlinks = [n for n, line in enumerate(calls) if line.startswith("unlink")]
    chain = [n for n, line in enumerate(calls) if line == "sync_dir redo"]
    assert unlinks
    assert min(unlinks) > chain[1]  # the new chain first, then the old files go
    assert calls[-1] == "sync_dir redo"


def test_a_record_that_changed_since_the_survey_is_not_copied(log: Life) -> None:
    """! Every checksum is verified before anything is written from it."""
    log.write(1, 2, 3)
    log.kill()
    found = survey(log.storage, DISK)
    offset = log.batches(1)[0][0]
    log.hurt(1, offset + 128 + 96 + BLOCK + 5)
    with pytest.raises(Corruption) as caught:
        apply(
            log.storage, DISK, found, classify(found), stamp=1, identity=log.identity,
            copy_limit=1,
        )  # fmt: skip
    assert caught.value.first_seq == 2
    assert log.storage.list("redo") == ["00000001.seg"]
    # The next recovery sees it, and cuts there.
    again = log.recover()
    assert again.lost is not None
    assert again.lost.first_seq == 2


def test_a_large_copy_is_synced_in_pieces(log: Life) -> None:
    for _ in range(10):
        log.write(*range(10))
    log.kill()
    log.recover(copy_limit=100_000)
    first = next(line for line in log.storage.log if line.startswith("create"))
    name = first.split()[1]
    assert log.storage.log.count(f"sync {name}") >= 4


def test_large_records_are_copied(log: Life) -> None:
    data = log.random.randbytes(33 * BLOCK)
    log.writer.append(
        [5, 0, 33, Kind.WRITE, 0, 0], payload_sums(data), [data], len(data), stamp=log.stamp + 1,
        barrier=0, applied=0, window_start=0,
    )  # fmt: skip
    log.kill()
    found = log.recover()
    info, table = found.tail[0]
    assert read_blocks(open_segment(log.storage, info.name), table, 0, 0, 33, name="") == data


# ------------------------------------------------------------------------------------- rollbacks


def test_an_open_rollback_is_aborted(log: Life) -> None:
    log.record(Kind.TRIM, 0, 10)
    begin = log.control(Kind.ROLLBACK_BEGIN, {"id": "r", "disks": ["a"]})
    log.record(Kind.REF, 3, 2, 1)
    log.writer.sync()
    log.kill()
    found = log.recover(durable=log.writer.durable)
    assert found.open_rollback is None
    assert found.start.rollback == 0
    kinds = list(log.found(found.durable).values())
    assert kinds == [
        Kind.TRIM, Kind.ROLLBACK_BEGIN, Kind.REF, Kind.CRASH, Kind.ROLLBACK_ABORT,
    ]  # fmt: skip
    assert set(found.start.bitmaps.masks) == set(range(10))
    assert begin == 2
    # And the next start finds it closed.
    log.kill()
    assert log.recover(durable=found.durable).durable == found.durable + 1


@pytest.mark.parametrize("word", [Kind.ROLLBACK_COMMIT, Kind.ROLLBACK_ABORT])
def test_a_rollback_of_several_disks_waits_for_the_word(log: Life, word: Kind) -> None:
    """! All of them commit or none does: that is not for one disk's recovery to decide."""
    log.record(Kind.TRIM, 0, 10)
    body: dict[str, object] = {"id": "r", "disks": ["a", "b"], "to_seq": 1}
    begin = log.control(Kind.ROLLBACK_BEGIN, body)
    log.record(Kind.REF, 3, 2, 1)
    log.writer.sync()
    log.kill()
    found = log.recover(durable=log.writer.durable)
    assert found.open_rollback is not None
    assert found.open_rollback.begin_seq == begin
    assert found.open_rollback.body == body
    assert found.start.rollback == begin
    log.start(found)
    log.control(word, {})
    log.writer.close()
    again = log.recover()
    assert again.open_rollback is None
    want = set(range(10)) - ({3, 4} if word == Kind.ROLLBACK_COMMIT else set())
    assert set(again.start.bitmaps.masks) == want


def test_a_rollback_that_began_segments_ago(log: Life) -> None:
    """The footers behind its begin are no place to start from; they say so."""
    log.record(Kind.TRIM, 0, 10)
    log.control(Kind.ROLLBACK_BEGIN, {"disks": ["a", "b"]})
    log.record(Kind.REF, 3, 2, 1)
    for _ in range(1000):
        for _ in range(4):
            log.record(Kind.REF, 200, 2, 1)
        log.writer.sync()
        if log.writer.segment > 3:
            break
    log.kill()
    found = log.recover(durable=log.writer.durable)
    assert found.open_rollback is not None
    log.start(found)
    log.control(Kind.ROLLBACK_COMMIT, {})
    last = log.writer.last_seq
    log.write(50, applied=last)
    log.writer.sync()
    log.kill()
    again = log.recover(durable=log.writer.durable, applied=last)
    assert set(again.masks) == {0, 1, 2, 5, 6, 7, 8, 9}


# ---------------------------------------------------------------------------------------- bitmaps


def test_masks_are_as_of_applied(log: Life) -> None:
    log.record(Kind.TRIM, 0, 4)  # seq 1
    log.write(2)  # 2
    log.record(Kind.TRIM, 7, 1)  # 3
    log.write(7)  # 4
    log.writer.sync()
    log.kill()
    for applied, want in ((1, {0, 1, 2, 3}), (2, {0, 1, 3}), (3, {0, 1, 3, 7}), (4, {0, 1, 3})):
        copy = Life.__new__(Life)
        copy.__dict__.update(log.__dict__)
        copy.storage = log.storage.kill()
        copy.storage.live = {
            name: type(inode)(bytearray(inode.live)) for name, inode in log.storage.live.items()
        }
        found = copy.recover(durable=4, applied=applied)
        assert set(found.masks) == want
        assert set(found.start.bitmaps.masks) == {0, 1, 3}


class Counting(SimStorage):
    """Counts the bytes that are read."""

    bytes_read = 0

    def open(self, name: str, mode: Mode) -> SimFile:
        file = super().open(name, mode)
        original = file.read

        def read(offset: int, length: int) -> bytes:
            data = original(offset, length)
            self.bytes_read += len(data)
            return data

        file.read = read  # type: ignore[method-assign]
        return file


def test_of_a_long_log_only_headers_and_trailers_are_read() -> None:
    """And masks come from the last footer, not from all of them."""
    log = Life(Counting(0))
    log.record(Kind.TRIM, 1000, 5)
    log.fill(900)
    log.writer.sync()
    last = log.writer.last_seq
    segments = log.writer.segment
    assert segments > 40
    log.kill()
    storage = Counting(1)
    storage.live = log.storage.live
    storage.durable = log.storage.durable
    log.storage = storage
    found = log.recover(durable=last, applied=last)
    assert set(found.masks) == set(range(1000, 1005))
    newest = 2 * 65536
    assert storage.bytes_read < segments * 2 * (HEADER_PAGE + 64) + 6 * newest


def test_a_damaged_footer_is_no_place_to_start_the_masks_from(log: Life) -> None:
    log.record(Kind.TRIM, 1000, 5)
    log.fill(100)
    log.writer.sync()
    last = log.writer.last_seq
    for info in log.infos()[1:]:
        if info.trailer is not None:
            log.hurt(info.segment, info.trailer.footer_offset + 80)
    log.kill()
    found = log.recover(durable=last, applied=last)
    assert set(found.masks) == set(range(1000, 1005))


# ---------------------------------------------------------------------------------------- errors


def test_a_full_file_system_is_said_so(log: Life) -> None:
    log.write(1, 2, 3)
    log.kill()
    log.storage.faults["create", 1] = errno.ENOSPC
    with pytest.raises(JournalFull, match="free some"):
        log.recover()
    assert log.recover().lost is None
