"""What the VMM of an instance has used since its launch, as the kernel counts it. Changes nothing.

CPU and memory are of its cgroup: the VMM's own threads and its jailer included, not the kernel's
vhost work of others. Traffic is that of its TAP, from the guest's point of view.
"""

from collections.abc import Mapping

from handlers.interfaces import Host
from schemas import naming
from schemas.records import InstanceRecord


async def usage_of(host: Host, record: InstanceRecord) -> Mapping[str, object] | None:
    """None if it has no VMM: it ended, or its launch is not that far.

    A counter that cannot be told is None: memory without the controller, traffic without a TAP.

    Raises:
        HostFault, Unavailable: the kernel did not say.
    """
    used = await host.cgroups.usage(record.cgroup_key)
    if used is None:
        return None
    traffic = None
    if record.net is not None and record.offset is not None:
        name = naming.tap_name(record.net.tenant_net_id, record.offset)
        traffic = await host.taps.traffic(name)
    return {
        "cpu_us": used.cpu_us,
        "memory_bytes": used.memory_bytes,
        "guest_sent_bytes": traffic.sent_bytes if traffic else None,
        "guest_sent_packets": traffic.sent_packets if traffic else None,
        "guest_received_bytes": traffic.received_bytes if traffic else None,
        "guest_received_packets": traffic.received_packets if traffic else None,
    }
