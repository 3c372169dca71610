"""VMMs of ours that the journal does not know, e.g. because it was lost: adopted if proven.

The proof: the jail's note, which only root can write and which has a checksum, names the launch;
the kernel shows the VMM in that jail, confined as launched. What is not proven is quarantined or,
without even a note, reported; nothing is killed.
"""

import asyncio

import structlog
from msgspec.structs import replace

from handlers.errors import Failure, HostFault
from handlers.host.jail.layout import JailLayout, JailMetadata
from handlers.interfaces import Host
from handlers.specs import LaunchSpec
from schemas.records import InstanceRecord, NetworkRecord, Status, VmmIdentity
from worker.journal.journal import Journal

log = structlog.get_logger()


class Strangers:
    """Looks once, after the journal's own instances were recovered."""

    def __init__(self, host: Host, journal: Journal) -> None:
        self._host = host
        self._journal = journal
        self.adopted = 0
        self.quarantined = 0

    async def find(self) -> None:
        """Adopt, quarantine or report each live VMM in a jail that no record stands for."""
        known = {record.jail_id for record in self._journal.instances()}
        layout = JailLayout(self._host.settings.jail_base)
        for jail_id in await asyncio.to_thread(layout.list_ids):
            if jail_id in known:
                continue
            identity = await self._host.vmms.find(jail_id)
            if identity is not None:
                note = await asyncio.to_thread(layout.read_metadata, jail_id)
                await self._judge(jail_id, note, identity)

    async def _judge(self, jail_id: str, note: JailMetadata | None, identity: VmmIdentity) -> None:
        record = note.record if note is not None else None
        if note is None or record is None or self._journal.instance(note.ref) is not None:
            self.quarantined += 1
            await self._journal.event(
                "quarantined",
                reason="a VMM that neither the journal nor its jail's note accounts for",
                detail={"jail": jail_id},
            )
            return
        reason = "adopted from its jail's note: the journal did not know it"
        try:
            await self._prove(jail_id, note.uid, identity)
            status = Status.RUNNING
            self.adopted += 1
        except Failure as failure:
            reason = f"not proven: {failure.message}"
            status = Status.UNKNOWN
            self.quarantined += 1
        await self._keep_network(record)
        now_ms = self._host.facts.now_ms()
        known = replace(record, status=status, since_ms=now_ms, vmm=identity)
        await self._journal.put_instance(known, reason=reason, durable=True)
        kind = "recovered" if status is Status.RUNNING else "quarantined"
        await self._journal.event(kind, ref=record.ref, reason=reason)
        log.warning("vmm.stranger", instance=str(record.ref), status=str(status), reason=reason)

    async def _prove(self, jail_id: str, uid: int, identity: VmmIdentity) -> None:
        spec = LaunchSpec(jail_id=jail_id, uid=uid, cgroup=identity.cgroup)
        await self._host.vmms.check_confinement(identity, spec)
        vmm = self._host.vmms.api(jail_id)
        try:
            if await vmm.state() == "Not started":
                raise HostFault("its guest was never started")
        finally:
            await vmm.close()

    async def _keep_network(self, record: InstanceRecord) -> None:
        """A tenant with a VM has a network under standing order."""
        tenant_id = record.ref.tenant_id
        if record.net is not None and self._journal.network(tenant_id) is None:
            now_ms = self._host.facts.now_ms()
            await self._journal.put_network(
                NetworkRecord(tenant_id=tenant_id, net=record.net, status="up", since_ms=now_ms),
                durable=True,
            )
