"""A fingerprint of the backing at a clean stop, to notice at the next start that somebody else
wrote.

It samples what almost any use changes: both ends, the places of the superblocks of common file
systems and partition tables, and the blocks that were applied last; of a file also its modification
time. It cannot see a write that touches none of these: it is a guard against accidents (a device
mounted behind our back), not a proof.
"""

from __future__ import annotations

from typing import Any, Final

from journal.format import BLOCK, checksum
from journal.storage import File

# ext2/3/4, xfs, LVM, MBR and GPT lie in the first 64 KiB; btrfs at 64 KiB, 64 MiB and 256 GiB; md
# and the second GPT at the end.
SAMPLE_BYTES: Final = 64 << 10
SUPERBLOCKS: Final = (0, 64 << 10, 64 << 20, 256 << 30)
LAST_BLOCKS_MAX: Final = 64


def take(backing: File, *, identity: dict[str, int], last_blocks: list[int]) -> dict[str, Any]:
    """The fingerprint: sizes in bytes, checksums by offset. ``identity``: what names the file or
    device.
    """
    size = backing.size()
    places = [(at, SAMPLE_BYTES) for at in SUPERBLOCKS if at < size]
    places.append((max(0, size - SAMPLE_BYTES), SAMPLE_BYTES))
    places += [(block * BLOCK, BLOCK) for block in last_blocks[-LAST_BLOCKS_MAX:]]
    samples = {f"{at}+{length}": checksum(backing.read(at, length)) for at, length in places}
    return {"size": size, "identity": identity, "samples": samples}


def differs(fingerprint: dict[str, Any], backing: File, *, identity: dict[str, int]) -> str | None:
    """What is not as it was when the fingerprint was taken; None when nothing is."""
    if backing.size() != fingerprint.get("size"):
        return f"its size was {fingerprint.get('size')} bytes and is {backing.size()}"
    for name, value in dict(fingerprint.get("identity", {})).items():
        if identity.get(name) != value:
            return f"its {name.replace('_', ' ')} is not what it was"
    for place, value in dict(fingerprint.get("samples", {})).items():
        at, length = (int(part) for part in place.split("+"))
        if checksum(backing.read(at, length)) != value:
            return f"its content at byte {at} is not what it was"
    return None
