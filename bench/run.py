"""All measurements, or those that are named; each is a program of its own.

    python bench/run.py [burst] [sustained] [latency] [views] [memory] [curator] [index] [scrub]
                        [--quick] [--directory DIR]

`--quick` shows in some minutes that everything runs; its sizes are too small for its numbers to
mean anything. In the end all rows come again, as a table to be pasted into bench/README.md. Nothing
is written into the tree. The exit status tells whether everything ran, not whether it was fast.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.report import Row, machine, parser, require, table

# Name: its options with --quick. Those that need a quiet machine come first.
QUICK = {
    "burst": "--repeat 2 --scale 0.2 --seconds 0.5 --size-mib 128",
    "latency": "--repeat 2 --seconds 3 --rate 5000 --size-mib 128",
    "sustained": "--seconds 24 --chunk 12 --size-mib 256 --journal-limit 384M --tail 64M",
    "views": "--records 60000 --size-mib 128 --repeat 2 --seconds 1 --opens 4",
    "memory": "--writes 40000 --trims 4000",
    "curator": "--records 100000 --disk-gib 0.25",
    "index": "--records 200000",
    "scrub": "--mib 64 --repeat 2",
}
NEEDED = {"burst": ("fio", "qemu-nbd", "nbdkit"), "sustained": ("fio", "qemu-nbd")} | {
    name: ("fio",) for name in ("latency", "views", "memory")
}


def run(name: str, options: list[str], rows_file: Path) -> tuple[list[Row], bool]:
    """One measurement: its rows so far, and whether it came to its end."""
    program = Path(__file__).resolve().with_name(f"{name}.py")
    done = subprocess.run(
        [sys.executable, str(program), "--rows", str(rows_file), *options], check=False
    )
    if not rows_file.exists():
        return [], done.returncode == 0
    return [Row(**each) for each in json.loads(rows_file.read_text())], done.returncode == 0


def main() -> None:
    """See the module."""
    arguments = parser(__doc__)
    arguments.add_argument("names", nargs="*", help=f"of {' '.join(QUICK)}; all without")
    arguments.add_argument("--quick", action="store_true")
    chosen = arguments.parse_args()
    names = chosen.names or list(QUICK)
    if unknown := set(names) - set(QUICK):
        raise SystemExit(f"bench: no such measurement: {', '.join(sorted(unknown))}")
    require(*sorted({program for name in names for program in NEEDED.get(name, ())}))
    rows: list[Row] = []
    failed = []
    with tempfile.TemporaryDirectory(prefix="cdp-bench-", dir=chosen.directory) as scratch:
        about = machine(Path(scratch))
        for name in names:
            options = QUICK[name].split() if chosen.quick else []
            if chosen.directory:
                options += ["--directory", str(chosen.directory)]
            found, ended = run(name, options, Path(scratch) / f"{name}.json")
            rows += found
            if not ended:
                failed.append(name)
            print(flush=True)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {about}\n")
    print(table(rows))
    verdicts = [row.verdict for row in rows]
    print(
        f"\n{verdicts.count('PASS')} PASS, {verdicts.count('miss')} miss, "
        f"{verdicts.count('void')} void; load {os.getloadavg()[0]:.2f}"
        + ("; --quick: the numbers mean nothing" if chosen.quick else "")
    )
    if chosen.rows:
        chosen.rows.write_text(json.dumps([asdict(row) for row in rows]))
    if failed:
        raise SystemExit(f"bench: did not come to their end: {', '.join(failed)}")


if __name__ == "__main__":
    main()
