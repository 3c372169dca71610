"""WakeInstance: restore the one snapshot of a sleeping instance, once.

The point of no return is `consumed` in the journal, after the load without resume and every
check that needs no running guest. Until then a failure leaves the snapshot as it was and nothing
running. After it the guest counts as having run: old memory over a newer disk corrupts it.
"""

import dataclasses

from msgspec.structs import replace

from handlers.cancellation import together
from handlers.concurrency import held
from handlers.errors import Failure, HostFault, Unavailable
from handlers.instance.artifact_refs import ensure_revision
from handlers.instance.instance_file import write_at_rest, write_running
from handlers.instance.launch import (
    Launch,
    Wanted,
    add_log,
    ensure_cgroup,
    ensure_port,
    jail_spec,
    launch_of,
    launch_resources,
    read_wanted,
    record_disk,
    record_vmm,
    reservation,
)
from handlers.instance.release import release
from handlers.instance.reservations import Reservations
from handlers.instance.snapshot_steps import Draft, SnapshotUses, SnapshotUseSpec
from handlers.instance.state import final_record, read_state
from handlers.interfaces import Host
from handlers.specs import Artifact, DataDiskSpec, SnapshotInfo
from handlers.steps import Done, Steps
from schemas.records import InstanceRecord, Status, VmmIdentity
from schemas.requests import WakeInstance

CONSUMED = "consumed"
AGENT_TIMEOUT_S = 10.0


async def wake_instance(cmd: WakeInstance, steps: Steps, host: Host) -> Done:
    """Bring a sleeping instance back to running from its snapshot.

    Raises:
        NotFound, Conflict: unknown here; not asleep; network not set up; quarantined.
        Exhausted: quota, memory or uids are used up on this host.
        HostFault: the snapshot, its disks, the VMM or the CPU do not fit; it stays asleep.
        Unavailable: the VMM ended; past the point of no return the instance then is `failed`.
    """
    state = await read_state(cmd.ref, host, host.facts.now_ms())
    state.refuse_unknown()
    record = state.record
    if record.status is Status.RUNNING:
        return Done(changed=False, status=str(Status.RUNNING))
    if record.status is Status.WAKING and record.consumed:
        # Past its point, whoever began it: only completion is left.
        steps.finalize()
        return await go_on(record, await host.vmms.find(record.jail_id), steps, host)
    state.refuse_half_done(steps.command_id)
    if state.status is not Status.SLEEPING:
        raise state.conflict("wake it")
    record = await restore(cmd, record, steps, host)
    return await go_on(record, record.vmm, steps, host, loaded=True)


async def restore(
    cmd: WakeInstance, record: InstanceRecord, steps: Steps, host: Host
) -> InstanceRecord:
    """All up to and including the point of no return; the VM is loaded and not yet resumed."""
    number = record.snapshot
    if number is None:
        raise HostFault(f"instance {record.ref} sleeps without a snapshot in the journal")
    info = await host.snapshots.read(record.ref)
    if info is None or info.number != number:
        raise HostFault(f"snapshot {number} of instance {record.ref} has no manifest")
    wanted = await read_wanted(cmd.ref, record, host)
    spec = reservation(
        wanted,
        record,
        steps,
        status=Status.WAKING,
        revision=info.revision,
        now_ms=host.facts.now_ms(),
    )
    record = await steps.ensure(
        # The size is that of the memory which slept, whatever the pool says by now.
        Reservations(host),
        dataclasses.replace(spec, vcpus=info.vcpus, mem_mib=info.mem_mib),
    )
    async with held(host.slots.restores, "wait_restores", steps):
        return await load(wanted, record, info, steps, host)


async def load(
    wanted: Wanted, record: InstanceRecord, info: SnapshotInfo, steps: Steps, host: Host
) -> InstanceRecord:
    launch = launch_of(record, wanted.pool, host)
    if await host.jails.exists(launch.jail_id) and await host.vmms.find(launch.jail_id) is None:
        await host.jails.remove(launch.jail_id)
        await host.snapshots.restore_ownership(launch.ref, info.number)
    artifact = await ensure_revision(launch.ref, info.revision, steps, host)
    await steps.announce(
        *launch_resources(launch, host),
        (SnapshotUses(host), Draft(launch.ref, info.number).key),
        (host.jails, launch.jail_id),
        (host.vmms, launch.jail_id),
    )
    _, launch = await together(
        ensure_port(launch, steps, host), ensure_files(launch, artifact, info, steps, host)
    )
    identity = await steps.ensure(host.vmms, launch.vmm)
    vmm = host.vmms.api(launch.jail_id)
    try:
        record, state = await together(record_vmm(launch, identity, host), vmm.state())
        if state == "Not started":
            version = await vmm.version()
            await steps.act(
                "verify_snapshot",
                lambda: host.snapshots.verify(launch.ref, info.number, version),
            )
            paths = await steps.act(
                "link_snapshot",
                lambda: host.snapshots.link(launch.jail_id, launch.vmm.uid, info),
            )
            await steps.act("load_snapshot", lambda: vmm.load_snapshot(*paths))
        await steps.act(
            "check_confinement", lambda: host.vmms.check_confinement(identity, launch.vmm)
        )
        steps.safe_point()
        record = replace(record, consumed=True)
        # The point of no return, committed with `synchronous=FULL`: part of the record, so that
        # a later command knows it too.
        await steps.reach(CONSUMED, lambda: host.records.put_instance(record, durable=True))
    except Failure as failure:
        await add_log(failure, record, host)
        raise
    finally:
        await vmm.close()
    return record


