"""Release everything volatile that an instance holds. Shared by Stop, Sleep, Destroy, VMM exits.

Each removal succeeds if the resource is absent already, so the release may be repeated after a
crash until it completes. The uid is free only after the VMM has exited.

The VMM ends first. What is left then needs little of each other: the network port (what the VMM
used is read, then go the TAP and what held it to its address) and the files (jail, then cgroup).
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from handlers.cancellation import together
from handlers.errors import HostFault
from handlers.instance.metering import read_last
from handlers.interfaces import Discarded, DiskClaim, Host
from handlers.network_names import names_of, other_holder
from handlers.steps import Steps
from schemas.records import InstanceRecord
from schemas.requests import InstanceRef

log = structlog.get_logger()


async def nothing() -> None:
    """No work, where some may be due."""


async def release(
    record: InstanceRecord, steps: Steps, host: Host, *, seen: bool = True
) -> InstanceRecord:
    """Remove VMM, TAP, flows, pin, jail and cgroup of the record's launch; as `release_launch`."""
    await end_vmm(record, steps, host)
    return await release_launch(record, steps, host, seen=seen)


async def end_vmm(record: InstanceRecord, steps: Steps, host: Host) -> None:
    """Kill the VMM, if it runs, and wait until it has exited."""
    await steps.remove(host.vmms, record.jail_id)


async def release_launch(
    record: InstanceRecord,
    steps: Steps,
    host: Host,
    *,
    keep_flows: bool = False,
    settle: bool = False,
    seen: bool = True,
    discard: Callable[[], Awaitable[None]] = nothing,
) -> InstanceRecord:
    """After `end_vmm`: all else of the launch, and what to `discard` after its jail.

    Returns the record with what the VMM used. TAP and cgroup say it until they are removed, so they
    wait for the reading, which takes less time than the removal of the jail beside it. `seen` is
    false if the VMM may have ended long ago.
    """
    is_read = asyncio.Event()

    async def port() -> InstanceRecord:
        try:
            read = await read_usage(record, steps, host, seen=seen)
        finally:
            is_read.set()
        await release_port(record, steps, host, keep_flows=keep_flows, settle=settle)
        return read

    async def files() -> None:
        await steps.remove(host.jails, record.jail_id)
        await is_read.wait()
        await steps.remove(host.cgroups, record.cgroup_key)
        await discard()

    read, _ = await together(port(), files())
    return read


async def read_usage(
    record: InstanceRecord, steps: Steps, host: Host, *, seen: bool
) -> InstanceRecord:
    """Once per launch: what an earlier run has read stays."""
    is_read = record.metering is not None and record.metering.reading is not None
    if record.vmm is None or is_read:
        return record
    return await steps.act("read_usage", lambda: read_last(record, host, seen=seen))


async def ended_unseen(record: InstanceRecord, host: Host) -> bool:
    """Whether its VMM has ended, perhaps while no worker ran: then nothing says how long it lived.

    False of a VMM that this worker has launched or has seen alive.
    """
    if record.vmm is None or host.seen_alive.get(record.ref) == record.vmm:
        return False
    try:
        return not await host.vmms.alive(record.vmm)
    except HostFault:  # it lives, and is not what was launched
        return False


async def read_unseen(record: InstanceRecord, steps: Steps, host: Host) -> InstanceRecord:
    """What the VMM used, if it is `ended_unseen`. Before a command changes the record, so that a
    run that continues the command does not take the end for its own."""
    if await ended_unseen(record, host):
        return await read_usage(record, steps, host, seen=False)
    return record


async def release_port(
    record: InstanceRecord,
    steps: Steps,
    host: Host,
    *,
    keep_flows: bool = False,
    settle: bool = False,
) -> None:
    """Take the guest's end of the network away; its VMM has ended.

    The guest's flows end with it, so that the next guest at its address inherits none, unless
    `keep_flows`: a sleeping guest keeps its address and finds them at its wake. With `settle` the
    kernel has deleted the TAP on return; without, nothing can use it any more (ADR 0941).

    An instance at rest has no port, and another one may have been given its address since; one that
    sleeps has flows alone (ADR 1104).
    """
    names = names_of(record)
    if names is None:
        return
    async with host.locks.shared(record.ref.tenant_id):
        if not has_address(record, host):  # asked under the lock: a teardown may have held it
            return
        if record.holds_host and settle:
            await steps.remove(host.taps, names.tap)
        elif record.holds_host:
            await steps.act("remove_tap", lambda: host.taps.release(names.tap))
        if not keep_flows:
            # Not beside the pin: after a commit to nf_tables, closing the socket of the flush waits
            # 10 ms for what the commit freed.
            await flush_conntrack(record, steps, host)
        if record.holds_host:
            await steps.remove(host.pins, names.pin.key)


def has_address(record: InstanceRecord, host: Host) -> bool:
    """Whether the names that the record has of a network are its own now: no other instance of its
    tenant may have them, and its tenant's network was not torn down and given to another."""
    if record.net is None or not record.holds_offset:
        return False
    return other_holder(record.ref.tenant_id, record.net, host.records) is None


async def flush_conntrack(record: InstanceRecord, steps: Steps, host: Host) -> None:
    """End the flows of the guest's address. None may send from it meanwhile."""
    names = names_of(record)
    if names is not None and has_address(record, host):
        address = names.guest_ip
        await steps.act("flush_conntrack", lambda: host.networks.flush_conntrack(address))


async def discard_snapshots(
    record: InstanceRecord, steps: Steps, host: Host, *, below: int | None = None
) -> None:
    """Discard the instance's snapshots, or those with a lower number: none can be woken any more.

    The blocks of their memory are freed later, and count in the tenant's disk quota until then
    (ADR 0942). After the jail, which may link the memory.
    """
    discarded = await steps.act(
        "discard_snapshot", lambda: host.snapshots.discard(record.ref, below=below)
    )
    if discarded.freed:
        size_bytes = discarded.size_bytes
        # On the file system they are counted as used already.
        claim = DiskClaim(record.ref.tenant_id, size_bytes, -size_bytes, exists=lambda: False)
        host.disk_claims.add(claim)
        for each in discarded.freed:
            each.add_done_callback(lambda _: unclaim_freed(record.ref, claim, discarded, host))


def unclaim_freed(ref: InstanceRef, claim: DiskClaim, discarded: Discarded, host: Host) -> None:
    if all(each.done() for each in discarded.freed):
        for each in discarded.freed:
            if not each.cancelled() and (error := each.exception()) is not None:
                # Its blocks are freed with its descriptor: it has no name any more.
                log.warning("snapshot.not_freed", instance=str(ref), error=str(error))
        host.disk_claims.discard(claim)
