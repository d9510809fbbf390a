"""SPECs on the command line: read here, in the caller's zone, and sent as what they mean.

The daemon may run in another zone than the caller's terminal, and an export's name is resolved when
it is connected to: so a time is sent as ``@SECONDS`` and a bookmark as ``bookmark:LABEL``, and what
must not move between two calls is resolved once and sent as ``seq:N``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cdp.cli.api_client import ApiClient, Json, path_of
from cdp.units import local_zone
from journal.errors import NotFound

if TYPE_CHECKING:
    from replay.target import Spec


def canonical(client: ApiClient, disk: str, text: str) -> str:
    """``text`` as a SPEC that means the same to everybody.

    Only a bare word costs a call: it is a bookmark of ``disk`` if there is one of that name.

    :raises CdpError: no SPEC, a time that does not exist or lies in the future, no such bookmark.
    """
    from replay.target import AtBookmark, format_spec, parse_spec

    spec: Spec = parse_spec(text, now_ns=time.time_ns(), zone=local_zone())
    if isinstance(spec, AtBookmark) and (spec.otherwise or spec.hint):
        known = client.get(path_of("disks", disk, "bookmarks"))["bookmarks"]
        if all(bookmark["label"] != spec.label for bookmark in known):
            if spec.otherwise is None:
                raise NotFound(f"{disk} has no bookmark {spec.label!r}, and {spec.hint}")
            spec = spec.otherwise
    return format_spec(spec)


def resolve(client: ApiClient, disk: str, text: str) -> Json:
    """The point that ``text`` names: ``seq``, ``stamp``, ``time`` (UNIX seconds), ``spec``.

    :raises ApiError: it cannot be opened; the message names what can.
    """
    path = path_of("disks", disk, "resolve")
    return client.post(path, {"spec": canonical(client, disk, text)})
