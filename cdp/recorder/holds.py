"""Whether a disk may be offered after a crash: what a client that outlived it may believe.

A client on another host outlives this host's crash, and a client of a recorder that was poisoned
outlives that. It counts on every write that was acknowledged, also on those that were not flushed
and are gone. So a disk is held, until the administrator says `cdp disk offer`, when its policy
``after-loss`` is ``hold``, or is ``auto`` and a client of another kind than this host's own sockets
was served since the last clean stop. The latter is a file in the disk's directory, durable before
the first such client is served.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cdp.config import AfterLoss, read_json, sync_directory, write_atomically, write_json

if TYPE_CHECKING:
    from journal.recovery import Lost

HOLD_FILE: Final = "held.json"
NETWORK_FILE: Final = "network-client"
_OFFER: Final = "check it, then say 'cdp disk offer'"


class Holds:
    """Why the disk must not be offered before the administrator says so; outlives restarts."""

    def __init__(self, directory: Path) -> None:
        self._path, self._network = directory / HOLD_FILE, directory / NETWORK_FILE
        self._had_network = self._network.exists()
        self.reason: str | None = None
        if self._path.exists():
            self.reason = str(read_json(self._path, dict[str, str]).get("reason"))

    def judge(self, policy: AfterLoss, lost: Lost | None, *, rebooted: bool) -> None:
        """After a recovery: hold the disk, durably, if the policy wants that.

        ``lost``: what is proven to be; ``rebooted``: the host went down without a clean stop, so
        that more may be lost that left no trace.
        """
        if policy == "offer" or (policy == "auto" and not self._had_network):
            return
        if lost is not None:
            what = f"acknowledged writes {lost.first_seq}..{lost.last_seq} did not survive a crash"
        elif rebooted:
            what = "the host crashed, and acknowledged writes that were not flushed may be lost"
        else:
            return
        self._hold(f"{what}, and a client may count on them: {_OFFER}")

    def serves(self, client: socket.socket) -> None:
        """Remember, durably and before it is served, that a client may outlive this host."""
        if client.family != socket.AF_UNIX and not self._had_network:
            write_atomically(self._network, b"")
            self._had_network = True

    def stopped_cleanly(self) -> None:
        """Everything that was acknowledged is durable: nobody can count on more."""
        if self._network.exists():
            self._network.unlink()
            sync_directory(self._network.parent)
        self._had_network = False

    def _hold(self, reason: str) -> None:
        self.reason = reason
        write_json(self._path, {"reason": reason})

    def offer(self) -> None:
        """It may be offered."""
        if self.reason is not None:
            self.reason = None
            write_atomically(self._path, b'{"reason": ""}\n')
            self._path.unlink()
