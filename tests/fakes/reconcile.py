"""What reconciliation reads of a host in memory: exits of VMMs, jails, changes of networks."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from handlers.claims.orphan import Orphan
from handlers.errors import Conflict, HostFault
from handlers.registry import mechanisms
from handlers.specs import JailSpec, PinSpec, TenantRulesKey
from handlers.vmm_ends import ExitStatus
from schemas.records import VmmIdentity
from tests.fakes.host import FakeHost, FakeJailMetadata
from tests.fakes.memory_worker import MemoryWorker
from worker.metrics import Metrics
from worker.reconcile.adoption import Adoption
from worker.reconcile.orphans import REMOVED
from worker.reconcile.reconciler import Reconciler
from worker.reconcile.recovery import Recovery
from worker.reconcile.sweep import Sweep
from worker.reconcile.vmm_watch import VmmWatch


class FakeExits:
    """Ends of VMMs of the machine; those in `strange` are live but not what was launched."""

    def __init__(self, machine: FakeHost) -> None:
        self.machine = machine
        self.strange: set[int] = set()
        self.watched: list[int] = []
        self.status = ExitStatus(signal=9)

    async def watch(self, identity: VmmIdentity) -> ExitStatus:
        self.watched.append(identity.pid)
        if identity.pid in self.strange:
            raise HostFault("process identity mismatch")
        await self.machine.exited[identity.pid].wait()
        return self.status

    def left_by(self, identity: VmmIdentity) -> ExitStatus:
        return self.status if identity.pid in self.machine.exited else ExitStatus()


class FakeJailLayout:
    """The jails of the machine; those in `damaged` have no metadata."""

    def __init__(self, machine: FakeHost) -> None:
        self.machine = machine
        self.damaged = machine.no_metadata

    def list_ids(self) -> list[str]:
        return sorted(key for kind, key in self.machine.resources if kind == "jail")

    def read_metadata(self, jail_id: str) -> FakeJailMetadata | None:
        spec: JailSpec | None = self.machine.resources.get(("jail", jail_id))
        if spec is None or jail_id in self.damaged:
            return None
        released = jail_id in self.machine.released_jails
        return FakeJailMetadata(spec.ref, spec.uid, spec.record, released)


@dataclass(frozen=True)
class FakeChange:
    tenant_net_id: int | None = None
    kind: str = "link"


class FakeDrift:
    """Reports what a test puts into `queue`; an exception there ends the listening."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[FakeChange | Exception] = asyncio.Queue()

    async def changes(self) -> AsyncGenerator[FakeChange]:
        while True:
            change = await self.queue.get()
            if isinstance(change, Exception):
                raise change
            yield change


@dataclass(frozen=True)
class FakeInventory:
    jails: Sequence[str] = ()
    taps: Sequence[str] = ()
    bridges: Sequence[str] = ()
    nft: Sequence[str] = ()
    cgroups: Sequence[str] = ()
    snapshots: Sequence[str] = ()
    artifacts: Sequence[str] = ()
    temp: Sequence[str] = ()


def inventory_of(machine: FakeHost) -> FakeInventory:
    """What the machine has, by the names that the real inventory gives it."""
    keys: dict[str, list[str]] = {}
    for kind, key in machine.resources:
        keys.setdefault(kind, []).append(key)
    pins = [PinSpec.parse(key).tap for key in keys.get("pin", [])]
    nets = [TenantRulesKey.parse(key).tenant_net_id for key in keys.get("tenant_rules", [])]
    return FakeInventory(
        jails=keys.get("jail", []),
        taps=keys.get("tap", []),
        bridges=keys.get("bridge", []),
        nft=[
            *(f"bridge guests {tap}" for tap in pins),
            *(f"inet tenants br-tenant-{net_id}" for net_id in nets),
        ],
        cgroups=[f"hostd/{key}" for key in keys.get("cgroup", [])],
        snapshots=[key.replace("#", "/") for key in keys.get("snapshot", [])],
        artifacts=keys.get("artifact", []),
    )


@dataclass
class FakeRemoval:
    """Removes from the machine; what is in `used` is refused, what is in `broken` fails."""

    machine: FakeHost
    used: set[Orphan] = field(default_factory=set[Orphan])
    broken: set[Orphan] = field(default_factory=set[Orphan])
    removed: list[Orphan] = field(default_factory=list[Orphan])

    async def remove(self, orphan: Orphan) -> None:
        if orphan in self.used:
            raise Conflict("a process has it open")
        if orphan in self.broken:
            raise HostFault("the kernel refuses")
        self.removed.append(orphan)
        for kind, key in list(self.machine.resources):
            if orphan in orphans_of_resource(kind, key):
                del self.machine.resources[kind, key]


def orphans_of_resource(kind: str, key: str) -> list[Orphan]:
    one = FakeHost(resources={(kind, key): None})
    found = inventory_of(one)
    return [Orphan(name, each) for name in REMOVED for each in getattr(found, name)]


@dataclass
class Reconciled:
    """A reconciler over a worker in memory, and what it reads."""

    reconciler: Reconciler
    sweep: Sweep
    removal: FakeRemoval
    metrics: Metrics
    drift: FakeDrift
    inventory: FakeInventory | None = None
    now_s: float = 0.0
    calls_hang: bool = False


def reconciled(worker: MemoryWorker) -> Reconciled:
    """With an inventory that is what the machine has, unless a test sets another."""

    async def bound_logs() -> None: ...

    async def take_inventory() -> FakeInventory:
        return made.inventory or inventory_of(worker.machine)

    metrics, drift, removal = Metrics("0"), FakeDrift(), FakeRemoval(worker.machine)
    sweep = Sweep(
        worker.host,
        worker.journal,
        worker.lanes,
        metrics,
        removal,
        take_inventory=take_inventory,
        calls_hang=lambda: made.calls_hang,
        tracing=worker.tracing,
        clock=lambda: made.now_s,
    )
    reconciler = Reconciler(
        worker.host,
        worker.journal,
        worker.lanes,
        mechanisms(worker.host),
        metrics,
        drift=drift,
        bound_logs=bound_logs,
        sweep=sweep,
        calls_hang=lambda: made.calls_hang,
        clock=lambda: made.now_s,
    )
    made = Reconciled(reconciler, sweep, removal, metrics, drift)
    return made


def vmm_watch(worker: MemoryWorker, exits: FakeExits | None = None) -> VmmWatch:
    watch = VmmWatch(
        worker.host,
        worker.journal,
        worker.lanes,
        Metrics("0"),
        exits or FakeExits(worker.machine),
        tracing=worker.tracing,
    )
    worker.closers.append(watch.close)
    return watch


def recovery(worker: MemoryWorker, jails: FakeJailLayout | None = None) -> Recovery:
    layout = jails or FakeJailLayout(worker.machine)
    adoption = Adoption(worker.host, worker.journal, layout, worker.tracing)
    return Recovery(
        worker.host, worker.journal, vmm_watch(worker), adoption, Metrics("0"), worker.tracing
    )
