"""`GET /v1/top`: counts, and the commands that run longest; a dump by signal."""

import asyncio
import json
import stat
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import structlog

from handlers.errors import Invalid
from schemas.codes import Code
from tests.fakes.shell_worker import FakeHandlers, ShellWorker, shell_worker, start
from tests.unit.control.test_dump import Worker
from worker.control.dump import FILE, Dump
from worker.control.overview import Overview
from worker.control.view import WorkerView
from worker.metrics import Metrics


def overview_of(shell: ShellWorker) -> Overview:
    worker: Any = Worker(shell)
    worker.metrics = Metrics("9.9")
    worker.metrics.command_done("StartInstance", Code.OK, 0.1)
    worker.metrics.command_done("StopInstance", Code.OK, 0.1)
    worker.metrics.command_done("StartInstance", Code.CONFLICT, 0.1)
    return Overview(cast("WorkerView", worker))


async def test_what_runs_and_what_was_done_is_counted(tmp_path: Path) -> None:
    machine = FakeHandlers(gate=asyncio.Event())
    async with shell_worker(tmp_path / "j.db", machine=machine) as shell:
        shell.send(start(), "c1")
        await machine.at_gate.wait()

        answer = await overview_of(shell).answer({})
        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(answer))

    assert found["finished"] == {"ok": 2, "failed": 1}
    assert (found["unfinished"], found["lanes"]["busy"]) == (1, 1)
    assert found["failed_checks"] == ["connected"]
    assert found["slots"]["boots"] == {"count": 8, "held": 0, "waiting": 0}
    (running,) = found["running"]
    assert (running["id"], running["steps"]) == ("c1", ["gate"])


async def test_it_takes_no_arguments(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j.db") as shell:
        with pytest.raises(Invalid):
            await overview_of(shell).answer({"all": True})


async def test_a_signal_writes_the_state_for_root_only_and_again_for_the_next(
    tmp_path: Path,
) -> None:
    requested = asyncio.Event()
    path = tmp_path / FILE
    async with shell_worker(tmp_path / "j.db") as shell:
        dump = Dump(cast("WorkerView", Worker(shell)))
        writing = asyncio.create_task(dump.on_signal(requested, str(tmp_path)))
        for _ in range(2):
            path.unlink(missing_ok=True)
            requested.set()
            async with asyncio.timeout(20):
                while not path.exists():
                    await asyncio.sleep(0)
            assert json.loads(path.read_bytes())["host"]["host_state"] == "ready"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def test_a_dump_that_cannot_be_written_is_logged(tmp_path: Path) -> None:
    requested = asyncio.Event()
    async with shell_worker(tmp_path / "j.db") as shell:
        dump = Dump(cast("WorkerView", Worker(shell)))
        with structlog.testing.capture_logs() as logged:
            writing = asyncio.create_task(dump.on_signal(requested, str(tmp_path / "none")))
            requested.set()
            async with asyncio.timeout(20):
                while not logged:
                    await asyncio.sleep(0)
            assert not writing.done()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

    assert logged[0]["event"] == "dump.write_failed"
