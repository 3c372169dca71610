"""What is counted of VMMs and orphans: ends, probes, and what reconciliation found of them.

Part of the worker's metrics (`worker/metrics.py`), whose rules hold here too.
"""

import signal
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from handlers.vmm_ends import TEXTS

# An increase to 1 is none for Prometheus if the series did not exist before.
FROM_THE_START: Final = (
    *TEXTS,
    "code_0",
    "code_1",
    *(f"signal_{each.value}" for each in (signal.SIGKILL, signal.SIGSYS, signal.SIGABRT)),
)


class VmmMeters:
    """No method blocks, awaits or raises."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._exits = Counter(
            "hostd_vmm_exits_total",
            "VMMs that exited without a command, by reason.",
            ["reason"],
            registry=registry,
        )
        for reason in FROM_THE_START:
            self._exits.labels(reason)
        self._hung = Gauge(
            "hostd_vmm_hung", "Running VMMs that do not answer their API.", registry=registry
        )
        self._probes = Counter(
            "hostd_vmm_probes_total",
            "Probes of running VMMs, by result.",
            ["result"],
            registry=registry,
        )
        self._lost = Gauge(
            "hostd_lost_resources",
            "Parts of running instances that are missing and cannot be made again while they run.",
            registry=registry,
        )
        self._drift = Counter(
            "hostd_drift_total",
            "Resources that were changed out of band, by kind and what became of them.",
            ["kind", "result"],
            registry=registry,
        )
        self._quarantined = Gauge(
            "hostd_launches_quarantined",
            "1 while no Start is taken because launches kept failing by the host's fault, else 0.",
            registry=registry,
        )

    def quarantined(self, active: bool) -> None:
        self._quarantined.set(int(active))

    def exited(self, reason: str) -> None:
        """`reason` is one of a bounded set, never text from the VMM."""
        self._exits.labels(reason).inc()

    def probed(self, result: str) -> None:
        """`answered`, `missed`, `failed`, `yielded` or `busy`."""
        self._probes.labels(result).inc()

    def hung(self, count: int) -> None:
        self._hung.set(count)

    def drift(self, kind: str, result: str) -> None:
        """`kind`: the mechanism's name, or `instance.json`; `result`: `repaired` or `lost`."""
        self._drift.labels(kind, result).inc()

    def lost(self, count: int) -> None:
        """As of the last pass of the reconciler; its `drift` events name them."""
        self._lost.set(count)


class OrphanMeters:
    """What belongs to no record, and what becomes of it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.found = Gauge(
            "hostd_orphans",
            "Resources with hostd's mark that belong to no record, by kind.",
            ["kind"],
            registry=registry,
        )
        self.swept = Counter(
            "hostd_orphans_swept_total",
            "Orphans that the sweep tried to remove, by kind and result.",
            ["kind", "result"],
            registry=registry,
        )
        self.stopped = Gauge(
            "hostd_sweep_stopped",
            "1 while orphans are due and the sweep's budget of the hour is used up.",
            registry=registry,
        )
        self.unrecorded = Gauge(
            "hostd_unrecorded_vmms",
            "Processes with a uid of [vmm] that belong to no record.",
            registry=registry,
        )
