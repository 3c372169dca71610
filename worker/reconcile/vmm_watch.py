"""Watches the VMMs of running instances; an exit is handled in the lane of its instance.

A VMM outlives the worker, and the worker outlives any VMM: each is watched by its pidfd, and an
unexpected exit is cleaned up and reported by `handlers/instance/vmm_exit.py`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog
from msgspec.structs import replace

from handlers.errors import Failure, HostFault
from handlers.instance.vmm_exit import vmm_exited
from handlers.interfaces import Host
from handlers.steps import Steps
from schemas.envelopes import EventKind
from schemas.records import InstanceRecord, Status, VmmIdentity
from schemas.subjects import Lane
from worker.journal.journal import Journal
from worker.lanes import Lanes, MaintenanceTask, Runner, Work
from worker.logs import facts_of
from worker.metrics import Metrics

RETRY_S = 2.0

log = structlog.get_logger()


class Exit(Protocol):
    """How a VMM ended. `reason` is one of a few words: a metric label."""

    @property
    def reason(self) -> str: ...


class ExitWatch(Protocol):
    async def watch(self, identity: VmmIdentity) -> Exit:
        """Return once the process has ended.

        Raises:
            HostFault: it is not the VMM launched.
            OSError: it cannot be watched now, e.g. without a free descriptor.
        """
        ...


class VmmWatch:
    """One watch per running VMM. Call `sync` after anything that may have started or ended one.

    Args:
        exits: reports the end of a process.
        sleep: waits the given number of seconds before a failed cleanup is tried again.
    """

    def __init__(
        self,
        host: Host,
        journal: Journal,
        lanes: Lanes,
        metrics: Metrics,
        exits: ExitWatch,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._host = host
        self._journal = journal
        self._lanes = lanes
        self._metrics = metrics
        self._exits = exits
        self._sleep = sleep
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def sync(self) -> None:
        """Watch each running VMM, and stop watching all others."""
        running = {
            record.jail_id: record
            for record in self._journal.records.instances()
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
        """Handle the exit of a VMM in its instance's lane."""

        async def handle() -> None:
            steps = Steps(f"exit-{record.jail_id}", self._journal.steps, {})
            try:
                handled = await vmm_exited(record.ref, record.launch, steps, self._host)
            except Exception as error:  # noqa: BLE001 - logged; the rest goes on
                log.warning("vmm.cleanup_failed", instance=str(record.ref), **facts_of(error))
                self._tasks[record.jail_id] = asyncio.create_task(self._retry(record, reason))
                return
            if handled:
                self._metrics.vmm_exited(reason)
                log.warning("vmm.exited", instance=str(record.ref), reason=reason)
            self.sync()

        self.put_in_lane(record, "vmm_exited", handle)

    def put_in_lane(
        self, record: InstanceRecord, name: str, run: Callable[[], Awaitable[None]]
    ) -> None:
        """Queue the worker's own work in the instance's lane, behind what waits there."""
        self._lanes.put_maintenance(Lane.instance(record.ref), MaintenanceTask(name, run))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _retry(self, record: InstanceRecord, reason: str) -> None:
        """Try a cleanup again that failed, e.g. on a full disk."""
        await self._sleep(RETRY_S)
        self.exited(record, reason)

    async def _until_exit(self, record: InstanceRecord) -> None:
        """Whatever fails, the VMM is watched again: nothing else would see its exit."""
        while record.vmm is not None:
            try:
                end = await self._exits.watch(record.vmm)
            except HostFault as failure:
                # A live process that is not the VMM launched: it is not killed.
                log.error("vmm.quarantined", instance=str(record.ref), reason=failure.message)  # noqa: TRY400
                if await self._quarantined(record, failure.message):
                    return
            except Exception as error:  # noqa: BLE001 - logged; the rest goes on
                log.warning("vmm.watch_failed", instance=str(record.ref), **facts_of(error))
            else:
                self.exited(record, end.reason)
                return
            await self._sleep(RETRY_S)

    async def _quarantined(self, record: InstanceRecord, reason: str) -> bool:
        """False if the journal cannot commit it now."""
        try:
            await self._quarantine(record, reason)
        except Failure as failure:
            log.warning("vmm.watch_failed", instance=str(record.ref), **facts_of(failure))
            return False
        return True

    async def _quarantine(self, record: InstanceRecord, reason: str) -> None:
        now = self._journal.records.instance(record.ref)
        if now is None or now.launch != record.launch or not now.status.expects_vmm:
            return
        unknown = replace(now, status=Status.UNKNOWN, since_ms=self._host.facts.now_ms())
        await self._journal.records.put_instance(unknown, reason=reason, durable=True)
        await self._journal.records.event(EventKind.QUARANTINED, ref=record.ref, reason=reason)


class NotifyingRunner:
    """A lane's runner that calls `after` when a command may have started or ended a VMM."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.after: Callable[[], None] = lambda: None

    async def run(self, work: Work) -> None:
        try:
            await self._runner.run(work)
        finally:
            self.after()

    async def answer_superseded(self, work: Work) -> None:
        await self._runner.answer_superseded(work)
