"""What is compared: `cdpd` with one disk, and its peers serving raw files; and fio as their client.

All of them serve files in the same state: random content, written in pieces of 4 KiB, durable, in
the page cache. (A file written in large pieces is cached in large folios, and a 4 KiB write into
such a one costs several times as much.) The peers keep no history.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdp.cli.api_client import ApiClient, path_of
from tests.interop.daemon import Daemon

OURS, QEMU, NBDKIT = "cdpd", "qemu-nbd", "nbdkit"
PEERS = (QEMU, NBDKIT)
DISK = "d"
BLOCK = 4096
MIB = 1 << 20
READY_SECONDS = 20.0
LOG_SHOWN = 3000
# After a drain the curator still indexes and reclaims; so long it may take until it is quiet.
SETTLE_SECONDS_MAX = 60.0
QUIET_SHARE = 0.1
QUIET_SECONDS = 0.25
_TICK = os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------------ files
def make_file(path: Path, size: int) -> Path:
    """A file as all servers get it; see the module."""
    pool = random.Random(1).randbytes(MIB)
    with path.open("wb", buffering=0) as file:
        for at in range(0, size, BLOCK):
            start = at % MIB
            file.write(pool[start : start + BLOCK])
        os.fsync(file.fileno())
    return path


def warm(path: Path) -> None:
    """Have all of a file in the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass


# ---------------------------------------------------------------------------------------- servers
@dataclass(slots=True)
class Server:
    """Whatever fio can be pointed at; ``pid``: the process that answers it."""

    name: str
    uri: str
    pid: int

    def settle(self) -> None:
        """Wait until nothing is done behind any more."""


