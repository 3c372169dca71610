"""Buckets, and counters that follow totals which another part keeps."""

from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter

FAST: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG: Final = (*FAST, 30.0, 60.0, 300.0)
BYTES: Final = tuple(float(2**exponent) for exponent in range(20, 37, 2))


class Total:
    """A counter whose total another part keeps; `set` follows it."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._counter = Counter(name, text, registry=registry)
        self._last = 0

    def set(self, total: int) -> None:
        self._counter.inc(max(0, total - self._last))
        self._last = total


class Totals:
    """As `Total`, by the values of one label."""

    def __init__(self, name: str, text: str, label: str, registry: CollectorRegistry) -> None:
        self._counter = Counter(name, text, [label], registry=registry)
        self._last: dict[str, int] = {}

    def set(self, totals: Mapping[str, int]) -> None:
        for value, total in totals.items():
            self._counter.labels(value).inc(max(0, total - self._last.get(value, 0)))
            self._last[value] = total
