"""NBD servers on the host's loopback with one disk, `disk0`, that can be put back in time.

`QemuNbd` is there to prove the harness and the tests with a server that is known to be right;
`Cdpd` is ours. Both are used while no client is connected.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

DISK = "disk0"
START_SECONDS = 30.0


class Server(Protocol):
    """A server that runs."""

    port: int

    def bookmark(self) -> None: ...
    def rollback(self) -> None: ...


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Process:
    """A server process that ends with the `with` block."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> None:
        raise NotImplementedError

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(START_SECONDS)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def _wait_for_port(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self._process is not None
            assert self._process.poll() is None, f"ended with {self._process.returncode}"
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, f"nobody listens on port {self.port}"
                time.sleep(0.05)

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()


class NbdkitMemory(_Process):
    """A disk in memory, for what needs no second state."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def _start(self) -> None:
        listen = ["-f", "-i", "127.0.0.1", "-p", str(self.port), "-e", DISK]
        self._process = subprocess.Popen(["nbdkit", *listen, "memory", str(self._size)])
        self._wait_for_port()


class QemuNbd(_Process):
    """qemu-nbd on a qcow2 image; bookmark and rollback are its internal snapshots."""

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__()
        self._image = folder / "disk.qcow2"
        self._run("qemu-img", "create", "-q", "-f", "qcow2", str(self._image), str(size))

    @staticmethod
    def _run(*command: str) -> None:
        subprocess.run(command, check=True, timeout=60)

    def _start(self) -> None:
        listen = ["-t", "-b", "127.0.0.1", "-p", str(self.port), "-x", DISK, "-e", "4"]
        image = ["-f", "qcow2", "--discard=unmap", str(self._image)]
        self._process = subprocess.Popen(["qemu-nbd", *listen, *image])
        self._wait_for_port()

    def _snapshot(self, option: str) -> None:
        self._stop()
        self._run("qemu-img", "snapshot", option, "before", str(self._image))
        self._start()

    def bookmark(self) -> None:
        self._snapshot("-c")

    def rollback(self) -> None:
        self._snapshot("-a")


class Cdpd(_Process):
    """The daemon of the environment that runs the tests, used as an administrator does."""

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__()
        self._state = folder
        self._size = size

    @staticmethod
    def _program(name: str) -> str:
        return str(Path(sys.executable).with_name(name))

    def _start(self) -> None:
        options = ["--state-dir", str(self._state), "--nbd", f"tcp://127.0.0.1:{self.port}"]
        self._process = subprocess.Popen([self._program("cdpd"), *options], stdout=subprocess.PIPE)
        self._wait_for_ready()
        self.cdp("disk", "add", DISK, "--size", str(self._size))
        self._wait_for_port()

    def _wait_for_ready(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        deadline, seen = time.monotonic() + START_SECONDS, b""
        while b"ready" not in seen:
            left = deadline - time.monotonic()
            assert left > 0, f"cdpd is not ready, and said: {seen!r}"
            if select.select([self._process.stdout], [], [], left)[0]:
                data = os.read(self._process.stdout.fileno(), 65536)
                assert data, f"cdpd ended, and said: {seen!r}"
                seen += data

    def cdp(self, *arguments: str) -> str:
        done = subprocess.run(
            [self._program("cdp"), "--state-dir", str(self._state), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def bookmark(self) -> None:
        self.cdp("bookmark", "add", DISK, "before")

    def rollback(self) -> None:
        self.cdp("rollback", DISK, "--to", "bookmark:before", "--yes")
