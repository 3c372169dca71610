"""What an instance used: counted once, with the commit of the change of state that ends a span.

The time of an instance is a row of spans without gaps: a launch, from the commit of its VMM's
identity until hostd has seen the VMM end, and the rests between, asleep or stopped. A command that
fails puts the record of before back, and with it the span that it was in, so an undone launch is in
no sum. The last counters of a VMM are committed before its cgroup and TAP go, and become a span of
`due`, with the totals, in the record that completes the command: the journal publishes `due` in the
commit of that record, and no record that is read again has one (ADR 1088).
"""

import contextlib
from typing import Final

from msgspec.structs import asdict, replace

from handlers.errors import Failure
from handlers.interfaces import Host
from schemas import naming
from schemas.records import InstanceRecord, Status
from schemas.usage import (
    SPAN_MAX_MS,
    Clock,
    Counters,
    Launched,
    LaunchUsage,
    Metering,
    Moment,
    Reading,
    Rest,
    SleepUsage,
    SnapshotSize,
    Span,
    State,
    Totals,
    UsageDetail,
    bounded,
)

MIB: Final = 1 << 20
TRAFFIC: Final = (
    "guest_sent_bytes",
    "guest_sent_packets",
    "guest_received_bytes",
    "guest_received_packets",
)


# -- reading ---------------------------------------------------------------------------------------


async def read_counters(record: InstanceRecord, host: Host) -> Counters | None:
    """Of the current launch, while its cgroup is there; None: it is gone.

    A counter that cannot be told is None: the peak without the memory controller, traffic without
    a TAP.

    Raises:
        HostFault, Unavailable: the kernel did not say.
    """
    used = await host.cgroups.usage(record.cgroup_key)
    if used is None:
        return None
    return await with_traffic(
        Counters(cpu_us=bounded(used.cpu_us), memory_peak_bytes=used.memory_peak_bytes),
        record,
        host,
    )


async def with_traffic(counters: Counters, record: InstanceRecord, host: Host) -> Counters:
    if record.net is None or record.offset is None:
        return counters
    traffic = await host.taps.traffic(naming.tap_name(record.net.tenant_net_id, record.offset))
    if traffic is None:
        return counters
    return replace(
        counters,
        guest_sent_bytes=bounded(traffic.sent_bytes),
        guest_sent_packets=bounded(traffic.sent_packets),
        guest_received_bytes=bounded(traffic.received_bytes),
        guest_received_packets=bounded(traffic.received_packets),
    )


async def read_last(record: InstanceRecord, host: Host, *, seen: bool) -> InstanceRecord:
    """The record with the last counters of its VMM, which has ended; journalled, so that the next
    worker has them if this one is killed once cgroup and TAP are gone.

    Never fails: what the kernel, or the journal, does not give is unknown.
    """
    counters = Counters()
    with contextlib.suppress(Failure, OSError):
        counters = await read_counters(record, host) or counters
    reading = Reading(host.facts.moment(), counters, seen)
    metering = replace(record.metering or Metering(), reading=reading)
    now = host.records.instance(record.ref)
    if now is not None and now.launch == record.launch:
        with contextlib.suppress(Failure):
            await host.records.put_instance(replace(now, metering=metering))
    return replace(record, metering=metering)


# -- spans -----------------------------------------------------------------------------------------


def began(record: InstanceRecord, now: Moment) -> Metering:
    """From here on the VMM of the record's launch lives; said again, nothing changes."""
    metering = record.metering or Metering()
    if metering.launched is not None and metering.launched.launch == record.launch:
        return metering
    return replace(_counted_from(metering, now), launched=Launched(record.launch, now))


def settled(record: InstanceRecord, status: Status, now: Moment) -> Metering:
    """What the record that completes a command, or a cleanup, has: each span that ended is counted
    in `totals` and is in `due`."""
    metering = _counted_from(record.metering or Metering(), now)
    rest, launched, reading = metering.rest, metering.launched, metering.reading
    if launched is not None and rest is not None:
        metering = replace(_rested(metering, rest, launched.since), rest=None)
        rest = None
    if status is Status.RUNNING:
        return metering
    if reading is not None:
        if launched is None:  # of an adopted VMM: the rest before it may be counted already
            rest = None
        metering = replace(_ran(record, metering, reading), launched=None, reading=None)
    at = reading.at if reading is not None else now
    state = State.SLEEPING if status is Status.SLEEPING else State.STOPPED
    if rest is not None and (rest.state is not state or status is Status.DESTROYED):
        metering, rest = _rested(metering, rest, now), None
    if state is State.STOPPED:
        metering = replace(metering, snapshot=None)
    return replace(metering, launched=None, rest=rest or Rest(state, at))


def asleep(metering: Metering | None, size: SnapshotSize) -> Metering:
    """As the snapshot was written that the instance sleeps by, in place of an earlier one."""
    return replace(metering or Metering(), snapshot=size)


