"""What can be proved of a VMM that runs in a jail of an instance."""

from dataclasses import dataclass

from handlers.claims.facts import Fact
from handlers.claims.traces import Trace
from handlers.errors import Conflict, Failure
from handlers.interfaces import Host, JailMetadata
from handlers.network_names import Names, names_of, network_specs
from handlers.specs import ExpectedNetwork, LaunchSpec
from schemas.records import InstanceRecord, VmmIdentity
from schemas.requests import InstanceRef


@dataclass(frozen=True, slots=True)
class VmmClaim:
    """Who the VMM is, the record of its launch, and what proves it."""

    record: InstanceRecord
    identity: VmmIdentity
    guest_state: str
    facts: tuple[Fact, ...]


async def prove_vmm(
    ref: InstanceRef, record: InstanceRecord | None, trace: Trace, host: Host
) -> VmmClaim:
    """Look at the VMM, its confinement, guest, port and disk. Changes nothing.

    Raises:
        Conflict: it is not clear which process, or which launch, it would be; `detail` has why.
    """
    facts = list(trace.facts)
    jail_id = trace.jails[0]
    if len(trace.jails) > 1:
        named = ", ".join(trace.jails)
        raise _refused(
            ref, f"VMMs run in {len(trace.jails)} of its jails: {named}; end all but one"
        )
    identity = await host.vmms.find(jail_id)
    if identity is None:
        pids = ", ".join(str(each.pid) for each in trace.processes) or "some process"
        raise _refused(
            ref,
            f"{pids} runs in jail {jail_id}, but none is the VMM: it must be in the cgroup of the "
            "jail, with the jail as its root directory and the jail's copy as its executable",
        )
    facts.append(
        Fact(
            "process",
            True,
            f"pid {identity.pid}, start {identity.start_ticks}, executable "
            f"{identity.exe_dev}:{identity.exe_ino} and root of jail {jail_id}, cgroup "
            f"{identity.cgroup}, boot {identity.boot_id}",
        )
    )
    metadata = await host.jails.metadata(jail_id)
    launched, claim = _launch(ref, jail_id, record, metadata)
    facts += claim
    if launched is None:
        raise _refused(ref, "; ".join(fact.found for fact in claim))
    recorded = record.vmm if record is not None and record.jail_id == jail_id else None
    if recorded is not None:
        same = recorded == identity
        found = (
            "as the journal has it"
            if same
            else f"the journal has {_differences(recorded, identity)}"
        )
        facts.append(Fact("identity in the journal", same, found, required=False))
    facts += _allocations(launched, host)
    state, seen = await _guest(launched, identity, host)
    facts += seen
    facts += await _port(launched, host)
    facts += await _disk(launched, identity, host)
    return VmmClaim(launched, identity, state, tuple(facts))


def _refused(ref: InstanceRef, reason: str) -> Conflict:
    return Conflict(
        f"cannot adopt {ref}, nothing was changed: {reason} (see docs/operations.md#unknown)",
        detail={"proved": [], "not_proved": [{"fact": "process", "found": reason}]},
    )


def _launch(
    ref: InstanceRef,
    jail_id: str,
    record: InstanceRecord | None,
    metadata: JailMetadata | None,
) -> tuple[InstanceRecord | None, list[Fact]]:
    """The record of the launch: the journal's, if it is of this jail, else the jail's own."""
    ours = record is not None and record.jail_id == jail_id and record.uid_slot is not None
    if metadata is None:
        found = f"jail {jail_id} has no metadata (hostd.json), or it is damaged"
        return (record if ours else None), [Fact("jail metadata", False, found, required=not ours)]
    noted = metadata.record
    if metadata.ref != ref or noted is None or noted.jail_id != jail_id:
        found = f"the metadata of jail {jail_id} is of {metadata.ref}, or has no record of a launch"
        return None, [Fact("jail metadata", False, found)]
    facts = [Fact("jail metadata", True, f"launch {noted.launch} with uid {metadata.uid}")]
    return (record if ours else noted), facts


def _differences(recorded: VmmIdentity, found: VmmIdentity) -> str:
    """What the journal has of each field that differs."""
    return ", ".join(
        f"{name} {getattr(recorded, name)}"
        for name in recorded.__struct_fields__
        if getattr(recorded, name) != getattr(found, name)
    )


