"""The worker's metrics: one registry per worker, one small method per fact.

Never a tenant, pool or instance as a label: the number of series must not grow with tenants. Names
and labels are a contract (docs/operations.md lists them); `promtool check metrics` runs in a test.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from handlers.admission.budgets import Capacity
from handlers.concurrency import SlotCounts
from handlers.specs import VersionState
from schemas.codes import Code
from schemas.records import Status
from worker.reconcile.meters import OrphanMeters, VmmMeters

LAG_INTERVAL_S: Final = 0.5
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG = (*_FAST, 30.0, 60.0, 300.0)
_BYTES = tuple(float(2**exponent) for exponent in range(20, 37, 2))


class _Total:
    """A counter whose total another part keeps; `set` follows it."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._counter = Counter(name, text, registry=registry)
        self._last = 0

    def set(self, total: int) -> None:
        self._counter.inc(max(0, total - self._last))
        self._last = total


class Metrics:
    """All metrics of one worker. No method blocks, awaits or raises."""

    def __init__(self, version: str) -> None:  # noqa: PLR0915 - one line each
        # `_created` series double a counter's cost and fail promtool's naming rules
        disable_created_metrics()  # type: ignore[no-untyped-call] # its module has no hints
        registry = self.registry = CollectorRegistry()
        self._collect: Callable[[], None] = lambda: None
        self._done: dict[tuple[str, Code], tuple[Counter, Histogram]] = {}
        self._steps: dict[str, Histogram] = {}
        self._commands = Counter(
            "hostd_commands_total",
            "Finished commands, by type and result code.",
            ["type", "code"],
            registry=registry,
        )
        self._command_seconds = Histogram(
            "hostd_command_duration_seconds",
            "Time from receipt of a command to its outcome, including the wait in its lane.",
            ["type"],
            buckets=_LONG,
            registry=registry,
        )
        self._step_seconds = Histogram(
            "hostd_step_duration_seconds",
            "Duration of one step of a command.",
            ["step"],
            buckets=_FAST,
            registry=registry,
        )
        self._retries = Counter(
            "hostd_retries_total",
            "Attempts after the first of a command, by type and code of the failure.",
            ["type", "code"],
            registry=registry,
        )
        self._lanes = Gauge("hostd_lanes", "Lanes, by state.", ["state"], registry=registry)
        self._unfinished = Gauge(
            "hostd_commands_unfinished",
            "Commands in the journal without an outcome.",
            registry=registry,
        )
        self._commit_seconds = Histogram(
            "hostd_journal_commit_seconds",
            "Duration of one commit of the journal.",
            buckets=_FAST,
            registry=registry,
        )
        self._outbox_held = Gauge(
            "hostd_outbox_held_rows",
            "Rows that NATS does not accept as they are; held until the next connection.",
            registry=registry,
        )
        self._outbox = Gauge(
            "hostd_outbox_rows", "Replies, events and state rows not yet sent.", registry=registry
        )
        self._connected = Gauge(
            "hostd_bus_connected", "1 while the bus is connected, else 0.", registry=registry
        )
        self._reconnects = _Total("hostd_bus_reconnects_total", "Reconnects to NATS.", registry)
        self._permission_errors = _Total(
            "hostd_bus_permission_errors_total",
            "Publications and subscriptions that the NATS server denied.",
            registry,
        )
        self._pulls = _Total(
            "hostd_bus_pulls_total", "Pull requests sent to the command consumer.", registry
        )
        self._taken_msg_ids = _Total(
            "hostd_bus_taken_msg_ids_total",
            "Publications that the server took for copies of another sender's message.",
            registry,
        )
        self._redeliveries = Counter(
            "hostd_redeliveries_total",
            "Command messages that NATS delivered more than once.",
            registry=registry,
        )
        self._queries_dropped = _Total(
            "hostd_queries_dropped_total",
            "Queries not answered: too many at once, or an invalid reply subject.",
            registry,
        )
        self._ignored_keys = Counter(
            "hostd_envelope_keys_ignored_total",
            "Unknown keys of command envelopes, ignored.",
            registry=registry,
        )
        self._instances = Gauge(
            "hostd_instances", "Instances on this host, by status.", ["status"], registry=registry
        )
        self._warm = Gauge(
            "hostd_warm_vmms",
            "Idle VMMs launched ahead, by state.",
            ["state"],
            registry=registry,
        )
        self._warm_ends = Counter(
            "hostd_warm_vmm_ends_total",
            "VMMs that left the warm pool, by result.",
            ["result"],
            registry=registry,
        )
        self._warm_ended: dict[str, int] = {}
        self.orphan_counts: Mapping[str, int] = {}
        self.vmms = VmmMeters(registry)
        self._snapshot_seconds = Histogram(
            "hostd_snapshot_duration_seconds",
            "Duration of writing one snapshot.",
            buckets=_LONG,
            registry=registry,
        )
        self._snapshot_bytes = Histogram(
            "hostd_snapshot_bytes",
            "Size of one snapshot, state and memory.",
            buckets=_BYTES,
            registry=registry,
        )
        self._network_warnings = Gauge(
            "hostd_network_warnings",
            "Facts outside of hostd that keep guests from the network: see the network event.",
            registry=registry,
        )
        self._orphans = OrphanMeters(registry)
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
        self._limit = Gauge(
            "hostd_capacity_limit",
            "What the host admits in all, by resource: vcpus, memory_bytes, uids, addresses.",
            ["resource"],
            registry=registry,
        )
        self._used = Gauge(
            "hostd_capacity_used",
            "What of it is allocated, by resource.",
            ["resource"],
            registry=registry,
        )
        self._slots = Gauge(
            "hostd_slots", "Slots for heavy work, by kind.", ["kind"], registry=registry
        )
        self._slots_used = Gauge(
            "hostd_slots_used", "Slots that commands hold, by kind.", ["kind"], registry=registry
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
        self._copied = _Total(
            "hostd_artifact_copied_bytes_total",
            "Bytes that imports of artifacts have copied.",
            registry,
        )
        self._log_dropped = _Total(
            "hostd_log_dropped_total",
            "Log lines that could not be written or repeat too often.",
            registry,
        )
        self._quarantined = Gauge(
            "hostd_quarantined_rows",
            "Rows of the journal that this version cannot read, by table.",
            ["table"],
            registry=registry,
        )
        self._hung = Gauge(
            "hostd_hung_calls",
            "Calls into the kernel that were abandoned and have not returned, by kind of thread.",
            ["kind"],
            registry=registry,
        )
        self._abandoned = Counter(
            "hostd_abandoned_calls_total",
            "Calls into the kernel that did not return in their time, by kind of thread.",
            ["kind"],
            registry=registry,
        )
        self._abandoned_before: dict[str, int] = {}
        self._lag = Histogram(
            "hostd_loop_lag_seconds",
            "How late the event loop ran a timer.",
            buckets=_FAST,
            registry=registry,
        )
        self._draining = Gauge(
            "hostd_draining",
            "1 while the host is drained and takes no new VMs, else 0.",
            registry=registry,
        )
        self._enforced = Gauge(
            "hostd_limits_enforced",
            "1 if cgroup limits are enforced, 0 on a developer's host.",
            registry=registry,
        )
        build = Gauge("hostd_build_info", "Always 1.", ["version"], registry=registry)
        build.labels(version).set(1)
        self.lanes(busy=0, waiting=0)
        self.instances({})

    def on_collect(self, collect: Callable[[], None]) -> None:
        """Call `collect` before each scrape, to set gauges and totals; it must be fast."""
        self._collect = collect

    def render(self) -> bytes:
        """The metrics in the text exposition format, with current gauges."""
        self._collect()
        return generate_latest(self.registry)

    def finished(self) -> Mapping[str, int]:
        """How many commands finished since the worker started: `ok` and `failed`."""
        counts = {"ok": 0, "failed": 0}
        for (_, code), (counter, _) in self._done.items():
            total = sum(sample.value for family in counter.collect() for sample in family.samples)
            counts["ok" if code is Code.OK else "failed"] += int(total)
        return counts

    # -- events --------------------------------------------------------------------------------

    def command_done(self, kind: str, code: Code, seconds: float) -> None:
        """A command of this type finished, `seconds` after it was received."""
        done = self._done.get((kind, code))
        if done is None:  # labels() costs three times what it counts: once per series
            done = self._commands.labels(kind, code.value), self._command_seconds.labels(kind)
            self._done[kind, code] = done
        done[0].inc()
        done[1].observe(seconds)

    def step(self, name: str, seconds: float) -> None:
        series = self._steps.get(name)
        if series is None:
            series = self._steps[name] = self._step_seconds.labels(name)
        series.observe(seconds)

    def retry(self, kind: str, code: Code) -> None:
        self._retries.labels(kind, code.value).inc()

    def commit(self, seconds: float) -> None:
        self._commit_seconds.observe(seconds)

    def redelivered(self) -> None:
        self._redeliveries.inc()

    def keys_ignored(self, count: int) -> None:
        """A command envelope had this many unknown keys: a newer sender, or a misspelt key."""
        self._ignored_keys.inc(count)

    def snapshot(self, seconds: float, size_bytes: int) -> None:
        self._snapshot_seconds.observe(seconds)
        self._snapshot_bytes.observe(size_bytes)

    def loop_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)

    # -- state ---------------------------------------------------------------------------------

    def lanes(self, *, busy: int, waiting: int) -> None:
        """Lanes with a running command, and lanes with waiting commands."""
        self._lanes.labels("busy").set(busy)
        self._lanes.labels("waiting").set(waiting)

    def unfinished(self, count: int) -> None:
        self._unfinished.set(count)

    def outbox_rows(self, count: int, *, held: int) -> None:
        self._outbox.set(count)
        self._outbox_held.set(held)

    def bus_connected(self, connected: bool) -> None:
        self._connected.set(int(connected))

    def bus_totals(
        self, *, reconnects: int, permission_errors: int, pulls: int, taken_msg_ids: int
    ) -> None:
        """Totals since the worker started."""
        self._reconnects.set(reconnects)
        self._permission_errors.set(permission_errors)
        self._pulls.set(pulls)
        self._taken_msg_ids.set(taken_msg_ids)

    def queries_dropped(self, total: int) -> None:
        self._queries_dropped.set(total)

    def disk(self, free_bytes: int, *, low: bool, high: bool) -> None:
        """`low`: the ballast is released; `high`: above the high watermark."""
        self._disk_free.set(free_bytes)
        self._disk_full.set(int(low))
        self._disk_high.set(int(high))

    def capacity(self, now: Capacity) -> None:
        """The uids of idle VMMs count as used."""
        self._disk_claimed.set(now.disk_claimed_bytes)
        for resource, limit, used in (
            ("vcpus", now.vcpus, now.vcpus_used),
            ("memory_bytes", now.mem_mib << 20, now.mem_used_mib << 20),
            ("uids", now.uids, now.uids_used + now.uids_warm),
            ("addresses", now.addresses, now.addresses_used),
        ):
            self._limit.labels(resource).set(limit)
            self._used.labels(resource).set(used)

    def slots(self, counts: Mapping[str, SlotCounts]) -> None:
        for kind, found in counts.items():
            self._slots.labels(kind).set(found.count)
            self._slots_used.labels(kind).set(found.held)
            self._slots_waiting.labels(kind).set(found.waiting)

    def artifact_copied_bytes(self, total: int) -> None:
        """Of all imports since the worker started, running ones included."""
        self._copied.set(total)

    def log_dropped(self, total: int) -> None:
        self._log_dropped.set(total)

    def limits_enforced(self, enforced: bool) -> None:
        self._enforced.set(int(enforced))

    def draining(self, draining: bool) -> None:
        self._draining.set(int(draining))

    def instances(self, counts: Mapping[Status, int]) -> None:
        """A status that is not in `counts` is set to 0."""
        for status in Status:
            if status is not Status.DESTROYED:
                self._instances.labels(status.value).set(counts.get(status, 0))

    def warm_vmms(self, counts: Mapping[str, int], ends: Mapping[str, int]) -> None:
        """`counts` by state; `ends`: totals since the worker started, by result."""
        for state, count in counts.items():
            self._warm.labels(state).set(count)
        for result, total in ends.items():
            self._warm_ends.labels(result).inc(total - self._warm_ended.get(result, 0))
            self._warm_ended[result] = total

    def quarantined(self, counts: Mapping[str, int]) -> None:
        """By table; one that is left out has no series."""
        self._quarantined.clear()
        for table, count in counts.items():
            self._quarantined.labels(table).set(count)

    def calls(self, hung: Mapping[str, int], abandoned: Mapping[str, int]) -> None:
        """By kind of thread: those that hang now; totals of all that were abandoned."""
        for kind, count in hung.items():
            self._hung.labels(kind).set(count)
        for kind, total in abandoned.items():
            self._abandoned.labels(kind).inc(total - self._abandoned_before.get(kind, 0))
            self._abandoned_before[kind] = total

    def vmm_versions(self, states: Sequence[VersionState]) -> None:
        """Versions of Firecracker: a gone one has no series any more."""
        self._vmm_versions.clear()
        for each in states:
            self._vmm_versions.labels(each.version, "running").set(each.running)
            self._vmm_versions.labels(each.version, "sleeping").set(each.sleeping)
        self._vmm_trouble.set(sum(each.in_trouble for each in states))

    def network_warnings(self, count: int) -> None:
        self._network_warnings.set(count)

    def orphan_swept(self, kind: str, result: str) -> None:
        self._orphans.swept.labels(kind, result).inc()

    def sweep_stopped(self, *, stopped: bool) -> None:
        self._orphans.stopped.set(stopped)

    def unrecorded_vmms(self, count: int) -> None:
        self._orphans.unrecorded.set(count)

    def orphans(self, counts: Mapping[str, int]) -> None:
        """By kind of the inventory; a kind that is left out has no series."""
        self.orphan_counts = counts
        self._orphans.found.clear()
        for kind, count in counts.items():
            self._orphans.found.labels(kind).set(count)


async def sample_loop_lag(metrics: Metrics, interval_s: float = LAG_INTERVAL_S) -> None:
    """Until cancelled: measure how late the loop wakes this task."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval_s
        await asyncio.sleep(interval_s)
        metrics.loop_lag(max(0.0, loop.time() - due))
