"""What the sockets of NBD clients have in common, whoever serves them."""

from __future__ import annotations

import socket
from typing import Final

SOCKET_BUFFER_BYTES: Final = 4 << 20
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33


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
