"""How much of anything a client may make us hold or do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cdp.nbd.wire import NBD_MAX_STRING, NBD_PORTABLE_PAYLOAD


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one connection; all sizes in bytes. ValueError when they contradict each other."""

    # A WRITE announcing more is taken for an attack (its payload cannot be skipped cheaply).
    max_payload: int = NBD_PORTABLE_PAYLOAD
    # Requests in one scan: what follows from one, an iovec for example, is bounded by this.
    max_requests_per_scan: int = 1024
    # Data of one option. The largest honest one is a name and a few dozen short queries.
    max_option_bytes: int = 64 * 1024
    # Data of one option that is skipped and answered; beyond it the client is cut off.
    max_skipped_option_bytes: int = 1024 * 1024
    # Options on one connection. `nbdinfo --list` asks two for every export, all on one.
    max_options: int = 1 << 16
    # Contexts selected at once: each is one more chunk in the answer to every BLOCK_STATUS.
    max_meta_contexts: int = 32

    def __post_init__(self) -> None:
        if self.max_payload < 1 or self.max_requests_per_scan < 1:
            raise ValueError(f"a connection could not carry a single request: {self}")
        if self.max_option_bytes < 2 * NBD_MAX_STRING:
            raise ValueError(f"max_option_bytes must hold a name and a query: {self}")
        if self.max_skipped_option_bytes < self.max_option_bytes:
            raise ValueError(f"max_skipped_option_bytes is below max_option_bytes: {self}")
        if self.max_options < 1 or self.max_meta_contexts < 0:
            raise ValueError(f"no option could ever be answered: {self}")


DEFAULT_LIMITS: Final = Limits()
