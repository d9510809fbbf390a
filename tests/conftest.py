"""What every test gets: seeds that can be replayed, clean logs, tools, short paths.

* A WARNING or worse in the log that the test did not announce fails it: in a program for data
  protection a warning nobody reads is how data gets lost.
* Randomness is seeded, and the seed of a failed test is printed: CDP_TEST_SEED=N replays it. Each
  state of the tree has seeds of its own, the same everywhere: what passed here passes there, and
  what is committed next tries others. CDP_TEST_SEED=random takes new ones each time.
* A missing tool skips a test on a developer's machine and fails it under CI=true.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NoReturn

import hypothesis
import pytest

from journal.storage import Mode, RealFile, RealStorage

IN_CI = os.environ.get("CI") == "true"

# ------------------------------------------------------------------------------------ hypothesis

# Deadlines measure the machine, not the code. A found failure prints the blob that replays it.
_COMMON = hypothesis.settings(deadline=None, print_blob=True)
hypothesis.settings.register_profile("default", _COMMON, max_examples=50)
hypothesis.settings.register_profile("ci", _COMMON, max_examples=100, derandomize=True)
hypothesis.settings.register_profile("fuzz", _COMMON, max_examples=20_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if IN_CI else "default"))

# ----------------------------------------------------------------------------------------- seeds

_SEED = pytest.StashKey[int]()


@functools.cache
def _tree() -> str:
    """The name of the committed state; not the commit's own, which changes when it is moved."""
    command = ["git", "-c", "safe.directory=*", "rev-parse", "HEAD^{tree}"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""  # not a checkout: always the same seeds
    return done.stdout.decode().strip()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for this test, printed when the test fails (see the module)."""
    given = os.environ.get("CDP_TEST_SEED") or ""
    if given == "random":
        value = secrets.randbits(32)
    else:
        value = int(given) if given else zlib.crc32(f"{_tree()} {request.node.nodeid}".encode())
    request.node.stash[_SEED] = value
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and _SEED in item.stash:
        line = f"CDP_TEST_SEED={item.stash[_SEED]} replays this run"
        report.sections.append(("seed", line))
    return report


# ------------------------------------------------------------------------------------------ logs


class _Recorder(logging.Handler):
    """Keeps what was logged at WARNING or above during one test, and what the test announced."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []
        self.expected: list[tuple[re.Pattern[str], bool]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def complaints(self) -> list[str]:
        """What the test should fail for, one line each."""
        lines = [f"{r.levelname} {r.name}: {r.getMessage()}" for r in self.records]
        found = [
            f"unexpected in the log: {line}"
            for line in lines
            if not any(pattern.search(line) for pattern, _ in self.expected)
        ]
        found += [
            f"expected in the log, and missing: {pattern.pattern}"
            for pattern, required in self.expected
            if required and not any(pattern.search(line) for line in lines)
        ]
        return found


_RECORDER = pytest.StashKey[_Recorder]()


def pytest_runtest_logstart(nodeid: str, location: tuple[str, int | None, str]) -> None:
    """Leaves no handler of an earlier test behind (one that was interrupted, say)."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _Recorder)]:
        root.removeHandler(handler)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    recorder = _Recorder()
    item.stash[_RECORDER] = recorder
    for mark in item.iter_markers("expect_log"):
        pattern = re.compile(mark.args[0])
        recorder.expected.append((pattern, mark.kwargs.get("required", True)))
    logging.getLogger().addHandler(recorder)
    for mark in item.iter_markers("needs_tool"):
        for name in mark.args:
            _find_tool(name)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    result = yield
    # Only reached when the test itself passed: its own failure says more than its log.
    recorder = item.stash[_RECORDER]
    complaints = recorder.complaints()
    recorder.records.clear()
    recorder.expected = [(pattern, False) for pattern, _ in recorder.expected]
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    recorder = item.stash.get(_RECORDER, None)
    if recorder is not None:
        # The rest are left from a test that failed; its required patterns are moot as well.
        recorder.records.clear()
        recorder.expected = [(pattern, False) for pattern, _ in recorder.expected]
    try:
        result = yield
    finally:
        if recorder is not None:
            logging.getLogger().removeHandler(recorder)
    if recorder is not None and (complaints := recorder.complaints()):
        pytest.fail("\n".join(complaints), pytrace=False)
    return result


@pytest.fixture
def expect_log(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`expect_log(regex)`: this test logs a warning that matches, in "LEVEL logger: message".

    With `required=False` it may or may not be logged.
    """
    recorder = request.node.stash[_RECORDER]

    def expect(regex: str, *, required: bool = True) -> None:
        recorder.expected.append((re.compile(regex), required))

    return expect


@pytest.fixture(scope="module", autouse=True)
def _collect_garbage() -> Iterator[None]:
    """What is only reachable in cycles warns here (and fails here), not in a later module."""
    yield
    gc.collect()


# ----------------------------------------------------------------------------------------- tools


def _missing(what: str) -> NoReturn:
    if IN_CI:
        pytest.fail(f"{what}: under CI=true nothing is skipped", pytrace=False)
    pytest.skip(what)


def _find_tool(name: str) -> str:
    # Administration tools are not on every user's PATH.
    path = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
    found = shutil.which(name, path=path)
    if found is None:
        _missing(f"{name} is not installed")
    return found


@pytest.fixture(scope="session")
def need_tool() -> Callable[[str], str]:
    """`need_tool(name)`: the path of a program; skips without it, or fails under CI=true."""
    return _find_tool


@pytest.fixture(scope="session")
def not_here() -> Callable[[str], NoReturn]:
    """`not_here(reason)`: skips for a reason of this machine, or fails under CI=true."""
    return _missing


@pytest.fixture
def may_mount(not_here: Callable[[str], NoReturn]) -> None:
    """Mounting needs root, FUSE and loop devices."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        not_here("mounting needs root and /dev/fuse")


# ----------------------------------------------------------------------------------------- paths


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory with a path short enough for unix sockets, whose limit is 108 bytes."""
    path = Path(tempfile.mkdtemp(prefix="cdp-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def _files_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes journal files that a test left open: its writers and readers "die" at its end.

    Hundreds of tests play processes that are killed; in one process their files would pile up.
    """
    opened: list[RealFile] = []
    really_open = RealStorage.open

    def remembering(self: RealStorage, name: str, mode: Mode) -> RealFile:
        file = really_open(self, name, mode)
        opened.append(file)
        return file

    monkeypatch.setattr(RealStorage, "open", remembering)
    yield
    for file in opened:
        file.close()
