"""StartInstance: from at rest to a running, confined VMM whose guest agent answers."""

import dataclasses

from handlers.cancellation import together
from handlers.concurrency import held
from handlers.errors import Failure, Unavailable, Unsupported
from handlers.instance.artifact_refs import ensure_revision, release_revision
from handlers.instance.instance_file import write_running
from handlers.instance.launch import (
    CONFIG,
    DATA,
    INITRD,
    KERNEL,
    ROOTFS,
    SECRETS,
    SERIAL,
    VSOCK,
    Launch,
    Wanted,
    add_log,
    ensure_cgroup,
    ensure_port,
    jail_spec,
    launch_of,
    launch_resources,
    race_vmm_exit,
    read_wanted,
    record_disk,
    record_vmm,
    reservation,
)
from handlers.instance.reservations import Reservations
from handlers.instance.state import RESTING, final_record, read_state
from handlers.interfaces import Host
from handlers.mechanism import Removable
from handlers.specs import Artifact, BootConfig, DataDiskSpec, DriveConfig, Jail
from handlers.steps import Done, Steps
from schemas import naming
from schemas.records import InstanceRecord, Status, VmmIdentity
from schemas.requests import StartInstance

BOOT = "boot"


async def start_instance(cmd: StartInstance, steps: Steps, host: Host) -> Done:
    """Bring the instance from at rest to running.

    Idempotent: a step that finds its work done changes nothing, so a run after a crash goes on
    where the last one stopped; a VMM that may have booted is adopted, and where it is gone the
    guest is not booted again under this command. On failure all that this command made, in any
    of its runs, is removed, last first.

    Raises:
        NotFound, Invalid: a file of agentd is missing or wrong; names file and field.
        Conflict: it sleeps, is quarantined, its network is not set up, its address is taken.
        Exhausted: quota, memory, disk or uids are used up on this host.
        Unavailable: the guest agent did not answer in time; try again under a new id.
        HostFault: a limit or a confinement fact does not hold.
    """
    if cmd.volumes:
        raise Unsupported(
            "volumes are not supported by this version", path="$.request.StartInstance.volumes"
        )
    state = await read_state(cmd.ref, host, host.facts.now_ms())
    state.refuse_unknown()
    state.refuse_half_done(steps.command_id)
    if state.status is Status.RUNNING:
        return Done(changed=False, status=str(Status.RUNNING))
    if state.status not in RESTING:
        raise state.conflict("start it")
    await refuse_second_boot(state.record, steps, host)
    wanted = await read_wanted(cmd.ref, state.record, host)
    revision = await host.shared.current_revision(cmd.tenant_id, cmd.pool_id)
    record = await steps.ensure(
        Reservations(host),
        reservation(
            wanted,
            state.record,
            steps,
            status=Status.STARTING,
            revision=revision,
            now_ms=host.facts.now_ms(),
        ),
    )
    async with held(host.slots.boots, "wait_boots", steps):
        done = await boot(wanted, record, steps, host)
    before = record.before.revision if record.before is not None else None
    if before == record.revision:
        return done
    return dataclasses.replace(
        done, left_behind=(*done.left_behind, *await release_revision(cmd.ref, before, host))
    )


async def refuse_second_boot(record: InstanceRecord, steps: Steps, host: Host) -> None:
    """No guest boots twice under one id: if it may have booted, its VMM must still be there."""
    if steps.marked(BOOT) and await host.vmms.find(record.jail_id) is None:
        raise Unavailable(
            "the VMM ended while its start was under way; the guest may have run"
        ).not_retryable()


