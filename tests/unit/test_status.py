"""Each predicate of `Status`, decided for every status."""

import pytest

from schemas.records import Status

PREDICATES = ("never_started", "at_rest", "expects_vmm", "holds_tap")
TABLE: dict[Status, set[str]] = {
    Status.CREATED: {"never_started", "at_rest"},
    Status.READY: {"never_started", "at_rest"},
    Status.RUNNING: {"expects_vmm", "holds_tap"},
    Status.WARM: {"holds_tap"},
    Status.SLEEPING: set(),
    Status.STOPPED: {"at_rest"},
    Status.STARTING: {"holds_tap"},
    Status.STOPPING: {"holds_tap"},
    Status.DRAINING: {"holds_tap"},
    Status.SNAPSHOTTING: {"holds_tap"},
    Status.WAKING: {"holds_tap"},
    Status.DESTROYING: {"holds_tap"},
    Status.FAILED: {"at_rest"},
    Status.UNKNOWN: {"holds_tap"},
    Status.DESTROYED: set(),
}


def test_every_status_is_decided() -> None:
    assert TABLE.keys() == set(Status)


def test_every_predicate_is_decided() -> None:
    assert {n for n, member in vars(Status).items() if isinstance(member, property)} == set(
        PREDICATES
    )


@pytest.mark.parametrize("predicate", PREDICATES)
@pytest.mark.parametrize("status", Status)
def test_predicates(status: Status, predicate: str) -> None:
    assert getattr(status, predicate) is (predicate in TABLE[status])
