"""StartInstance: from not running to a confined VMM whose guest agent answers."""

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager

from msgspec.structs import replace

from handlers.admission.disk_admission import JAIL_BYTES, DiskNeed, admitted
from handlers.cancellation import Interrupted, race, together
from handlers.concurrency import limited
from handlers.errors import Unavailable
from handlers.instance.artifact_refs import ensure_revision, release_revision
from handlers.instance.instance_file import RunningFile
from handlers.instance.jail_contents import boot_config
from handlers.instance.launch import LaunchedVmm, launched
from handlers.instance.launch_plan import (
    LaunchFiles,
    LaunchPlan,
    launch_of,
    newest_launch,
    read_start_files,
    reservation_spec,
)
from handlers.instance.reservations import Reservations
from handlers.instance.state import final_record, read_state
from handlers.instance.vmm_exit import EXIT_S, with_end
from handlers.interfaces import Host
from handlers.specs import MIB
from handlers.steps import Done, Steps
from schemas.records import InstanceRecord, Status, VmmIdentity
from schemas.requests import StartInstance

BOOT = "boot"


async def start_instance(cmd: StartInstance, steps: Steps, host: Host) -> Done:
    """Bring an instance that does not run, and does not sleep, to running.

    Idempotent: a step that finds its work done changes nothing, so a run after a crash continues
    where the last one stopped. A VMM that may have booted is adopted; if it is gone, the guest is
    not booted again under this command. On failure everything that this command made, in any of
    its runs, is removed, last first.

    Raises:
        NotFound, Invalid: a file of agentd is missing or wrong; names file and field.
        Conflict: it sleeps, is quarantined, its network is not set up, its address is in use.
        Exhausted: quota, memory, disk or uids are used up on this host.
        Unavailable: the guest agent did not answer in time; retry with a new id.
        HostFault: a limit or a confinement fact is not in effect; Firecracker's files changed.
    """
    state = await read_state(cmd.ref, host, host.facts.now_ms())
    state.refuse_unknown()
    state.refuse_incomplete(steps.command_id)
    if state.status is Status.RUNNING:
        return Done(changed=False, status=str(Status.RUNNING))
    if not state.status.at_rest:
        raise state.conflict("start it", "created, stopped or failed")
    await refuse_second_boot(state.record, steps, host)
    host.vmms.expect_launch()
    (files, revision), (version, newest) = await together(
        read_start_files(cmd.ref, state.record, host),
        together(host.vmms.version_for(None), newest_launch(state.record, host)),
    )
    async with admitted_launch(files, state.record, steps, host), host.warm.launch():
        record = await steps.ensure(
            Reservations(host),
            reservation_spec(
                files,
                state.record,
                steps,
                status=Status.STARTING,
                revision=revision,
                newest_launch=newest,
                vmm_version=version,
                now_ms=host.facts.now_ms(),
            ),
        )
        before = record.before.revision if record.before is not None else None
        # Before the slot: agentd's files decide how long an import takes.
        artifact = await ensure_revision(
            cmd.ref, record.revision or "", files.tenant.quotas, steps, host, can_wait=True
        )
        async with limited(host.slots.boots, cmd.tenant_id, "wait_boot_slot", steps):
            plan = LaunchPlan(
                launch_of(record, files.pool, host),
                artifact,
                may_have_booted=steps.marked(BOOT),
            )
            async with launched(plan, steps, host) as vm, RunningFile(host) as file:
                record = await record_of(vm)
                if vm.state == "Not started":
                    await configure_and_boot(vm, record, file, steps, host)
                else:
                    await host.records.put_instance(record)
                # Not concurrently: the guest boots meanwhile, and each would slow the other down.
                await steps.act(
                    "check_confinement",
                    lambda: host.vmms.check_confinement(vm.identity, vm.launch.vmm),
                )
                await wait_for_agent(vm, steps, host)
                left_behind = await file.write(record)
    final = final_record(record, Status.RUNNING, host.facts.moment())
    if before != record.revision:
        left_behind += await release_revision(cmd.ref, before, host)
    return Done(
        changed=True,
        status=str(Status.RUNNING),
        detail={"pid": vm.identity.pid, "launch": record.launch, "tap": vm.launch.names.tap},
        left_behind=left_behind,
        record=final,
    )


