"""A host in memory: every mechanism of `interfaces.Host`, with one place to make things fail.

`FakeHost.resources` is all that exists on it, by kind and key; a test compares it before and
after. Effects have the names of the steps that cause them.
It passes the same contract tests as the real mechanisms (`tests/contract`).
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network
from typing import Any, ClassVar, Generic, TypeVar

from msgspec import structs

from handlers.claims.facts import DiskProof, Fact
from handlers.claims.unrecorded import TapOwner, UnrecordedVmms, VmmProcess
from handlers.concurrency import Slots
from handlers.errors import Conflict, Failure, HostFault, Invalid, NotFound, Unavailable
from handlers.host.vmm.versions import parse_version, text_of
from handlers.interfaces import Discarded, Host, Records
from handlers.mechanism import Durability, Keyed
from handlers.specs import (
    Ack,
    Artifact,
    ArtifactSpec,
    BootConfig,
    BridgeSpec,
    CgroupSpec,
    CgroupUsage,
    DataDisk,
    DataDiskSpec,
    DiskUsage,
    ExpectedNetwork,
    Jail,
    JailSpec,
    LaunchSpec,
    PinSpec,
    Restored,
    SnapshotFacts,
    SnapshotInfo,
    TapSpec,
    TapTraffic,
    TenantRulesSpec,
)
from handlers.tenant_locks import TenantLocks
from handlers.vmm_ends import ExitStatus, OomCounts
from schemas import naming
from schemas.files import (
    InstanceFile,
    InstanceNet,
    InstanceResources,
    PoolSpec,
    TenantConfig,
    TenantQuota,
)
from schemas.records import DiskIdentity, InstanceRecord, VmmIdentity
from schemas.requests import InstanceRef
from schemas.settings import Settings, VmmSettings
from schemas.usage import Moment
from tests.constants import NET

T = TypeVar("T")
K = TypeVar("K")
SpecT = TypeVar("SpecT", bound=Keyed)

NO_USAGE = DiskUsage(artifacts_bytes=0, snapshots_bytes=0, logs_bytes=0)
BOOT_ID = "00000000-0000-4000-8000-000000000001"


@dataclass
class Guest:
    """A guest; `counter` is in its memory. How often it booted is in `FakeHost.boots`."""

    state: str = "Not started"
    counter: int = 0
    config: BootConfig | None = None
    version: str = ""


class Gate:
    """Where an effect waits until the test opens it."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def passed(self) -> None:
        self.reached.set()
        await self.opened.wait()


