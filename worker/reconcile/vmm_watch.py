"""Watches the VMMs of running instances; an exit is handled in the lane of its instance.

A VMM outlives the worker, and the worker outlives any VMM: each is watched by its pidfd, and an
unexpected exit is cleaned up and reported by `handlers/instance/vmm_exit.py`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Protocol

import structlog
from msgspec.structs import replace

from handlers.errors import Failure, HostFault
from handlers.instance.release import ended_unseen
from handlers.instance.vmm_exit import vmm_exited
from handlers.interfaces import Host
from handlers.steps import Steps
from handlers.vmm_ends import ExitStatus
from schemas.envelopes import EventKind
from schemas.records import InstanceRecord, Status, VmmIdentity
from schemas.requests import InstanceRef
from schemas.subjects import Lane
from worker.journal.journal import Journal
from worker.lanes import Lanes, MaintenanceTask, Runner, Work
from worker.logs import facts_of
from worker.metrics import Metrics
from worker.tracing.tracing import Tracing

RETRY_S = 2.0

log = structlog.get_logger()


class ExitWatch(Protocol):
    async def watch(self, identity: VmmIdentity) -> ExitStatus:
        """Return once the process has ended.

        Raises:
            HostFault: it is not the VMM launched.
            OSError: it cannot be watched now, e.g. without a free descriptor.
        """
        ...

    def left_by(self, identity: VmmIdentity) -> ExitStatus:
        """What is left of a process that was not watched: nothing, once it was reaped."""
        ...


@dataclass(frozen=True, slots=True)
class _Watched:
    """The task that watches, or cleans up after, the VMM of one jail."""

    jail_id: str
    task: asyncio.Task[None]


class VmmWatch:
    """One watch per running VMM. Call `sync` for an instance after anything that may have started
    or ended its VMM.

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
        tracing: Tracing | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._host = host
        self._journal = journal
        self._lanes = lanes
        self._metrics = metrics
        self._exits = exits
        self._tracing = tracing or Tracing("")
        self._sleep = sleep
        self._watched: dict[InstanceRef, _Watched] = {}

    def sync_all(self) -> None:
        """Once, at the end of recovery: watch each running VMM."""
        for ref in {*self._watched, *(each.ref for each in self._journal.records.instances())}:
            self.sync(ref)

    def sync(self, ref: InstanceRef) -> None:
        """Watch the instance's VMM if it should run, and no other of its launches."""
        record = self._journal.records.instance(ref)
        runs = record is not None and record.status.expects_vmm and record.vmm is not None
        jail_id = record.jail_id if record is not None and runs else None
        watched = self._watched.get(ref)
        if not runs:
            self._host.seen_alive.pop(ref, None)
        if watched is not None and watched.jail_id != jail_id:
            del self._watched[ref]
            watched.task.cancel()
        if record is not None and jail_id is not None and ref not in self._watched:
            self._watch(record, self._until_exit(record))

    def _watch(self, record: InstanceRecord, work: Coroutine[None, None, None]) -> None:
        if (before := self._watched.get(record.ref)) is not None:
            before.task.cancel()  # has ended, unless it is of another launch
        task = asyncio.create_task(work, name=f"vmm {record.jail_id}")
        self._watched[record.ref] = _Watched(record.jail_id, task)

    def found_ended(self, record: InstanceRecord) -> None:
        """Handle the exit of a VMM that ended while no worker watched it."""
        status = ExitStatus() if record.vmm is None else self._exits.left_by(record.vmm)
        self.exited(record, status, seen=False)

    def exited(self, record: InstanceRecord, status: ExitStatus, *, seen: bool) -> None:
        """Handle the exit of a VMM in its instance's lane; `seen`: when it ended is known."""

        async def handle() -> None:
            steps = Steps(f"exit-{record.jail_id}", self._journal.steps, {})
            try:
                with self._tracing.work("vmm exited", Lane.instance(record.ref)) as facts:
                    facts["hostd.launch"] = record.launch
                    end = await vmm_exited(
                        record.ref, record.launch, status, steps, self._host, seen=seen
                    )
                    if end is None:  # a command ended it
                        facts.drop()
                    else:
                        facts["hostd.vmm.end"] = end.reason
            except Exception as error:  # noqa: BLE001 - logged; the rest goes on
                log.warning("vmm.cleanup_failed", instance=str(record.ref), **facts_of(error))
                self._watch(record, self._retry(record, status, seen=seen))
                return
            if end is not None:
                self._metrics.vmms.exited(end.reason)
                log.warning("vmm.exited", instance=str(record.ref), reason=end.reason)
            self.sync(record.ref)

        self.put_in_lane(record, "vmm_exited", handle)

    def put_in_lane(
        self, record: InstanceRecord, name: str, run: Callable[[], Awaitable[None]]
    ) -> None:
        """Queue the worker's own work in the instance's lane, behind what waits there."""
        self._lanes.put_maintenance(Lane.instance(record.ref), MaintenanceTask(name, run))

    async def close(self) -> None:
        tasks = [watched.task for watched in self._watched.values()]
        self._watched.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _retry(self, record: InstanceRecord, status: ExitStatus, *, seen: bool) -> None:
        """Try a cleanup again that failed, e.g. on a full disk."""
        await self._sleep(RETRY_S)
        self.exited(record, status, seen=seen)

    async def _until_exit(self, record: InstanceRecord) -> None:
        """Whatever fails, the VMM is watched again: nothing else would see its exit."""
        while record.vmm is not None:
            try:
                if seen := not await ended_unseen(record, self._host):
                    self._host.seen_alive[record.ref] = record.vmm
                status = await self._exits.watch(record.vmm)
            except HostFault as failure:
                # A live process that is not the VMM launched: it is not killed.
                if await self._quarantined(record, failure.message):
                    return
            except Exception as error:  # noqa: BLE001 - logged; the rest goes on
                log.warning("vmm.watch_failed", instance=str(record.ref), **facts_of(error))
            else:
                self.exited(record, status, seen=seen)
                return
            await self._sleep(RETRY_S)

    async def _quarantined(self, record: InstanceRecord, reason: str) -> bool:
        """False if the journal cannot commit it now."""
        try:
            with self._tracing.work("vmm quarantined", Lane.instance(record.ref)) as facts:
                facts["hostd.launch"] = record.launch
                if not await self._quarantine(record, reason):
                    facts.drop()
        except Failure as failure:
            log.warning("vmm.watch_failed", instance=str(record.ref), **facts_of(failure))
            return False
        return True

    async def _quarantine(self, record: InstanceRecord, reason: str) -> bool:
        """False if a command ended the launch meanwhile: there is nothing to quarantine."""
        now = self._journal.records.instance(record.ref)
        if now is None or now.launch != record.launch or not now.status.expects_vmm:
            return False
        log.error("vmm.quarantined", instance=str(record.ref), reason=reason)
        unknown = replace(now, status=Status.UNKNOWN, since_ms=self._host.facts.now_ms())
        await self._journal.records.put_with_event(
            unknown, EventKind.QUARANTINED, reason=reason, actor=None
        )
        return True


class NotifyingRunner:
    """A lane's runner that calls `after` when a command may have started or ended its instance's
    VMM."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.after: Callable[[InstanceRef], None] = lambda ref: None

    async def run(self, work: Work) -> None:
        try:
            await self._runner.run(work)
        finally:
            if (ref := work.row.lane.ref) is not None:
                self.after(ref)

    async def answer_superseded(self, work: Work) -> None:
        await self._runner.answer_superseded(work)
