"""The kernel's client with a file system on our export, before and after a rollback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from tests.vm import servers
from tests.vm.guest import Boot

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SIZE = 320 << 20

# What is written first must be back after the rollback, to the byte, with a clean file system.
SCRIPT = """
modprobe nbd max_part=0
modprobe {fs}

connect() {{
    # A device that was just disconnected is busy for a moment.
    for attempt in 1 2 3 4 5 6 7 8 9 10; do
        nbd-client -N {disk} $HOST_ADDRESS {port} /dev/nbd0 -b 4096 && return
        sleep 1
    done
    return 1
}}
disconnect() {{
    sync
    nbd-client -d /dev/nbd0
    while nbd-client -c /dev/nbd0; do sleep 0.2; done
}}
sums() {{ (cd /mnt && find . -type f ! -path './lost+found/*' | sort | xargs md5sum); }}

connect
{mkfs} /dev/nbd0
mount -t {fs} /dev/nbd0 /mnt
mkdir /mnt/a /mnt/b
for number in $(seq 1 20); do
    dd if=/dev/urandom of=/mnt/a/$number bs=32k count=$number 2>/dev/null
    echo $number >/mnt/b/$number
done
sync
sums >/tmp/first
umount /mnt
{check} /dev/nbd0
disconnect
ask_host bookmark

connect
mount -t {fs} /dev/nbd0 /mnt
sums | cmp - /tmp/first
rm -r /mnt/b
for number in $(seq 5 15); do
    dd if=/dev/urandom of=/mnt/a/$number bs=32k count=20 2>/dev/null
done
dd if=/dev/zero of=/mnt/c bs=1M count=30 2>/dev/null
sync
sums >/tmp/second
umount /mnt
disconnect
! cmp -s /tmp/first /tmp/second
ask_host rollback

connect
{check} /dev/nbd0
mount -t {fs} -o ro /dev/nbd0 /mnt
sums | cmp - /tmp/first
umount /mnt
disconnect
echo "back at the first state"
"""

FILE_SYSTEMS = {
    "ext4": {"mkfs": "mkfs.ext4 -q -F", "check": "e2fsck -f -n"},
    "xfs": {"mkfs": "mkfs.xfs -q -f", "check": "xfs_repair -n"},
    "btrfs": {"mkfs": "mkfs.btrfs -q -f", "check": "btrfs check --readonly"},
}


def _there_and_back(boot: Boot, server: servers.Server, fs: str) -> None:
    script = SCRIPT.format(fs=fs, disk=servers.DISK, port=server.port, **FILE_SYSTEMS[fs])
    run = boot(script, answers={"bookmark": server.bookmark, "rollback": server.rollback})
    run.check()
    assert run.asked == ["bookmark", "rollback"]
    assert "back at the first state" in run.console


@pytest.mark.needs_tool("qemu-nbd", "qemu-img")
@pytest.mark.parametrize("fs", FILE_SYSTEMS)
def test_the_test_is_right(boot: Boot, tmp_path: Path, fs: str) -> None:
    """The same as below, with a server and snapshots that are known to be right."""
    with servers.QemuNbd(tmp_path, SIZE) as server:
        _there_and_back(boot, server, fs)


@pytest.mark.parametrize("fs", FILE_SYSTEMS)
def test_a_file_system_is_rolled_back(
    boot: Boot, short_tmp: Path, fs: str, not_here: Callable[[str], NoReturn]
) -> None:
    if not (ROOT / "cdp" / "supervisor" / "main.py").exists():
        not_here("there is no daemon yet")
    with servers.Cdpd(short_tmp, SIZE) as server:
        _there_and_back(boot, server, fs)
