"""What instances have used: the counters of the VMM that runs, and what ended. Changes nothing.

CPU and memory are of the VMM's cgroup: its own threads and its jailer included, not the kernel's
vhost work of others. Traffic is that of its TAP, from the guest's point of view.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterable
from functools import reduce
from typing import Final

from msgspec.structs import asdict, replace

from handlers.errors import Failure
from handlers.instance.metering import TRAFFIC, allotted, current_span, with_traffic
from handlers.interfaces import Host
from schemas.records import InstanceRecord
from schemas.usage import (
    Counters,
    CurrentUsage,
    InstanceUsage,
    Metering,
    Span,
    State,
    TenantUsage,
    Totals,
    VmmUsage,
    bounded,
)

OF_VMMS: Final = ("vcpu_ms", "memory_mib_s", "cpu_us", "memory_bytes", *TRAFFIC)
CHOSEN: Final = ("from_ms", "memory_peak_bytes")
ReadUsage = Callable[[InstanceRecord], Awaitable[InstanceUsage]]


async def usage_of(host: Host, record: InstanceRecord) -> InstanceUsage:
    """Raises HostFault, Unavailable: the kernel did not say."""
    now = host.facts.moment()
    span = current_span(record, now)
    metering = record.metering or Metering()
    return InstanceUsage(
        tenant_id=record.ref.tenant_id,
        pool_id=record.ref.pool_id,
        instance_id=record.ref.instance_id,
        status=str(record.status),
        since_ms=record.since_ms,
        launch=record.launch,
        vcpus=record.vcpus,
        mem_mib=record.mem_mib,
        at_ms=now.wall_ms,
        vmm=await _vmm(host, record, span) if record.holds_host else None,
        span=span,
        snapshot=metering.snapshot,
        totals=metering.totals,
    )


async def _vmm(host: Host, record: InstanceRecord, span: Span | None) -> VmmUsage | None:
    """None if it has none: it ended, or its launch is not that far."""
    used = await host.cgroups.usage(record.cgroup_key)
    if used is None:
        return None
    counters = await with_traffic(Counters(cpu_us=bounded(used.cpu_us)), record, host)
    running = span is not None and span.state is State.RUNNING
    duration_ms = span.duration_ms if span is not None and running else None
    return VmmUsage(
        duration_ms=duration_ms,
        memory_bytes=used.memory_bytes,
        **asdict(replace(counters, memory_peak_bytes=used.memory_peak_bytes)),
        **allotted(record, duration_ms),
    )


async def usage_of_tenant(
    tenant_id: str, records: Iterable[InstanceRecord], usage: ReadUsage, at_ms: int
) -> TenantUsage:
    """The sums; one whose counters the kernel does not give is incomplete."""
    current, totals, count = CurrentUsage(), Totals(), 0
    for record in records:
        count += 1
        found = None
        with contextlib.suppress(Failure):
            found = await usage(record)
        current = _added(current, found)
        totals = total((totals, (record.metering or Metering()).totals))
    return TenantUsage(
        tenant_id=tenant_id, at_ms=at_ms, instances=count, current=current, totals=totals
    )


def _added(sums: CurrentUsage, found: InstanceUsage | None) -> CurrentUsage:
    span = found.span if found is not None else None
    if found is None or span is None:
        return replace(sums, incomplete=sums.incomplete + 1)
    vmm, snapshot = found.vmm, found.snapshot
    lacks = span.duration_ms is None
    lacks |= span.state is State.SLEEPING and snapshot is None
    lacks |= span.state is State.RUNNING and vmm is None
    lacks |= vmm is not None and None in {getattr(vmm, name) for name in ("cpu_us", *TRAFFIC)}
    more = {
        str(span.state): 1,
        f"{span.state}_ms": span.duration_ms or 0,
        "incomplete": 1 if lacks else 0,
        **{name: getattr(vmm, name) or 0 for name in OF_VMMS if vmm is not None},
    }
    if snapshot is not None:
        more["snapshot_size_bytes"] = snapshot.size_bytes
        more["snapshot_allocated_bytes"] = snapshot.allocated_bytes
    return replace(
        sums, **{name: bounded(getattr(sums, name) + each) for name, each in more.items()}
    )


def total(each: Iterable[Totals]) -> Totals:
    """The sum; `from_ms` is the first, the peak the largest of one instance."""
    return reduce(_sum, each)


def _sum(one: Totals, other: Totals) -> Totals:
    def known(name: str) -> list[int]:
        return [each for each in (getattr(one, name), getattr(other, name)) if each is not None]

    summed = (name for name in Totals.__struct_fields__ if name not in CHOSEN)
    return Totals(
        from_ms=min(known("from_ms"), default=None),
        memory_peak_bytes=max(known("memory_peak_bytes"), default=None),
        **{name: bounded(getattr(one, name) + getattr(other, name)) for name in summed},
    )
