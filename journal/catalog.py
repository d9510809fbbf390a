"""The catalog: a small log of changes to a disk's state, kept twice.

**Words.** A *commit* is a list of changes (`catalog_state`) that takes effect as a whole. Each has
a number, 1, 2, 3 ... An *entry* holds one commit, or a whole *state*: "as of commit N it was this".
A *copy* is one of the two files ``catalog.0`` and ``catalog.1``: first a state, then the commits
after it, in places prepared beforehand (zeroes), so that a commit is one write and one sync without
a change of size, and needs no space. A copy that is full is replaced by a new file that begins with
the state.

**Entries.** At multiples of CATALOG_ALIGN, little-endian::

     0  magic "CDPCATLG"            32  number of the commit (u64)
     8  format version (u32)        40  kind: 1 changes, 2 state (u32)
    12  length of the body (u32)    44  0 (u32)
    16  disk (16 bytes)             48  XXH3-64 of bytes 0-47 and of the body
                                    56  the body, JSON

**Order of a commit.** Write to copy 0, sync copy 0, write to copy 1, sync copy 1, change the state
in memory, return. So at every moment at least one copy is whole, synced and not being touched, and
even a device that garbles what lies near an interrupted write cannot take both.

**After a crash the state is that of the last commit that returned, or that plus the one in flight;
never a mixture, never older.** A commit takes effect when its entry is whole, which its checksum
says: no mixture. One that returned lies synced in both copies, or in what has replaced them: never
older. One in flight is the last there is, since nothing is appended before both copies are synced.
A file takes another's place by being written under a temporary name, synced, renamed, its name
synced: in between either the old or the new one is found, which say the same, for nothing is
appended meanwhile; and the second copy is replaced only when the first's new name is durable.

**After a failed sync nothing is appended to those files again**: what the kernel claims to hold of
them may not be on the device. `CatalogFailed` is raised, then and ever after; the curator stops.
Every opening for writing copies what is whole into two new files before anything is appended, for
it cannot know what of a dead process's writes is durable, or what a failed sync has left.

**Damage.** What one copy has lost is taken from the other, entry by entry; both are new afterwards.
What is whole in neither is reported (``damage``), never guessed: the state is then that of the
entries that are left, and its user must not trust what they cannot prove (a lost commit may have
given up points; only what the redo log itself proves is openable then). The files as they were
found are kept beside, as ``catalog.0.damaged`` and ``catalog.1.damaged``. A torn end is told from
damage by the order of a commit: a crash tears one copy's end only, and if it is copy 1's, copy 0
has whole what was torn; anything else is damage, and reported.

A reader (``read_only``) takes no lock and changes nothing. It reads copy 1 first: whatever is begun
there, then lies in copy 0. What may have changed while it was read is read again.
"""

from __future__ import annotations

import errno
import json
import threading
from typing import Any, Final

from journal import catalog_state
from journal.catalog_copies import (
    CHANGES,
    COPIES,
    STATE,
    Loaded,
    first_difference,
    load,
    load_beside_a_writer,
    pack_entry,
    read_all,
)
from journal.catalog_state import (
    Bookmark,
    Crash,
    Gap,
    Hole,
    Op,
    Pin,
    Rollback,
    State,
    Thinned,
    apply_op,
    check_op,
    decode_ops,
    encode_ops,
)
from journal.errors import Corruption, JournalError, JournalFull
from journal.limits import (
    CATALOG_FILE_BYTES_MIN,
    CATALOG_FILE_BYTES_TIGHT,
    CATALOG_FILE_STATES_MIN,
)
from journal.storage import File, Storage

_TEMPORARY: Final = ".tmp"
_DAMAGED: Final = ".damaged"
_DIRECTORY: Final = ""  # that of the journal itself
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class CatalogFailed(JournalError):
    """A write or sync of it failed: the curator stops, the next one copies what is whole."""


