"""What is counted of the bus, the queries and the log: what goes in and out of the worker.

Part of the worker's metrics (`worker/metrics.py`), whose rules hold here too.
"""

from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Gauge

from worker.meters.kinds import Total

SPANS: Final = {
    "exported": "a collector took",
    "dropped": "were not queued: the queue was full",
    "failed": "no collector took",
}


class SpanCounts(Protocol):
    """What the exporter counts (`worker/tracing/exporter.py`)."""

    exported: int
    dropped: int
    failed: int


class BusMeters:
    """No method blocks, awaits or raises."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._outbox_held = Gauge(
            "hostd_outbox_held_rows",
            "Rows that NATS does not accept as they are; held until the next connection.",
            registry=registry,
        )
        self._outbox = Gauge(
            "hostd_outbox_rows", "Replies, events and state rows not yet sent.", registry=registry
        )
        self._connected = Gauge(
            "hostd_bus_connected", "1 while the bus is connected, else 0.", registry=registry
        )
        self._reconnects = Total("hostd_bus_reconnects_total", "Reconnects to NATS.", registry)
        self._permission_errors = Total(
            "hostd_bus_permission_errors_total",
            "Publications and subscriptions that the NATS server denied.",
            registry,
        )
        self._pulls = Total(
            "hostd_bus_pulls_total", "Pull requests sent to the command consumer.", registry
        )
        self._taken_msg_ids = Total(
            "hostd_bus_taken_msg_ids_total",
            "Publications that the server took for copies of another sender's message.",
            registry,
        )
        self._queries_dropped = Total(
            "hostd_queries_dropped_total",
            "Queries not answered: too many at once, or an invalid reply subject.",
            registry,
        )
        self._spans = {
            result: Total(
                f"hostd_trace_spans_{result}_total", f"Spans of traces that {text}.", registry
            )
            for result, text in SPANS.items()
        }
        self._log_dropped = Total(
            "hostd_log_dropped_total",
            "Log lines that could not be written or repeat too often.",
            registry,
        )

    def outbox_rows(self, count: int, *, held: int) -> None:
        self._outbox.set(count)
        self._outbox_held.set(held)

    def bus_connected(self, connected: bool) -> None:
        self._connected.set(int(connected))

    def bus_totals(
        self, *, reconnects: int, permission_errors: int, pulls: int, taken_msg_ids: int
    ) -> None:
        """Totals since the worker started."""
        self._reconnects.set(reconnects)
        self._permission_errors.set(permission_errors)
        self._pulls.set(pulls)
        self._taken_msg_ids.set(taken_msg_ids)

    def queries_dropped(self, total: int) -> None:
        self._queries_dropped.set(total)

    def spans(self, counts: SpanCounts | None) -> None:
        """Totals since the worker started; None: it makes no spans."""
        if counts is not None:
            self._spans["exported"].set(counts.exported)
            self._spans["dropped"].set(counts.dropped)
            self._spans["failed"].set(counts.failed)

    def log_dropped(self, total: int) -> None:
        self._log_dropped.set(total)
