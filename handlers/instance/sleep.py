"""SleepInstance: drain, pause, write memory and state durably to disk, end the VMM.

The point of no return is the rename of the manifest. A paused VM without a manifest is resumed,
also by the run after a crash; one with a manifest is killed.
"""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum

from msgspec.structs import replace

from handlers.admission.disk_admission import SNAPSHOT_STATE_BYTES, DiskNeed, admitted, quota_of
from handlers.cancellation import together
from handlers.concurrency import limited
from handlers.control import Halted
from handlers.errors import Conflict, Failure, Unavailable
from handlers.instance.instance_file import write_at_rest
from handlers.instance.metering import asleep
from handlers.instance.release import discard_snapshots, end_vmm, release_launch
from handlers.instance.snapshot_steps import (
    Drains,
    DrainSpec,
    Pauses,
    PauseSpec,
    SnapshotDrafts,
    SnapshotDraftSpec,
    Transitions,
    TransitionSpec,
)
from handlers.instance.state import final_record, read_state
from handlers.interfaces import Host, VmmApi
from handlers.mechanism import Removable
from handlers.specs import MIB, SnapshotFacts, SnapshotInfo, SnapshotKey
from handlers.steps import Done, SnapshotMeasure, Steps
from schemas.envelopes import EventKind
from schemas.files import RuntimePolicy, TenantQuota
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef, SleepInstance
from schemas.usage import SnapshotSize

AGENT_SLACK_S = 2.0
PUBLISH = "publish_snapshot"


class Drain(StrEnum):
    """`detail.drain` of a Sleep: how the guest was drained."""

    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"
    NO_ANSWER = "no_answer"
    NO_AGENT = "no_agent"
    FORCED = "forced"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class DrainOutcome:
    """`reason` is the agent's, untrusted and bounded, for `refused`; else hostd's."""

    drain: Drain
    reason: str | None = None

    def detail(self) -> dict[str, str]:
        """As it is in a reply and an event."""
        reason = {} if self.reason is None else {"drain_reason": self.reason}
        return {"drain": self.drain.value, **reason}


async def sleep_instance(cmd: SleepInstance, steps: Steps, host: Host) -> Done:
    """Put a running instance to sleep; its guest continues where it was at the next Wake.

    A guest that does not answer the drain is put to sleep anyway; `detail.drain` and an event
    report it. Until the manifest is published a failure leaves the instance running.

    Raises:
        NotFound, Conflict: unknown here; not running; quarantined.
        Exhausted: the tenant's disk quota or this host's disk has no space for the snapshot.
        Unavailable: the VMM exited or did not answer.
        Superseded, Expired: only before the manifest is published.
    """
    state = await read_state(cmd.ref, host, host.facts.now_ms())
    state.refuse_unknown()
    record = state.record
    if record.status is Status.SLEEPING:
        return Done(changed=False, status=str(Status.SLEEPING))
    if state.status is not Status.RUNNING:
        raise state.conflict("put it to sleep", "running")
    info, quota = await together(host.snapshots.read(record.ref), quota_of(cmd.tenant_id, host))
    if info is not None and info.number == record.launch:
        # Published by a run that was cut after it, so the rest has to be completed.
        outcome = DrainOutcome(Drain.UNKNOWN, "the worker was restarted after the drain")
    else:
        state.refuse_incomplete(steps.command_id)
        info, outcome = await take_snapshot(cmd, record, quota, steps, host)
    steps.finalize()
    await end_vmm(record, steps, host)
    number = info.number
    now = host.facts.moment()
    ended, left_behind = await together(
        release_launch(
            record,
            steps,
            host,
            keep_flows=True,
            discard=lambda: discard_snapshots(record, steps, host, below=number),
        ),
        write_at_rest(record, Status.SLEEPING, host, now.wall_ms),
    )
    sleeper = replace(
        ended,
        vmm=None,
        vmm_version=ended.vmm_version or info.vmm_version,
        uid_slot=None,
        snapshot=number,
        consumed=False,
        metering=asleep(ended.metering, SnapshotSize(info.size_bytes, info.allocated_bytes)),
    )
    return Done(
        changed=True,
        status=str(Status.SLEEPING),
        detail={"snapshot": number, "size_bytes": info.size_bytes, **outcome.detail()},
        left_behind=left_behind,
        record=final_record(sleeper, Status.SLEEPING, now),
        snapshot=SnapshotMeasure(
            seconds=steps.seconds_of(Pauses.name, SnapshotDrafts.name, PUBLISH),
            size_bytes=info.size_bytes,
        ),
        # Not before the outcome, which it would slow down.
        afterwards=(("hash_memory", lambda: announce_hash(record.ref, number, host)),),
    )


