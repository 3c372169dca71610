"""`ask.usage`: what the kernel counts of an instance's VMM, and null for what it cannot tell."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from handlers.errors import NotFound
from handlers.specs import CgroupUsage, TapTraffic
from schemas import naming
from schemas.requests import InstanceRef, SetupNetwork
from tests.constants import NET, REF, START, STOP
from tests.fakes.host import seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from worker.queries.answers import Answer, Answers
from worker.queries.usage import usage_of

TAP = naming.tap_name(NET.tenant_net_id, 5)


async def not_asked(request: object) -> Mapping[str, object]:
    raise AssertionError(request)


async def ask(worker: MemoryWorker, ref: InstanceRef = REF) -> Answer:
    answers = Answers(
        worker.journal,
        "b1",
        host_state=lambda: "ready",
        warm_vmms=lambda: 0,
        usage=partial(usage_of, worker.host),
        explain=not_asked,
        vmm_versions=list,
    )
    return await answers.usage(ref)


def count(worker: MemoryWorker, memory_bytes: int | None = 4096) -> None:
    record = worker.journal.records.instance(REF)
    assert record is not None
    worker.machine.cgroup_usage[record.cgroup_key] = CgroupUsage(1_500_000, memory_bytes)
    worker.machine.tap_traffic[TAP] = TapTraffic(10, 1, 2000, 3)


async def test_it_is_what_the_kernel_counts_of_this_launch(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await worker.run(SetupNetwork("acme", NET))
        await worker.run(START)
        count(worker)

        answer = await ask(worker)

    assert answer["vmm"] == {
        "cpu_us": 1_500_000,
        "memory_bytes": 4096,
        "guest_sent_bytes": 10,
        "guest_sent_packets": 1,
        "guest_received_bytes": 2000,
        "guest_received_packets": 3,
    }
    assert (answer["v"], answer["status"], answer["launch"]) == (1, "running", 1)
    assert (answer["tenant_id"], answer["pool_id"], answer["instance_id"]) == ("acme", "web", "i-1")


async def test_what_nothing_counts_is_null_and_not_zero(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await worker.run(SetupNetwork("acme", NET))
        await worker.run(START)
        count(worker, memory_bytes=None)
        worker.machine.tap_traffic.clear()

        vmm = (await ask(worker))["vmm"]

    assert isinstance(vmm, dict)
    assert (vmm["memory_bytes"], vmm["guest_sent_bytes"]) == (None, None)


async def test_an_instance_without_a_vmm_has_no_counters(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await worker.run(SetupNetwork("acme", NET))
        await worker.run(START)
        count(worker)
        await worker.run(STOP)

        answer = await ask(worker)

    assert (answer["status"], answer["vmm"]) == ("stopped", None)


async def test_an_unknown_instance_is_not_found(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        with pytest.raises(NotFound, match=r"acme/web/none"):
            await ask(worker, InstanceRef("acme", "web", "none"))