@contextmanager
def peer(name: str, directory: Path, size: int) -> Iterator[Server]:
    """qemu-nbd or nbdkit on a raw file."""
    path, socket = directory / f"{name}.raw", directory / f"{name}.sock"
    make_file(path, size)
    command = {
        QEMU: ["qemu-nbd", "-f", "raw", "-x", "", "-t", "-e", "8", "-k", str(socket), str(path)],
        NBDKIT: ["nbdkit", "-f", "-U", str(socket), "file", str(path)],
    }[name]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + READY_SECONDS
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"bench: it did not come up: {' '.join(command)}")
            time.sleep(0.02)
        yield Server(name, f"nbd+unix:///?socket={socket}", process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(READY_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        path.unlink()


@dataclass(slots=True)
class Protected(Server):
    """A disk of a `cdpd` of its own."""

    daemon: Daemon
    api: ApiClient

    def status(self) -> dict[str, Any]:
        """The disk, as the API describes it."""
        return self.api.get(path_of("disks", DISK))

    def set(self, **values: object) -> None:
        """As `cdp disk set`."""
        words = [f"{key.replace('_', '-')}={value}" for key, value in values.items()]
        self.daemon.cdp("disk", "set", DISK, *words)

    def process(self, role: str) -> int:
        """The pid of the disk's process."""
        return self.daemon.children()[f"{DISK}/{role}"]

    def drain(self) -> None:
        """Have everything applied."""
        self.api.long_call("POST", path_of("disks", DISK, "drain"))

    def settle(self) -> None:
        """Everything is applied, and the curator has nothing else to do."""
        self.drain()
        pid, end = self.process("curator"), time.monotonic() + SETTLE_SECONDS_MAX
        while time.monotonic() < end:
            before = cpu_seconds(pid)
            time.sleep(QUIET_SECONDS)
            if cpu_seconds(pid) - before <= QUIET_SHARE * QUIET_SECONDS:
                return

    @contextmanager
    def stopped(self, *roles: str) -> Iterator[None]:
        """These processes stand still meanwhile."""
        pids = [self.process(role) for role in roles]
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


@contextmanager
def protected(
    directory: Path, backing: Path | None, size: int, *, journal_limit: str = "16G"
) -> Iterator[Protected]:
    """`cdpd` with one new disk, on an existing file or, without one, on a sparse file of its own.

    When something goes wrong the end of its log is printed: the log is removed with the rest.
    """
    state = directory / "state"
    with Daemon(state) as daemon, _log_of(daemon):
        named = ("--backing", str(backing)) if backing else ("--size", str(size))
        daemon.cdp("disk", "add", DISK, *named, "--journal-limit", journal_limit)
        recorder = daemon.children()[f"{DISK}/recorder"]
        yield Protected(OURS, daemon.uri(DISK), recorder, daemon, ApiClient(state))


@contextmanager
def _log_of(daemon: Daemon) -> Iterator[None]:
    try:
        yield
    except Exception:
        print(f"bench: cdpd said:\n{daemon.said()[-LOG_SHOWN:]}", file=sys.stderr)
        raise


def cpu_seconds(pid: int) -> float:
    """Processor time a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


# -------------------------------------------------------------------------------------------- fio
@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of fio: requests per second, percentiles of their latency in microseconds, and the
    processor time that the serving process took for each.
    """

    rate: float
    p50: float
    p99: float
    p999: float
    cpu: float
    seconds: float


def fio(server: Server, directory: Path, options: Mapping[str, object]) -> Outcome:
    """One job with the NBD engine; ``directory``: where it runs and leaves its logs."""
    words = ["--thread"] + [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()
    ]
    command = [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={server.uri}", "--output-format=json",
        "--norandommap", *words,
    ]  # fmt: skip
    before = cpu_seconds(server.pid)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
    took = cpu_seconds(server.pid) - before
    if done.returncode:
        what = " ".join(done.stderr.split())[-500:]
        raise RuntimeError(f"fio failed on {server.name}: {what}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    sides = [job[name] for name in ("read", "write", "trim")]
    side = max(sides, key=lambda each: int(each["total_ios"]))
    late = side["clat_ns"].get("percentile", {})
    p50, p99, p999 = (late.get(f"{share}0000", 0) / 1000 for share in ("50.00", "99.00", "99.90"))
    rate = sum(each["iops"] for each in sides)
    requests = sum(each["total_ios"] for each in sides)
    return Outcome(rate, p50, p99, p999, took / requests * 1e6, side["runtime"] / 1000)


# ------------------------------------------------------------------------------------ alternation
def alternate(
    servers: Sequence[Server],
    repeat: int,
    run: Callable[[Server, int], Outcome],
    *,
    pause: float = 0.2,
) -> dict[str, list[Outcome]]:
    """Every server in turn, again and again, in an order that rotates.

    Before each turn everything behind the servers is done and everything dirty is written.
    ``run(server, repetition)``: the same repetition is the same work for all.
    """
    outcomes: dict[str, list[Outcome]] = {server.name: [] for server in servers}
    for repetition in range(repeat):
        turn = repetition % len(servers)
        for server in [*servers[turn:], *servers[:turn]]:
            for each in servers:
                each.settle()
            os.sync()
            time.sleep(pause)
            outcomes[server.name].append(run(server, repetition))
    return outcomes


def rates(outcomes: Sequence[Outcome]) -> list[float]:
    """Requests per second of each."""
    return [outcome.rate for outcome in outcomes]


def spread(ours: Sequence[float], others: Sequence[float]) -> str:
    """The range of ratios of runs that followed each other."""
    pairs = [mine / other for mine, other in zip(ours, others, strict=True)]
    return f"{min(pairs):.2f} to {max(pairs):.2f} in {len(pairs)} pairs"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Median and range of the rate, medians of the latency and of the processor time."""
    values = rates(outcomes)
    p50, p99, cpu = (
        statistics.median(each)
        for each in zip(*((o.p50, o.p99, o.cpu) for o in outcomes), strict=True)
    )
    return (
        f"{statistics.median(values):>9,.0f}/s ({min(values):,.0f} to {max(values):,.0f}), "
        f"p50 {p50:,.0f} us, p99 {p99:,.0f} us, cpu {cpu:.1f} us each"
    )