@dataclass
class FakeHost:
    """`fail` maps an effect to the failure raised instead of it, `fail_late` after it; an effect
    with a gate in `gates` waits there, and so does `wait_exit`, the wait for an exit in some time.

    With `slow_taps`, a TAP that is released is there until somebody waits for its end. With
    `slow_frees`, a discarded snapshot holds so many bytes until its future in `freeing` is
    done.
    """

    resources: dict[tuple[str, str], Any] = field(default_factory=dict[tuple[str, str], Any])
    fail: dict[str, BaseException] = field(default_factory=dict[str, BaseException])
    fail_late: dict[str, BaseException] = field(default_factory=dict[str, BaseException])
    guests: dict[str, Guest] = field(default_factory=dict[str, Guest])
    boots: dict[str, int] = field(default_factory=dict[str, int])
    jailer_runs: list[str] = field(default_factory=list[str])
    expected_launches: int = 0
    tenants: dict[str, TenantConfig] = field(default_factory=dict[str, TenantConfig])
    pools: dict[tuple[str, str], PoolSpec] = field(default_factory=dict[tuple[str, str], PoolSpec])
    files: dict[InstanceRef, InstanceFile] = field(default_factory=dict[InstanceRef, InstanceFile])
    written: dict[InstanceRef, dict[str, Any]] = field(
        default_factory=dict[InstanceRef, dict[str, Any]]
    )
    revisions: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])
    secrets: dict[str, bytes] = field(default_factory=dict[str, bytes])
    routes: list[str] = field(default_factory=list[str])
    foreign_links: set[str] = field(default_factory=set[str])
    flows: set[str] = field(default_factory=set[str])
    network_warnings: tuple[str, ...] = ()
    prepared: bool = False
    boot_id: str = BOOT_ID
    boot_ms: int = 1_000_000
    vmm_version: str = "1.12.1"
    older_versions: tuple[str, ...] = ()
    reported_version: str | None = None
    memory_mib: int = 16_384
    agent_answers: bool = True
    drain_ack: bool = True
    cpus: int = 4
    disk_low: bool = False
    disk_high: bool = False
    disk_free_bytes: int = 1 << 40
    usage: DiskUsage = NO_USAGE
    slow_frees: int = 0
    slow_taps: bool = False
    released: set[str] = field(default_factory=set[str])
    freeing: list[asyncio.Future[None]] = field(default_factory=list[asyncio.Future[None]])
    stuck_imports: set[str] = field(default_factory=set[str])
    import_bytes: int = 0
    gates: dict[str, Gate] = field(default_factory=dict[str, Gate])
    exits_on_request: bool = True
    hanging: set[str] = field(default_factory=set[str])
    memory_in_use: set[str] = field(default_factory=set[str])
    half_removed: set[str] = field(default_factory=set[str])
    lacking: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    oom: dict[str, OomCounts] = field(default_factory=dict[str, OomCounts])
    cgroup_usage: dict[str, CgroupUsage] = field(default_factory=dict[str, CgroupUsage])
    tap_traffic: dict[str, TapTraffic] = field(default_factory=dict[str, TapTraffic])
    exited: dict[int, asyncio.Event] = field(default_factory=dict[int, asyncio.Event])
    exit_statuses: dict[int, ExitStatus] = field(default_factory=dict[int, ExitStatus])
    uids: dict[str, int] = field(default_factory=dict[str, int])
    live_uids: set[int] = field(default_factory=set[int])
    next_slot: int = 0
    warm: list[int] = field(default_factory=list[int])
    lose_warm: bool = False
    foreign_uids: set[int] = field(default_factory=set[int])
    unproven_disk: list[Fact] = field(default_factory=list[Fact])
    no_metadata: set[str] = field(default_factory=set[str])
    released_jails: set[str] = field(default_factory=set[str])
    stray: list[VmmProcess] = field(default_factory=list[VmmProcess])
    foreign_in_cgroup: set[str] = field(default_factory=set[str])
    next_pid: int = 1000
    seen: list[str] = field(default_factory=list[str])
    later: list[Callable[[], Awaitable[None]]] = field(
        default_factory=list[Callable[[], Awaitable[None]]]
    )

    async def effect(self, name: str, do: Callable[[], T]) -> T:
        """Run one effect with its injected failure, yielding to the loop once as real ones do."""
        self.seen.append(name)
        await asyncio.sleep(0)
        if name in self.gates:
            await self.gates[name].passed()
        if name in self.fail:
            raise self.fail[name]
        value = do()
        if name in self.fail_late:
            raise self.fail_late[name]
        return value

    def kill(self, jail_id: str, status: ExitStatus = ExitStatus()) -> None:  # noqa: B008
        """The VMM exits, for whatever reason; its status is not known if that is not given."""
        identity = self.resources.pop(("vmm", jail_id), None)
        if identity is not None:
            self.exit_statuses[identity.pid] = status
        self.guests.pop(jail_id, None)
        self.live_uids.discard(self.uids.pop(jail_id, 0))
        if identity is not None:
            self.exited[identity.pid].set()

    def put_vmm(self, spec: LaunchSpec) -> None:
        """An idle VMM runs in this jail and cgroup."""
        self.next_pid += 1
        self.uids[spec.key] = spec.uid
        self.live_uids.add(spec.uid)
        self.guests[spec.key] = Guest(version=spec.version or self.vmm_version)
        self.exited[self.next_pid] = asyncio.Event()
        self.resources["vmm", spec.key] = VmmIdentity(
            self.next_pid, 1, 1, 1, spec.cgroup, self.boot_id
        )

    def reboot(self, boot_id: str) -> None:
        """The kernel starts again: VMMs, interfaces, rules and cgroups are gone, files stay."""
        for kind, key in list(self.resources):
            if kind == "vmm":
                self.kill(key)
            elif kind in ("bridge", "tap", "tenant_rules", "pin", "cgroup"):
                del self.resources[kind, key]
        self.prepared = False
        self.boot_id = boot_id

    def plant_link(self, name: str) -> None:
        """An interface appears that is not hostd's."""
        self.foreign_links.add(name)

    def has_link(self, name: str) -> bool:
        ours = {key for kind, key in self.resources if kind in ("bridge", "tap")}
        return name in self.foreign_links | ours

    def refuse_foreign(self, name: str) -> None:
        if name in self.foreign_links:
            raise Conflict(f"link {name} is not hostd's")

    def host(self, records: Records, settings: Settings | None = None) -> Host:
        """The `Host` that a handler gets."""
        settings = settings or Settings()
        return Host(
            settings=settings,
            records=records,
            facts=FakeFacts(self),
            shared=FakeShared(self),
            networks=FakeNetworks(self),
            bridges=FakeBridges(self),
            tenant_rules=FakeTenantRules(self),
            pins=FakePins(self),
            taps=FakeTaps(self),
            artifacts=FakeArtifacts(self),
            data_disks=FakeDataDisks(self),
            cgroups=FakeCgroups(self),
            jails=FakeJails(self),
            vmms=FakeVmms(self, settings.vmm),
            warm=FakeWarmPool(self),
            agents=FakeAgents(self),
            snapshots=FakeSnapshots(self),
            disk=FakeDisk(self),
            disk_claims=set(),
            slots=Slots.of(settings.limits),
            locks=TenantLocks(),
            later=lambda name, work: self.later.append(work),
            pending_reservations={},
            unrecorded=UnrecordedVmms(),
            seen_alive={},
        )


