"""A file of zeroes in the journal's directory that keeps some space for whoever must make space.

Giving up history needs a little at first: an entry in the catalog, or a new copy of it, and what is
still needed of a segment. On a full file system that comes from here: the file is deleted, and made
anew when there is space again. It counts as a part of the journal. Nothing depends on it: without
it, what has no space waits until somebody makes some.

The curator makes it. It also deletes it, and so does a recorder that cannot come up without. Before
the curator does, it holds the recorder (`frontier.redo_bytes_max`), which would use it up else.
"""

from __future__ import annotations

import errno
from typing import Final

from journal.limits import MIB
from journal.storage import File, Storage

NAME: Final = "reserve"
_TEMPORARY: Final = "reserve.tmp"
_CHUNK_BYTES: Final = MIB
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


def make(storage: Storage, size: int) -> bool:
    """Have a reserve of so many bytes; False: there is no space for it."""
    if _size(storage) == size:
        return True
    _discard(storage, _TEMPORARY)
    file: File | None = None
    try:
        file = storage.open(_TEMPORARY, "create")
        for at in range(0, size, _CHUNK_BYTES):
            file.write(at, [bytes(min(_CHUNK_BYTES, size - at))])
        file.sync()  # a file system may find only now that it has no place
        storage.rename(_TEMPORARY, NAME)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        _discard(storage, _TEMPORARY)
        return False
    finally:
        if file is not None:
            file.close()
    return True


def release(storage: Storage) -> bool:
    """Give its space away; whether there was any."""
    return _discard(storage, NAME) | _discard(storage, _TEMPORARY)


def _size(storage: Storage) -> int | None:
    try:
        file = storage.open(NAME, "read")
    except FileNotFoundError:
        return None
    try:
        return file.size()
    finally:
        file.close()


def _discard(storage: Storage, name: str) -> bool:
    try:
        storage.unlink(name)
    except FileNotFoundError:
        return False
    return True
