"""What the reconciler restores, completes, removes and counts."""

import asyncio
from functools import partial
from pathlib import Path

import pytest

from handlers.errors import Abandoned, HostFault, Unavailable
from schemas import codec
from schemas.codes import Code
from schemas.records import Status
from schemas.requests import SetupNetwork
from tests.constants import NET, SLEEP, START, STOP
from tests.fakes.host import FakeHost, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import FakeChange, FakeInventory, reconciled
from worker.reconcile import reconciler as module
from worker.reconcile.reconciler import PASS_EVERY_S, SCAN_EVERY_MAX_S


async def started(worker: MemoryWorker) -> None:
    assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
    assert (await worker.run(START)).code is Code.OK


async def test_a_stop_that_failed_partway_is_completed(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await started(worker)
        machine.fail["remove_tap"] = HostFault("injected")
        assert (await worker.run(STOP)).code is Code.HOST_FAULT
        assert worker.record().status is Status.STOPPING
        reconciler = reconciled(worker).reconciler

        await reconciler.once()
        await worker.lanes.idle()
        assert worker.record().status is Status.STOPPING
        machine.fail.clear()
        await reconciler.once()
        await worker.lanes.idle()

        assert worker.record().status is Status.STOPPED
        assert not [key for key in machine.resources if key[0] in ("tap", "jail", "vmm")]


async def test_what_an_undo_left_behind_is_removed(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        before = dict(machine.resources)
        machine.fail = {"vmm": HostFault("injected"), "remove_cgroup": HostFault("stuck")}
        reply = await worker.run(START)
        assert reply.left_behind
        machine.fail.clear()

        await reconciled(worker).reconciler.once()

        assert machine.resources == before
        assert worker.journal.steps.leftovers() == {}


async def test_a_leftover_that_a_live_instance_uses_by_now_is_not_removed(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        machine.fail = {"vmm": HostFault("injected"), "remove_tap": HostFault("stuck")}
        assert (await worker.run(START)).left_behind
        machine.fail.clear()
        assert (await worker.run(START)).code is Code.OK

        await reconciled(worker).reconciler.once()

        assert ("tap", "tn3i5") in machine.resources
        assert worker.journal.steps.leftovers() == {}


async def test_what_an_abandoned_call_may_still_make_stays_a_leftover_until_it_returns(
    tmp_path: Path,
) -> None:
    machine: FakeHost = seeded()
    pending = True
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        made = reconciled(worker)
        made.calls_hang = True
        before = dict(machine.resources)
        machine.fail = {"tap": Abandoned("hangs", lambda: pending).not_retryable()}
        reply = await worker.run(START)
        assert (reply.code, reply.left_behind) == (Code.UNAVAILABLE, ("tap tn3i5",))
        assert machine.resources == before  # undone, but for what may still come
        machine.fail.clear()

        machine.resources["tap", "tn3i5"] = "made late"
        for _pass in range(2):
            await made.reconciler.once()
            assert machine.resources == before
            assert worker.journal.steps.leftovers() != {}
            machine.resources["tap", "tn3i5"] = "made even later"
        pending = made.calls_hang = False
        await made.reconciler.once()

        assert machine.resources == before
        assert worker.journal.steps.leftovers() == {}


async def test_a_reported_change_restores_the_network_it_concerns(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        made = reconciled(worker)
        running = asyncio.create_task(made.reconciler.run())
        bridge = machine.resources.pop(("bridge", "br-tenant-3"))
        made.drift.queue.put_nowait(FakeChange(tenant_net_id=9))
        made.drift.queue.put_nowait(FakeChange(tenant_net_id=NET.tenant_net_id))

        async with asyncio.timeout(10):
            while ("bridge", "br-tenant-3") not in machine.resources:
                await asyncio.sleep(0)

        assert machine.resources["bridge", "br-tenant-3"] == bridge
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_watch_that_fails_is_started_again_after_a_pass_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        made = reconciled(worker)
        monkeypatch.setattr(module, "PASS_EVERY_S", 0.0)
        made.drift.queue.put_nowait(Unavailable("the socket overflowed"))
        running = asyncio.create_task(made.reconciler.run())
        async with asyncio.timeout(10):
            while not made.drift.queue.empty():
                await asyncio.sleep(0)

        made.drift.queue.put_nowait(FakeChange())
        async with asyncio.timeout(10):
            while not made.drift.queue.empty():
                await asyncio.sleep(0)

        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_what_keeps_guests_from_the_network_is_counted_and_reported_once(
    tmp_path: Path,
) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        made = reconciled(worker)
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        count = partial(made.metrics.registry.get_sample_value, "hostd_network_warnings")
        await made.reconciler.once()
        assert count() == 0

        machine.network_warnings = ("chain ip filter FORWARD drops all",)
        for _ in range(2):
            await made.reconciler.once()

        assert count() == 1
        sent = [
            codec.decode_event(row.payload).detail
            for row in await worker.journal.outbox.pending("event", 100)
        ]
        assert [detail["warnings"] for detail in sent if "warnings" in detail] == [
            ["chain ip filter FORWARD drops all"]
        ]


@pytest.mark.parametrize(
    ("took_s", "pause_s"), [(0.01, PASS_EVERY_S), (0.1, 100.0), (2.0, SCAN_EVERY_MAX_S)]
)
async def test_an_inventory_that_takes_long_is_made_less_often(
    tmp_path: Path, took_s: float, pause_s: float
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        looks: list[float] = []

        async def look() -> None:
            looks.append(made.now_s)
            made.now_s += took_s

        made.sweep.once = look  # type: ignore[method-assign]
        began = made.now_s
        await made.reconciler.once()
        made.now_s = began + pause_s - 0.01
        await made.reconciler.once()
        assert looks == [began]

        made.now_s = began + pause_s
        await made.reconciler.once()

        assert looks == [began, began + pause_s]


async def test_a_look_for_vmms_without_a_record_that_takes_long_is_made_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)

        async def look(_host: object) -> tuple[()]:
            looks.append(made.now_s)
            made.now_s += 0.1
            return ()

        monkeypatch.setattr(module, "look_for_unrecorded", look)
        for at_s in (0.0, 99.0, 100.0):
            made.now_s = at_s
            await made.reconciler.once()

    assert looks == [0.0, 100.0]


async def test_what_two_passes_find_without_a_record_is_counted_as_an_orphan(
    tmp_path: Path,
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(taps=("tn3i9",))
        taps = {"kind": "taps"}

        await made.reconciler.once()
        assert made.metrics.registry.get_sample_value("hostd_orphans", taps) is None
        await made.reconciler.once()  # within the interval: no second inventory
        assert made.metrics.registry.get_sample_value("hostd_orphans", taps) is None
        made.now_s += PASS_EVERY_S
        await made.reconciler.once()

        assert made.metrics.registry.get_sample_value("hostd_orphans", taps) == 1
        assert worker.journal.steps.leftovers() == {}


async def test_rules_that_an_undo_left_behind_are_removed_later(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        machine.fail = {"bridge": HostFault("injected"), "remove_tenant_rules": HostFault("stuck")}
        reply = await worker.run(SetupNetwork("acme", NET))
        assert reply.left_behind == ("tenant_rules 3,10.240.3.0/24,10.240.3.1",)
        machine.fail.clear()

        await reconciled(worker).reconciler.once()

        assert machine.resources == {}
        assert worker.journal.steps.leftovers() == {}


async def test_rules_of_a_network_that_is_up_by_now_are_not_removed(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        machine.fail = {"bridge": HostFault("injected"), "remove_tenant_rules": HostFault("stuck")}
        assert (await worker.run(SetupNetwork("acme", NET))).left_behind
        machine.fail.clear()
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        up = dict(machine.resources)

        await reconciled(worker).reconciler.once()

        assert machine.resources == up
        assert worker.journal.steps.leftovers() == {}


async def test_the_disk_of_a_stopped_instance_is_not_removed(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        machine.fail = {"vmm": HostFault("injected"), "remove_data_disk": HostFault("stuck")}
        assert (await worker.run(START)).left_behind == ("data_disk acme/web/i-1",)
        machine.fail.clear()
        assert (await worker.run(START)).code is Code.OK
        assert (await worker.run(STOP)).code is Code.OK

        await reconciled(worker).reconciler.once()

        assert ("data_disk", "acme/web/i-1") in machine.resources


async def test_a_snapshot_published_after_a_failed_sleep_is_not_removed(tmp_path: Path) -> None:
    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await started(worker)
        machine.fail_late = {"seal": HostFault("injected")}
        machine.fail = {"delete_snapshot": HostFault("stuck")}
        assert (await worker.run(SLEEP)).left_behind == ("snapshot_draft acme/web/i-1#1",)
        machine.fail_late.clear()
        machine.fail.clear()
        assert (await worker.run(SLEEP)).code is Code.OK

        await reconciled(worker).reconciler.once()

        assert ("snapshot", "acme/web/i-1#1") in machine.resources
        assert worker.journal.steps.leftovers() == {}
