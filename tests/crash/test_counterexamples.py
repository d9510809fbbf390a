"""Each way to lose or falsify data that a search of the rules has found, lived through.

The rules of apply, reclaim, release, rollback and garbage were searched exhaustively as an
executable specification; with one clause of them turned off the search prints the shortest history
in which a point, the live disk or a before-image is wrong. Those are the histories below: with all
clauses on they must end well, each crash in them included. A step is one line of words:

* ``write 0``, ``trim 0``: of a block; ``sync``; ``close``: the segment being written is full;
* ``apply``, ``apply 1`` (so many blocks at most), ``finish``, ``release``, ``reclaim``, ``sweep``;
  what may not be done now is expected to refuse (``no reclaim``);
* ``window 1``, ``pin 0``; ``rollback 0``; ``begin 0`` and ``commit``: one in two steps;
* ``apply until sync undo``: it is killed before the storage's first operation of that name;
* ``killed``: all processes, ``curator``: it alone; ``power undo``: the power goes, and takes all
  that is not synced of the undo log, and nothing else (``power`` alone: any part of everything;
  ``power -``: nothing).

After each step at which all processes live everything a reader may see is compared with a model; at
the end the backing alone is the disk, the index can be made anew, and both logs shrink to nothing.
(Of a live read: `tests/cdp/recorder/test_loop.py`, "what is read is applied at that moment".)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroaring import BitMap

from journal.errors import Conflict
from journal.format import Kind
from replay import reclaim
from replay.apply import Applier
from replay.history import History
from replay.work import Work
from tests.crash.curator_checks import check, check_backing, check_emptied, check_index
from tests.crash.curator_model import World
from tests.crash.curator_storage import BACKING, values
from tests.crash.curator_story import in_pieces, small_buffers
from tests.crash.sim_storage import Crash, SimFile

pytestmark = [
    pytest.mark.crash,
    pytest.mark.expect_log("were acknowledged|history before seq", required=False),
]

APPLIED = "sync; apply; finish"

# The name of a history: what would be wrong without the clause that it is about.
HISTORIES = {
    # --------------------------------------------------------------------------- what a reader does
    "an image is looked at before the redo log": f"""write 0; write 0; write 0; close; {APPLIED};
        reclaim until sync undo; power undo""",
    "an image is looked at before the redo log, and some images are lost": f"""write 0; write 0;
        write 0; close; {APPLIED}; reclaim until sync undo; power""",
    "the image with the largest end is taken": f"""write 0; write 0; close; {APPLIED}; reclaim""",
    "a trimmed block is read from the backing": f"trim 0; {APPLIED}; release",
    # -------------------------------------------------------------------------------- before apply
    "nothing is saved before the overwrite": f"write 0; {APPLIED}",
    "the overwrite is there and its image is not": "write 0; sync; apply; power undo",
    "what was saved by one that was killed is not synced": """write 0; sync;
        apply until sync undo; killed; apply; power undo""",
    "what was saved by a curator that was killed is not synced": """write 0; sync;
        apply until sync undo; curator; apply; power undo""",
    "applied is there and the overwrite is not": f"write 0; {APPLIED}; power backing",
    "applied would be there and the overwrite is not": """write 0; sync; apply;
        finish until sync backing; power backing""",
    "what a group has written is saved when it is repeated": """write 0; trim 0; sync; apply;
        killed; apply; finish""",
    "what a group has written is saved when it is repeated after it was released": f"""write 0;
        trim 0; {APPLIED}; release; write 0; sync; apply; curator; apply; finish""",
    "what is not durable is applied": "write 0; no apply; power redo",
    "applied lies inside a rollback that is aborted then": """write 0; sync; begin 0; sync; apply;
        finish; power -""",
    "applied lies inside a rollback whose commit is lost": """write 0; sync; begin 0; sync; apply;
        finish; commit; power redo""",
    # -------------------------------------------------------------------------- reclaim and release
    "a trim is reclaimed and the backing still holds what was there": f"""trim 0; close; {APPLIED};
        reclaim""",
    "the segment is gone and what was saved of it is not there": f"""write 0; write 0; close;
        {APPLIED}; reclaim; power undo""",
    "the segment goes and what was saved of it is not there": f"""write 0; write 0; close;
        {APPLIED}; reclaim until unlink redo; power undo""",
    "nothing is saved before zeroes": f"trim 0; {APPLIED}; release",
    "zeroes come before the image is synced": f"""trim 0; {APPLIED}; release until sync undo;
        power undo""",
    "zeroes are there and the image is not": f"""trim 0; {APPLIED}; release until sync backing;
        power undo""",
    "zeroes are there, synced, and the image is not": f"trim 0; {APPLIED}; release; power undo",
    "the trim is reclaimed and the zeroes are lost": f"""trim 0; close; {APPLIED}; release; reclaim;
        power backing""",
    "a block counts as zero though it was written since": """trim 0; write 0; trim 0; sync; apply 1;
        finish; release; apply 1; finish; apply; finish; close; sync; apply; finish; reclaim""",
    "nothing is saved before a segment goes": f"write 0; write 0; close; {APPLIED}; reclaim",
    "what is not applied is reclaimed": "write 0; close; sync; no reclaim",
    "reclaim begins while an apply is not finished": f"""write 0; close; {APPLIED}; write 0; sync;
        apply; reclaim""",
    "apply begins while a reclaim is not finished": f"""write 0; close; {APPLIED}; write 0; sync;
        reclaim until sync undo; curator; apply; finish; reclaim""",
    "reclaim begins before all is applied again": f"""write 0; close; {APPLIED}; write 0; sync;
        apply; killed; no reclaim; apply; finish; reclaim""",
    "reclaim begins before all is applied again after a power loss": f"""write 0; close; {APPLIED};
        write 0; sync; apply; power -; no reclaim; apply; finish; reclaim""",
    # ----------------------------------------------------------------------------- what is openable
    "an overwrite relies on a window that is not durable": """write 0; sync; window 1; apply;
        power journal""",
    "an overwrite relies on a window that was about to become durable": """write 0; sync;
        window 1 until sync catalog; killed; apply; power journal""",
    "an image is dropped that a point in the middle of its range needs": f"""write 0; write 1;
        {APPLIED}; pin 0; window 2; roll; sweep; curator; sweep""",
    "the source of a rollback is not openable": f"""write 0; {APPLIED}; rollback 0; write 0; sync;
        window 1; apply; finish; close; {APPLIED}; reclaim""",
    "the source of a rollback is gone before it begins": """write 0; sync; begin 0; window 1;
        apply; sync; commit; sync; apply; finish""",
    "refs of a rollback that was aborted are applied": """write 0; sync; begin 0; sync; power -;
        apply; finish""",
    "a point inside a rollback is openable": f"write 0; sync; rollback 0; {APPLIED}",
    # ----------------------------------------------------------------------------- earlier wordings
    "a group that ends in a trim is not written": f"write 0; trim 0; close; {APPLIED}; reclaim",
    "a group that ends in a trim is not written and the next one saves too little": f"""write 0;
        trim 0; {APPLIED}; write 0; {APPLIED}""",
    "a trim after a trim is taken for overwritten": f"trim 0; trim 0; close; {APPLIED}; reclaim",
    "a trim after a trim in another segment is taken for overwritten": f"""trim 0; close; trim 0;
        close; {APPLIED}; reclaim; reclaim""",
    "a write between trims hides that nothing was saved": """trim 0; write 0; trim 0; sync; apply 1;
        finish; apply 1; finish; apply; finish""",
    "a write between trims hides that nothing was saved by one that was killed": """trim 0;
        write 0; trim 0; sync; apply 1; curator; apply 1; curator; apply; finish""",
    "release meets an apply that is not finished": """trim 0; write 0; sync; apply 1; finish;
        apply 1; no release; finish; release""",
    "a record that is not applied counts as a successor": f"""write 0; {APPLIED}; write 0; close;
        no reclaim; sync; apply; reclaim until unlink redo; curator; apply; finish; reclaim""",
}  # fmt: skip

LOST: dict[str, Callable[[str], bool]] = {
    "undo": lambda name: name.startswith("undo/"),
    "redo": lambda name: name.startswith("redo/"),
    "backing": lambda name: name == "backing",
    "journal": lambda name: name != "backing",
    "-": lambda _name: False,
}


class Player:
    """Does what the words say."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.alive = True

    def play(self, line: str) -> None:
        """One step, and what must hold behind it."""
        line, _, until = line.partition(" until ")
        what, *numbers = line.split()
        if until:
            self._interrupted(what, numbers, until)
            return
        if what == "no":
            self._refused(numbers[0])
        else:
            getattr(self, what)(*numbers)
        self.alive |= what in ("killed", "curator", "power")
        if self.alive:
            check(self.world, eyes=("reader",))

    def _interrupted(self, what: str, numbers: list[str], until: str) -> None:
        world = self.world

        def stop() -> None:
            if world.sim.log[-1].startswith(until):
                raise Crash

        world.on_operation = stop
        try:
            with pytest.raises(Crash):
                getattr(self, what)(*numbers)
        finally:
            world.on_operation = lambda: None
        self.alive = False

    def _refused(self, what: str) -> None:
        world = self.world
        if what == "release":
            if world.running.applier.settled:
                return  # it is finished at once where a sync is not told of later
            with pytest.raises(Conflict):
                world.release()
        else:
            assert not getattr(world, what)()

    # ------------------------------------------------------------------------------------- verbs
    def write(self, block: str) -> None:
        self.world.write(int(block))

    def trim(self, block: str) -> None:
        self.world.trim(int(block))

    def sync(self) -> None:
        self.world.sync()

    def close(self) -> None:
        self.world.fill_segments()

    def apply(self, blocks: str | None = None) -> None:
        while self.world.apply(int(blocks or 65536)) and blocks is None:
            pass

    def finish(self) -> None:
        self.world.finish()

    def release(self) -> None:
        self.world.release()

    def reclaim(self) -> None:
        assert self.world.reclaim()

    def roll(self) -> None:
        self.world.roll()

    def sweep(self) -> None:
        self.world.sweep()

    def window(self, seq: str) -> None:
        self.world.move_window(int(seq))

    def pin(self, seq: str) -> None:
        self.world.pin(int(seq))

    def rollback(self, seq: str) -> None:
        self.world.rollback(int(seq))

    def begin(self, seq: str) -> None:
        self.world.running_points.pin("p", int(seq), owner="rollback", opened_ns=0, max_age_s=0)
        self.world.control(Kind.ROLLBACK_BEGIN, {"to_seq": int(seq)})
        self.world.refs([(0, int(seq))])

    def commit(self) -> None:
        self.world.control(Kind.ROLLBACK_COMMIT, {})

    def killed(self) -> None:
        self.world.kill_both()

    def curator(self) -> None:
        self.world.kill_curator()

    def power(self, lost: str | None = None) -> None:
        self.world.lose_power("random" if lost is None else LOST[lost])


