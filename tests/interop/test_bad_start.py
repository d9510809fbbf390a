"""A daemon that cannot start says why in one line, exits with status 1, and touches nothing."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest

from cdp.nbd.client import NbdClient
from cdp.supervisor import main
from tests.interop.commands import Commands
from tests.interop.daemon import Daemon

MIB = 1 << 20


class Start:
    """Starts daemons that must not come up, in the test's own process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str | Path) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        self._capsys.readouterr()
        runs = mock.patch("cdp.supervisor.main.Daemon.run", side_effect=AssertionError("it runs"))
        silent = mock.patch("cdp.supervisor.main.sdnotify.SystemdNotifier")
        with runs, silent, mock.patch("cdp.supervisor.main._set_up_logging"):
            status = main.main([str(word) for word in words])
        return status, *self._capsys.readouterr()

    def refused(self, *words: str | Path, says: str) -> str:
        """Its one line."""
        status, out, err = self(*words)
        assert (status, out) == (1, ""), (words, out, err)
        assert re.fullmatch(r"cdpd: [^\n]+\n", err), (words, err)
        assert re.search(says, err), (words, err)
        return err[6:-1]


@pytest.fixture
def cdpd(capsys: pytest.CaptureFixture[str]) -> Start:
    """The program."""
    return Start(capsys)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield int(server.getsockname()[1])


def test_too_few_open_files_are_allowed(
    cdpd: Start, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = "limits.nbd-connections=256 needs 1472 open files, and 512 are allowed: raise"
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, 512))
    cdpd.refused("--state-dir", short_tmp / "state", says=says)
    assert not (short_tmp / "state").exists()


def test_addresses_that_cannot_be_listened_on(cdpd: Start, short_tmp: Path, taken: int) -> None:
    open_to_all = "everybody who can reach .*: use 127.0.0.1, or say --allow-remote-without-tls"
    for words, says in [
        (["--nbd", "tcp://0.0.0.0:0"], open_to_all),
        (["--nbd", "tcp://[::]:0"], open_to_all),
        (["--http", "0.0.0.0:0"], open_to_all),
        (["--nbd", f"tcp://127.0.0.1:{taken}"], f"NBD .* 127.0.0.1:{taken}: another program does"),
        (["--http", f"127.0.0.1:{taken}"], f"HTTP .* 127.0.0.1:{taken}: another program does"),
        (["--nbd", "127.0.0.1:1"], "write tcp://HOST:PORT"),
        (["--nbd", "tcp://127.0.0.1:99999"], "is no address"),
        (["--nbd", "tcp://nosuch.invalid:1"], "NBD cannot listen on nosuch.invalid:1: "),
        (["--http", "127.0.0.1"], "is no address: write HOST:PORT"),
    ]:
        cdpd.refused("--state-dir", short_tmp, *words, says=says)
        assert not list(short_tmp.glob("*.sock"))


def test_configurations_that_cannot_be(cdpd: Start, short_tmp: Path) -> None:
    config = short_tmp / "cdpd.toml"
    words: list[str | Path] = ["--state-dir", short_tmp / "state", "--config", config]
    cdpd.refused(*words, says="cdpd.toml cannot be read: No such file")
    for text, says in [
        ("foo = 1", "unknown field `foo`"),
        ("[limits]\nfoo = 1", "unknown field `foo`"),
        ("a = [", "is not TOML: "),
        ("\xff", "is not TOML: "),
        ("[limits]\nviews = 0", r">= 1 - at `\$.limits.views`"),
        ("[limits]\nview-age = 'x'", "limits.view-age: 'x' is no duration"),
        ("[defaults]\nwindow = 5", r"Expected `str`, got `int` - at `\$.defaults.window`"),
        ("[defaults]\njournal-limit = '5'", "journal.limit is 5 B: it must be between"),
        ("[defaults]\nsync-age = '1000s'", "sync-age is .*: it must be between"),
        ("[defaults]\noverflow = 'gap'", "gap"),
    ]:
        config.write_bytes(text.encode("latin-1"))
        assert cdpd.refused(*words, says=says).startswith(f"{config}")
    config.unlink()
    config.mkdir()
    cdpd.refused(*words, says="cdpd.toml cannot be read: Is a directory")
    assert not (short_tmp / "state").exists()


