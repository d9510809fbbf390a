"""A block device that fails or hangs when it is told to: nbdkit's filters below a loop device."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.interop.devices import MAKE, WAIT_SECONDS, call, device, wait_for


class Faulty:
    """A loop device that can be told to fail or to hang."""

    def __init__(self, folder: Path, image: Path) -> None:
        self._folder = folder
        self.image = image
        self.loop = ""

    def fails(self, *kinds: str) -> None:
        """From now on these requests fail (pread, pwrite); none: all work again."""
        for kind in ("pread", "pwrite"):
            trigger = self._folder / f"fail-{kind}"
            if kind in kinds:
                trigger.touch()
            else:
                trigger.unlink(missing_ok=True)

    def hangs(self, yes: bool) -> None:
        """From now on no request is answered; or those that wait are, and all others."""
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self._folder / "pause.sock"))
            control.sendall(b"p" if yes else b"r")
            assert control.recv(1) == (b"P" if yes else b"R")


@contextmanager
def faulty(folder: Path, size: int, kind: str = "") -> Iterator[Faulty]:
    """A device, with a file system if one is named."""
    folder.mkdir()
    image, server = folder / "image", folder / "nbd.sock"
    with image.open("wb") as file:
        file.truncate(size)
    if kind:
        call(*MAKE[kind], str(image))
    errors = [
        word
        for name in ("pread", "pwrite")
        for word in (f"error-{name}=EIO", f"error-{name}-rate=100%",
                     f"error-{name}-file={folder}/fail-{name}")
    ]  # fmt: skip
    nbdkit = subprocess.Popen(
        ["nbdkit", "--foreground", f"--unix={server}", f"--pidfile={folder}/pid",
         "--filter=pause", "--filter=error", "file", str(image),
         f"pause-control={folder}/pause.sock", *errors],
    )  # fmt: skip
    made = Faulty(folder, image)
    try:
        wait_for((folder / "pid").exists, "nbdkit does not come up")
        with device(f"nbd+unix:///?socket={server}", folder / "fuse") as made.loop:
            try:
                yield made
            finally:
                made.fails()
                made.hangs(False)
    finally:
        nbdkit.terminate()
        nbdkit.wait(WAIT_SECONDS)
