"""SleepInstance: drain, pause, memory and state durably to disk, then let the VMM go.

The point of no return is the manifest's rename. A paused VM without a manifest is resumed, also
by the run after a crash; one with a manifest is killed.
"""

from msgspec.structs import replace

from handlers.concurrency import held
from handlers.errors import Conflict, Failure, Unavailable
from handlers.instance.instance_file import write_at_rest
from handlers.instance.release import release
from handlers.instance.reservations import Phases, PhaseSpec
from handlers.instance.snapshot_steps import Draft, Drafts, DraftSpec, Pauses, PauseSpec
from handlers.instance.state import final_record, read_state
from handlers.interfaces import Host, Vmm
from handlers.specs import SnapshotFacts, SnapshotInfo
from handlers.steps import Done, Steps
from schemas.files import RuntimePolicy
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef, SleepInstance

AGENT_SLACK_S = 2.0


async def sleep_instance(cmd: SleepInstance, steps: Steps, host: Host) -> Done:
    """Put a running instance to sleep; its guest goes on where it was at the next Wake.

    A guest that does not answer the drain is put to sleep anyway; `detail.drain` and an event
    say so. Until the manifest stands a failure leaves the instance running, as it was.

    Raises:
        NotFound, Conflict: unknown here; not running; quarantined.
        Exhausted: no room for the snapshot on the disk.
        Unavailable: the VMM ended or did not answer.
        Superseded, Expired: only before the manifest stands.
    """
    state = await read_state(cmd.ref, host, host.facts.now_ms())
    state.refuse_unknown()
    record = state.record
    if record.status is Status.SLEEPING:
        return Done(changed=False, status=str(Status.SLEEPING))
    if state.status is not Status.RUNNING:
        raise state.conflict("put it to sleep")
    info = await host.snapshots.read(record.ref)
    if info is None or info.number != record.launch:
        state.refuse_half_done(steps.command_id)
    drain = "unknown: the worker was restarted after it"
    if info is None or info.number != record.launch:
        info, drain = await take_snapshot(cmd, record, steps, host)
    steps.finalize()
    await release(record, steps, host)
    await host.snapshots.delete_older(record.ref, info.number)
    number = info.number
    host.later("hash_memory", lambda: announce_hash(record.ref, number, host))
    now_ms = host.facts.now_ms()
    asleep = replace(record, vmm=None, uid_slot=None, snapshot=number, consumed=False)
    return Done(
        changed=True,
        status=str(Status.SLEEPING),
        detail={"snapshot": number, "size_bytes": info.size_bytes, "drain": drain},
        left_behind=await write_at_rest(record, Status.SLEEPING, host, now_ms),
        record=final_record(asleep, Status.SLEEPING, now_ms),
    )


async def take_snapshot(
    cmd: SleepInstance, record: InstanceRecord, steps: Steps, host: Host
) -> tuple[SnapshotInfo, str]:
    """Drain, pause, write, publish; returns the snapshot and how the drain went."""
    if record.vmm is None or not await host.vmms.alive(record.vmm):
        raise Unavailable(f"the VMM of instance {record.ref} is gone").not_retryable()
    vmm = host.vmms.api(record.jail_id)
    try:
        if await vmm.state() == "Paused":
            # An earlier run was cut between its pause and its manifest.
            await vmm.resume()
        now_ms = host.facts.now_ms()
        phase = PhaseSpec(steps.command_id, record, Status.DRAINING, now_ms)
        record = await steps.ensure(Phases(host), phase)
        drain = await drain_guest(cmd, record, steps, host)
        async with held(host.slots.snapshots, "wait_snapshots", steps):
            phase = PhaseSpec(steps.command_id, record, Status.SNAPSHOTTING, host.facts.now_ms())
            record = await steps.ensure(Phases(host), phase)
            info = await write_snapshot(record, drain, vmm, steps, host)
    finally:
        await vmm.close()
    return info, drain


async def write_snapshot(
    record: InstanceRecord, drain: str, vmm: Vmm, steps: Steps, host: Host
) -> SnapshotInfo:
    """Pause, let the VMM write into its jail, move, hash, and rename the manifest into place."""
    if record.revision is None or record.uid_slot is None:
        raise Conflict(f"instance {record.ref} has no launch in the journal")
    await steps.ensure(Pauses(host), PauseSpec(record.jail_id))
    facts = SnapshotFacts(
        ref=record.ref,
        number=record.launch,
        launch=record.launch,
        revision=record.revision,
        vcpus=record.vcpus,
        mem_mib=record.mem_mib,
        vmm_version=await vmm.version(),
        disk=record.disk,
        data_disk_path=host.data_disks.path(record.ref) if record.disk is not None else None,
        keep_drives=drain != "acknowledged",
    )
    uid = host.settings.vmm.uid_base + record.uid_slot
    info = await steps.ensure(Drafts(host), DraftSpec(Draft(record.ref, record.launch), uid, facts))
    steps.safe_point()
    await steps.act("publish", lambda: host.snapshots.publish(record.ref, record.launch))
    return info


async def drain_guest(cmd: SleepInstance, record: InstanceRecord, steps: Steps, host: Host) -> str:
    """Ask the guest to get ready for sleep, within the asked or the pool's time.

    Returns `forced`, `no agent`, `acknowledged`, `refused: <detail>` or `no answer`.
    """
    if cmd.force:
        return "forced"
    port = record.agent_port
    if port is None:
        return "no agent"
    drain_s = await drain_timeout_s(cmd, host)

    async def ask() -> str:
        try:
            ack = await host.agents.sleep_prep(
                record.jail_id, port, drain_timeout_s=drain_s, timeout_s=drain_s + AGENT_SLACK_S
            )
        except Unavailable:
            return "no answer"
        return "acknowledged" if ack.success else f"refused: {ack.detail or 'no reason given'}"

    drain = await steps.interruptible("drain", ask)
    if drain != "acknowledged":
        await host.records.event(
            "snapshot",
            ref=record.ref,
            reason="the guest was put to sleep without a drain",
            detail={"drain": drain},
            command_id=steps.command_id,
        )
    return drain


async def drain_timeout_s(cmd: SleepInstance, host: Host) -> int:
    """What was asked, or else the pool's policy; never more than `[limits] max_drain_s`."""
    asked = cmd.drain_timeout_secs
    if asked is None:
        try:
            pool = await host.shared.pool(cmd.tenant_id, cmd.pool_id)
        except Failure:
            asked = RuntimePolicy().drain_timeout_seconds
        else:
            asked = pool.runtime_policy.drain_timeout_seconds
    return min(asked, host.settings.limits.max_drain_s)


async def announce_hash(ref: InstanceRef, number: int, host: Host) -> None:
    """Hash the memory file in the background and say so; a snapshot woken meanwhile is skipped."""
    sha256 = await host.snapshots.hash_memory(ref, number)
    if sha256 is not None:
        await host.records.event(
            "snapshot", ref=ref, detail={"snapshot": number, "mem_sha256": sha256}
        )
