"""PostgreSQL servers, as their own user, and pgbench with a ledger of what it committed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.crash.programs import bounds
from tests.interop.devices import call

USER = "postgres"
RATE = os.environ.get("CDP_PG_RATE", "150")  # transactions/s at most
CLIENTS = 4
SCALE = 2
START_SECONDS = 300
# Pages leave the little memory soon, checkpoints and vacuum never rest: much happens on the disk.
SETTINGS = {
    "listen_addresses": "''",
    "shared_buffers": "4MB",
    "max_connections": "20",
    "checkpoint_timeout": "30s",
    "max_wal_size": "24MB",
    "min_wal_size": "4MB",
    "autovacuum_naptime": "2s",
    "bgwriter_lru_maxpages": "500",
    "log_checkpoints": "off",
}
# pgbench's own transaction ("tpcb-like"), and a line in the ledger.
SCRIPT = """
\\set n :n + 1
\\set aid random(1, 100000 * :scale)
\\set bid random(1, 1 * :scale)
\\set tid random(1, 10 * :scale)
\\set delta random(-5000, 5000)
BEGIN;
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
SELECT abalance FROM pgbench_accounts WHERE aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = :bid;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime)
    VALUES (:tid, :bid, :aid, :delta, CURRENT_TIMESTAMP);
INSERT INTO ledger VALUES (:client_id, :n);
END;
"""
BALANCES = """
    SELECT (SELECT coalesce(sum(abalance), 0) FROM pgbench_accounts),
           (SELECT coalesce(sum(tbalance), 0) FROM pgbench_tellers),
           (SELECT coalesce(sum(bbalance), 0) FROM pgbench_branches),
           (SELECT coalesce(sum(delta), 0) FROM pgbench_history),
           (SELECT count(*) FROM pgbench_history),
           (SELECT count(*) FROM ledger),
           (SELECT count(*) FROM pgbench_accounts)
"""
LEDGER = "SELECT client, min(n), max(n), count(*) FROM ledger GROUP BY client"

Counts = tuple[int, ...]  # transactions of each client


def programs() -> Path | None:
    """Where PostgreSQL's programs are; None when they are not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


class Cluster:
    """A database cluster in a directory. `scratch`, for sockets and logs, is on another disk."""

    def __init__(self, data: Path, scratch: Path) -> None:
        self.data, self.scratch = data, scratch
        found = programs()
        assert found is not None
        self._programs = found
        scratch.mkdir(exist_ok=True)
        shutil.chown(scratch, USER, USER)
        self.log = scratch / "log"

    def _as_user(self, program: str, *words: str) -> str:
        return call("runuser", "-u", USER, "--", str(self._programs / program), *words)

    def as_client(self, program: str, *words: str) -> list[str]:
        """A command that connects to it."""
        path = str(self._programs / program)
        return [path, "--host", str(self.scratch), "--username", USER, *words]

    def create(self) -> None:
        """Makes it, with checksums on its pages."""
        self.data.mkdir()
        shutil.chown(self.data, USER, USER)
        words = ("--data-checksums", "--wal-segsize=1", "--auth=trust", "--locale=C")
        self._as_user("initdb", *words, "--pgdata", str(self.data))
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in SETTINGS.items())
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def running(self, *, durable: bool) -> Iterator[None]:
        """Serves, after recovery if need be; then it is stopped in order, or dies with an error.

        :param durable: without it nothing is synced: right for a copy that is thrown away.
        """
        options = f"-c unix_socket_directories={self.scratch} -c fsync={'on' if durable else 'off'}"
        try:
            self._control("start", "-t", str(START_SECONDS), "-o", options, "-l", str(self.log))
            yield
        except BaseException as error:
            error.add_note(self.log.read_text(errors="replace")[-4000:])
            self.die()
            raise
        if (self.data / "postmaster.pid").exists():
            self._control("stop", "--mode", "fast", "-t", str(START_SECONDS))

    def die(self) -> None:
        """As if it had crashed."""
        if (self.data / "postmaster.pid").exists():
            self._control("stop", "--mode", "immediate", "-t", str(START_SECONDS))

    def _control(self, *words: str) -> None:
        self._as_user("pg_ctl", "--wait", "--pgdata", str(self.data), *words)

    def query(self, text: str, database: str = USER) -> list[Counts]:
        """Rows of integers."""
        words = ("--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--command", text)
        lines = call(*self.as_client("psql", "--dbname", database, *words)).splitlines()
        return [tuple(int(word) for word in line.split("|")) for line in lines if line]

    def check(self) -> Counts:
        """Every table, every index, every balance; how many transactions of each client there are.

        Each client's are the first ones, without a gap.
        """
        words = ("--all", "--heapallindexed", "--parent-check", "--rootdescend", "--jobs=2")
        said = call(*self.as_client("pg_amcheck", *words))
        assert not said.strip(), said
        (found,) = self.query(BALANCES)
        accounts, tellers, branches, history, rows, entries, kept = found
        assert accounts == tellers == branches == history, found
        assert rows == entries, found
        assert kept == SCALE * 100_000
        counts = dict.fromkeys(range(CLIENTS), 0)
        for client, first, last, count in self.query(LEDGER):
            assert (first, last) == (1, count), (client, first, last, count)
            counts[client] = count
        assert sum(counts.values()) == rows
        return tuple(counts.values())

    def check_checksums(self) -> None:
        """Of every page; the server must have been stopped in order."""
        self._as_user("pg_checksums", "--check", "--pgdata", str(self.data))