class _Copy:
    """One copy that is being appended to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.file: File | None = None
        self.end = self.room = 0


class Catalog:
    """A disk's catalog.

    ``found``: whether there was one (a disk whose redo log says more than a catalog that was not
    found has lost it). ``damage``: what was durable and is whole in neither copy; when opened for
    writing it is also kept in the state's table ``damaged``, so that no later opening forgets it.
    ``notes``: what was taken from the other copy, for the log. ``failed``: set by the first
    failure.

    `commit` and all questions may be asked from any thread.
    """

    def __init__(self, storage: Storage, disk: bytes, loaded: Loaded, file_bytes: int) -> None:
        self._storage, self._disk = storage, disk
        self._state, self._number = loaded.state, loaded.number
        self._file_bytes_min = file_bytes
        self._copies: list[_Copy] = []
        self._lock = threading.Lock()
        self.found = loaded.found
        self.damage: tuple[Corruption, ...] = tuple(loaded.damage)
        self.notes: tuple[str, ...] = tuple(loaded.notes)
        self.failed: CatalogFailed | None = None

    @classmethod
    def open(
        cls,
        storage: Storage,
        disk: bytes,
        *,
        read_only: bool = False,
        file_bytes_min: int = CATALOG_FILE_BYTES_MIN,
    ) -> Catalog:
        """Read both copies; for writing, replace both by new files that begin with the state.

        One process at a time may have it open for writing (the holder of the curator's lock).

        :raises Corruption: it is the catalog of another disk.
        :raises UnknownVersion: written by a newer format.
        :raises JournalFull: no space for the new files; nothing has changed.
        :raises CatalogFailed: a new file could not be made durable.
        """
        loaded = load_beside_a_writer(storage, disk) if read_only else load(storage, disk)
        self = cls(storage, disk, loaded, file_bytes_min)
        if read_only:
            return self
        for place, error in enumerate(loaded.damage):
            key = f"catalog-{loaded.number}-{place}"
            value = {"file": error.file, "offset": error.offset, "what": error.what}
            apply_op(self._state, (("damaged", key), value))
        self._copies = [_Copy(name) for name in COPIES]
        try:
            with self._lock:
                if loaded.damage:
                    self._keep_evidence()
                for copy in self._copies:
                    self._replace(copy, 0)
        except JournalError:
            self.close()
            raise
        return self

    def commit(self, *ops: Op) -> None:
        """Make changes durable in both copies, all or none; back when they are.

        :raises ValueError: one of them is not valid; nothing has changed.
        :raises JournalFull: the files are full and there is no space for new ones; nothing has
            changed, and the same may be tried again when there is.
        :raises CatalogFailed: it may or may not be in the state of the next opening.
        """
        for op in ops:
            check_op(op)
        with self._lock:
            if self.failed is not None:
                raise self.failed
            assert self._copies, "opened for reading, or closed"
            entry = pack_entry(self._disk, self._number + 1, CHANGES, encode_ops(ops))
            for copy in self._copies:
                if copy.room < len(entry):
                    self._replace(copy, len(entry))
            try:
                for copy in self._copies:
                    self._append(copy, entry)
            except OSError as error:
                raise self._fail(error) from error
            except BaseException as error:
                self._fail(error)  # interrupted: what is in the files is not known either
                raise
            self._number += 1
            # What a later opening would read, and nothing that the caller may still change.
            for op in decode_ops(json.loads(json.dumps(encode_ops(ops)))):
                apply_op(self._state, op)

    def _append(self, copy: _Copy, entry: bytes) -> None:
        assert copy.file is not None
        assert len(entry) <= copy.room
        copy.file.write(copy.end, [entry])
        copy.file.sync()
        copy.end += len(entry)
        copy.room -= len(entry)

    def _fail(self, error: BaseException) -> CatalogFailed:
        self.failed = CatalogFailed(
            f"the catalog could not be made durable ({error}): look at the journal's device; "
            "the curator takes it up again when it is restarted"
        )
        return self.failed

    def repair(self) -> list[Corruption]:
        """Read both copies again; replace those that do not say what was committed. What was wrong.

        :raises JournalFull: no space for new files; nothing has changed.
        :raises CatalogFailed: a new file could not be made durable.
        """
        with self._lock:
            if self.failed is not None:
                raise self.failed
            assert self._copies, "opened for reading, or closed"
            found = []
            for copy in self._copies:
                place = first_difference(
                    self._storage, copy.name, self._disk, number=self._number, end=copy.end,
                    size=copy.end + copy.room,
                )  # fmt: skip
                if place is not None:
                    found.append(Corruption("damaged copy of the catalog", file=copy.name,
                                            offset=place))  # fmt: skip
                    self._replace(copy, 0)
            return found

    # ------------------------------------------------------------------------------- new files
    def _replace(self, copy: _Copy, needed: int) -> None:
        """Put a new file with the state, and room for ``needed`` bytes, in the copy's place."""
        entry = pack_entry(self._disk, self._number, STATE, self._state)
        ample = max(self._file_bytes_min, CATALOG_FILE_STATES_MIN * len(entry))
        tight = len(entry) + min(CATALOG_FILE_BYTES_TIGHT, self._file_bytes_min)
        try:
            for size in (ample, tight):
                size = max(size, len(entry) + needed)
                file = self._prepare(copy.name + _TEMPORARY, entry, size)
                if file is not None:
                    break
            else:
                raise JournalFull(
                    "no space to compact the catalog: free some on the journal's device"
                )
            self._storage.rename(copy.name + _TEMPORARY, copy.name)
            self._storage.sync_dir(_DIRECTORY)
        except JournalFull:
            raise
        except OSError as error:
            raise self._fail(error) from error
        except BaseException as error:
            self._fail(error)
            raise
        if copy.file is not None:
            copy.file.close()
        copy.file, copy.end, copy.room = file, len(entry), size - len(entry)

    def _prepare(self, name: str, entry: bytes, size: int) -> File | None:
        """A synced file of ``size`` bytes, the state and zeroes; None if there is no space."""
        self._discard(name)
        file: File | None = None
        try:
            file = self._storage.open(name, "create")
            file.write(0, [entry, bytes(size - len(entry))])
            file.sync()
        except OSError as error:
            if file is not None:
                file.close()
            if error.errno not in _NO_SPACE:
                raise
            self._discard(name)
            return None
        return file

    def _keep_evidence(self) -> None:
        """Copies of damaged files, for whoever has to find out: the originals are replaced."""
        for name in COPIES:
            try:
                original = self._storage.open(name, "read")
            except FileNotFoundError:
                continue
            try:
                content = read_all(original)
            finally:
                original.close()
            self._discard(name + _DAMAGED)
            kept: File | None = None
            try:
                kept = self._storage.open(name + _DAMAGED, "create")
                kept.write(0, [content])
                kept.sync()
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise self._fail(error) from error
            finally:
                if kept is not None:
                    kept.close()

    def _discard(self, name: str) -> None:
        try:
            self._storage.unlink(name)
        except FileNotFoundError:
            pass

    def close(self) -> None:
        """Close the files; every commit is durable already."""
        with self._lock:
            for copy in self._copies:
                if copy.file is not None:
                    copy.file.close()
            self._copies = []

    # ------------------------------------------------------------------------------- questions
    def refresh(self) -> None:
        """Read it again (only when opened ``read_only``)."""
        assert not self._copies
        loaded = load_beside_a_writer(self._storage, self._disk)
        with self._lock:
            self._state, self._number = loaded.state, loaded.number
            self.found, self.damage = loaded.found, tuple(loaded.damage)
            self.notes = tuple(loaded.notes)

    @property
    def number(self) -> int:
        """Number of the last commit."""
        with self._lock:
            return self._number

    def state(self) -> State:
        """All of it, a copy."""
        with self._lock:
            text = json.dumps(self._state)
        return json.loads(text)  # type: ignore[no-any-return]

    def get(self, name: str, default: Any = None) -> Any:
        """One value at the top (not to be changed); better one of the typed questions below."""
        with self._lock:
            return self._state.get(name, default)

    def _number_of(self, name: str) -> int:
        with self._lock:
            return int(self._state.get(name, 0))

    def _items(self, table: str) -> list[Any]:
        with self._lock:
            return catalog_state.items(self._state, table)

    @property
    def applied(self) -> int:
        """The highest seq whose effects are in the backing; never overstated."""
        return self._number_of("applied")

    @property
    def window_start(self) -> int:
        """First seq of the window."""
        return self._number_of("window_start")

    @property
    def reclaimed(self) -> int:
        """Highest seq of the redo segments that were given up."""
        return self._number_of("reclaimed")

    @property
    def voided(self) -> int:
        """Others wrote to the backing after this seq: what the logs say of up to it is void."""
        return self._number_of("voided")

    @property
    def scanned(self) -> int:
        """Control records up to this seq are in here."""
        return self._number_of("scanned")

    @property
    def clean(self) -> bool:
        """Whether the last curator ended by a clean stop."""
        return bool(self.get("clean", False))

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """Of the backing at the last clean stop."""
        with self._lock:
            found = self._state.get("fingerprint")
            return None if found is None else dict(found)

    def undo(self) -> dict[int, int]:
        """Published end of every undo segment there is."""
        return dict(sorted(self._items("undo")))

    @property
    def undo_highest(self) -> int:
        """The highest undo segment that was ever listed."""
        return self._number_of("undo_highest")

    def bookmarks(self) -> dict[str, Bookmark]:
        """By label, in order of their seqs."""
        found: list[Bookmark] = self._items("bookmarks")
        return {item.label: item for item in sorted(found, key=lambda item: item.seq)}

    def thinned(self) -> list[Thinned]:
        """By seq."""
        return sorted(self._items("thinned"))

    def pins(self) -> dict[str, Pin]:
        """By id."""
        return {item.id: item for item in self._items("pins")}

    def gaps(self) -> list[Gap]:
        """By seq."""
        return sorted(self._items("gaps"), key=lambda item: item.begin)

    def rollbacks(self) -> list[Rollback]:
        """By the seq of their begin."""
        return sorted(self._items("rollbacks"), key=lambda item: item.begin)

    def holes(self) -> list[Hole]:
        """By seq."""
        return sorted(self._items("holes"))

    def crashes(self) -> list[Crash]:
        """By the seq of the crash record."""
        return sorted(self._items("crashes"))

    def sizes(self) -> list[tuple[int, int]]:
        """(seq, bytes of the disk from that seq on), ascending."""
        return sorted(self._items("sizes"))

    def clock(self) -> list[tuple[int, int]]:
        """(stamp, wall-clock time minus stamp from there on), ascending."""
        return sorted(self._items("clock"))

    def damaged(self) -> dict[str, dict[str, Any]]:
        """What was found damaged, as it was reported."""
        return dict(self._items("damaged"))

    def verdicts(self) -> dict[str, dict[str, Any]]:
        """What checks of points found."""
        return dict(self._items("verdicts"))
