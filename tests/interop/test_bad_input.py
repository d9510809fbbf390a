"""What administrators get wrong: one line that says what to do, nothing lost, the daemon goes on.

After every test the disk that all of them share has its content, and no process was restarted.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cdp.nbd.client import NbdClient, NbdNegotiationError, NbdServerError
from cdp.nbd.uri import format_uri
from tests.interop.commands import Commands
from tests.interop.daemon import Daemon
from tests.interop.devices import loop_device

MIB = 1 << 20
SIZE = MIB
WRITES = 5


@pytest.fixture(scope="module")
def cdp(shared: Daemon) -> Commands:
    """`cdp` for the module's daemon, which has the disk ``disk0`` with some history."""
    commands = Commands(shared.directory)
    commands("disk", "add", "disk0", "--size", str(SIZE))
    with NbdClient.connect(shared.uri("disk0")) as client:
        for number in range(WRITES):
            client.write(number * 4096, bytes([number + 1]) * 4096)
        client.flush()
    commands("bookmark", "add", "disk0", "start")
    return commands


def content() -> bytes:
    """What disk0 holds."""
    return b"".join(bytes([number + 1]) * 4096 for number in range(WRITES)).ljust(SIZE, b"\0")


@pytest.fixture(autouse=True)
def _nothing_is_lost(shared: Daemon, cdp: Commands) -> Iterator[None]:
    before = sorted((shared.directory / "disks").iterdir())
    yield
    assert shared.process is not None
    assert shared.process.poll() is None
    assert sorted((shared.directory / "disks").iterdir()) == before
    disk = cdp.disk("disk0")
    assert (disk["state"], disk["reason"]) == ("served", None)
    assert set(disk["restarts"].values()) == {0}
    with NbdClient.connect(shared.uri("disk0"), timeout=20) as client:
        assert client.read(0, SIZE) == content()


# ------------------------------------------------------------------------------------------- adding


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["disk0", "--size", "1M"], "a disk 'disk0' already: choose another name"),
        (["", "--size", "1M"], "cannot name a disk: use "),
        ([".", "--size", "1M"], "cannot name a disk: use "),
        (["..", "--size", "1M"], "cannot name a disk: use "),
        (["a/b", "--size", "1M"], "cannot name a disk: use "),
        (["a@b", "--size", "1M"], "cannot name a disk: use "),
        (["a b", "--size", "1M"], "cannot name a disk: use "),
        (["a,b", "--size", "1M"], "cannot name a disk: use "),
        (["a\nb", "--size", "1M"], "cannot name a disk: use "),
        (["bär", "--size", "1M"], "cannot name a disk: use "),
        (["x" * 65, "--size", "1M"], "cannot name a disk: use "),
        (["--size", "1M", "--", "-x"], "cannot name a disk: use "),
        (["new", "--size", "0"], "must be above 0"),
        (["new", "--size", "100"], "no multiple of the logical block size 512: use 512"),
        (["new", "--size", "1000"], "use 512 or 1024"),
        (["new", "--size", "5000", "--block-size", "4096"], "use 4096 or 8192"),
        (["new", "--size", "1M", "--block-size", "77"], "512, 1024, 2048 or 4096 bytes, not 77"),
        (["new", "--size", "17T"], r"at most 17592186044416 bytes \(16 TiB\)"),
        (["new", "--size", "1M", "--segment-bytes", "7"], "must be between 1 MiB and "),
        (["new", "--size", "1M", "--journal-limit", "1K"], "must be between 4 MiB and "),
        (["new", "--size", "1M", "--overflow", "hide"], "overflow is one of shrink, "),
        (["new", "--size", "1M", "--overflow", "gap"], "gap.*not there yet"),
    ],
)
def test_a_disk_that_cannot_be(cdp: Commands, words: list[str], says: str) -> None:
    cdp.refused("disk", "add", *words, says=says)
    assert [disk["name"] for disk in cdp.json("disk", "list")] == ["disk0"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["new"], "give the --size, or a --backing"),
        (["new", "--size", "1GB"], "1G or 1GiB"),
        (["new", "--size", "-5"], "is no size: write bytes"),
        (["new", "--size", "much"], "is no size: write bytes"),
        (["new", "--size", "1M", "--window", "5x"], "is no duration: write 90s"),
        (["new", "--size", "1M", "--frob"], "No such option"),
        (["-x", "--size", "1M"], "No such option"),
    ],
)
def test_wrong_usage_is_status_2(cdp: Commands, words: list[str], says: str) -> None:
    cdp.refused("disk", "add", *words, says=says, status=2)


