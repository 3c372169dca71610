"""What is counted of commands, their steps and the journal that keeps them.

Part of the worker's metrics (`worker/metrics.py`), whose rules hold here too.
"""

from collections import deque
from collections.abc import Mapping
from typing import Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from schemas.codes import Code
from schemas.requests import Request
from worker.meters.kinds import BYTES, FAST, LONG

LATER: Final = 256
# An increase to 1 is none for Prometheus if the series did not exist before.
FROM_THE_START: Final = (Code.OK, Code.HOST_FAULT, Code.INTERNAL)


class CommandMeters:
    """No method blocks, awaits or raises.

    Durations of steps and commits, some 25 of each launch, are noted and counted later, many at
    once: each alone, amid other work, costs several times as much.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._noted: deque[tuple[Histogram, float]] = deque()
        self._done: dict[tuple[str, Code], tuple[Counter, Histogram]] = {}
        self._steps: dict[str, Histogram] = {}
        self._commands = Counter(
            "hostd_commands_total",
            "Finished commands, by type and result code.",
            ["type", "code"],
            registry=registry,
        )
        self._command_seconds = Histogram(
            "hostd_command_duration_seconds",
            "Time from receipt of a command to its outcome, including the wait in its lane.",
            ["type"],
            buckets=LONG,
            registry=registry,
        )
        self._step_seconds = Histogram(
            "hostd_step_duration_seconds",
            "Duration of one step of a command.",
            ["step"],
            buckets=FAST,
            registry=registry,
        )
        self._retries = Counter(
            "hostd_retries_total",
            "Attempts after the first of a command, by type and code of the failure.",
            ["type", "code"],
            registry=registry,
        )
        self._lanes = Gauge("hostd_lanes", "Lanes, by state.", ["state"], registry=registry)
        self._unfinished = Gauge(
            "hostd_commands_unfinished",
            "Commands in the journal without an outcome.",
            registry=registry,
        )
        self._commit_seconds = Histogram(
            "hostd_journal_commit_seconds",
            "Duration of one commit of the journal.",
            buckets=FAST,
            registry=registry,
        )
        self._redeliveries = Counter(
            "hostd_redeliveries_total",
            "Command messages that NATS delivered more than once.",
            registry=registry,
        )
        self._ignored_keys = Counter(
            "hostd_envelope_keys_ignored_total",
            "Unknown keys of command envelopes, ignored.",
            registry=registry,
        )
        self._ignored_traces = Counter(
            "hostd_trace_contexts_ignored_total",
            "Ignored texts of a trace context: they break W3C's rules or exceed 512 characters.",
            ["place", "field"],
            registry=registry,
        )
        self._snapshot_seconds = Histogram(
            "hostd_snapshot_duration_seconds",
            "Duration of writing one snapshot.",
            buckets=LONG,
            registry=registry,
        )
        self._snapshot_bytes = Histogram(
            "hostd_snapshot_bytes",
            "Size of one snapshot, state and memory.",
            buckets=BYTES,
            registry=registry,
        )
        self._quarantined = Gauge(
            "hostd_quarantined_rows",
            "Rows of the journal that this version cannot read, by table.",
            ["table"],
            registry=registry,
        )

        for request in get_args(Request):
            for code in FROM_THE_START:
                self._commands.labels(request.__name__, code.value)

    def command_done(self, kind: str, code: Code, seconds: float) -> None:
        """A command of this type finished, `seconds` after it was received."""
        done = self._done.get((kind, code))
        if done is None:  # labels() costs three times what it counts: once per series
            done = self._commands.labels(kind, code.value), self._command_seconds.labels(kind)
            self._done[kind, code] = done
        done[0].inc()
        done[1].observe(seconds)

    def step(self, name: str, seconds: float) -> None:
        series = self._steps.get(name)
        if series is None:
            series = self._steps[name] = self._step_seconds.labels(name)
        self._note(series, seconds)

    def retry(self, kind: str, code: Code) -> None:
        self._retries.labels(kind, code.value).inc()

    def commit(self, seconds: float) -> None:
        self._note(self._commit_seconds, seconds)

    def count_noted(self) -> None:
        """To be called before the metrics are read."""
        while self._noted:
            series, seconds = self._noted.popleft()
            series.observe(seconds)

    def _note(self, series: Histogram, seconds: float) -> None:
        self._noted.append((series, seconds))
        if len(self._noted) >= LATER:
            self.count_noted()

    def redelivered(self) -> None:
        self._redeliveries.inc()

    def keys_ignored(self, count: int) -> None:
        """A command envelope had this many unknown keys: a newer sender, or a misspelt key."""
        self._ignored_keys.inc(count)

    def trace_ignored(self, place: str, field: str) -> None:
        """`place`: envelope or header. `field`: traceparent or tracestate."""
        self._ignored_traces.labels(place, field).inc()

    def snapshot(self, seconds: float, size_bytes: int) -> None:
        self._snapshot_seconds.observe(seconds)
        self._snapshot_bytes.observe(size_bytes)

    def lanes(self, *, busy: int, waiting: int) -> None:
        """Lanes with a running command, and lanes with waiting commands."""
        self._lanes.labels("busy").set(busy)
        self._lanes.labels("waiting").set(waiting)

    def unfinished(self, count: int) -> None:
        self._unfinished.set(count)

    def quarantined(self, counts: Mapping[str, int]) -> None:
        """By table; one that is left out has no series."""
        self._quarantined.clear()
        for table, count in counts.items():
            self._quarantined.labels(table).set(count)

    def finished(self) -> Mapping[str, int]:
        """How many commands finished since the worker started: `ok` and `failed`."""
        counts = {"ok": 0, "failed": 0}
        for (_, code), (counter, _) in self._done.items():
            total = sum(sample.value for family in counter.collect() for sample in family.samples)
            counts["ok" if code is Code.OK else "failed"] += int(total)
        return counts
