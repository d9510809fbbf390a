"""House rules that a machine can check; each ban names what to use instead."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREES = ("journal", "replay", "cdp", "bench", "tests")
COLUMNS_MAX = 100
MODULE_LINES_MAX = 600
TEST_LINES_MAX = 800  # tables of cases and models are read from top to bottom
FUNCTION_LINES_MAX = 70
TEST_SLEEP_SECONDS_MAX = 0.05

# The only modules that change what is on a disk; all others call them.
STORAGE = {"journal/storage.py"}
BACKING = {f"replay/{stem}.py" for stem in ("apply", "backing", "release", "restore")}
STORAGE_CALLS = {
    *("fdatasync", "fsync", "pwrite", "pwritev", "remove", "rename", "replace", "sync", "unlink"),
}

# What makes a generator of its own; all else in `random` shares a hidden one.
SEEDABLE = {"Generator", "Random", "SystemRandom", "default_rng"}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def _modules() -> dict[str, ast.Module]:
    found = {}
    for tree in TREES:
        for path in sorted((ROOT / tree).rglob("*.py")):
            found[path.relative_to(ROOT).as_posix()] = ast.parse(_text(path))
    assert found, "no modules below the root: has the tree moved?"
    return found


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _below(*trees: str) -> Iterator[tuple[str, ast.Module]]:
    for name, module in _modules().items():
        if name.split("/", 1)[0] in trees:
            yield name, module


def _fail_on(complaints: list[str]) -> None:
    if complaints:
        pytest.fail("\n".join(["", *complaints]), pytrace=False)


# ------------------------------------------------------------------------------------------ size


def test_lines_fit_in_100_columns() -> None:
    complaints = []
    for name in _modules():
        for number, line in enumerate(_text(ROOT / name).splitlines(), 1):
            if len(line) > COLUMNS_MAX:
                complaints.append(f"{name}:{number}: {len(line)} columns, above {COLUMNS_MAX}")
    _fail_on(complaints)


def _functions(module: ast.Module) -> Iterator[tuple[str, int]]:
    """Qualified name and number of lines of every function."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
                name = prefix + child.name
                if isinstance(child, FUNCTIONS):
                    assert child.end_lineno is not None
                    yield name, child.end_lineno - child.lineno + 1
                yield from walk(child, name + ".")
            else:
                yield from walk(child, prefix)

    yield from walk(module, "")


def _oversize() -> dict[str, int]:
    """What is above the limits, and by how much: `module.py` or `module.py:function` -> lines."""
    found = {}
    for name, module in _modules().items():
        lines = len(_text(ROOT / name).splitlines())
        if lines > (TEST_LINES_MAX if name.startswith("tests/") else MODULE_LINES_MAX):
            found[name] = lines
        for function, length in _functions(module):
            if length > FUNCTION_LINES_MAX:
                key = f"{name}:{function}"
                found[key] = max(length, found.get(key, 0))
    return found


def test_sizes_only_shrink() -> None:
    allowed: dict[str, int] = {}
    for line in (Path(__file__).with_name("ratchet.txt")).read_text().splitlines():
        if line and not line.startswith("#"):
            key, number = line.split()
            allowed[key] = int(number)
    found = _oversize()
    complaints = []
    for key, lines in found.items():
        limit = FUNCTION_LINES_MAX if ":" in key else MODULE_LINES_MAX
        if key not in allowed:
            complaints.append(f"{key}: {lines} lines, above {limit}: split it")
        elif lines > allowed[key]:
            complaints.append(f"{key}: {lines} lines, grown from {allowed[key]}: split it")
    for key, lines in allowed.items():
        if key not in found:
            complaints.append(f"{key}: within the limits or gone: remove it from ratchet.txt")
        elif found[key] < lines:
            complaints.append(f"{key}: {found[key]} lines now: lower it in ratchet.txt")
    _fail_on(complaints)


# ------------------------------------------------------------------------------------------ bans


