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

from handlers.errors import Failure, HostFault
from handlers.interfaces import Host
from handlers.specs import LaunchSpec
from schemas.records import InstanceRecord, NetworkRecord, Status, VmmIdentity
from schemas.requests import InstanceRef
from worker.journal.journal import Journal

log = structlog.get_logger()


class JailMetadata(Protocol):
    """Whose jail it is, as written at launch. `record` is the journal's record of the launch."""

    @property
    def ref(self) -> InstanceRef: ...
    @property
    def uid(self) -> int: ...
    @property
    def record(self) -> InstanceRecord | None: ...


class JailDirs(Protocol):
    """The jails on this host. Both methods read files and block."""

    def list_ids(self) -> Sequence[str]: ...

    def facts(self, jail_id: str) -> JailMetadata | None:
        """None if there is no such jail, or its metadata is damaged."""
        ...


class Adoption:
    """Runs once, after the instances in the journal were recovered."""

    def __init__(self, host: Host, journal: Journal, jails: JailDirs) -> None:
        self._host = host
        self._journal = journal
        self._jails = jails
        self.adopted = 0
        self.quarantined = 0

    async def run(self) -> None:
        """Adopt, quarantine or report each live VMM in a jail that no record names."""
        recorded = {record.jail_id for record in self._journal.instances()}
        for jail_id in await asyncio.to_thread(self._jails.list_ids):
            if jail_id in recorded:
                continue
            identity = await self._host.vmms.find(jail_id)
            if identity is not None:
                metadata = await asyncio.to_thread(self._jails.facts, jail_id)
                await self._decide(jail_id, metadata, identity)

    async def _decide(
        self, jail_id: str, metadata: JailMetadata | None, identity: VmmIdentity
    ) -> None:
        record = metadata.record if metadata is not None else None
        if metadata is None or record is None or self._journal.instance(metadata.ref) is not None:
            self.quarantined += 1
            reason = "neither the journal nor the metadata of its jail explains this VMM"
            await self._journal.event("quarantined", reason=reason, detail={"jail": jail_id})
            log.warning("vmm.quarantined", jail=jail_id, reason=reason)
            return
        try:
            await self._prove(jail_id, metadata.uid, identity)
        except Failure as failure:
            self.quarantined += 1
            reason = f"identity not proven: {failure.message}"
            await self._put(record, Status.UNKNOWN, identity, reason)
            await self._journal.event("quarantined", ref=record.ref, reason=reason)
            log.warning("vmm.quarantined", instance=str(record.ref), jail=jail_id, reason=reason)
        else:
            self.adopted += 1
            reason = "adopted by the metadata of its jail: it was not in the journal"
            await self._put(record, Status.RUNNING, identity, reason)
            await self._journal.event("recovered", ref=record.ref, reason=reason)
            log.warning("vmm.adopted", instance=str(record.ref), jail=jail_id, reason=reason)

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
    ) -> None:
        await self._put_network(record)
        now_ms = self._host.facts.now_ms()
        record = replace(record, status=status, since_ms=now_ms, vmm=identity)
        await self._journal.put_instance(record, reason=reason, durable=True)

    async def _put_network(self, record: InstanceRecord) -> None:
        """Record the tenant's network too, so that it is kept in its desired state."""
        tenant_id = record.ref.tenant_id
        if record.net is not None and self._journal.network(tenant_id) is None:
            now_ms = self._host.facts.now_ms()
            await self._journal.put_network(
                NetworkRecord(tenant_id=tenant_id, net=record.net, status="up", since_ms=now_ms),
                durable=True,
            )
