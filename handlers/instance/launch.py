r"""Launching, shared by Start and Wake: from a plan to a running VMM with its network.

The steps are announced; meanwhile a boot's old flows are flushed, or a wake's snapshot is verified.
Then branches run concurrently, since they need nothing of each other:

    port:   pin -> TAP
    files:  cgroup
            data disk -> jail -> VMM (the jailer)
                           \-> a wake's snapshot: linked into the jail

    with a VMM that was launched ahead:
    files:  cgroup -> VMM moves into it
            data disk -> jail -> a wake's snapshot: linked into the jail

and meet before the VMM is told of its devices, i.e. configured or loaded. Its identity is committed
beside that, before a guest runs. What the order is for:

- the rules of the network are in force before the TAP is up, and the TAP before its first use;
- the cgroup exists before the jailer runs, which silently continues without a missing one;
- the jail's files exist before the jailer runs, which chroots into it.

Undo follows the order in which the steps are announced, in reverse: so a VMM is gone before its
jail, a jail before the data disk or snapshot that it links, and all of them before TAP and pin.
"""

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from msgspec.structs import replace

from handlers.cancellation import together
from handlers.errors import Conflict, Failure
from handlers.instance.jail_contents import jail_spec
from handlers.instance.launch_plan import Launch, LaunchPlan, cgroup_spec
from handlers.instance.metering import began
from handlers.instance.release import flush_conntrack
from handlers.instance.snapshot_steps import SnapshotUses, SnapshotUseSpec
from handlers.instance.vmm_exit import with_end
from handlers.interfaces import ClaimedVmm, Host, VmmApi
from handlers.mechanism import Removable
from handlers.specs import (
    Artifact,
    DataDisk,
    DataDiskSpec,
    Jail,
    SnapshotInfo,
    SnapshotKey,
)
from handlers.steps import Steps
from schemas.records import DiskIdentity, InstanceRecord, VmmIdentity


@dataclass(frozen=True, slots=True)
class LaunchedVmm:
    """A VMM that runs. `record` has its identity, by which a restarted worker adopts it: to be
    journalled before a guest runs. `state` is what its API reported after the launch.
    """

    launch: Launch
    record: InstanceRecord
    identity: VmmIdentity
    api: VmmApi
    state: str
    artifact: Artifact
    jail: Jail
    has_data_disk: bool
    snapshot_paths: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class VmmFiles:
    """What the files' branch of a launch made. `snapshot_paths` are those of the verified state and
    memory as the VMM sees them; None for a boot, and if the VMM ran already.
    """

    launch: Launch
    jail: Jail
    identity: VmmIdentity
    snapshot_paths: tuple[str, str] | None


@asynccontextmanager
async def launched(plan: LaunchPlan, steps: Steps, host: Host) -> AsyncGenerator[LaunchedVmm]:
    """Make everything that the VMM needs and launch it; or find it running.

    A failure inside the context gets the end of the VMM's log, and why the VMM ended, if it has.
    The connection to the VMM's API is closed at the end of the context; the VMM stays.
    """
    runs = await remove_stale_jail(plan, host)
    # The rest needs no row: it changes nothing of the launch's own.
    await together(
        steps.announce(*planned_steps(plan, host)), clear_the_way(plan, steps, host, runs=runs)
    )
    made, _ = await together(
        ensure_vmm(plan, steps, host, runs=runs), ensure_port(plan.launch, steps, host)
    )
    launch = made.launch
    api = host.vmms.api(launch.jail_id)
    try:
        record = record_with(made.identity, launch, host)
        host.seen_alive[launch.ref] = made.identity
        yield LaunchedVmm(
            launch=launch,
            record=record,
            identity=made.identity,
            api=api,
            state=await api.state(),
            artifact=plan.artifact,
            jail=made.jail,
            has_data_disk=makes_data_disk(plan),
            snapshot_paths=made.snapshot_paths,
        )
    except Failure as failure:
        explained = await with_end(failure, replace(launch.record, vmm=made.identity), host)
        if explained is failure:
            raise
        raise explained from failure
    finally:
        await api.close()


