"""The gate of `make soak` fails on what it is there for."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import pytest

from tests.constants import START
from tests.soak.cluster import SoakHost
from tests.soak.faults import Faults
from tests.soak.gauges import Gauges, Sample
from tests.soak.load import Ledger
from tests.soak.verdict import wrong_counts

REST = Sample(
    at_s=0,
    rss_kib=70_000,
    descriptors=70,
    threads=20,
    tasks=60,
    journal_bytes=10**6,
    wal_bytes=4 * 2**20,
    commands=0,
    kinds={},
)


def gauges(*samples: Sample) -> Gauges:
    nobody = cast("SoakHost", None)
    return Gauges(Faults(nobody, random.Random(0)), list(samples))


def rising(name: str, step: int) -> list[Sample]:
    first = int(getattr(REST, name))
    changes: list[dict[str, Any]] = [{"commands": n, name: first + n * step} for n in range(30)]
    return [replace(REST, **each) for each in changes]


def test_a_worker_that_stays_as_it_was_passes() -> None:
    assert gauges(*(replace(REST, commands=n) for n in range(30))).growth() == []


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("rss_kib", 1_500),
        ("descriptors", 1),
        ("threads", 1),
        ("tasks", 2),
        ("journal_bytes", 200_000),
        ("wal_bytes", 2**20),
    ],
)
def test_what_grows_is_named(name: str, step: int) -> None:
    (found,) = gauges(*rising(name, step)).growth()

    assert name.partition("_")[0].replace("wal", "log") in found


def test_a_run_too_short_to_judge_does_not_pass() -> None:
    (found,) = gauges(REST).growth()

    assert "too few" in found


def test_a_command_without_its_one_reply_is_named() -> None:
    ledger = Ledger(sent={"a": START, "b": START, "c": START})

    found = wrong_counts("replies", Counter({"a": 1, "b": 2, "x": 1}), ledger)

    assert found == [
        "b has 2 replies, want 1",
        "c has 0 replies, want 1",
        "x has replies and was never sent",
    ]
