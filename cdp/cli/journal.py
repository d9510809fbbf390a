"""`cdp journal dump`: what a disk's redo log says, read from its files, with or without a daemon.

Every record is shown that can be read, also those of which the log does not say yet that they are
durable: they are marked, since a crash may take them away and give their numbers to others.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdp import units
from cdp.cli.api_client import state_dir_of
from cdp.cli.options import AsJson, Disk, spec_option
from cdp.cli.output import CliError, note, print_line
from journal.errors import InvalidInput

if TYPE_CHECKING:
    from journal.segment import SegmentInfo, Table
    from replay.target import ClockTable, Spec

app = typer.Typer(no_args_is_help=True, help="Look into a disk's journal.")


@app.callback()
def group() -> None:
    """Look into a disk's journal."""


@app.command("dump")
def dump(
    ctx: typer.Context,
    name: Disk,
    since: Annotated[str | None, spec_option("--from", "Begin there")] = None,
    until: Annotated[str | None, spec_option("--to", "End there")] = None,
    as_json: AsJson = False,
) -> None:
    """Every record of a disk's redo log, one a line; needs no daemon."""
    log = RedoLog(*_locate(state_dir_of(ctx), name))
    try:
        first = log.bound(since, end=False) if since is not None else 0
        last = log.bound(until, end=True) if until is not None else SEQ_ENDLESS
        if as_json:
            _print_json(log.records(first, last))
        else:
            _print_lines(log.records(first, last))
    finally:
        log.close()
    for damage in log.damaged():
        note(damage)


SEQ_ENDLESS = 1 << 63


def _print_json(records: Iterator[Record]) -> None:
    """A list, an object a line, written as it is read: there may be millions."""
    separator = "[\n"
    for record in records:
        sys.stdout.write(separator + json.dumps(record.as_dict(), ensure_ascii=False))
        separator = ",\n"
    sys.stdout.write("[]\n" if separator == "[\n" else "\n]\n")


def _print_lines(records: Iterator[Record]) -> None:
    print_line(
        f"{'SEQ':>12}  {'TIME':<29}  {'KIND':<15}  {'OFFSET':>16}  {'LENGTH':>12}  "
        f"{'FILE':<17}  {'AT':>10}  NOTES"
    )
    for record in records:
        extent = record.length is not None
        print_line(
            f"{record.seq:>12}  {units.format_time(record.time, decimals=3):<29}  "
            f"{record.kind:<15}  {record.offset if extent else '-':>16}  "
            f"{record.length if extent else '-':>12}  {record.file:<17}  "
            f"{record.file_offset:>10}  {record.notes()}".rstrip()
        )


def _locate(state_dir: Path, name: str) -> tuple[Path, bytes, Path]:
    """The journal's directory, the disk's identity, and the table of the host's wall clock."""
    path = state_dir / "disks" / name / "disk.json"
    try:
        config = json.loads(path.read_text())
        return Path(config["journal"]), bytes.fromhex(config["uuid"]), state_dir / "clock.json"
    except FileNotFoundError:
        raise CliError(f"there is no {path}: name a disk, or another --state-dir") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CliError(f"{path} cannot be understood ({error!r}): restore it") from None


@dataclass(frozen=True, slots=True)
class Record:
    """One record. ``offset`` and ``length``: bytes of the disk, None if it is about none.

    ``time`` in UNIX seconds, None if the wall clock's table is lost; ``source``: of a ref, the seq
    it refers to; ``body``: what a record that is no version says; ``file_offset``: of its payload.
    """

    seq: int
    stamp: int
    time: float | None
    kind: str
    offset: int | None
    length: int | None
    source: int | None
    body: dict[str, Any] | None
    barrier: bool
    durable: bool
    file: str
    file_offset: int

    def as_dict(self) -> dict[str, Any]:
        """As in ``--json``."""
        return {field: getattr(self, field) for field in self.__slots__}

    def notes(self) -> str:
        """What has no column of its own."""
        notes = [] if self.durable else ["not known to be durable"]
        notes += ["barrier"] if self.barrier else []
        notes += [f"from seq:{self.source}"] if self.source is not None else []
        notes += [json.dumps(self.body, ensure_ascii=False)] if self.body else []
        return ", ".join(notes)