async def clear_the_way(plan: LaunchPlan, steps: Steps, host: Host, *, runs: bool) -> None:
    """What must precede the launch and makes nothing of it: no flow is left at the address of a
    guest that boots, and the snapshot of one that wakes is what was saved."""
    launch, snapshot = plan.launch, plan.snapshot
    if snapshot is not None:
        if not runs:
            await verify_snapshot(launch, snapshot, steps, host)
    elif not plan.may_have_booted:
        # What a failed start at this address left: its undo removes the TAP, not the flows.
        await flush_conntrack(launch.record, steps, host)


async def verify_snapshot(launch: Launch, info: SnapshotInfo, steps: Steps, host: Host) -> None:
    """Show that its files are what was saved, by all that needs no VMM."""
    ref = launch.ref
    await steps.act("verify_snapshot", lambda: host.snapshots.verify(ref, info.number))


async def remove_stale_jail(plan: LaunchPlan, host: Host) -> bool:
    """Remove the jail of a run that was cut before its VMM ran: the jailer refuses to reuse it.

    Returns whether the jail is there to stay, i.e. its VMM runs or the guest may have booted.
    """
    jail_id = plan.launch.jail_id
    if plan.may_have_booted:
        return True
    if not await host.jails.exists(jail_id):
        return False
    if await host.vmms.find(jail_id) is not None:
        return True
    await host.jails.remove(jail_id)
    if plan.snapshot is not None:
        await host.snapshots.restore_ownership(plan.launch.ref, plan.snapshot.number)
    return False


def planned_steps(plan: LaunchPlan, host: Host) -> list[tuple[Removable, str]]:
    """Everything that the launch makes and undo removes; undo goes through it in reverse."""
    launch = plan.launch
    names = launch.names
    planned: list[tuple[Removable, str]] = [
        (host.cgroups, launch.record.cgroup_key),
        (host.pins, names.pin.key),
        (host.taps, names.tap),
    ]
    if plan.snapshot is not None:
        planned.append((SnapshotUses(host), str(SnapshotKey(launch.ref, plan.snapshot.number))))
    elif makes_data_disk(plan):
        planned.append((host.data_disks, str(launch.ref)))
    return [*planned, (host.jails, launch.jail_id), (host.vmms, launch.jail_id)]


def makes_data_disk(plan: LaunchPlan) -> bool:
    return plan.launch.pool.instance_resources.data_disk_mib > 0


async def ensure_port(launch: Launch, steps: Steps, host: Host) -> None:
    """The pin and then the TAP, under the tenant's network lock."""
    async with host.locks.shared(launch.ref.tenant_id, steps.control):
        network = host.records.network(launch.ref.tenant_id)
        if network is None or network.status != "up":
            raise Conflict(f"network of tenant {launch.ref.tenant_id} was torn down")
        await steps.ensure(host.pins, launch.names.pin)
        await steps.ensure(host.taps, launch.names.tap_spec(launch.ref, launch.vmm.uid))


async def ensure_vmm(plan: LaunchPlan, steps: Steps, host: Host, *, runs: bool) -> VmmFiles:
    """Files and VMM; `runs` if an earlier run launched it, and perhaps loaded the snapshot.

    A VMM that was launched ahead enters the launch's cgroup while the files are made; then it is
    found in the jail that it came with. Without one, or if it was lost, the jailer runs, and a
    snapshot is linked meanwhile.
    """
    async with host.warm.used_by(plan.launch.vmm) as warm:
        (launch, jail, paths), _ = await together(
            ensure_files(plan, steps, host, warm=warm, runs=runs),
            ensure_cgroup(plan.launch, steps, host, warm=warm),
        )
    if plan.snapshot is None or runs or paths is not None:
        return VmmFiles(launch, jail, await steps.ensure(host.vmms, launch.vmm), paths)
    identity, paths = await together(
        steps.ensure(host.vmms, launch.vmm), link_snapshot(launch, plan.snapshot, steps, host)
    )
    return VmmFiles(launch, jail, identity, paths)


