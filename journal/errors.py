"""Errors of the journal: what is wrong, where, and what to do about it.

Bytes read from a disk are never asserted; whatever is wrong with them becomes one of these, with
the file, the offset and the sequence numbers that are affected, so that a message to the
administrator can name them.
"""

from __future__ import annotations


class CdpError(Exception):
    """Base of every error that may reach an administrator: one line that says what to do.

    ``kind`` is the stable word that the control API reports: ``not_found``, ``conflict``,
    ``invalid``, ``not_openable``, ``busy`` or ``internal``.
    """

    kind = "internal"


class InvalidInput(CdpError):
    """Something an administrator typed or configured is not possible."""

    kind = "invalid"


class NotFound(CdpError):
    """A disk, bookmark or view of that name does not exist."""

    kind = "not_found"


class Conflict(CdpError):
    """The state of the disk does not allow it now."""

    kind = "conflict"


class Busy(CdpError):
    """Somebody else holds what is needed."""

    kind = "busy"


class NotOpenable(CdpError):
    """The asked for moment is none that can be opened."""

    kind = "not_openable"


class JournalError(CdpError):
    """Base of all that can be wrong with a journal."""


class Corruption(JournalError):
    """Bytes that were durable are not what was written.

    ``file`` is relative to the journal directory, ``offset`` in bytes, ``first_seq``..``last_seq``
    the records affected (0 when unknown).
    """

    def __init__(
        self, what: str, *, file: str, offset: int = 0, first_seq: int = 0, last_seq: int = 0
    ) -> None:
        self.what, self.file, self.offset = what, file, offset
        self.first_seq, self.last_seq = first_seq, last_seq
        seqs = f", seq {first_seq}..{last_seq}" if last_seq else ""
        super().__init__(
            f"{what} in {file} at byte {offset}{seqs}: run 'cdp scrub' to see what is affected"
        )


class Unreadable(Corruption):
    """The device reports an error where something durable lies."""


class UnknownVersion(JournalError):
    """A file was written by a newer format version."""

    def __init__(self, file: str, version: int, known: int) -> None:
        super().__init__(
            f"{file} has format version {version}, this program knows up to {known}: "
            "use the cdpd that wrote it, or a newer one"
        )


class Poisoned(JournalError):
    """A sync of the redo log failed: nothing is acknowledged until it has been recovered."""


class JournalFull(JournalError):
    """The file system of the journal has no space for the next batch; nothing was written."""


class Vanished(JournalError):
    """A file named in a snapshot was deleted meanwhile: take a new snapshot and start again."""