def _allocations(launched: InstanceRecord, host: Host) -> list[Fact]:
    """Nobody else has its uid and its address by now."""
    ref, slot, offset = launched.ref, launched.uid_slot, launched.offset
    holder = None if slot is None else host.records.with_slot(slot)
    other = None if offset is None else host.records.with_offset(ref.tenant_id, offset)
    return [
        Fact(
            "uid is free",
            slot is not None and holder in {None, ref},
            f"slot {slot}" if holder in {None, ref} else f"slot {slot} belongs to {holder}",
        ),
        Fact(
            "address is free",
            other is None or other.ref == ref,
            f"offset {offset}" if other is None else f"offset {offset} belongs to {other.ref}",
        ),
    ]


async def _guest(
    launched: InstanceRecord, identity: VmmIdentity, host: Host
) -> tuple[str, list[Fact]]:
    """Confinement, and whether the guest was started and does not sleep."""
    uid = host.settings.vmm.uid_base + (launched.uid_slot or 0)
    spec = LaunchSpec(jail_id=launched.jail_id, uid=uid, cgroup=identity.cgroup)
    facts: list[Fact] = []
    try:
        await host.vmms.check_confinement(identity, spec)
        facts.append(Fact("confinement", True, f"uid and gid {uid}, no capabilities, seccomp"))
    except Failure as failure:
        facts.append(Fact("confinement", False, failure.message))
    vmm = host.vmms.api(launched.jail_id)
    state = ""
    try:
        state = await vmm.state()
        facts.append(Fact("guest", state in {"Running", "Paused"}, f"the API says {state!r}"))
    except Failure as failure:
        facts.append(Fact("guest", False, failure.message))
    finally:
        await vmm.close()
    asleep = await host.snapshots.read(launched.ref)
    if asleep is not None and asleep.number == launched.launch:
        found = "a published snapshot of this launch is there, so the instance sleeps: end the VMM"
        facts.append(Fact("no snapshot", False, found))
    return state, facts


async def _port(launched: InstanceRecord, host: Host) -> list[Fact]:
    """The TAP and its pin. What is missing of them is repaired by the reconciler afterwards."""
    names = names_of(launched)
    if names is None or launched.uid_slot is None:
        return [Fact("TAP", False, "the launch has no network address")]
    uid = host.settings.vmm.uid_base + launched.uid_slot
    owner = (await host.taps.owners()).get(names.tap)
    if owner is None:
        found = f"{names.tap} is gone: the guest has no network until its next start"
        return [Fact("TAP", False, found, required=False)]
    ours = (owner.instance, owner.uid) == (str(launched.ref), uid)
    found = f"{names.tap} is of {owner.instance} and uid {owner.uid}"
    facts = [Fact("TAP", ours, found if ours else f"{found}, expected {launched.ref} and {uid}")]
    return [*facts, await _held(launched, names, uid, host)]


async def _held(launched: InstanceRecord, names: Names, uid: int, host: Host) -> Fact:
    rules, bridge = network_specs(launched.ref.tenant_id, names.net)
    ports = ((names.pin, names.tap_spec(launched.ref, uid)),)
    damaged = await host.networks.damaged([ExpectedNetwork(rules, bridge, ports)], rules_only=False)
    pin = f"{names.tap} may send from {names.mac} and {names.guest_ip} only"
    found = pin if not damaged else "rules, pin or bridge are not as expected; they are repaired"
    return Fact("pins", not damaged, found, required=False)


async def _disk(launched: InstanceRecord, identity: VmmIdentity, host: Host) -> list[Fact]:
    """The recorded disk, open by the VMM alone. agentd may have moved the name: not required."""
    if launched.disk is None:
        return []
    uid = host.settings.vmm.uid_base + (launched.uid_slot or 0)
    disk = await host.data_disks.prove(launched.ref, (uid,), used_by=identity.pid)
    if disk is None or disk.identity is None:
        return [Fact("data disk", False, "it is not where it was made", required=False)]
    same = disk.identity.ino == launched.disk.ino
    gaps = [fact for fact in disk.facts if fact.required and not fact.proven]
    if same and not gaps:
        return [Fact("data disk", True, f"inode {disk.identity.ino}, open by the VMM alone")]
    reasons = "; ".join(f"{fact.name}: {fact.found}" for fact in gaps) or "another inode"
    # Another process that writes to the disk of a running guest damages it.
    used = any(fact.name == "use" for fact in gaps)
    return [Fact("data disk", False, reasons, required=used)]
