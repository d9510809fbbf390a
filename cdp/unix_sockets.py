"""Unix sockets: addresses that fit whatever path, and listening with the right mode."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Final

from journal.errors import InvalidInput

BACKLOG: Final = 128
_SUN_PATH_MAX: Final = 107


@contextlib.contextmanager
def socket_address(path: Path) -> Generator[str]:
    """An address for bind or connect that fits `sun_path`, however long `path` is.

    A long one is reached through a descriptor of its directory, so that nobody changes the
    directory of the process.
    """
    if len(os.fsencode(path)) <= _SUN_PATH_MAX:
        yield os.fspath(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        address = f"/proc/self/fd/{directory}/{path.name}"
        if len(os.fsencode(address)) > _SUN_PATH_MAX:
            raise InvalidInput(f"{path.name} is too long for the name of a socket: shorten it")
        yield address
    finally:
        os.close(directory)


def bind_socket(path: Path, kind: socket.SocketKind, *, mode: int = 0o600) -> socket.socket:
    """A listening socket at `path`, which replaces what a dead process left there.

    The caller must know that no living process listens there: it holds a lock that says so. Until
    this returns clients are refused, as they were before.
    """
    listener = socket.socket(socket.AF_UNIX, kind)
    try:
        listener.setblocking(False)
        # Linux creates the name with the mode of the socket: there is no moment of another one,
        # unless it is wider than the umask allows.
        os.fchmod(listener.fileno(), mode)
        path.unlink(missing_ok=True)
        with socket_address(path) as address:
            listener.bind(address)
        path.chmod(mode)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
