"""A VMM that ended while no worker ran has no duration, whatever command comes upon it."""

import asyncio
from pathlib import Path

import pytest

from schemas.records import Status
from schemas.requests import Request
from schemas.subjects import Lane
from schemas.usage import UsageDetail
from tests.constants import DESTROY, SLEEP, START, STOP
from tests.fakes.host import FakeHost, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import FakeExits, recovery, vmm_watch
from tests.fakes.shell_worker import SUBJECTS, command
from tests.unit.instance.pairs import UP
from tests.unit.instance.test_metering import run_all, run_guest, used

ENDS = [STOP, DESTROY]


async def journal(worker: MemoryWorker, request: Request) -> None:
    """Take a command in as the bus delivers it; no lane is told."""
    lane = Lane.of_request(request)
    intake = await worker.journal.commands.take_in(
        command(request, "late-1"),
        lane=lane,
        subject=SUBJECTS.command(lane),
        stream_seq=99,
        received_at_ms=1,
    )
    assert intake.row is not None
    await intake.row.stored()


def a_day_without_worker(machine: FakeHost, jail_id: str) -> None:
    machine.kill(jail_id)
    machine.boot_ms += 86_400_000


def is_unknown(found: UsageDetail) -> bool:
    assert found.launch is not None
    assert found.launch.cpu_us == 1_500_000
    assert (found.totals.launches, found.totals.incomplete, found.totals.running_ms) == (1, 1, 0)
    return (found.span.duration_ms, found.launch.vcpu_ms) == (None, None)


@pytest.mark.parametrize("request_", ENDS)
async def test_of_a_command_that_waited_for_the_next_worker(
    request_: Request, tmp_path: Path
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await run_all(worker, UP, START)
        run_guest(worker)
        await journal(worker, request_)
        jail_id = worker.record().jail_id
    a_day_without_worker(machine, jail_id)

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await worker.lanes.idle()
        (found,) = await used(worker)

    assert is_unknown(found)


@pytest.mark.parametrize("request_", ENDS)
async def test_also_if_the_worker_is_killed_again_before_the_command_has_ended(
    request_: Request, tmp_path: Path
) -> None:
    machine, reached = seeded(), asyncio.Event()

    async def stop_there(moment: str) -> None:
        if moment == "before:remove_vmm":
            reached.set()
            await asyncio.Event().wait()

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await run_all(worker, UP, START)
        run_guest(worker)
        await journal(worker, request_)
        jail_id = worker.record().jail_id
    a_day_without_worker(machine, jail_id)
    async with memory_worker(tmp_path / "j", machine, failpoint=stop_there) as worker:
        await asyncio.wait_for(reached.wait(), 10)
        await worker.kill()

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await worker.lanes.idle()
        (found,) = await used(worker)

    assert is_unknown(found)


async def test_of_a_sleep_that_was_cut_off_and_undone(tmp_path: Path) -> None:
    machine, reached, armed = seeded(), asyncio.Event(), False

    async def stop_there(moment: str) -> None:
        if armed and moment == "before:snapshot_draft":
            reached.set()
            await asyncio.Event().wait()

    async with memory_worker(tmp_path / "j", machine, failpoint=stop_there) as worker:
        await recovery(worker).run()
        await run_all(worker, UP, START)
        run_guest(worker)
        armed = True
        await worker.send(SLEEP)
        await asyncio.wait_for(reached.wait(), 10)
        jail_id = worker.record().jail_id
        await worker.kill()
    a_day_without_worker(machine, jail_id)

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await worker.lanes.idle()
        vmm_watch(worker, FakeExits(machine)).sync_all()
        async with asyncio.timeout(10):
            while worker.record().status is not Status.FAILED:
                await asyncio.sleep(0)
        (found,) = await used(worker)

    assert is_unknown(found)


@pytest.mark.parametrize("launched_here", [True, False])
@pytest.mark.parametrize("request_", ENDS)
async def test_an_end_that_this_worker_saw_is_measured_though_a_command_comes_first(
    request_: Request, launched_here: bool, tmp_path: Path
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await run_all(worker, UP, START)
        run_guest(worker)
        if launched_here:
            machine.kill(worker.record().jail_id)
            await run_all(worker, request_)
            (found,) = await used(worker)
            assert found.span.duration_ms == 60_000
            return

    async with memory_worker(tmp_path / "j", machine) as worker:
        exits = FakeExits(machine)
        vmm_watch(worker, exits).sync_all()
        async with asyncio.timeout(10):
            while not exits.watched:
                await asyncio.sleep(0)
        machine.kill(worker.record().jail_id)
        await run_all(worker, request_)
        (found,) = await used(worker)

    assert found.span.duration_ms == 60_000


async def test_what_this_worker_saw_alive_is_forgotten_with_its_end(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        watch = vmm_watch(worker)
        await run_all(worker, UP, START)
        assert worker.host.seen_alive
        await run_all(worker, STOP)
        watch.sync(worker.record().ref)

        assert not worker.host.seen_alive
