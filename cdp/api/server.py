"""HTTP on sockets that are listening already, by hypercorn's protocol implementation.

Its worker ends with the first exception that leaves a connection, and a client that hangs up in the
middle of a request is enough for one. So connections are accepted here, and each fails for itself.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)

# Without a request for so long a connection is closed.
IDLE_SECONDS: Final = 5.0


def _config() -> Config:
    config = Config()
    config.keep_alive_timeout = IDLE_SECONDS
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.errorlog.setLevel(logging.WARNING)
    return config


async def serve_http(
    app: Starlette,
    sockets: Sequence[socket.socket],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled; `started` once requests are answered. Takes over the sockets."""
    config, context = _config(), WorkerContext(None)

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except Exception as error:
            # It has been logged, and answered as far as that was possible: see `cdp.api.app`.
            log.debug("a request failed: %r", error)

    # It is an ASGI application; hypercorn's own protocol types are stricter than starlette's.
    wrapped = ASGIWrapper(cast(Any, answered))

    async def connection(stream: trio.SocketStream) -> None:
        try:
            await TCPServer(wrapped, config, context, ConnectionState({}), cast(Any, stream))
        except* Exception as group:
            # The boundary: what a client does ends here.
            log.info("an HTTP client was cut off: %r", group.exceptions[0])

    listeners = [
        trio.SocketListener(trio.socket.from_stdlib_socket(_taken(one))) for one in sockets
    ]
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_listeners, connection, listeners, handler_nursery=nursery)
        nursery.start_soon(serve)
        task_status.started()


def _taken(one: socket.socket) -> socket.socket:
    """Ours alone from here on: who bound it may close what is left of it."""
    return socket.socket(fileno=one.detach())
