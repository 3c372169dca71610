"""Handle the unexpected exit of a VMM: clean up, publish an event, set `failed`."""

from msgspec.structs import replace

from handlers.instance.instance_file import write_at_rest
from handlers.instance.release import release
from handlers.instance.state import final_record
from handlers.instance.vmm_log import log_tail
from handlers.interfaces import Host
from handlers.steps import Steps
from schemas.envelopes import EventKind
from schemas.records import Status
from schemas.requests import InstanceRef


async def vmm_exited(ref: InstanceRef, launch: int, steps: Steps, host: Host) -> bool:
    """Clean up after the VMM of a launch; false if that launch is no longer the current one.

    Exit status 0 does not prove an orderly shutdown: after a guest's triple fault the VMM exits
    with 0 too (a crash and a reboot look alike), so the status is `failed` in any case. A VMM that
    ended because its host was rebooted did not fail.
    """
    record = host.records.instance(ref)
    if record is None or record.launch != launch or not record.status.expects_vmm:
        return False
    if record.vmm is not None and await host.vmms.alive(record.vmm):
        return False
    steps.finalize()
    tail = await log_tail(record, host)
    await release(record, steps, host)
    await host.snapshots.delete_all(ref)
    now_ms = host.facts.now_ms()
    gone = replace(record, vmm=None, uid_slot=None, snapshot=None, consumed=False)
    reason, status = "VMM exited unexpectedly", Status.FAILED
    if record.vmm is not None and record.vmm.boot_id != host.facts.boot_id():
        reason, status = "the host was rebooted", Status.STOPPED
    await host.records.event(
        EventKind.VMM_EXITED,
        ref=ref,
        reason=reason,
        detail={"launch": launch, "log_tail": tail},
    )
    await host.records.put_instance(final_record(gone, status, now_ms), reason=reason, durable=True)
    await write_at_rest(record, status, host, now_ms)
    return True
