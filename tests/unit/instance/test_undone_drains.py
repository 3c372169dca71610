"""A Sleep that fails after `SleepPrep`: its undo sends the guest agent `Wake`."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from handlers.errors import Exhausted, Failure, HostFault, Unavailable
from schemas.codes import Code
from schemas.records import Status
from schemas.requests import SleepInstance
from tests.constants import NAMES, SLEEP, START, STOP, WAKE
from tests.fakes.host import FakeHost, Gate, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import recovery
from tests.unit.instance.pairs import UP

FAILURES: Mapping[str, Failure] = {
    "pause": HostFault("cannot pause"),
    "create_snapshot": Exhausted("the disk is full"),
    "seal": HostFault("no such file"),
    "publish_snapshot": HostFault("read-only file system"),
}


async def running(worker: MemoryWorker) -> None:
    for request in (UP, START):
        assert (await worker.run(request)).code is Code.OK


def requests(machine: FakeHost) -> list[str]:
    """Requests to the guest agent and to the VMM, from `SleepPrep` on."""
    since = machine.seen[machine.seen.index("drain_guest") :]
    return [each for each in since if each in {"drain_guest", "pause", "resume_vm", "wake_agent"}]


@pytest.mark.parametrize("step", FAILURES)
async def test_its_agent_is_woken_once_it_runs_again(tmp_path: Path, step: str) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await running(worker)
        machine.fail[step] = FAILURES[step]

        reply = await worker.run(SLEEP)

        assert (reply.code, reply.status) == (FAILURES[step].code, "running")
        resumed = [] if step == "pause" else ["resume_vm"]
        assert requests(machine) == ["drain_guest", "pause", *resumed, "wake_agent"]
        assert not reply.left_behind


async def test_a_drain_that_is_cut_short_is_taken_back(tmp_path: Path) -> None:
    machine = seeded()
    machine.gates["drain_guest"] = Gate()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await running(worker)
        sleep = await worker.send(SLEEP)
        await asyncio.wait_for(machine.gates["drain_guest"].reached.wait(), 10)
        stop = await worker.send(STOP)

        assert (await worker.reply(sleep)).code is Code.SUPERSEDED
        assert (await worker.reply(stop)).code is Code.OK
        assert requests(machine) == ["drain_guest", "wake_agent"]


@pytest.mark.parametrize("step", ["drain_guest", "create_snapshot"])
async def test_a_shutdown_leaves_no_guest_drained_or_paused(tmp_path: Path, step: str) -> None:
    """The next worker sleeps it all the same."""
    machine = seeded()
    gate = machine.gates[step] = Gate()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await running(worker)
        sleep = await worker.send(SLEEP)
        await asyncio.wait_for(gate.reached.wait(), 10)
        stopping = asyncio.create_task(worker.lanes.stop(10))
        await asyncio.sleep(0)
        gate.opened.set()
        await stopping

        (guest,) = machine.guests.values()
        assert (guest.state, worker.record().status) == ("Running", Status.RUNNING)
        assert requests(machine)[-1] == "wake_agent"
    machine.gates.clear()

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        assert (await worker.reply(sleep)).code is Code.OK
        assert worker.record().status is Status.SLEEPING


async def test_a_guest_that_was_not_asked_is_not_woken(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await running(worker)
        machine.fail["create_snapshot"] = HostFault("no such file")

        reply = await worker.run(SleepInstance(*NAMES, force=True))

        assert (reply.code, reply.status) == (Code.HOST_FAULT, "running")
        assert "wake_agent" not in machine.seen


async def test_a_deaf_agent_does_not_change_the_reply(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await running(worker)
        machine.fail["create_snapshot"] = HostFault("no such file")
        machine.fail["wake_agent"] = Unavailable("deaf")

        reply = await worker.run(SLEEP)

        assert (reply.code, reply.status) == (Code.HOST_FAULT, "running")
        assert not reply.left_behind


async def test_a_sleep_that_succeeds_wakes_nobody_and_a_wake_does_once(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await running(worker)

        assert (await worker.run(SLEEP)).code is Code.OK

        assert "wake_agent" not in machine.seen
        assert (await worker.run(WAKE)).code is Code.OK
        assert machine.seen.count("wake_agent") == 1
        assert worker.record().status is Status.RUNNING
