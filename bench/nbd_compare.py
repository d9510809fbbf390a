"""The recorder against qemu-nbd and nbdkit serving a raw file without any history, with fio.

    python bench/nbd_compare.py [--seconds 2] [--repeat 5] [--works randwrite-32,...] [--curator]
                                [--directory DIR] [--size-mib 1024] [--json FILE]

All servers are up all the time and the runs alternate: for each work, and each repetition, every
server in turn, in an order that rotates, with everything dirty written out before. What is printed
are medians over the repetitions and ratios of them; absolute figures of a virtual machine wander by
half, so read the ratios, and none of a line whose load average is far above the others'.

What must be the same for all: files that were written in 4 KiB pieces and are in the page cache (a
file written in large pieces takes three times as long per 4 KiB write: the folios are larger). The
recorder's disk is made anew for every work. ``--curator`` has one apply beside it; without, nothing
is applied, and the reads are of a disk without unapplied records.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS = 20.0

# name: fio's options
WORKS = {
    "randwrite-32": ["--rw=randwrite", "--bs=4k", "--iodepth=32"],
    "randwrite-1": ["--rw=randwrite", "--bs=4k", "--iodepth=1"],
    "fsync-16": ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--fsync=16"],
    "fsync-1": ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"],
    "randread-32": ["--rw=randread", "--bs=4k", "--iodepth=32"],
    "randread-1": ["--rw=randread", "--bs=4k", "--iodepth=1"],
    "seqwrite-256k": ["--rw=write", "--bs=256k", "--iodepth=8"],
    "seqwrite-1m": ["--rw=write", "--bs=1m", "--iodepth=4"],
    "seqread-256k": ["--rw=read", "--bs=256k", "--iodepth=8"],
    "randrw-32": ["--rw=randrw", "--rwmixread=70", "--bs=4k", "--iodepth=32"],
}
DEFAULT_WORKS = "randwrite-32,randwrite-1,fsync-16,randread-32,seqwrite-256k"
# (work, peer, ratio): what this must reach; None is the faster of the two.
TARGETS: list[tuple[str, str | None, float]] = [
    ("randwrite-32", "qemu-nbd", 2.5),
    ("randwrite-32", "nbdkit", 1.0),
    ("randwrite-1", None, 1.0),
    ("fsync-16", None, 1.0),
    ("randread-32", None, 1.5),
    ("seqwrite-256k", None, 0.7),
]


@dataclass
class Server:
    """One server that is up."""

    name: str
    socket: Path
    processes: list[subprocess.Popen[str]]
    results: dict[str, list[float]] = field(default_factory=dict)
    latencies: dict[str, list[float]] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """Where fio finds it."""
        return f"nbd+unix:///?socket={self.socket}"


def make_file(path: Path, size: int) -> None:
    """Random content, written in 4 KiB pieces, in the page cache and on the disk."""
    piece = os.urandom(4096 * 256)
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(piece)):
            for at in range(0, len(piece), 4096):
                file.write(piece[at : at + 4096])
        os.fsync(file.fileno())


def warm(path: Path) -> None:
    """Have a file in the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def wait_for(socket: Path, process: subprocess.Popen[str]) -> None:
    """Until the server listens."""
    end = time.monotonic() + READY_SECONDS
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"{process.args!r} did not come up")
        time.sleep(0.02)