async def take_snapshot(
    cmd: SleepInstance,
    record: InstanceRecord,
    quota: TenantQuota | None,
    steps: Steps,
    host: Host,
) -> tuple[SnapshotInfo, DrainOutcome]:
    """Drain, pause, write, publish; returns the snapshot and the outcome of the drain."""
    if record.vmm is None or not await host.vmms.alive(record.vmm):
        raise Unavailable(f"VMM of instance {record.ref} is not running").not_retryable()
    vmm = host.vmms.api(record.jail_id)
    need = DiskNeed(
        tenant_id=cmd.tenant_id,
        what=f"a snapshot of {record.ref}",
        size_bytes=record.mem_mib * MIB + SNAPSHOT_STATE_BYTES,
        replaces=record.ref,
        can_wait=not cmd.force,
    )
    try:
        async with AsyncExitStack() as claims:
            await together(
                claims.enter_async_context(admitted(need, quota, host)),
                together(let_run(vmm), announce(cmd, record, steps, host)),
            )
            return await drain_and_snapshot(cmd, record, vmm, steps, host)
    except Halted:
        await steps.undo()  # no guest stays paused or drained while no worker runs
        raise
    finally:
        await vmm.close()


async def let_run(vmm: VmmApi) -> None:
    """Resume it if an earlier run was cut between its pause and its manifest."""
    if await vmm.state() == "Paused":
        await vmm.resume()


async def announce(cmd: SleepInstance, record: InstanceRecord, steps: Steps, host: Host) -> None:
    """In reverse: the draft is removed, the VM resumed, its agent woken, the status restored."""
    planned: list[tuple[Removable, str]] = [(Transitions(host), str(record.ref))]
    if asks_agent(cmd, record):
        planned.append((Drains(host), str(record.ref)))
    planned.append((Pauses(host, seen_running=True), record.jail_id))
    planned.append((SnapshotDrafts(host), str(SnapshotKey(record.ref, record.launch))))
    await steps.announce(*planned)


def asks_agent(cmd: SleepInstance, record: InstanceRecord) -> bool:
    return not cmd.force and record.agent_port is not None


async def drain_and_snapshot(
    cmd: SleepInstance, record: InstanceRecord, vmm: VmmApi, steps: Steps, host: Host
) -> tuple[SnapshotInfo, DrainOutcome]:
    """From running to a published snapshot; its disk space is claimed.

    The status is written beside what needs no order with it: while the guest drains, and while it
    is paused.
    """
    pauses = Pauses(host, seen_running=True)
    _, outcome = await together(
        transition_to(Status.DRAINING, record, steps, host), drain_guest(cmd, record, steps, host)
    )
    async with limited(host.slots.snapshots, record.ref.tenant_id, "wait_snapshot_slot", steps):
        await together(
            transition_to(Status.SNAPSHOTTING, record, steps, host),
            steps.ensure(pauses, PauseSpec(record.jail_id)),
        )
        info = await write_snapshot(record, outcome.drain, vmm, steps, host)
    return info, outcome


async def transition_to(status: Status, record: InstanceRecord, steps: Steps, host: Host) -> None:
    spec = TransitionSpec(steps.command_id, record, status, host.facts.now_ms())
    await steps.ensure(Transitions(host), spec)


