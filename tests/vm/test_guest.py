"""The harness itself, with servers that are known to be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm import servers
from tests.vm.guest import Boot

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def test_a_failing_script_is_reported(boot: Boot) -> None:
    run = boot("echo so far\nfalse\necho not reached")
    assert run.status == 1
    assert "so far" in run.console
    assert "not reached" not in run.console


def test_a_script_that_hangs_is_ended(boot: Boot) -> None:
    boot("true").check()  # builds what is missing, which may take its time
    run = boot("sleep 600", timeout_seconds=20)
    assert run.status is None


def test_host_and_guest_take_turns(boot: Boot, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    script = """
        printf guest >/dev/vda
        sync
        ask_host look
        echo 3 >/proc/sys/vm/drop_caches
        printf again | dd of=/dev/vda bs=512 seek=1 conv=sync,fsync
    """
    seen = []
    run = boot(script, answers={"look": lambda: seen.append(disk.read_bytes()[:5])}, drives=[disk])
    run.check()
    assert seen == [b"guest"]
    assert disk.read_bytes()[512:517] == b"again"


@pytest.mark.needs_tool("nbdkit")
def test_the_guests_client_reaches_the_hosts_loopback(boot: Boot) -> None:
    with servers.NbdkitMemory(64 << 20) as server:
        boot(f"""
            modprobe nbd max_part=0
            nbd-client -N {servers.DISK} $HOST_ADDRESS {server.port} /dev/nbd0 -b 512
            [ "$(blockdev --getsize64 /dev/nbd0)" = {64 << 20} ]
            dd if=/dev/urandom of=/tmp/data bs=64k count=16
            dd if=/tmp/data of=/dev/nbd0 bs=64k conv=fsync
            echo 3 >/proc/sys/vm/drop_caches
            cmp -n 1048576 /tmp/data /dev/nbd0
            nbd-client -d /dev/nbd0
        """).check()
