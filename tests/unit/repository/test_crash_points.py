"""The list of points at which crash tests kill a worker: complete, and a slice of it by seed."""

from pathlib import Path

import pytest

from handlers.registry import HANDLERS
from tests.crash.points import (
    ALL,
    BEFORE,
    ENDS,
    KINDS,
    RUN,
    SLICE,
    chosen,
    in_memory,
    of_this_run,
    points,
    requests,
)
from tests.unit.instance.test_contract_table import documented

# Marks in the journal, not steps: docs/contract.md.
MARKS = {"boot", "consumed"}
POINTS = [(kind, f"before:step_{n}") for kind in requests() for n in range(9)]


def test_every_command_of_the_registry_is_killed() -> None:
    assert requests().keys() == BEFORE.keys() == set(KINDS)
    assert {type(request) for request in requests().values()} == HANDLERS.keys()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_command_is_killed_around_each_step_of_the_contract(
    kind: str, tmp_path: Path
) -> None:
    found = points(await in_memory(kind, tmp_path))

    around = {
        edge: {each.partition(":")[2] for each in found if each.startswith(edge)}
        for edge in ("before:", "after:")
    }
    ends = {end.partition(":")[2] for end in ENDS}
    # A step that waits for a slot is taken only while all are in use.
    steps = {
        step
        for step in documented()[kind].steps
        if not step.startswith("wait_") or step == "wait_agent"
    }
    assert around["before:"] - MARKS - ends == steps
    assert around["after:"] - MARKS - ends == steps
    assert set(ENDS) <= set(found)


def test_of_rows_committed_together_the_first_is_a_point() -> None:
    moments = ["intent:cgroup", "intent:tap", "before:tap", "after:tap", "before:tap", "intent:x"]

    assert points(moments) == ["intent:cgroup", "before:tap", "after:tap", "intent:x"]


def test_a_slice_has_each_command_and_comes_back_with_its_seed() -> None:
    one, again, other = (chosen(POINTS, seed) for seed in ("7", "7", "8"))

    assert one == again != other
    assert len(one) == SLICE
    assert {kind for kind, _ in one} == set(requests())
    assert [each for each in POINTS if each in one] == one
    assert chosen(POINTS, ALL) == POINTS


def test_the_slice_of_a_seed_does_not_depend_on_the_order_of_what_runs_at_once() -> None:
    assert set(chosen(POINTS[::-1], "7")) == set(chosen(POINTS, "7"))


def test_all_processes_of_a_run_have_the_list_of_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(RUN, "one-run")

    first = of_this_run(POINTS)

    assert of_this_run([("StartInstance", "seen by this process alone"), *POINTS]) == first
