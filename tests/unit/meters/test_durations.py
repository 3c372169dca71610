"""Durations are exported as prometheus_client exports its own histogram."""

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest

from worker.meters.durations import Durations
from worker.meters.kinds import FAST

SECONDS = (0.0, 0.0005, 0.001, 0.0010001, 0.3, 10.0, 10.1, 1e6)


def test_the_text_is_that_of_prometheus_clients_histogram() -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call] # its module has no hints
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    durations = Durations("d_seconds", "Text.", ours, label="step", buckets=FAST)
    histogram = Histogram("d_seconds", "Text.", ["step"], buckets=FAST, registry=theirs)

    for step in ("tap", 'a "quoted" one'):
        for seconds in SECONDS:
            durations.observe(seconds, step)
            histogram.labels(step).observe(seconds)

    assert generate_latest(ours) == generate_latest(theirs)


def test_a_histogram_without_a_label_is_exported_before_its_first_observation() -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call] # its module has no hints
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    durations = Durations("d_seconds", "Text.", ours, buckets=FAST)
    histogram = Histogram("d_seconds", "Text.", buckets=FAST, registry=theirs)

    before = generate_latest(ours), generate_latest(theirs)
    durations.observe(0.2)
    histogram.observe(0.2)

    assert before[0] == before[1]
    assert generate_latest(ours) == generate_latest(theirs)
