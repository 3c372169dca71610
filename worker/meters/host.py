"""What is counted of the host and of the worker's process: instances, disk, versions, threads.

Part of the worker's metrics (`worker/metrics.py`), whose rules hold here too.
"""

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Gauge, Histogram

from handlers.concurrency import SlotCounts
from handlers.specs import VersionState
from schemas.records import Status
from worker.meters.kinds import FAST, Total, Totals


class HostMeters:
    """No method blocks, awaits or raises."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._instances = Gauge(
            "hostd_instances", "Instances on this host, by status.", ["status"], registry=registry
        )
        self._warm = Gauge(
            "hostd_warm_vmms",
            "Idle VMMs launched ahead, by state.",
            ["state"],
            registry=registry,
        )
        self._warm_ends = Totals(
            "hostd_warm_vmm_ends_total",
            "VMMs that left the warm pool, by result.",
            "result",
            registry,
        )
        self._network_warnings = Gauge(
            "hostd_network_warnings",
            "Facts outside of hostd that keep guests from the network: see the network event.",
            registry=registry,
        )
        self._disk_free = Gauge(
            "hostd_disk_free_bytes",
            "Free space on the file system of the state directory, the ballast included.",
            registry=registry,
        )
        self._disk_full = Gauge(
            "hostd_disk_full",
            "1 while the ballast is released because the file system was full, else 0.",
            registry=registry,
        )
        self._disk_high = Gauge(
            "hostd_disk_above_watermark",
            "1 from the disk's high watermark until its low one, else 0.",
            registry=registry,
        )
        self._disk_claimed = Gauge(
            "hostd_disk_claimed_bytes",
            "Disk space that is admitted and not made yet.",
            registry=registry,
        )
        self._slots_waiting = Gauge(
            "hostd_slots_waiting",
            "Commands that wait for a slot, by kind.",
            ["kind"],
            registry=registry,
        )
        self._vmm_versions = Gauge(
            "hostd_vmm_versions",
            "Instances by version of Firecracker and whether they run or sleep.",
            ["version", "state"],
            registry=registry,
        )
        self._vmm_trouble = Gauge(
            "hostd_vmm_versions_in_trouble",
            "Versions of Firecracker that are in use and were removed, are missing or changed.",
            registry=registry,
        )
        self._copied = Total(
            "hostd_artifact_copied_bytes_total",
            "Bytes that imports of artifacts have copied.",
            registry,
        )
        self._hung = Gauge(
            "hostd_hung_calls",
            "Calls into the kernel that were abandoned and have not returned, by kind of thread.",
            ["kind"],
            registry=registry,
        )
        self._abandoned = Totals(
            "hostd_abandoned_calls_total",
            "Calls into the kernel that did not return in their time, by kind of thread.",
            "kind",
            registry,
        )
        self._lag = Histogram(
            "hostd_loop_lag_seconds",
            "How late the event loop ran a timer.",
            buckets=FAST,
            registry=registry,
        )
        self._draining = Gauge(
            "hostd_draining",
            "1 while the host is drained and takes no new VMs, else 0.",
            registry=registry,
        )
        self._ready = Gauge(
            "hostd_ready",
            "1 while the check of /readyz holds, else 0; ready is a worker with no 0.",
            ["check"],
            registry=registry,
        )
        self._enforced = Gauge(
            "hostd_limits_enforced",
            "1 if cgroup limits are enforced, 0 on a developer's host.",
            registry=registry,
        )

    def loop_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)

    def disk(self, free_bytes: int, *, low: bool, high: bool) -> None:
        """`low`: the ballast is released; `high`: above the high watermark."""
        self._disk_free.set(free_bytes)
        self._disk_full.set(int(low))
        self._disk_high.set(int(high))

    def artifact_copied_bytes(self, total: int) -> None:
        """Of all imports since the worker started, running ones included."""
        self._copied.set(total)

    def limits_enforced(self, enforced: bool) -> None:
        self._enforced.set(int(enforced))

    def draining(self, draining: bool) -> None:
        self._draining.set(int(draining))

    def ready(self, checks: Mapping[str, bool]) -> None:
        """The checks of `/readyz`, by name."""
        for name, holds in checks.items():
            self._ready.labels(name).set(int(holds))

    def instances(self, counts: Mapping[Status, int]) -> None:
        """A status that is not in `counts` is set to 0."""
        for status in Status:
            if status is not Status.DESTROYED:
                self._instances.labels(status.value).set(counts.get(status, 0))

    def warm_vmms(self, counts: Mapping[str, int], ends: Mapping[str, int]) -> None:
        """`counts` by state; `ends`: totals since the worker started, by result."""
        for state, count in counts.items():
            self._warm.labels(state).set(count)
        self._warm_ends.set(ends)

    def calls(self, hung: Mapping[str, int], abandoned: Mapping[str, int]) -> None:
        """By kind of thread: those that hang now; totals of all that were abandoned."""
        for kind, count in hung.items():
            self._hung.labels(kind).set(count)
        self._abandoned.set(abandoned)

    def vmm_versions(self, states: Sequence[VersionState]) -> None:
        """Versions of Firecracker: a gone one has no series any more."""
        self._vmm_versions.clear()
        for each in states:
            self._vmm_versions.labels(each.version, "running").set(each.running)
            self._vmm_versions.labels(each.version, "sleeping").set(each.sleeping)
        self._vmm_trouble.set(sum(each.in_trouble for each in states))

    def disk_claimed(self, size_bytes: int) -> None:
        self._disk_claimed.set(size_bytes)

    def slots_waiting(self, counts: Mapping[str, SlotCounts]) -> None:
        for kind, found in counts.items():
            self._slots_waiting.labels(kind).set(found.waiting)

    def network_warnings(self, count: int) -> None:
        self._network_warnings.set(count)
