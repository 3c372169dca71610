"""What the routes that only show the worker read of it: `dump`, `top`, `doctor`."""

from collections.abc import Mapping
from typing import Any, Protocol

from handlers.claims.unrecorded import UnrecordedVmms
from handlers.concurrency import Slots
from handlers.interfaces import Networks
from handlers.tenant_locks import TenantLocks
from worker.bus.nats import NatsBus
from worker.control.draining import DrainSwitch
from worker.journal.journal import Journal
from worker.lanes import Lanes
from worker.metrics import Metrics
from worker.reconcile.vmm_versions import VmmVersions


class WorkerView(Protocol):
    """`worker.main.Worker`, as far as it is shown."""

    @property
    def journal(self) -> Journal: ...
    @property
    def lanes(self) -> Lanes: ...
    @property
    def bus(self) -> NatsBus: ...
    @property
    def slots(self) -> Slots: ...
    @property
    def locks(self) -> TenantLocks: ...
    @property
    def networks(self) -> Networks: ...
    @property
    def unrecorded(self) -> UnrecordedVmms: ...
    @property
    def drain(self) -> DrainSwitch: ...
    @property
    def metrics(self) -> Metrics: ...
    @property
    def versions(self) -> Mapping[str, str]: ...
    @property
    def vmm_versions(self) -> VmmVersions: ...
    def facts(self) -> Mapping[str, Any]:
        """Host state and capacity."""
        ...

    def checks(self) -> Mapping[str, bool]:
        """Those of `/readyz`."""
        ...
