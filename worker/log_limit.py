"""Limits repeated warnings and errors: a fault that is met in a loop must not fill the log.

Per event a burst and then a rate; what is left out is counted, and the next line of that event
that passes says how many. Lines of level info and below are one per command, and always pass.
"""

import time
from collections.abc import Callable, MutableMapping
from typing import Any, Final

import structlog

BURST: Final = 100
PER_SECOND: Final = 5.0
LIMITED: Final = frozenset({"warning", "error", "critical"})


class LogLimit:
    """A structlog processor."""

    def __init__(self, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._buckets: dict[object, tuple[float, float]] = {}  # tokens, as of when
        self._left_out: dict[object, int] = {}
        self._suppressed = 0

    @property
    def suppressed(self) -> int:
        """All that were left out, part of `hostd_log_dropped_total`."""
        return self._suppressed

    def __call__(
        self, _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        if event.get("level") not in LIMITED:
            return event
        name, now_s = event.get("event"), self._monotonic_s()
        tokens, at_s = self._buckets.get(name, (float(BURST), now_s))
        tokens = min(float(BURST), tokens + (now_s - at_s) * PER_SECOND)
        if tokens < 1:
            self._buckets[name] = tokens, now_s
            self._left_out[name] = self._left_out.get(name, 0) + 1
            self._suppressed += 1
            raise structlog.DropEvent
        self._buckets[name] = tokens - 1, now_s
        if left_out := self._left_out.pop(name, 0):
            event["suppressed"] = left_out
        return event