class Plain(Generic[SpecT]):
    """A mechanism whose resources only exist or not."""

    name: ClassVar[str]
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = True

    def __init__(self, machine: FakeHost) -> None:
        self.machine = machine

    async def exists(self, key: str) -> bool:
        return (self.name, key) in self.machine.resources

    async def ensure(self, spec: SpecT) -> Any:
        def put() -> bool:
            made = self.machine.resources.get((self.name, spec.key)) != spec
            self.machine.resources[self.name, spec.key] = spec
            return made

        return await self.machine.effect(self.name, put)

    async def remove(self, key: str) -> None:
        await self.machine.effect(
            f"remove_{self.name}", lambda: self.machine.resources.pop((self.name, key), None)
        )


class FakeTenantRules(Plain[TenantRulesSpec]):
    name: ClassVar[str] = "tenant_rules"


class FakePins(Plain[PinSpec]):
    name: ClassVar[str] = "pin"


class FakeCgroups(Plain[CgroupSpec]):
    """Leaves; `machine.oom` has what the OOM killer did in some."""

    name: ClassVar[str] = "cgroup"

    async def oom_counts(self, key: str) -> OomCounts | None:
        if (self.name, key) not in self.machine.resources:
            return None
        return self.machine.oom.get(key, OomCounts(0, 0))

    async def usage(self, key: str) -> CgroupUsage | None:
        there = (self.name, key) in self.machine.resources
        return self.machine.cgroup_usage.get(key) if there else None

    async def differing(self, specs: Sequence[CgroupSpec]) -> Mapping[str, Sequence[str]]:
        found = {spec.key: self._differing(spec) for spec in specs}
        return {key: names for key, names in found.items() if names}

    async def restore(self, spec: CgroupSpec) -> Restored:
        names = self._differing(spec)
        if spec.key in self.machine.memory_in_use:
            kept = tuple(name for name in names if name != "memory.max")
            return Restored(kept, tuple(f"{name} (in use)" for name in names if name not in kept))
        await self.ensure(spec)
        return Restored(names)

    def _differing(self, spec: CgroupSpec) -> tuple[str, ...]:
        now: CgroupSpec | None = self.machine.resources.get((self.name, spec.key))
        pairs = {
            "memory.max": "memory_max_bytes",
            "cpu.max": "cpu_quota_us",
            "pids.max": "pids_max",
        }
        return (
            tuple(
                limit for limit, name in pairs.items() if getattr(now, name) != getattr(spec, name)
            )
            if now is not None
            else ()
        )


class FakeBridges(Plain[BridgeSpec]):
    """Bridges of tenants."""

    name: ClassVar[str] = "bridge"

    async def ensure(self, spec: BridgeSpec) -> bool:
        self.machine.refuse_foreign(spec.key)
        found = self.machine.resources.get(("bridge", spec.key))
        if found is not None and found.tenant_id != spec.tenant_id:
            raise Conflict(f"bridge {spec.key} belongs to {found.tenant_id}")
        made: bool = await super().ensure(spec)
        return made


class FakeTaps(Plain[TapSpec]):
    """TAPs; one with another alias belongs to another instance."""

    name: ClassVar[str] = "tap"

    async def ensure(self, spec: TapSpec) -> bool:
        self.machine.refuse_foreign(spec.key)
        if spec.key in self.machine.released:
            self._gone(spec.key)
        found = self.machine.resources.get(("tap", spec.key))
        if found is not None and found.alias != spec.alias:
            raise Conflict(f"link {spec.name} is not hostd's")
        if ("bridge", spec.bridge) not in self.machine.resources:
            raise Conflict(f"there is no bridge {spec.bridge}")
        made: bool = await super().ensure(spec)
        return made

    async def exists(self, key: str) -> bool:
        return key not in self.machine.released and await super().exists(key)

    async def traffic(self, key: str) -> TapTraffic | None:
        return self.machine.tap_traffic.get(key) if await self.exists(key) else None

    async def remove(self, key: str) -> None:
        await super().remove(key)
        self.machine.released.discard(key)

    async def release(self, key: str) -> None:
        """Gone at once, or with `slow_taps` when it is waited for."""
        if not self.machine.slow_taps:
            await self.remove(key)
            return

        def release() -> None:
            if ("tap", key) in self.machine.resources:
                self.machine.released.add(key)

        await self.machine.effect("remove_tap", release)

    async def settle(self, tenant_net_id: int) -> None:
        for key in [*self.machine.released]:
            if key.startswith(naming.tap_name_prefix(tenant_net_id)):
                self._gone(key)

    async def owners(self) -> dict[str, TapOwner]:
        return {
            key: TapOwner(spec.alias.removeprefix(naming.ALIAS_PREFIX), spec.owner_uid)
            for (kind, key), spec in self.machine.resources.items()
            if kind == self.name and key not in self.machine.released
        }

    def _gone(self, key: str) -> None:
        self.machine.released.discard(key)
        self.machine.resources.pop(("tap", key), None)


