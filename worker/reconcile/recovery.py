"""What a worker does first: find its networks and VMs again, then let the journal's commands go on.

Nothing is killed on doubt: a VMM that is not what the journal says is quarantined (`unknown`), one
that the journal does not know is left alone and reported. One instance that hangs holds up no
other: each has its own deadline.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog
from msgspec.structs import replace

from handlers.errors import Failure
from handlers.instance.release import release
from handlers.instance.sleep import announce_hash
from handlers.instance.state import InstanceState, final_record
from handlers.interfaces import Host
from handlers.network import restore_network
from handlers.steps import Steps
from schemas.records import InstanceRecord, NetworkRecord, Status
from worker.journal.journal import Journal
from worker.reconcile.adoption import Strangers
from worker.reconcile.vmm_watch import VmmWatch

BOOT_ID = "boot_id"
INSTANCE_DEADLINE_S = 20.0

log = structlog.get_logger()
T = TypeVar("T")


@dataclass
class Found:
    """What recovery came to; goes into the `recovered` event."""

    adopted: int = 0
    ended: int = 0
    quarantined: int = 0
    networks: int = 0
    troubles: int = 0


class Recovery:
    """Runs once, before the lanes start."""

    def __init__(self, host: Host, journal: Journal, supervisor: VmmWatch) -> None:
        self._host = host
        self._journal = journal
        self._supervisor = supervisor
        self.found = Found()

    async def run(self) -> Found:
        """Networks first: a VM must not run on without its isolation."""
        boot_id = self._host.facts.boot_id()
        rebooted = self._journal.meta(BOOT_ID) not in (None, boot_id)
        await self._each(self._journal.networks(), self._network)
        await self._each(
            self._journal.instances(), lambda record: self._instance(record, rebooted=rebooted)
        )
        strangers = Strangers(self._host, self._journal)
        await strangers.find()
        self.found.adopted += strangers.adopted
        self.found.quarantined += strangers.quarantined
        asleep = [r for r in self._journal.instances() if r.status is Status.SLEEPING]
        await self._each(asleep, self._hash_on)
        await self._journal.put_meta(BOOT_ID, boot_id)
        self._supervisor.sync()
        await self._journal.event(
            "recovered",
            reason="the host was rebooted" if rebooted else "the worker was started",
            detail={**vars(self.found), "commands": len(self._journal.unfinished())},
        )
        log.info("worker.recovered", rebooted=rebooted, **vars(self.found))
        return self.found

    async def _each(self, items: Sequence[T], one: Callable[[T], Awaitable[None]]) -> None:
        """All at once, each within its deadline; a trouble is logged and counted, and goes on."""

        async def guarded(item: T) -> None:
            try:
                async with asyncio.timeout(INSTANCE_DEADLINE_S):
                    await one(item)
            except (Failure, OSError, TimeoutError) as error:
                self.found.troubles += 1
                log.warning("recovery.trouble", item=str(item), error=repr(error))

        await asyncio.gather(*(guarded(item) for item in items))

    async def _network(self, record: NetworkRecord) -> None:
        restored = await restore_network(record, self._host)
        self.found.networks += 1
        if restored.repaired or restored.lost:
            await self._journal.event(
                "drift",
                tenant_id=record.tenant_id,
                reason="found at start",
                detail={"repaired": list(restored.repaired), "lost": list(restored.lost)},
            )

    async def _instance(self, record: InstanceRecord, *, rebooted: bool) -> None:
        if record.before is not None and self._has_command(record):
            return  # the command that was cut goes on in its lane and finds out itself
        if rebooted and record.holds_host:
            await self._forget(record)
            return
        if record.before is not None:
            # Its command was answered half-way: what it may have run is treated as running.
            status = InstanceState(record).status
            back = record if status is Status.RUNNING else record.before
            record = replace(back, status=status, before=None, command_id=None)
            await self._journal.put_instance(record, durable=True)
        if record.status is Status.RUNNING:
            await self._adopt(record)

    async def _hash_on(self, record: InstanceRecord) -> None:
        """A hash that the last worker did not get through is taken now, in the background."""
        ref, number, host = record.ref, record.snapshot, self._host
        if number is not None and not await host.snapshots.is_hashed(ref, number):
            host.later("hash_memory", lambda: announce_hash(ref, number, host))

    def _has_command(self, record: InstanceRecord) -> bool:
        return any(row.id == record.command_id for row in self._journal.unfinished())

    async def _adopt(self, record: InstanceRecord) -> None:
        identity = await self._host.vmms.find(record.jail_id)
        if identity is None:
            self.found.ended += 1
            self._supervisor.exited(record, "while_away")
        elif identity != record.vmm:
            self.found.quarantined += 1
            await self._journal.put_instance(
                replace(record, status=Status.UNKNOWN, since_ms=self._host.facts.now_ms()),
                reason="its VMM is not the one in the journal",
                durable=True,
            )
            await self._journal.event(
                "quarantined", ref=record.ref, reason="its VMM is not the one in the journal"
            )
        else:
            # In its lane: a VM that hangs answers no question, and must hold up no other.
            self._supervisor.chore(record, "resume", lambda: self._resume(record))
            self.found.adopted += 1

    async def _resume(self, record: InstanceRecord) -> None:
        """A paused VM without a manifest is resumed: the sleep that paused it did not happen."""
        now = self._journal.instance(record.ref)
        if now is None or now.vmm != record.vmm or now.status is not Status.RUNNING:
            return  # a command that waited in the lane came first
        try:
            await self._resume_paused(record)
        except (Failure, OSError) as error:
            log.warning("recovery.trouble", item=str(record.ref), error=repr(error))

    async def _resume_paused(self, record: InstanceRecord) -> None:
        info = await self._host.snapshots.read(record.ref)
        if info is not None and info.number == record.launch:
            return
        vmm = self._host.vmms.api(record.jail_id)
        try:
            if await vmm.state() == "Paused":
                await vmm.resume()
        finally:
            await vmm.close()

    async def _forget(self, record: InstanceRecord) -> None:
        """After a reboot nothing volatile is left; what lies on disks is cleared away."""
        steps = Steps(f"reboot-{record.jail_id}", self._journal, {})
        steps.finalize()
        await release(record, steps, self._host)
        await self._host.snapshots.delete_all(record.ref)
        gone = replace(record, vmm=None, uid_slot=None, snapshot=None, consumed=False)
        now_ms = self._host.facts.now_ms()
        await self._journal.put_instance(
            final_record(gone, Status.STOPPED, now_ms), reason="the host was rebooted", durable=True
        )
        self.found.ended += 1
