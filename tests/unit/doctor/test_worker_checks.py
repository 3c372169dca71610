"""Checks of a running worker: each trouble it can be in is a finding, and a sound one has none."""

import ast
import asyncio
import contextlib
import inspect
import sqlite3
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from handlers.claims.unrecorded import UnrecordedVmm, VmmProcess
from handlers.errors import Invalid
from handlers.mechanism import Durability, StepIntent
from schemas.records import Status
from tests.constants import REF, START
from tests.fakes.host import seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.unit.control.test_draining import UP, start_all
from worker import main
from worker.bus.protocol import BusError
from worker.control.view import WorkerView
from worker.doctor import worker_checks
from worker.doctor.findings import Finding
from worker.doctor.worker_checks import NOT_READY, WorkerChecks


class Worker:
    """What the checks read, over a worker on a host in memory."""

    def __init__(self, memory: MemoryWorker) -> None:
        self.memory = memory
        self.journal, self.lanes, self.drain = memory.journal, memory.lanes, memory.drain
        self.dead = 0
        self.bus = SimpleNamespace(trouble="", connected=True, dead_letters=self.dead_letters)
        self.unrecorded = memory.host.unrecorded
        self.metrics = SimpleNamespace(orphan_counts=dict[str, int]())
        self.networks = memory.host.networks
        self.versions: Mapping[str, str] = {"hostd": "9.9"}
        self.passed = dict.fromkeys([*NOT_READY, "provisioned", "not_draining"], True)

    def checks(self) -> Mapping[str, bool]:
        return self.passed

    async def dead_letters(self) -> int:
        if self.dead < 0:
            raise BusError("no answer in time")
        return self.dead


@contextlib.asynccontextmanager
async def running(path: Path) -> AsyncGenerator[Worker]:
    async with memory_worker(path, seeded()) as memory:
        await start_all(memory, 1)
        yield Worker(memory)


async def findings(worker: Worker) -> list[dict[str, Any]]:
    answer = await WorkerChecks(cast("WorkerView", worker)).answer({})
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(answer))
    assert decoded["version"] == "9.9"
    found: list[dict[str, Any]] = decoded["findings"]
    return found


async def test_a_sound_worker_has_no_findings(tmp_path: Path) -> None:
    async with running(tmp_path / "j") as worker:
        assert await findings(worker) == []


@pytest.mark.parametrize("check", NOT_READY)
async def test_each_failed_check_of_readyz_is_an_error(tmp_path: Path, check: str) -> None:
    async with running(tmp_path / "j") as worker:
        worker.passed[check] = False
        (finding,) = await findings(worker)

    assert (finding["severity"], finding["check"]) == ("error", "readiness")


async def test_dead_letters_are_counted_with_what_lists_them(tmp_path: Path) -> None:
    async with running(tmp_path / "j") as worker:
        worker.dead = 3
        (found,) = await findings(worker)
        worker.dead = -1
        (unchecked,) = await findings(worker)
        worker.bus.connected = False
        away = await findings(worker)

    assert (found["check"], found["severity"]) == ("dead_letters", "warning")
    assert found["what"].startswith("3 dead letters")
    assert "hostd dead ls" in found["run"]
    assert "no answer in time" in unchecked["what"]
    assert away == []  # readiness says that it is not connected


async def test_a_vmm_without_a_record_is_named_with_the_way_out(tmp_path: Path) -> None:
    async with running(tmp_path / "j") as worker:
        process = VmmProcess(77, 1, 2_000_000_009, "0123456789ab-1", "hostd/a/0123456789ab-1", 193)
        worker.unrecorded.set([UnrecordedVmm(process, ("tn3i9",))])
        (found,) = await findings(worker)

    assert (found["check"], found["severity"]) == ("unrecorded_vmms", "warning")
    for part in ("process 77", "jail 0123456789ab-1", "uid 2000000009", "193 MiB", "TAP tn3i9"):
        assert part in found["what"]
    assert "hostd adopt" in found["run"]


