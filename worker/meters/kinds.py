"""Buckets, and a counter that follows a total which another part keeps."""

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
