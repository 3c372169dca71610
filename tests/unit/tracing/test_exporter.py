"""The exporter's thread: what it sends, what it drops, and that nobody waits for it."""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import pytest
from structlog.testing import capture_logs

from schemas.trace_context import TraceContext
from worker.tracing import exporter as exporter_module
from worker.tracing.exporter import BATCH_SPANS, QUEUE_SPANS, ExportError, SpanExporter
from worker.tracing.spans import Span

SPAN = Span(TraceContext("ab" * 16, "cd" * 8, sampled=True), None, "x", "internal", 1, 2, {})


class Sends:
    """A collector that takes batches, or does what `behave` does."""

    def __init__(self, behave: Callable[[], int] = lambda: 0) -> None:
        self.batches: list[int] = []
        self.behave = behave
        self._arrived = threading.Semaphore(0)

    def __call__(self, spans: Sequence[Span]) -> int:
        self.batches.append(len(spans))
        self._arrived.release()
        return self.behave()

    def wait(self, count: int) -> None:
        """Until so many more batches have come."""
        for _ in range(count):
            assert self._arrived.acquire(timeout=10), f"batches so far: {self.batches}"


@contextmanager
def exporting(
    sends: Sends, *, every_s: float = 0.01, backoff_s: float = 0.01
) -> Generator[SpanExporter]:
    exporter = SpanExporter(sends, every_s=every_s, backoff_s=backoff_s)
    try:
        yield exporter
    finally:
        exporter.close()


def refuse(*, again: bool) -> Callable[[], int]:
    def behave() -> int:
        raise ExportError("no", again=again)

    return behave


def test_what_is_put_is_sent_in_batches() -> None:
    sends = Sends()

    with exporting(sends) as exporter:
        for _ in range(3):
            exporter.put([SPAN] * BATCH_SPANS)

    assert sum(sends.batches) == 3 * BATCH_SPANS
    assert max(sends.batches) <= BATCH_SPANS
    assert (exporter.exported, exporter.dropped, exporter.failed) == (3 * BATCH_SPANS, 0, 0)


def test_a_collector_that_hangs_costs_spans_and_no_time() -> None:
    release = threading.Event()
    sends = Sends(lambda: int(not release.wait(20)))
    exporter = SpanExporter(sends, every_s=0.01)
    exporter.put([SPAN])
    sends.wait(1)

    began = time.perf_counter()
    for _ in range(2 * QUEUE_SPANS):
        exporter.put([SPAN])
    took_s = time.perf_counter() - began
    exporter.close(timeout_s=0.05)
    closed_s = time.perf_counter() - began - took_s
    release.set()

    assert exporter.dropped == QUEUE_SPANS
    assert took_s < 2
    assert closed_s < 2
    exporter.put([SPAN])
    assert exporter.dropped == QUEUE_SPANS + 1


def test_a_batch_that_may_be_taken_later_is_tried_again() -> None:
    refusals = iter([ExportError("no", again=True)] * 2)

    def behave() -> int:
        for refusal in refusals:
            raise refusal
        return 0

    sends = Sends(behave)

    with capture_logs() as logs, exporting(sends) as exporter:
        exporter.put([SPAN] * 3)
        sends.wait(3)

    assert (exporter.exported, exporter.failed) == (3, 0)
    assert [line["event"] for line in logs] == ["trace.export_failed"]


@pytest.mark.parametrize(("again", "tries"), [(True, exporter_module.TRIES), (False, 1)])
def test_a_batch_that_is_not_taken_is_given_up(again: bool, tries: int) -> None:
    sends = Sends(refuse(again=again))

    with exporting(sends) as exporter:
        exporter.put([SPAN] * 3)
        sends.wait(tries)

    assert sends.batches == [3] * tries
    assert (exporter.exported, exporter.failed) == (0, 3)


def test_a_full_batch_and_the_end_wait_for_no_interval() -> None:
    sends = Sends()

    with exporting(sends, every_s=60) as exporter:
        exporter.put([SPAN] * BATCH_SPANS)
        sends.wait(1)
        exporter.put([SPAN])
    exporter.put([SPAN] * 2)

    assert sends.batches == [BATCH_SPANS, 1]
    assert (exporter.exported, exporter.dropped) == (BATCH_SPANS + 1, 2)


def test_the_end_waits_for_no_further_try() -> None:
    sends = Sends(refuse(again=True))

    with exporting(sends, backoff_s=60) as exporter:
        exporter.put([SPAN])
        sends.wait(1)

    assert (sends.batches, exporter.failed) == ([1], 1)


def test_each_pause_between_tries_is_twice_the_one_before() -> None:
    sends = Sends(refuse(again=True))

    with exporting(sends, backoff_s=0.05) as exporter:
        exporter.put([SPAN])
        sends.wait(1)
        began = time.perf_counter()
        sends.wait(3)
        took_s = time.perf_counter() - began

    assert took_s >= 0.05 + 0.1 + 0.2 - 0.01


def test_each_outage_is_logged_once() -> None:
    answers = iter([False, False, True, False])

    def behave() -> int:
        if not next(answers):
            raise ExportError("no", again=False)
        return 0

    sends = Sends(behave)

    with capture_logs() as logs, exporting(sends) as exporter:
        for _ in range(4):
            exporter.put([SPAN])
            sends.wait(1)

    assert (exporter.exported, exporter.failed) == (1, 3)
    assert [line["event"] for line in logs] == ["trace.export_failed"] * 2


@pytest.mark.parametrize(
    ("text", "logged"), [("x" * 1000, "x" * 500), ("", "ExportError")], ids=["long", "empty"]
)
def test_what_is_logged_of_a_failure_is_bounded_and_not_empty(text: str, logged: str) -> None:
    def behave() -> int:
        raise ExportError(text, again=False)

    with capture_logs() as logs, exporting(Sends(behave)) as exporter:
        exporter.put([SPAN])

    assert [line["error"] for line in logs] == [logged]


def test_a_bug_in_one_batch_does_not_end_the_thread() -> None:
    answers = iter([ZeroDivisionError("bug"), None])

    def behave() -> int:
        error = next(answers)
        if error is not None:
            raise error
        return 1

    sends = Sends(behave)

    with exporting(sends) as exporter:
        exporter.put([SPAN])
        sends.wait(1)
        exporter.put([SPAN] * 2)

    assert (exporter.exported, exporter.failed) == (1, 2)