def live_through(root: Path, name: str, *, pieces: bool) -> None:
    """One of the histories, and its end."""
    with in_pieces() if pieces else small_buffers(64):
        world = World(root, 2 + pieces)
        player = Player(world)
        for line in HISTORIES[name].split(";"):
            player.play(" ".join(line.split()))
        world.pin(None)
        world.running_points.unpin("p")
        check_backing(world)
        check(world)
        if pieces:
            check_index(world)
        else:
            check_emptied(world)
        world.close()


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_that_a_search_has_found(tmp_path: Path, name: str, pieces: bool) -> None:
    live_through(tmp_path, name, pieces=pieces)


def _undo_is_not_synced(patch: pytest.MonkeyPatch) -> None:
    sync = SimFile.sync
    patch.setattr(
        SimFile, "sync", lambda file: None if file._name.startswith("undo/") else sync(file)
    )


def _backing_is_not_synced(patch: pytest.MonkeyPatch) -> None:
    sync = SimFile.sync
    patch.setattr(SimFile, "sync", lambda file: None if file._name == BACKING else sync(file))


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the overwrite is there and its image is not": _undo_is_not_synced,
    "zeroes are there, synced, and the image is not": _undo_is_not_synced,
    "the segment is gone and what was saved of it is not there": _undo_is_not_synced,
    "applied is there and the overwrite is not": _backing_is_not_synced,
    "the trim is reclaimed and the zeroes are lost": _backing_is_not_synced,
    "nothing is saved before the overwrite": lambda patch: patch.setattr(
        Work, "save_backing", lambda *_: None
    ),
    "nothing is saved before zeroes": lambda patch: patch.setattr(
        Work, "save_backing", lambda *_: None
    ),
    "nothing is saved before a segment goes": lambda patch: patch.setattr(
        reclaim, "plan", lambda *_: iter(())
    ),
    "a trim is reclaimed and the backing still holds what was there": lambda patch: patch.setattr(
        reclaim, "trimmed", lambda *_: BitMap()
    ),
    "reclaim begins before all is applied again": lambda patch: patch.setattr(
        Applier, "settled", property(lambda self: self.done == self.applied)
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_history_ends_badly_with_its_rule_broken(tmp_path: Path, name: str) -> None:
    """The histories are able to fail."""
    with pytest.MonkeyPatch.context() as patch:
        BROKEN[name](patch)
        with pytest.raises(AssertionError):
            live_through(tmp_path, name, pieces=False)


# ---------------------------------------------------------------- what happens while somebody reads
@contextlib.contextmanager
def once_behind(history: History, name: str, act: Callable[[], Any]) -> Iterator[list[str]]:
    """Do something right behind the first call of a method; the list says that it was done."""
    method, done = getattr(history, name), list[str]()

    def called(*arguments: Any) -> Any:
        result = method(*arguments)
        if not done:
            done.append(name)
            act()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, name, called)
        yield done
    assert done == [name]


@pytest.mark.parametrize("behind", ["newest_le", "smallest_gt", "read_backing"])
@pytest.mark.parametrize("reclaimed", [False, True])
def test_a_block_is_overwritten_while_it_is_read(
    tmp_path: Path, behind: str, reclaimed: bool
) -> None:
    """! Not in the redo log, not in the undo log, and not in the backing any more: look again."""
    world = World(tmp_path, 1)
    world.write(1)
    world.apply_all()
    reader = world.reader()
    reader.refresh()

    def overwrite() -> None:
        world.write(0)
        world.fill_segments()
        world.apply_all()
        if reclaimed:
            while world.reclaim():
                pass

    with once_behind(reader, behind, overwrite):
        assert values(reader.read(1, 0, world.blocks)) == world.model[1]
    check(world)