def _imports(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; `from a import b` is `a.b`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def _attributes(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every `name.attribute...` that is mentioned."""
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def _mentions(module: ast.Module) -> Iterator[tuple[int, str]]:
    yield from _imports(module)
    yield from _attributes(module)


def test_no_private_trio() -> None:
    _fail_on(
        [
            f"{name}:{line}: {what}: trio's private names change without notice"
            for name, module in _modules().items()
            for line, what in _mentions(module)
            if what.startswith("trio._")
        ]
    )


def test_durability_calls_have_one_home() -> None:
    complaints = []
    for name, module in _below("journal", "replay"):
        if name in STORAGE | BACKING:
            continue
        for line, what in _mentions(module):
            owner, _, call = what.rpartition(".")
            if owner == "os" and call in STORAGE_CALLS:
                complaints.append(f"{name}:{line}: {what}: goes through journal/storage.py")
    _fail_on(complaints)


def test_no_clock_in_the_engine() -> None:
    """Time is an argument of journal and replay, or their crash tests could not be replayed."""
    now = re.compile(r"(^|\.)(date|datetime)\.(now|utcnow|today)$")
    complaints = []
    for name, module in _below("journal", "replay"):
        for line, what in _imports(module):
            if what.split(".")[0] == "time":
                complaints.append(f"{name}:{line}: import of time: pass the time as an argument")
        for line, what in _attributes(module):
            if now.search(what):
                complaints.append(f"{name}:{line}: {what}: pass the time as an argument")
    _fail_on(complaints)


def _unseeded(name: str, module: ast.Module) -> Iterator[str]:
    for line, what in _mentions(module):
        function = re.fullmatch(r"(?:np\.|numpy\.)?random\.(\w+)", what)
        if function and function[1] not in SEEDABLE:
            yield f"{name}:{line}: {what}: use a seeded random.Random"
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and not node.args and not node.keywords:
            what = ast.unparse(node.func)
            if what.rpartition(".")[2] in {"Random", "default_rng"}:
                yield f"{name}:{node.lineno}: {what}() has no seed"


def test_randomness_is_seeded() -> None:
    _fail_on([line for name, module in _modules().items() for line in _unseeded(name, module)])


def test_nothing_is_left_to_do() -> None:
    mark = re.compile(r"\b(" + "|".join(("FIX" + "ME", "TO" + "DO", "XX" + "X")) + r")\b")
    complaints = []
    for name in _modules():
        for token in tokenize.generate_tokens(io.StringIO(_text(ROOT / name)).readline):
            if token.type == tokenize.COMMENT and mark.search(token.string):
                complaints.append(f"{name}:{token.start[0]}: file an issue: {token.string}")
    _fail_on(complaints)


def test_the_engine_does_not_print() -> None:
    _fail_on(
        [
            f"{name}:{node.lineno}: print: return it, raise it or log it"
            for name, module in _below("journal", "replay")
            for node in ast.walk(module)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
        ]
    )


def _sleeps(module: ast.Module) -> Iterator[tuple[int, float]]:
    """Calls of a real clock's sleep with a constant; trio under a mock clock does not wait."""

    def walk(node: ast.AST, mocked: bool) -> Iterator[tuple[int, float]]:
        if isinstance(node, FUNCTIONS):
            mocked = mocked or any(
                argument.arg in {"autojump_clock", "mock_clock"}
                for argument in node.args.args + node.args.kwonlyargs
            )
        if isinstance(node, ast.Call) and node.args:
            what, value = ast.unparse(node.func), node.args[0]
            sleeps = what == "time.sleep" or (what == "trio.sleep" and not mocked)
            if sleeps and isinstance(value, ast.Constant) and isinstance(value.value, int | float):
                yield node.lineno, value.value
        for child in ast.iter_child_nodes(node):
            yield from walk(child, mocked)

    yield from walk(module, False)


def test_tests_do_not_sleep() -> None:
    _fail_on(
        [
            f"{name}:{line}: sleeps {seconds} s: wait for what happens, or use autojump_clock"
            for name, module in _below("tests")
            if not name.startswith("tests/vm/")
            for line, seconds in _sleeps(module)
            if seconds > TEST_SLEEP_SECONDS_MAX
        ]
    )


# --------------------------------------------------------------------------- the rules themselves


BAD = """
import time
import random
from os import fsync
import trio._core
x = random.randint(1, 6)
r = random.Random()
ok = random.Random(1).random()
async def f():
    await trio.sleep(3)
async def g(autojump_clock):
    await trio.sleep(3)
"""


def test_the_rules_see_what_they_ban() -> None:
    module = ast.parse(BAD)
    mentions = {what for _, what in _mentions(module)}
    assert {"time", "os.fsync", "trio._core", "random.randint"} <= mentions
    assert len(list(_unseeded("bad.py", module))) == 2
    assert list(_sleeps(module)) == [(10, 3)]
    assert list(_functions(module)) == [("f", 2), ("g", 2)]