async def ensure_files(
    launch: Launch, artifact: Artifact, info: SnapshotInfo, steps: Steps, host: Host
) -> Launch:
    """Cgroup, data disk and jail, the snapshot lent: nothing of the network."""
    await ensure_cgroup(launch, steps, host)
    launch, data_path = await known_data_disk(launch, steps, host)
    await steps.ensure(SnapshotUses(host), SnapshotUseSpec(Draft(launch.ref, info.number)))
    secrets = await host.shared.secrets(launch.ref.tenant_id) if info.has_secrets else None
    await steps.ensure(
        host.jails,
        jail_spec(
            launch,
            artifact,
            data_path,
            secrets=secrets if secrets is not None or not info.has_secrets else b"{}\n",
            kept_config=info.kept_config,
            kept_secrets=info.kept_secrets,
        ),
    )
    return launch


async def known_data_disk(launch: Launch, steps: Steps, host: Host) -> tuple[Launch, str | None]:
    """The data disk that slept with the instance; a wake never makes a new one."""
    known = launch.record.disk
    if known is None:
        return launch, None
    spec = DataDiskSpec(launch.ref, launch.pool.instance_resources.data_disk_mib, known)
    disk = await steps.act("data_disk", lambda: host.data_disks.ensure(spec))
    return await record_disk(launch, disk.identity, host), disk.path


async def go_on(
    record: InstanceRecord,
    identity: VmmIdentity | None,
    steps: Steps,
    host: Host,
    *,
    loaded: bool = False,
) -> Done:
    """Past the point of no return: resume, tell the agent, set the clock; failures are reported.

    `identity` is of the VMM that was `loaded` just now, or that was found by a later run.
    """
    await host.snapshots.mark_consumed(record.ref, record.snapshot or 0)
    if identity is None:
        await fail_consumed(record, steps, host)
        failure = Unavailable(
            f"the VMM of instance {record.ref} ended after its snapshot was consumed",
            detail={"status": str(Status.FAILED)},
        ).not_retryable()
        await add_log(failure, record, host)
        raise failure
    vmm = host.vmms.api(record.jail_id)
    try:
        if loaded or await vmm.state() == "Paused":
            await steps.act("resume", vmm.resume)
    finally:
        await vmm.close()
    detail, left_behind = await together(
        tell_guest(record, steps, host), write_running(record, host, host.facts.now_ms())
    )
    if trouble := {k: v for k, v in detail.items() if k.endswith("_failed")}:
        await host.records.event(
            "snapshot", ref=record.ref, reason="the guest was not told of its wake", detail=trouble
        )
    awake = replace(record, vmm=identity, snapshot=None, consumed=True)
    return Done(
        changed=True,
        status=str(Status.RUNNING),
        detail={"pid": identity.pid, "launch": record.launch, **detail},
        left_behind=left_behind,
        record=final_record(awake, Status.RUNNING, host.facts.now_ms()),
    )


async def tell_guest(record: InstanceRecord, steps: Steps, host: Host) -> dict[str, object]:
    """`Wake` and the clock; what fails is named in the reply's detail and stops nothing."""
    port = record.agent_port
    detail: dict[str, object] = {}
    if port is None:
        return detail
    left_s = steps.left_s()
    timeout_s = AGENT_TIMEOUT_S if left_s is None else max(0.1, min(AGENT_TIMEOUT_S, left_s))
    try:
        ack = await steps.act(
            "agent_wake", lambda: host.agents.wake(record.jail_id, port, timeout_s=timeout_s)
        )
        if not ack.success:
            detail["agent_failed"] = ack.detail or "the agent refused"
    except Failure as error:
        detail["agent_failed"] = error.message
        return detail
    try:
        detail["clock_was_off_s"] = await steps.act(
            "set_clock",
            lambda: host.agents.set_clock(record.jail_id, port, timeout_s=timeout_s),
        )
    except Failure as error:
        detail["clock_failed"] = error.message
    return detail


async def fail_consumed(record: InstanceRecord, steps: Steps, host: Host) -> None:
    """The guest may have run and is gone: the snapshot is worth nothing any more."""
    await release(record, steps, host)
    await host.snapshots.delete_all(record.ref)
    now_ms = host.facts.now_ms()
    await write_at_rest(record, Status.FAILED, host, now_ms)
    gone = replace(record, vmm=None, uid_slot=None, snapshot=None, consumed=False)
    await host.records.put_instance(
        final_record(gone, Status.FAILED, now_ms), reason="the VMM ended while waking", durable=True
    )
