"""What a user meets is documented: commands, metrics, alerts. Read as text; nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
METRIC = re.compile(r"\bcdp_[a-z0-9]+(?:_[a-z0-9]+)*\b")
# What the client library or PromQL appends to a metric's name.
SUFFIX = re.compile(r"_(?:total|bucket|sum|count|created|info)$")

# The commands that tests from outside rely on; they may only be added to.
COMMANDS = (
    *("disk add", "disk list", "disk remove", "disk resize", "disk set", "disk release"),
    *("disk drain", "status", "timeline", "points", "bookmark add", "bookmark list"),
    *("bookmark remove", "rollback", "restore", "view open", "view list", "view close"),
    *("attach", "detach", "scrub", "journal dump", "doctor"),
)

NotHere = Callable[[str], NoReturn]


def _read(path: Path, not_here: NotHere) -> str:
    if not path.exists():
        not_here(f"{path.relative_to(ROOT)} does not exist yet")
    return path.read_text(encoding="utf-8")


def _user_documents(not_here: NotHere) -> str:
    texts = [_read(ROOT / "README.md", not_here)]
    texts += [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))]
    return "\n".join(texts)


def _documents(command: str, text: str) -> bool:
    """`cdp disk add`, also as one of `cdp disk list | remove | resize`."""
    words = command.split()
    if re.search(rf"\bcdp {command}\b", text):
        return True
    if len(words) == 1:
        return False
    group, action = words
    return any(re.search(rf"\b{action}\b", line) for line in re.findall(rf"cdp {group}.*", text))


def test_every_command_is_documented(not_here: NotHere) -> None:
    text = _user_documents(not_here)
    missing = [f"cdp {command}" for command in COMMANDS if not _documents(command, text)]
    assert missing == [], "neither README.md nor docs/ says what these do"


def _strings(source: str) -> list[str]:
    """All string constants that are not docstrings or other bare expressions."""
    module = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(module)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare
    ]


def _stem(name: str) -> str:
    return SUFFIX.sub("", name)


def _exported(not_here: NotHere) -> set[str]:
    source = _read(ROOT / "cdp" / "api" / "metrics.py", not_here)
    return {_stem(text) for text in _strings(source) if METRIC.fullmatch(text)}


def _documented(not_here: NotHere) -> set[str]:
    return {_stem(name) for name in METRIC.findall(_read(PROMETHEUS / "README.md", not_here))}


def _rules() -> list[dict[str, object]]:
    document = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def _alerts() -> list[dict[str, object]]:
    return [rule for rule in _rules() if "alert" in rule]


def test_every_metric_is_documented(not_here: NotHere) -> None:
    exported = _exported(not_here)
    assert exported, "cdp/api/metrics.py names no metric as a plain string"
    assert sorted(exported - _documented(not_here)) == []


def test_every_documented_metric_exists(not_here: NotHere) -> None:
    assert sorted(_documented(not_here) - _exported(not_here)) == []


def test_alerts_use_documented_metrics(not_here: NotHere) -> None:
    used = {_stem(name) for rule in _rules() for name in METRIC.findall(str(rule["expr"]))}
    assert sorted(used - _documented(not_here)) == []


@pytest.mark.parametrize("rule", _alerts(), ids=lambda rule: str(rule["alert"]))
def test_every_alert_says_what_to_do(rule: dict[str, object]) -> None:
    annotations = rule.get("annotations")
    assert isinstance(annotations, dict)
    assert {"summary", "description"} <= annotations.keys()
    labels = rule.get("labels")
    assert isinstance(labels, dict)
    assert labels.get("severity") in {"critical", "warning"}


@pytest.mark.parametrize("rule", _alerts(), ids=lambda rule: str(rule["alert"]))
def test_every_alert_is_tested_both_ways(rule: dict[str, object]) -> None:
    fires, stays_quiet = False, False
    for path in sorted((PROMETHEUS / "tests").glob("*.yml")):
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        for case in document["tests"]:
            for check in case.get("alert_rule_test", ()):
                if check["alertname"] == rule["alert"]:
                    fires = fires or bool(check.get("exp_alerts"))
                    stays_quiet = stays_quiet or not check.get("exp_alerts")
    assert fires, f"no test in deploy/prometheus/tests makes {rule['alert']} fire"
    assert stays_quiet, f"no test in deploy/prometheus/tests keeps {rule['alert']} quiet"
