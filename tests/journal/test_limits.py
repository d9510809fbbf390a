"""The limits' relations are asserted at import; here, that those assertions are able to fail."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from journal import limits

SOURCE = Path(limits.__file__).read_text(encoding="utf-8")
NAMES = sorted(name for name in vars(limits) if re.fullmatch(r"[A-Z_]+_(MIN|MAX|DEFAULT)", name))


def run(source: str) -> None:
    exec(compile(source, "limits.py", "exec"), {"__name__": "limits"})


def test_the_relations_hold() -> None:
    run(SOURCE)
    assert sum(isinstance(node, ast.Assert) for node in ast.parse(SOURCE).body) >= 15


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEGMENT_BYTES_MIN", "65 * MIB"),
        ("SEGMENT_BYTES_MIN", "512"),
        ("SEGMENT_BYTES_DEFAULT", "257 * MIB"),
        ("SEGMENT_BYTES_MAX", "4 * GIB"),
        ("RECORD_BYTES_MAX", "4 * GIB"),
        ("RECORD_BYTES_MAX", "65537"),
        ("RECORD_BYTES_MAX", "128 * MIB"),
        ("CONTROL_BODY_BYTES_MAX", "33 * MIB"),
        ("BATCH_PAYLOAD_BYTES_MAX", "MIB"),
        ("BATCH_PAYLOAD_BYTES_MAX", "64 * 1024 * GIB"),
        ("TAIL_BYTES_DEFAULT", "256 * MIB"),
        ("TAIL_BYTES_MIN", "2 * GIB"),
        ("TAIL_BYTES_MIN", "MIB"),
        ("TAIL_UNSYNCED_BYTES_MAX", "32 * MIB"),
        ("UNDO_SEGMENT_BYTES_DEFAULT", "512 * MIB"),
        ("UNDO_BATCH_BYTES_MAX", "64 * MIB"),
        ("UNDO_POSITION_BITS", "37"),
        ("UNDO_POSITION_BITS", "16"),
        ("CATALOG_FILE_BYTES_TIGHT", "256"),
        ("CATALOG_FILE_BYTES_MIN", "64 * KIB"),
        ("CATALOG_FILE_STATES_MIN", "1"),
        ("CATALOG_ENTRY_BYTES_MAX", "4 * GIB"),
    ],
)
def test_a_limit_that_breaks_another_is_refused(name: str, value: str) -> None:
    changed, count = re.subn(rf"^{name}: Final = .*$", f"{name} = {value}", SOURCE, flags=re.M)
    assert count == 1
    with pytest.raises(AssertionError):
        run(changed)


def test_limits_in_bytes_say_so() -> None:
    assert NAMES
    for name in NAMES:
        assert re.search(r"_(BYTES|RECORDS|ROWS|STATES|OPEN|ID|BLOCKS)(_|$)", name), name
