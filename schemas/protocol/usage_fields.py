"""What the fields of usage mean: of `usage` events, of totals, of answers to `ask.usage`."""

from collections.abc import Mapping
from typing import Final

MEANINGS: Final[Mapping[str, str]] = {
    # spans
    "span": "A time in one state; null if it has none now.",
    "Span.state": "running: its VMM lived; sleeping; stopped.",
    "began_ms": "Unix time in milliseconds of the begin; null if it was not seen.",
    "ended_ms": "Unix time in milliseconds of the end; in an answer: of now.",
    "duration_ms": "Milliseconds, not the difference of the two times; null if it is not known.",
    "clock": "What measured the duration: boot, which nobody sets; wall, across a reboot.",
    # launches
    "UsageDetail.launch": "The final values of a launch; null of a span without a VMM.",
    "UsageDetail.snapshot": "What a snapshot took in a span asleep; else null.",
    "vcpu_ms": "vCPUs that it was given times milliseconds.",
    "memory_mib_s": "Memory in MiB that it was given times seconds.",
    "memory_peak_bytes": "Largest memory of the VMM in bytes; null without the memory controller.",
    # snapshots
    "allocated_bytes": "Blocks of the snapshot's files in bytes.",
    "snapshot_mib_s": "Blocks of the snapshots in MiB times seconds.",
    "snapshot_size_bytes": "Length of the snapshots' files in bytes.",
    "snapshot_allocated_bytes": "Blocks of the snapshots' files in bytes.",
    "InstanceUsage.snapshot": "Sizes of the snapshot's files, which a woken VMM maps, or null.",
    # sums
    "totals": "Sums over all that ended.",
    "current": "Sums over the launches and spans that go on.",
    "from_ms": "Unix time in milliseconds since when is counted; null: nothing yet.",
    "launches": "Launches that ended.",
    "incomplete": "Launches, spans and snapshots of which a value is not known and left out.",
    "running_ms": "Milliseconds with a VMM.",
    "sleeping_ms": "Milliseconds asleep.",
    "stopped_ms": "Milliseconds stopped.",
    "by_wall_clock_ms": "The part of these times that the wall clock alone measured.",
    "CurrentUsage.running": "Number of instances with a VMM.",
    "CurrentUsage.sleeping": "Number of instances asleep.",
    "CurrentUsage.stopped": "Number of instances that are stopped.",
    "TenantUsage.instances": "Number of the tenant's instances on this host.",
    **{
        f"{kind}.cpu_us": "CPU time in microseconds, the guests' vCPUs included."
        for kind in ("Totals", "CurrentUsage")
    },
}
