"""The exit of a VMM is handled in its instance's lane, and again until its cleanup succeeds."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from handlers.errors import HostFault
from handlers.vmm_ends import ExitStatus, OomCounts, text_of
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Event, EventKind
from schemas.records import InstanceRecord, Status
from schemas.requests import SetupNetwork
from tests.constants import START
from tests.fakes.host import seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import FakeExits, vmm_watch
from worker.journal.transaction import Transaction
from worker.metrics import Metrics
from worker.queries.answers import described
from worker.reconcile.vmm_watch import RETRY_S, VmmWatch

UP = SetupNetwork("acme", seeded().tenants["acme"].net)


async def started(worker: MemoryWorker) -> InstanceRecord:
    for request in (UP, START):
        assert (await worker.run(request)).code is Code.OK
    return worker.record()


async def events(worker: MemoryWorker, kind: EventKind) -> list[Event]:
    rows = await worker.journal.outbox.pending("event", 1000)
    found = [codec.decode_event(row.payload) for row in rows]
    return [event for event in found if event.kind is kind]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0)


async def test_an_exit_is_cleaned_up_and_the_instance_is_failed(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        record = await started(worker)
        watch = vmm_watch(worker)
        watch.sync_all()

        machine.flows = {"10.240.3.5", "10.240.3.6"}
        machine.kill(record.jail_id)
        await until(lambda: worker.record().status is Status.FAILED)

        assert machine.flows == {"10.240.3.6"}
        assert not [key for kind, key in machine.resources if kind in ("jail", "tap", "cgroups")]
        await watch.close()


async def test_a_cleanup_that_fails_is_tried_again_after_a_pause(tmp_path: Path) -> None:
    machine = seeded()
    pauses: asyncio.Queue[float] = asyncio.Queue()
    over = asyncio.Event()

    async def sleep(seconds: float) -> None:
        pauses.put_nowait(seconds)
        await over.wait()

    async with memory_worker(tmp_path / "j", machine) as worker:
        record = await started(worker)
        exits = FakeExits(machine)
        watch = VmmWatch(
            worker.host, worker.journal, worker.lanes, Metrics("0"), exits, sleep=sleep
        )
        machine.kill(record.jail_id)
        machine.fail["remove_jail"] = HostFault("the disk does not answer")

        watch.exited(record, ExitStatus(), seen=True)
        async with asyncio.timeout(10):
            assert await pauses.get() == RETRY_S
        assert worker.record().status is Status.RUNNING

        machine.fail.clear()
        over.set()
        await until(lambda: worker.record().status is Status.FAILED)
        await watch.close()


async def test_a_live_process_that_is_not_the_vmm_launched_is_quarantined(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        record = await started(worker)
        assert record.vmm is not None
        exits = FakeExits(machine)
        exits.strange.add(record.vmm.pid)
        watch = vmm_watch(worker, exits)
        commits: list[Transaction] = []
        worker.journal.store.on_commit(commits.append)

        watch.sync_all()
        await until(lambda: worker.record().status is Status.UNKNOWN)

        assert len(commits) == 1  # of record, events and audit row
        assert ("vmm", record.jail_id) in machine.resources
        await watch.close()


async def test_each_vmm_is_watched_once_however_often_it_is_synced(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        record = await started(worker)
        assert record.vmm is not None
        exits = FakeExits(machine)
        watch = vmm_watch(worker, exits)

        watch.sync_all()
        watch.sync_all()
        await until(lambda: bool(exits.watched))

        assert exits.watched == [record.vmm.pid]
        await watch.close()


@pytest.mark.parametrize(
    ("oom", "reason"),
    [
        (OomCounts(limit_reached=1, killed=1), "oom_cgroup"),
        (OomCounts(limit_reached=0, killed=1), "oom_host"),
        (OomCounts(limit_reached=0, killed=0), "signal_9"),
    ],
)
async def test_record_event_and_metric_say_why_a_vmm_ended(
    tmp_path: Path, oom: OomCounts, reason: str
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        record = await started(worker)
        machine.oom[record.cgroup_key] = oom
        metrics = Metrics("0")
        watch = VmmWatch(worker.host, worker.journal, worker.lanes, metrics, FakeExits(machine))
        watch.sync_all()

        machine.kill(record.jail_id)
        await until(lambda: worker.record().status is Status.FAILED)
        await worker.lanes.idle()

        end = worker.record().last_end
        assert end is not None
        assert (end.reason, end.launch) == (reason, record.launch)
        (event,) = await events(worker, EventKind.VMM_EXITED)
        assert (event.detail["reason"], event.detail["signal"]) == (reason, 9)
        assert f'hostd_vmm_exits_total{{reason="{reason}"}} 1.0' in metrics.render().decode()
        shown = described(worker.record())["last_end"]
        assert isinstance(shown, dict)
        assert shown["text"] == text_of(end)
        await watch.close()


async def test_the_last_end_is_kept_through_the_next_launch(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        record = await started(worker)
        watch = vmm_watch(worker)
        watch.sync_all()
        machine.kill(record.jail_id)
        await until(lambda: worker.record().status is Status.FAILED)

        assert (await worker.run(START)).code is Code.OK

        end = worker.record().last_end
        assert end is not None
        assert end.launch == record.launch < worker.record().launch
        await watch.close()
