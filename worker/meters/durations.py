"""A histogram that costs one call per observation, for durations of which each launch has many.

prometheus_client's takes a dozen calls and two locks. Source: the Prometheus data model
(buckets are cumulative, `le` is inclusive).
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

NO_LABEL: Final = ""


class Durations(Collector):
    """Seconds by the value of one label, or of none. For one thread.

    Without a label there is a series from the start; else from a value's first observation.
    """

    def __init__(
        self,
        name: str,
        text: str,
        registry: CollectorRegistry,
        *,
        label: str = NO_LABEL,
        buckets: Sequence[float],
    ) -> None:
        self._name, self._text = name, text
        self._labels = [label] if label else []
        self._bounds = tuple(buckets)
        self._les = [*map(str, self._bounds), "+Inf"]
        # Per value the count of each bucket, those above all bounds, and last the sum.
        self._series: dict[str, list[float]] = {}
        if not label:
            self._series[NO_LABEL] = self._new()
        registry.register(self)

    def observe(self, seconds: float, value: str = NO_LABEL) -> None:
        series = self._series.get(value)
        if series is None:
            series = self._series[value] = self._new()
        series[bisect_left(self._bounds, seconds)] += 1
        series[-1] += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = self._family()
        for value, series in self._series.items():
            buckets = list(zip(self._les, accumulate(series[:-1]), strict=True))
            family.add_metric([value] if self._labels else [], buckets, series[-1])
        yield family

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield self._family()

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._name, self._text, labels=self._labels)

    def _new(self) -> list[float]:
        return [0.0] * (len(self._bounds) + 2)
