"""What a worker does first: restore its networks and adopt its VMMs, before any command runs.

No VMM is killed without proof: one that differs from the journal's record is quarantined
(`unknown`), one that is not in the journal is left to `adoption.py`. Each instance has its own
deadline, so that one that hangs does not delay the others.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog
from msgspec.structs import replace

from handlers.claims.look import look_for_unrecorded
from handlers.instance.release import release
from handlers.instance.sleep import announce_hash
from handlers.instance.state import InstanceState, final_record
from handlers.interfaces import Host
from handlers.network import restore_network
from handlers.network_survey import damaged_tenants
from handlers.steps import Steps
from schemas.envelopes import EventKind
from schemas.records import InstanceRecord, NetworkRecord, Status
from schemas.subjects import Lane
from worker.journal.journal import Journal
from worker.metrics import Metrics
from worker.reconcile.adoption import Adoption, is_asleep, note_failed_item
from worker.reconcile.drift import BASE_RULES, report_drift
from worker.reconcile.vmm_versions import record_version
from worker.reconcile.vmm_watch import VmmWatch
from worker.tracing.tracing import Tracing

BOOT_ID = "boot_id"
INSTANCE_DEADLINE_S = 20.0

log = structlog.get_logger()
T = TypeVar("T")


@dataclass
class Counts:
    """What recovery did; the detail of the `recovered` event."""

    adopted: int = 0
    ended: int = 0
    quarantined: int = 0
    networks: int = 0
    failed: int = 0


class Recovery:
    """Runs once, before the lanes start."""

    def __init__(
        self,
        host: Host,
        journal: Journal,
        vmm_watch: VmmWatch,
        adoption: Adoption,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._host = host
        self._journal = journal
        self._vmm_watch = vmm_watch
        self._adoption = adoption
        self._metrics = metrics
        self._tracing = tracing or Tracing("")
        self._counts = Counts()

    async def run(self) -> Counts:
        """Networks first: a VM must not keep running without its isolation."""
        with self._tracing.work("recovery") as facts:
            await self._run()
            facts.update({f"hostd.{name}": count for name, count in vars(self._counts).items()})
        return self._counts

    async def _run(self) -> None:
        boot_id = self._host.facts.boot_id()
        rebooted = self._journal.store.meta(BOOT_ID) not in (None, boot_id)
        await self._networks()
        await self._each(
            self._journal.records.instances(),
            lambda record: self._instance(record, rebooted=rebooted),
            timeout_s=None,
        )
        await self._adoption.run()
        for record in self._adoption.running:
            self._resume_soon(record)
        self._counts.adopted += self._adoption.adopted
        self._counts.quarantined += self._adoption.quarantined
        self._counts.failed += self._adoption.failed
        await self._look_for_unrecorded()
        asleep = [r for r in self._journal.records.instances() if r.status is Status.SLEEPING]
        await self._each(asleep, self._hash_memory)
        await self._each(asleep, lambda record: record_version(record, self._host, self._journal))
        await self._journal.store.put_meta(BOOT_ID, boot_id)
        self._vmm_watch.sync_all()
        await self._journal.records.event(
            EventKind.RECOVERED,
            reason="the host was rebooted" if rebooted else "the worker was started",
            detail={**vars(self._counts), "commands": self._journal.commands.count()},
        )
        log.info("worker.recovered", rebooted=rebooted, **vars(self._counts))

    async def _each(
        self,
        items: Sequence[T],
        one: Callable[[T], Awaitable[None]],
        timeout_s: float | None = INSTANCE_DEADLINE_S,
    ) -> None:
        """All at once, each in its time; a failure is logged and counted."""

        async def guarded(item: T) -> None:
            try:
                async with asyncio.timeout(timeout_s):
                    await one(item)
            except Exception as error:  # noqa: BLE001 - logged; the rest goes on
                self._counts.failed += 1
                note_failed_item(str(item), error)

        await asyncio.gather(*(guarded(item) for item in items))

    async def _networks(self) -> None:
        """Look at all with some listings, and restore those that are not as they should be."""
        networks = self._journal.records.networks()
        try:
            base, tenants = await damaged_tenants(self._host, rules_only=False)
        except Exception as error:  # noqa: BLE001 - logged; each network is tried by itself
            note_failed_item("the survey of all networks", error)
            damaged = networks
        else:
            named = set(tenants)
            damaged = tuple(each for each in networks if each.tenant_id in named)
            if base:
                await report_drift(self._journal, self._metrics, BASE_RULES, "found at start")
        self._counts.networks += len(networks) - len(damaged)
        await self._each(damaged, self._network)

    async def _network(self, record: NetworkRecord) -> None:
        restored = await restore_network(record, self._host)
        self._counts.networks += 1
        if restored.repaired or restored.lost:
            await report_drift(
                self._journal, self._metrics, restored, "found at start", tenant_id=record.tenant_id
            )

    async def _instance(self, record: InstanceRecord, *, rebooted: bool) -> None:
        """Within its deadline, which ends inside of the span that it fails."""
        deadline = asyncio.get_running_loop().time() + INSTANCE_DEADLINE_S
        async with asyncio.timeout_at(deadline):
            running = await self._settled(record, rebooted=rebooted)
        if running is not None:
            with self._tracing.work("vmm adopted", Lane.instance(running.ref)) as facts:
                facts["hostd.launch"] = running.launch
                async with asyncio.timeout_at(deadline):
                    facts["hostd.result"] = await self._adopt(running)

    async def _settled(self, record: InstanceRecord, *, rebooted: bool) -> InstanceRecord | None:
        """End what the last worker left of a failed command; the record, if it should run."""
        if record.before is not None and self._has_command(record):
            return None  # the interrupted command continues in its lane and reads the state itself
        if await self._has_to_be_completed(record):
            return None
        if (before := record.before) is not None and InstanceState(
            record
        ).status is not Status.RUNNING:
            # Its command was not undone: it has no effect on what it found.
            record = replace(before, before=None, command_id=None)
            await self._journal.records.put_instance(record, durable=True)
        if rebooted and record.holds_host:
            await self._forget_after_reboot(record)
            return None
        if record.before is not None:
            # Its command failed partway: a guest that may have run is treated as running.
            final = final_record(record, Status.RUNNING, self._host.facts.moment())
            await self._journal.records.put_instance(replace(final, hung=record.hung), durable=True)
            record = self._journal.records.instance(record.ref) or record  # what was due is sent
        return record if record.status.expects_vmm else None

    async def _has_to_be_completed(self, record: InstanceRecord) -> bool:
        """Whether its command failed past its point of no return: a restart takes nothing back.

        The reconciler completes a Stop. A Destroy, and a Sleep whose snapshot is published, wait
        for the next command, as without a restart.
        """
        if record.status in {Status.STOPPING, Status.DESTROYING}:
            return True
        return record.status is Status.SNAPSHOTTING and await is_asleep(record, self._host)

    async def _look_for_unrecorded(self) -> None:
        """Book what VMMs without a record hold, before a command can be given the same."""
        try:
            await look_for_unrecorded(self._host)
        except Exception as error:  # noqa: BLE001 - logged; the next pass looks again
            self._counts.failed += 1
            note_failed_item("the VMMs without a record", error)

    async def _hash_memory(self, record: InstanceRecord) -> None:
        """Compute a hash that the last worker did not finish, in the background."""
        ref, number, host = record.ref, record.snapshot, self._host
        if number is not None and not await host.snapshots.is_hashed(ref, number):
            host.later("hash_memory", lambda: announce_hash(ref, number, host))

    def _has_command(self, record: InstanceRecord) -> bool:
        command_id = record.command_id
        return command_id is not None and self._journal.commands.is_unfinished(command_id)

    async def _adopt(self, record: InstanceRecord) -> str:
        """Says what became of it: adopted, ended or quarantined."""
        identity = await self._host.vmms.find(record.jail_id)
        if identity is None:
            self._counts.ended += 1
            self._vmm_watch.found_ended(record)
            return "ended"
        if identity != record.vmm:
            self._counts.quarantined += 1
            await self._journal.records.put_instance(
                replace(record, status=Status.UNKNOWN, since_ms=self._host.facts.now_ms()),
                reason="its VMM is not the one in the journal",
                durable=True,
            )
            await self._journal.records.event(
                EventKind.QUARANTINED,
                ref=record.ref,
                reason="its VMM is not the one in the journal",
            )
            return "quarantined"
        self._host.seen_alive[record.ref] = identity
        self._resume_soon(record)
        self._counts.adopted += 1
        return "adopted"

    def _resume_soon(self, record: InstanceRecord) -> None:
        """In its lane: a VM that hangs does not answer, and must not delay the others."""
        self._vmm_watch.put_in_lane(record, "resume", lambda: self._resume(record))

    async def _resume(self, record: InstanceRecord) -> None:
        """A paused VM without a manifest is resumed: the sleep that paused it did not happen."""
        now = self._journal.records.instance(record.ref)
        if now is None or now.vmm != record.vmm or not now.status.expects_vmm:
            return  # a command that waited in the lane came first
        try:
            await self._resume_paused(record)
            await record_version(now, self._host, self._journal)
        except Exception as error:  # noqa: BLE001 - logged; the rest goes on
            note_failed_item(str(record.ref), error)

    async def _resume_paused(self, record: InstanceRecord) -> None:
        if await is_asleep(record, self._host):
            return
        vmm = self._host.vmms.api(record.jail_id)
        try:
            if await vmm.state() == "Paused":
                await vmm.resume()
        finally:
            await vmm.close()

    async def _forget_after_reboot(self, record: InstanceRecord) -> None:
        """After a reboot: nothing volatile is left; remove what is left on disk."""
        steps = Steps(f"reboot-{record.jail_id}", self._journal.steps, {})
        steps.finalize()
        record = await release(record, steps, self._host, seen=False)
        await self._host.snapshots.delete_all(record.ref)
        gone = replace(record, vmm=None, uid_slot=None, snapshot=None, consumed=False)
        stopped = final_record(gone, Status.STOPPED, self._host.facts.moment())
        await self._journal.records.put_instance(
            stopped, reason="the host was rebooted", durable=True
        )
        self._counts.ended += 1
