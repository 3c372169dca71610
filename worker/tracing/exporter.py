"""Spans on their way out: a bounded queue, and a thread of its own that sends them in batches.

What nobody takes is dropped and counted. A collector that hangs, refuses or is down keeps this
thread, and nothing else.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from worker.tracing.spans import Span

QUEUE_SPANS: Final = 8192
BATCH_SPANS: Final = 512
EVERY_S: Final = 1.0
TRIES: Final = 4
CLOSE_S: Final = 1.0

log = structlog.get_logger()


class ExportError(Exception):
    """The collector did not take a batch. `again`: it may take it later."""

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


class SpanExporter:
    """Sends with `send`, which returns how many of the spans were rejected, or raises ExportError.

    Attributes:
        exported, dropped, failed: spans since the start; dropped: the queue was full; failed: the
            collector did not take them.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Span]], int],
        *,
        every_s: float = EVERY_S,
        backoff_s: float = 1.0,
    ) -> None:
        self._send = send
        self._every_s = every_s
        self._backoff_s = backoff_s
        self._spans: deque[Span] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._reported = False
        self.exported = self.dropped = self.failed = 0
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Spans in the queue."""
        return len(self._spans)

    def put(self, spans: Sequence[Span]) -> None:
        """Queue the spans of one command, all or none; never blocks on the collector."""
        with self._changed:
            if self._closing or len(self._spans) + len(spans) > QUEUE_SPANS:
                self.dropped += len(spans)
                return
            self._spans.extend(spans)
            if len(self._spans) >= BATCH_SPANS:
                self._changed.notify()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Send what is queued, for at most `timeout_s`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    # -- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            if batch:
                self._export(batch)

    def _next(self) -> Sequence[Span] | None:
        """What came in meanwhile; None once it is closed and empty."""
        with self._changed:
            if not self._closing and len(self._spans) < BATCH_SPANS:
                self._changed.wait(self._every_s)
            if self._closing and not self._spans:
                return None
            size = min(BATCH_SPANS, len(self._spans))
            return [self._spans.popleft() for _ in range(size)]

    def _export(self, batch: Sequence[Span]) -> None:
        for failures in range(1, TRIES + 1):
            try:
                rejected = self._send(batch)
            except ExportError as error:
                self._report(error)
                if not error.again or failures == TRIES or not self._pause(failures):
                    break
            except Exception as error:  # noqa: BLE001 - of this batch only
                self._report(error)
                break
            else:
                self.exported += len(batch) - rejected
                self.failed += rejected
                self._reported = False
                return
        self.failed += len(batch)

    def _pause(self, failures: int) -> bool:
        """Wait before the next try; False once it is closed: there is no time for one."""
        with self._changed:
            pause_s = self._backoff_s * 2 ** (failures - 1)
            return not self._changed.wait_for(lambda: self._closing, pause_s)

    def _report(self, error: Exception) -> None:
        """Log the first failure of an outage."""
        if not self._reported:
            self._reported = True
            log.warning("trace.export_failed", error=str(error)[:500] or type(error).__name__)
