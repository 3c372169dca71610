"""DestroyInstance: remove everything, volumes wiped or kept. Never undone, always completed."""

from msgspec.structs import replace

from handlers.concurrency import limited
from handlers.errors import NotFound
from handlers.instance.artifact_refs import collect_revision
from handlers.instance.release import end_vmm, read_unseen, release_launch
from handlers.instance.state import final_record, read_state
from handlers.interfaces import Host
from handlers.steps import Done, Steps
from schemas.records import DiskIdentity, InstanceRecord, Status, Tombstone
from schemas.requests import DestroyInstance, InstanceRef


async def destroy_instance(cmd: DestroyInstance, steps: Steps, host: Host) -> Done:
    """Remove VMM, network, jail, snapshot and files of the instance; a tombstone remains.

    Works from the journal if `instance.json` is gone. With `wipe_volumes` it also wipes volumes
    that an earlier Destroy kept. An instance that is neither in the journal nor in the files is
    `Ok` with `detail.absent`.

    Raises:
        Conflict: the instance is quarantined: see docs/operations.md#unknown.
        Invalid: its recorded data disk is missing or another file; nothing was changed.
        HostFault: a volume could not be wiped and verified, or vanished meanwhile; send the command
            again, with a new id.
    """
    try:
        state = await read_state(cmd.ref, host, host.facts.now_ms())
    except NotFound:
        return await destroy_kept(cmd, steps, host)
    state.refuse_unknown()
    record = state.record
    if cmd.wipe_volumes and record.status is not Status.DESTROYING:
        await host.data_disks.check_wipe(cmd.ref, record.disk)
    steps.finalize()
    if record.status is not Status.DESTROYING:
        if record.status is not Status.STOPPING:
            record = await read_unseen(record, steps, host)
        record = replace(
            record,
            status=Status.DESTROYING,
            since_ms=host.facts.now_ms(),
            command_id=steps.command_id,
            before=replace(record, before=None),
        )
        await host.records.put_instance(record, durable=True)
    if record.launch:
        await end_vmm(record, steps, host)
        record = await release_launch(
            record, steps, host, settle=True, discard=lambda: delete_snapshots(cmd.ref, steps, host)
        )
    else:
        await delete_snapshots(cmd.ref, steps, host)
    if cmd.wipe_volumes:
        await wipe_volumes(record.ref, record.disk, steps, host)
        # Journalled before its name goes: from here on, a disk that is missing was wiped.
        record = replace(record, disk=None)
        await host.records.put_instance(record, durable=True)
    await remove_files(record.ref, cmd, steps, host)
    await collect_revision(record.ref, record.revision, host)
    return Done(
        changed=True,
        status=str(Status.DESTROYED),
        detail={"volumes": "wiped" if cmd.wipe_volumes else "kept"},
        record=final_record(record, Status.DESTROYED, host.facts.moment()),
        tombstone=tombstone_of(record, cmd, host),
    )


async def delete_snapshots(ref: InstanceRef, steps: Steps, host: Host) -> None:
    """The blocks of the memory are free on return."""
    await steps.act("discard_snapshot", lambda: host.snapshots.delete_all(ref))


async def destroy_kept(cmd: DestroyInstance, steps: Steps, host: Host) -> Done:
    """Only volumes that an earlier Destroy kept may be left to wipe."""
    tombstone = host.records.tombstone(cmd.ref)
    if tombstone is None:
        return Done(changed=False, detail={"absent": True})
    if not (cmd.wipe_volumes and tombstone.kept_volumes):
        return Done(changed=False, status=str(Status.DESTROYED))
    steps.finalize()
    await wipe_volumes(cmd.ref, tombstone.disk, steps, host)
    wiped = replace(tombstone, disk=None, at_ms=host.facts.now_ms())
    await host.records.drop_instance(cmd.ref, wiped)
    await remove_files(cmd.ref, cmd, steps, host)
    wiped = replace(wiped, kept_volumes=False, at_ms=host.facts.now_ms())
    await host.records.drop_instance(cmd.ref, wiped)
    return Done(changed=True, status=str(Status.DESTROYED), detail={"volumes": "wiped"})


async def wipe_volumes(
    ref: InstanceRef, disk: DiskIdentity | None, steps: Steps, host: Host
) -> None:
    async with limited(host.slots.wipes, ref.tenant_id, "wait_wipe_slot", steps):
        await steps.act("wipe_volumes", lambda: host.data_disks.wipe(ref, disk))


async def remove_files(ref: InstanceRef, cmd: DestroyInstance, steps: Steps, host: Host) -> None:
    keep = not cmd.wipe_volumes
    await steps.act("remove_files", lambda: host.shared.remove_instance(ref, keep_volumes=keep))


def tombstone_of(record: InstanceRecord, cmd: DestroyInstance, host: Host) -> Tombstone:
    return Tombstone(
        ref=record.ref,
        at_ms=host.facts.now_ms(),
        launch=record.launch,
        disk=record.disk,
        kept_volumes=not cmd.wipe_volumes and record.disk is not None,
    )
