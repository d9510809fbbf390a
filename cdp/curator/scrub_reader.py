"""The process that reads a journal for a scrub, as the curator has it: started, heard, ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import trio

from journal.errors import CdpError

LINE_BYTES_MAX: Final = 1 << 20

Json = dict[str, Any]


class Reader:
    """Runs `cdp.curator.scrubber`, one at a time; its module says why it is a process."""

    def __init__(
        self,
        directory: Path,
        command: Sequence[str] = (sys.executable, "-m", "cdp.curator.scrubber"),
    ) -> None:
        self._directory, self._command = directory, command
        self._process: trio.Process | None = None

    async def read(
        self, rate: int, after: tuple[int, int], on_message: Callable[[Json], None]
    ) -> None:
        """One pass, behind those segments of the undo and the redo log. What it says is handed on.

        :raises CdpError: it ended before its end.
        """
        command = [
            *self._command, "--disk-dir", str(self._directory), "--rate", str(rate),
            "--after-undo", str(after[0]), "--after-redo", str(after[1]),
        ]  # fmt: skip
        process = self._process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            finished = await self._hear(process, on_message)
            status = await process.wait()
        finally:
            self._process = None
            with trio.CancelScope(shield=True):
                await _end(process)
        if status or not finished:
            raise CdpError(f"the process that reads the journal ended with status {status}")

    @staticmethod
    async def _hear(process: trio.Process, on_message: Callable[[Json], None]) -> bool:
        """Until it says no more; whether it said that it was through."""
        assert process.stdout is not None
        finished, rest = False, b""
        while data := await process.stdout.receive_some():
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > LINE_BYTES_MAX:
                raise CdpError("the process that reads the journal says a line without an end")
            for line in lines:
                said = json.loads(line)
                finished = finished or "finished" in said
                on_message(said)
        return finished

    async def set_rate(self, rate: int) -> None:
        """Bytes a second from now on; 0: no bound."""
        process = self._process
        if process is not None and process.stdin is not None:
            try:
                await process.stdin.send_all(b"%d\n" % rate)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # it has just ended


async def _end(process: trio.Process) -> None:
    """It reads only: nothing is lost with it."""
    if process.returncode is None:
        process.kill()
    await process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            await stream.aclose()
