"""The power goes, on a real file system: journal and backing are on a device that is recorded.

A disk lives through writes, trims, bookmarks, a rollback, a crash, a clean stop and a start, with
apply, reclaim and giving up history at work. Then the device is put together as cuts at flushes and
anywhere between may have left it, is mounted, and `cdpd` is started on it, in what it takes for the
next boot: everything flushed is there, the rest is a prefix, the past is exact.

    CDP_CRASH_FULL=1    500 images (CDP_POWER_CUTS of them) instead of a handful
"""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from cdp.nbd.client import NbdClient
from tests.crash.numbered_disk import (
    BLOCK,
    SIZE,
    Change,
    State,
    States,
    connected,
    numbers,
    read,
    read_point,
)
from tests.crash.recorded_disk import Cutter, Recording
from tests.interop.commands import Commands
from tests.interop.daemon import Daemon
from tests.interop.devices import MAKE, call, loop_device, mounted

MIB = 1 << 20
FULL = bool(os.environ.get("CDP_CRASH_FULL"))
CUTS = int(os.environ.get("CDP_POWER_CUTS", "500" if FULL else "4"))
SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB}
SHARE = {"ext4": 0.75, "xfs": 0.25}
POINTS = 6
# What `$0` names takes the place of the kernel's name for this boot, for the command behind it.
NEXT_BOOT = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'


class Story:
    """What was done to the disk, and where the device's log was meanwhile."""

    def __init__(self, rng: random.Random, position: Callable[[], int]) -> None:
        self.rng, self._position = rng, position
        self.states = States()
        self.begun = [0]  # the position when each operation began
        self.safe: list[tuple[int, int]] = []  # from this position on, this operation must survive
        self.bookmarks: dict[str, tuple[int, int]] = {}  # the same, by label

    def begin(self, state: State) -> None:
        """An operation begins that makes this of the disk."""
        self.begun.append(self._position())
        self.states.add(state)

    def flushed(self) -> None:
        """Everything so far was said to be durable."""
        self.safe.append((self._position(), self.states.last))

    def bookmark(self, cdp: Commands, label: str) -> None:
        """A bookmark of this moment."""
        cdp("bookmark", "add", "d", label)
        self.flushed()
        self.bookmarks[label] = self.safe[-1]

    def write(self, client: NbdClient, count: int) -> None:
        """Operations of all kinds, one after the other."""
        for _ in range(count):
            change, number = Change.random(self.rng), self.states.last + 1
            self.begin(change.after(self.states.newest, number))
            change.send(client, number)
            if change.fua:
                self.flushed()
            if self.rng.random() < 0.03:
                client.flush()
                self.flushed()

    def must(self, position: int) -> int:
        """The last operation that a cut at this position has to leave."""
        return max(number for at, number in self.safe if at <= position)

    def may(self, position: int) -> int:
        """The last operation that can have left anything by then."""
        return max(number for number, at in enumerate(self.begun) if at <= position)


def live(daemon: Daemon, story: Story, count: int) -> None:
    """Operations on the disk, once it is served."""
    with connected(daemon, "d") as client:
        story.write(client, count)


def live_through(daemon: Daemon, story: Story) -> None:
    """The disk's life, from its birth to a clean stop."""
    cdp = Commands(daemon.directory)
    words = ["--size", str(SIZE), "--segment-bytes", "1M", "--journal-limit", "6M"]
    cdp("disk", "add", "d", *words)
    story.flushed()
    live(daemon, story, 200)
    story.bookmark(cdp, "first")
    live(daemon, story, 300)
    back = story.states[story.bookmarks["first"][1]]
    story.begin(back)
    cdp("rollback", "d", "--to", "first", "--yes", "--disconnect")
    story.flushed()
    live(daemon, story, 200)
    story.bookmark(cdp, "second")
    live(daemon, story, 100)
    daemon.kill_all()
    daemon.start()
    live(daemon, story, 200)
    story.begin(story.states.newest)
    assert daemon.stop() == 0, daemon.said()
    story.flushed()
    daemon.start()
    live(daemon, story, 100)
    cdp("disk", "drain", "d")
    story.flushed()
    assert daemon.stop() == 0, daemon.said()


