"""What names a file or device across restarts, and whether a file was touched since."""

from __future__ import annotations

import os
import stat


def identity_of(descriptor: int) -> dict[str, int]:
    """Of a file: inode and modification time (ns). Of a block device: its number."""
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        return {"device_number": status.st_rdev}
    return {"inode": status.st_ino, "modification_time": status.st_mtime_ns}