class RedoLog:
    """A redo log's records in order, read once from its files; one segment's table at a time."""

    def __init__(self, directory: Path, disk: bytes, clock_file: Path) -> None:
        from journal.format import Log
        from journal.segment import SegmentLister
        from journal.storage import RealStorage

        if not (directory / "redo").is_dir():
            raise CliError(f"{directory} holds no journal: mount it, or correct disk.json")
        self._storage = RealStorage(directory)
        self._lister = SegmentLister(self._storage, Log.REDO, disk)
        self._infos = [each for each in self._lister.refresh() if each.first_seq <= each.bound]
        self._clock_file = clock_file
        self._clock = self._load_clock()
        self._lost: list[str] = []
        self._files: dict[str, Any] = {}
        self._durable = max((each.header.durable for each in self._infos), default=0)

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def damaged(self) -> list[str]:
        """What could not be read, a line each."""
        return [*map(str, self._lister.damaged.values()), *self._lost]

    # ------------------------------------------------------------------------------------ tables
    def _table(self, info: SegmentInfo) -> Table:
        """The segment's table; what it says about being durable is taken in."""
        from journal.segment import Scanner, load_table, open_segment

        for name in [name for name in self._files if name != info.name]:
            self._files.pop(name).close()
        file = self._files.get(info.name)
        if file is None:
            file = self._files[info.name] = open_segment(self._storage, info.name)
        if info.trailer is not None:
            # A footer is written when all records before it are durable.
            self._durable = max(self._durable, min(info.trailer.last_seq, info.bound))
            return load_table(file, info)
        scanner = Scanner(file, info)
        table = scanner.advance(info.bound)
        self._durable = max(self._durable, scanner.durable)
        return table

    def _tables(self, first: int, last: int) -> Iterator[tuple[SegmentInfo, Table, set[int]]]:
        """Segments with records in the range, their tables, and the barriers among them."""
        from journal.errors import JournalError

        chosen = [
            info
            for info, after in zip(self._infos, [*self._infos[1:], None], strict=True)
            if info.first_seq <= last and (after is None or after.first_seq > first)
        ]
        held: list[tuple[SegmentInfo, Table]] = []
        for info in chosen:
            try:
                table = self._table(info)
            except JournalError as error:
                self._lost.append(str(error))
                continue
            # The barrier at a segment's end is told by the first batches of the next one.
            held.append((info, table))
            if len(held) == 2:
                yield (*held[0], _barriers(held[0][1]) | _barriers(table))
                del held[0]
        for info, table in held:
            yield info, table, _barriers(table)

    def records(self, first: int, last: int) -> Iterator[Record]:
        """Records with first <= seq <= last, in order."""
        if not self._infos:
            return
        # Whether a record is durable may be known from later ones only.
        self._table(self._infos[-1])
        for info, table, barriers in self._tables(first, last):
            for row in range(max(0, first - table.first_seq), len(table.rows)):
                if table.first_seq + row > last:
                    break
                yield self._record(info, table, row, barriers)

    def _record(self, info: SegmentInfo, table: Table, row: int, barriers: set[int]) -> Record:
        from journal.format import BLOCK, CONTROLS, VERSIONS, Kind

        entry, seq = table.rows[row], table.first_seq + row
        kind = int(entry["kind"])
        name = Kind(kind).name.lower().replace("_", "-") if kind in set(Kind) else f"kind-{kind}"
        extent = kind in VERSIONS
        stamp = int(table.batches["stamp"][table.batch_of(row)])
        return Record(
            seq=seq,
            stamp=stamp,
            time=self._time(stamp),
            kind=name,
            offset=int(entry["block"]) * BLOCK if extent else None,
            length=int(entry["nblocks"]) * BLOCK if extent else None,
            source=int(entry["arg"]) if kind == Kind.REF else None,
            body=self._body(info, table, row) if kind in CONTROLS else None,
            barrier=seq in barriers,
            durable=seq <= self._durable,
            file=info.name,
            file_offset=int(entry["payload"]),
        )

    def _body(self, info: SegmentInfo, table: Table, row: int) -> dict[str, Any]:
        from journal.errors import Corruption
        from journal.segment import open_segment, read_body

        file = open_segment(self._storage, info.name)
        try:
            body = json.loads(read_body(file, table, row, name=info.name) or b"{}")
        except (Corruption, ValueError) as error:
            self._lost.append(str(error))
            return {"damaged": True}
        finally:
            file.close()
        return body if isinstance(body, dict) else {"": body}

    # ------------------------------------------------------------------------------------- times
    def _load_clock(self) -> ClockTable | None:
        from replay.target import ClockTable

        try:
            entries = json.loads(self._clock_file.read_text())
            return ClockTable([(int(stamp), int(ahead)) for stamp, ahead in entries])
        except (OSError, ValueError, TypeError):
            return None

    def _time(self, stamp: int) -> float | None:
        return None if self._clock is None else self._clock.wall_of(stamp) / 1e9

    def bound(self, text: str, *, end: bool) -> int:
        """The first (or, with ``end``, the last) seq of a stretch that a SPEC limits.

        It need not be openable. A bookmark is looked for in the log itself.

        :raises CdpError: no SPEC, or nothing that the log knows.
        """
        from replay.target import AtBookmark, AtSeq, AtTime, Now, parse_spec

        spec: Spec = parse_spec(text, now_ns=time.time_ns(), zone=units.local_zone())
        if isinstance(spec, AtBookmark):
            seq = self._bookmark(spec.label)
            if seq is not None:
                return seq
            if spec.otherwise is None:
                hint = f", and {spec.hint}" if spec.hint else ""
                raise CliError(f"the log holds no bookmark {spec.label!r}{hint}: name a seq")
            spec = spec.otherwise
        match spec:
            case AtSeq(seq):
                return seq
            case Now():
                return SEQ_ENDLESS
            case AtTime(wall_ns):
                return self._seq_at(wall_ns, end=end)
        raise AssertionError(spec)

    def _bookmark(self, label: str) -> int | None:
        """The seq that the newest bookmark of this label names."""
        from journal.format import Kind

        found = None
        for info, table, _ in self._tables(0, SEQ_ENDLESS):
            for row in (table.rows["kind"] == Kind.BOOKMARK).nonzero()[0].tolist():
                body = self._body(info, table, row)
                if body.get("label") == label:
                    found = int(body.get("target", table.first_seq + row))
        return found

    def _seq_at(self, wall_ns: int, *, end: bool) -> int:
        """The last record at or before a time, or the first at or after it; of a time that was
        shown twice, the outer one."""
        if self._clock is None:
            raise InvalidInput(f"{self._clock_file} is lost, so times mean nothing: name seqs")
        stamps = self._clock.stamps_at(wall_ns)
        stamp = stamps[-1] if end else stamps[0]
        seq = 0
        for _, table, _ in self._tables(0, SEQ_ENDLESS):
            side: Any = "right" if end else "left"
            at = int(table.batches["stamp"].searchsorted(stamp, side))
            if at == len(table.batches):
                seq = table.last_seq + (0 if end else 1)
                continue
            first = int(table.batches["first_seq"][at])
            return first - 1 if end else first
        return seq


def _barriers(table: Table) -> set[int]:
    """The seqs at which a client was told that everything before is durable."""
    return set(table.batches["barrier"].tolist())
