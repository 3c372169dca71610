"""What runs is compared with journal and files: hostd's parts are restored, others announced."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec import structs

from handlers.errors import Invalid
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Event, EventKind
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef, SetupNetwork
from tests.constants import NET, REF, START, STOP
from tests.fakes.host import FakeHost, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import FakeChange, Reconciled, reconciled
from worker.metrics import Metrics
from worker.reconcile import running_check
from worker.reconcile.reconciler import PASS_EVERY_S
from worker.reconcile.running_check import PASSES, RunningCheck


@dataclass
class Running:
    machine: FakeHost
    worker: MemoryWorker
    made: Reconciled

    async def once(self) -> None:
        await self.made.reconciler.once()
        await self.worker.lanes.idle()

    async def drifts(self) -> list[Event]:
        rows = await self.worker.journal.outbox.pending("event", 1000)
        events = [codec.decode_event(row.payload) for row in rows]
        return [event for event in events if event.kind is EventKind.DRIFT]

    def counted(self, kind: str, result: str) -> float | None:
        labels = {"kind": kind, "result": result}
        return self.made.metrics.registry.get_sample_value("hostd_drift_total", labels)

    def lost(self) -> float | None:
        return self.made.metrics.registry.get_sample_value("hostd_lost_resources")


@pytest_asyncio.fixture(name="running")
async def one_running_instance(tmp_path: Path) -> AsyncIterator[Running]:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        assert (await worker.run(START)).code is Code.OK
        yield Running(machine, worker, reconciled(worker))


def change_limits(running: Running) -> None:
    key = ("cgroup", running.worker.record().cgroup_key)
    running.machine.resources[key] = replace(running.machine.resources[key], pids_max=9999)


def change_file(running: Running) -> None:
    file = running.machine.files[REF]
    running.machine.files[REF] = structs.replace(file, firecracker_pid=1, status="stopped")


async def test_nothing_is_announced_or_changed_where_all_is_as_launched(running: Running) -> None:
    before, files = dict(running.machine.resources), dict(running.machine.files)
    running.machine.seen.clear()

    await running.once()

    assert (running.machine.resources, running.machine.files) == (before, files)
    assert "update_instance" not in running.machine.seen
    assert await running.drifts() == []
    assert running.lost() == 0


@pytest.mark.parametrize(
    ("harm", "repaired"),
    [
        (change_limits, ["cgroup {key} pids.max"]),
        (change_file, ["instance.json {ref} status", "instance.json {ref} firecracker_pid"]),
    ],
)
async def test_what_is_hostds_is_restored_and_announced_once(
    running: Running, harm: object, repaired: list[str]
) -> None:
    before, files = dict(running.machine.resources), dict(running.machine.files)
    (change_limits if harm is change_limits else change_file)(running)

    await running.once()
    await running.once()

    assert (running.machine.resources, running.machine.files) == (before, files)
    (event,) = await running.drifts()
    key = running.worker.record().cgroup_key
    assert event.detail["repaired"] == [each.format(key=key, ref=REF) for each in repaired]
    assert (event.instance_id, event.detail["lost"]) == (REF.instance_id, [])
    assert running.counted(repaired[0].split()[0], "repaired") == len(repaired)


async def test_a_memory_limit_below_what_is_in_use_is_announced_and_kills_nothing(
    running: Running,
) -> None:
    record = running.worker.record()
    key = ("cgroup", record.cgroup_key)
    running.machine.resources[key] = replace(running.machine.resources[key], memory_max_bytes=1)
    running.machine.memory_in_use.add(record.cgroup_key)

    await running.once()
    await running.once()

    (event,) = await running.drifts()
    assert event.detail["lost"] == [f"cgroup {record.cgroup_key} memory.max (in use)"]
    assert running.worker.record().status is Status.RUNNING
    assert running.lost() == 1


async def test_what_a_vmm_lacks_for_good_is_announced_once_and_counted(running: Running) -> None:
    record = running.worker.record()
    running.machine.lacking[record.jail_id] = ("api.sock",)

    for _ in range(3):
        await running.once()
    (event,) = await running.drifts()
    assert event.detail["lost"] == [f"jail {record.jail_id} api.sock"]
    assert running.lost() == 1

    running.machine.lacking[record.jail_id] = ("api.sock", "v.sock")
    await running.once()
    assert len(await running.drifts()) == 2

    assert (await running.worker.run(STOP)).code is Code.OK
    await running.once()
    assert running.lost() == 0


async def test_a_tap_that_is_lost_for_good_is_announced_once(running: Running) -> None:
    del running.machine.resources["tap", "tn3i5"]

    for _ in range(3):
        await running.once()

    (event,) = await running.drifts()
    assert event.detail["lost"] == ["tap tn3i5"]
    assert running.lost() == 1
    assert running.counted("tap", "lost") == 1


async def test_a_loss_is_counted_once_whatever_else_is_announced_later(running: Running) -> None:
    record = running.worker.record()
    running.machine.lacking[record.jail_id] = ("api.sock",)
    await running.once()
    change_file(running)
    await running.once()
    running.machine.lacking[record.jail_id] = ("api.sock", "v.sock")
    await running.once()

    events = await running.drifts()
    assert [len(event.detail["lost"]) for event in events] == [1, 1, 2]
    assert running.counted("jail", "lost") == 2
    assert running.counted("instance.json", "repaired") == 2


async def test_a_loss_of_the_next_launch_is_another_one(running: Running) -> None:
    for _ in range(2):
        running.machine.lacking[running.worker.record().jail_id] = ("api.sock",)
        await running.once()
        for request in (STOP, START):
            assert (await running.worker.run(request)).code is Code.OK

    assert len(await running.drifts()) == 2
    assert running.counted("jail", "lost") == 2


async def test_a_loss_in_a_network_is_counted_once_whatever_is_repaired_later(
    running: Running,
) -> None:
    del running.machine.resources["tap", "tn3i5"]
    await running.once()
    (rules,) = [key for kind, key in running.machine.resources if kind == "tenant_rules"]
    del running.machine.resources["tenant_rules", rules]
    await running.once()

    assert len(await running.drifts()) == 2
    assert running.counted("tenant_rules", "repaired") == 1
    assert running.counted("tap", "lost") == 1


@pytest.mark.parametrize("lost", ["tap", "api.sock"])
async def test_what_was_lost_counts_no_more_once_the_next_launch_has_it(
    running: Running, lost: str
) -> None:
    if lost == "tap":
        del running.machine.resources["tap", "tn3i5"]
    else:
        running.machine.lacking[running.worker.record().jail_id] = (lost,)
    await running.once()
    await running.once()  # the first one's look at the instance is counted
    assert running.lost() == 1

    for command in (STOP, START):
        assert (await running.worker.run(command)).code is Code.OK
    await running.once()

    assert running.lost() == 0


async def test_a_file_that_agentd_broke_is_announced_and_not_written(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(ref: InstanceRef) -> None:
        raise Invalid("instance.json: $.status: Expected `str`", path="instance.json: $.status")

    monkeypatch.setattr(running.worker.host.shared, "instance", broken)
    running.machine.seen.clear()

    await running.once()
    await running.once()

    (event,) = await running.drifts()
    assert "$.status" in event.detail["lost"][0]
    assert "update_instance" not in running.machine.seen


async def test_a_file_that_agentd_removed_is_no_drift(running: Running) -> None:
    del running.machine.files[REF]

    await running.once()

    assert await running.drifts() == []


async def test_an_instance_that_a_command_changed_meanwhile_is_left_alone(
    running: Running,
) -> None:
    """The survey saw a running instance; by the time of the repair it is stopped."""
    change_file(running)
    stop = await running.worker.send(STOP)
    survey = asyncio.create_task(running.made.reconciler.once())
    assert (await running.worker.reply(stop)).code is Code.OK
    await survey
    await running.worker.lanes.idle()

    assert running.machine.files[REF].status == "stopped"
    assert running.machine.files[REF].firecracker_pid is None


async def test_all_are_compared_within_a_few_passes_however_many_run(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass takes a slice, so that no pass costs more than a quarter of all."""
    worker = running.worker
    for number in range(40):
        ref = InstanceRef("acme", "web", f"n-{number}")
        record = structs.replace(
            worker.record(), ref=ref, uid_slot=100 + number, offset=20 + number
        )
        await worker.journal.records.put_instance(record)
    seen: list[list[InstanceRef]] = []

    async def look(records: list[InstanceRecord], host: object) -> list[InstanceRecord]:
        seen.append([record.ref for record in records])
        return []

    monkeypatch.setattr(running_check, "survey_running", look)
    monkeypatch.setattr(running_check, "SLICE", 4)
    check = RunningCheck(worker.host, worker.journal, worker.lanes, Metrics("0"))

    for _ in range(PASSES):
        await check.run()

    assert len({ref for refs in seen for ref in refs}) == 41
    assert max(map(len, seen)) <= -(-41 // PASSES)


async def test_a_stream_of_changes_does_not_hold_up_the_pass(running: Running) -> None:
    made = running.made
    task = asyncio.create_task(made.reconciler.run())
    try:
        for _ in range(3):  # a change is always waiting
            change_file(running)
            async with asyncio.timeout(10):
                while running.machine.files[REF].status != "running":
                    if made.drift.queue.empty():
                        made.drift.queue.put_nowait(FakeChange(tenant_net_id=9))
                    await asyncio.sleep(0)
                    made.now_s += PASS_EVERY_S / 10
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