async def test_a_drain_is_explained_with_what_ends_it(tmp_path: Path) -> None:
    async with running(tmp_path / "j") as worker:
        await worker.drain.begin("sleep")
        worker.passed["not_draining"] = False
        (finding,) = await findings(worker)

    assert (finding["severity"], finding["run"]) == ("info", "hostd undrain")


async def test_provisioning_orphans_and_network_warnings_are_found(tmp_path: Path) -> None:
    async with running(tmp_path / "j") as worker:
        worker.bus.trouble = "stream HOSTD_CMD_x: max_age differs"
        worker.metrics.orphan_counts = {"taps": 2}
        worker.memory.machine.network_warnings = ("a chain drops",)
        found = {each["check"]: each for each in await findings(worker)}

    assert found["provisioning"]["run"] == "hostd provision"
    assert found["orphans"]["what"].startswith("2 taps")
    assert found["network"]["what"] == "a chain drops"


async def test_a_quarantined_instance_is_named(tmp_path: Path) -> None:
    async with running(tmp_path / "j") as worker:
        record = msgspec.structs.replace(worker.memory.record(), status=Status.UNKNOWN)
        await worker.journal.records.put_instance(record, reason="test")
        (finding,) = await findings(worker)

    assert (finding["severity"], finding["check"]) == ("error", "instances")
    assert f"instance {REF}" in finding["what"]


async def test_rows_that_this_version_cannot_read_are_named(tmp_path: Path) -> None:
    async with running(tmp_path / "j"):
        pass
    with contextlib.closing(sqlite3.connect(tmp_path / "j")) as file, file:
        file.execute("UPDATE instance SET record = '{}'")
    async with memory_worker(tmp_path / "j", seeded()) as memory:
        found = await findings(Worker(memory))

    assert [each["check"] for each in found] == ["journal_rows"]
    assert f"row {REF} of the journal's table instance" in found[0]["what"]


async def test_what_an_undo_left_behind_is_named_and_a_long_list_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_checks, "SHOWN", 2)
    async with running(tmp_path / "j") as worker:
        intents = [StepIntent("tap", f"t{n}", False, Durability.VOLATILE) for n in range(4)]
        await worker.journal.steps.begin("gone", *intents)
        found = await findings(worker)

    assert [each["what"] for each in found] == [
        "tap t0, of command gone, could not be removed",
        "and 3 more of this kind",
    ]


async def test_a_step_that_hangs_is_named_and_a_wait_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = asyncio.Event()

    async def failpoint(moment: str) -> None:
        if moment == "before:wait_agent":
            reached.set()
            await asyncio.Event().wait()

    async with memory_worker(tmp_path / "j", seeded(), failpoint=failpoint) as memory:
        worker = Worker(memory)
        monkeypatch.setattr(worker_checks, "LONG_S", 0.0)
        await memory.run(UP)
        await memory.send(START, "c1")
        await reached.wait()
        running_steps = next(iter(memory.lanes.work().values()))[0]
        assert running_steps is not None
        cast("Any", running_steps).steps.doing[:] = [("tap", 0.0), ("wait_agent", 0.0)]
        found = await findings(worker)
        cast("Any", running_steps).steps.doing.clear()

    (finding,) = found
    assert "command c1" in finding["what"]
    assert "step tap" in finding["what"]


async def test_the_route_takes_no_arguments(tmp_path: Path) -> None:
    async with running(tmp_path / "j") as worker:
        with pytest.raises(Invalid):
            await WorkerChecks(cast("WorkerView", worker)).answer({"all": True})


def test_every_finding_says_what_why_and_what_to_run() -> None:
    assert Finding.__struct_fields__ == ("severity", "check", "what", "why", "run")
    assert all(text for texts in NOT_READY.values() for text in texts)


def test_each_check_of_readyz_has_a_finding() -> None:
    """Two have checks of their own, which know more."""
    tree = ast.parse(inspect.getsource(main))
    (checks,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "checks"
    ]
    (answer,) = [node.value for node in ast.walk(checks) if isinstance(node, ast.Return)]
    assert isinstance(answer, ast.Dict)
    names = {key.value for key in answer.keys if isinstance(key, ast.Constant)}

    assert names == set(NOT_READY) | {"provisioned", "not_draining"}
