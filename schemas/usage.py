"""What instances use: `detail` of `usage` events, answers to `ask.usage`, the journal's part.

Units are in the names. Null is what is not known, never 0. Sources and directions of the counters:
docs/contract.md, "Usage".
"""

from enum import StrEnum
from typing import Annotated, Final

import msgspec

COUNT_MAX: Final = (1 << 63) - 1  # 23 years at 100 Gbit/s
SPAN_MAX_MS: Final = 10 * 366 * 24 * 3_600_000
"""The longest span that the wall clock alone is believed."""

Count = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]
Millis = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
VCPUS_MAX: Final = 1 << 16
MEM_MIB_MAX: Final = 1 << 32


def bounded(count: int) -> int:
    """Saturates, so that a damaged counter is no number that nobody can read."""
    return max(0, min(count, COUNT_MAX))


class State(StrEnum):
    """What an instance is for metering: `running` while its VMM lives, whatever the status."""

    RUNNING = "running"
    SLEEPING = "sleeping"
    STOPPED = "stopped"


class Clock(StrEnum):
    """What measured a span: CLOCK_BOOTTIME, which no one sets; or the wall clock, as the host was
    rebooted in between."""

    BOOT = "boot"
    WALL = "wall"


class Moment(msgspec.Struct, frozen=True):
    """A time by both clocks; `boot_ms` is of this boot. Source: clock_gettime(2)."""

    wall_ms: Millis
    boot_ms: Millis
    boot_id: str


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A time in one state. `began_ms`, `ended_ms` are by the wall clock, `duration_ms` is not their
    difference: it is measured by `clock`, null if the end, or the begin, was not seen."""

    state: State
    began_ms: Millis | None
    ended_ms: Millis
    duration_ms: Millis | None
    clock: Clock | None


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel counts of one launch. Traffic is named from the guest's side."""

    cpu_us: Count | None = None
    memory_peak_bytes: Count | None = None
    guest_sent_bytes: Count | None = None
    guest_sent_packets: Count | None = None
    guest_received_bytes: Count | None = None
    guest_received_packets: Count | None = None


class LaunchUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The final values of a launch. `vcpu_ms` and `memory_mib_s` are what it was given, for as long
    as it lived; `cpu_us` is what it used."""

    launch: Count
    vcpus: Annotated[int, msgspec.Meta(ge=0, le=VCPUS_MAX)]
    mem_mib: Annotated[int, msgspec.Meta(ge=0, le=MEM_MIB_MAX)]
    vcpu_ms: Count | None
    memory_mib_s: Count | None
    cpu_us: Count | None
    memory_peak_bytes: Count | None
    guest_sent_bytes: Count | None
    guest_sent_packets: Count | None
    guest_received_bytes: Count | None
    guest_received_packets: Count | None


class SnapshotSize(msgspec.Struct, frozen=True):
    """Of state and memory: `size_bytes` is the files' length, `allocated_bytes` their blocks."""

    size_bytes: Count
    allocated_bytes: Count


class SleepUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot took while the instance slept; `snapshot_mib_s` by its allocated blocks."""

    size_bytes: Count | None
    allocated_bytes: Count | None
    snapshot_mib_s: Count | None


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the spans of an instance that ended; unknown values are left out.

    `incomplete` counts launches and sleeps of which a value was not known. `by_wall_clock_ms` is
    the part of the times that the wall clock alone measured. `from_ms`: since when is counted.
    """

    from_ms: Millis | None = None
    launches: Count = 0
    incomplete: Count = 0
    running_ms: Count = 0
    sleeping_ms: Count = 0
    stopped_ms: Count = 0
    by_wall_clock_ms: Count = 0
    vcpu_ms: Count = 0
    memory_mib_s: Count = 0
    cpu_us: Count = 0
    memory_peak_bytes: Count | None = None
    guest_sent_bytes: Count = 0
    guest_sent_packets: Count = 0
    guest_received_bytes: Count = 0
    guest_received_packets: Count = 0
    snapshot_mib_s: Count = 0


class UsageDetail(msgspec.Struct, frozen=True, kw_only=True):
    """`detail` of a `usage` event: a span that ended, and the instance's totals with it.

    `launch` is of a `running` span, `snapshot` of a `sleeping` one.
    """

    span: Span
    launch: LaunchUsage | None
    snapshot: SleepUsage | None
    totals: Totals


# -- in the journal --------------------------------------------------------------------------------


class Launched(msgspec.Struct, frozen=True):
    """Since when the VMM of a launch lives: from the commit of its identity."""

    launch: Count
    since: Moment


class Rest(msgspec.Struct, frozen=True):
    """Since when an instance has no VMM. While a launch is not complete, the rest before it."""

    state: State
    since: Moment


class Reading(msgspec.Struct, frozen=True):
    """The last counters of a VMM that has ended; they are counted with the commit that says so.

    `seen`: hostd saw it end, about then. If not, how long it lived is not known.
    """

    at: Moment
    counters: Counters
    seen: bool = True


class Metering(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The part of an instance's record that is about its usage; see handlers/instance/metering.py.

    `due` is published with the commit of the record, and never stored.
    """

    totals: Totals = Totals()
    rest: Rest | None = None
    launched: Launched | None = None
    reading: Reading | None = None
    snapshot: SnapshotSize | None = None
    due: tuple[UsageDetail, ...] = ()


# -- answers ---------------------------------------------------------------------------------------


class VmmUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The current launch so far; `duration_ms` is since its VMM was journalled."""

    duration_ms: Millis | None
    vcpu_ms: Count | None
    memory_mib_s: Count | None
    cpu_us: Count | None
    memory_bytes: Count | None
    memory_peak_bytes: Count | None
    guest_sent_bytes: Count | None
    guest_sent_packets: Count | None
    guest_received_bytes: Count | None
    guest_received_packets: Count | None


class InstanceUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `ask.usage` for an instance. `totals` are of what ended: the current launch is
    in `vmm`, the current state in `span`."""

    v: int = 1
    tenant_id: str
    pool_id: str
    instance_id: str
    status: str
    since_ms: Millis
    launch: Count
    vcpus: int
    mem_mib: int
    at_ms: Millis
    vmm: VmmUsage | None
    span: Span | None
    snapshot: SnapshotSize | None
    totals: Totals


class CurrentUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The sums over the instances that a tenant has now; unknown values are left out, and counted
    in `incomplete`: VMMs, spans and snapshots of which one is not known."""

    running: int = 0
    sleeping: int = 0
    stopped: int = 0
    incomplete: int = 0
    running_ms: Count = 0
    sleeping_ms: Count = 0
    stopped_ms: Count = 0
    vcpu_ms: Count = 0
    memory_mib_s: Count = 0
    cpu_us: Count = 0
    memory_bytes: Count = 0
    guest_sent_bytes: Count = 0
    guest_sent_packets: Count = 0
    guest_received_bytes: Count = 0
    guest_received_packets: Count = 0
    snapshot_size_bytes: Count = 0
    snapshot_allocated_bytes: Count = 0


class TenantUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `ask.usage` for a tenant: the sums over its instances on this host; what was
    destroyed is not in it."""

    v: int = 1
    tenant_id: str
    at_ms: Millis
    instances: int
    current: CurrentUsage
    totals: Totals
