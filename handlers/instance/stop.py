"""StopInstance: from running or sleeping to stopped. Never undone, always completed."""

import time
from enum import StrEnum

from msgspec.structs import replace

from handlers.cancellation import together
from handlers.errors import Failure
from handlers.instance.instance_file import write_at_rest
from handlers.instance.release import (
    discard_snapshots,
    end_vmm,
    flush_conntrack,
    nothing,
    read_unseen,
    release_launch,
)
from handlers.instance.state import final_record, read_state
from handlers.interfaces import Host
from handlers.steps import Done, Steps
from schemas.records import InstanceRecord, Status
from schemas.requests import StopInstance

DEFAULT_BUDGET_S = 15.0
KILL_RESERVE_S = 2.0


class StopMethod(StrEnum):
    """`detail.method` of a Stop: what ended the VMM."""

    GRACEFUL = "graceful"
    SIGKILL = "sigkill"
    ALREADY_EXITED = "already_exited"


async def stop_instance(cmd: StopInstance, steps: Steps, host: Host) -> Done:
    """Leave no process, cgroup, jail or socket of the instance, and no use of its TAP.

    Asks the guest by Ctrl-Alt-Del, waits within the pool's `graceful_shutdown_seconds`, then
    sends SIGKILL; `detail.method` says what ended the VMM. SIGTERM is not sent: the VMM is pid 1 of
    its pid namespace and ignores it (docs/adr/0004). A sleeping instance's snapshot is discarded.

    Raises:
        NotFound: the instance is neither in the journal nor in the files.
        Conflict: it is quarantined.
    """
    state = await read_state(cmd.ref, host, host.facts.now_ms())
    state.refuse_unknown()
    record = state.record
    if state.status.at_rest and record.before is None:
        return Done(changed=False, status=str(state.status))
    steps.finalize()
    if state.status is Status.SLEEPING:
        await together(flush_conntrack(record, steps, host), discard_snapshots(record, steps, host))
        left_behind = await write_at_rest(record, Status.STOPPED, host, host.facts.now_ms())
        return stopped(record, None, left_behind, host)
    before = record
    if record.status is not Status.STOPPING:
        record = before = await read_unseen(record, steps, host)
        record = replace(
            record,
            status=Status.STOPPING,
            since_ms=host.facts.now_ms(),
            command_id=steps.command_id,
            before=replace(record, before=None),
        )
    # The record and the question to the guest do not depend on each other: of a guest that was
    # asked and has no such record yet, the next worker sees only that it has exited.
    _, method = await together(
        host.records.put_instance(record) if record is not before else nothing(),
        steps.act("stop_vmm", lambda: ask_then_kill(record, steps, host)),
    )
    return await finish_stop(record, steps, host, method=method)


async def finish_stop(
    record: InstanceRecord,
    steps: Steps,
    host: Host,
    *,
    method: StopMethod = StopMethod.SIGKILL,
) -> Done:
    """Release whatever the instance, or an earlier attempt to stop it, still holds."""
    steps.finalize()
    await end_vmm(record, steps, host)
    ended, left_behind = await together(
        release_launch(record, steps, host, discard=lambda: discard_snapshots(record, steps, host)),
        write_at_rest(record, Status.STOPPED, host, host.facts.now_ms()),
    )
    return stopped(ended, method, left_behind, host)


def stopped(
    record: InstanceRecord, method: StopMethod | None, left_behind: tuple[str, ...], host: Host
) -> Done:
    """The outcome."""
    at_rest = replace(record, vmm=None, uid_slot=None, snapshot=None, consumed=False)
    return Done(
        changed=True,
        status=str(Status.STOPPED),
        detail={} if method is None else {"method": method.value},
        left_behind=left_behind,
        record=final_record(at_rest, Status.STOPPED, host.facts.moment()),
    )


async def stop_budget_s(record: InstanceRecord, steps: Steps, host: Host) -> float:
    """The pool's grace period, at most `[limits] max_stop_s` and until the command's deadline.

    A default without a file.
    """
    try:
        pool = await host.shared.pool(record.ref.tenant_id, record.ref.pool_id)
    except Failure:
        budget_s = DEFAULT_BUDGET_S
    else:
        budget_s = float(pool.runtime_policy.graceful_shutdown_seconds)
    budget_s = min(budget_s, host.settings.limits.max_stop_s)
    left_s = steps.control.left_s()
    return budget_s if left_s is None else max(0.0, min(budget_s, left_s))


async def ask_then_kill(record: InstanceRecord, steps: Steps, host: Host) -> StopMethod:
    """Ask the guest and wait, unless a Destroy is next; `end_vmm` sends the SIGKILL.

    Returns the method that applies.
    """
    identity = record.vmm
    if identity is None or not await host.vmms.alive(identity):
        return StopMethod.ALREADY_EXITED
    began = time.monotonic()
    vmm = host.vmms.api(record.jail_id)
    try:
        _, budget_s = await together(vmm.send_ctrl_alt_del(), stop_budget_s(record, steps, host))
    except Failure:
        return StopMethod.SIGKILL
    finally:
        await vmm.close()
    left_s = max(0.0, began + budget_s - time.monotonic() - min(KILL_RESERVE_S, budget_s / 4))
    if await steps.control.unhurried(lambda: host.vmms.wait_exit(identity, left_s)):
        return StopMethod.GRACEFUL
    return StopMethod.SIGKILL