def current_span(record: InstanceRecord, now: Moment) -> Span | None:
    """The state that it is in, until now; None: that is not known."""
    metering = record.metering or Metering()
    if record.vmm is not None:
        since = metering.launched.since if metering.launched is not None else None
        return _span(State.RUNNING, since, now, seen=True)
    if metering.rest is not None:
        return _span(metering.rest.state, metering.rest.since, now, seen=True)
    return None


def allotted(record: InstanceRecord, duration_ms: int | None) -> dict[str, int | None]:
    """The vCPUs and memory that a launch had, times how long it had them."""
    if duration_ms is None:
        return {"vcpu_ms": None, "memory_mib_s": None}
    return {
        "vcpu_ms": bounded(record.vcpus * duration_ms),
        "memory_mib_s": bounded(record.mem_mib * duration_ms // 1000),
    }


def _counted_from(metering: Metering, now: Moment) -> Metering:
    if metering.totals.from_ms is not None:
        return metering
    return replace(metering, totals=replace(metering.totals, from_ms=now.wall_ms))


def _span(state: State, since: Moment | None, until: Moment, *, seen: bool) -> Span:
    """Between two moments of one boot the wall clock does not count. Over a reboot nothing else
    does, but it was not shorter than this boot is old; when a VMM ended then is not known."""
    duration_ms = clock = None
    if since is not None and seen:
        if since.boot_id == until.boot_id:
            duration_ms, clock = max(0, until.boot_ms - since.boot_ms), Clock.BOOT
        elif state is not State.RUNNING:
            by_wall_ms = max(until.wall_ms - since.wall_ms, until.boot_ms)
            duration_ms, clock = min(by_wall_ms, SPAN_MAX_MS), Clock.WALL
    return Span(
        state=state,
        began_ms=since.wall_ms if since is not None else None,
        ended_ms=until.wall_ms,
        duration_ms=duration_ms,
        clock=clock,
    )


def _ran(record: InstanceRecord, metering: Metering, reading: Reading) -> Metering:
    """Count the launch that ended."""
    launched, counters = metering.launched, reading.counters
    since = launched.since if launched is not None else None
    span = _span(State.RUNNING, since, reading.at, seen=reading.seen)
    used = LaunchUsage(
        launch=record.launch,
        vcpus=record.vcpus,
        mem_mib=record.mem_mib,
        **allotted(record, span.duration_ms),
        **asdict(counters),
    )
    before = metering.totals
    lacks = None in (span.duration_ms, used.cpu_us, *(getattr(used, name) for name in TRAFFIC))
    peaks = (before.memory_peak_bytes, used.memory_peak_bytes)
    totals = replace(
        _timed(before, span, lacks=lacks),
        launches=bounded(before.launches + 1),
        memory_peak_bytes=max((each for each in peaks if each is not None), default=None),
        **{
            name: bounded(getattr(before, name) + (getattr(used, name) or 0))
            for name in ("vcpu_ms", "memory_mib_s", "cpu_us", *TRAFFIC)
        },
    )
    return _due(metering, UsageDetail(span=span, launch=used, snapshot=None, totals=totals))


def _rested(metering: Metering, rest: Rest, until: Moment) -> Metering:
    """Count a rest that ended. Only a sleep is published: nothing is used by a stopped instance,
    and its time is in the totals of what comes next."""
    span = _span(rest.state, rest.since, until, seen=True)
    if rest.state is not State.SLEEPING:
        return replace(metering, totals=_timed(metering.totals, span, lacks=False))
    size = metering.snapshot
    allocated = None if size is None else size.allocated_bytes
    stored = None
    if allocated is not None and span.duration_ms is not None:
        stored = bounded(allocated * span.duration_ms // (MIB * 1000))
    used = SleepUsage(
        size_bytes=None if size is None else size.size_bytes,
        allocated_bytes=allocated,
        snapshot_mib_s=stored,
    )
    before = metering.totals
    totals = replace(
        _timed(before, span, lacks=stored is None),
        snapshot_mib_s=bounded(before.snapshot_mib_s + (stored or 0)),
    )
    return _due(metering, UsageDetail(span=span, launch=None, snapshot=used, totals=totals))


def _due(metering: Metering, detail: UsageDetail) -> Metering:
    return replace(metering, totals=detail.totals, due=(*metering.due, detail))


def _timed(totals: Totals, span: Span, *, lacks: bool) -> Totals:
    """The totals with the time of a span."""
    took_ms, name = span.duration_ms or 0, f"{span.state}_ms"
    by_wall_ms = took_ms if span.clock is Clock.WALL else 0
    return replace(
        totals,
        **{name: bounded(getattr(totals, name) + took_ms)},
        by_wall_clock_ms=bounded(totals.by_wall_clock_ms + by_wall_ms),
        incomplete=bounded(totals.incomplete + lacks),
    )
