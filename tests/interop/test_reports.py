"""What is told about a daemon: fields of `--json`, metrics, readiness, languages and zones."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import parser

from cdp.nbd.client import NbdClient
from tests.interop.commands import Commands, eventually
from tests.interop.daemon import Daemon, wait_readable

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
BLOCK = 4096

# docs/CLI.md: names that scripts rely on.
DISK = {
    "name", "uuid", "size", "block_size", "backing", "journal", "uri", "state", "reason",
    "poisoned", "degraded", "last_seq", "durable_seq", "applied_seq", "floor_seq", "window_start",
    "window_start_seq", "window_seconds", "window_configured", "journal_bytes", "journal_limit",
    "redo_bytes", "undo_bytes", "index_bytes", "overflow", "lag_seconds", "lag_bytes",
    "apply_lag_bytes", "apply_lag_records", "held_seconds", "connections", "views", "bookmarks",
    "restarts",
}  # fmt: skip
MAY_BE_NULL = {"reason", "window_start", "window_configured"}


@pytest.fixture(scope="module")
def busy(shared: Daemon) -> Iterator[Commands]:
    """`cdp` for a daemon with a disk that has seen everything."""
    cdp = Commands(shared.directory)
    cdp("disk", "add", "busy", "--size", "2M", "--window", "1h")
    cdp("disk", "add", "idle", "--size", "2M")
    with NbdClient.connect(shared.uri("busy"), timeout=60) as client:
        for number in range(20):
            client.write(number * BLOCK, bytes([number]) * BLOCK)
        client.flush()
        client.write(0, b"x" * 512, fua=True)
        client.write_zeroes(BLOCK, BLOCK)
        client.trim(2 * BLOCK, BLOCK)
        client.read(0, MIB)
        cdp("bookmark", "add", "busy,idle", "both", "--consistency", "crash")
        cdp("view", "open", "busy", "--at", "both")
        cdp("view", "open", "busy", "--at", "seq:3", "--writable")
        with NbdClient.connect(shared.uri("busy@seq:3"), timeout=60) as view:
            view.read(0, BLOCK)
        yield cdp


def test_status(busy: Commands) -> None:
    answer = busy.json("status")
    assert set(answer) >= {
        "version", "pid", "state_dir", "uptime_seconds", "nbd", "http", "disks"
    }  # fmt: skip
    assert answer["state_dir"] == str(busy.directory)
    assert answer["nbd"][0].startswith("nbd+unix:")
    assert answer["http"] is None
    for disk in answer["disks"]:
        assert set(disk) >= DISK
        for key in DISK - MAY_BE_NULL:
            assert disk[key] is not None, key
        assert set(disk["restarts"]) == {"recorder", "curator", "viewer"}
    assert [disk["name"] for disk in busy.json("disk", "list")] == ["busy", "idle"]
    eventually(lambda: busy.disk("busy")["views"] == 2, "a view of a connection that has gone")
    disk = busy.disk("busy")
    assert (disk["connections"], disk["bookmarks"]) == (1, 1)
    assert disk["window_configured"] == 3600
    assert busy.disk("idle")["window_configured"] is None
    assert disk["last_seq"] >= disk["durable_seq"] >= disk["applied_seq"]
    assert disk["journal_bytes"] == disk["redo_bytes"] + disk["undo_bytes"] + disk["index_bytes"]
    assert {"backing", "journal"} <= set(disk)
    assert Path(disk["backing"]).stat().st_size == disk["size"]


def test_timeline(busy: Commands) -> None:
    answer = busy.json("timeline", "busy", "--buckets", "7")
    assert set(answer) >= {
        "disk", "from", "to", "window_start", "window_start_seq", "durable_seq", "buckets",
        "bookmarks", "gaps", "pins",
    }  # fmt: skip
    assert len(answer["buckets"]) == 7
    for bucket in answer["buckets"]:
        assert set(bucket) == {
            "start", "end", "records", "bytes", "barriers", "first_seq", "last_seq"
        }  # fmt: skip
    assert sum(bucket["records"] for bucket in answer["buckets"]) == answer["durable_seq"]
    assert sum(bucket["barriers"] for bucket in answer["buckets"]) >= 2
    (mark,) = answer["bookmarks"]
    assert set(mark) >= {"label", "seq", "time", "consistency"}
    assert len(answer["pins"]) >= 2
    since = busy.json("timeline", "busy", "--from", "both", "--to", "now")["from"]
    assert answer["from"] < since <= mark["time"]


def test_points(busy: Commands) -> None:
    answer = busy.json("points", "busy", "--from", "seq:0", "--to", "now")
    assert set(answer) == {"disk", "points"}
    for point in answer["points"]:
        assert set(point) >= {"seq", "time", "kind", "label", "records", "bytes"}
        assert point["kind"] in {"write", "barrier", "bookmark"}
    seqs = [point["seq"] for point in answer["points"]]
    assert seqs == sorted(seqs)
    assert len(busy.json("points", "busy", "--limit", "3")["points"]) <= 3
    assert "both" in {point["label"] for point in answer["points"]}


def test_other_listings(busy: Commands) -> None:
    (mark,) = busy.json("bookmark", "list", "busy")
    assert set(mark) >= {
        "label", "seq", "time", "requested", "consistency", "freeze_seconds", "providers"
    }  # fmt: skip
    assert mark["time"] == busy.json("bookmark", "list", "idle")[0]["time"], "one instant"
    views = [view for view in busy.json("view", "list") if view["id"]]
    for view in views:
        assert set(view) >= {
            "id", "disk", "seq", "time", "uri", "writable", "opened", "overlay_bytes"
        }  # fmt: skip
    assert sum(view["writable"] for view in views) == 1
    scrubbed = busy.json("scrub", "busy")
    assert set(scrubbed) == {"checked_bytes", "checked_records", "damaged", "more"}
    assert scrubbed["damaged"] == []
    assert scrubbed["checked_records"] >= 20
    (plan,) = busy.json("rollback", "busy", "--to", "seq:1", "--dry-run")["plans"]
    assert set(plan) >= {"disk", "to_seq", "to_time", "extents", "bytes", "seconds_estimate"}
    drained = busy.json("disk", "drain", "busy")
    assert drained["applied_seq"] >= plan["to_seq"]


def test_doctor(busy: Commands) -> None:
    ran = busy.run("doctor", "--json")
    checks = json.loads(ran.out)
    for check in checks:
        assert set(check) == {"name", "disk", "level", "message"}
        assert check["level"] in {"ok", "warn", "fail"}
        assert "\n" not in check["message"]
    failed = [check for check in checks if check["level"] == "fail"]
    assert ran.status == (1 if failed else 0)
    assert [check for check in failed if check["name"] != "journal"] == []


@pytest.mark.needs_tool("nbdinfo")
def test_nbdinfo_lists_disks_and_bookmarks(busy: Commands, shared: Daemon) -> None:
    done = subprocess.run(
        ["nbdinfo", "--list", shared.uri("")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    exports = re.findall(r'^export="(.*)":$', done.stdout, re.MULTILINE)
    assert set(exports) == {"busy", "idle", "busy@both", "idle@both"}


def documented_metrics() -> set[str]:
    """Names in deploy/prometheus/README.md."""
    text = (ROOT / "deploy" / "prometheus" / "README.md").read_text()
    return set(re.findall(r"^\| `(cdp_[a-z_]+)` \|", text, re.MULTILINE))


def test_metrics(short_tmp: Path) -> None:
    with Daemon(short_tmp / "state", "--http", "127.0.0.1:0", "--nbd", "tcp://127.0.0.1:0") as it:
        cdp = Commands(it.directory)
        cdp("disk", "add", "d", "--size", "1M", "--window", "1h")
        address, nbd = cdp.json("status")["http"], cdp.json("status")["nbd"][1]
        assert address.startswith("http://127.0.0.1:")
        with NbdClient.connect(f"{nbd}d", timeout=60) as client:
            client.write(0, b"x" * BLOCK)
            client.flush()
            client.read(0, BLOCK)
        cdp("scrub", "d")
        with socket.create_connection(("127.0.0.1", int(nbd.rstrip("/").rpartition(":")[2]))) as s:
            s.sendall(b"rubbish" * 100)
            while s.recv(4096):
                pass
        families = eventually(lambda: _scrape(address, "cdp_disk_writes"), "no writes are counted")
        samples = {sample.name for family in families.values() for sample in family.samples}
        base = {re.sub("_(bucket|count|sum)$", "", name) for name in samples}
        missing = documented_metrics() - base - {"cdp_nbd_protocol_errors_total"}
        missing -= {"cdp_disk_scrub_progress_ratio"}  # while one runs
        assert missing == set()
        assert "cdp_nbd_protocol_errors" in families
        disks = {sample.labels.get("disk") for sample in families["cdp_disk_writes"].samples}
        assert disks == {"d"}
        with urllib.request.urlopen(f"{address}/healthz", timeout=20) as answer:
            assert answer.read() == b"ok\n"
        for path in ("/v1/status", "/v1/disks/d"):
            with pytest.raises(urllib.request.HTTPError, match="404"):
                urllib.request.urlopen(f"{address}{path}", timeout=20)


def _scrape(address: str, busy_counter: str) -> dict[str, Any] | None:
    with urllib.request.urlopen(f"{address}/metrics", timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    for family in families.values():
        assert family.documentation, family.name
    return families if families[busy_counter].samples[0].value else None


def test_systemd_is_told(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(short_tmp / "notify"))
        notify.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_tmp / "notify"))
        daemon = Daemon(short_tmp / "state")
        with daemon:
            monkeypatch.delenv("NOTIFY_SOCKET")
            assert notify.recv(4096) == b"READY=1\nSTATUS=ready"
            Commands(daemon.directory)("disk", "add", "d", "--size", "1M")
            assert daemon.stop() == 0
            assert notify.recv(4096) == b"STOPPING=1"
            monkeypatch.setenv("NOTIFY_SOCKET", str(short_tmp / "notify"))
            daemon.start()
            assert notify.recv(4096) == b"READY=1\nSTATUS=ready: d is served"
            assert daemon.stop() == 0


def shell(cdp: Commands, *words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own, with an environment of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cdp.cli.main", "--state-dir", str(cdp.directory), *words],
        capture_output=True, check=False, timeout=60, stdin=subprocess.DEVNULL, cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environment},
    )  # fmt: skip


def test_languages_and_zones(busy: Commands) -> None:
    plain = shell(busy, "timeline", "busy", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.isascii()
    drawn = shell(busy, "timeline", "busy", LC_ALL="C.UTF-8", TZ="Asia/Kathmandu")
    assert drawn.returncode == 0, drawn.stderr
    assert "━" in drawn.stdout.decode()
    assert b"+05:45" in drawn.stdout
    german = shell(busy, "status", "busy", LC_ALL="de_DE.UTF-8", LANG="de_DE.UTF-8", TZ=":UTC")
    assert german.returncode == 0, german.stderr
    assert b"+00:00" in german.stdout
    # What is shown is a SPEC, in whatever zone.
    for zone in ("America/New_York", "Asia/Kathmandu", "UTC"):
        listed = shell(busy, "bookmark", "list", "busy", TZ=zone).stdout.decode()
        found = re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d+[+-]\d\d:\d\d", listed)
        assert found
        exact = busy.json("bookmark", "list", "busy")[0]
        plan = busy.json("rollback", "busy", "--to", found[0], "--dry-run")["plans"][0]
        assert exact["seq"] - 1 <= plan["to_seq"] <= exact["seq"]


def test_output_into_a_closed_pipe(busy: Commands) -> None:
    command = [sys.executable, "-m", "cdp.cli.main", "--state-dir", str(busy.directory)]
    with subprocess.Popen(
        [*command, "timeline", "busy", "--json", "--buckets", "1000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert wait_readable(process.stdout.fileno(), 30)
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) in (0, 1), "it may have written everything by then"