def test_backings_that_cannot_be(cdp: Commands, shared: Daemon, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "odd").write_bytes(bytes(1000))
    (tmp_path / "small").write_bytes(bytes(MIB))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words, says in [
        ("missing", [], "does not exist: create it, or leave out --backing"),
        ("missing/x", [], "does not exist: create it"),
        ("small/x", [], "cannot be opened: Not a directory"),
        ("loop", [], "cannot be opened: "),
        ("", [], "neither a file nor a block device"),
        ("fifo", [], "neither a file nor a block device"),
        ("empty", [], "is empty: say how large"),
        ("odd", [], "no multiple of 512: say how many of them with --size"),
        ("odd", ["--size", "1024"], "has 1000 bytes, 1024 are needed: enlarge it, or use a small"),
        ("small", ["--size", "2M"], "has 1048576 bytes, 2097152 are needed: enlarge it"),
    ]:
        cdp.refused("disk", "add", "new", "--backing", str(tmp_path / name), *words, says=says)
    cdp.refused("disk", "add", "new", "--backing", "/dev/null", says="neither a file nor a block")
    assert (tmp_path / "small").read_bytes() == bytes(MIB)


def test_one_backing_belongs_to_one_disk(cdp: Commands, shared: Daemon, tmp_path: Path) -> None:
    own = shared.directory / "disks" / "disk0" / "backing.img"
    (tmp_path / "soft").symlink_to(own)
    os.link(own, shared.directory / "hard")
    other = shared.directory / "disks" / ".." / "disks" / "disk0" / "backing.img"
    for path in (own, other, tmp_path / "soft", shared.directory / "hard"):
        says = "is the backing of disk0 already: name another"
        cdp.refused("disk", "add", "new", "--backing", str(path), says=says)
    (shared.directory / "hard").unlink()