async def boot(wanted: Wanted, record: InstanceRecord, steps: Steps, host: Host) -> Done:
    """Make the place, launch, boot, wait for the agent, read the facts back."""
    launch = launch_of(record, wanted.pool, host)
    if (
        not steps.marked(BOOT)
        and await host.jails.exists(launch.jail_id)
        and await host.vmms.find(launch.jail_id) is None
    ):
        # What is left of a run cut before its VMM stood would be in the jailer's way.
        await host.jails.remove(launch.jail_id)
    artifact = await ensure_revision(launch.ref, record.revision or "", steps, host)
    await steps.announce(*coming(launch, host))
    _, (launch, jail, data_path) = await together(
        ensure_port(launch, steps, host), ensure_files(launch, artifact, steps, host)
    )
    identity = await steps.ensure(host.vmms, launch.vmm)
    vmm = host.vmms.api(launch.jail_id)
    try:
        record, state = await together(record_vmm(launch, identity, host), vmm.state())
        if state == "Not started":
            config = boot_config(launch, artifact, jail, has_data=data_path is not None, host=host)
            await together(steps.mark(BOOT), steps.act("configure", lambda: vmm.configure(config)))
            await steps.act("start_vm", vmm.start)
        # Not beside each other: the guest boots meanwhile, and each would hold the other up.
        await steps.act("check_confinement", lambda: check(launch, identity, host))
        await wait_for_agent(launch, identity, record.agent_port, steps, host)
    except Failure as failure:
        await add_log(failure, record, host)
        raise
    finally:
        await vmm.close()
    left_behind = await write_running(record, host, host.facts.now_ms())
    return Done(
        changed=True,
        status=str(Status.RUNNING),
        detail={"pid": identity.pid, "launch": record.launch, "tap": launch.names.tap},
        left_behind=left_behind,
        record=final_record(record, Status.RUNNING, host.facts.now_ms()),
    )


def coming(launch: Launch, host: Host) -> list[tuple[Removable, str]]:
    """All that the launch is going to make, in the order whose opposite is that of the undo."""
    disk = [(host.data_disks, str(launch.ref))] if has_data_disk(launch) else []
    return [
        *launch_resources(launch, host),
        *disk,
        (host.jails, launch.jail_id),
        (host.vmms, launch.jail_id),
    ]


def has_data_disk(launch: Launch) -> bool:
    return launch.pool.instance_resources.data_disk_mib > 0


async def ensure_files(
    launch: Launch, artifact: Artifact, steps: Steps, host: Host
) -> tuple[Launch, Jail, str | None]:
    """Cgroup, data disk and jail: all that the jailer needs, and nothing of the network."""
    await ensure_cgroup(launch, steps, host)
    launch, data_path = await ensure_data_disk(launch, steps, host)
    secrets = await host.shared.secrets(launch.ref.tenant_id)
    jail = await steps.ensure(host.jails, jail_spec(launch, artifact, data_path, secrets=secrets))
    return launch, jail, data_path


async def ensure_data_disk(launch: Launch, steps: Steps, host: Host) -> tuple[Launch, str | None]:
    """The data disk, made on the first start; its identity is journalled before it is used."""
    if not has_data_disk(launch):
        return launch, None
    size_mib = launch.pool.instance_resources.data_disk_mib
    disk = await steps.ensure(
        host.data_disks, DataDiskSpec(launch.ref, size_mib, launch.record.disk)
    )
    return await record_disk(launch, disk.identity, host), disk.path


async def check(launch: Launch, identity: VmmIdentity, host: Host) -> None:
    await host.vmms.check_confinement(identity, launch.vmm)


async def wait_for_agent(
    launch: Launch, identity: VmmIdentity, port: int | None, steps: Steps, host: Host
) -> None:
    """ "API says Running" proves nothing: only the agent's answer does, if there is an agent."""
    if port is None:
        return
    timeout_s = host.settings.vmm.ready_timeout_s

    async def ping() -> None:
        await host.agents.ping(launch.jail_id, port, timeout_s=timeout_s)

    async def answered() -> None:
        await race_vmm_exit(identity, ping, host)

    await steps.interruptible("agent_ready", answered)


def boot_config(
    launch: Launch, artifact: Artifact, jail: Jail, *, has_data: bool, host: Host
) -> BootConfig:
    """Drives in the order rootfs, config, data, secrets; a guest finds them by label."""
    drives = [DriveConfig("rootfs", ROOTFS, read_only=True, root_device=True)]
    if jail.has_config:
        drives.append(DriveConfig("config", CONFIG, read_only=True))
    if has_data:
        drives.append(DriveConfig("data", DATA, read_only=False))
    if jail.has_secrets:
        drives.append(DriveConfig("secrets", SECRETS, read_only=True))
    names = launch.names
    address = f"ip={names.guest_ip}::{names.net.gateway_ip}:{naming.netmask(names.net)}::eth0:off"
    extra = host.settings.vmm.boot_args
    return BootConfig(
        vcpus=launch.record.vcpus,
        mem_mib=launch.record.mem_mib,
        kernel=KERNEL,
        initrd=INITRD if artifact.initrd is not None else None,
        boot_args=" ".join(part for part in ("reboot=k panic=1", address, extra) if part),
        drives=tuple(drives),
        tap=names.tap,
        mac=names.mac,
        vsock=VSOCK,
        serial=SERIAL if launch.pool.serial else None,
    )
