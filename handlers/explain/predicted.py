"""What is predicted of interfaces that have a state of their own: records, and a VMM's API."""

from collections.abc import Callable
from typing import Any

from handlers.interfaces import Records
from handlers.specs import BootConfig, SnapshotFacts, SnapshotInfo
from schemas.records import InstanceRecord, NetworkRecord, Tombstone
from schemas.requests import InstanceRef

READS = (
    "instances", "usage", "ranking", "pools", "vmm_versions", "held_uids", "held_addresses",
    "address_count", "with_slot", "with_offset", "refers", "tenant_of_jail", "kept_volumes",
    "networks", "network_count", "network_with_id", "networks_overlapping",
)  # fmt: skip


class PlannedRecords:
    """The journal's records with what the command would write over them; nothing is written."""

    def __init__(self, real: Records) -> None:
        self._real = real
        self._instances: dict[InstanceRef, InstanceRecord | None] = {}
        self._networks: dict[str, NetworkRecord] = {}

    @classmethod
    def over(cls, real: Records, readonly: Callable[..., Any]) -> Any:
        """As `Records`."""
        mine = cls(real)
        return readonly(
            real,
            READS,
            instance=mine.instance,
            network=mine.network,
            tombstone=real.tombstone,
            expect_network=mine.expect_network,
            put_instance=mine.put_instance,
            put_with_event=mine.put_instance,
            put_network=mine.put_network,
            release_instance=mine.drop_instance,
            drop_instance=mine.drop_instance,
            event=mine.event,
        )

    def instance(self, ref: InstanceRef) -> InstanceRecord | None:
        return self._instances[ref] if ref in self._instances else self._real.instance(ref)

    def network(self, tenant_id: str) -> NetworkRecord | None:
        return self._networks.get(tenant_id) or self._real.network(tenant_id)

    def expect_network(self, record: NetworkRecord) -> None:
        self._networks[record.tenant_id] = record

    async def put_network(self, record: NetworkRecord) -> None:
        self._networks[record.tenant_id] = record

    async def put_instance(self, record: InstanceRecord, *_: object, **__: object) -> None:
        self._instances[record.ref] = record

    async def drop_instance(
        self, ref: InstanceRef, _tombstone: Tombstone | None = None, **_: object
    ) -> None:
        self._instances[ref] = None

    async def event(self, *_: object, **__: object) -> None:
        pass


class PlannedApi:
    """A VMM's API that is not asked: it and its guest do what a command wants of them."""

    def __init__(self, state: str, version: str) -> None:
        self._state = state
        self._version = version

    async def configure(self, config: BootConfig) -> None: ...
    async def start(self) -> None: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def create_snapshot(self, state_path: str, mem_path: str) -> None: ...
    async def load_snapshot(self, state_path: str, mem_path: str) -> None: ...
    async def send_ctrl_alt_del(self) -> None: ...
    async def close(self) -> None: ...

    async def state(self) -> str:
        return self._state

    async def version(self) -> str:
        return self._version


async def sealed(_jail_id: str, facts: SnapshotFacts) -> SnapshotInfo:
    """The snapshot that a Sleep would write."""
    return SnapshotInfo(
        number=facts.number,
        directory="",
        state_path="",
        mem_path="",
        launch=facts.launch,
        revision=facts.revision,
        vcpus=facts.vcpus,
        mem_mib=facts.mem_mib,
        vmm_version=facts.vmm_version,
        size_bytes=0,
        kept_config=None,
        kept_secrets=None,
        has_secrets=False,
        disk=facts.disk,
    )
