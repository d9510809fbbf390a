"""What must hold of a `World` at any time, and at its end."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable

from journal.entries import unpack_loc
from journal.format import BLOCK, Kind
from journal.segment import read_blocks
from replay.history import History
from tests.crash.curator_model import World, close
from tests.crash.curator_storage import BACKING, Record, values


def ascending(log: list[str], *wanted: str) -> None:
    """Operations that begin like this happened, in this order."""
    at = 0
    for want in wanted:
        rest = [number for number, line in enumerate(log[at:], at) if line.startswith(want)]
        assert rest, f"no {want!r} behind {at} in {log}"
        at = rest[0] + 1


SOME_POINTS = 5
EYES = ("reader", "ours", "remembered")  # who looks at points: a viewer, the curator, an old viewer


def check(world: World, *, eyes: Iterable[str] = EYES, some: random.Random | None = None) -> None:
    """Every openable point, the live disk, and every before-image.

    ``some``: of the points only the first, the last and SOME_POINTS more that it chooses.
    """
    points = _check_points(world)
    if some is not None and len(points) > SOME_POINTS:
        points = sorted({points[0], points[-1], *some.sample(points, SOME_POINTS)})
    histories = []
    for who in eyes:
        match who:
            case "reader":
                history = world.reader()
            case "ours":
                history = world.running.history
            case _:
                history = world.places()._history
        histories.append(history)
        for seq in points:
            got = (
                world.remembered(seq) if who == "remembered"
                else values(history.read(seq, 0, world.blocks))
            )  # fmt: skip
            _expect(world, f"seq {seq}, {who}", got, seq)
    _check_images(world, histories[0])
    _check_live(world)
    if "reader" in eyes:
        close(histories[0])


def _check_points(world: World) -> list[int]:
    """The openable points: all of the window, all bookmarks, and nothing that is none."""
    points = world.openable()
    for seq in points:
        assert world.model[seq] is not None, f"seq {seq} is no point, yet openable"
    window = world.running.catalog.window_start
    for seq in range(window, world.frontier.durable + 1):
        assert world.model[seq] is None or seq in points, f"seq {seq} is in the window"
    world.marks = {
        label: seq for label, seq in world.marks.items()
        if world.records.get(seq, Record(0)).kind == Kind.BOOKMARK
    }  # fmt: skip
    there = world.running.catalog.bookmarks()
    assert all(seq in points for label, seq in world.marks.items() if label in there)
    return points


def _expect(world: World, what: str, got: list[int], seq: int) -> None:
    expected = world.model[seq]
    assert expected is not None
    padded = _padded(world, expected)
    assert got in (padded, expected), (
        f"{what}: {got}, not {expected} (applied {world.frontier.applied}, durable "
        f"{world.frontier.durable}, after {world.failures})"
    )


def _padded(world: World, disk: list[int]) -> list[int]:
    """A short last block has zeroes behind it: it counts as torn."""
    return [*disk[:-1], -1 if disk[-1] else 0] if world.short else disk


def _check_images(world: World, reader: History) -> None:
    """Each tells the truth: what the block held just before its end."""
    for info in reader.refresh().undo_infos.values():
        table = reader.undo.table(info)
        for row, entry in enumerate(table.rows):
            end, count = int(entry["arg"]), int(entry["nblocks"])
            assert entry["kind"] in (Kind.IMAGE, Kind.IMAGE_ZERO)
            assert end <= world.frontier.durable
            got = [0] * count
            if entry["kind"] == Kind.IMAGE:
                file = reader.undo.file(info)
                got = values(read_blocks(file, table, row, 0, count, name=info.name))
            before = next(d for d in reversed(world.model[:end]) if d is not None)
            for block, value in zip(range(int(entry["block"]), world.blocks), got, strict=False):
                true = _padded(world, before)[block]
                assert value in (true, before[block]), (
                    f"image of block {block} before {end}: {value}, was {before[block]} "
                    f"(after {world.failures})"
                )


def _check_live(world: World) -> None:
    """The unapplied tail, else zero if masked, else the backing."""
    world.advance()
    tail = {
        seq: record
        for seq, record in world.valid().items()
        if seq > max(world.seen, world.last_gap())
    }
    if world.pending is not None or any(r.kind == Kind.REF for r in tail.values()):
        return  # it is not served
    backing = world.sim.live[BACKING].live
    got = values(bytes(backing).ljust(world.blocks * BLOCK, b"\0"))
    for block in world.masks:
        got[block] = 0
    for _, record in sorted(tail.items()):
        value = int.from_bytes(record.data[:8], "little")
        got[record.block : record.block + record.count] = [value] * record.count
    expected = world.now()
    assert got in (expected, _padded(world, expected)), (
        f"live: {got}, not {expected} (applied {world.seen}, masks {world.masks}, "
        f"after {world.failures})"
    )


def check_backing(world: World) -> None:
    """After everything is applied and released the backing alone is the disk."""
    world.sync()
    for _ in range(1000):
        if world.act(lambda e: e.drain_step(world.frontier.durable, world.stamp)):
            break
        assert world.running.trouble is None, world.running.trouble
    else:
        raise AssertionError("does not drain")
    while world.release():
        pass
    got = values(bytes(world.sim.live[BACKING].live).ljust(world.blocks * BLOCK, b"\0"))
    assert got in (world.now(), _padded(world, world.now()))


def check_emptied(world: World) -> None:
    """With the window at the end and nothing kept both logs shrink to nothing.

    Sources of refs are openable for as long as these are in the redo log, so the last of them must
    not lie in the segment being written.
    """
    world.fill_segments()
    for label in list(world.running.catalog.bookmarks()):
        world.running_points.unbookmark(label)
    for pin in list(world.running.catalog.pins()):
        world.running_points.unpin(pin)
    world.move_window(world.frontier.durable)
    for _ in range(1000):
        if not world.reclaim():
            break
    world.running.policy.journal_limit = 1
    for _ in range(200):
        world.stamp += 2_000_000_000
        world.act(lambda engine: engine.step(world.stamp))
    assert len(world.running.redo.segments()) == 1
    left = world.reader()
    rows = [len(left.undo.table(i).rows) for i in left.refresh().undo_infos.values()]
    close(left)
    assert sum(rows) == 0, rows
    check(world)
    got = values(bytes(world.sim.live[BACKING].live).ljust(world.blocks * BLOCK, b"\0"))
    assert got in (world.now(), _padded(world, world.now()))


def check_index(world: World) -> None:
    """The index made bit by bit equals one made from the tables at once."""
    world.sync()
    world.kill_curator()  # so that every undo segment is closed
    _rest(world)
    before = _entries(world)
    world.stop_curator()
    shutil.rmtree(world.root / f"life-{world.lives}" / "index")
    (world.root / f"life-{world.lives}" / "index").mkdir()
    world.start_curator()
    _rest(world)
    after = _entries(world)
    assert before[0] == after[0]
    # What a recovery has copied from the end of an undo segment comes back there when the copy is
    # swept (R5 allows that: it is true).
    for number in before[1].keys() & after[1].keys():
        assert before[1][number] <= after[1][number]


def _rest(world: World) -> None:
    """Steps until there is nothing to do."""
    idle = 0
    for _ in range(300):
        idle = 0 if world.step() else idle + 1
        if idle == 3:
            return


def check_again(world: World) -> None:
    """Another recovery changes nothing: it adds a record that says that it was there."""
    before = _told(world)
    world.kill_both()
    assert world.frontier.durable == before[0] or (
        {world.records[seq].kind for seq in range(before[0] + 1, world.frontier.durable + 1)
         if seq in world.records} <= {Kind.CRASH}
    )  # fmt: skip
    after = _told(world)
    assert before[1] == {seq: r for seq, r in after[1].items() if seq <= before[0]}
    assert before[2:] == (after[2] - {s for s in after[2] if s > before[0]}, *after[3:])


def _told(
    world: World,
) -> tuple[int, dict[int, Record], set[int], set[tuple[int, int, int]], object]:
    """Durable, the records up to there, points, images, and what the catalog says of points."""
    durable = world.frontier.durable
    reader = world.reader()
    images = set()
    for info in reader.refresh().undo_infos.values():
        for entry in reader.undo.table(info).rows:
            images.add((int(entry["block"]), int(entry["nblocks"]), int(entry["arg"])))
    close(reader)
    catalog = world.running.catalog
    kept = (catalog.bookmarks(), catalog.pins(), catalog.window_start, catalog.reclaimed,
            catalog.voided)  # fmt: skip
    records = {seq: record for seq, record in world.records.items() if seq <= durable}
    return durable, records, set(world.openable()), images, kept


def _entries(world: World) -> list[dict[int, set[tuple[int, int, int]]]]:
    """Of both logs what their runs say, by segment."""
    snapshot = world.running.history.refresh()
    found: list[dict[int, set[tuple[int, int, int]]]] = []
    for runs, infos in (
        (world.running.redo_runs, snapshot.redo_infos),
        (world.running.undo_runs, snapshot.undo_infos),
    ):
        entries: dict[int, set[tuple[int, int, int]]] = {
            segment: set() for segment in runs.covered & infos.keys()
        }
        for part in runs.versions_in(0, (1 << 64) - 1):
            columns = (part.key.tolist(), part.seq.tolist(), part.loc.tolist())
            for each in zip(*columns, strict=True):
                segment = unpack_loc(each[2])[1]
                if segment in entries:
                    entries[segment].add(each)
        found.append(entries)
    return found
