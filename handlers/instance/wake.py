"""WakeInstance: restore the one snapshot of a sleeping instance, once.

The point of no return is `consumed` in the journal, after the load without resume and every
check that needs no running guest. Until then a failure leaves the snapshot as it was and nothing
running. After it the guest counts as having run: old memory over a newer disk corrupts it.
"""

import dataclasses

from msgspec.structs import replace

from handlers.admission.disk_admission import JAIL_BYTES, DiskNeed, admitted
from handlers.cancellation import together
from handlers.concurrency import limited
from handlers.errors import Failure, HostFault, Unavailable
from handlers.instance.artifact_refs import ensure_revision
from handlers.instance.instance_file import RunningFile, write_at_rest
from handlers.instance.launch import LaunchedVmm, launched, link_snapshot, verify_snapshot
from handlers.instance.launch_plan import (
    LaunchPlan,
    launch_of,
    newest_launch,
    read_launch_files,
    reservation_spec,
)
from handlers.instance.release import release
from handlers.instance.reservations import Reservations
from handlers.instance.state import final_record, read_state
from handlers.instance.vmm_exit import with_end
from handlers.interfaces import Host
from handlers.specs import SnapshotInfo
from handlers.steps import Done, Steps
from schemas.envelopes import EventKind
from schemas.records import InstanceRecord, Status, VmmIdentity
from schemas.requests import WakeInstance

CONSUMED = "consumed"
AGENT_TIMEOUT_S = 10.0
FAILURES = {
    "agent_failed": "guest agent did not acknowledge the wake",
    "clock_failed": "guest's clock was not set",
}
WAIT_ENDED = "a later command ended the wait for the agent"


async def wake_instance(cmd: WakeInstance, steps: Steps, host: Host) -> Done:
    """Bring a sleeping instance back to running from its snapshot.

    Raises:
        NotFound, Conflict: unknown here; not asleep; network not set up; quarantined.
        Exhausted: quota, memory, disk or uids are used up on this host.
        HostFault: the snapshot, its disks, the VMM or the CPU do not match; it stays asleep.
        Unavailable: the VMM exited; past the point of no return the instance then is `failed`.
    """
    state = await read_state(cmd.ref, host, host.facts.now_ms())
    state.refuse_unknown()
    record = state.record
    if record.status is Status.RUNNING:
        return Done(changed=False, status=str(Status.RUNNING))
    if record.status is Status.WAKING and record.consumed:
        # Past the point of no return, whichever command passed it: it can only be completed.
        steps.finalize()
        identity = await host.vmms.find(record.jail_id)
        return await complete_wake(record, identity, steps, host)
    state.refuse_incomplete(steps.command_id)
    if state.status is not Status.SLEEPING:
        raise state.conflict("wake it", "sleeping")
    async with host.warm.launch(), RunningFile(host) as file:
        record, identity = await restore(cmd, record, file, steps, host)
        return await wake_resumed(record, identity, file, steps, host)


async def restore(
    cmd: WakeInstance, record: InstanceRecord, file: RunningFile, steps: Steps, host: Host
) -> tuple[InstanceRecord, VmmIdentity]:
    """From the record of a sleeping instance to a guest that runs again."""
    host.vmms.expect_launch()
    (info, version), (files, newest) = await together(
        read_sleeper(record, host),
        together(read_launch_files(cmd.ref, record, host), newest_launch(record, host)),
    )
    spec = reservation_spec(
        files,
        record,
        steps,
        status=Status.WAKING,
        revision=info.revision,
        newest_launch=newest,
        vmm_version=version,
        now_ms=host.facts.now_ms(),
    )
    need = DiskNeed(tenant_id=cmd.tenant_id, what=f"instance {record.ref}", host_bytes=JAIL_BYTES)
    async with admitted(need, files.tenant.quotas, host):
        record = await steps.ensure(
            # The size is that of the sleeping memory, whatever the pool says by now.
            Reservations(host),
            dataclasses.replace(spec, vcpus=info.vcpus, mem_mib=info.mem_mib),
        )
        artifact = await ensure_revision(
            cmd.ref, info.revision, files.tenant.quotas, steps, host, can_wait=False
        )
        async with limited(host.slots.restores, cmd.tenant_id, "wait_restore_slot", steps):
            plan = LaunchPlan(launch_of(record, files.pool, host), artifact, snapshot=info)
            async with launched(plan, steps, host) as vm:
                if vm.state == "Not started":
                    await together(
                        host.records.put_instance(vm.record),
                        together(load_snapshot(vm, info, steps, host), file.prepare(vm.record)),
                    )
                else:
                    await host.records.put_instance(vm.record)
                await steps.act(
                    "check_confinement",
                    lambda: host.vmms.check_confinement(vm.identity, vm.launch.vmm),
                )
                steps.control.safe_point()
                record = replace(vm.record, consumed=True)
                # The point of no return, committed with `synchronous=FULL`: part of the record, so
                # that a later command knows it too.
                await steps.reach(CONSUMED, lambda: host.records.put_instance(record, durable=True))
                await host.snapshots.mark_consumed(record.ref, info.number)
                await steps.act("resume_vm", vm.api.resume)
    return record, vm.identity


async def read_sleeper(record: InstanceRecord, host: Host) -> tuple[SnapshotInfo, str]:
    """Its snapshot, and the version of Firecracker that slept, whichever new Starts use by now."""
    info = await read_snapshot(record, host)
    return info, await host.vmms.version_for(info.vmm_version)


