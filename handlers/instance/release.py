"""Release everything volatile that an instance holds. Shared by Stop, Sleep, Destroy, VMM exits.

Each removal succeeds if the resource is absent already, so the release may be repeated after a
crash until it completes. The uid is free only after the VMM has exited.
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