class FakeFacts:
    def __init__(self, machine: FakeHost) -> None:
        self.machine = machine
        self.clock_ms = 1_700_000_000_000

    def now_ms(self) -> int:
        self.clock_ms += 1
        return self.clock_ms

    def moment(self) -> Moment:
        return Moment(self.now_ms(), self.machine.boot_ms, self.machine.boot_id)

    def boot_id(self) -> str:
        return self.machine.boot_id

    def memory_mib(self) -> int:
        return self.machine.memory_mib

    def cpus(self) -> int:
        return self.machine.cpus


class FakeNetworks:
    def __init__(self, machine: FakeHost) -> None:
        self.machine = machine

    async def overlapping_route(self, subnet: str, *, except_bridge: str) -> str | None:
        wanted = IPv4Network(subnet)
        routes = self.machine.routes
        return next((route for route in routes if IPv4Network(route).overlaps(wanted)), None)

    async def damaged(
        self, expected: Sequence[ExpectedNetwork], *, rules_only: bool
    ) -> Sequence[str]:
        def holds(network: ExpectedNetwork) -> bool:
            wanted: dict[tuple[str, str], object] = {
                ("tenant_rules", network.rules.key): network.rules
            }
            wanted |= {("pin", pin.key): pin for pin, _ in network.ports}
            if not rules_only:
                wanted["bridge", network.bridge.key] = network.bridge
                wanted |= {("tap", tap.key): tap for _, tap in network.ports}
            return all(self.machine.resources.get(key) == spec for key, spec in wanted.items())

        return [network.rules.tenant_id for network in expected if not holds(network)]

    async def taps_on(self, bridge: str) -> Sequence[str]:
        return [
            spec.name
            for (kind, _), spec in self.machine.resources.items()
            if kind == "tap" and spec.bridge == bridge
        ]

    async def warnings(self, tenants: int) -> Sequence[str]:
        return self.machine.network_warnings if tenants else ()

    async def flush_conntrack(self, address: str) -> None:
        await self.machine.effect("flush_conntrack", lambda: self.machine.flows.discard(address))

    async def prepare(self) -> bool:
        def put() -> bool:
            first = not self.machine.prepared
            self.machine.prepared = True
            return first

        return await self.machine.effect("prepare_network", put)


class FakeShared:
    def __init__(self, machine: FakeHost) -> None:
        self.machine = machine

    async def tenant(self, tenant_id: str) -> TenantConfig:
        return _known(self.machine.tenants, tenant_id, "tenant.json")

    async def pool(self, tenant_id: str, pool_id: str) -> PoolSpec:
        return _known(self.machine.pools, (tenant_id, pool_id), "pool.json")

    async def instance(self, ref: InstanceRef) -> InstanceFile:
        return _known(self.machine.files, ref, "instance.json")

    async def instances(
        self, refs: Sequence[InstanceRef]
    ) -> Mapping[InstanceRef, InstanceFile | Failure | OSError]:
        found: dict[InstanceRef, InstanceFile | Failure | OSError] = {}
        for ref in refs:
            try:
                found[ref] = await self.instance(ref)
            except (Failure, OSError) as error:
                found[ref] = error
        return found

    async def of_launch(self, ref: InstanceRef) -> tuple[TenantConfig, PoolSpec, InstanceFile]:
        tenant = await self.tenant(ref.tenant_id)
        return tenant, await self.pool(ref.tenant_id, ref.pool_id), await self.instance(ref)

    async def of_start(self, ref: InstanceRef) -> tuple[TenantConfig, PoolSpec, InstanceFile, str]:
        key = (ref.tenant_id, ref.pool_id)
        files = await self.of_launch(ref)
        return *files, _known(self.machine.revisions, key, "artifacts/current")

    async def secrets(self, tenant_id: str) -> bytes | None:
        return self.machine.secrets.get(tenant_id)

    async def prepare_update(self, ref: InstanceRef, changes: dict[str, Any]) -> None:
        """It is all done at the update."""

    async def update_instance(self, ref: InstanceRef, changes: dict[str, Any]) -> None:
        def write() -> None:
            _known(self.machine.files, ref, "instance.json")
            self.machine.written.setdefault(ref, {}).update(changes)
            known = {k: v for k, v in changes.items() if k in InstanceFile.__struct_fields__}
            self.machine.files[ref] = structs.replace(self.machine.files[ref], **known)

        await self.machine.effect("update_instance", write)

    async def remove_instance(self, ref: InstanceRef, *, keep_volumes: bool) -> None:
        def remove() -> None:
            self.machine.files.pop(ref, None)
            if not keep_volumes:
                self.machine.resources.pop(("data_disk", str(ref)), None)

        await self.machine.effect("remove_files", remove)


def _known(table: dict[K, T], key: K, file: str) -> T:
    if key not in table:
        raise NotFound(f"{file} of {key} is missing", path=file)
    return table[key]