async def read_snapshot(record: InstanceRecord, host: Host) -> SnapshotInfo:
    """The published snapshot that the journal names."""
    number = record.snapshot
    if number is None:
        raise HostFault(f"instance {record.ref} is sleeping, but the journal names no snapshot")
    info = await host.snapshots.read(record.ref)
    if info is None or info.number != number:
        found = "none" if info is None else f"snapshot {info.number}"
        raise HostFault(
            f"snapshot {number} of instance {record.ref} has no manifest; published: {found}"
        )
    return info


async def load_snapshot(vm: LaunchedVmm, info: SnapshotInfo, steps: Steps, host: Host) -> None:
    """Load the verified, linked snapshot; the VM stays paused."""
    version = await vm.api.version()
    if info.vmm_version != version:
        raise HostFault(
            f"{info.directory} was saved by VMM version {info.vmm_version}, found {version}"
        )
    paths = vm.snapshot_paths
    if paths is None:  # an earlier run was cut before the load
        await verify_snapshot(vm.launch, info, steps, host)
        paths = await link_snapshot(vm.launch, info, steps, host)
    await steps.act("load_snapshot", lambda: vm.api.load_snapshot(*paths))


async def complete_wake(
    record: InstanceRecord,
    identity: VmmIdentity | None,
    steps: Steps,
    host: Host,
) -> Done:
    """A later run past the point of no return: resume if that was not done, then as the first.

    `identity` is of the VMM that it found.
    """
    await host.snapshots.mark_consumed(record.ref, record.snapshot or 0)
    if identity is None:
        failure = Unavailable(
            f"VMM of instance {record.ref} exited after its snapshot was consumed",
            detail={"status": str(Status.FAILED)},
        ).not_retryable()
        failure = await with_end(failure, record, host)
        await fail_consumed(record, steps, host)
        raise failure
    vmm = host.vmms.api(record.jail_id)
    try:
        if await vmm.state() == "Paused":
            await steps.act("resume_vm", vmm.resume)
    finally:
        await vmm.close()
    async with RunningFile(host) as file:
        return await wake_resumed(record, identity, file, steps, host)


async def wake_resumed(
    record: InstanceRecord, identity: VmmIdentity, file: RunningFile, steps: Steps, host: Host
) -> Done:
    """Wake the agent of a guest that runs again, and set its clock; failures are reported."""
    detail, left_behind = await together(wake_guest(record, steps, host), file.write(record))
    if failures := {k: v for k, v in detail.items() if k in FAILURES}:
        await host.records.event(
            EventKind.SNAPSHOT,
            ref=record.ref,
            reason=next(text for name, text in FAILURES.items() if name in failures),
            detail=failures,
            command_id=steps.command_id,
        )
    awake = replace(record, vmm=identity, snapshot=None, consumed=True)
    return Done(
        changed=True,
        status=str(Status.RUNNING),
        detail={"pid": identity.pid, "launch": record.launch, **detail},
        left_behind=left_behind,
        record=final_record(awake, Status.RUNNING, host.facts.moment()),
    )


async def wake_guest(record: InstanceRecord, steps: Steps, host: Host) -> dict[str, object]:
    """Send `Wake` and set the clock, at once: the agent may take long to mount the drives, and
    until its clock is set the guest's time is that of its sleep.

    A failure is named in the reply's detail; the VM runs on. A later Stop or Destroy ends the waits
    for the agent.
    """
    port = record.agent_port
    if port is None:
        return {}
    left_s = steps.control.left_s()
    timeout_s = AGENT_TIMEOUT_S if left_s is None else max(0.1, min(AGENT_TIMEOUT_S, left_s))
    woken, clock = await together(
        wake_agent(record.jail_id, port, timeout_s, steps, host),
        set_clock(record.jail_id, port, timeout_s, steps, host),
    )
    return {**woken, **clock}


async def wake_agent(
    jail_id: str, port: int, timeout_s: float, steps: Steps, host: Host
) -> dict[str, object]:
    try:
        ack = await steps.act(
            "wake_agent",
            lambda: steps.control.unhurried(
                lambda: host.agents.wake(jail_id, port, timeout_s=timeout_s)
            ),
        )
    except Failure as error:
        return {"agent_failed": error.message}
    if ack is None:
        return {"agent_failed": WAIT_ENDED}
    return {} if ack.success else {"agent_failed": ack.detail or "refused without a reason"}


async def set_clock(
    jail_id: str, port: int, timeout_s: float, steps: Steps, host: Host
) -> dict[str, object]:
    try:
        was_off_s = await steps.act(
            "set_clock",
            lambda: steps.control.unhurried(
                lambda: host.agents.set_clock(jail_id, port, timeout_s=timeout_s)
            ),
        )
    except Failure as error:
        return {"clock_failed": error.message}
    return {"clock_failed": WAIT_ENDED} if was_off_s is None else {"clock_was_off_s": was_off_s}


async def fail_consumed(record: InstanceRecord, steps: Steps, host: Host) -> None:
    """The guest may have run and its VMM is gone: its snapshot must not be used again."""
    record = await release(record, steps, host, seen=False)
    await host.snapshots.delete_all(record.ref)
    now = host.facts.moment()
    await write_at_rest(record, Status.FAILED, host, now.wall_ms)
    gone = replace(record, vmm=None, uid_slot=None, snapshot=None, consumed=False)
    await host.records.put_instance(
        final_record(gone, Status.FAILED, now), reason="VMM exited during wake", durable=True
    )
