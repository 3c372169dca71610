"""docs/contract.md, section 10: its examples are what is sent, and its bill is what is counted."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import to_builtins

from schemas.usage import InstanceUsage, TenantUsage, Totals, UsageDetail
from tests.console import blocks
from tests.constants import DESTROY, SLEEP, START, STOP, WAKE
from tests.fakes.host import seeded
from tests.fakes.memory_worker import memory_worker
from tests.unit.instance.pairs import UP
from tests.unit.instance.test_metering import MIB, events, run_all, run_guest

CONTRACT = Path(__file__).parents[3] / "docs" / "contract.md"


def block(name: str) -> str:
    """The code of the block with this name."""
    (found,) = (each for each in blocks(CONTRACT) if each.info == name)
    return found.text


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("usage event", UsageDetail),
        ("usage of an instance", InstanceUsage),
        ("usage of a tenant", TenantUsage),
    ],
)
def test_an_example_has_each_field_and_no_other(name: str, shape: type[msgspec.Struct]) -> None:
    example = json.loads(block(f"json {name}"))
    example = example.get("detail", example)

    assert to_builtins(msgspec.convert(example, shape, strict=True)) == example


def test_the_example_is_consistent() -> None:
    detail = json.loads(block("json usage event"))["detail"]
    span, launch = detail["span"], detail["launch"]

    assert launch["vcpu_ms"] == launch["vcpus"] * span["duration_ms"]
    assert launch["memory_mib_s"] == launch["mem_mib"] * span["duration_ms"] // 1000


async def test_the_bill_of_all_events_is_the_totals(tmp_path: Path) -> None:
    bill = bill_of_the_contract()
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, START)
        run_guest(worker, 100)
        worker.machine.guests[worker.record().jail_id].counter = 64 * MIB
        await run_all(worker, SLEEP)
        worker.machine.boot_ms += 3_600_000
        await run_all(worker, WAKE)
        worker.machine.boot_ms += 10  # the kernel says nothing of this launch
        await run_all(worker, STOP, START)
        run_guest(worker, 30_000)
        await run_all(worker, DESTROY)
        sent = [to_builtins(event) for event in await events(worker)]

    (gone,) = [event for event in sent if event["to"] == "destroyed"]
    totals = to_builtins(msgspec.convert(gone["detail"]["totals"], Totals))
    twice = sent * 2
    random.Random(5).shuffle(twice)
    assert bill(twice) == bill(sent)
    assert bill(sent) == {name: totals[name] for name in bill(sent)}
    assert bill(sent)["incomplete"] == 1
    assert {"cpu_us", "snapshot_mib_s", "running_ms", "sleeping_ms"} < bill(sent).keys()


def bill_of_the_contract() -> Callable[[Iterable[dict[str, Any]]], dict[str, int]]:
    names: dict[str, Any] = {}
    exec(block("python bill of a tenant"), names)
    made: Callable[[Iterable[dict[str, Any]]], dict[str, int]] = names["bill"]
    return made
