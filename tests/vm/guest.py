"""A guest with a stock Debian kernel, for what only a kernel can show: nbd, dm, file systems.

The machine that runs the tests needs neither the modules nor root. Debian's cloud kernel, a static
busybox and a few tools are downloaded as packages and unpacked below .cache/vm, never installed;
`base.cpio` is an initramfs made of them. A test is a shell script: it is put into a second, tiny
archive behind the first one (the kernel unpacks both), the guest boots under qemu's emulation in
some seconds, runs it, and switches itself off. All it says comes over the serial console.

Guest and host share two channels:

* the network: the host's loopback is 10.0.2.2 in the guest ($HOST_ADDRESS), so a server listens on
  127.0.0.1 and the guest's nbd-client connects to that address;
* `ask_host NAME` in the script: the host runs the function of that name while the guest waits, and
  the command succeeds if the function returned.

KVM is not used: the emulated machine is the same everywhere, also where /dev/kvm only pretends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import select
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "vm"
HOST_ADDRESS = "10.0.2.2"

KERNEL = "linux-image-cloud-amd64"
PACKAGES = ("busybox-static", "btrfs-progs", "dmsetup", "e2fsprogs", "nbd-client", "xfsprogs")
PROGRAMS = (
    *("/sbin/dmsetup", "/sbin/e2fsck", "/sbin/mkfs.btrfs", "/sbin/mkfs.ext4", "/sbin/mkfs.xfs"),
    *("/sbin/nbd-client", "/sbin/xfs_db", "/sbin/xfs_io", "/sbin/xfs_repair", "/bin/btrfs"),
)
MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_net", "nbd", "loop", "null_blk"),
    *("dm-mod", "dm-log-writes", "dm-flakey", "dm-raid", "dm-snapshot", "raid1"),
    *("ext4", "xfs", "btrfs", "crc32c_generic", "crc32c_intel"),
)
# Loaded by name at run time, by the crypto core and by btrfs.
MODULE_FOLDERS = ("kernel/crypto", "kernel/lib")

INIT = """#!/bin/busybox sh
export PATH=/sbin:/bin:/usr/sbin:/usr/bin
/bin/busybox --install -s 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
modprobe -a virtio_pci virtio_blk virtio_net
ip link set lo up
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
export HOST_ADDRESS=10.0.2.2 DM_DISABLE_UDEV=1
cat >/bin/ask_host <<'END'
#!/bin/sh
echo "CDP-GUEST-ASKS $*"
read -r answer </dev/ttyS0
[ "$answer" = ok ]
END
chmod +x /bin/ask_host
stty -echo </dev/ttyS0
sh -eu /test.sh </dev/null
status=$?
sync
echo "CDP-GUEST-ENDS $status"
poweroff -f
"""

ASKS = re.compile(r"CDP-GUEST-ASKS (\S+)")
ENDS = re.compile(r"CDP-GUEST-ENDS (\d+)")


class GuestUnavailable(Exception):
    """The guest cannot be built or started on this machine; says what is missing."""


@dataclass(frozen=True)
class GuestRun:
    """What became of one boot: the script's exit status, None if it never ended."""

    status: int | None
    console: str
    asked: list[str] = field(default_factory=list)

    def check(self) -> None:
        assert self.status == 0, f"the guest's script ended with {self.status}:\n{self.console}"


class Boot(Protocol):
    """What the fixture `boot` is: `run` in a directory of the test's own."""

    def __call__(self, script: str, **options: Any) -> GuestRun: ...


# ----------------------------------------------------------------------------------------- build


def _output(*command: str | Path, cwd: Path | None = None) -> str:
    # Package tools translate their output.
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise GuestUnavailable(f"{command[0]} failed: {' '.join(last)}")
    return done.stdout


def _packages() -> list[str]:
    """The kernel's package, the tools, and the libraries they need."""
    kernel = re.search(r"Depends: (linux-image-\S+)", _output("apt-cache", "depends", KERNEL))
    if kernel is None:
        raise GuestUnavailable(f"{KERNEL} is unknown to apt: run apt-get update")
    kinds = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    closure = _output(
        "apt-cache", "depends", "--recurse", *(f"--no-{kind}" for kind in kinds), *PACKAGES
    )
    names = {line.strip() for line in closure.splitlines() if not line.startswith(" ")}
    # Large, and linked to by none of the programs.
    libraries = {
        name for name in names if re.match(r"(?!lib(icu|perl|python))(lib|zlib)[a-z0-9.+-]+$", name)
    }
    return [kernel[1], *PACKAGES, *sorted(libraries)]


