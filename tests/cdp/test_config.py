"""Configuration of disks and of the daemon."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdp import config
from cdp.config import DaemonConfig, DiskConfig
from journal.errors import InvalidInput

GOOD = DiskConfig(
    name="disk0",
    uuid="0123456789abcdef0123456789abcdef",
    size=1 << 30,
    block_size=512,
    backing="/srv/disk0.img",
    journal="/var/lib/cdp/disks/disk0/journal",
)


def changed(**values: Any) -> DiskConfig:
    return msgspec.structs.replace(GOOD, **values)


# ------------------------------------------------------------------------------------------- disks


def test_a_disk_is_saved_and_loaded(tmp_path: Path) -> None:
    saved = changed(window_seconds=None, overflow="throttle", released=True)
    config.save_disk(tmp_path, saved)
    assert config.load_disk(tmp_path) == saved
    assert [path.name for path in tmp_path.iterdir()] == ["disk.json"]
    assert oct((tmp_path / "disk.json").stat().st_mode & 0o777) == "0o600"


def test_identity_is_what_the_journal_writes() -> None:
    assert GOOD.id_bytes.hex() == GOOD.uuid
    assert len(config.new_uuid()) == 32


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": ".hidden"}, "cannot name a disk"),
        ({"name": "a@b"}, "cannot name a disk"),
        ({"name": "a:b"}, "cannot name a disk"),
        ({"name": "a/b"}, "cannot name a disk"),
        ({"name": ""}, "cannot name a disk"),
        ({"name": "x" * 65}, "cannot name a disk"),
        ({"name": "disk0\n"}, "cannot name a disk"),
        ({"name": "dísk"}, "cannot name a disk"),
        ({"uuid": "0"}, "32 hex digits"),
        ({"size": 0}, "above 0"),
        ({"size": 1000}, "use 512 or 1024"),
        ({"size": config.SIZE_MAX + 512}, "16 TiB"),
        ({"block_size": 520}, "logical block"),
        ({"backing": "relative"}, "backing is not absolute"),
        ({"journal": "relative"}, "journal is not absolute"),
        ({"window_seconds": -1.0}, "window"),
        ({"segment_bytes": 1}, "segment size"),
        ({"journal_limit": 1 << 20}, "journal limit"),
        ({"tail_bytes": 0}, "tail"),
        ({"sync_age_seconds": 0.0}, "sync-age"),
    ],
)
def test_what_is_impossible_is_refused_in_one_line(
    values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        changed(**values).checked()
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidInput):
        config.save_disk(tmp_path, changed(**values))
    assert list(tmp_path.iterdir()) == []


@given(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_a_good_name_is_a_directory_and_an_export(name: str) -> None:
    assert config.check_name(name) == name
    assert os.path.basename(name) == name
    assert not set(name) & set("@:/\\ \n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not what cdpd wrote"),
        (b"{", "not what cdpd wrote"),
        (b'{"name": 1}', "not what cdpd wrote"),
        (msgspec.json.encode({**msgspec.to_builtins(GOOD), "new": 1}), "unknown field"),
        (msgspec.json.encode({**msgspec.to_builtins(GOOD), "size": 5}), "use 512"),
    ],
)
def test_an_unusable_file_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "disk.json").write_bytes(content)
    with pytest.raises(InvalidInput, match=said) as caught:
        config.load_disk(tmp_path)
    assert str(tmp_path / "disk.json") in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"disk\.json cannot be read: No such file"):
        config.load_disk(tmp_path)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.save_disk(tmp_path, GOOD)

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        config.save_disk(tmp_path, changed(size=1 << 20))
    assert config.load_disk(tmp_path) == GOOD


def test_what_is_written_is_synced_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def traced(*args: Any, name: str = name, real: Any = real) -> Any:
            events.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, traced)
    config.write_atomically(tmp_path / "file", b"content")
    assert events == ["fsync", "replace", "fsync"]


# ------------------------------------------------------------------------------------------ daemon


def test_without_a_file_there_are_defaults() -> None:
    assert config.load_daemon(None) == DaemonConfig()
    assert DaemonConfig().checked().limits.view_age_seconds == 7 * 86_400


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "cdp.toml"
    path.write_text(
        """
        nbd = "tcp://127.0.0.1:10809"
        http = "127.0.0.1:9464"
        [limits]
        nbd-connections = 10
        view-overlay = "1GiB"
        [defaults]
        window = "2d"
        journal-limit = "100GiB"
        overflow = "throttle"
        """
    )
    loaded = config.load_daemon(path)
    assert loaded.nbd == "tcp://127.0.0.1:10809"
    assert loaded.limits.nbd_connections == 10
    assert loaded.limits.view_overlay_bytes == 1 << 30
    assert loaded.defaults.overflow == "throttle"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nbd =", "is not TOML"),
        ("ndb = 'x'", "unknown field"),
        ("[limits]\nnbd-connections = 0", "nbd-connections"),
        ("[limits]\nnbd_connections = 1", "unknown field"),
        ("[limits]\nview-age = '7 fortnights'", "limits.view-age"),
        ("[defaults]\noverflow = 'never'", "overflow"),
        ("[defaults]\nsegment = '64MB'", "defaults.segment"),
        ("nbd-socket-mode = '0999'", "nbd-socket-mode"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "cdp.toml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=said) as caught:
        config.load_daemon(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["missing.toml", "."])
def test_a_file_that_is_none(tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidInput, match=r"cannot be read|is not a file"):
        config.load_daemon(tmp_path / path)
