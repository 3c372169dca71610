"""A best-effort copy of an instance's state in agentd's `instance.json`; the journal decides."""

import contextlib
import time
from typing import Any, Self

from handlers.errors import Failure, NotFound, of_os_error
from handlers.interfaces import Host, PreparedUpdate
from schemas.records import InstanceRecord, Status


def stamp(now_ms: int) -> str:
    """UTC in whole seconds, the format of times in `instance.json`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_ms / 1000))


class RunningFile:
    """`instance.json` of an instance that comes to run: prepared while nothing else is to be done,
    and written once it runs. What was prepared and not written leaves nothing.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._prepared: PreparedUpdate | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._prepared is not None:
            self._prepared.close()

    async def prepare(self, record: InstanceRecord) -> None:
        """It never fails: what is wrong with the file is for `write` to say."""
        with contextlib.suppress(Failure, OSError):
            changes = _running(record, self._host.facts.now_ms())
            self._prepared = await self._host.shared.prepare_update(record.ref, changes)

    async def write(self, record: InstanceRecord) -> tuple[str, ...]:
        """Write that it runs. Returns the `left_behind` entry if the file cannot be written."""
        changes = _running(record, self._host.facts.now_ms())
        return await _write(record, self._host, changes, self._prepared)


async def write_running(record: InstanceRecord, host: Host) -> tuple[str, ...]:
    """As `RunningFile.write`, of what was not prepared."""
    return await RunningFile(host).write(record)


def _running(record: InstanceRecord, now_ms: int) -> dict[str, Any]:
    now = stamp(now_ms)
    return {
        "status": str(Status.RUNNING),
        "firecracker_pid": record.vmm.pid if record.vmm else None,
        "revision_hash": record.revision,
        "last_started_at": now,
        "entered_running_at": now,
        "entered_warm_at": None,
    }


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


async def _write(
    record: InstanceRecord,
    host: Host,
    changes: dict[str, Any],
    prepared: PreparedUpdate | None = None,
) -> tuple[str, ...]:
    try:
        if prepared is None or not await prepared.apply(changes):
            await host.shared.update_instance(record.ref, changes)
    except NotFound:
        return ()
    except (Failure, OSError) as error:
        failure = error if isinstance(error, Failure) else of_os_error(error)
        return (f"instance.json {record.ref}: {failure.message}",)
    return ()
