"""Adopts VMMs that the journal does not know, e.g. because it was lost.

A VMM is adopted on proof: the metadata of its jail, which only root can write and which has a
checksum, names the launch, and the kernel shows the VMM in that jail, confined as launched. Without
proof it is quarantined; without even metadata it is only reported. Nothing is killed.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog
from msgspec.structs import replace

from handlers.claims.adopt import put_network
from handlers.errors import Failure, HostFault
from handlers.interfaces import Host, JailMetadata
from handlers.specs import LaunchSpec
from schemas.decode_error import quoted
from schemas.envelopes import EventKind
from schemas.records import InstanceRecord, Status, VmmIdentity
from schemas.subjects import Lane
from worker.journal.journal import Journal
from worker.logs import facts_of
from worker.tracing.tracing import Tracing

log = structlog.get_logger()


def note_failed_item(item: str, error: Exception) -> None:
    """Log what could not be recovered: an expected error in one line, a bug with its traceback."""
    log.warning("recovery.item_failed", item=item, **facts_of(error))


async def is_asleep(record: InstanceRecord, host: Host) -> bool:
    """Whether the snapshot of its launch is published: its VMM must not run on."""
    info = await host.snapshots.read(record.ref)
    return info is not None and info.number == record.launch


class JailLayout(Protocol):
    """The jails on this host. Both methods read files and block."""

    def list_ids(self) -> Sequence[str]: ...

    def read_metadata(self, jail_id: str) -> JailMetadata | None:
        """None if there is no such jail, or its metadata is damaged."""
        ...


class Adoption:
    """Runs once, after the instances in the journal were recovered."""

    def __init__(
        self,
        host: Host,
        journal: Journal,
        jails: JailLayout,
        tracing: Tracing | None = None,
    ) -> None:
        self._host = host
        self._journal = journal
        self._jails = jails
        self._tracing = tracing or Tracing("")
        self.adopted = 0
        self.running: list[InstanceRecord] = []  # those of the adopted that are not asleep
        self.quarantined = 0
        self.failed = 0

    async def run(self) -> None:
        """Adopt, quarantine or report each live VMM in a jail that no record names.

        A jail that cannot be read, or a name that is no jail, is reported and the next one follows.
        """
        recorded = {record.jail_id for record in self._journal.records.instances()}
        try:
            jail_ids = await asyncio.to_thread(self._jails.list_ids)
        except OSError as error:
            self.failed += 1
            note_failed_item("the directory of all jails", error)
            return
        for jail_id in jail_ids:
            if jail_id in recorded:
                continue
            try:
                await self._look_at(jail_id)
            except Exception as error:  # noqa: BLE001 - logged; the rest goes on
                self.failed += 1
                note_failed_item(f"jail {quoted(jail_id)}", error)

    async def _look_at(self, jail_id: str) -> None:
        identity = await self._host.vmms.find(jail_id)
        if identity is not None:
            metadata = await asyncio.to_thread(self._jails.read_metadata, jail_id)
            if metadata is not None and metadata.released:
                return  # until an operator adopts it
            lane = Lane.instance(metadata.ref) if metadata is not None else None
            with self._tracing.work("vmm adopted", lane) as facts:
                facts["hostd.jail"] = jail_id
                facts["hostd.result"] = await self._decide(jail_id, metadata, identity)

    async def _decide(
        self, jail_id: str, metadata: JailMetadata | None, identity: VmmIdentity
    ) -> str:
        """Says what became of it: adopted or quarantined."""
        record = metadata.record if metadata is not None else None
        if (
            metadata is None
            or record is None
            or self._journal.records.instance(metadata.ref) is not None
            or self._journal.quarantine.holds(Lane.instance(metadata.ref))
        ):
            self.quarantined += 1
            reason = "no record that can be read, nor the metadata of its jail, explains this VMM"
            await self._journal.records.event(
                EventKind.QUARANTINED, reason=reason, detail={"jail": jail_id}
            )
            log.warning("vmm.quarantined", jail=jail_id, reason=reason)
            return "quarantined"
        try:
            await self._prove(jail_id, metadata.uid, identity)
        except Failure as failure:
            self.quarantined += 1
            reason = f"identity not proven: {failure.message}"
            await self._put(record, Status.UNKNOWN, identity, reason)
            await self._journal.records.event(EventKind.QUARANTINED, ref=record.ref, reason=reason)
            log.warning("vmm.quarantined", instance=str(record.ref), jail=jail_id, reason=reason)
            return "quarantined"
        else:
            self.adopted += 1
            reason = "adopted by the metadata of its jail: it was not in the journal"
            if await is_asleep(record, self._host):
                reason += "; its snapshot is published: SleepInstance or StopInstance ends its VMM"
                await self._put(record, Status.SNAPSHOTTING, identity, reason)
            else:
                self.running.append(await self._put(record, Status.RUNNING, identity, reason))
            await self._journal.records.event(EventKind.RECOVERED, ref=record.ref, reason=reason)
            log.warning("vmm.adopted", instance=str(record.ref), jail=jail_id, reason=reason)
            return "adopted"

    async def _prove(self, jail_id: str, uid: int, identity: VmmIdentity) -> None:
        spec = LaunchSpec(jail_id=jail_id, uid=uid, cgroup=identity.cgroup)
        await self._host.vmms.check_confinement(identity, spec)
        vmm = self._host.vmms.api(jail_id)
        try:
            if await vmm.state() == "Not started":
                raise HostFault("its guest was never started")
        finally:
            await vmm.close()

    async def _put(
        self, record: InstanceRecord, status: Status, identity: VmmIdentity, reason: str
    ) -> InstanceRecord:
        await self._put_network(record)
        now_ms = self._host.facts.now_ms()
        record = replace(record, status=status, since_ms=now_ms, vmm=identity)
        if status is Status.SNAPSHOTTING:  # as a Sleep leaves it that failed past its publication
            record = replace(record, before=replace(record, status=Status.RUNNING))
        await self._journal.records.put_instance(record, reason=reason, durable=True)
        return record

    async def _put_network(self, record: InstanceRecord) -> None:
        """Record the tenant's network too, so that it is kept in its desired state.

        Not over a row that cannot be read: another version can.
        """
        if not self._journal.quarantine.holds(Lane.network(record.ref.tenant_id)):
            await put_network(record, self._host)
