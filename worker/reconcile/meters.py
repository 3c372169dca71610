"""What is counted of VMMs: their ends, probes, and what reconciliation found of them.

Part of the worker's metrics (`worker/metrics.py`), whose rules hold here too.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge


class VmmMeters:
    """No method blocks, awaits or raises."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._exits = Counter(
            "hostd_vmm_exits_total",
            "VMMs that exited without a command, by reason.",
            ["reason"],
            registry=registry,
        )
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

    def lost(self, count: int) -> None:
        """As of the last pass of the reconciler; its `drift` events name them."""
        self._lost.set(count)