class Checker:
    """What must be true of every image."""

    def __init__(self, story: Story, rng: random.Random) -> None:
        self.story, self._rng = story, rng

    def check(self, daemon: Daemon, position: int) -> None:
        """The newest content, the past, the bookmarks, the backing alone."""
        story, cdp = self.story, Commands(daemon.directory)
        must, may = story.must(position), story.may(position)
        live = story.states.find(read(daemon, "d"), must, may)[-1]
        status = cdp.disk("d")
        for label, (at, number) in story.bookmarks.items():
            if at <= position:
                assert read(daemon, f"d@{label}") == story.states[number], label
        self._points(daemon, int(status["window_start_seq"]), int(status["durable_seq"]), live)
        cdp("scrub", "d")
        number = story.states.last + 1
        with connected(daemon, "d") as client:
            client.write(0, number.to_bytes(8, "little") * (BLOCK // 8), fua=True)
        newest = (number, *story.states[live][1:])
        assert read(daemon, "d") == newest
        backing = Path(cdp.disk("d")["backing"])
        cdp("disk", "release", "d")  # a stop would leave what is trimmed where it is
        assert daemon.stop() == 0, daemon.said()
        assert numbers(backing.read_bytes()) == newest

    def _points(self, daemon: Daemon, first: int, last: int, live: int) -> None:
        """Seqs of the window: each is a state of the story, none is older than the one before."""
        span = range(first, last + 1)
        at_least = 0
        for seq in sorted(self._rng.sample(span, min(POINTS, len(span)))):
            state = read_point(daemon, f"d@seq:{seq}")
            if state is not None:  # else in a hole, or inside a rollback
                at_least = self.story.states.find(state, at_least, live)[0]


def choose(cutter: Cutter, story: Story, count: int, rng: random.Random) -> list[int]:
    """Places to cut, in order: a quarter at flushes, the others where something is at stake."""
    places: dict[bool, list[int]] = {True: [], False: []}
    for cut in range(cutter.first(story.safe[0][0]), len(cutter) + 1):
        places[cutter.at_stake(cut) > 0].append(cut)
    assert places[True], "the device was never written to without a flush"
    flushed = rng.sample(places[False], min(len(places[False]), count // 4))
    return sorted(flushed + rng.sample(places[True], min(len(places[True]), count - len(flushed))))


@pytest.mark.crash
@pytest.mark.timeout(60 + 20 * CUTS)
@pytest.mark.usefixtures("may_mount")
@pytest.mark.needs_tool("nbdfuse", "qemu-nbd", "losetup", "unshare", "mkfs.ext4", "mkfs.xfs")
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_what_was_flushed_survives_a_power_cut(short_tmp: Path, seed: int, kind: str) -> None:
    rng = random.Random(f"{seed}/{kind}")
    image, place = short_tmp / "image", short_tmp / "mnt"
    with image.open("wb") as file:
        file.truncate(SIZES[kind])
    call(*MAKE[kind], str(image))
    recording = Recording(image)
    story = Story(rng, lambda: recording.position)
    with recording.attached(short_tmp) as loop, mounted(loop, place):
        daemon = Daemon(place / "state")
        daemon.log = short_tmp / "log"
        with daemon:
            live_through(daemon, story)
    cutter, checker = Cutter(recording), Checker(story, rng)
    for number in choose(cutter, story, round(CUTS * SHARE[kind]), rng):
        cutter.cut(number, image, rng)
        boot = short_tmp / "boot"
        boot.write_text(f"{uuid.UUID(int=rng.getrandbits(128))}\n")
        with loop_device(image) as loop, mounted(loop, place):
            daemon = Daemon(place / "state")
            daemon.log = short_tmp / "log"
            daemon.log.unlink(missing_ok=True)
            daemon.prefix = ["unshare", "--mount", "sh", "-c", NEXT_BOOT, str(boot)]
            with daemon:
                try:
                    checker.check(daemon, cutter.position(number))
                except BaseException as error:
                    error.add_note(
                        f"cut after {number} of {len(cutter)} requests to the device, "
                        f"{cutter.at_stake(number)} at stake"
                    )
                    error.add_note(daemon.said())
                    raise
    cutter.close()
