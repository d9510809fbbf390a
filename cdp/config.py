"""Configuration: of one disk (`disk.json` in its directory), and of the daemon (a TOML file).

A disk's configuration is state: it is only changed through the daemon, which writes it atomically
and durably. The daemon's file is the administrator's, and never written.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
import uuid as uuids
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from cdp.units import format_duration, format_size, parse_duration, parse_size
from journal.errors import InvalidInput
from journal.format import BLOCK, BLOCKS_MAX
from journal.limits import (
    GIB,
    MIB,
    SEGMENT_BYTES_DEFAULT,
    SEGMENT_BYTES_MAX,
    SEGMENT_BYTES_MIN,
    TAIL_BYTES_DEFAULT,
    TAIL_BYTES_MIN,
    TAIL_UNSYNCED_BYTES_MAX,
)

DISK_FILE: Final = "disk.json"
TIB: Final = 1024 * GIB
SIZE_MAX: Final = BLOCKS_MAX * BLOCK
SYNC_AGE_SECONDS_MIN: Final = 0.01
SYNC_AGE_SECONDS_MAX: Final = 60.0
SCRUB_INTERVAL_SECONDS_MIN: Final = 3600.0
SCRUB_RATE_MIN: Final = 64 << 10
# A fifth of what a single hard disk gives; a journal of 10 TiB takes four of the seven days.
SCRUB_RATE_DEFAULT: Final = 32 * MIB

Overflow = Literal["shrink", "throttle", "block", "gap"]
AfterLoss = Literal["auto", "hold", "offer"]
OVERFLOWS: Final = ("shrink", "throttle", "block", "gap")

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_UUID: Final = re.compile(r"[0-9a-f]{32}")


# ------------------------------------------------------------------------------------------ disks


class DiskConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What is protected, where it lies, and for how long. Sizes in bytes, paths absolute.

    `window_seconds` None keeps everything until the limit. `tail_bytes` bounds the work that is not
    applied yet, `unsynced_bytes` what a crash makes recovery copy. `released`: the backing is in
    the administrator's hands, see `cdp disk release`. `scrub_interval_seconds` None: the journal is
    scrubbed only when somebody asks; `scrub_rate`: bytes a second, None for no bound.
    """

    name: str
    uuid: str
    size: int
    block_size: int
    backing: str
    journal: str
    backing_is_device: bool = False
    # Whether `backing` is the sparse file that was created because none was named.
    backing_is_own: bool = False
    window_seconds: float | None = None
    journal_limit: int = 10 * GIB
    overflow: Overflow = "shrink"
    segment_bytes: int = SEGMENT_BYTES_DEFAULT
    tail_bytes: int = TAIL_BYTES_DEFAULT
    unsynced_bytes: int = TAIL_UNSYNCED_BYTES_MAX
    sync_age_seconds: float = 1.0
    after_loss: AfterLoss = "auto"
    released: bool = False
    scrub_interval_seconds: float | None = 7 * 86400.0
    scrub_rate: int | None = SCRUB_RATE_DEFAULT

    @property
    def id_bytes(self) -> bytes:
        """The identity as the journal writes it."""
        return bytes.fromhex(self.uuid)

    def checked(self) -> DiskConfig:
        """Itself, when every value is possible.

        :raises InvalidInput: names the first that is not.
        """
        check_name(self.name)
        _require(_UUID.fullmatch(self.uuid) is not None, f"uuid {self.uuid!r} is not 32 hex digits")
        check_block_size(self.block_size)
        check_size(self.size, self.block_size)
        for what, path in (("backing", self.backing), ("journal", self.journal)):
            _require(
                os.path.isabs(path) and "\0" not in path,
                f"the path of the {what} is not absolute: {path!r}",
            )
        if self.window_seconds is not None:
            _between("the window", self.window_seconds, 0, 1e10, format_duration)
        _between("the segment size", self.segment_bytes, SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX)
        _between("the tail", self.tail_bytes, TAIL_BYTES_MIN, 1 << 50)
        _between("the unsynced tail", self.unsynced_bytes, MIB, 1 << 40)
        _between("the journal limit", self.journal_limit, 4 * self.segment_bytes, 1 << 60)
        _between(
            "sync-age", self.sync_age_seconds, SYNC_AGE_SECONDS_MIN, SYNC_AGE_SECONDS_MAX,
            format_duration,
        )  # fmt: skip
        if self.scrub_interval_seconds is not None:
            _between(
                "scrub-interval", self.scrub_interval_seconds, SCRUB_INTERVAL_SECONDS_MIN, 1e10,
                format_duration,
            )  # fmt: skip
        if self.scrub_rate is not None:
            _between("scrub-rate", self.scrub_rate, SCRUB_RATE_MIN, 1 << 50)
        return self


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidInput(message)


