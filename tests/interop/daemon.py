"""A real `cdpd` on a scratch directory, used through its commands and sockets as anybody would."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

READY_SECONDS = 60.0
COMMAND_SECONDS = 120.0
ROLES = ("recorder", "curator", "viewer")


class Daemon:
    """Start, stop, kill; run commands; find the processes of a disk."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory, self.options = directory, options
        self.prefix: list[str] = []  # a command that executes the one behind it, in its own place
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory.with_name(directory.name + ".log")

    # ----------------------------------------------------------------------------------- lifetime
    def start(self) -> Self:
        """Until it says ready."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "cdp.supervisor.main",
                 "--state-dir", str(self.directory), *self.options],
                stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        self._wait_ready()
        return self

    def _wait_ready(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        deadline, seen = time.monotonic() + READY_SECONDS, b""
        while b"ready" not in seen:
            left = max(0.0, deadline - time.monotonic())
            readable = wait_readable(self.process.stdout.fileno(), left)
            data = os.read(self.process.stdout.fileno(), 65536) if readable else b""
            assert data, f"cdpd did not come up; it said {seen!r}\n{self.said()}"
            seen += data

    def said(self) -> str:
        """What all processes logged."""
        return self.log.read_text(errors="replace")[-8000:] if self.log.exists() else ""

    def stop(self) -> int:
        """SIGTERM, a clean stop; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(READY_SECONDS)
        finally:
            self._forget()

    def kill(self) -> None:
        """SIGKILL of the supervisor alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._forget()

    def kill_all(self) -> None:
        """SIGKILL of the supervisor and every process of every disk, as near to at once as can
        be.
        """
        pids = self.children()
        assert self.process is not None
        self.process.kill()
        for pid in pids.values():
            _kill(pid)
        self.process.wait()
        for pid in pids.values():
            wait_gone(pid)
        self._forget()

    def _forget(self) -> None:
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None

    def __enter__(self) -> Self:
        return self if self.process else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._forget()
        for pid in self.children().values():
            _kill(pid)
            wait_gone(pid)
        for page in Path("/dev/shm").glob("cdp-*.frontier"):
            if page.name[4:-9] in self._uuids():
                page.unlink(missing_ok=True)

    def _uuids(self) -> set[str]:
        found = set()
        for path in self.directory.glob("disks/*/disk.json"):
            with contextlib.suppress(ValueError):  # a test has spoilt it
                found.add(json.loads(path.read_text())["uuid"])
        return found

    # ------------------------------------------------------------------------------------
    # children
    def children(self) -> dict[str, int]:
        """Processes of this state directory's disks: ``"NAME/ROLE" -> pid``."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            for role in ROLES:
                if f"cdp.{role}".encode() in words and b"--disk-dir" in words:
                    place = Path(os.fsdecode(words[words.index(b"--disk-dir") + 1]))
                    if place.parent.parent == self.directory:
                        found[f"{place.name}/{role}"] = int(entry.name)
        return found

    # ------------------------------------------------------------------------------------
    # commands
    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Any `cdp` command, whatever becomes of it."""
        return subprocess.run(
            [sys.executable, "-m", "cdp.cli.main", "--state-dir", str(self.directory),
            *arguments], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def cdp(self, *arguments: str) -> str:
        """A command that must succeed; what it printed."""
        done = self.run(*arguments)
        assert done.returncode == 0, f"cdp {arguments}: {done.stderr}\n{self.said()}"
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """A command's ``--json``."""
        return json.loads(self.cdp(*arguments, "--json"))

    def refused(self, *arguments: str, status: int = 1) -> str:
        """A command that must fail with one line; that line."""
        done = self.run(*arguments)
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        if status == 1:
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.stderr.strip()

    def uri(self, export: str) -> str:
        """The NBD URI of an export."""
        return f"nbd+unix:///{export}?socket={self.directory}/nbd.sock"

    def status(self, disk: str) -> dict[str, Any]:
        """`cdp status` of one disk."""
        (found,) = (each for each in self.json("status")["disks"] if each["name"] == disk)
        assert isinstance(found, dict)
        return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wait_gone(pid: int, seconds: float = 20.0) -> None:
    """Until a process has ended (it need not be a child of ours)."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert wait_readable(descriptor, seconds), f"process {pid} does not end"
    finally:
        os.close(descriptor)


def wait_readable(descriptor: int, seconds: float) -> bool:
    """Whether a descriptor becomes readable in time, whatever its number (select stops at 1023)."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
