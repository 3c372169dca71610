"""`adopt`: an operator's way to take up what hostd could not prove by itself, or has no record of.

What is there decides what is proved: a VMM in a jail of the instance, the rest of a launch whose
VMM has ended, or a data disk at rest. Nothing is killed, and without the required facts nothing is
changed. Runs in the instance's lane, so that no command is between reading and recording.
"""

from dataclasses import dataclass

from msgspec.structs import replace

from handlers.claims.facts import Fact, missing, not_proven, proven
from handlers.claims.look import look_for_unrecorded
from handlers.claims.traces import Trace, read_trace
from handlers.claims.vmm_facts import VmmClaim, prove_vmm
from handlers.errors import Conflict
from handlers.instance.instance_file import write_running
from handlers.instance.release import release
from handlers.instance.state import final_record, read_state
from handlers.interfaces import Host
from handlers.steps import Steps
from schemas.envelopes import EventKind
from schemas.records import InstanceRecord, NetworkRecord, Status
from schemas.requests import InstanceRef


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `adopt` or `release` did, and what was found on the way."""

    changed: bool
    status: str
    facts: tuple[Fact, ...] = ()

    def as_map(self) -> dict[str, object]:
        """For the answer."""
        return {
            "changed": self.changed,
            "status": self.status,
            "proved": proven(self.facts),
            "not_proved": not_proven(self.facts),
        }


async def adopt_instance(ref: InstanceRef, steps: Steps, host: Host) -> Outcome:
    """Make the instance `running`, or `stopped` with its data disk recorded, or change nothing.

    Idempotent: an instance that hostd has in its journal in such a state stays as it is.

    Raises:
        Conflict: a required fact is not proven; `detail` has what is, and what is not.
        NotFound, Invalid: of an instance without a record, `instance.json` is missing or malformed.
    """
    record = host.records.instance(ref)
    if record is not None and record.before is not None:
        raise Conflict(
            f"instance {ref} is {record.status}: a previous command did not complete; send "
            "StopInstance or DestroyInstance, which needs no adoption",
            detail={"status": str(record.status)},
        )
    if record is not None and record.status in {Status.RUNNING, Status.SLEEPING}:
        return Outcome(changed=False, status=str(record.status))
    trace = await read_trace(ref, record, host)
    if trace.jails:
        return await adopt_vmm(ref, record, trace, host)
    if record is not None and record.holds_host:
        return await end_quarantine(record, trace, steps, host)
    return await adopt_disk(ref, trace, host)


async def adopt_vmm(
    ref: InstanceRef, record: InstanceRecord | None, trace: Trace, host: Host
) -> Outcome:
    """A VMM runs in a jail of the instance: it is `running`, if it is proven."""
    claim = await prove_vmm(ref, record, trace, host)
    refuse_unproven(ref, claim.facts)
    adopted = replace(
        claim.record,
        status=Status.RUNNING,
        since_ms=host.facts.now_ms(),
        vmm=claim.identity,
        before=None,
        command_id=None,
    )
    await put_network(adopted, host)
    await record_adopted(adopted, claim.facts, host)
    await host.jails.set_released(adopted.jail_id, released=False)
    await resume_paused(claim, host)
    await look_for_unrecorded(host)  # it is recorded now
    await write_running(adopted, host)
    return Outcome(changed=True, status=str(Status.RUNNING), facts=claim.facts)


async def end_quarantine(record: InstanceRecord, trace: Trace, steps: Steps, host: Host) -> Outcome:
    """Its VMM has ended: what is left of the launch is removed, as after any exit."""
    ref = record.ref
    refuse_unproven(ref, trace.facts)
    disk = await host.data_disks.prove(ref, trace.owners)
    facts = (*trace.facts, *(disk.facts if disk is not None else ()))
    steps.finalize()
    record = await release(record, steps, host, seen=False)
    await host.snapshots.delete_all(ref)
    gone = replace(record, vmm=None, uid_slot=None, snapshot=None, consumed=False)
    await record_adopted(final_record(gone, Status.STOPPED, host.facts.moment()), facts, host)
    return Outcome(changed=True, status=str(Status.STOPPED), facts=facts)


async def adopt_disk(ref: InstanceRef, trace: Trace, host: Host) -> Outcome:
    """Nothing runs: the data disk that is there is the instance's, if it is proven."""
    state = await read_state(ref, host, host.facts.now_ms())
    if not state.status.at_rest:
        # A snapshot's manifest names the disk, and Wake works without a record.
        return Outcome(changed=False, status=str(state.status))
    disk = await host.data_disks.prove(ref, trace.owners)
    record, facts = state.record, trace.facts
    if disk is not None:
        facts = (*facts, *disk.facts)
    if disk is None or disk.identity == record.disk:
        if disk is None and record.disk is not None:
            facts = (*facts, Fact("disk", False, "the recorded data disk is missing"))
            refuse_unproven(ref, facts)
        return Outcome(changed=False, status=str(record.status), facts=facts)
    if record.disk is not None:
        known = f"inode {record.disk.ino}, {record.disk.size_bytes} bytes"
        facts = (*facts, Fact("recorded disk", False, f"another file than recorded: {known}"))
    refuse_unproven(ref, facts)
    adopted = replace(record, disk=disk.identity)
    await record_adopted(final_record(adopted, Status.STOPPED, host.facts.moment()), facts, host)
    return Outcome(changed=True, status=str(Status.STOPPED), facts=facts)


def refuse_unproven(ref: InstanceRef, facts: tuple[Fact, ...]) -> None:
    if gaps := missing(facts):
        reasons = "; ".join(f"{fact.name}: {fact.found}" for fact in gaps)
        raise Conflict(
            f"cannot adopt {ref}, nothing was changed: {reasons} (see docs/operations.md#unknown)",
            detail={"proved": proven(facts), "not_proved": not_proven(facts)},
        )


async def record_adopted(record: InstanceRecord, facts: tuple[Fact, ...], host: Host) -> None:
    """Durably, with an event that says on what proof.

    Raises:
        Conflict: another instance has come to have the uid or the address.
    """
    await host.records.put_with_event(
        record,
        EventKind.RECOVERED,
        reason="adopted by an operator",
        detail={
            "status": str(record.status),
            "proved": proven(facts),
            "not_proved": not_proven(facts),
        },
    )


async def put_network(record: InstanceRecord, host: Host) -> None:
    """Record the tenant's network too, so that it is kept in its desired state."""
    tenant_id = record.ref.tenant_id
    if record.net is not None and host.records.network(tenant_id) is None:
        now_ms = host.facts.now_ms()
        await host.records.put_network(
            NetworkRecord(tenant_id=tenant_id, net=record.net, status="up", since_ms=now_ms)
        )


async def resume_paused(claim: VmmClaim, host: Host) -> None:
    """A paused VM without a manifest is resumed: the sleep that paused it did not happen."""
    if claim.guest_state == "Paused":
        vmm = host.vmms.api(claim.record.jail_id)
        try:
            await vmm.resume()
        finally:
            await vmm.close()
