"""The worker's metrics: one registry per worker, one small method per fact.

Never a tenant, pool or instance as a label: the number of series must not grow with tenants. Names
and labels are a contract (docs/operations.md lists them); `promtool check metrics` runs in a test.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Gauge, disable_created_metrics, generate_latest

from worker.meters.bus import BusMeters
from worker.meters.commands import CommandMeters
from worker.meters.host import HostMeters
from worker.meters.resources import ResourceMeters
from worker.meters.vmms import OrphanMeters, VmmMeters

LAG_INTERVAL_S: Final = 0.5


class Metrics(CommandMeters, BusMeters, HostMeters, ResourceMeters):
    """All metrics of one worker. No method blocks, awaits or raises."""

    def __init__(self, version: str) -> None:
        # `_created` series double a counter's cost and fail promtool's naming rules
        disable_created_metrics()  # type: ignore[no-untyped-call] # its module has no hints
        registry = self.registry = CollectorRegistry()
        self._collect: Callable[[], None] = lambda: None
        CommandMeters.__init__(self, registry)
        BusMeters.__init__(self, registry)
        HostMeters.__init__(self, registry)
        ResourceMeters.__init__(self, registry)
        self.vmms = VmmMeters(registry)
        self._orphans = OrphanMeters(registry)
        self.orphan_counts: Mapping[str, int] = {}
        build = Gauge("hostd_build_info", "Always 1.", ["version"], registry=registry)
        build.labels(version).set(1)
        self.lanes(busy=0, waiting=0)
        self.instances({})

    def on_collect(self, collect: Callable[[], None]) -> None:
        """Call `collect` before each scrape, to set gauges and totals; it must be fast."""
        self._collect = collect

    def render(self) -> bytes:
        """The metrics in the text exposition format, with current gauges."""
        self._collect()
        self.count_noted()
        return generate_latest(self.registry)

    # -- orphans -------------------------------------------------------------------------------

    def orphan_swept(self, kind: str, result: str) -> None:
        self._orphans.swept.labels(kind, result).inc()

    def sweep_stopped(self, *, stopped: bool) -> None:
        self._orphans.stopped.set(stopped)

    def unrecorded_vmms(self, count: int) -> None:
        self._orphans.unrecorded.set(count)

    def orphans(self, counts: Mapping[str, int]) -> None:
        """By kind of the inventory; a kind that is left out has no series."""
        self.orphan_counts = counts
        self._orphans.found.clear()
        for kind, count in counts.items():
            self._orphans.found.labels(kind).set(count)


async def sample_loop_lag(metrics: Metrics, interval_s: float = LAG_INTERVAL_S) -> None:
    """Until cancelled: measure how late the loop wakes this task."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval_s
        await asyncio.sleep(interval_s)
        metrics.loop_lag(max(0.0, loop.time() - due))