def test_a_backing_that_somebody_else_has_locked(cdp: Commands, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    with subprocess.Popen(["flock", str(image), "cat"], stdin=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        while subprocess.run(["flock", "-n", str(image), "true"], check=False).returncode == 0:
            assert holder.poll() is None
        says = "is in use by another program: stop that first"
        cdp.refused("disk", "add", "new", "--backing", str(image), says=says)
        holder.stdin.close()


@pytest.mark.needs_tool("losetup", "mkfs.ext4")
def test_a_mounted_device_is_neither_protected_nor_restored_to(
    cdp: Commands, tmp_path: Path, not_here: Callable[[str], Any]
) -> None:
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        not_here("mounting needs root and loop devices")
    image, place = tmp_path / "image", tmp_path / "mnt"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    with loop_device(image) as device:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        subprocess.run(["mount", device, place], check=True)
        try:
            (place / "file").write_text("precious")
            says = "is in use, mounted perhaps: unmount it"
            cdp.refused("disk", "add", "new", "--backing", device, says=says)
            words = ["restore", "disk0", "--to", "start", "--output", device, "--yes"]
            cdp.refused(*words, says="is in use: unmount it")
            assert (place / "file").read_text() == "precious"
        finally:
            subprocess.run(["umount", place], check=True)
    with image.open("r+b") as file:
        file.truncate(SIZE // 2)
    with loop_device(image) as device:
        words = ["restore", "disk0", "--to", "start", "--output", device, "--yes"]
        cdp.refused(*words, says=f"has {SIZE // 2} bytes, the disk had {SIZE}: name a larger")
        cdp.refused(*words, "--format", "qcow2", says="restore it raw, and qcow2 into a file")


def test_journals_that_cannot_be(cdp: Commands, shared: Daemon, tmp_path: Path) -> None:
    theirs = shared.directory / "disks" / "disk0" / "journal"
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    (tmp_path / "link").symlink_to(shared.directory)
    for path, says in [
        (tmp_path / "file", "is no directory: a journal needs one of its own"),
        (tmp_path / "file" / "x", "cannot be created: Not a directory"),
        (tmp_path / "full", "is not empty: a journal needs a directory of its own"),
        (Path("/proc/nosuch"), "cannot be created: "),
        (theirs, "holds the journal of disk0: name another"),
        (theirs / "redo", "holds the journal of disk0: name another"),
        (theirs / "new" / "new", "holds the journal of disk0: name another"),
        (theirs.parent, "holds the journal of disk0: name another"),
        (tmp_path / "link" / "disks" / "disk0" / "journal" / "x", "holds the journal of disk0"),
    ]:
        cdp.refused("disk", "add", "new", "--size", "1M", "--journal", str(path), says=says)
    assert (tmp_path / "full" / "file").read_text() == "precious"
    assert not (theirs / "new").exists()
    assert not (shared.directory / "disks" / "new").exists()


def test_the_journal_of_another_disk_is_not_taken_over(
    cdp: Commands, shared: Daemon, tmp_path: Path
) -> None:
    theirs = shared.directory / "disks" / "disk0" / "journal"
    copied = tmp_path / "copied"
    subprocess.run(["cp", "-a", theirs, copied], check=True)
    before = sorted(copied.rglob("*"))
    words = ["disk", "add", "new", "--size", "1M", "--journal", str(copied)]
    cdp.refused(*words, says="is not empty: .*if one was left there by an earlier disk, delete it")
    assert sorted(copied.rglob("*")) == before


# ----------------------------------------------------------------------------------- unknown things


@pytest.mark.parametrize(
    "words",
    [
        ["status"], ["disk", "drain"], ["disk", "release"], ["disk", "remove"], ["scrub"],
        ["timeline"], ["points"], ["bookmark", "list"],
    ],
)  # fmt: skip
def test_an_unknown_disk(cdp: Commands, words: list[str]) -> None:
    cdp.refused(*words, "nosuch", says="no disk 'nosuch' is protected; there are: disk0")
    cdp.refused(*words, "../disk0", says=r"no disk|nothing can be called")
    cdp.refused(*words, "", says=r"no disk|nothing can be called")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["disk", "resize", "nosuch", "1M"], "no disk 'nosuch' is protected"),
        (["disk", "set", "nosuch", "window=1d"], "no disk 'nosuch' is protected"),
        (["disk", "resume", "nosuch", "--unchanged"], "no disk 'nosuch' is protected"),
        (["rollback", "nosuch", "--to", "now", "--yes"], "no disk 'nosuch' is protected"),
        (["rollback", "disk0,nosuch", "--to", "now", "--yes"], "no disk 'nosuch' is protected"),
        (["restore", "nosuch", "--to", "now", "--output", "x"], "no disk 'nosuch' is protected"),
        (["view", "open", "nosuch", "--at", "now"], "no disk 'nosuch' is protected"),
        (["bookmark", "add", "disk0,nosuch", "b"], "no disk 'nosuch' is protected"),
        (["bookmark", "remove", "disk0", "nosuch"], "no bookmark 'nosuch': see 'cdp bookmark li"),
        (["bookmark", "remove", "disk0", "../x"], "nothing can be called"),
        (["bookmark", "add", "disk0", "start"], "a bookmark 'start' already: choose another"),
        (["bookmark", "add", "disk0", "now"], "means a point by itself: choose another"),
        (["bookmark", "add", "disk0", "a b"], "use letters, digits"),
        (["bookmark", "add", "disk0", "2026-01-01"], "would be taken for a time"),
        (["view", "close", "nosuch"], "no view 'nosuch': see 'cdp view list'"),
        (["view", "close", ""], "nothing can be called ''"),
        (["view", "close", "../.."], "nothing can be called"),
        (["disk", "resume", "disk0", "--give-up-history"], "neither released nor "),
        (["disk", "resume", "disk0", "--unchanged"], "neither released nor "),
    ],
)
def test_what_is_not_there(cdp: Commands, words: list[str], says: str) -> None:
    cdp.refused(*words, says=says)
    assert [mark["label"] for mark in cdp.json("bookmark", "list", "disk0")] == ["start"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["set", "disk0", "foo=1"], "no setting 'foo': choose window, "),
        (["set", "disk0", "journal-limit=5"], "must be between 256 MiB and "),
        (["set", "disk0", "journal-limit=none"], "cannot be 'none'"),
        (["set", "disk0", "sync-age=0"], "sync-age is 0 s: it must be between 0.01 s and 1 min"),
        (["set", "disk0", "sync-age=1h"], "must be between"),
        (["set", "disk0", "tail=1K"], "the tail is 1 KiB: it must be between 64 MiB and "),
        (["set", "disk0", "overflow=hide"], "overflow is one of "),
        (["set", "disk0", "after-loss=none"], "after-loss is one of auto, hold, offer"),
        (["set", "disk0", "scrub-interval=1m"], "scrub-interval is 1 min: it must be between 1 h"),
        (["set", "disk0", "scrub-rate=1"], "scrub-rate is 1 B: it must be between 64 KiB and "),
        (["resize", "disk0", "0"], "must be above 0"),
        (["resize", "disk0", "1000"], "use 512 or 1024"),
        (["resize", "disk0", "17T"], "at most"),
    ],
)
def test_settings_that_cannot_be(cdp: Commands, words: list[str], says: str) -> None:
    before = cdp.disk("disk0")
    cdp.refused("disk", *words, says=says)
    after = cdp.disk("disk0")
    keys = ("size", "window_configured", "journal_limit", "overflow", "tail_bytes", "after_loss")
    assert [after[key] for key in keys] == [before[key] for key in keys]


