"""Kernel file systems on an export (nbdfuse, a loop device): fill, destroy, roll back, compare."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest

from tests.interop.daemon import Daemon
from tests.interop.devices import CHECK, MAKE, call, device, mounted

SIZE = 384 << 20
FILES = 120


def sums(root: Path) -> dict[str, str]:
    """Every file's checksum."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.usefixtures("may_mount")
@pytest.mark.needs_tool("nbdfuse", "losetup", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs")
@pytest.mark.parametrize("kind", sorted(MAKE))
def test_a_destroyed_file_system_comes_back(
    daemon: Daemon, tmp_path: Path, seed: int, kind: str
) -> None:
    rng = random.Random(seed)
    daemon.cdp("disk", "add", "d", "--size", str(SIZE))
    with device(daemon.uri("d"), tmp_path / "fuse") as loop:
        call(*MAKE[kind], loop)
        with mounted(loop, tmp_path / "mnt") as root:
            for number in range(FILES):
                path = root / f"dir-{number % 7}" / f"file-{number}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(rng.randbytes(rng.choice((100, 5000, 70_000, 900_000))))
            before = sums(root)
    daemon.cdp("bookmark", "add", "d", "good")
    with device(daemon.uri("d"), tmp_path / "fuse") as loop:
        with mounted(loop, tmp_path / "mnt") as root:
            for path in sorted(root.rglob("file-*"))[::2]:
                path.write_bytes(rng.randbytes(path.stat().st_size))
            for path in sorted(root.rglob("file-*"))[1::2]:
                path.unlink()
            call("fstrim", str(root))
        with open(loop, "r+b", buffering=0) as raw:
            raw.seek(1 << 20)
            raw.write(rng.randbytes(4 << 20))
            os.fsync(raw.fileno())
    daemon.cdp("rollback", "d", "--to", "good", "--yes")
    with device(daemon.uri("d"), tmp_path / "fuse") as loop:
        call(*CHECK[kind], loop)
        with mounted(loop, tmp_path / "mnt") as root:
            assert sums(root) == before
    out = tmp_path / "good.img"
    daemon.cdp("restore", "d", "--to", "good", "--output", str(out))
    call(*CHECK[kind], str(out))
