"""PostgreSQL on a protected disk, under pgbench: every point of the past is a database that starts.

Only with CDP_CRASH_FULL=1 (`make test-crash`, which installs PostgreSQL): it takes an hour.

    CDP_PG_POINTS    points opened while pgbench runs (200)
    CDP_PG_KILLS     kills of the daemon's processes while pgbench runs (50)
    CDP_PG_RATE      transactions/s at most (150)
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from tests.crash.postgresql import Bench, Cluster, Counts, programs
from tests.crash.programs import FULL, Past, file_system, kill, victims
from tests.interop.commands import eventually
from tests.interop.daemon import Daemon
from tests.interop.devices import call, device, mounted

POINTS = int(os.environ.get("CDP_PG_POINTS", "200"))
KILLS = int(os.environ.get("CDP_PG_KILLS", "50"))
POINT_EVERY = 10  # kills
PATIENCE_SECONDS = 120.0

pytestmark = [
    pytest.mark.crash,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not FULL, reason="takes an hour: CDP_CRASH_FULL=1, or make test-crash"),
    pytest.mark.usefixtures("may_mount", "has_postgresql"),
    pytest.mark.needs_tool("nbdfuse", "qemu-nbd", "losetup", "mkfs.ext4", "runuser", "psql"),
]


@pytest.fixture
def has_postgresql(not_here: Callable[[str], NoReturn]) -> None:
    """The server's programs, which Debian keeps away from PATH."""
    if programs() is None:
        not_here("PostgreSQL is not installed")


class Run:
    """pgbench on a cluster on a disk, and what was found at points of its past."""

    def __init__(self, daemon: Daemon, short_tmp: Path, root: Path, rng: random.Random) -> None:
        self.daemon, self.folder, self.rng = daemon, short_tmp, rng
        self.cluster = Cluster(root / "data", short_tmp / "scratch")
        self.bench = Bench(self.cluster)
        self.found: list[tuple[Counts, int]] = []
        self.past: Past | None = None

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """While pgbench runs; it ends with the server's death."""
        self.cluster.create()
        with self.cluster.running(durable=True):
            self.bench.create()
            call("sync", "-f", str(self.cluster.data))
            self.past = Past(self.daemon, "d", self.folder, self.rng)
            self.bench.start()
            self.go_on(50)
            yield
            self.bench.end()

    def go_on(self, count: int) -> None:
        """Until as many more transactions are committed."""
        goal = self.bench.count() + count
        eventually(lambda: self.bench.count() >= goal, self.daemon.said, PATIENCE_SECONDS)

    def check_a_point(self) -> None:
        """A database of the past starts, recovers, and is what it was."""
        assert self.past is not None
        with self.past.random() as (root, at_ns):
            self.found.append((self._checked(root), at_ns))

    def _checked(self, root: Path) -> Counts:
        copy = Cluster(root / "data", self.folder / "scratch-copy")
        copy.log.unlink(missing_ok=True)
        # As on another host: whose process this was is nobody's there.
        (copy.data / "postmaster.pid").unlink(missing_ok=True)
        with copy.running(durable=False):
            counts = copy.check()
        assert "redo starts at" in copy.log.read_text(), "it was not a running database"
        copy.check_checksums()
        return counts

    def check_end(self) -> Counts:
        """After everything: what is on the disk, by a client that was not there before."""
        with device(self.daemon.uri("d"), self.folder / "fuse") as loop:
            with mounted(loop, self.folder / "mnt") as root:
                counts = self._checked(root)
        self.bench.assert_possible(counts, time.time_ns())
        for seen, at_ns in self.found:
            self.bench.assert_possible(seen, at_ns)
        return counts


@contextmanager
def running(short_tmp: Path, rng: random.Random) -> Iterator[Run]:
    """A run; its end is checked and its figures are printed."""
    short_tmp.chmod(0o711)  # for PostgreSQL's user
    with Daemon(short_tmp / "state") as daemon:
        words = ["--size", "1G", "--segment-bytes", "16M", "--journal-limit", "2G"]
        daemon.cdp("disk", "add", "d", *words)
        with file_system(daemon, "d", short_tmp) as root:
            run = Run(daemon, short_tmp, root, rng)
            with run.going_on():
                yield run
        daemon.kill_all()
        daemon.start()
        counts = run.check_end()
        assert run.past is not None
        print(
            f"{len(run.found)} points opened, {run.past.refused} refused,",
            f"{sum(counts)} transactions",
        )


def test_every_point_of_a_running_pgbench_is_a_whole_database(short_tmp: Path, seed: int) -> None:
    with running(short_tmp, random.Random(seed)) as run:
        for _ in range(POINTS):
            run.check_a_point()


def test_a_running_pgbench_survives_kills_of_the_daemon(short_tmp: Path, seed: int) -> None:
    rng = random.Random(seed)
    with running(short_tmp, rng) as run:
        for number, victim in enumerate(victims(rng, KILLS), 1):
            run.go_on(rng.randrange(1, 200))
            kill(run.daemon, "d", victim)
            run.go_on(20)
            if number % POINT_EVERY == 0:
                run.check_a_point()
