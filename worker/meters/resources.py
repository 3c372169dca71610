"""Everything of this host that can be used up: how much of it is used, and the limit.

One pair of gauges for all, `hostd_capacity_used` and `hostd_capacity_limit`, with the label
`resource`; so one query and one alert hold for each of them. `RESOURCES` is the list: what is read
(`worker/meters/reading.py`) has exactly these names, so the number of series is fixed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Gauge

# By resource: the settings that set its limit, or what of it is left; none: a constant of hostd, of
# the kernel or of NATS.
RESOURCES: Final[Mapping[str, tuple[str, ...]]] = {
    "vcpus": ("limits.cpu_reserve", "limits.vcpu_overcommit"),
    "memory_bytes": ("limits.mem_reserve_mib", "limits.vmm_overhead_mib"),
    "uids": ("vmm.uid_count",),
    "addresses": (),
    "warm_vmms": ("vmm.warm_pool",),
    "disk_bytes": ("limits.disk_reserve_mib",),
    "disk_watermark_bytes": ("limits.disk_high_percent",),
    "slots_imports": ("limits.imports",),
    "slots_boots": ("limits.boots",),
    "slots_restores": ("limits.restores",),
    "slots_snapshots": ("limits.snapshots",),
    "slots_networks": ("limits.networks",),
    "slots_wipes": (),
    "failed_launches": ("limits.quarantine_after",),
    "removals_of_hour": ("sweep.per_hour",),
    "commands_of_host": ("limits.host_depth",),
    "commands_of_fullest_tenant": ("limits.tenant_depth",),
    "commands_of_fullest_lane": ("limits.lane_depth",),
    "commands_finished": (),
    "commands_refused": (),
    "instances_destroyed": (),
    "outbox_rows": (),
    "commands_unacknowledged": (),
    "stream_commands_bytes": (),
    "stream_events_bytes": (),
    "stream_replies_bytes": (),
    "stream_dead_bytes": (),
    "stream_state_bytes": (),
    "queries_running": (),
    "queries_waiting": (),
    "connections_metrics": (),
    "connections_control": (),
    "descriptors": (),
    "threads": (),
    "log_lines": (),
    "trace_spans": (),
}


@dataclass(frozen=True, slots=True)
class Bounded:
    """`used` may be above `limit` for a while, e.g. where a limit was lowered."""

    used: float
    limit: float


class ResourceMeters:
    """No method blocks, awaits or raises."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._limit = Gauge(
            "hostd_capacity_limit",
            "The bound of everything that can be used up, by resource.",
            ["resource"],
            registry=registry,
        )
        self._used = Gauge(
            "hostd_capacity_used",
            "What of it is used, by resource.",
            ["resource"],
            registry=registry,
        )
        self._journal_bytes = Gauge(
            "hostd_journal_bytes", "Size of the journal's files.", registry=registry
        )
        self._pending = Gauge(
            "hostd_bus_pending_commands",
            "Commands in the stream that were not delivered to this host yet.",
            registry=registry,
        )

    def bounded(self, found: Mapping[str, Bounded]) -> None:
        """By a name of `RESOURCES`; what is not known yet is left out, and has no series."""
        for resource, each in found.items():
            if resource in RESOURCES:
                self._limit.labels(resource).set(each.limit)
                self._used.labels(resource).set(each.used)

    def journal_bytes(self, size_bytes: int) -> None:
        self._journal_bytes.set(size_bytes)

    def pending_commands(self, count: int) -> None:
        self._pending.set(count)
