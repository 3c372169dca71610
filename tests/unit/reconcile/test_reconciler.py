"""What is put right behind hostd's back and after commands that were answered half-way."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from handlers.errors import HostFault
from handlers.registry import mechanisms
from schemas.codes import Code
from schemas.records import Status
from schemas.requests import SetupNetwork, SleepInstance, StartInstance, StopInstance
from tests.fakes.host import FakeHost, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from worker.metrics import Metrics
from worker.reconcile.reconciler import Reconciler

NET = seeded().tenants["acme"].net
START = StartInstance("acme", "web", "i-1")
STOP = StopInstance("acme", "web", "i-1")
SLEEP = SleepInstance("acme", "web", "i-1", force=False)


def caretaker_of(worker: MemoryWorker) -> Reconciler:
    async def bound_logs() -> int:
        return 0

    real = SimpleNamespace(
        host=worker.host,
        network=SimpleNamespace(watch=None),
        jails=SimpleNamespace(bound_logs=bound_logs),
    )
    known = mechanisms(worker.host)
    metrics = Metrics("0.0.0")
    return Reconciler(cast("Any", real), worker.journal, worker.lanes, known, metrics)


async def started(worker: MemoryWorker) -> None:
    assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
    assert (await worker.run(START)).code is Code.OK


async def test_a_stop_that_was_answered_half_way_is_completed_later(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await started(worker)
        machine.fail["remove_tap"] = HostFault("injected")
        assert (await worker.run(STOP)).code is Code.HOST_FAULT
        assert worker.record().status is Status.STOPPING
        caretaker = caretaker_of(worker)

        await caretaker.once()
        await worker.lanes.idle()
        assert worker.record().status is Status.STOPPING
        machine.fail.clear()
        await caretaker.once()
        await worker.lanes.idle()

        assert worker.record().status is Status.STOPPED
        assert not [key for key in machine.resources if key[0] in ("tap", "jail", "vmm")]


async def test_what_an_undo_left_behind_is_removed_later(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        before = dict(machine.resources)
        machine.fail = {"vmm": HostFault("injected"), "remove_cgroup": HostFault("stuck")}
        reply = await worker.run(START)
        assert reply.left_behind
        machine.fail.clear()

        await caretaker_of(worker).once()

        assert machine.resources == before
        assert worker.journal.leftovers() == {}


async def test_what_a_live_instance_uses_by_now_is_not_removed(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        machine.fail = {"vmm": HostFault("injected"), "remove_tap": HostFault("stuck")}
        assert (await worker.run(START)).left_behind
        machine.fail.clear()
        assert (await worker.run(START)).code is Code.OK

        await caretaker_of(worker).once()

        assert ("tap", "tn3i5") in machine.resources
        assert worker.journal.leftovers() == {}


async def test_rules_that_an_undo_left_behind_are_removed_later(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        machine.fail = {"bridge": HostFault("injected"), "remove_tenant_rules": HostFault("stuck")}
        reply = await worker.run(SetupNetwork("acme", NET))
        assert reply.left_behind == ("tenant_rules 3,10.240.3.0/24,10.240.3.1",)
        machine.fail.clear()

        await caretaker_of(worker).once()

        assert machine.resources == {}
        assert worker.journal.leftovers() == {}


async def test_rules_of_a_network_that_is_up_by_now_are_not_removed(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        machine.fail = {"bridge": HostFault("injected"), "remove_tenant_rules": HostFault("stuck")}
        assert (await worker.run(SetupNetwork("acme", NET))).left_behind
        machine.fail.clear()
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        up = dict(machine.resources)

        await caretaker_of(worker).once()

        assert machine.resources == up
        assert worker.journal.leftovers() == {}


async def test_the_disk_of_a_stopped_instance_is_not_removed(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        machine.fail = {"vmm": HostFault("injected"), "remove_data_disk": HostFault("stuck")}
        assert (await worker.run(START)).left_behind == ("data_disk acme/web/i-1",)
        machine.fail.clear()
        assert (await worker.run(START)).code is Code.OK
        assert (await worker.run(STOP)).code is Code.OK

        await caretaker_of(worker).once()

        assert ("data_disk", "acme/web/i-1") in machine.resources


async def test_a_snapshot_published_after_a_failed_sleep_is_not_removed(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await started(worker)
        machine.fail_late = {"seal": HostFault("injected")}
        machine.fail = {"drop_snapshot": HostFault("stuck")}
        assert (await worker.run(SLEEP)).left_behind == ("snapshot_draft acme/web/i-1#1",)
        machine.fail_late.clear()
        machine.fail.clear()
        assert (await worker.run(SLEEP)).code is Code.OK

        await caretaker_of(worker).once()

        assert ("snapshot", "acme/web/i-1#1") in machine.resources
        assert worker.journal.leftovers() == {}
