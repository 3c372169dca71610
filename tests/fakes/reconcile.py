"""What reconciliation reads of a host in memory: exits of VMMs, jails, changes of networks."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from handlers.errors import HostFault
from handlers.registry import mechanisms
from handlers.specs import JailSpec
from handlers.vmm_ends import ExitStatus
from schemas.records import VmmIdentity
from tests.fakes.host import FakeHost, FakeJailMetadata
from tests.fakes.memory_worker import MemoryWorker
from worker.metrics import Metrics
from worker.reconcile.adoption import Adoption
from worker.reconcile.reconciler import Reconciler
from worker.reconcile.recovery import Recovery
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
    cgroups: Sequence[str] = ()
    artifacts: Sequence[str] = ()


@dataclass
class Reconciled:
    """A reconciler over a worker in memory, and what it reads."""

    reconciler: Reconciler
    metrics: Metrics
    drift: FakeDrift
    inventory: FakeInventory = field(default_factory=FakeInventory)
    now_s: float = 0.0
    calls_hang: bool = False


def reconciled(worker: MemoryWorker) -> Reconciled:
    async def bound_logs() -> None: ...

    async def take_inventory() -> FakeInventory:
        return made.inventory

    metrics, drift = Metrics("0"), FakeDrift()
    reconciler = Reconciler(
        worker.host,
        worker.journal,
        worker.lanes,
        mechanisms(worker.host),
        metrics,
        drift=drift,
        bound_logs=bound_logs,
        take_inventory=take_inventory,
        calls_hang=lambda: made.calls_hang,
        clock=lambda: made.now_s,
    )
    made = Reconciled(reconciler, metrics, drift)
    return made


def vmm_watch(worker: MemoryWorker, exits: FakeExits | None = None) -> VmmWatch:
    watch = VmmWatch(
        worker.host,
        worker.journal,
        worker.lanes,
        Metrics("0"),
        exits or FakeExits(worker.machine),
    )
    worker.closers.append(watch.close)
    return watch


def recovery(worker: MemoryWorker, jails: FakeJailLayout | None = None) -> Recovery:
    adoption = Adoption(worker.host, worker.journal, jails or FakeJailLayout(worker.machine))
    return Recovery(worker.host, worker.journal, vmm_watch(worker), adoption)