def test_state_directories_that_cannot_be(cdpd: Start, short_tmp: Path) -> None:
    (short_tmp / "file").touch()
    for path, says in [
        (Path("/proc/nosuch"), "the state directory /proc/nosuch cannot be used: "),
        (short_tmp / "file", "the state directory .*/file cannot be used: "),
        (short_tmp / "file" / "x", "the state directory .*/file/x cannot be used: Not a directory"),
        (short_tmp / ("x" * 90), "too long.*: use a shorter"),
    ]:
        cdpd.refused("--state-dir", path, says=says)
    Commands(short_tmp / ("x" * 90)).refused("status", says="too long for a socket: use a shorter")


def test_a_second_daemon_is_refused(cdpd: Start, daemon: Daemon) -> None:
    assert daemon.process is not None
    says = rf"running for .* already \(process {daemon.process.pid}\): use it, or stop it first"
    cdpd.refused("--state-dir", daemon.directory, says=says)
    assert Commands(daemon.directory).json("status")["pid"] == daemon.process.pid


def test_wrong_usage(cdpd: Start, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--state-dir"], ["--state-dir", "/x", "--frob"], ["--state-dir", "/x", "y"]):
        with pytest.raises(SystemExit) as caught:
            cdpd(*words)
        assert caught.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("cdpd: error: ")


def test_without_a_daemon(short_tmp: Path) -> None:
    cdp = Commands(short_tmp)
    for words in (["status"], ["disk", "list"], ["points", "x"], ["rollback", "x", "--to", "now",
                  "--yes"]):  # fmt: skip
        cdp.refused(*words, says=f"no daemon is running for {short_tmp}: start it with 'cdpd ")
    ran = cdp.run("doctor")
    assert ran.status == 1
    assert "fail" in ran.out
    assert "failed: daemon" in ran.err


def test_disks_that_cannot_be_used_do_not_keep_others_from_being_served(
    daemon: Daemon, tmp_path: Path
) -> None:
    cdp = Commands(daemon.directory)
    disks = daemon.directory / "disks"
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    cdp("disk", "add", "gone", "--backing", str(image))
    cdp("disk", "add", "held", "--size", "1M")
    cdp("disk", "add", "good", "--size", "1M")
    assert daemon.stop() == 0
    config = json.loads((disks / "good" / "disk.json").read_text())
    for name, text in [
        ("torn", '{"name": "torn"'),
        ("strange", json.dumps({**config, "name": "strange", "frobnicate": 1})),
        ("other", json.dumps(config)),
        ("odd", json.dumps({**config, "name": "odd", "size": 7})),
    ]:
        (disks / name).mkdir()
        (disks / name / "disk.json").write_text(text)
    (disks / "stray").mkdir()
    (disks / "file").touch()
    image.rename(tmp_path / "away")
    with subprocess.Popen(
        ["flock", str(disks / "held" / "backing.img"), "cat"], stdin=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        while not _locked(disks / "held" / "backing.img"):
            assert holder.poll() is None
        daemon.start()
        answer = cdp.json("status")
        assert set(answer["broken"]) == {"torn", "strange", "other", "odd"}
        states = {disk["name"]: (disk["state"], disk["reason"]) for disk in answer["disks"]}
        assert set(states) == {"good", "gone", "held"}
        assert states["good"] == ("served", None)
        assert states["gone"][0] != "served"
        assert "does not exist" in states["gone"][1]
        assert states["held"][0] != "served"
        assert "in use by another program" in states["held"][1]
        assert "not usable" in cdp("status")
        for name in answer["broken"]:
            cdp.refused("status", name, says=f"{name} is not usable: .*disk.json")
            cdp.refused("bookmark", "list", name, says=f"{name} is not usable: .*disk.json")
            says = f"a disk '{name}' already"
            cdp.refused("disk", "add", name, "--size", "1M", says=says)
        assert cdp.run("doctor").status == 1
        with NbdClient.connect(daemon.uri("good"), timeout=20) as client:
            client.write(0, b"x" * 512)
        holder.stdin.close()
    (tmp_path / "away").rename(image)
    for name in ("held", "gone"):
        with NbdClient.connect(daemon.uri(name), timeout=60) as client:
            client.write(0, b"x" * 512)
    assert daemon.stop() == 0


def _locked(path: Path) -> bool:
    return subprocess.run(["flock", "-n", path, "true"], check=False).returncode != 0
