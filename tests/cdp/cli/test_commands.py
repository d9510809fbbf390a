"""What each command asks of the daemon, and what it prints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cdp.cli.output import Table
from tests.cdp.cli.conftest import Cdp
from tests.cdp.cli.fake_api import NOW, FakeApi, disk, status

MARK = {"label": "nightly", "seq": 500, "time": NOW - 60.25, "requested": "application"}
MARK |= {"consistency": "filesystem", "freeze_seconds": 0.125, "providers": ["fsfreeze", "psql"]}
VIEW = {"id": "v1", "disk": "disk0", "seq": 17, "time": NOW - 60, "writable": True, "opened": NOW}
VIEW |= {"uri": "nbd+unix:///disk0@view:v1?socket=/run/cdp/nbd.sock", "overlay_bytes": 8192}


# ------------------------------------------------------------------------------------------ status
def test_status(cdp: Cdp, api: FakeApi) -> None:
    failed = disk("disk1", state="failed", reason="its backing is gone", window_seconds=None)
    api.answer("GET", "/v1/status", status(disk("disk0"), failed))
    assert cdp("status").out == (
        "cdpd 0.1.0, pid 4711, up 1 h 1 min\n"
        "NAME   STATE     SIZE   SEQ     LAG  WINDOW  JOURNAL      OF  CLIENTS\n"
        "disk0  served  10 GiB  1000  0.25 s     2 h    3 GiB  20 GiB        2\n"
        "disk1  failed  10 GiB  1000  0.25 s     0 s    3 GiB  20 GiB        2\n"
        "disk1: its backing is gone\n"
    )


def test_status_as_json_is_the_apis(cdp: Cdp, api: FakeApi) -> None:
    answer = status(disk("disk0"), disk("disk1"))
    api.answer("GET", "/v1/status", answer)
    assert cdp("status", "--json").json == answer
    one = cdp("status", "disk1", "--json").json
    assert [entry["name"] for entry in one["disks"]] == ["disk1"]
    needed = {"name", "size", "durable_seq", "applied_seq", "journal_bytes", "window_start"}
    assert needed <= one["disks"][0].keys()


def test_status_of_one_disk(cdp: Cdp, api: FakeApi) -> None:
    api.answer("GET", "/v1/status", status(disk("disk0", poisoned=True, reason="EIO")))
    out = cdp("status", "disk0").out
    assert "state         served, poisoned: EIO\n" in out
    assert "index and reserves 5 MiB" in out
    assert "size          10 GiB (10737418240 bytes)\n" in out
    window = "window        2 h since 2025-11-24 11:30:15+01:00 (seq 17), configured: 2 d\n"
    assert window in out
    assert "seq           last 1004, durable 1000, applied 990, oldest 1\n" in out
    assert "restarts      recorder 0, curator 1, viewer 0\n" in out


def test_status_of_no_disk(cdp: Cdp, api: FakeApi) -> None:
    api.answer("GET", "/v1/status", status(disk("disk0"), disk("disk1")))
    assert cdp("status", "nosuch").error == "no disk 'nosuch' is protected; there are: disk0, disk1"
    api.answer("GET", "/v1/status", status())
    assert cdp("status", "nosuch").error == "no disk 'nosuch' is protected; none is"
    ran = cdp("status")
    assert ran.status == 0
    assert "no disk is protected" in ran.err


# ------------------------------------------------------------------------------------------- disks
def test_disk_add(cdp: Cdp, api: FakeApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    api.answer("POST", "/v1/disks", disk("db"), 201)
    ran = cdp(
        *("disk", "add", "db", "--size", "10G", "--backing", "db.img", "--journal", "/j"),
        *("--window", "2d", "--journal-limit", "20GiB", "--overflow", "throttle"),
    )
    assert ran.out == "db: 10 GiB, protected, nbd+unix:///disk0?socket=/run/cdp/nbd.sock\n"
    assert api.calls[0].body == {
        "name": "db",
        "size": 10 << 30,
        "backing": str(tmp_path / "db.img"),  # the daemon has another working directory
        "journal": "/j",
        "window": 172_800,
        "journal_limit": 20 << 30,
        "overflow": "throttle",
        "segment_bytes": None,
        "block_size": None,
    }
    assert cdp("disk", "add", "db", "--size", "10G", "--json").json == disk("db")


def test_disk_add_takes_the_size_of_a_backing(cdp: Cdp, api: FakeApi) -> None:
    api.answer("POST", "/v1/disks", disk("db"), 201)
    arguments = ["--block-size", "4096", "--segment-bytes", "16M"]
    assert cdp("disk", "add", "db", "--backing", "/dev/sdb", *arguments).status == 0
    body = api.calls[0].body
    assert (body["size"], body["block_size"], body["segment_bytes"]) == (None, 4096, 16 << 20)


def test_disk_list(cdp: Cdp, api: FakeApi) -> None:
    api.answer("GET", "/v1/disks", {"disks": [disk("a"), disk("b")]})
    assert cdp("disk", "list", "--json").json == [disk("a"), disk("b")]
    lines = cdp("disk", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "a", "b"]
    api.answer("GET", "/v1/disks", {"disks": []})
    assert cdp("disk", "list", "--json").json == []


def test_disk_remove(cdp: Cdp, api: FakeApi) -> None:
    done = [{"progress": {"phase": "apply", "done": 1, "total": 1, "unit": "records"}}]
    api.answer("DELETE", "/v1/disks/a", [*done, {"result": {}}])
    assert cdp("disk", "remove", "a").out == "a: no longer protected\n"
    assert api.calls[0].query == {"force": "0", "purge": "0"}
    cdp("disk", "remove", "a", "--force", "--purge")
    assert api.calls[1].query == {"force": "1", "purge": "1"}


def test_disk_resize(cdp: Cdp, api: FakeApi) -> None:
    api.answer("POST", "/v1/disks/a/resize", disk("a", size=20 << 30))
    assert cdp("disk", "resize", "a", "20G").out == "a: 20 GiB\n"
    assert api.calls[0].body == {"size": 20 << 30}
    assert cdp("disk", "resize", "a", "20G", "--json").json["size"] == 20 << 30


def test_disk_set(cdp: Cdp, api: FakeApi) -> None:
    api.answer("POST", "/v1/disks/a/set", disk("a"))
    pairs = ["window=1h30m", "journal-limit=10G", "overflow=gap", "tail=512M", "sync-age=0.5s"]
    assert cdp("disk", "set", "a", *pairs, "--json").json == disk("a")
    assert api.calls[0].body == {
        "window": 5400,
        "journal-limit": 10 << 30,
        "overflow": "gap",
        "tail": 512 << 20,
        "sync-age": 0.5,
    }
    assert "name          a\n" in cdp("disk", "set", "a", "window=none").out
    assert api.calls[1].body == {"window": None}


def test_disk_drain(cdp: Cdp, api: FakeApi) -> None:
    api.answer("POST", "/v1/disks/a/drain", [{"result": {"applied_seq": 77}}])
    assert cdp("disk", "drain", "a").out == "a: applied up to seq 77\n"
    assert cdp("disk", "drain", "a", "--json").json == {"applied_seq": 77}


@pytest.mark.parametrize("words", [["disk", "release"], ["release"]])
def test_release(cdp: Cdp, api: FakeApi, words: list[str]) -> None:
    api.answer("POST", "/v1/disks/a/release", [{"result": {}}])
    out = cdp(*words, "a").out
    assert out.startswith("a: released; take it back with: cdp disk resume a --unchanged, or ")


def test_resume(cdp: Cdp, api: FakeApi) -> None:
    api.answer("POST", "/v1/disks/a/resume", [{"result": {}}])
    assert cdp("disk", "resume", "a", "--give-up-history").out == "a: protected again\n"
    assert api.calls[0].body == {"unchanged": False, "give_up_history": True}
    api.answer("POST", "/v1/disks/a/resume", disk("a"))  # at once, without reports
    assert cdp("disk", "resume", "a", "--unchanged", "--json").json == disk("a")


# ------------------------------------------------------------------------------------------ checks
def test_scrub(cdp: Cdp, api: FakeApi) -> None:
    result: dict[str, Any] = {"checked_bytes": 3 << 30, "checked_records": 12, "damaged": []}
    api.answer("POST", "/v1/disks/a/scrub", [{"result": result}])
    ran = cdp("scrub", "a")
    assert (ran.status, ran.out) == (0, "a: 3 GiB in 12 records checked\n")
    assert cdp("scrub", "a", "--json").json == result


def test_scrub_that_finds_damage_fails(cdp: Cdp, api: FakeApi) -> None:
    damage = {"file": "redo/1.seg", "offset": 4096, "first_seq": 5, "last_seq": 6}
    damage |= {"from_time": NOW, "to_time": None, "what": "checksum mismatch", "effect": "lost"}
    result = {"checked_bytes": 0, "checked_records": 0, "damaged": [damage], "more": 2}
    api.answer("POST", "/v1/disks/a/scrub", [{"result": result}])
    ran = cdp("scrub", "a")
    assert ran.status == 3
    assert "a: 3 damaged places; 0 repaired; 3 cost content" in ran.err
    assert "redo/1.seg    4096" in ran.out
    as_json = cdp("scrub", "a", "--json")
    assert as_json.status == 3
    assert json.loads(as_json.out) == result


def test_scrub_in_the_background(cdp: Cdp, api: FakeApi) -> None:
    api.answer("POST", "/v1/disks/a/scrub", [{"result": {}}])
    ran = cdp("scrub", "a", "--no-wait", "--rate", "2M")
    assert ran.out == "a: being scrubbed; see 'cdp scrub a --status'\n"
    assert api.calls[0].body == {"wait": False, "rate": 2 << 20}
    cdp("scrub", "a", "--no-wait", "--rate", "none")
    assert api.calls[1].body == {"wait": False, "rate": 0}
    assert "--rate: " in cdp("scrub", "a", "--rate", "fast").err
    api.answer("DELETE", "/v1/disks/a/scrub", {})
    assert cdp("scrub", "a", "--stop").status == 0
    assert cdp("scrub", "a", "--stop", "--status").status == 2


def test_scrub_status(cdp: Cdp, api: FakeApi) -> None:
    status: dict[str, Any] = {"running": None, "last": None, "next": None, "failure": None}
    api.answer("GET", "/v1/disks/a/scrub", status)
    assert cdp("scrub", "a", "--status").out == "a: never came to its end yet; not scheduled\n"
    running = {"started": NOW, "done": 1 << 20, "total": 4 << 20, "damaged": 0}
    last: dict[str, Any] = {"started": NOW, "finished": NOW, "bytes": 1, "lost": 0, "covered": 0}
    damage = {"file": "index/redo-00000001.run", "offset": 0, "first_seq": 0, "last_seq": 0}
    damage |= {"from_time": None, "to_time": None, "what": "damaged page", "effect": "repaired"}
    last |= {
        "checked_bytes": 1,
        "checked_records": 1,
        "damaged": [damage],
        "more": 0,
        "repaired": 1,
    }
    status |= {"running": running, "last": last, "next": NOW}
    api.answer("GET", "/v1/disks/a/scrub", status)
    ran = cdp("scrub", "a", "--status")
    assert ran.out.startswith("a: running: 1 MiB of 4 MiB (25 %); last ")
    assert "1 repaired" in ran.out
    assert ran.status == 3
    as_json = cdp("scrub", "a", "--status", "--json")
    assert (as_json.status, json.loads(as_json.out)) == (3, status)


def test_doctor(cdp: Cdp, api: FakeApi) -> None:
    checks = [{"name": "space", "disk": "a", "level": "warn", "message": "5 GiB free"}]
    api.answer("GET", "/v1/doctor", {"checks": checks})
    ran = cdp("doctor")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.splitlines()[1].split() == ["warn", "space", "a", "5", "GiB", "free"]
    assert cdp("doctor", "--json").json == checks
    api.answer("GET", "/v1/doctor", {"checks": [{**checks[0], "level": "fail"}]})
    ran = cdp("doctor")
    assert (ran.status, ran.err) == (1, "cdp: failed: space\n")


def test_doctor_without_a_daemon_looks_itself(cdp: Cdp, short_tmp: Path) -> None:
    for name in ("good", "bad", "broken"):
        (short_tmp / "disks" / name).mkdir(parents=True)
    (short_tmp / "backing").touch()
    (short_tmp / "journal" / "redo").mkdir(parents=True)
    good = {"backing": str(short_tmp / "backing"), "journal": str(short_tmp / "journal")}
    (short_tmp / "disks" / "good" / "disk.json").write_text(json.dumps(good))
    bad = {"backing": "/nonexistent", "journal": "/nonexistent"}
    (short_tmp / "disks" / "bad" / "disk.json").write_text(json.dumps(bad))
    (short_tmp / "disks" / "broken" / "disk.json").write_text("{")
    ran = cdp("doctor", "--json")
    assert ran.status == 1
    checks = {(check["name"], check["disk"]): check for check in json.loads(ran.out)}
    assert all(check.keys() == {"name", "disk", "level", "message"} for check in checks.values())
    levels = {key: check["level"] for key, check in checks.items()}
    assert levels["daemon", None] == "fail"
    assert levels["state-dir", None] == "ok"
    assert levels["backing", "good"] == "ok"
    assert levels["space", "good"] in {"ok", "warn"}
    assert levels["backing", "bad"] == levels["journal", "bad"] == "fail"
    assert levels["config", "broken"] == "fail"
    os.chmod(short_tmp, 0o777)
    found = [c for c in json.loads(cdp("doctor", "--json").out) if c["name"] == "state-dir"]
    assert [check["level"] for check in found] == ["warn"]


# --------------------------------------------------------------------------------------- bookmarks
def test_bookmark_add(cdp: Cdp, api: FakeApi) -> None:
    marks = [{"disk": "a", **MARK}, {"disk": "b", **MARK, "consistency": "application"}]
    api.answer("POST", "/v1/bookmarks", {"bookmarks": marks})
    ran = cdp("bookmark", "add", "a,b", "nightly", "--consistency", "application")
    assert ran.status == 0
    assert ran.out == (
        "a: nightly is seq:500, 2025-11-24 13:29:15.250+01:00, filesystem-consistent\n"
        "b: nightly is seq:500, 2025-11-24 13:29:15.250+01:00, application-consistent\n"
    )
    assert ran.err == "cdp: a: asked for application consistency, reached filesystem only\n"
    body = {"disks": ["a", "b"], "label": "nightly", "consistency": "application"}
    assert api.calls[0].body == body
    assert cdp("bookmark", "add", "a", "nightly", "--json").json == marks


@pytest.mark.parametrize("label", ["now", "a b", "2025-11-24", "seq:5"])
def test_bookmark_add_refuses_what_could_not_be_asked_for(
    cdp: Cdp, api: FakeApi, label: str
) -> None:
    assert "label" in cdp("bookmark", "add", "a", label).error
    assert api.calls == []


def test_bookmark_list(cdp: Cdp, api: FakeApi) -> None:
    bare = {"label": "5", "seq": 9, "time": NOW, "requested": None, "consistency": "crash"}
    api.answer("GET", "/v1/disks/a/bookmarks", {"bookmarks": [MARK, bare]})
    assert cdp("bookmark", "list", "a", "--json").json == [MARK, bare]
    assert cdp("bookmark", "list", "a").out == (
        "LABEL    SEQ  TIME                           CONSISTENCY  REQUESTED    FROZEN  BY\n"
        "nightly  500  2025-11-24 13:29:15.250+01:00  filesystem   application  0.12 s  "
        "fsfreeze, psql\n"
        "5          9  2025-11-24 13:30:15.500+01:00  crash        -                 -  -\n"
    )
    api.answer("GET", "/v1/disks/a/bookmarks", {"bookmarks": []})
    assert "has no bookmarks; add one" in cdp("bookmark", "list", "a").err


def test_bookmark_remove(cdp: Cdp, api: FakeApi) -> None:
    api.answer("DELETE", "/v1/disks/a/bookmarks/nightly", {})
    assert cdp("bookmark", "remove", "a", "nightly").out == "a: bookmark nightly removed\n"


# ------------------------------------------------------------------------------------------- views
def test_view_open_prints_the_uri(cdp: Cdp, api: FakeApi) -> None:
    point = {"seq": 17, "stamp": 1, "time": NOW, "spec": "seq:17"}
    api.answer("POST", "/v1/disks/disk0/resolve", point)
    api.answer("POST", "/v1/disks/disk0/views", VIEW, 201)
    ran = cdp("view", "open", "disk0", "--at", "2025-11-24 13:00", "--writable")
    assert (ran.out, ran.err) == (f"{VIEW['uri']}\n", "")
    # In the caller's zone, then resolved once.
    assert [call.body for call in api.calls] == [
        {"spec": "@1763985600"},
        {"at": "seq:17", "writable": True},
    ]
    assert cdp("view", "open", "disk0", "--at", "now", "--json").json == VIEW


def test_view_list(cdp: Cdp, api: FakeApi) -> None:
    plain = {**VIEW, "id": "v2", "writable": False, "overlay_bytes": None}
    api.answer("GET", "/v1/views", {"views": [VIEW, plain]})
    assert cdp("view", "list", "--json").json == [VIEW, plain]
    lines = cdp("view", "list").out.splitlines()
    assert lines[0].split() == ["ID", "DISK", "SEQ", "TIME", "MODE", "OVERLAY", "OPENED", "URI"]
    assert "writable     8 KiB" in lines[1]
    assert "read-only        -" in lines[2]


def test_view_close(cdp: Cdp, api: FakeApi) -> None:
    api.answer("DELETE", "/v1/views/v1", {})
    assert cdp("view", "close", "v1").out == "view v1 closed\n"
    api.refuse("DELETE", "/v1/views/v2", 404, "not_found", "no view v2: see 'cdp view list'")
    assert cdp("view", "close", "v2").error == "no view v2: see 'cdp view list'"


# ------------------------------------------------------------------------------------------- specs
def asked_for(cdp: Cdp, api: FakeApi, spec: str) -> str:
    """What the daemon is asked to resolve."""
    api.answer("POST", "/v1/disks/a/resolve", {"seq": 1, "stamp": 1, "time": NOW, "spec": ""})
    api.answer("POST", "/v1/disks/a/views", VIEW)
    assert cdp("view", "open", "a", "--at", spec).status == 0
    spec = api.asked("POST", "/v1/disks/a/resolve")[-1].body["spec"]
    return spec


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("now", "now"),
        ("seq:5", "seq:5"),
        ("nightly", "bookmark:nightly"),
        ("bookmark:noon", "bookmark:noon"),
        ("@1763985600.25", "@1763985600.25"),
        ("2025-11-24T12:00", "@1763982000"),
        ("2025-11-24T12:00Z", "@1763985600"),
        ("24 nov 2025 12:00", "@1763982000"),
    ],
)
def test_specs_are_sent_as_what_they_mean(cdp: Cdp, api: FakeApi, given: str, sent: str) -> None:
    assert asked_for(cdp, api, given) == sent
    assert all(call.method == "POST" for call in api.calls)


def test_a_word_that_is_a_time_is_looked_up_first(cdp: Cdp, api: FakeApi) -> None:
    api.answer("GET", "/v1/disks/a/bookmarks", {"bookmarks": [{"label": "12am"}]})
    assert asked_for(cdp, api, "12am") == "bookmark:12am"
    api.answer("GET", "/v1/disks/a/bookmarks", {"bookmarks": []})
    assert asked_for(cdp, api, "12am").startswith("@")
    error = cdp("view", "open", "a", "--at", "yesterday").error
    assert error == (
        "a has no bookmark 'yesterday', and 'yesterday' is a whole day: add the time of day, as in "
        "'yesterday 14:00'"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("2025-02-30", "there is no time"),
        ("2999-01-01", "in the future"),
        ("2025-10-26 02:30", "happened twice"),
        ("a b", "no point in time"),
        ("-10", "no duration"),
    ],
)
def test_specs_are_refused_before_anything_is_asked(
    cdp: Cdp, api: FakeApi, spec: str, message: str
) -> None:
    ran = cdp("rollback", "a", "--to", spec, "--yes")
    assert ran.status == 1
    assert message in ran.error
    assert api.calls == []


def test_a_point_that_cannot_be_opened(cdp: Cdp, api: FakeApi) -> None:
    words = "seq:5 is not kept; openable: seq:7 (...) to seq:9 (...)"
    api.refuse("POST", "/v1/disks/a/resolve", 409, "not_openable", words)
    assert cdp("view", "open", "a", "--at", "seq:5").error == words


# ---------------------------------------------------------------------------------------- rollback
PLAN = {"disk": "a", "to_seq": 41, "to_time": NOW, "extents": 3, "bytes": 12288}
PLAN |= {"seconds_estimate": 1.5}
DONE = {"disk": "a", "to_seq": 41, "begin_seq": 90, "commit_seq": 99, "extents": 3, "bytes": 12288}
DONE |= {"undo_with": "seq:89"}


def test_rollback_dry_run(cdp: Cdp, api: FakeApi) -> None:
    api.answer("POST", "/v1/rollback", [{"result": {"plans": [PLAN]}}])
    assert cdp("rollback", "a", "--to", "seq:41", "--dry-run").out == (
        "DISK  TO SEQ  TO TIME                        EXTENTS  CHANGES  TAKES ABOUT\n"
        "a         41  2025-11-24 13:30:15.500+01:00        3   12 KiB        1.5 s\n"
    )
    body = {"disks": ["a"], "to": "seq:41", "dry_run": True, "disconnect": False}
    assert [call.body for call in api.calls] == [body]
    ran = cdp("rollback", "a", "--to", "seq:41", "--dry-run", "--json")
    assert ran.json == {"plans": [PLAN]}


def test_rollback(cdp: Cdp, api: FakeApi) -> None:
    answer = {"rollbacks": [DONE, {**DONE, "disk": "b", "undo_with": "seq:33"}]}
    api.answer("POST", "/v1/rollback", [{"result": answer}])
    arguments = ["rollback", "a,b", "--to", "nightly", "--yes", "--disconnect"]
    assert cdp(*arguments).out == (
        "a: as it was at seq:41; 12 KiB in 3 extents changed\n"
        "undo with: cdp rollback a --to seq:89\n"
        "b: as it was at seq:41; 12 KiB in 3 extents changed\n"
        "undo with: cdp rollback b --to seq:33\n"
    )
    body = {"disks": ["a", "b"], "to": "bookmark:nightly", "dry_run": False, "disconnect": True}
    assert [call.body for call in api.calls] == [body]
    assert cdp(*arguments, "--json").json == answer


def test_rollback_needs_somebody_who_confirms(cdp: Cdp, api: FakeApi) -> None:
    assert "say --yes" in cdp("rollback", "a", "--to", "seq:41").error
    assert api.calls == []


def test_rollback_refused(cdp: Cdp, api: FakeApi) -> None:
    words = "a is in use by 2 clients: stop them, or say --disconnect"
    api.answer("POST", "/v1/rollback", [{"error": words, "kind": "busy"}])
    assert cdp("rollback", "a", "--to", "seq:41", "--yes").error == words


# ------------------------------------------------------------------------------------------ tables
def test_plain_tables_are_aligned_and_end_without_blanks() -> None:
    table = Table(["NAME", ">BYTES", "WHY"])
    table.add("a", "5", "")
    table.add("long name", "12345", "x")
    assert table.plain() == "NAME       BYTES  WHY\na              5\nlong name  12345  x\n"


def test_offer(cdp: Cdp, api: FakeApi) -> None:
    api.answer("POST", "/v1/disks/a/offer", disk("a"))
    assert cdp("disk", "offer", "a").out == "a: served\n"
    assert cdp("disk", "offer", "a", "--json").json["name"] == "a"


def test_commands_that_are_not_there_yet_say_what_does_it(cdp: Cdp, short_tmp: Path) -> None:
    attach = cdp("attach", "a").error
    assert f"run 'nbd-client -unix {short_tmp}/nbd.sock -N a /dev/nbd0 -persist' as root" in attach
    assert "/dev/nbd3" in cdp("attach", "a", "--device", "/dev/nbd3").error
    assert "nbd-client -d" in cdp("detach", "a").error


def test_disks_whose_configuration_cannot_be_read_are_shown(cdp: Cdp, api: FakeApi) -> None:
    api.answer("GET", "/v1/status", {**status(disk("a")), "broken": {"b": "b/disk.json: torn"}})
    assert cdp("status").out.endswith("\nb: not usable: b/disk.json: torn\n")
    assert cdp("status", "b").error == "b is not usable: b/disk.json: torn"
