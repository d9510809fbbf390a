"""The program as a whole: exit statuses, one-line errors, what it imports, completion."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from cdp.cli import api_client, app
from cdp.cli.main import run
from tests.cdp.cli.conftest import Cdp
from tests.cdp.cli.fake_api import FakeApi, disk, status
from tests.cdp.cli.test_points import timeline

COMMANDS = [
    *("disk add", "disk list", "disk remove", "disk resize", "disk set", "disk drain"),
    *("disk release", "disk resume", "status", "timeline", "points", "bookmark add"),
    *("bookmark list", "bookmark remove", "rollback", "restore", "view open", "view list"),
    *("view close", "scrub", "journal dump", "doctor"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cdp: Cdp, command: str) -> None:
    ran = cdp(*command.split(), "--help")
    assert ran.status == 0
    assert f"Usage: cdp {command}" in ran.out
    assert ran.err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cdp ")


@pytest.mark.parametrize("words", [[], ["disk"], ["view"], ["bookmark"], ["journal"]])
def test_without_a_command_it_says_which_there_are(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Commands:" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'; see 'cdp --help'"),
        (["statsu"], "status"),
        (["status", "a", "b"], "unexpected extra argument"),
        (["status", "--frob"], "--frob"),
        (["disk", "add"], "Missing argument 'NAME'; see 'cdp disk add --help'"),
        (["disk", "add", "x"], "give the --size"),
        (["disk", "add", "x", "--size", "10GB"], "10G or 10GiB"),
        (["disk", "add", "x", "--size", "-5"], "no size"),
        (["disk", "add", "x", "--size", "1G", "--window", "soon"], "no duration"),
        (["disk", "resize", "x", "big"], "no size"),
        (["disk", "set", "x"], "KEY=VALUE"),
        (["disk", "set", "x", "window"], "write KEY=VALUE"),
        (["disk", "set", "x", "window=soon"], "window: 'soon' is no duration"),
        (["disk", "resume", "x"], "say --unchanged or --give-up-history"),
        (["disk", "resume", "x", "--unchanged", "--give-up-history"], "say --unchanged or"),
        (["rollback", "x"], "--to"),
        (["rollback", "x,x", "--to", "now"], "name each disk once"),
        (["rollback", "x,y", "--to", "seq:5"], "a seq is one disk's"),
        (["restore", "x", "--to", "now"], "--output"),
        (["restore", "x", "--to", "now", "--output", "y", "--format", "vhd"], "raw, qcow2"),
        (["bookmark", "add", "x", "y", "--consistency", "perfect"], "crash, filesystem"),
    ],
)
def test_usage_error(cdp: Cdp, arguments: list[str], message: str) -> None:
    ran = cdp(*arguments)
    assert ran.status == 2
    assert message in ran.error
    assert ran.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["disk", "list", "--json"],
        ["disk", "remove", "x"],
        ["rollback", "x", "--to", "now", "--yes"],
        ["view", "open", "x", "--at", "seq:5"],
        ["scrub", "x"],
    ],
)
def test_no_daemon(cdp: Cdp, short_tmp: Path, arguments: list[str]) -> None:
    ran = cdp(*arguments)
    assert ran.status == 1
    assert ran.error == (
        f"no daemon is running for {short_tmp}: start it with 'cdpd --state-dir {short_tmp}', "
        "or name another --state-dir"
    )


def test_a_socket_that_nobody_listens_at(cdp: Cdp, short_tmp: Path, api: FakeApi) -> None:
    api.answer("GET", "/v1/status", status())
    assert cdp("status").status == 0
    api.close()
    assert (short_tmp / "control.sock").exists()
    assert "no daemon is running" in cdp("status").error


def test_a_path_that_is_too_long(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["--state-dir", str(tmp_path / ("x" * 120)), "status"]) == 1
    assert "too long for a socket" in capsys.readouterr().err


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"\xff"])
def test_what_is_no_daemon_is_not_believed(cdp: Cdp, api: FakeApi, body: bytes) -> None:
    api.answer("GET", "/v1/status", body)
    ran = cdp("status", "--json")
    assert ran.status == 1
    assert "is no cdpd" in ran.error


@pytest.mark.parametrize("body", [b"<html>", {"detail": "x"}])
def test_an_error_without_words(cdp: Cdp, api: FakeApi, body: object) -> None:
    api.answer("GET", "/v1/disks", body, 500)
    assert cdp("disk", "list").error == "the daemon answered 500 Internal Server Error"


def test_the_daemons_words_are_passed_on_in_one_line(cdp: Cdp, api: FakeApi) -> None:
    api.refuse("GET", "/v1/disks", 409, "conflict", "first\nsecond")
    assert cdp("disk", "list").error == "first second"


def test_a_stream_that_ends_early(cdp: Cdp, api: FakeApi) -> None:
    api.answer("POST", "/v1/disks/x/drain", [{"progress": {"phase": "a", "done": 1, "total": 2}}])
    assert "broke off before it was done" in cdp("disk", "drain", "x").error


def test_a_stream_that_ends_with_an_error(cdp: Cdp, api: FakeApi) -> None:
    api.answer("POST", "/v1/disks/x/drain", [{"progress": {}}, {"error": "no", "kind": "busy"}])
    ran = cdp("disk", "drain", "x")
    assert (ran.status, ran.error) == (1, "no")


def test_state_dir_comes_from_the_environment(
    api: FakeApi, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.answer("GET", "/v1/status", status())
    api.answer("GET", "/v1/disks", {"disks": []})
    monkeypatch.setenv("CDP_STATE_DIR", str(short_tmp))
    assert run(["status"]) == 0
    assert run(["disk", "list"]) == 0
    # What is said on the command line counts.
    assert run(["--state-dir", "/nonexistent", "status"]) == 1
    assert run(["--state-dir", "/nonexistent", "disk", "list"]) == 1


def test_default_state_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert api_client.default_state_dir() == Path("/var/lib/cdp")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/x/state")
    assert api_client.default_state_dir() == Path("/home/x/state/cdp")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/x")
    assert api_client.default_state_dir() == Path("/home/x/.local/state/cdp")


def test_names_cannot_leave_their_place_in_the_path(cdp: Cdp, api: FakeApi) -> None:
    for name in ("../status", "..", ".", "", "a/b"):
        assert cdp("bookmark", "list", name).error.startswith(f"nothing can be called {name!r}")
    assert cdp("view", "close", "").status == 1
    assert api.calls == []
    assert api_client.path_of("disks", "a?b%c") == "/v1/disks/a%3Fb%25c"


# ------------------------------------------------------------------------------ start and imports
@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["status", "--json"],
        ["status", "disk0"],
        ["status", "disk0", "--json"],
        ["status", "--json", "disk0"],
        ["status", "nosuch"],
    ],
)
def test_the_quick_way_says_what_the_long_way_says(
    cdp: Cdp, api: FakeApi, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.answer("GET", "/v1/status", status(disk("disk0"), disk("disk1")))
    quick = cdp(*words)
    monkeypatch.setattr("cdp.cli.main._quick", lambda _: None)
    assert cdp(*words) == quick


def test_status_starts_quickly(api: FakeApi, short_tmp: Path) -> None:
    """It is polled: what takes long to import must not be imported for it."""
    api.answer("GET", "/v1/status", status(disk("disk0")))
    program = (
        "import sys; from cdp.cli.main import run; status = run(sys.argv[1:]); "
        "slow = {'typer', 'click', 'pydantic', 'rich', 'numpy', 'trio', 'dateparser', 'msgspec'}; "
        "sys.exit(status or ', '.join(slow & sys.modules.keys()) or 0)"
    )
    arguments = [sys.executable, "-c", program, "--state-dir", str(short_tmp), "status"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "disk0" in done.stdout


def test_one_command_is_built_or_all() -> None:
    assert app.command_of(["status"]) == "status"
    assert app.command_of(["--state-dir", "disk", "view", "list"]) == "view"
    assert app.command_of(["--state-dir=disk", "view"]) == "view"
    assert app.command_of(["--state-dir", "disk"]) is None
    assert app.command_of(["--help"]) is None
    assert app.command_of(["nosuch"]) is None
    assert {command.split()[0] for command in COMMANDS} == app.COMMANDS.keys()


@pytest.mark.parametrize("words", [["disk", "list"], ["disk", "list", "--json"], ["status"]])
def test_a_reader_that_goes_away(api: FakeApi, short_tmp: Path, words: list[str]) -> None:
    disks = [disk(f"disk{n}", reason="x" * 100) for n in range(5000)]
    api.answer("GET", "/v1/disks", {"disks": disks})
    api.answer("GET", "/v1/status", status(*disks))
    arguments = [sys.executable, "-m", "cdp.cli.main", "--state-dir", str(short_tmp)]
    process = subprocess.Popen([*arguments, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""  # neither a traceback nor a complaint


# -------------------------------------------------------------------------------- on a terminal
ON_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that ^C is an interrupt
os.execv(sys.executable, [sys.executable, "-m", "cdp.cli.main", *sys.argv[1:]])
"""