def _download(names: list[str], folder: Path) -> None:
    if not shutil.which("apt-get"):
        raise GuestUnavailable("the guest is made of Debian packages, and there is no apt-get")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _output("apt-get", "download", "-q", *names, cwd=folder)


def _libraries(system: Path, program: Path) -> Iterable[Path]:
    """The shared libraries of a program, found by the unpacked system's own loader."""
    places = [system / where / "x86_64-linux-gnu" for where in ("lib", "usr/lib")]
    loader = next(path / "ld-linux-x86-64.so.2" for path in places if path.exists())
    listing = _output(loader, "--library-path", ":".join(map(str, places)), "--list", program)
    for line in listing.splitlines():
        if match := re.search(rf"=> ({re.escape(str(system))}\S+)", line):
            yield Path(match[1])
    yield loader


def _module_files(modules: Path) -> set[str]:
    """The chosen modules and what they need, relative to the directory of all modules."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        needs[path] = needed.split()
    by_name = {Path(path).stem.replace("-", "_"): path for path in needs}
    wanted = {path for path in needs if path.startswith(MODULE_FOLDERS)}
    built_in = (modules / "modules.builtin").read_text().replace("-", "_")
    for name in MODULES:
        name = name.replace("-", "_")
        if name in by_name:
            wanted.add(by_name[name])
        elif f"/{name}.ko" not in built_in:
            raise GuestUnavailable(f"the kernel has no module {name}")
    return wanted | {needed for path in wanted for needed in needs[path]}


class _Archive:
    """A cpio archive in the "newc" format, the one that the kernel unpacks."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._seen: set[str] = set()

    def add(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        name = name.strip("/")
        if name in self._seen:
            return
        parent = name.rpartition("/")[0]
        if parent:
            self.add(parent, stat.S_IFDIR | 0o755)
        self._seen.add(name)
        self._append(name, mode, data, device)

    def _append(self, name: str, mode: int, data: bytes, device: tuple[int, int]) -> None:
        raw = name.encode() + b"\0"
        fields = (
            *(len(self._seen), mode, 0, 0, 1, 0, len(data), 0, 0),
            *(*device, len(raw), 0),
        )
        header = b"070701" + b"".join(b"%08x" % number for number in fields) + raw
        self._parts += [header + bytes(-len(header) % 4), data, bytes(-len(data) % 4)]

    def file(self, name: str, source: Path) -> None:
        self.add(name, stat.S_IFREG | 0o755, source.read_bytes())

    def bytes(self) -> bytes:
        self._append("TRAILER!!!", 0, b"", (0, 0))
        content = b"".join(self._parts)
        return content + bytes(-len(content) % 512)


def _base(system: Path, modules: Path) -> bytes:
    archive = _Archive()
    for folder in ("dev", "mnt", "proc", "run", "sys", "sbin", "tmp", "usr/bin", "usr/sbin"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("init", stat.S_IFREG | 0o755, INIT.encode())
    archive.file("bin/busybox", system / "bin" / "busybox")
    archive.add("sbin/modprobe", stat.S_IFLNK | 0o777, b"/bin/busybox")
    archive.add("etc/mtab", stat.S_IFLNK | 0o777, b"/proc/mounts")
    for program in PROGRAMS:
        places = [system / program.lstrip("/"), system / ("usr" + program)]
        source = next((path for path in places if path.exists()), None)
        if source is None:
            raise GuestUnavailable(f"no package has {program}")
        archive.file(program, source)
        for library in _libraries(system, source):
            archive.file(f"lib/x86_64-linux-gnu/{library.name}", library)
    archive.add("lib64/ld-linux-x86-64.so.2", stat.S_IFLNK | 0o777, _LOADER)
    where = f"lib/modules/{modules.name}"
    for path in sorted(_module_files(modules)):
        archive.file(f"{where}/{path}", modules / path)
    for path in ("modules.dep", "modules.alias", "modules.softdep", "modules.builtin"):
        archive.file(f"{where}/{path}", modules / path)
    return archive.bytes()


_LOADER = b"/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"


def build() -> tuple[Path, Path]:
    """Kernel and initramfs, from the cache if this file has not changed since they were made."""
    if platform.machine() != "x86_64":
        raise GuestUnavailable(f"the guest is x86_64, and this machine {platform.machine()}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        # Of two test runs at once, the second finds what the first has built.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build()


def _build() -> tuple[Path, Path]:
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    folder = CACHE / key
    kernel, base = folder / "vmlinuz", folder / "base.cpio"
    if base.exists():
        return kernel, base
    for stale in CACHE.iterdir():
        if stale.is_dir():
            shutil.rmtree(stale)
    system = CACHE / "system"
    _download(_packages(), CACHE / "packages")
    for package in sorted((CACHE / "packages").glob("*.deb")):
        _output("dpkg", "-x", package, system)
    (modules,) = (system / "lib" / "modules").iterdir()
    _output(shutil.which("depmod") or "/sbin/depmod", "-b", system, modules.name)
    content = _base(system, modules)
    folder.mkdir()
    shutil.copy(system / "boot" / f"vmlinuz-{modules.name}", kernel)
    # Last, by rename: its presence means that all the rest is there.
    base.with_suffix(".new").write_bytes(content)
    base.with_suffix(".new").rename(base)
    shutil.rmtree(system)
    shutil.rmtree(CACHE / "packages")
    return kernel, base


# ------------------------------------------------------------------------------------------- run


def run(
    script: str,
    *,
    folder: Path,
    answers: Mapping[str, Callable[[], None]] | None = None,
    timeout_seconds: float = 240,
    drives: Iterable[Path] = (),
) -> GuestRun:
    """Boots, runs the script with `sh -eu`, and returns when the guest has switched itself off.

    `answers` are what `ask_host NAME` runs; `drives` are raw images, /dev/vda and so on in the
    guest. `folder` takes the initramfs. What the script prints is in the result's console.
    """
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise GuestUnavailable("qemu-system-x86_64 is not installed")
    kernel, base = build()
    archive = _Archive()
    archive.add("test.sh", stat.S_IFREG | 0o755, script.encode())
    initrd = folder / "initrd.cpio"
    with initrd.open("wb") as file, base.open("rb") as content:
        shutil.copyfileobj(content, file)
        file.write(archive.bytes())
    command: list[str | Path] = [
        *(qemu, "-accel", "tcg,thread=multi", "-smp", "2", "-m", "1024", "-no-reboot"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
        *("-kernel", kernel, "-initrd", initrd),
        *("-append", "console=ttyS0 panic=-1 quiet mitigations=off random.trust_cpu=on"),
        *("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="),
        *("-device", "virtio-rng-pci"),
    ]
    for number, image in enumerate(drives):
        command += ["-drive", f"file={image},format=raw,if=none,id=drive{number},cache=writeback"]
        command += ["-device", f"virtio-blk-pci,drive=drive{number}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            return _converse(process, answers or {}, time.monotonic() + timeout_seconds)
        finally:
            process.kill()


def _converse(
    process: subprocess.Popen[bytes], answers: Mapping[str, Callable[[], None]], deadline: float
) -> GuestRun:
    assert process.stdin is not None
    assert process.stdout is not None
    console, asked = bytearray(), list[str]()
    scanned = 0
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            continue
        data = os.read(process.stdout.fileno(), 65536)
        if not data:
            break
        console += data
        # Whole lines only: a question that has half arrived is asked again with the next read.
        end = console.rfind(b"\n") + 1
        for match in ASKS.finditer(console[scanned:end].decode(errors="replace")):
            asked.append(match[1])
            process.stdin.write(_answer(answers, match[1]))
            process.stdin.flush()
        scanned = max(scanned, end)
    else:
        console += b"\n(no end within the time allowed)\n"
    text = console.decode(errors="replace").replace("\r\n", "\n")
    end_marker = ENDS.search(text)
    return GuestRun(int(end_marker[1]) if end_marker else None, text, asked)


def _answer(answers: Mapping[str, Callable[[], None]], name: str) -> bytes:
    answers[name]()
    return b"ok\n"