async def write_snapshot(
    record: InstanceRecord, drain: Drain, vmm: VmmApi, steps: Steps, host: Host
) -> SnapshotInfo:
    """Let the paused VMM write into its jail, move and hash the files, publish the manifest."""
    if record.revision is None or record.uid_slot is None:
        raise Conflict(
            f"instance {record.ref} has no launch in the journal: expected a revision and a uid"
        )
    facts = SnapshotFacts(
        ref=record.ref,
        number=record.launch,
        launch=record.launch,
        revision=record.revision,
        vcpus=record.vcpus,
        mem_mib=record.mem_mib,
        # What hostd launched; the guest may control the VMM by now.
        vmm_version=record.vmm_version or await vmm.version(),
        disk=record.disk,
        data_disk_path=host.data_disks.path(record.ref) if record.disk is not None else None,
        keep_drives=drain is not Drain.ACKNOWLEDGED,
    )
    uid = host.settings.vmm.uid_base + record.uid_slot
    info = await steps.ensure(
        SnapshotDrafts(host),
        SnapshotDraftSpec(SnapshotKey(record.ref, record.launch), uid, facts),
    )
    steps.control.safe_point()
    await steps.act(PUBLISH, lambda: host.snapshots.publish(record.ref, record.launch))
    return info


async def drain_guest(
    cmd: SleepInstance, record: InstanceRecord, steps: Steps, host: Host
) -> DrainOutcome:
    """Ask the guest agent to prepare for sleep, within the command's or the pool's timeout.

    A later Sleep with `force` ends the wait.
    """
    port = record.agent_port
    if port is None or not asks_agent(cmd, record):
        return DrainOutcome(Drain.FORCED if cmd.force else Drain.NO_AGENT)
    drain_s = await drain_timeout_s(cmd, host)

    async def ask() -> DrainOutcome:
        try:
            ack = await steps.control.unhurried(
                lambda: host.agents.sleep_prep(
                    record.jail_id, port, drain_timeout_s=drain_s, timeout_s=drain_s + AGENT_SLACK_S
                )
            )
        except Unavailable:
            return DrainOutcome(Drain.NO_ANSWER)
        if ack is None:
            return DrainOutcome(Drain.FORCED, "a later Sleep with force ended the drain")
        if ack.success:
            return DrainOutcome(Drain.ACKNOWLEDGED)
        return DrainOutcome(Drain.REFUSED, ack.detail or "no reason given")

    outcome = await steps.ensure(
        Drains(host), DrainSpec(record.ref, lambda: steps.control.interruptible(Drains.name, ask))
    )
    if outcome.drain is not Drain.ACKNOWLEDGED:
        await host.records.event(
            EventKind.SNAPSHOT,
            ref=record.ref,
            reason="guest was put to sleep without a drain",
            detail=outcome.detail(),
            command_id=steps.command_id,
        )
    return outcome


async def drain_timeout_s(cmd: SleepInstance, host: Host) -> int:
    """The command's timeout, or else the pool's; at most `[limits] max_drain_s`."""
    timeout_s = cmd.drain_timeout_secs
    if timeout_s is None:
        try:
            pool = await host.shared.pool(cmd.tenant_id, cmd.pool_id)
        except Failure:
            timeout_s = RuntimePolicy().drain_timeout_seconds
        else:
            timeout_s = pool.runtime_policy.drain_timeout_seconds
    return min(timeout_s, host.settings.limits.max_drain_s)


async def announce_hash(ref: InstanceRef, number: int, host: Host) -> None:
    """Hash the memory file and publish the hash as an event; nothing if it was woken meanwhile."""
    sha256 = await host.snapshots.hash_memory(ref, number)
    if sha256 is not None:
        await host.records.event(
            EventKind.SNAPSHOT, ref=ref, detail={"snapshot": number, "mem_sha256": sha256}
        )