@contextmanager
def ended(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    """End them, the last one first."""
    try:
        yield
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(READY_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def peer(name: str, directory: Path, size: int) -> Iterator[Server]:
    """qemu-nbd or nbdkit on a raw file."""
    path, socket = directory / f"{name}.raw", directory / f"{name}.sock"
    if not path.exists():
        make_file(path, size)
    warm(path)
    command = {
        "qemu-nbd": [
            "qemu-nbd",
            "-f",
            "raw",
            "-x",
            "",
            "-t",
            "-e",
            "8",
            "-k",
            str(socket),
            str(path),
        ],
        "nbdkit": ["nbdkit", "-f", "-U", str(socket), "file", str(path)],
    }[name]
    socket.unlink(missing_ok=True)
    process = subprocess.Popen(command, text=True, stderr=subprocess.DEVNULL)
    with ended([process]):
        wait_for(socket, process)
        yield Server(name, socket, [process])


@contextmanager
def recorder(directory: Path, size: int, *, curator: bool, extra: list[str]) -> Iterator[Server]:
    """The recorder on a new disk with warm content, perhaps with a curator."""
    disk, socket = directory / "disk", directory / "recorder.sock"
    shutil.rmtree(disk, ignore_errors=True)
    socket.unlink(missing_ok=True)
    backing = directory / "backing.raw"
    if not backing.exists():
        make_file(backing, size)
    warm(backing)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable, "-m", "cdp.recorder.standalone", "--disk-dir", str(disk),
        "--size", str(size), "--nbd", str(socket), "--backing", str(backing),
        *([] if curator else ["--no-bound"]), *extra,
    ]  # fmt: skip
    log = (directory / "recorder.log").open("w")
    processes = [
        subprocess.Popen(command, text=True, stdout=log, stderr=log, env=environment, cwd=ROOT)
    ]
    with ended(processes), log:
        wait_for(socket, processes[0])
        if curator:
            fd = os.open(backing, os.O_RDWR)
            command = [
                sys.executable, "-m", "cdp.curator", "--disk-dir", str(disk), "--fd", str(fd),
                "--clock-offset", "0",
            ]  # fmt: skip
            processes.append(
                subprocess.Popen(
                    command, text=True, stdout=log, stderr=log, env=environment, cwd=ROOT,
                    pass_fds=[fd],
                )
            )  # fmt: skip
            os.close(fd)
            time.sleep(1)
        yield Server("recorder", socket, processes)


def run_fio(server: Server, work: str, seconds: float, size: int) -> tuple[float, float]:
    """Requests per second, and the 99th percentile of their latency in microseconds."""
    command = [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={server.uri}", f"--size={size}",
        "--thread", "--time_based", f"--runtime={seconds}", "--norandommap", "--randrepeat=0",
        "--output-format=json", *WORKS[work],
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"fio failed on {server.name}, {work}:\n{done.stdout}\n{done.stderr}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    rate = job["read"]["iops"] + job["write"]["iops"]
    side = "read" if job["read"]["iops"] > job["write"]["iops"] else "write"
    late = job[side].get("clat_ns", {}).get("percentile", {}).get("99.000000", 0) / 1000
    return rate, late


def measure(servers: list[Server], work: str, options: argparse.Namespace) -> None:
    """All repetitions of one work."""
    size = options.size_mib << 20
    for repetition in range(options.repeat):
        turn = repetition % len(servers)
        for server in servers[turn:] + servers[:turn]:
            os.sync()
            time.sleep(options.pause)
            rate, late = run_fio(server, work, options.seconds, size)
            server.results.setdefault(work, []).append(rate)
            server.latencies.setdefault(work, []).append(late)


def report(work: str, servers: list[Server]) -> None:
    """One line for each work."""
    load = os.getloadavg()[0]
    median = {server.name: statistics.median(server.results[work]) for server in servers}
    parts = []
    for server in servers:
        values = server.results[work]
        late = statistics.median(server.latencies[work])
        parts.append(
            f"{server.name} {median[server.name] / 1000:7.2f} "
            f"({min(values) / 1000:.1f}-{max(values) / 1000:.1f}, p99 {late:.0f} us)"
        )
    print(f"{work:14} thousand/s: {'   '.join(parts)}   load {load:.2f}", flush=True)
    if "recorder" not in median or len(median) < 2:
        return
    others = {name: value for name, value in median.items() if name != "recorder"}
    ratios = ", ".join(f"{median['recorder'] / v:.2f} x {n}" for n, v in others.items())
    verdicts = []
    for target_work, target_peer, ratio in TARGETS:
        if target_work == work and (target_peer is None or target_peer in others):
            base = max(others.values()) if target_peer is None else others[target_peer]
            reached = median["recorder"] / base
            what = target_peer or "the faster"
            word = "ok" if reached >= ratio else "MISSED"
            verdicts.append(f"{reached:.2f} of {ratio} x {what}: {word}")
    print(f"{'':14} {ratios}   {'; '.join(verdicts)}", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.3)
    parser.add_argument("--works", default=DEFAULT_WORKS)
    parser.add_argument("--peers", default="qemu-nbd,nbdkit")
    parser.add_argument("--curator", action="store_true")
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recorder-option", action="append", default=[])
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="cdp-bench-", dir="/tmp"))
    directory.mkdir(parents=True, exist_ok=True)
    size = options.size_mib << 20
    results: dict[str, dict[str, list[float]]] = {}
    try:
        with ExitStack() as stack:
            names = [name for name in options.peers.split(",") if name]
            peers = [stack.enter_context(peer(name, directory, size)) for name in names]
            for work in options.works.split(","):
                with recorder(
                    directory, size, curator=options.curator, extra=options.recorder_option
                ) as ours:
                    measure([*peers, ours], work, options)
                    report(work, [*peers, ours])
                    results[work] = {s.name: s.results[work] for s in [*peers, ours]}
    finally:
        if options.directory is None:
            shutil.rmtree(directory, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps({"load": os.getloadavg(), "results": results}))


if __name__ == "__main__":
    main()