def _between(
    what: str, value: float, low: float, high: float, show: Callable[[float], str] = format_size
) -> None:
    if not low <= value <= high:
        raise InvalidInput(
            f"{what} is {show(value)}: it must be between {show(low)} and {show(high)}"
        )


def check_name(name: str) -> str:
    """The name, if it can be one of a disk: it is a directory, an export and a label of metrics.

    :raises InvalidInput: it cannot.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidInput(
            f"{name[:80]!r} cannot name a disk: use 1 to 64 of A-Z a-z 0-9 . _ -, none of .- first"
        )
    return name


def check_block_size(block_size: int) -> int:
    """The size of a logical block, if it is one: 512, 1024, 2048 or 4096.

    :raises InvalidInput: it is not.
    """
    _require(
        block_size in (512, 1024, 2048, 4096),
        f"a logical block has 512, 1024, 2048 or 4096 bytes, not {block_size}",
    )
    return block_size


def check_size(size: int, block_size: int) -> int:
    """The size of a disk, if it is possible with these logical blocks.

    :raises InvalidInput: it is not.
    """
    _require(size > 0, "the size of a disk must be above 0")
    _require(size <= SIZE_MAX, f"a disk has at most {SIZE_MAX} bytes (16 TiB), not {size}")
    if size % block_size:
        low = size - size % block_size
        raise InvalidInput(
            f"{size} bytes is no multiple of the logical block size {block_size}: "
            f"use {f'{low} or ' if low else ''}{low + block_size}"
        )
    return size


def new_uuid() -> str:
    """A new identity of a disk: 32 hex digits."""
    return uuids.uuid4().hex


# ------------------------------------------------------------------------------------------ files


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replaces the file so that, whenever the power fails, either the old or the new is there."""
    temporary = path.with_name(path.name + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None:
            # Of a descriptor the kernel does not say which file it was.
            error.filename = os.fspath(path)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_T = TypeVar("_T")


def read_json(path: Path, kind: type[_T]) -> _T:
    """The object in a file that `write_json` wrote.

    :raises InvalidInput: it cannot be read or says something else; names the file.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise InvalidInput(f"{path} is not what cdpd wrote: {error}") from error


def write_json(path: Path, value: object) -> None:
    """Writes an object atomically and durably, for `read_json` and for people."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def load_disk(directory: Path) -> DiskConfig:
    """The configuration in the directory of a disk, checked.

    :raises InvalidInput: it is missing, unreadable or impossible; names the file.
    """
    path = directory / DISK_FILE
    config = read_json(path, DiskConfig)
    try:
        return config.checked()
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def save_disk(directory: Path, config: DiskConfig) -> None:
    """Writes the configuration of a disk, atomically and durably."""
    write_json(directory / DISK_FILE, config.checked())


# ----------------------------------------------------------------------------------------- daemon

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class LimitsConfig(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """How much of anything clients may use."""

    nbd_connections: Positive = 256
    nbd_handshakes: Positive = 64
    handshake_seconds: Seconds = 30.0
    views: Positive = 64
    view_overlay: str = "10GiB"
    view_age: str = "7d"

    @property
    def view_overlay_bytes(self) -> int:
        """Bytes that the overlay of one writable view may take."""
        return parse_size(self.view_overlay)

    @property
    def view_age_seconds(self) -> float:
        """After this time an open view is closed: it keeps history from being reclaimed."""
        return parse_duration(self.view_age)


def _or_none(text: str, parse: Callable[[str], _T]) -> _T | None:
    return None if text == "none" else parse(text)


class DefaultsConfig(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """What a new disk gets unless something else is asked for."""

    window: str = "none"
    # Empty: 20 % of the journal's file system, at least 1 GiB and at most 1 TiB.
    journal_limit: str = ""
    overflow: Overflow = "shrink"
    segment: str = "64MiB"
    tail: str = "1GiB"
    sync_age: str = "1s"
    after_loss: AfterLoss = "auto"
    scrub_interval: str = "7d"  # or "none"
    scrub_rate: str = "32MiB"  # bytes a second, or "none"

    def check(self) -> None:
        """:raises InvalidInput: no disk can have these."""
        _require(self.overflow != "gap", "overflow=gap is not there yet: choose another policy")
        values: dict[str, Any] = {}
        if self.journal_limit:
            values["journal_limit"] = parse_size(self.journal_limit)
        DiskConfig(
            name="any", uuid=new_uuid(), size=BLOCK, block_size=BLOCK, backing="/", journal="/",
            window_seconds=None if self.window == "none" else parse_duration(self.window),
            segment_bytes=parse_size(self.segment), tail_bytes=parse_size(self.tail),
            sync_age_seconds=parse_duration(self.sync_age),
            scrub_interval_seconds=_or_none(self.scrub_interval, parse_duration),
            scrub_rate=_or_none(self.scrub_rate, parse_size), **values,
        ).checked()  # fmt: skip


class DaemonConfig(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """The whole file. `nbd` and `http` are addresses, as on the command line, which wins."""

    nbd: str = ""
    http: str = ""
    allow_remote_without_tls: bool = False
    # Who may use disks through DIR/nbd.sock; a VM's own user needs 0666 and an open directory.
    nbd_socket_mode: Annotated[str, Meta(pattern="^0?[0-7]{3}$")] = "0600"
    limits: LimitsConfig = LimitsConfig()
    defaults: DefaultsConfig = DefaultsConfig()

    def checked(self) -> DaemonConfig:
        """Itself, when every size and duration in it is one.

        :raises InvalidInput: names the first that is not.
        """
        sizes = {
            "limits.view-overlay": self.limits.view_overlay,
            "defaults.segment": self.defaults.segment,
            "defaults.tail": self.defaults.tail,
        }
        if self.defaults.journal_limit:
            sizes["defaults.journal-limit"] = self.defaults.journal_limit
        durations = {
            "limits.view-age": self.limits.view_age,
            "defaults.sync-age": self.defaults.sync_age,
        }
        if self.defaults.window != "none":
            durations["defaults.window"] = self.defaults.window
        if self.defaults.scrub_interval != "none":
            durations["defaults.scrub-interval"] = self.defaults.scrub_interval
        if self.defaults.scrub_rate != "none":
            sizes["defaults.scrub-rate"] = self.defaults.scrub_rate
        for texts, parse in ((sizes, parse_size), (durations, parse_duration)):
            for key, text in texts.items():
                try:
                    parse(text)
                except InvalidInput as error:
                    raise InvalidInput(f"{key}: {error}") from error
        try:
            self.defaults.check()
        except InvalidInput as error:
            raise InvalidInput(f"defaults: {error}") from error
        return self


def load_daemon(path: Path | None) -> DaemonConfig:
    """The daemon's configuration; the defaults without a file.

    :raises InvalidInput: the file is missing or wrong: one line that names it and the place.
    """
    if path is None:
        return DaemonConfig()
    try:
        with open(path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidInput(f"{path} is not a file: name a TOML file with --config")
            values: dict[str, Any] = tomllib.load(file)
        return msgspec.convert(values, DaemonConfig).checked()
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{path}: {error}") from error
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def default_journal_limit(directory: Path) -> int:
    """A fifth of the file system that holds `directory`, within sense: 1 GiB to 1 TiB."""
    numbers = os.statvfs(directory)
    fifth = numbers.f_frsize * numbers.f_blocks // 5
    return min(max(fifth // MIB * MIB, GIB), TIB)
