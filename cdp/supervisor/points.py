"""What a SPEC means for a disk: asked of its curator, after its recorder has confirmed the past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

from cdp.clock import SECOND_NS
from cdp.supervisor.disk import Disk
from cdp.units import local_zone
from journal.errors import InvalidInput, NotFound
from replay.target import AtBookmark, AtSeq, AtTime, Spec, format_spec, parse_spec


@dataclass(frozen=True, slots=True)
class Point:
    """An openable moment of one disk. `size` in bytes, of the disk at that moment.

    `stable`: the same SPEC means the same point next time; only then may several connections to an
    export named by it be used together.
    """

    seq: int
    stamp: int
    wall_ns: int
    size: int
    stable: bool

    @property
    def time(self) -> float:
        """UNIX seconds."""
        return self.wall_ns / SECOND_NS


def local_zone_name() -> str | None:
    """The name of this host's time zone, for messages; None when it has none known everywhere."""
    zone = local_zone()
    return zone.key if isinstance(zone, ZoneInfo) else None


def parse(spec: str, now_ns: int) -> Spec:
    """What a text means here and now. InvalidInput when it is no SPEC."""
    return parse_spec(spec, now_ns=now_ns, zone=local_zone())


async def resolve(disk: Disk, spec: str | Spec) -> Point:
    """The point that `spec` means on `disk`.

    :raises CdpError: it is no SPEC, or no point that can be opened; the message names what can.
    """
    disk.check_in_use()
    now_ns = disk.clock.wall_now()
    meant = parse(spec, now_ns) if isinstance(spec, str) else spec
    if not isinstance(meant, AtSeq):
        # Before anything else: the time asked for is over now, and this makes it stay so.
        await disk.sync()
    if isinstance(meant, AtBookmark) and meant.otherwise is not None:
        try:
            return await _ask(disk, AtBookmark(meant.label), now_ns)
        except NotFound:
            meant = meant.otherwise
    return await _ask(disk, meant, now_ns)


async def _ask(disk: Disk, spec: Spec, now_ns: int) -> Point:
    params = {"spec": format_spec(spec), "now_ns": now_ns, "zone": local_zone_name()}
    return _point(disk, await _call(disk, params), stable=isinstance(spec, AtSeq | AtBookmark))


async def at_stamp(disk: Disk, stamp: int) -> Point:
    """The state after the last record stamped at or before `stamp`, which must be confirmed."""
    return _point(disk, await _call(disk, {"stamp": stamp}), stable=True)


async def _call(disk: Disk, params: dict[str, Any]) -> dict[str, Any]:
    return (await disk.curator.call("resolve", params, again=True)).result


def _point(disk: Disk, result: dict[str, Any], *, stable: bool) -> Point:
    size = int(result.get("size") or disk.config.size)
    return Point(int(result["seq"]), int(result["stamp"]), int(result["wall_ns"]), size, stable)


def one_instant(spec: str, now_ns: int, disks: list[Disk]) -> Spec:
    """A SPEC for several disks, made the same for all of them.

    :raises InvalidInput: it names a record of one disk, and there are others.
    """
    meant = parse(spec, now_ns)
    if len(disks) > 1 and isinstance(meant, AtSeq):
        raise InvalidInput(
            f"{spec} is a record of one disk: name a time or a bookmark to roll several back"
        )
    if len(disks) > 1 and meant == parse("now", now_ns):
        return AtTime(now_ns)
    return meant
