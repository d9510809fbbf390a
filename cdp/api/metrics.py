"""Metrics, made at the moment of a scrape from what the processes said last.

A scrape never waits for a process that is stuck: it gets the values of that process's last answer,
and `cdp_disk_status_age_seconds` says how old they are. Names, units and meanings are documented in
deploy/prometheus/README.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """One disk: `disk` as in the API's status, and the last answers of its processes."""

    disk: Mapping[str, Any]
    recorder: Mapping[str, Any] = field(default_factory=dict)
    curator: Mapping[str, Any] = field(default_factory=dict)
    oldest_pin_seconds: float = 0.0
    status_age_seconds: float = 0.0

    @property
    def scrub(self) -> Mapping[str, Any]:
        """How the disk's scrubs go."""
        return self.disk.get("scrub") or {}


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Everything a scrape is made of."""

    version: str
    start_time: float
    connections: int
    protocol_errors: Mapping[str, int]
    disks: list[DiskFacts]


@dataclass(frozen=True, slots=True)
class _Number:
    """A metric with one sample per disk: where its value is."""

    name: str
    text: str
    source: str
    key: str
    counter: bool = False


_NUMBERS: Final = (
    _Number("cdp_disk_served", "1 while clients can use the disk", "disk", "served"),
    _Number("cdp_disk_connections", "NBD connections to the disk", "disk", "connections"),
    _Number("cdp_disk_poisoned", "1 after a failed sync of the redo log", "disk", "poisoned"),
    _Number("cdp_disk_degraded", "1 while the backing cannot be synced", "disk", "degraded"),
    _Number("cdp_disk_durable_seq", "Highest seq on stable storage", "disk", "durable_seq"),
    _Number("cdp_disk_applied_seq", "Highest seq in the backing", "disk", "applied_seq"),
    _Number(
        "cdp_disk_journal_lag_seconds", "Age of the oldest write not durable", "disk", "lag_seconds"
    ),
    _Number("cdp_disk_journal_lag_bytes", "Acknowledged and not durable", "disk", "lag_bytes"),
    _Number(
        "cdp_disk_apply_lag_seconds",
        "Age of the oldest durable write not in the backing",
        "disk",
        "apply_lag_seconds",
    ),
    _Number(
        "cdp_disk_apply_lag_bytes", "Durable and not in the backing", "disk", "apply_lag_bytes"
    ),
    _Number(
        "cdp_disk_index_lag_records",
        "Records that no index run covers yet",
        "curator",
        "index_lag_records",
    ),
    _Number("cdp_disk_window_seconds", "How far back every write opens", "disk", "window_seconds"),
    _Number(
        "cdp_disk_window_shrunk",
        "Times that history was given up for the limit",
        "curator",
        "shrunk",
        counter=True,
    ),
    _Number(
        "cdp_disk_journal_bytes", "Redo, undo, index, catalog, reserve", "disk", "journal_bytes"
    ),
    _Number("cdp_disk_journal_limit_bytes", "Their limit; 0 is none", "disk", "journal_limit"),
    _Number("cdp_disk_bookmarks", "Bookmarks kept", "disk", "bookmarks"),
    _Number("cdp_disk_views", "Open views", "disk", "views"),
    _Number("cdp_disk_reads", "Reads answered", "recorder", "reads", counter=True),
    _Number("cdp_disk_read_bytes", "Their bytes", "recorder", "read_bytes", counter=True),
    _Number("cdp_disk_flushes", "Flushes acknowledged", "recorder", "flushes", counter=True),
    _Number("cdp_disk_trims", "Trims acknowledged", "recorder", "trims", counter=True),
    _Number("cdp_disk_written_bytes", "Bytes written", "recorder", "written_bytes", counter=True),
    _Number(
        "cdp_disk_scrub_read_bytes", "Bytes of the journal scrubbed", "scrub", "bytes", counter=True
    ),
    _Number(
        "cdp_disk_scrub_repaired",
        "Damaged places that scrubs repaired",
        "scrub",
        "repaired",
        counter=True,
    ),
    _Number(
        "cdp_disk_throttled_seconds",
        "Time for which writes were held back",
        "recorder",
        "throttled_seconds",
        counter=True,
    ),
    _Number(
        "cdp_disk_held_seconds",
        "How long writes have waited for space in the journal; 0: they do not",
        "disk",
        "held_seconds",
    ),
)


class DisksCollector(Collector):
    """Turns facts into metric families."""

    def __init__(self, facts: HostFacts) -> None:
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        """All families."""
        for number in _NUMBERS:
            yield self._family(number)
        yield self._window_configured()
        yield self._writes()
        yield self._corruptions()
        yield from self._scrubs()
        yield from self._histograms()
        yield from self._ages()
        yield self._restarts()
        yield from self._host()

    def _family(self, number: _Number) -> Metric:
        values = {
            str(facts.disk["name"]): float(getattr(facts, number.source).get(number.key) or 0)
            for facts in self._facts.disks
        }
        return _per_disk(number.name, number.text, values, counter=number.counter)

    def _window_configured(self) -> Metric:
        """Without a sample for a disk whose window is all that fits."""
        configured = {
            str(facts.disk["name"]): float(facts.disk["window_configured"])
            for facts in self._facts.disks
            if facts.disk.get("window_configured") is not None
        }
        return _per_disk("cdp_disk_window_configured_seconds", "Asked for", configured)

    def _writes(self) -> Metric:
        writes = {
            str(facts.disk["name"]): float(facts.recorder.get("writes") or 0)
            + float(facts.recorder.get("zeroes") or 0)
            for facts in self._facts.disks
        }
        return _per_disk("cdp_disk_writes", "Writes and write-zeroes", writes, counter=True)

    def _corruptions(self) -> Metric:
        found = {
            str(facts.disk["name"]): float(facts.curator.get("corruptions") or 0)
            + float(facts.recorder.get("corruptions") or 0)
            for facts in self._facts.disks
        }
        return _per_disk(
            "cdp_disk_corruptions", "Records that do not match their checksum", found, counter=True
        )

    def _scrubs(self) -> Iterator[Metric]:
        """Without samples for what has not been yet, or is not scheduled."""
        samples: dict[str, dict[str, float]] = {}
        for facts in self._facts.disks:
            last = facts.scrub.get("last") or {}
            running = facts.scrub.get("running") or {}
            damaged = sum(int(last.get(key) or 0) for key in ("covered", "repaired"))
            found = {
                "finished": last.get("finished"),
                "lost": last.get("lost"),
                "others": damaged if last else None,
                "next": facts.scrub.get("next"),
                "interval": facts.disk.get("scrub_interval_seconds"),
                "progress": running["done"] / max(running["total"], 1) if running else None,
            }
            for key, value in found.items():
                if value is not None:
                    samples.setdefault(key, {})[str(facts.disk["name"])] = float(value)
        for name, text, key in (
            ("cdp_disk_scrub_last_success_timestamp_seconds", "End of the last scrub", "finished"),
            ("cdp_disk_scrub_lost_places", "Damage found by it that costs content", "lost"),
            ("cdp_disk_scrub_redundant_places", "Damage found by it that costs none", "others"),
            ("cdp_disk_scrub_next_timestamp_seconds", "When the next is scheduled", "next"),
            ("cdp_disk_scrub_interval_seconds", "Asked for with scrub-interval", "interval"),
            ("cdp_disk_scrub_progress_ratio", "Of the scrub that runs", "progress"),
        ):
            yield _per_disk(name, text, samples.get(key, {}))

    def _histograms(self) -> Iterator[Metric]:
        for name, text, key in (
            ("cdp_disk_write_seconds", "From a write's last byte to its reply", "write_buckets"),
            ("cdp_disk_fsync_seconds", "Duration of a sync of the redo log", "fsync_buckets"),
        ):
            family = HistogramMetricFamily(name, text, labels=["disk"])
            for facts in self._facts.disks:
                histogram = facts.recorder.get(key)
                if histogram:
                    buckets = [(str(bound), count) for bound, count in histogram["buckets"]]
                    family.add_metric(
                        [str(facts.disk["name"])],
                        [*buckets, ("+Inf", histogram["count"])],
                        histogram["sum_seconds"],
                    )
            yield family

    def _ages(self) -> Iterator[Metric]:
        pins = {str(each.disk["name"]): each.oldest_pin_seconds for each in self._facts.disks}
        yield _per_disk("cdp_disk_oldest_pin_seconds", "Age of the oldest pin", pins)
        ages = {str(each.disk["name"]): each.status_age_seconds for each in self._facts.disks}
        yield _per_disk("cdp_disk_status_age_seconds", "Age of these values", ages)

    def _restarts(self) -> Metric:
        family = CounterMetricFamily(
            "cdp_disk_child_restarts", "Processes restarted", labels=["disk", "role"]
        )
        for facts in self._facts.disks:
            for role, count in facts.disk.get("restarts", {}).items():
                family.add_metric([str(facts.disk["name"]), role], count)
        return family

    def _host(self) -> Iterator[Metric]:
        errors = CounterMetricFamily(
            "cdp_nbd_protocol_errors", "Requests refused, connections dropped", labels=["kind"]
        )
        for kind, count in sorted(self._facts.protocol_errors.items()):
            errors.add_metric([kind], count)
        yield errors
        yield GaugeMetricFamily("cdp_nbd_connections", "NBD connections", self._facts.connections)
        yield GaugeMetricFamily("cdp_host_disks", "Disks configured", len(self._facts.disks))
        yield GaugeMetricFamily(
            "cdp_host_start_time_seconds", "Start of the supervisor", self._facts.start_time
        )
        build = GaugeMetricFamily("cdp_build_info", "Always 1", labels=["version"])
        build.add_metric([self._facts.version], 1)
        yield build


def _per_disk(
    name: str, text: str, values: Mapping[str, float], *, counter: bool = False
) -> Metric:
    kind = CounterMetricFamily if counter else GaugeMetricFamily
    family = kind(name, text, labels=["disk"])
    for disk, value in values.items():
        family.add_metric([disk], value)
    return family


def render(facts: HostFacts) -> bytes:
    """The answer to a scrape, in the text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(DisksCollector(facts))
    return generate_latest(registry)


def sum_errors(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts by kind, of several processes together."""
    total: dict[str, int] = {}
    for part in parts:
        for kind, count in part.items():
            total[kind] = total.get(kind, 0) + int(count)
    return total
