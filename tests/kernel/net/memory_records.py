"""The journal's and agentd's side of a host, in memory, for tests that run network handlers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import Any, cast

from handlers.claims.unrecorded import UnrecordedVmms
from handlers.concurrency import Slots
from handlers.errors import NotFound
from handlers.host.facts import HostFacts
from handlers.host.storage.disk_space import DiskSpace
from handlers.interfaces import Host
from handlers.mechanism import StepIntent, StepRow
from handlers.steps import Steps
from handlers.tenant_locks import TenantLocks
from schemas.files import TenantConfig, TenantQuota
from schemas.records import InstanceRecord, NetworkRecord
from schemas.requests import InstanceRef, TenantNet
from schemas.settings import LimitSettings, NetworkSettings, Settings
from tests.kernel.net.netns import HostNet

QUOTA = TenantQuota(8, 8192, 8, 8, 8, 8, 100)


@dataclass
class MemoryRecords:
    """Networks and instances on record, and the tenants' files."""

    tenants: dict[str, TenantNet] = field(default_factory=dict[str, TenantNet])
    networks_up: dict[str, NetworkRecord] = field(default_factory=dict[str, NetworkRecord])
    records: dict[InstanceRef, InstanceRecord] = field(
        default_factory=dict[InstanceRef, InstanceRecord]
    )
    jails_alive: set[str] = field(default_factory=set[str])

    async def tenant(self, tenant_id: str) -> TenantConfig:
        if tenant_id not in self.tenants:
            raise NotFound(f"there is no tenant.json of {tenant_id}")
        return TenantConfig(tenant_id, QUOTA, self.tenants[tenant_id])

    def instances(self, tenant_id: str | None = None) -> Sequence[InstanceRecord]:
        return [r for r in self.records.values() if tenant_id in {None, r.ref.tenant_id}]

    def network(self, tenant_id: str) -> NetworkRecord | None:
        return self.networks_up.get(tenant_id)

    def networks(self) -> Sequence[NetworkRecord]:
        return list(self.networks_up.values())

    def network_count(self) -> int:
        return len(self.networks_up)

    def network_with_id(self, tenant_net_id: int) -> NetworkRecord | None:
        found = (each for each in self.networks() if each.net.tenant_net_id == tenant_net_id)
        return next(found, None)

    def networks_overlapping(self, subnet: IPv4Network) -> Sequence[NetworkRecord]:
        return [
            each for each in self.networks() if IPv4Network(each.net.ipv4_subnet).overlaps(subnet)
        ]

    async def put_network(self, record: NetworkRecord) -> None:
        self.networks_up[record.tenant_id] = record

    def expect_network(self, record: NetworkRecord) -> None:
        self.networks_up[record.tenant_id] = record


@dataclass(frozen=True)
class LiveVmms:
    """All that repair asks of VMMs: whether a jail's one lives."""

    journal: MemoryRecords

    async def exists(self, key: str) -> bool:
        return key in self.journal.jails_alive


class MemoryStepLog:
    """The step log; it outlives a run of a command, as the journal does."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, str], StepRow] = {}

    async def begin(self, command_id: str, *intents: StepIntent) -> Sequence[StepRow]:
        return [
            self._rows.setdefault(
                (command_id, intent.mechanism, intent.key),
                StepRow(intent.mechanism, intent.key, intent.existed),
            )
            for intent in intents
        ]

    async def forget(self, command_id: str, mechanism: str, key: str) -> None:
        self._rows.pop((command_id, mechanism, key), None)

    def rows(self, command_id: str) -> Sequence[StepRow]:
        return [row for (owner, *_), row in self._rows.items() if owner == command_id]

    async def mark(self, command_id: str, name: str) -> None:
        raise AssertionError(f"a network command has no mark {name}")

    def marked(self, command_id: str, name: str) -> bool:
        return False


def host_of(net: HostNet, journal: MemoryRecords, settings: NetworkSettings | None = None) -> Host:
    """A host whose network is real and whose other parts no network handler may touch."""
    nothing = cast("Any", None)
    mechanisms = net.mechanisms
    return Host(
        settings=Settings(network=settings or NetworkSettings()),
        locks=TenantLocks(),
        records=cast("Any", journal),
        facts=HostFacts(),
        shared=cast("Any", journal),
        networks=mechanisms.networks,
        bridges=mechanisms.bridges,
        warm=nothing,
        tenant_rules=mechanisms.tenant_rules,
        pins=mechanisms.pins,
        taps=mechanisms.taps,
        artifacts=nothing,
        data_disks=nothing,
        cgroups=nothing,
        jails=nothing,
        vmms=cast("Any", LiveVmms(journal)),
        agents=nothing,
        snapshots=nothing,
        disk=DiskSpace(state="/", reserve_mib=0),
        disk_claims=set(),
        unrecorded=UnrecordedVmms(),
        seen_alive={},
        slots=Slots.of(LimitSettings()),
        later=nothing,
        pending_reservations={},
    )


def steps_of(host: Host, log: MemoryStepLog, command_id: str = "cmd-1") -> Steps:
    """A new run of a command."""
    mechanisms = (host.bridges, host.tenant_rules, host.pins, host.taps)
    return Steps(command_id, log, {mechanism.name: mechanism for mechanism in mechanisms})
