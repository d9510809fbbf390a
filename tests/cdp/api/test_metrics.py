"""What a scrape gets."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from cdp.api.metrics import DiskFacts, HostFacts, render, sum_errors

HISTOGRAM = {"buckets": [[0.001, 2], [0.01, 5]], "count": 6, "sum_seconds": 0.25}
NAMES = [
    "cdp_disk_journal_lag_seconds",
    "cdp_disk_journal_lag_bytes",
    "cdp_disk_apply_lag_bytes",
    "cdp_disk_apply_lag_seconds",
    "cdp_disk_index_lag_records",
    "cdp_disk_window_seconds",
    "cdp_disk_window_configured_seconds",
    "cdp_disk_window_shrunk_total",
    "cdp_disk_journal_bytes",
    "cdp_disk_journal_limit_bytes",
    "cdp_disk_durable_seq",
    "cdp_disk_applied_seq",
    "cdp_disk_read_bytes_total",
    "cdp_disk_written_bytes_total",
    "cdp_disk_reads_total",
    "cdp_disk_writes_total",
    "cdp_disk_flushes_total",
    "cdp_disk_trims_total",
    "cdp_disk_fsync_seconds",
    "cdp_disk_write_seconds",
    "cdp_disk_connections",
    "cdp_disk_poisoned",
    "cdp_disk_degraded",
    "cdp_disk_served",
    "cdp_disk_throttled_seconds_total",
    "cdp_disk_held_seconds",
    "cdp_disk_bookmarks",
    "cdp_disk_views",
    "cdp_disk_oldest_pin_seconds",
    "cdp_disk_corruptions_total",
    "cdp_disk_child_restarts_total",
    "cdp_disk_scrub_interval_seconds",
    "cdp_disk_scrub_last_success_timestamp_seconds",
    "cdp_disk_scrub_lost_places",
    "cdp_disk_scrub_next_timestamp_seconds",
    "cdp_disk_scrub_progress_ratio",
    "cdp_disk_scrub_read_bytes_total",
    "cdp_disk_scrub_redundant_places",
    "cdp_disk_scrub_repaired_total",
    "cdp_disk_status_age_seconds",
    "cdp_nbd_protocol_errors_total",
    "cdp_nbd_connections",
    "cdp_host_disks",
    "cdp_host_start_time_seconds",
    "cdp_build_info",
]


def facts() -> HostFacts:
    disk = {
        "name": "disk0",
        "served": True,
        "lag_seconds": 0.5,
        "window_configured": 3600.0,
        "restarts": {"recorder": 2, "curator": 0, "viewer": 0},
        "scrub_interval_seconds": 604800.0,
        "scrub": {
            "running": {"started": 1.0, "done": 1, "total": 4, "damaged": 0},
            "last": {"finished": 1e9, "lost": 2, "covered": 1, "repaired": 3},
            "next": 2e9,
            "bytes": 77,
            "repaired": 4,
        },
    }
    recorder = {
        "writes": 10,
        "zeroes": 3,
        "corruptions": 1,
        "write_buckets": HISTOGRAM,
        "fsync_buckets": HISTOGRAM,
    }
    return HostFacts(
        "1.2.3",
        1000.5,
        4,
        {"timeout": 2},
        [DiskFacts(disk, recorder, {"shrunk": 5, "corruptions": 2}, 60.0, 0.1)],
    )


def samples(given: HostFacts) -> dict[str, float]:
    """Sample names with their labels -> values."""
    found = {}
    for family in text_string_to_metric_families(render(given).decode()):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_all_metrics_are_there() -> None:
    exported = {name.partition("{")[0] for name in samples(facts())}
    stems = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")
             for name in exported}  # fmt: skip
    assert set(NAMES) == stems


def test_values() -> None:
    found = samples(facts())
    assert found["cdp_disk_served{disk=disk0}"] == 1
    assert found["cdp_disk_journal_lag_seconds{disk=disk0}"] == 0.5
    assert found["cdp_disk_writes_total{disk=disk0}"] == 13
    assert found["cdp_disk_corruptions_total{disk=disk0}"] == 3
    assert found["cdp_disk_window_shrunk_total{disk=disk0}"] == 5
    assert found["cdp_disk_scrub_lost_places{disk=disk0}"] == 2
    assert found["cdp_disk_scrub_redundant_places{disk=disk0}"] == 4
    assert found["cdp_disk_scrub_progress_ratio{disk=disk0}"] == 0.25
    assert found["cdp_disk_scrub_last_success_timestamp_seconds{disk=disk0}"] == 1e9
    assert found["cdp_disk_child_restarts_total{disk=disk0,role=recorder}"] == 2
    assert found["cdp_disk_write_seconds_bucket{disk=disk0,le=0.01}"] == 5
    assert found["cdp_disk_write_seconds_bucket{disk=disk0,le=+Inf}"] == 6
    assert found["cdp_disk_fsync_seconds_sum{disk=disk0}"] == 0.25
    assert found["cdp_nbd_protocol_errors_total{kind=timeout}"] == 2
    assert found["cdp_build_info{version=1.2.3}"] == 1
    assert found["cdp_host_disks{}"] == 1


def test_a_disk_that_said_nothing_yet_is_there_with_zeroes() -> None:
    silent = HostFacts("1", 0.0, 0, {}, [DiskFacts({"name": "new", "window_configured": None})])
    found = samples(silent)
    assert found["cdp_disk_served{disk=new}"] == 0
    assert found["cdp_disk_writes_total{disk=new}"] == 0
    assert not [name for name in found if name.startswith("cdp_disk_window_configured")]
    assert not [name for name in found if name.startswith("cdp_disk_write_seconds")]


def test_a_host_without_disks() -> None:
    assert samples(HostFacts("1", 0.0, 0, {}, []))["cdp_host_disks{}"] == 0


def test_errors_of_several_processes_are_summed() -> None:
    assert sum_errors([{"a": 1}, {"a": 2, "b": 3}, {}]) == {"a": 3, "b": 3}
