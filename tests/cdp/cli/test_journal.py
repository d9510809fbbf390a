"""`cdp journal dump` of logs made by the writer itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from journal.bitmaps import Bitmaps
from journal.format import BLOCK, Kind, Log, SegmentHeader, payload_sums
from journal.redo import RedoStart, RedoWriter, create_segment
from journal.storage import RealStorage
from tests.cdp.cli.conftest import Cdp

DISK = bytes(range(16))
NS = 1_000_000_000
START_NS = 1_763_987_400 * NS  # 2025-11-24 13:30:00 in Berlin


class MadeLog:
    """Appends one batch a second, the first at stamp 1 s."""

    def __init__(self, state_dir: Path, *, segment_bytes: int = 1 << 20) -> None:
        directory = state_dir / "disks" / "disk0"
        self.journal = directory / "journal"
        (self.journal / "redo").mkdir(parents=True)
        config = {"journal": str(self.journal), "uuid": DISK.hex(), "backing": "/nonexistent"}
        (directory / "disk.json").write_text(json.dumps(config))
        # The wall clock shows 13:30:00 at stamp 0.
        (state_dir / "clock.json").write_text(json.dumps([[0, START_NS]]))
        storage = RealStorage(self.journal)
        header = SegmentHeader(
            log=Log.REDO, disk=DISK, segment=1, identity=bytes(15) + b"1", first_seq=1,
            predecessor=0, predecessor_chain=0, cut=0, stamp=0,
        )  # fmt: skip
        identities = iter(range(2, 100))
        self.writer = RedoWriter(
            storage,
            DISK,
            RedoStart(create_segment(storage, header), Bitmaps(), 0),
            segment_bytes=segment_bytes,
            identity=lambda: next(identities).to_bytes(16, "little"),
        )
        self._seconds = 0

    def _now(self) -> dict[str, int]:
        self._seconds += 1
        return {
            "stamp": self._seconds * NS, "barrier": self.writer.durable,
            "applied": 0, "window_start": 1,
        }  # fmt: skip

    def write(self, block: int, count: int = 1) -> None:
        """A write."""
        data = bytes([block]) * (count * BLOCK)
        entry = [block, 0, count, Kind.WRITE, 0, 0]
        self.writer.append(entry, payload_sums(data), [data], len(data), **self._now())

    def bare(self, kind: Kind, block: int, count: int, arg: int = 0) -> None:
        """A record without content."""
        self.writer.append([block, arg, count, kind, 0, 0], [], [], 0, **self._now())

    def control(self, kind: Kind, **body: object) -> None:
        """A record that is no version."""
        self.writer.append_control(kind, body, **self._now())


@pytest.fixture
def log(short_tmp: Path) -> Iterator[MadeLog]:
    """Seven records; the first five are durable, and the fifth a barrier."""
    made = MadeLog(short_tmp)
    made.write(3, 2)
    made.bare(Kind.ZERO, 100, 16)
    made.bare(Kind.TRIM, 0, 50)
    made.control(Kind.BOOKMARK, label="nightly", target=3, consistency="crash")
    made.bare(Kind.REF, 7, 1, arg=1)
    made.writer.sync()
    made.write(4)
    made.writer.sync()
    made.write(5)
    yield made
    made.writer.close(seal_open=False)


def seqs(cdp: Cdp, *arguments: str) -> list[int]:
    """Of the records in a dump."""
    return [record["seq"] for record in cdp("journal", "dump", "disk0", *arguments, "--json").json]


def test_dump_as_json(cdp: Cdp, log: MadeLog) -> None:
    records = cdp("journal", "dump", "disk0", "--json").json
    first: dict[str, Any] = {
        "seq": 1,
        "stamp": NS,
        "time": START_NS / 1e9 + 1,
        "kind": "write",
        "offset": 3 * BLOCK,
        "length": 2 * BLOCK,
        "source": None,
        "body": None,
        "barrier": False,
        "durable": True,
        "file": "redo/00000001.seg",
        "file_offset": records[0]["file_offset"],
    }
    assert records[0] == first
    assert [record["kind"] for record in records] == [
        *("write", "zero", "trim", "bookmark", "ref", "write", "write")
    ]
    assert [record["barrier"] for record in records] == [False] * 4 + [True, True, False]
    # What the last batch's header knows: the seventh was never synced.
    assert [record["durable"] for record in records] == [True] * 6 + [False]
    assert records[3]["body"] == {"label": "nightly", "target": 3, "consistency": "crash"}
    assert records[3]["offset"] is None
    assert records[4]["source"] == 1
    assert (log.journal / first["file"]).read_bytes()[first["file_offset"]] == 3


def test_dump(cdp: Cdp, log: MadeLog) -> None:
    lines = cdp("journal", "dump", "disk0").out.splitlines()
    assert lines[0].split() == [*("SEQ", "TIME", "KIND", "OFFSET", "LENGTH", "FILE", "AT", "NOTES")]
    assert len({line.index("redo/") for line in lines[1:]}) == 1  # aligned
    assert lines[1].split()[:6] == [
        *("1", "2025-11-24", "13:30:01.000+01:00", "write", "12288", "8192")
    ]
    assert '{"consistency": "crash", "label": "nightly", "target": 3}' in lines[4]
    assert lines[5].endswith("barrier, from seq:1")
    assert lines[7].endswith("not known to be durable")
    assert log.writer.last_seq == len(lines) - 1


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--from", "seq:6"], [6, 7]),
        (["--to", "seq:2"], [1, 2]),
        (["--from", "seq:3", "--to", "seq:4"], [3, 4]),
        (["--from", "nightly"], [3, 4, 5, 6, 7]),
        (["--to", "bookmark:nightly"], [1, 2, 3]),
        (["--from", "2025-11-24 13:30:03"], [3, 4, 5, 6, 7]),
        (["--from", "2025-11-24 13:30:03.5"], [4, 5, 6, 7]),
        (["--to", "2025-11-24 13:30:03.5"], [1, 2, 3]),
        (["--to", "2025-11-24 13:30:03"], [1, 2, 3]),
        (["--from", "2025-11-24 14:00"], []),
        (["--to", "2025-11-24 13:00"], []),
        (["--to", "now"], [1, 2, 3, 4, 5, 6, 7]),
        (["--from", "seq:100"], []),
    ],
)
def test_dump_of_a_stretch(cdp: Cdp, log: MadeLog, arguments: list[str], found: list[int]) -> None:
    assert seqs(cdp, *arguments) == found
    assert log.writer.durable == 6


def test_dump_over_several_segments(cdp: Cdp, short_tmp: Path) -> None:
    made = MadeLog(short_tmp, segment_bytes=64 << 10)
    for block in range(40):
        made.write(block)
    made.writer.close()  # a clean stop: everything is durable, all segments are sealed
    assert len(list((made.journal / "redo").iterdir())) > 2
    records = cdp("journal", "dump", "disk0", "--json").json
    assert [record["seq"] for record in records] == list(range(1, 41))
    assert all(record["durable"] for record in records)
    for low, high in ((13, 29), (1, 1), (40, 40), (14, 14)):
        arguments = ["--from", f"seq:{low}", "--to", f"seq:{high}"]
        assert seqs(cdp, *arguments) == list(range(low, high + 1))
    assert seqs(cdp, "--from", "2025-11-24 13:30:20", "--to", "2025-11-24 13:30:22") == [20, 21, 22]


def test_damage_is_passed_over_and_named(cdp: Cdp, short_tmp: Path) -> None:
    made = MadeLog(short_tmp, segment_bytes=64 << 10)
    for block in range(40):
        made.write(block)
    made.writer.close()
    segments = sorted((made.journal / "redo").iterdir())
    with segments[1].open("r+b") as file:
        file.write(b"garbage")
    ran = cdp("journal", "dump", "disk0", "--json")
    found = [record["seq"] for record in json.loads(ran.out)]
    assert found[0] == 1
    assert found[-1] == 40
    assert len(found) < 40
    assert "no segment header in redo/00000002.seg" in ran.err


def test_without_the_clock_there_are_seqs(cdp: Cdp, short_tmp: Path, log: MadeLog) -> None:
    (short_tmp / "clock.json").unlink()
    assert cdp("journal", "dump", "disk0", "--json").json[0]["time"] is None
    assert "  -  " in cdp("journal", "dump", "disk0").out
    error = cdp("journal", "dump", "disk0", "--from", "2025-11-24 13:30:20").error
    assert "is lost, so times mean nothing: name seqs" in error
    assert log.writer.last_seq == 7


def test_an_empty_log(cdp: Cdp, short_tmp: Path) -> None:
    made = MadeLog(short_tmp)
    assert cdp("journal", "dump", "disk0", "--json").json == []
    assert cdp("journal", "dump", "disk0").out.startswith("         SEQ")
    made.writer.close(seal_open=False)


def test_what_is_not_there(cdp: Cdp, short_tmp: Path, log: MadeLog) -> None:
    assert "there is no " in cdp("journal", "dump", "nosuch").error
    assert "the log holds no bookmark 'weekly'" in (
        cdp("journal", "dump", "disk0", "--to", "weekly").error
    )
    config = short_tmp / "disks" / "disk0" / "disk.json"
    config.write_text("{}")
    assert "cannot be understood" in cdp("journal", "dump", "disk0").error
    config.write_text(json.dumps({"journal": "/nonexistent", "uuid": DISK.hex()}))
    assert "/nonexistent holds no journal" in cdp("journal", "dump", "disk0").error
    assert log.writer.last_seq == 7
