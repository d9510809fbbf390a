"""The process that reads for a scrub: what it says, what it is told, how it ends."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from cdp.curator.scrub_reader import Reader
from journal.errors import CdpError

HEAD = "import sys, json\nsay = lambda **what: print(json.dumps(what), flush=True)\n"


def reader(directory: Path, code: str) -> Reader:
    return Reader(directory, (sys.executable, "-c", HEAD + code))


async def test_what_it_says_is_handed_on(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    code = "say(progress=sys.argv[1:])\nsay(finished=1)"
    with trio.fail_after(60):
        await reader(tmp_path, code).read(7, (2, 3), said.append)
    words = ["--disk-dir", str(tmp_path), "--rate", "7", "--after-undo", "2", "--after-redo", "3"]
    assert said == [{"progress": words}, {"finished": 1}]


@pytest.mark.parametrize("code", ["say(progress=1)", "say(finished=1); sys.exit(3)", "1 / 0",
                                  "import os; os.abort()"])  # fmt: skip
async def test_an_end_that_is_none_is_told(tmp_path: Path, code: str) -> None:
    with trio.fail_after(60), pytest.raises(CdpError, match="ended with status"):
        await reader(tmp_path, code).read(0, (0, 0), lambda said: None)


async def test_it_hears_of_a_new_rate(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    one = reader(tmp_path, "say(progress=0)\nsay(finished=int(sys.stdin.readline()))")
    await one.set_rate(1)  # to nobody
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.read, 0, (0, 0), said.append)
            while not said:  # noqa: ASYNC110
                await trio.sleep(0.01)
            await one.set_rate(99)
    assert said[-1] == {"finished": 99}


async def test_it_ends_with_who_reads(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    code = "import os\nsay(progress=os.getpid())\nsys.stdin.read()"
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader(tmp_path, code).read, 0, (0, 0), said.append)
            while not said:  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(int(json.dumps(said[0]["progress"])), 0)
