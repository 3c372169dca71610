"""`release`: give up hostd's claim on an instance. Nothing is killed, nothing is removed.

The record goes. A VMM that runs goes on, as one without a record: it books its uid, memory, address
and jail ID, and `adopt` takes it up again. What it leaves when it ends is an orphan.
"""

from handlers.claims.adopt import Outcome
from handlers.claims.facts import Fact
from handlers.claims.look import look_for_unrecorded
from handlers.claims.traces import read_trace
from handlers.errors import Conflict
from handlers.interfaces import Host
from schemas.records import RELEASED, Status
from schemas.requests import InstanceRef


async def release_instance(ref: InstanceRef, host: Host) -> Outcome:
    """Drop the record. Idempotent; runs in the instance's lane.

    Raises:
        Conflict: it sleeps, which its snapshot says without a record too; or a previous command
            passed its point of no return and did not complete.
    """
    record = host.records.instance(ref)
    if record is None:
        return Outcome(changed=False, status=RELEASED)
    if record.before is not None or record.status is Status.SLEEPING:
        raise Conflict(
            f"instance {ref} is {record.status}: cannot release it, send StopInstance or "
            "DestroyInstance",
            detail={"status": str(record.status)},
        )
    trace = await read_trace(ref, record, host)
    for jail_id in trace.jails:
        # First: a worker that is killed here has the record, and one without it adopts nothing.
        await host.jails.set_released(jail_id, released=True)
    facts = (
        Fact("record", True, f"{record.status}, launch {record.launch}"),
        Fact(
            "VMM",
            bool(trace.jails),
            f"runs on in jail {', '.join(trace.jails)}" if trace.jails else "none runs",
            required=False,
        ),
        *trace.facts,
    )
    await host.records.release_instance(
        ref,
        reason="released by an operator",
        detail={
            "status": str(record.status),
            "launch": record.launch,
            "jails": list(trace.jails),
            "pids": [each.pid for each in trace.processes],
        },
    )
    await look_for_unrecorded(host)
    return Outcome(changed=True, status=RELEASED, facts=facts)
