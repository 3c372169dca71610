"""A restart between a command that failed past its point of no return and the next one."""

from pathlib import Path
from typing import Any

import pytest

from handlers.errors import HostFault
from schemas.codes import Code
from schemas.records import InstanceRecord, Status
from tests.constants import SLEEP, START, STOP, WAKE
from tests.fakes.host import seeded
from tests.fakes.memory_worker import memory_worker
from tests.fakes.reconcile import reconciled, recovery
from tests.unit.instance.test_commands import (
    COMMANDS,
    COMPLETED,
    cases,
    prepare,
    shape,
    status_of,
    undisturbed,
)
from worker.journal.records import JournalRecords
from worker.journal.writer import JournalFault

REBOOTED = "00000000-0000-4000-8000-000000000002"
# After its point of no return a Wake is taken for done: its guest may have run.
NEVER_TAKEN_BACK = {kind: effects for kind, effects in COMPLETED.items() if kind != "WakeInstance"}


@pytest.mark.parametrize(("kind", "effect"), cases(NEVER_TAKEN_BACK))
async def test_a_restart_takes_nothing_back(kind: str, effect: str, tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await prepare(worker, kind)
        machine.fail[effect] = HostFault("injected")
        assert (await worker.run(COMMANDS[kind])).code is Code.HOST_FAULT
        status = status_of(worker)
    machine.fail.clear()

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await worker.lanes.idle()
        assert status_of(worker) == status
        reply = await worker.run(COMMANDS[kind])

        assert reply.code is Code.OK, reply
        assert shape(machine) == shape(await undisturbed(tmp_path, kind))


@pytest.mark.parametrize("reboot", [False, True])
async def test_a_published_snapshot_outlasts_a_restart_and_a_reboot(
    tmp_path: Path, *, reboot: bool
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await prepare(worker, "SleepInstance")
        machine.fail["remove_jail"] = HostFault("injected")
        assert (await worker.run(SLEEP)).code is Code.HOST_FAULT
    machine.fail.clear()
    if reboot:
        machine.reboot(REBOOTED)

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await worker.lanes.idle()
        for request in (SLEEP, WAKE):
            reply = await worker.run(request)
            assert reply.code is Code.OK, reply

        assert worker.record().status is Status.RUNNING


async def test_a_wake_that_could_not_be_undone_before_a_reboot_keeps_the_snapshot(
    tmp_path: Path,
) -> None:
    machine = seeded()
    waking: list[InstanceRecord] = []

    async def look(moment: str) -> None:
        if moment == "before:cgroup":
            waking.append(worker.record())

    async with memory_worker(tmp_path / "j", machine, failpoint=look) as worker:
        await recovery(worker).run()
        await prepare(worker, "WakeInstance")
        machine.fail["cgroup"] = HostFault("injected")
        assert (await worker.run(WAKE)).code is Code.HOST_FAULT
        assert waking[-1].status is Status.WAKING
        await worker.journal.records.put_instance(waking[-1], durable=True)
    machine.fail.clear()
    machine.reboot(REBOOTED)

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await worker.lanes.idle()
        assert worker.record().status is Status.SLEEPING
        reply = await worker.run(WAKE)
        assert reply.code is Code.OK, reply


@pytest.mark.parametrize("left", ["remove_tap", "remove_cgroup", "remove_jail", "remove_pin"])
async def test_what_a_failed_wake_left_behind_is_removed(tmp_path: Path, left: str) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "WakeInstance")
        before = dict(machine.resources)
        machine.fail = {"load_snapshot": HostFault("injected"), left: HostFault("stuck")}
        assert (await worker.run(WAKE)).left_behind
        machine.fail.clear()

        await reconciled(worker).reconciler.once()

        assert machine.resources == before
        assert worker.journal.steps.leftovers() == {}
        for request in (WAKE, STOP, START):
            reply = await worker.run(request)
            assert reply.code is Code.OK, reply


async def test_an_undo_waits_until_the_journal_can_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reservation is taken back then, and not left behind."""
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "StartInstance")
        put, faults = JournalRecords.put_instance, [JournalFault("the disk is full")]

        async def failing_once(self: JournalRecords, record: InstanceRecord, **more: Any) -> None:
            if faults and record.status is not Status.STARTING:
                raise faults.pop()
            await put(self, record, **more)

        monkeypatch.setattr(JournalRecords, "put_instance", failing_once)
        machine.fail["cgroup"] = HostFault("injected")
        reply = await worker.run(START)

        assert (faults, reply.code, reply.left_behind) == ([], Code.HOST_FAULT, ())
        assert not worker.record().holds_host