@pytest.mark.parametrize(
    "words",
    [
        ["set", "disk0"], ["set", "disk0", "foo"], ["set", "disk0", "window=-5"],
        ["set", "disk0", "window=abc"], ["resize", "disk0", "x"], ["resize", "disk0"],
        ["resume", "disk0"], ["resume", "disk0", "--unchanged", "--give-up-history"], ["frob"],
    ],
)  # fmt: skip
def test_wrong_usage_of_a_disk(cdp: Commands, words: list[str]) -> None:
    cdp.refused("disk", *words, says="see 'cdp disk", status=2)


# ------------------------------------------------------------------------------------- rolling back


def test_a_disk_in_use_is_not_rolled_back(cdp: Commands, shared: Daemon) -> None:
    cdp.refused("rollback", "disk0", "--to", "start", says="see --dry-run, then say --yes")
    with NbdClient.connect(shared.uri("disk0"), timeout=20) as client:
        client.write(0, b"\xff" * 4096)
        words = ["rollback", "disk0", "--to", "start", "--yes"]
        cdp.refused(*words, says="in use by 1 connection.*stop what uses it, or say --disconnect")
        assert client.read(0, 4096) == b"\xff" * 4096
        assert cdp.json("rollback", "disk0", "--to", "start", "--dry-run")["plans"][0]["bytes"]
        cdp(*words, "--disconnect")
        with pytest.raises((OSError, EOFError, NbdServerError)):
            client.read(0, 4096)


@pytest.mark.parametrize("names", ["", ",", "disk0,", "disk0,disk0"])
def test_names_of_no_disks(cdp: Commands, names: str) -> None:
    cdp.refused("rollback", names, "--to", "now", "--yes", says="name each disk once", status=2)
    cdp.refused("bookmark", "add", names, "b", says="name each disk once", status=2)


# ---------------------------------------------------------------------------------------- restoring


