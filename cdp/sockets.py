"""What sockets have in common, whoever serves them."""

from __future__ import annotations

import errno
import logging
import socket
from typing import Final

import trio

log = logging.getLogger(__name__)

# Nothing is left of something; it may come back.
_ACCEPT_RETRY_ERRNOS: Final = frozenset(
    {errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
)
_ACCEPT_RETRY_SECONDS: Final = 0.1
SOCKET_BUFFER_BYTES: Final = 4 << 20
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33


async def accept(listener: trio.socket.SocketType, what: str) -> trio.socket.SocketType:
    """The next client of a listener; waits also while the process may have no more files.

    :param what: what cannot be reached then, for the log: it is said once, not at each attempt.
    :raises OSError: the listener is of no more use.
    """
    said = False
    while True:
        try:
            sock, _ = await listener.accept()
        except OSError as error:
            if error.errno not in _ACCEPT_RETRY_ERRNOS:
                raise
            if not said:
                log.error("no client can connect to %s: %s", what, error.strerror)
                said = True
            await trio.sleep(_ACCEPT_RETRY_SECONDS)
        else:
            return sock


def tune(sock: socket.socket) -> None:
    """No delay over TCP (the kernel tunes its buffers itself); large buffers else."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return
    for force, plain in (
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)
    ):  # fmt: skip
        for option in (force, plain):
            try:
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
                break
            except OSError:
                continue
