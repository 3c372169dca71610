"""How an instance gives everything volatile back. Shared by Stop, Sleep, Destroy and VMM exits.

Each removal takes "absent already" for success, so it may be run again after a crash until it
is through. The uid is free only after the VMM was seen gone.
"""

from handlers.interfaces import Host
from handlers.network_names import names_of
from handlers.steps import Steps
from schemas.records import InstanceRecord


async def release(record: InstanceRecord, steps: Steps, host: Host) -> None:
    """Remove VMM, TAP, pin, jail and cgroup of the record's launch, in this order."""
    names = names_of(record)
    await steps.remove(host.vmms, record.jail_id)
    if names is not None:
        async with host.locks.shared(record.ref.tenant_id):
            await steps.remove(host.taps, names.tap)
            await steps.remove(host.pins, names.pin.key)
    await steps.remove(host.jails, record.jail_id)
    await steps.remove(host.cgroups, record.cgroup_key)
