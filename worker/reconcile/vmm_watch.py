"""Watches the VMMs of running instances; a death goes through the instance's lane like a command.

A VMM outlives the worker, and the worker outlives any VMM: each is watched by its pidfd, and what
ends by itself is cleaned up and announced by `handlers/instance/vmm_exit.py`.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from msgspec.structs import replace

from handlers.errors import Failure
from handlers.host.vmm.processes import ExitWatch
from handlers.instance.vmm_exit import vmm_exited
from handlers.interfaces import Host
from handlers.steps import Steps
from schemas.records import InstanceRecord, Status
from schemas.subjects import Lane
from worker.journal.journal import Journal
from worker.lanes import Lanes, MaintenanceTask
from worker.metrics import Metrics

AGAIN_S = 2.0

log = structlog.get_logger()


class VmmWatch:
    """One watch per running VMM. `sync` after anything that may have started or ended one."""

    def __init__(self, host: Host, journal: Journal, lanes: Lanes, metrics: Metrics) -> None:
        self._host = host
        self._journal = journal
        self._lanes = lanes
        self._metrics = metrics
        self._watch = ExitWatch()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def sync(self) -> None:
        """Watch each running VMM, and no other."""
        running = {
            record.jail_id: record
            for record in self._journal.instances()
            if record.status.expects_vmm and record.vmm is not None
        }
        for jail_id in [jail_id for jail_id in self._tasks if jail_id not in running]:
            self._tasks.pop(jail_id).cancel()
        for jail_id, record in running.items():
            if jail_id not in self._tasks:
                self._tasks[jail_id] = asyncio.create_task(
                    self._until_exit(record), name=f"vmm {jail_id}"
                )

    def exited(self, record: InstanceRecord, reason: str) -> None:
        """Have the end of a VMM handled in its instance's lane."""

        async def handle() -> None:
            steps = Steps(f"exit-{record.jail_id}", self._journal, {})
            try:
                handled = await vmm_exited(record.ref, record.launch, steps, self._host)
            except (Failure, OSError) as error:
                log.warning("vmm.not_cleaned_up", instance=str(record.ref), error=repr(error))
                self._tasks[record.jail_id] = asyncio.create_task(self._again(record, reason))
                return
            if handled:
                self._metrics.vmm_exited(reason)
                log.warning("vmm.exited", instance=str(record.ref), reason=reason)
            self.sync()

        self.chore(record, "vmm_exited", handle)

    def chore(self, record: InstanceRecord, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Have the worker's own work done in the instance's lane, behind what waits there."""
        self._lanes.put_chore(Lane.instance(record.ref), MaintenanceTask(name, run))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _again(self, record: InstanceRecord, reason: str) -> None:
        """What could not be cleaned up now (a full disk, say) is tried again, not forgotten."""
        await asyncio.sleep(AGAIN_S)
        self.exited(record, reason)

    async def _until_exit(self, record: InstanceRecord) -> None:
        if record.vmm is None:
            return
        try:
            how = await self._watch.watch(record.vmm)
        except Failure as failure:
            # It lives, but is not what was launched: nothing is killed on doubt.
            log.error("vmm.unproven", instance=str(record.ref), reason=failure.message)  # noqa: TRY400
            await self._quarantine(record, failure.message)
        else:
            self.exited(record, how.reason)

    async def _quarantine(self, record: InstanceRecord, reason: str) -> None:
        now = self._journal.instance(record.ref)
        if now is None or now.launch != record.launch or not now.status.expects_vmm:
            return
        unknown = replace(now, status=Status.UNKNOWN, since_ms=self._host.facts.now_ms())
        await self._journal.put_instance(unknown, reason=reason, durable=True)
        await self._journal.event("quarantined", ref=record.ref, reason=reason)
