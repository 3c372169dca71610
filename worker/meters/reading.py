"""Reads how much of everything bounded is used, at a scrape: `worker/meters/resources.py`.

Each is a number that its owner keeps, or one cheap system call: never a scan of instances or rows.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

from handlers.admission.budgets import Capacity
from handlers.interfaces import Host
from worker import descriptors, logs
from worker.bus.nats import NatsBus
from worker.control.connections import Connections
from worker.journal.commands import FINISHED_MAX, REFUSED_MAX
from worker.journal.journal import Journal
from worker.journal.outbox import BACKLOG_ROWS
from worker.journal.records import TOMBSTONES_MAX
from worker.log_writer import QUEUE_LINES
from worker.meters.resources import Bounded
from worker.queries.fair_queue import RUNNING_MAX, WAITING_MAX
from worker.queries.micro import MicroService
from worker.reconcile.launch_quarantine import LaunchQuarantine
from worker.reconcile.sweep import Sweep
from worker.tracing.exporter import QUEUE_SPANS, SpanExporter


@dataclass(frozen=True, slots=True)
class Parts:
    """Of the worker: those that own something bounded."""

    host: Host
    journal: Journal
    bus: NatsBus
    queries: MicroService
    quarantine: LaunchQuarantine
    sweep: Sweep
    exporter: SpanExporter | None


def of_worker(parts: Parts, now: Capacity) -> dict[str, Bounded]:
    """All that the parts of the worker own."""
    return {
        **_of_capacity(parts.host, now),
        **_of_journal(parts.journal),
        **_of_bus(parts.bus, parts.queries),
        **of_process(),
        "trace_spans": Bounded(
            0 if parts.exporter is None else parts.exporter.waiting, QUEUE_SPANS
        ),
        "failed_launches": Bounded(parts.quarantine.failures, parts.quarantine.after),
        "removals_of_hour": Bounded(parts.sweep.spent, parts.host.settings.sweep.per_hour),
    }


def _of_capacity(host: Host, now: Capacity) -> dict[str, Bounded]:
    """The uids of idle VMMs count as used."""
    limits = host.settings.limits
    used_bytes, size_bytes = host.disk.usage_bytes()
    return {
        "vcpus": Bounded(now.vcpus_used, now.vcpus),
        "memory_bytes": Bounded(now.mem_used_mib << 20, now.mem_mib << 20),
        "uids": Bounded(now.uids_used + now.uids_warm, now.uids),
        "addresses": Bounded(now.addresses_used, now.addresses),
        "warm_vmms": Bounded(now.uids_warm, host.settings.vmm.warm_pool),
        "disk_bytes": Bounded(used_bytes, max(0, size_bytes - (limits.disk_reserve_mib << 20))),
        "disk_watermark_bytes": Bounded(used_bytes, size_bytes * limits.disk_high_percent / 100),
        **{
            f"slots_{kind}": Bounded(found.held, found.count)
            for kind, found in host.slots.counts().items()
        },
    }


def _of_journal(journal: Journal) -> dict[str, Bounded]:
    commands, limits = journal.commands, journal.commands.limits
    lane, tenant = commands.fullest()
    found = {
        "commands_of_host": Bounded(commands.count(), limits.host_depth),
        "commands_of_fullest_tenant": Bounded(tenant, limits.tenant_depth),
        "commands_of_fullest_lane": Bounded(lane, limits.lane_depth),
        "instances_destroyed": Bounded(journal.records.tombstone_count(), TOMBSTONES_MAX),
        "outbox_rows": Bounded(journal.outbox.depth, BACKLOG_ROWS),
    }
    if commands.kept is not None:
        finished, refused = commands.kept
        found["commands_finished"] = Bounded(finished, FINISHED_MAX)
        found["commands_refused"] = Bounded(refused, REFUSED_MAX)
    return found


def _of_bus(bus: NatsBus, queries: MicroService) -> dict[str, Bounded]:
    """What only the server knows is as of its last report: 10 s for the consumer, 60 s else."""
    found = {
        "queries_running": Bounded(queries.running, RUNNING_MAX),
        "queries_waiting": Bounded(queries.waiting, WAITING_MAX),
    }
    if bus.ack_window.limit > 0:
        found["commands_unacknowledged"] = Bounded(bus.ack_window.unacked, bus.ack_window.limit)
    for kind, (used_bytes, limit_bytes) in bus.stream_sizes.items():
        if limit_bytes > 0:
            found[f"stream_{kind}_bytes"] = Bounded(used_bytes, limit_bytes)
    return found


def of_process() -> dict[str, Bounded]:
    """Open descriptors, and what waits to be logged."""
    return {
        "descriptors": Bounded(*descriptors.in_use()),
        "log_lines": Bounded(logs.waiting(), QUEUE_LINES),
    }


def of_threads(counts: Mapping[str, tuple[int, int]]) -> dict[str, Bounded]:
    """Of all kinds together: those in a call, hung ones included, and how many there may be."""
    return {
        "threads": Bounded(
            sum(used for used, _ in counts.values()), sum(limit for _, limit in counts.values())
        )
    }


def of_connections(servers: Mapping[str, tuple[Connections, int]]) -> dict[str, Bounded]:
    """By server, each with its most."""
    return {
        f"connections_{name}": Bounded(each.count, most) for name, (each, most) in servers.items()
    }


def journal_bytes(path: str) -> int:
    """The database, its log and its index."""
    size = 0
    for each in (path, f"{path}-wal", f"{path}-shm"):
        with contextlib.suppress(OSError):
            size += os.stat(each).st_size
    return size
