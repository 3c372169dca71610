"""A best-effort copy of an instance's state in agentd's `instance.json`; the journal decides."""

import time
from typing import Any

from handlers.errors import Failure, NotFound
from handlers.interfaces import Host
from schemas.records import InstanceRecord, Status


def stamp(now_ms: int) -> str:
    """UTC in whole seconds, the format of times in `instance.json`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_ms / 1000))


async def write_running(record: InstanceRecord, host: Host, now_ms: int) -> tuple[str, ...]:
    """Write that it runs. Returns the `left_behind` entry if the file cannot be written."""
    now = stamp(now_ms)
    return await _write(
        record,
        host,
        {
            "status": str(Status.RUNNING),
            "firecracker_pid": record.vmm.pid if record.vmm else None,
            "revision_hash": record.revision,
            "last_started_at": now,
            "entered_running_at": now,
            "entered_warm_at": None,
        },
    )


async def write_at_rest(
    record: InstanceRecord, status: Status, host: Host, now_ms: int
) -> tuple[str, ...]:
    """Write that it sleeps or is stopped; `failed` is written as `stopped`."""
    written = Status.STOPPED if status is Status.FAILED else status
    return await _write(
        record,
        host,
        {
            "status": str(written),
            "firecracker_pid": None,
            "last_stopped_at": stamp(now_ms),
            "entered_running_at": None,
            "entered_warm_at": None,
        },
    )


async def _write(record: InstanceRecord, host: Host, changes: dict[str, Any]) -> tuple[str, ...]:
    try:
        await host.shared.update_instance(record.ref, changes)
    except NotFound:
        return ()
    except Failure as error:
        return (f"instance.json {record.ref}: {error.message}",)
    return ()
