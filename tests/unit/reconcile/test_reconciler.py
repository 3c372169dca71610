"""What is put right behind hostd's back and after commands that were answered half-way."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from handlers.errors import HostFault
from handlers.registry import mechanisms
from schemas.codes import Code
from schemas.records import Status
from schemas.requests import SetupNetwork, StartInstance, StopInstance
from tests.fakes.host import FakeHost, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from worker.metrics import Metrics
from worker.reconcile.reconciler import Reconciler

NET = seeded().tenants["acme"].net
START = StartInstance("acme", "web", "i-1")
STOP = StopInstance("acme", "web", "i-1")


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
        assert not [key for key in machine.resources if key[0] in ("tap", "jails", "vmms")]


async def test_what_an_undo_left_behind_is_removed_later(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        before = dict(machine.resources)
        machine.fail = {"vmms": HostFault("injected"), "remove_cgroups": HostFault("stuck")}
        reply = await worker.run(START)
        assert reply.left_behind
        machine.fail.clear()

        await caretaker_of(worker).once()

        assert machine.resources == before
        assert worker.journal.steps.leftovers() == {}


async def test_what_a_live_instance_uses_by_now_is_not_removed(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        machine.fail = {"vmms": HostFault("injected"), "remove_tap": HostFault("stuck")}
        assert (await worker.run(START)).left_behind
        machine.fail.clear()
        assert (await worker.run(START)).code is Code.OK

        await caretaker_of(worker).once()

        assert ("tap", "tn3i5") in machine.resources
        assert worker.journal.steps.leftovers() == {}
