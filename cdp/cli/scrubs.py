"""What `cdp scrub` and `cdp status` say of scrubs."""

from __future__ import annotations

from cdp import units
from cdp.cli.api_client import Json
from cdp.cli.output import Table, note, print_json, print_line


def begin_scrub(name: str, *, as_json: bool) -> None:
    """One was begun in the background."""
    if as_json:
        print_json({})
    else:
        print_line(f"{name}: being scrubbed; see 'cdp scrub {name} --status'")


def show_scrub(name: str, result: Json, *, as_json: bool) -> bool:
    """The result of one that came to its end; whether something is damaged."""
    damaged: list[Json] = result["damaged"]
    if as_json:
        print_json(result)
    else:
        checked = units.format_size(result["checked_bytes"])
        print_line(f"{name}: {checked} in {result['checked_records']} records checked")
        _show_damage(damaged)
    more = int(result.get("more") or 0)
    if damaged or more:
        lost = sum(each.get("effect", "lost") == "lost" for each in damaged) + more
        repaired = sum(each.get("effect") == "repaired" for each in damaged)
        note(
            f"{name}: {len(damaged) + more} damaged places; {repaired} repaired; {lost} cost "
            "content, points that need it fail to read"
        )
    return bool(damaged or more)


def _show_damage(damaged: list[Json]) -> None:
    titles = ["FILE", ">OFFSET", ">LENGTH", ">FIRST", ">LAST", "FROM", "TO", "EFFECT", "WHAT"]
    table = Table(titles)
    for each in damaged:
        table.add(
            str(each["file"]),
            str(each["offset"]),
            str(each.get("length") or "-"),
            str(each["first_seq"]),
            str(each["last_seq"]),
            units.format_time(each.get("from_time")),
            units.format_time(each.get("to_time")),
            str(each.get("effect", "lost")),
            str(each["what"]),
        )
    if damaged:
        table.print("")


def show_last(name: str, status: Json, *, as_json: bool) -> bool:
    """How the one that runs goes, and what the last one found; whether that was damage."""
    last = status.get("last")
    if as_json:
        print_json(status)
        return bool(last and (last["damaged"] or last.get("more")))
    print_line(f"{name}: {describe(status)}")
    return last is not None and show_scrub(name, last, as_json=False)


def describe(status: Json | None) -> str:
    """In one line."""
    if status is None:
        return "-"
    running, last, due = status.get("running"), status.get("last"), status.get("next")
    parts = []
    if running is not None:
        done, total = running["done"], running["total"]
        parts.append(
            f"running: {units.format_size(done)} of {units.format_size(total)}"
            + (f" ({100 * done // total} %)" if total else "")
        )
    if last is None:
        parts.append("never came to its end yet")
    else:
        found = [f"{last[key]} {key}" for key in ("lost", "covered", "repaired") if last.get(key)]
        when = units.format_time(last["finished"])
        parts.append(f"last {when}: {', '.join(found) or 'nothing is damaged'}")
    if status.get("failure"):
        parts.append(f"the last attempt failed: {status['failure']}")
    if running is None:
        parts.append(f"next {units.format_time(due)}" if due is not None else "not scheduled")
    return "; ".join(parts)
