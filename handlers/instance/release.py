"""Release everything volatile that an instance holds. Shared by Stop, Sleep, Destroy, VMM exits.

Each removal succeeds if the resource is absent already, so the release may be repeated after a
crash until it completes. The uid is free only after the VMM has exited.
"""

from handlers.interfaces import Host
from handlers.network_names import names_of
from handlers.steps import Steps
from schemas.records import InstanceRecord


async def release(
    record: InstanceRecord, steps: Steps, host: Host, *, keep_flows: bool = False
) -> None:
    """Remove VMM, TAP, pin, jail and cgroup of the record's launch, in this order.

    The guest's flows end with it, so that the next guest at its address inherits none, unless
    `keep_flows`: a sleeping guest keeps its address and finds them at its wake.
    """
    names = names_of(record)
    await steps.remove(host.vmms, record.jail_id)
    if names is not None:
        async with host.locks.shared(record.ref.tenant_id):
            await steps.remove(host.taps, names.tap)
            if not keep_flows:
                await flush_conntrack(record, steps, host)
            await steps.remove(host.pins, names.pin.key)
    await steps.remove(host.jails, record.jail_id)
    await steps.remove(host.cgroups, record.cgroup_key)


async def flush_conntrack(record: InstanceRecord, steps: Steps, host: Host) -> None:
    """End the flows of the guest's address. None may send from it meanwhile."""
    if (names := names_of(record)) is not None:
        address = names.guest_ip
        await steps.act("flush_conntrack", lambda: host.networks.flush_conntrack(address))
