"""What hostd does about a VMM that ended by itself: clean up, say so, `failed`."""

from msgspec.structs import replace

from handlers.instance.instance_file import write_at_rest
from handlers.instance.launch import log_tail
from handlers.instance.release import release
from handlers.instance.state import final_record
from handlers.interfaces import Host
from handlers.steps import Steps
from schemas.records import Status
from schemas.requests import InstanceRef


async def vmm_exited(ref: InstanceRef, launch: int, steps: Steps, host: Host) -> bool:
    """Clean up after the VMM of a launch; false if that launch is not what runs any more.

    Exit 0 is no proof of an orderly end: a guest's triple fault ends the VMM with 0 too
    (a crash and a reboot look alike), so the status is `failed` in any case; but a VMM that ended
    with the boot of its host did not fail.
    """
    record = host.records.instance(ref)
    if record is None or record.launch != launch or record.status is not Status.RUNNING:
        return False
    if record.vmm is not None and await host.vmms.alive(record.vmm):
        return False
    steps.finalize()
    tail = await log_tail(record, host)
    await release(record, steps, host)
    await host.snapshots.delete_all(ref)
    now_ms = host.facts.now_ms()
    gone = replace(record, vmm=None, uid_slot=None, snapshot=None, consumed=False)
    reason, status = "the VMM ended by itself", Status.FAILED
    if record.vmm is not None and record.vmm.boot_id != host.facts.boot_id():
        reason, status = "the host was rebooted", Status.STOPPED
    await host.records.event(
        "vmm_exited",
        ref=ref,
        reason=reason,
        detail={"launch": launch, "log_tail": tail},
    )
    await host.records.put_instance(final_record(gone, status, now_ms), reason=reason, durable=True)
    await write_at_rest(record, status, host, now_ms)
    return True
