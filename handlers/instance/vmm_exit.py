"""Handle the unexpected exit of a VMM: find out why, clean up, publish an event, set `failed`."""

import contextlib
from typing import Final

from msgspec.structs import replace

from handlers.errors import Failure, Superseded
from handlers.instance.instance_file import write_at_rest
from handlers.instance.release import release
from handlers.instance.state import final_record
from handlers.instance.vmm_log import add_log, log_tail
from handlers.interfaces import Host
from handlers.steps import Steps
from handlers.vmm_ends import ExitStatus, end_of, facts_of, failure_of, text_of
from schemas.envelopes import EventKind
from schemas.records import InstanceRecord, Status, VmmEnd
from schemas.requests import InstanceRef

# A VMM that ends closes its connections before it has exited.
EXIT_S: Final = 0.1


async def vmm_exited(
    ref: InstanceRef,
    launch: int,
    status: ExitStatus,
    steps: Steps,
    host: Host,
    *,
    seen: bool = True,
) -> VmmEnd | None:
    """Clean up after the VMM of a launch; None if that launch is no longer the current one.

    Exit code 0 does not prove an orderly shutdown: after a guest's triple fault the VMM exits with
    0 too, so the status is `failed` in any case. A VMM that ended because its host was rebooted did
    not fail. `seen` is false if no worker watched it when it ended.
    """
    record = host.records.instance(ref)
    if record is None or record.launch != launch or not record.status.expects_vmm:
        return None
    if record.vmm is not None and await host.vmms.alive(record.vmm):
        return None
    steps.finalize()
    tail = await log_tail(record, host)
    end = await why_ended(record, status, tail, host)
    record = await release(record, steps, host, seen=seen)
    await host.snapshots.delete_all(ref)
    gone = replace(record, vmm=None, uid_slot=None, snapshot=None, consumed=False, last_end=end)
    reason, status_now = f"VMM exited unexpectedly: {text_of(end)}", Status.FAILED
    if end.reason == "host_reboot":
        reason, status_now = text_of(end), Status.STOPPED
    await host.records.event(
        EventKind.VMM_EXITED, ref=ref, reason=reason, detail={**facts_of(end), "log_tail": tail}
    )
    await host.records.put_instance(
        final_record(gone, status_now, replace(host.facts.moment(), wall_ms=end.at_ms)),
        reason=reason,
        detail=facts_of(end),
        durable=True,
    )
    await write_at_rest(record, status_now, host, end.at_ms)
    return end


async def why_ended(record: InstanceRecord, status: ExitStatus, log: str, host: Host) -> VmmEnd:
    """Before the release, which removes the cgroup that counts what the OOM killer did."""
    at_ms = host.facts.now_ms()
    if record.vmm is not None and record.vmm.boot_id != host.facts.boot_id():
        return VmmEnd(reason="host_reboot", evidence="kernel", launch=record.launch, at_ms=at_ms)
    if record.hung is not None and record.hung.killed and status.code is None:
        return VmmEnd(
            reason="hung",
            evidence="hostd",
            launch=record.launch,
            at_ms=at_ms,
            signal=status.signal,
        )
    oom = None
    with contextlib.suppress(Failure, OSError):  # the cleanup itself matters more
        oom = await host.cgroups.oom_counts(record.cgroup_key)
    return end_of(status, oom, log.encode(), launch=record.launch, at_ms=at_ms)


async def with_end(failure: Failure, record: InstanceRecord, host: Host) -> Failure:
    """The failure with the end of the VMM's log, and with why the VMM ended, if it has ended.

    Before anything of the launch is removed: its cgroup and its log say why.
    """
    if isinstance(failure, Superseded):
        return failure
    await add_log(failure, record, host)
    if record.vmm is None:
        return failure
    with contextlib.suppress(Failure, OSError):  # the failure itself matters more
        if await host.vmms.wait_exit(record.vmm, EXIT_S):
            status = await host.vmms.exit_status(record.vmm)
            log = await log_tail(record, host)
            return failure_of(failure, await why_ended(record, status, log, host))
    return failure