async def link_snapshot(
    launch: Launch, info: SnapshotInfo, steps: Steps, host: Host
) -> tuple[str, str]:
    """Link the verified snapshot into the jail; the paths of state and memory as the VMM sees them.

    Which VMM version wrote them is compared before the load: it is known once the VMM runs.
    """
    jail_id, uid = launch.jail_id, launch.vmm.uid
    return await steps.act("link_snapshot", lambda: host.snapshots.link(jail_id, uid, info))


async def ensure_files(
    plan: LaunchPlan, steps: Steps, host: Host, *, warm: ClaimedVmm | None, runs: bool
) -> tuple[Launch, Jail, tuple[str, str] | None]:
    """Data disk and jail: that of a VMM that was launched ahead, if there is one.

    Into such a jail a snapshot is linked at once, since no jailer runs meanwhile; the paths of it.
    """
    launch, disk = await ensure_data_disk(plan, steps, host)
    snapshot = plan.snapshot
    if snapshot is None:
        secrets = await host.shared.secrets(launch.ref.tenant_id)
        spec = jail_spec(launch, plan.artifact, disk, secrets=secrets)
    else:
        use = SnapshotUseSpec(SnapshotKey(launch.ref, snapshot.number))
        await steps.ensure(SnapshotUses(host), use)
        secrets = await host.shared.secrets(launch.ref.tenant_id) if snapshot.has_secrets else None
        if snapshot.has_secrets and secrets is None:
            # The sleeping guest has a secrets drive: it gets one, though the secrets were removed.
            secrets = b"{}\n"
        spec = jail_spec(
            launch,
            plan.artifact,
            disk,
            secrets=secrets,
            kept_config=snapshot.kept_config,
            kept_secrets=snapshot.kept_secrets,
        )
    if warm is None:
        return launch, await steps.ensure(host.jails, spec), None
    jail = await steps.ensure(host.jails, dataclasses.replace(spec, warm=warm.jail_id))
    if snapshot is None or runs:
        return launch, jail, None
    return launch, jail, await link_snapshot(launch, snapshot, steps, host)


async def ensure_cgroup(
    launch: Launch, steps: Steps, host: Host, *, warm: ClaimedVmm | None
) -> None:
    """The leaf that the VMM is started in, with its limits in force; or enters, if it runs."""
    await steps.ensure(host.cgroups, cgroup_spec(launch.record, host))
    if warm is not None:
        await warm.enter()


async def ensure_data_disk(
    plan: LaunchPlan, steps: Steps, host: Host
) -> tuple[Launch, DataDisk | None]:
    """The data disk, if the instance has one: its identity is journalled before it is used.

    The first start makes it. A wake takes the disk that slept with the instance, never a new one.
    """
    launch = plan.launch
    spec = DataDiskSpec(
        launch.ref,
        launch.pool.instance_resources.data_disk_mib,
        launch.record.disk,
        asleep=plan.snapshot is not None,
    )
    if plan.snapshot is None:
        if not makes_data_disk(plan):
            return launch, None
        disk = await steps.ensure(host.data_disks, spec)
    else:
        if launch.record.disk is None:
            return launch, None
        disk = await steps.ensure_kept(host.data_disks, spec)
    return await record_disk(launch, disk.identity, host), disk


def record_with(identity: VmmIdentity, launch: Launch, host: Host) -> InstanceRecord:
    """The instance's record with its VMM, which lives from now on. Changes nothing."""
    record = host.records.instance(launch.ref)
    if record is None:
        raise Conflict(f"instance {launch.ref} is no longer in the journal")
    return replace(record, vmm=identity, metering=began(record, host.facts.moment()))


async def record_disk(launch: Launch, disk: DiskIdentity, host: Host) -> Launch:
    """Journal the data disk's identity, synced: another file in its place is refused."""
    record = launch.record
    if record.disk == disk:
        return launch
    record = replace(record, disk=disk)
    await host.records.put_instance(record, durable=True)
    return dataclasses.replace(launch, record=record)