@asynccontextmanager
async def admitted_launch(
    files: LaunchFiles, record: InstanceRecord, steps: Steps, host: Host
) -> AsyncGenerator[None]:
    """Claim the space of the data disk, at its nominal size, and of the jail.

    A guest that may have booted is not given up for want of space: it has what it needs.
    """
    if steps.marked(BOOT):
        yield
        return
    ref = record.ref
    if record.disk is None:
        size_bytes = files.pool.instance_resources.data_disk_mib * MIB
        host_bytes = JAIL_BYTES
    else:
        size_bytes = 0
        host_bytes = JAIL_BYTES + await host.data_disks.unallocated_bytes(ref)

    def exists() -> bool:
        now = host.records.instance(ref)
        return now is not None and now.disk is not None and record.disk is None

    need = DiskNeed(
        tenant_id=ref.tenant_id,
        what=f"instance {ref} with its data disk",
        size_bytes=size_bytes,
        host_bytes=host_bytes,
        can_wait=True,
        exists=exists,
    )
    async with admitted(need, files.tenant.quotas, host):
        yield


async def refuse_second_boot(record: InstanceRecord, steps: Steps, host: Host) -> None:
    """No guest boots twice under one id: if it may have booted, its VMM must still run."""
    if steps.marked(BOOT) and await host.vmms.find(record.jail_id) is None:
        failure = Unavailable(
            f"VMM of instance {record.ref} exited during start; not rebooted because the guest may "
            "have run"
        ).not_retryable()
        raise await with_end(failure, record, host)


async def record_of(vm: LaunchedVmm) -> InstanceRecord:
    """With the version that was launched: the operator may have replaced Firecracker's files since
    the reservation."""
    return replace(vm.record, vmm_version=await vm.api.version())


async def configure_and_boot(
    vm: LaunchedVmm, record: InstanceRecord, file: RunningFile, steps: Steps, host: Host
) -> None:
    """Journal the VMM while it is configured. Past the mark `boot` the guest may have run, also if
    the worker is killed here."""
    config = boot_config(
        vm.launch,
        vm.artifact,
        vm.jail,
        has_data=vm.has_data_disk,
        boot_args=host.settings.vmm.boot_args,
    )
    await together(
        # In one commit, if the journal is idle.
        together(host.records.put_instance(record), steps.mark(BOOT)),
        steps.act("configure_vm", lambda: vm.api.configure(config)),
    )
    await together(steps.act("start_vm", vm.api.start), file.prepare(record))


async def wait_for_agent(vm: LaunchedVmm, steps: Steps, host: Host) -> None:
    """ "Running" in the API proves nothing: only the agent's answer does, if there is an agent."""
    port = vm.record.agent_port
    if port is None:
        return
    timeout_s = host.settings.vmm.ready_timeout_s

    async def ping() -> None:
        await host.agents.ping(vm.launch.jail_id, port, timeout_s=timeout_s)

    await steps.interruptible("wait_agent", lambda: race_vmm_exit(vm.identity, ping, host))


async def race_vmm_exit(
    identity: VmmIdentity, do: Callable[[], Coroutine[None, None, None]], host: Host
) -> None:
    """Do it until it is done or the VMM exits. A VMM closes its sockets before it has exited.

    Raises:
        Unavailable: the VMM exited; not retryable, since a guest must not boot twice under one id.
    """
    try:
        await race(do(), host.vmms.wait_exit(identity, float("inf")))
    except (Interrupted, Unavailable) as error:
        if isinstance(error, Unavailable) and not await host.vmms.wait_exit(identity, EXIT_S):
            raise
        message = "VMM exited before its guest agent answered"
        raise Unavailable(message).not_retryable() from error