class FakeArtifacts(Plain[ArtifactSpec]):
    name: ClassVar[str] = "artifact"
    durability: ClassVar[Durability] = Durability.DURABLE

    async def size_of_import(self, spec: ArtifactSpec) -> int:
        return self.machine.import_bytes

    async def imported(self, key: str) -> bool:
        return await self.exists(key) and key not in self.machine.half_removed

    async def ensure(self, spec: ArtifactSpec) -> Artifact:
        """Never ends for a tenant in `stuck_imports`, but can be cancelled."""
        if spec.tenant_id in self.machine.stuck_imports:
            await asyncio.Event().wait()
        await super().ensure(replace(spec, admitted_bytes=None))
        return Artifact("/a/vmlinux", "/a/rootfs.ext4", None, {})


class FakeDataDisks(Plain[DataDiskSpec]):
    name: ClassVar[str] = "data_disk"
    durability: ClassVar[Durability] = Durability.DURABLE

    def path(self, ref: InstanceRef) -> str:
        return f"/volumes/{ref}/data.ext4"

    async def ensure(self, spec: DataDiskSpec) -> DataDisk:
        found = self.machine.resources.get((self.name, spec.key))
        if found is not None and spec.known is not None and found != spec.known:
            raise Invalid("data.ext4 was not made by hostd", path="volumes/data.ext4")

        def put() -> DiskIdentity:
            size_bytes = spec.size_mib << 20
            made = spec.known or DiskIdentity(1, len(self.machine.resources) + 1, size_bytes)
            identity: DiskIdentity = self.machine.resources.setdefault((self.name, spec.key), made)
            return identity

        identity = await self.machine.effect(self.name, put)
        return DataDisk(self.path(spec.ref), identity)

    async def unallocated_bytes(self, ref: InstanceRef) -> int:
        return 0

    async def prove(
        self, ref: InstanceRef, owners: Collection[int], used_by: int | None = None
    ) -> DiskProof | None:
        """Whatever is there is proven, except for the facts in `unproven_disk`."""
        identity = self.machine.resources.get((self.name, str(ref)))
        if identity is None:
            return None
        facts = [Fact(name, True, "as expected") for name in ("file", "mark", "use")]
        return DiskProof((*facts, *self.machine.unproven_disk), identity)

    async def check_wipe(self, ref: InstanceRef, known: DiskIdentity | None) -> None:
        if "check_wipe" in self.machine.fail:
            raise self.machine.fail["check_wipe"]
        if known is not None and (self.name, str(ref)) not in self.machine.resources:
            raise Invalid("the recorded data disk is missing", path=self.path(ref))

    async def wipe(self, ref: InstanceRef, known: DiskIdentity | None) -> None:
        def wipe() -> None:
            if known is not None and (self.name, str(ref)) not in self.machine.resources:
                raise HostFault("not wiped: the recorded data disk is missing")

        await self.machine.effect("wipe_volumes", wipe)


class FakeDisk:
    def __init__(self, machine: FakeHost) -> None:
        self.machine = machine

    path = "/state"

    @property
    def low(self) -> bool:
        return self.machine.disk_low

    @property
    def high(self) -> bool:
        return self.machine.disk_high

    def usage_bytes(self) -> tuple[int, int]:
        free = self.machine.disk_free_bytes
        return (99 * free, 100 * free) if self.machine.disk_high else (free, 2 * free)

    def used_percent(self) -> float:
        return 99.0 if self.machine.disk_high else 50.0

    def free_bytes(self) -> int:
        return self.machine.disk_free_bytes

    async def usage(self, tenant_id: str, *, without: InstanceRef | None = None) -> DiskUsage:
        await asyncio.sleep(0)
        return self.machine.usage


def launches_of(machine: FakeHost, kind: str, ref: InstanceRef) -> list[int]:
    prefix = naming.jail_id_prefix(ref)
    keys = [key for found, key in machine.resources if found == kind and key.startswith(prefix)]
    return [int(key.removeprefix(prefix)) for key in keys]


class FakeJails(Plain[JailSpec]):
    name: ClassVar[str] = "jail"
    durability: ClassVar[Durability] = Durability.DURABLE

    async def ensure(self, spec: JailSpec) -> Jail:
        await super().ensure(spec)
        has_secrets = spec.secrets is not None or spec.kept_secrets is not None
        return Jail(f"/jails/{spec.jail_id}/root", has_config=True, has_secrets=has_secrets)

    async def launches(self, ref: InstanceRef) -> Sequence[int]:
        return launches_of(self.machine, self.name, ref)

    async def read_log(self, ref: InstanceRef, launch: int | None = None) -> bytes:
        return b"log"

    async def metadata(self, jail_id: str) -> "FakeJailMetadata | None":
        """None for a jail in `no_metadata`."""
        spec: JailSpec | None = self.machine.resources.get((self.name, jail_id))
        if spec is None or jail_id in self.machine.no_metadata:
            return None
        released = jail_id in self.machine.released_jails
        return FakeJailMetadata(spec.ref, spec.uid, spec.record, released)

    async def set_released(self, jail_id: str, *, released: bool) -> None:
        change = self.machine.released_jails
        await self.machine.effect(
            "set_released", lambda: change.add(jail_id) if released else change.discard(jail_id)
        )


