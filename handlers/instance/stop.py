"""StopInstance: from running or sleeping to stopped. Never undone, always completed."""

import time

from msgspec.structs import replace

from handlers.errors import Failure
from handlers.instance.instance_file import write_at_rest
from handlers.instance.release import release
from handlers.instance.state import RESTING, final_record, read_state
from handlers.interfaces import Host
from handlers.steps import Done, Steps
from schemas.records import InstanceRecord, Status
from schemas.requests import StopInstance

DEFAULT_BUDGET_S = 15.0
LAST_RUNG_S = 2.0


async def stop_instance(cmd: StopInstance, steps: Steps, host: Host) -> Done:
    """Leave no process, TAP, cgroup, jail or socket of the instance; volumes are kept.

    Asks the guest by Ctrl-Alt-Del, waits within the pool's `graceful_shutdown_seconds`, then
    kills; `detail.rung` says which worked. SIGTERM is not a rung: the VMM is pid 1 of its own pid
    namespace and ignores it (docs/adr/0004). A sleeping instance's snapshot is discarded.

    Raises:
        NotFound: neither journal nor files know the instance.
        Conflict: it is quarantined.
    """
    state = await read_state(cmd.ref, host, host.facts.now_ms())
    state.refuse_unknown()
    record = state.record
    if state.status in RESTING and record.before is None:
        return Done(changed=False, status=str(state.status))
    steps.finalize()
    if state.status is Status.SLEEPING:
        await steps.act("discard_snapshot", lambda: host.snapshots.delete_all(record.ref))
        return await stopped(record, "", host)
    budget_s = await stop_budget_s(record, steps, host)
    if record.status is not Status.STOPPING:
        record = replace(
            record,
            status=Status.STOPPING,
            since_ms=host.facts.now_ms(),
            command_id=steps.command_id,
            before=replace(record, before=None),
        )
        await host.records.put_instance(record)
    rung = await steps.act("stop_vmm", lambda: ask_then_kill(record, budget_s, host))
    return await finish_stop(record, steps, host, rung=rung)


async def finish_stop(
    record: InstanceRecord, steps: Steps, host: Host, *, rung: str = "kill"
) -> Done:
    """Release what the instance holds, whatever an earlier attempt left of it."""
    steps.finalize()
    await release(record, steps, host)
    await steps.act("discard_snapshot", lambda: host.snapshots.delete_all(record.ref))
    return await stopped(record, rung, host)


async def stopped(record: InstanceRecord, rung: str, host: Host) -> Done:
    """The outcome, with the courtesy copy written."""
    now_ms = host.facts.now_ms()
    left_behind = await write_at_rest(record, Status.STOPPED, host, now_ms)
    at_rest = replace(record, vmm=None, uid_slot=None, snapshot=None, consumed=False)
    return Done(
        changed=True,
        status=str(Status.STOPPED),
        detail={"rung": rung} if rung else {},
        left_behind=left_behind,
        record=final_record(at_rest, Status.STOPPED, now_ms),
    )


async def stop_budget_s(record: InstanceRecord, steps: Steps, host: Host) -> float:
    """The pool's grace, cut by the command's deadline. A pool without a file gets the default."""
    try:
        pool = await host.shared.pool(record.ref.tenant_id, record.ref.pool_id)
    except Failure:
        budget_s = DEFAULT_BUDGET_S
    else:
        budget_s = float(pool.runtime_policy.graceful_shutdown_seconds)
    left_s = steps.left_s()
    return budget_s if left_s is None else max(0.0, min(budget_s, left_s))


async def ask_then_kill(record: InstanceRecord, budget_s: float, host: Host) -> str:
    """Climb the rungs in one budget; the last one, SIGKILL, is `release`'s. Returns the rung."""
    identity = record.vmm
    if identity is None or not await host.vmms.alive(identity):
        return "gone"
    until = time.monotonic() + budget_s
    vmm = host.vmms.api(record.jail_id)
    try:
        await vmm.send_ctrl_alt_del()
    except Failure:
        return "kill"
    finally:
        await vmm.close()
    left_s = max(0.0, until - time.monotonic() - min(LAST_RUNG_S, budget_s / 4))
    if await host.vmms.wait_exit(identity, left_s):
        return "guest"
    return "kill"
