"""Start and Wake with VMMs that were launched ahead, on the fake host."""

from pathlib import Path

import pytest

from handlers.errors import Unavailable
from schemas.codes import Code
from tests.fakes.host import seeded
from tests.fakes.memory_worker import memory_worker
from tests.unit.instance.test_commands import COMMANDS, prepare

KINDS = ("StartInstance", "WakeInstance")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_launch_takes_the_vmm_and_its_uid(kind: str, tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, kind)
        before = len(machine.jailer_runs)
        machine.warm = [40, 41]

        await worker.run(COMMANDS[kind])

        (record,) = worker.journal.records.instances()
        assert record.uid_slot == 40
        assert machine.warm == [41]
        assert len(machine.jailer_runs) == before
        assert "check_confinement" in machine.seen


@pytest.mark.parametrize("kind", KINDS)
async def test_the_jailer_runs_if_it_was_lost(kind: str, tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, kind)
        before = len(machine.jailer_runs)
        machine.warm, machine.lose_warm = [40], True

        await worker.run(COMMANDS[kind])

        (record,) = worker.journal.records.instances()
        assert (record.uid_slot, str(record.status)) == (40, "running")
        assert len(machine.jailer_runs) == before + 1


@pytest.mark.parametrize("step", ["cgroup", "jail", "tap"])
async def test_a_launch_that_fails_uses_it_up(step: str, tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "StartInstance")
        before = set(machine.resources)
        machine.warm = [40]
        machine.fail[step] = Unavailable("not now")

        reply = await worker.run(COMMANDS["StartInstance"])

        assert reply.code is Code.UNAVAILABLE
        assert set(machine.resources) == before
        assert machine.warm == []