@dataclass(frozen=True)
class FakeJailMetadata:
    ref: InstanceRef
    uid: int
    record: InstanceRecord | None
    released: bool


class FakeVmms(Plain[LaunchSpec]):
    name: ClassVar[str] = "vmm"

    def __init__(self, machine: FakeHost, settings: VmmSettings | None = None) -> None:
        super().__init__(machine)
        self.settings = settings or VmmSettings()

    def expect_launch(self) -> None:
        self.machine.expected_launches += 1

    async def ensure(self, spec: LaunchSpec) -> VmmIdentity:
        machine = self.machine
        if machine.uids.get(spec.key, spec.uid) != spec.uid:
            raise Conflict(f"a VMM of jail {spec.jail_id} runs as uid {machine.uids[spec.key]}")

        def launch() -> VmmIdentity:
            if (self.name, spec.key) not in machine.resources:
                machine.jailer_runs.append(spec.key)
                machine.put_vmm(spec)
            identity: VmmIdentity = machine.resources[self.name, spec.key]
            return identity

        return await machine.effect(self.name, launch)

    async def remove(self, key: str) -> None:
        await self.machine.effect("remove_vmm", lambda: self.machine.kill(key))

    async def version_for(self, wanted: str | None, *, reread: bool = True) -> str:
        machine = self.machine
        version = wanted or machine.vmm_version
        if version not in (machine.vmm_version, *machine.older_versions):
            raise HostFault(f"Firecracker {version} is not on this host")
        return version

    async def launches(self, ref: InstanceRef) -> Sequence[int]:
        return launches_of(self.machine, self.name, ref)

    def free_uid(self, taken: Callable[[int], bool], *, keep_turn: bool = False) -> int | None:
        machine, settings = self.machine, self.settings
        slot = machine.next_slot
        for _ in range(settings.uid_count):
            uid = settings.uid_base + slot
            slot = (slot + 1) % settings.uid_count
            if not taken(uid) and uid not in machine.foreign_uids | machine.live_uids:
                if not keep_turn:
                    machine.next_slot = slot
                return uid
        return None

    async def processes(self) -> Sequence[VmmProcess]:
        """The VMMs, and those in `stray` that are in no cgroup of hostd's."""
        machine = self.machine
        vmms = [
            VmmProcess(vmm.pid, vmm.start_ticks, machine.uids[key], key, vmm.cgroup, 130)
            for (kind, key), vmm in machine.resources.items()
            if kind == self.name
        ]
        return [*vmms, *machine.stray]

    async def exists(self, key: str) -> bool:
        return key in self.machine.foreign_in_cgroup or await super().exists(key)

    async def find(self, jail_id: str) -> VmmIdentity | None:
        identity: VmmIdentity | None = self.machine.resources.get((self.name, jail_id))
        return identity

    async def lacking(self, vmms: Mapping[str, VmmIdentity]) -> Mapping[str, Sequence[str]]:
        live = [jail_id for jail_id in vmms if (self.name, jail_id) in self.machine.resources]
        return {each: self.machine.lacking[each] for each in live if each in self.machine.lacking}

    async def alive(self, identity: VmmIdentity) -> bool:
        return identity in (
            v for (kind, _), v in self.machine.resources.items() if kind == self.name
        )

    async def wait_exit(self, identity: VmmIdentity, timeout_s: float) -> bool:
        gone = self.machine.exited[identity.pid]
        if timeout_s == float("inf"):
            return await gone.wait()
        if not gone.is_set():
            await asyncio.sleep(0)
            if "wait_exit" in self.machine.gates:
                await self.machine.gates["wait_exit"].passed()
        return gone.is_set()

    async def exit_status(self, identity: VmmIdentity) -> ExitStatus:
        return self.machine.exit_statuses.get(identity.pid, ExitStatus())

    async def check_confinement(self, identity: VmmIdentity, spec: LaunchSpec) -> None:
        await self.machine.effect("check_confinement", lambda: None)

    def api(self, jail_id: str) -> "FakeVmmApi":
        return FakeVmmApi(self.machine, jail_id)


class FakeClaimedVmm:
    def __init__(self) -> None:
        self.jail_id = "warm-0123456789ab"
        self.entered = False

    async def enter(self) -> None:
        self.entered = True


