"""`ask.usage`: what the kernel counts of an instance's VMM, and null for what it cannot tell."""

from functools import partial
from pathlib import Path

import pytest
from msgspec import to_builtins

from handlers.errors import NotFound
from handlers.specs import CgroupUsage, TapTraffic
from schemas import naming
from schemas.protocol.queries import ExplainAnswer
from schemas.requests import InstanceRef, SetupNetwork, StartInstance
from schemas.usage import COUNT_MAX, Totals
from tests.constants import NET, REF, SLEEP, START, STOP, WAKE
from tests.fakes.host import instance_file, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from worker.queries.answers import Answer, Answers
from worker.queries.usage import total, usage_of

TAP = naming.tap_name(NET.tenant_net_id, 5)


async def not_asked(request: object) -> ExplainAnswer:
    raise AssertionError(request)


async def ask(worker: MemoryWorker, ref: InstanceRef = REF) -> Answer:
    usage = await answers_of(worker).usage(ref.tenant_id, ref.pool_id, ref.instance_id)
    plain: Answer = to_builtins(usage)
    return plain


def answers_of(worker: MemoryWorker) -> Answers:
    return Answers(
        worker.journal,
        "b1",
        host_state=lambda: "ready",
        warm_vmms=lambda: 0,
        usage=partial(usage_of, worker.host),
        explain=not_asked,
        vmm_versions=list,
    )


def count(worker: MemoryWorker, memory_bytes: int | None = 4096) -> None:
    record = worker.journal.records.instance(REF)
    assert record is not None
    worker.machine.cgroup_usage[record.cgroup_key] = CgroupUsage(
        1_500_000, memory_bytes, memory_bytes and 8192
    )
    worker.machine.tap_traffic[TAP] = TapTraffic(10, 1, 2000, 3)


async def test_it_is_what_the_kernel_counts_of_this_launch(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await worker.run(SetupNetwork("acme", NET))
        await worker.run(START)
        count(worker)
        worker.machine.boot_ms += 10_000

        answer = await ask(worker)

    assert answer["vmm"] == {
        "duration_ms": 10_000,
        "vcpu_ms": 10_000,
        "memory_mib_s": 1280,
        "cpu_us": 1_500_000,
        "memory_bytes": 4096,
        "memory_peak_bytes": 8192,
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
    totals, span = answer["totals"], answer["span"]
    assert isinstance(totals, dict)
    assert isinstance(span, dict)
    assert (totals["launches"], totals["cpu_us"], span["state"]) == (1, 1_500_000, "stopped")


async def test_the_files_of_a_snapshot_are_shown_for_as_long_as_they_are_on_disk(
    tmp_path: Path,
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await worker.run(SetupNetwork("acme", NET))
        sizes: list[object] = []
        for request in (START, SLEEP, WAKE, STOP):
            await worker.run(request)
            sizes.append((await ask(worker))["snapshot"])

    running, asleep, woken, stopped = sizes
    assert isinstance(asleep, dict)
    assert woken == asleep  # the VMM maps them
    assert (running, stopped) == (None, None)


async def test_a_tenants_sums_are_those_of_its_instances(tmp_path: Path) -> None:
    other = InstanceRef("acme", "web", "i-2")
    machine = seeded()
    machine.files[other] = instance_file(other, 6)
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in (SetupNetwork("acme", NET), START, StartInstance("acme", "web", "i-2")):
            await worker.run(request)
        count(worker)
        machine.boot_ms += 10_000
        machine.guests[worker.record().jail_id].counter = 4 << 20
        await worker.run(SLEEP)
        machine.boot_ms += 5_000

        answer: Answer = to_builtins(await answers_of(worker).usage("acme", None, None))
        with pytest.raises(NotFound, match="tenant globex"):
            await answers_of(worker).usage("globex", None, None)

    current, totals = answer["current"], answer["totals"]
    assert isinstance(current, dict)
    assert isinstance(totals, dict)
    assert answer["instances"] == 2
    assert (current["running"], current["sleeping"], current["stopped"]) == (1, 1, 0)
    assert (current["running_ms"], current["sleeping_ms"]) == (15_000, 5_000)
    assert current["snapshot_size_bytes"] == 4 << 20
    assert current["snapshot_allocated_bytes"] == 2 << 20
    assert current["incomplete"] == 1  # of the other the kernel says nothing in this test
    assert (totals["launches"], totals["running_ms"], totals["cpu_us"]) == (1, 10_000, 1_500_000)


async def test_sums_leave_out_what_is_not_known_and_say_so() -> None:
    one = Totals(from_ms=5, cpu_us=1, memory_peak_bytes=None, running_ms=1 << 52)
    two = Totals(from_ms=3, cpu_us=2, memory_peak_bytes=7, incomplete=1, running_ms=1 << 52)

    found = total((Totals(), one, two))

    assert (found.from_ms, found.cpu_us, found.memory_peak_bytes, found.incomplete) == (3, 3, 7, 1)
    assert total((Totals(cpu_us=COUNT_MAX), one)).cpu_us == COUNT_MAX


async def test_an_unknown_instance_is_not_found(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        with pytest.raises(NotFound, match=r"acme/web/none"):
            await ask(worker, InstanceRef("acme", "web", "none"))