def on_terminal(
    arguments: list[str], typed: bytes = b"", environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Runs cdp with a terminal for all three; its exit status and what the terminal showed.

    ``typed`` is typed when it has asked something.
    """
    main_end, their_end = pty.openpty()
    with open(main_end, "r+b", buffering=0) as terminal:
        with open(their_end, "r+b", buffering=0) as theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", ON_A_TERMINAL, *arguments],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env={**os.environ, "TERM": "xterm", "COLUMNS": "120", **(environment or {})},
                start_new_session=True,
            )
        shown = b""
        while True:
            try:
                part = terminal.read(65536)
            except OSError:  # the last of the other end is closed
                break
            if not part:
                break
            shown += part
            if typed and shown.rstrip().endswith(b"[y/N]"):
                terminal.write(typed)
                typed = b""
        return process.wait(), shown.decode()


def test_tables_on_a_terminal(api: FakeApi, short_tmp: Path) -> None:
    api.answer("GET", "/v1/status", status(disk("[red]disk0"), disk("disk1", state="failed")))
    code, shown = on_terminal(["--state-dir", str(short_tmp), "status"])
    assert code == 0
    assert "─" in shown
    assert "[red]disk0" in shown  # a name is no markup


def test_the_timeline_on_a_terminal(api: FakeApi, short_tmp: Path) -> None:
    api.answer("GET", "/v1/disks/x/timeline", {**timeline(), "disk": "x"})
    arguments = ["--state-dir", str(short_tmp), "timeline", "x"]
    code, shown = on_terminal(arguments, environment={"COLUMNS": "70"})
    assert code == 0
    assert api.calls[0].query == {"buckets": "60"}  # as wide as the terminal
    assert "writes   \x1b[36m    █\x1b[0m" in shown
    assert "openable \x1b[32m  ━━━━━━\x1b[0m" in shown
    _, plain = on_terminal(arguments, environment={"NO_COLOR": "1"})
    assert "\x1b" not in plain
    assert "openable   ━━━━━━" in plain


PLAN = {"disk": "x", "to_seq": 41, "to_time": 1_763_987_000.25, "extents": 3, "bytes": 12288}


@pytest.mark.parametrize(("typed", "code"), [(b"y\n", 0), (b"n\n", 1), (b"\n", 1), (b"\x03", 130)])
def test_rollback_asks(api: FakeApi, short_tmp: Path, typed: bytes, code: int) -> None:
    done = {"disk": "x", "to_seq": 41, "begin_seq": 90, "commit_seq": 99, "extents": 3}
    done |= {"bytes": 12288, "undo_with": "seq:89"}

    api.compute(
        "POST",
        "/v1/rollback",
        lambda call: (
            200,
            [
                {"progress": {"phase": "compare", "done": 1, "total": 2, "unit": "blocks"}},
                {"result": {"plans": [PLAN]} if call.body["dry_run"] else {"rollbacks": [done]}},
            ],
        ),
    )
    arguments = ["--state-dir", str(short_tmp), "rollback", "x", "--to", "2025-11-24T12:23Z"]
    status, shown = on_terminal(arguments, typed)
    assert "roll back x? [y/N]" in shown
    assert status == code
    calls = [call.body for call in api.asked("POST", "/v1/rollback")]
    assert calls[0]["dry_run"]
    if code:
        assert len(calls) == 1
        assert "nothing was changed" in shown or code == 130
    else:
        # What was shown is what is done: the time is not resolved a second time.
        assert calls[1] == {"disks": ["x"], "to": "seq:41", "dry_run": False, "disconnect": False}
        assert "undo with: cdp rollback x --to seq:89" in shown


# ------------------------------------------------------------------------------------ completion
def completed(short_tmp: Path, line: str) -> list[str]:
    """What bash would offer for the last word of the line."""
    environment = {
        **os.environ,
        "_CDP_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
        "CDP_STATE_DIR": str(short_tmp),
    }
    done = subprocess.run(
        [sys.executable, "-m", "cdp.cli.main"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_completion_knows_disks_and_bookmarks(api: FakeApi, short_tmp: Path) -> None:
    api.answer("GET", "/v1/disks", {"disks": [disk("alpha"), disk("beta")]})
    marks = [{"label": "nightly", "seq": 5, "consistency": "crash"}, {"label": "b2", "seq": 9}]
    api.answer("GET", "/v1/disks/alpha/bookmarks", {"bookmarks": marks})
    assert completed(short_tmp, "cdp status al") == ["alpha"]
    assert completed(short_tmp, "cdp rollback alpha,") == ["alpha,beta"]
    assert completed(short_tmp, "cdp bookmark remove alpha n") == ["nightly"]
    assert completed(short_tmp, "cdp rollback alpha --to n") == ["nightly", "now"]
    assert completed(short_tmp, "cdp stat") == ["status"]


def test_completion_without_a_daemon_is_silent(short_tmp: Path) -> None:
    assert completed(short_tmp, "cdp status a") == []