class FakeWarmPool:
    """Each slot in `FakeHost.warm` has an idle VMM; with `lose_warm` the claimed one is dead."""

    def __init__(self, machine: FakeHost) -> None:
        self.machine = machine
        self.claims: dict[str, int] = {}

    @property
    def slots(self) -> Collection[int]:
        return {*self.machine.warm, *self.claims.values()}

    def claim(self, jail_id: str, version: str) -> int | None:
        if self.ready_slot(version) is None:
            return None
        self.claims[jail_id] = self.machine.warm.pop(0)
        return self.claims[jail_id]

    def ready_slot(self, version: str) -> int | None:
        warm = self.machine.warm
        return warm[0] if warm and version == self.machine.vmm_version else None

    def give_back(self, jail_id: str) -> None:
        self.claims.pop(jail_id, None)

    def launch(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    @asynccontextmanager
    async def used_by(self, spec: LaunchSpec) -> AsyncGenerator["FakeClaimedVmm | None"]:
        if self.claims.pop(spec.jail_id, None) is None:
            yield None
            return
        claimed = FakeClaimedVmm()
        yield claimed
        if claimed.entered and not self.machine.lose_warm:
            self.machine.put_vmm(spec)

    def fit(self, free_mib: int) -> None:
        """Its VMMs have no size."""


class FakeVmmApi:
    """The API of one VMM; gone with it."""

    def __init__(self, machine: FakeHost, jail_id: str) -> None:
        self.machine = machine
        self.jail_id = jail_id

    @property
    def guest(self) -> Guest:
        guest = self.machine.guests.get(self.jail_id)
        if guest is None:
            raise Unavailable("the API socket refused")
        return guest

    async def configure(self, config: BootConfig) -> None:
        guest = self.guest
        await self.machine.effect("configure_vm", lambda: setattr(guest, "config", config))

    async def start(self) -> None:
        guest = self.guest

        def boot() -> None:
            guest.state = "Running"
            disk = self.jail_id.rpartition("-")[0]
            self.machine.boots[disk] = self.machine.boots.get(disk, 0) + 1

        await self.machine.effect("start_vm", boot)

    async def pause(self) -> None:
        guest = self.guest
        await self.machine.effect("pause", lambda: setattr(guest, "state", "Paused"))

    async def resume(self) -> None:
        guest = self.guest
        await self.machine.effect("resume_vm", lambda: setattr(guest, "state", "Running"))

    async def state(self) -> str:
        if self.jail_id in self.machine.hanging:
            await asyncio.Event().wait()
        return self.guest.state

    async def version(self) -> str:
        return text_of(parse_version(self.machine.reported_version or self.guest.version))

    async def create_snapshot(self, state_path: str, mem_path: str) -> None:
        if self.guest.state != "Paused":
            raise HostFault("save/restore unavailable while running")
        await self.machine.effect("create_snapshot", lambda: None)

    async def load_snapshot(self, state_path: str, mem_path: str) -> None:
        guest = self.guest
        try:
            await self.machine.effect("load_snapshot", lambda: setattr(guest, "state", "Paused"))
        except Failure:
            self.machine.kill(self.jail_id)
            raise
        guest.counter = self.machine.resources["snapshot_in_jail", self.jail_id]

    async def send_ctrl_alt_del(self) -> None:
        if self.guest.state == "Running" and self.machine.exits_on_request:
            self.machine.kill(self.jail_id)

    async def close(self) -> None: ...


class FakeAgents:
    def __init__(self, machine: FakeHost) -> None:
        self.machine = machine

    async def ping(self, jail_id: str, port: int, *, timeout_s: float) -> None:
        await self.machine.effect("wait_agent", lambda: None)
        if not self.machine.agent_answers:
            raise Unavailable("the guest agent did not answer")

    async def sleep_prep(
        self, jail_id: str, port: int, *, drain_timeout_s: int, timeout_s: float
    ) -> Ack:
        await self.machine.effect("drain_guest", lambda: None)
        return Ack(self.machine.drain_ack)

    async def wake(self, jail_id: str, port: int, *, timeout_s: float) -> Ack:
        await self.machine.effect("wake_agent", lambda: None)
        return Ack(True)

    async def set_clock(self, jail_id: str, port: int, *, timeout_s: float) -> float:
        await self.machine.effect("set_clock", lambda: None)
        return 0.0


class FakeSnapshots:
    """`snapshot` resources are published, `snapshot_draft` ones are not."""

    def __init__(self, machine: FakeHost) -> None:
        self.machine = machine
        self.hashed: set[tuple[InstanceRef, int]] = set()

    async def begin_write(self, jail_id: str, uid: int) -> tuple[str, str]:
        return "/snap/state", "/snap/mem"

    async def seal(self, jail_id: str, facts: SnapshotFacts) -> SnapshotInfo:
        counter = self.machine.guests[jail_id].counter

        def put() -> SnapshotInfo:
            info = SnapshotInfo(
                number=facts.number,
                directory="/s",
                state_path="/s/state",
                mem_path="/s/mem",
                launch=facts.launch,
                revision=facts.revision,
                vcpus=facts.vcpus,
                mem_mib=facts.mem_mib,
                vmm_version=facts.vmm_version,
                size_bytes=counter,
                allocated_bytes=counter // 2,
                kept_config="/s/config.ext4" if facts.keep_drives else None,
                kept_secrets=None,
                has_secrets=False,
            )
            self.machine.resources["snapshot_draft", f"{facts.ref}#{facts.number}"] = info
            return info

        return await self.machine.effect("seal", put)

    async def publish(self, ref: InstanceRef, number: int) -> None:
        def rename() -> None:
            key = f"{ref}#{number}"
            resources = self.machine.resources
            if ("snapshot", key) in resources:
                return
            if ("snapshot_draft", key) not in resources:
                raise HostFault(f"there is no snapshot {key} to publish")
            resources["snapshot", key] = resources.pop(("snapshot_draft", key))

        await self.machine.effect("publish_snapshot", rename)

    async def read(self, ref: InstanceRef) -> SnapshotInfo | None:
        found: list[SnapshotInfo] = [
            info
            for (kind, key), info in self.machine.resources.items()
            if kind == "snapshot" and key.startswith(f"{ref}#")
        ]
        return max(found, key=lambda info: info.number, default=None)

    async def verify(self, ref: InstanceRef, number: int) -> SnapshotInfo:
        await self.machine.effect("verify_snapshot", lambda: None)
        info: SnapshotInfo | None = self.machine.resources.get(("snapshot", f"{ref}#{number}"))
        if info is None:
            raise HostFault(f"snapshot {number} of {ref} has no manifest")
        return info

    async def hash_memory(self, ref: InstanceRef, number: int) -> str | None:
        if ("snapshot", f"{ref}#{number}") not in self.machine.resources:
            return None
        self.hashed.add((ref, number))
        return "0" * 64

    async def is_hashed(self, ref: InstanceRef, number: int) -> bool:
        gone = ("snapshot", f"{ref}#{number}") not in self.machine.resources
        return gone or (ref, number) in self.hashed

    async def link(self, jail_id: str, uid: int, info: SnapshotInfo) -> tuple[str, str]:
        def put() -> None:
            self.machine.resources["snapshot_in_jail", jail_id] = info.size_bytes

        await self.machine.effect("link_snapshot", put)
        return "/snap/state", "/snap/mem"

    async def restore_ownership(self, ref: InstanceRef, number: int) -> None:
        for kind, key in list(self.machine.resources):
            if kind == "snapshot_in_jail":
                del self.machine.resources[kind, key]

    async def mark_consumed(self, ref: InstanceRef, number: int) -> None:
        await self.machine.effect(
            "mark_consumed",
            lambda: self.machine.resources.pop(("snapshot", f"{ref}#{number}"), None),
        )
        await self.restore_ownership(ref, number)

    async def delete(self, ref: InstanceRef, number: int) -> None:
        if "delete_snapshot" in self.machine.fail:
            raise self.machine.fail["delete_snapshot"]
        for kind in ("snapshot", "snapshot_draft"):
            self.machine.resources.pop((kind, f"{ref}#{number}"), None)

    async def discard(self, ref: InstanceRef, *, below: int | None = None) -> Discarded:
        gone = await self._delete(ref, below=below)
        if not (gone and self.machine.slow_frees):
            return Discarded()
        freed = asyncio.get_running_loop().create_future()
        self.machine.freeing.append(freed)
        return Discarded(self.machine.slow_frees, (freed,))

    async def delete_all(self, ref: InstanceRef) -> None:
        await self._delete(ref)

    async def _delete(self, ref: InstanceRef, *, below: int | None = None) -> int:
        def gone() -> int:
            doomed = [
                (kind, key)
                for kind, key in self.machine.resources
                if kind.startswith("snapshot") and key.startswith(f"{ref}#")
                if below is None or int(key.partition("#")[2]) < below
            ]
            for each in doomed:
                del self.machine.resources[each]
            return len(doomed)

        return await self.machine.effect("discard_snapshot", gone)


def seeded() -> FakeHost:
    """A host with tenant acme (net 3), pool web, instance i-1 at offset 5, revision r1."""
    net = NET
    quota = TenantQuota(16, 32_768, 8, 4, 4, 16, 100)
    machine = FakeHost()
    machine.tenants["acme"] = TenantConfig("acme", quota, net)
    machine.pools["acme", "web"] = PoolSpec("web", "acme", InstanceResources(1, 128, 16))
    machine.revisions["acme", "web"] = "r1"
    ref = InstanceRef("acme", "web", "i-1")
    machine.files[ref] = instance_file(ref, 5)
    return machine


def instance_file(ref: InstanceRef, offset: int, net_id: int = 3) -> InstanceFile:
    base = f"10.240.{net_id}"
    return InstanceFile(
        ref.instance_id,
        ref.pool_id,
        ref.tenant_id,
        "created",
        InstanceNet(
            f"tn{net_id}i{offset}",
            f"02:fc:00:{net_id:02x}:00:{offset:02x}",
            f"{base}.{offset}",
            f"{base}.1",
            24,
        ),
    )
