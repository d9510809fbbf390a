"""One supervisor per state directory, by a lock that dies with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

from journal.errors import Busy, InvalidInput

LOCK_FILE: Final = "lock"
# The longest name of a socket in the state directory; whoever connects has this limit of sun_path.
SOCKET_FILE: Final = "control.sock"
SOCKET_PATH_MAX: Final = 107
_CONTENT_MAX: Final = 64


class StateLock:
    """The lock of a state directory, held until `close` or the end of the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def take(cls, directory: Path) -> StateLock:
        """Takes the lock, creating the directory if it is not there.

        :raises Busy: another daemon has it; names its process.
        :raises InvalidInput: the directory cannot be used.
        """
        path = directory / LOCK_FILE
        excess = len(os.fsencode(directory / SOCKET_FILE)) - SOCKET_PATH_MAX
        if excess > 0:
            raise InvalidInput(
                f"the path {directory} is {excess} bytes too long for sockets: use a shorter one"
            )
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidInput(
                f"the state directory {directory} cannot be used: {error.strerror}"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, _CONTENT_MAX, 0).decode("ascii", "replace").strip()
            os.close(fd)
            who = f"process {holder}" if holder.isdecimal() else "another process"
            raise Busy(
                f"a cdpd is running for {directory} already ({who}): use it, or stop it first"
            ) from None
        with contextlib.suppress(OSError):  # no space: it is only for messages
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return cls(fd)

    def close(self) -> None:
        """Lets go of it."""
        os.close(self._fd)