def test_places_that_cannot_be_restored_to(cdp: Commands, shared: Daemon, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("precious")
    own = shared.directory / "disks" / "disk0"
    for path, words, says in [
        (tmp_path / "old", [], "exists: name another file, or say --force"),
        (tmp_path / "nosuch" / "new", [], "is no directory: create it first"),
        (tmp_path, [], "neither a file nor a block device: name another output"),
        (Path("/dev/null"), [], "neither a file nor a block device"),
        (own / "backing.img", ["--force"], "a disk's backing: name another file"),
        (own / "disk.json", ["--force"], "a disk's backing: name another file"),
        (own / "journal" / "catalog.0", ["--force"], "a disk's backing: name another file"),
    ]:
        cdp.refused("restore", "disk0", "--to", "start", "--output", str(path), *words, says=says)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "precious"
    words = ["restore", "disk0", "--to", "start", "--output", str(tmp_path / "new")]
    cdp.refused(*words, "--format", "vmdk", says="is one of raw, qcow2", status=2)
    assert cdp.json("view", "list") == []


# ----------------------------------------------------------------------------------- points in time


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("seq:99999", "has not been written yet; openable: seq:0 .* to seq:"),
        ("seq:-1", "followed by a record's number, as in seq:4711"),
        ("seq:", "followed by a record's number, as in seq:4711"),
        ("seq:x", "followed by a record's number, as in seq:4711"),
        ("seq:" + "9" * 20, "followed by a record's number|no record has such a number"),
        ("@1", "is not kept; openable: seq:0 .*nearest bookmarks: start"),
        ("@99999999999", "lies in the future.*name a time that has passed"),
        ("@", "followed by UNIX seconds"),
        ("@x", "followed by UNIX seconds"),
        ("@1.0123456789", "at most 9 decimals"),
        ("-", "as in -10m"),
        ("-10", "write 90s, 10m"),
        ("-10y", "write 90s, 10m"),
        ("-1h1h", "each unit once"),
        ("-50000w", "before 1970"),
        ("-50w", "is not kept; openable: seq:0"),
        ("", "no point in time: say now, -10m"),
        ("   ", "no point in time: say now, -10m"),
        ("a b", "no point in time: say now, -10m"),
        ("a\nb", "no point in time: say now, -10m"),
        ("now + 1h", "no point in time: say now, -10m"),
        ("\U0001f642", "no point in time: say now, -10m"),
        ("x" * 300, "at most 200 characters"),
        ("nosuch", "no bookmark 'nosuch'; the newest are: start"),
        ("bookmark:nosuch", "no bookmark 'nosuch'; the newest are: start"),
        ("bookmark:", "followed by a bookmark's label"),
        ("yesterday", "is a whole day: add the time of day"),
        ("12/11/2025 14:00", "two readings: say 2025-11-12 or 2025-12-11"),
        ("2025-13-01", "there is no time '2025-13-01'"),
        ("2025-02-30T10:00", "there is no time '2025-02-30T10:00'"),
        ("2025-01-01T25:00", "there is no time"),
        ("2999-01-01", "lies in the future"),
        ("2025-10-26 02:30", "happened twice.*say 2025-10-26T02:30:00.02:00 .@1761438600. or "),
        ("2026-03-29 02:30", "never happened.*say 2026-03-29T01:30:00.01:00 .@1774744200. or "),
    ],
)
def test_points_that_cannot_be_opened(
    cdp: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, says: str
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    cdp.refused("restore", "disk0", "--to", spec, "--output", str(tmp_path / "new"), says=says)
    cdp.refused("view", "open", "disk0", "--at", spec, says=says)
    cdp.refused("rollback", "disk0", "--to", spec, "--yes", says=says)
    assert list(tmp_path.iterdir()) == []
    assert cdp.json("view", "list") == []


def test_a_record_of_one_disk_is_none_of_another(cdp: Commands) -> None:
    words = ["rollback", "disk0,other", "--to", "seq:1", "--yes"]
    cdp.refused(*words, says="a seq is one disk's: for several disks name a time", status=2)


def test_an_unknown_zone_is_refused_only_where_it_matters(
    cdp: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Mars/Phobos")
    says = "TZ=Mars/Phobos names no known zone: set it to a name such as Europe/Berlin"
    cdp.refused("view", "open", "disk0", "--at", "2025-10-26 02:30", says=says)
    assert "+00:00" in cdp("status", "disk0")


# --------------------------------------------------------------------------------- names of exports


@pytest.mark.parametrize(
    ("export", "says"),
    [
        ("nosuch", "no disk 'nosuch' is protected; there are: disk0"),
        ("nosuch@now", "no disk 'nosuch' is protected"),
        ("disk0@", "names no point: write disk0@SPEC"),
        ("disk0@nosuch", "no bookmark 'nosuch'"),
        ("disk0@seq:99999", "has not been written yet; openable: "),
        ("disk0@-5y", "is no duration"),
        ("disk0@view:nosuch", "no view 'nosuch'"),
        ("disk0@start@start", "no point in time"),
        ("disk0%40start", "no disk 'disk0%40start'"),
        ("x" * 4000, "no disk 'xxx"),
        ("\xe4\xf6\xfc", "no disk"),
        ("disk0@\n", "no point in time|names no point"),
    ],
)
def test_exports_that_are_not_there(cdp: Commands, shared: Daemon, export: str, says: str) -> None:
    with pytest.raises(NbdNegotiationError, match=says):
        NbdClient.connect(shared.directory / "nbd.sock", export, timeout=20).close()


def test_exports_are_named_with_percent_encoding_in_uris(cdp: Commands, shared: Daemon) -> None:
    socket_path = shared.directory / "nbd.sock"
    moment = cdp.json("bookmark", "list", "disk0")[0]["time"]
    for export in ("disk0@start", "disk0@bookmark:start", f"disk0@@{moment + 0.001:.6f}"):
        with NbdClient.connect(format_uri(export, socket_path=socket_path), timeout=20) as client:
            assert client.read(0, SIZE) == content()
    for encoded in ("%64isk0%40start", "disk0@%73tart", "disk0@0%20min%20ago"):
        uri = f"nbd+unix:///{encoded}?socket={socket_path}"
        with NbdClient.connect(uri, timeout=20) as client:
            assert client.read(0, SIZE) == content()


@pytest.mark.needs_tool("nbdinfo")
def test_libnbd_finds_a_percent_encoded_export(cdp: Commands, shared: Daemon) -> None:
    uri = f"nbd+unix:///disk0%40bookmark%3Astart?socket={shared.directory}/nbd.sock"
    done = subprocess.run(
        ["nbdinfo", "--json", uri], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout)["exports"][0]["export-size"] == SIZE


def test_a_port_is_taken_only_once(shared: Daemon) -> None:
    """The sockets of a living daemon are not taken over by another program's accident."""
    with ExitStack() as stack:
        for name in ("nbd.sock", "control.sock"):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            with pytest.raises(OSError, match="in use"):
                sock.bind(str(shared.directory / name))