class Bench:
    """pgbench on a running cluster, until the cluster dies; then, what it was told and when."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None
        # Of each client: when its transactions began and were committed, ns, wall clock.
        self.begun: list[list[int]] = []
        self.committed: list[list[int]] = []

    def create(self) -> None:
        """Its tables, and the ledger."""
        cluster = self._cluster
        for database in ("template1", USER):
            cluster.query("CREATE EXTENSION amcheck", database)
        words = ("--initialize", "--quiet", f"--scale={SCALE}", USER)
        call(*cluster.as_client("pgbench", *words))
        cluster.query("CREATE TABLE ledger (client int, n int, PRIMARY KEY (client, n))")

    def start(self) -> None:
        """Runs until `end`."""
        script = self._cluster.scratch / "script.sql"
        script.write_text(SCRIPT)
        words = [
            f"--client={CLIENTS}", f"--rate={RATE}", f"--define=scale={SCALE}", "--define=n=0",
            "--time=86400", f"--file={script}", "--no-vacuum",
            "--log", f"--log-prefix={self._cluster.scratch}/transactions", USER,
        ]  # fmt: skip
        with (self._cluster.scratch / "pgbench.log").open("wb") as log:
            self._process = subprocess.Popen(
                self._cluster.as_client("pgbench", *words), stdout=log, stderr=log
            )

    def count(self) -> int:
        """Transactions that are committed."""
        assert self._process is not None
        assert self._process.poll() is None, self.said()
        return sum(row[2] for row in self._cluster.query(LEDGER))

    def said(self) -> str:
        """What pgbench printed."""
        return (self._cluster.scratch / "pgbench.log").read_text()

    def end(self) -> None:
        """The server dies in the middle of it; pgbench's log of what was committed is read."""
        assert self._process is not None
        assert self._process.poll() is None, self.said()
        self._cluster.die()
        self._process.wait(60)
        begun, committed = defaultdict(list), defaultdict(list)
        for path in self._cluster.scratch.glob("transactions.*"):
            for line in path.read_text().splitlines():
                client, number, took, _, seconds, us, lag = (int(word) for word in line.split())
                at = (seconds * 1_000_000 + us) * 1000
                committed[client].append(at)
                begun[client].append(at - (took - lag) * 1000)
                assert len(committed[client]) == number
        self.committed = [committed[client] for client in range(CLIENTS)]
        self.begun = [begun[client] for client in range(CLIENTS)]

    def assert_possible(self, counts: Counts, at_ns: int) -> None:
        """Each client's transactions were there that were committed then, and none not begun.

        The last transaction of a client is in nobody's log: it may be there and need not.
        """
        for client, count in enumerate(counts):
            least, most = bounds(at_ns, self.begun[client], self.committed[client])
            if most == len(self.begun[client]):
                most += 1
            assert least <= count <= most, (client, least, count, most, at_ns)
