"""`POST /v1/adopt`, `/v1/release`, `/v1/sweep`, and the subcommands that print their answers."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from schemas.codes import EXIT_CODES, Code
from schemas.requests import SetupNetwork
from tests.constants import NAMES, NET, SLEEP, START, STOP
from tests.fakes.host import FakeHost, Gate, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import FakeInventory, Reconciled, reconciled, vmm_watch
from tests.unit.control.control_socket import ask, control_server
from worker.cli.main import main
from worker.control import claims as module
from worker.control.claims import ClaimRoutes
from worker.control.routes import Body
from worker.reconcile.claims import Claims
from worker.reconcile.sweep import SIGHTINGS_S

JAIL = "0123456789ab-1"


@asynccontextmanager
async def served(
    tmp_path: Path, machine: FakeHost, *, ready: bool = True
) -> AsyncGenerator[tuple[MemoryWorker, Reconciled]]:
    """A worker in memory behind a control socket in `tmp_path`/run."""
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    async with memory_worker(tmp_path / "j", machine) as worker:
        made, watch = reconciled(worker), vmm_watch(worker)
        claims = Claims(
            worker.host, worker.journal, worker.lanes, ready=lambda: ready, after=watch.sync
        )
        routes = ClaimRoutes(claims, made.sweep, ready=lambda: ready).routes
        async with control_server(run, *routes):
            yield worker, made


async def hostd(tmp_path: Path, *args: str) -> Result:
    setting = {"HOSTD_PATHS_RUN": f"{tmp_path}/run", "HOSTD_HOST_ID": "h1", "HOSTD_CONFIG": None}
    return await asyncio.to_thread(CliRunner().invoke, main, args, env=setting)


async def test_a_released_instance_is_adopted_again_and_the_facts_are_printed(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, seeded()) as (worker, _):
        for request in (SetupNetwork("acme", NET), START):
            assert (await worker.run(request)).code is Code.OK

        released = await hostd(tmp_path, "release", *NAMES)
        again = await hostd(tmp_path, "release", *NAMES)
        adopted = await hostd(tmp_path, "adopt", *NAMES)

        assert released.stdout.startswith("acme/web/i-1: released (released)\n")
        assert again.stdout == "acme/web/i-1: released (nothing to do)\n"
        assert adopted.stdout.startswith("acme/web/i-1: running (adopted)\n")
        assert "  proved      process: pid " in adopted.stdout
        assert (await worker.run(STOP)).code is Code.OK


async def test_a_refusal_has_its_reasons_and_the_exit_code_of_its_code(tmp_path: Path) -> None:
    machine = seeded()
    async with served(tmp_path, machine) as (worker, _):
        for request in (SetupNetwork("acme", NET), START):
            assert (await worker.run(request)).code is Code.OK
        jail = worker.record().jail_id
        await hostd(tmp_path, "release", *NAMES)
        machine.no_metadata.add(jail)

        refused = await hostd(tmp_path, "adopt", *NAMES)

        assert refused.exit_code == EXIT_CODES[Code.CONFLICT]
        assert "nothing was changed" in refused.stderr
        assert "has no metadata" in refused.stderr


@pytest.mark.parametrize("name", ["adopt", "release"])
async def test_an_invalid_id_is_refused_by_name(tmp_path: Path, name: str) -> None:
    async with served(tmp_path, seeded()):
        answer = await post(
            tmp_path, f"/v1/{name}", {"tenant_id": "A", "pool_id": "b", "instance_id": "c"}
        )

        assert (answer["error"]["code"], answer["error"]["path"]) == ("invalid", "$.tenant_id")


async def post(tmp_path: Path, path: str, body: dict[str, Any]) -> dict[str, Any]:
    _, answer = await ask(tmp_path / "run", "POST", path, body)
    return dict(answer)


async def test_a_sweep_reports_what_waits_and_removes_what_was_seen_twice(tmp_path: Path) -> None:
    async with served(tmp_path, seeded()) as (_, made):
        made.inventory = FakeInventory(jails=(JAIL,))

        first = await hostd(tmp_path, "sweep")
        made.now_s += SIGHTINGS_S
        dry = await hostd(tmp_path, "sweep", "--dry-run")
        assert made.removal.removed == []
        done = await hostd(tmp_path, "sweep")
        made.inventory = FakeInventory()
        none = await hostd(tmp_path, "sweep")

        assert first.stdout.startswith(f"waiting  jails      {JAIL}  (seen for 0 s): seen for less")
        assert dry.stdout == f"due      jails      {JAIL}  (seen for 60 s)\n"
        assert done.stdout.startswith(f"removed  jails      {JAIL}  (seen for 60 s)")
        assert none.stdout == "no orphans\n"


async def test_a_name_does_not_steer_the_terminal(tmp_path: Path) -> None:
    async with served(tmp_path, seeded()) as (_, made):
        made.inventory = FakeInventory(temp=["/s/\x1b[2J\n.x.part"])

        swept = await hostd(tmp_path, "sweep")

    assert " /s/\\x1b[2J\\n.x.part  (seen" in swept.stdout
    assert swept.stdout.count("\n") == 1


@pytest.mark.parametrize("args", [("adopt", *NAMES), ("release", *NAMES), ("sweep",)])
async def test_while_the_worker_recovers_nothing_is_changed(
    tmp_path: Path, args: tuple[str, ...]
) -> None:
    async with served(tmp_path, seeded(), ready=False):
        refused = await hostd(tmp_path, *args)

        assert refused.exit_code == EXIT_CODES[Code.UNAVAILABLE]
        assert "still recovering" in refused.stderr


async def test_a_wait_for_the_lane_is_shown_as_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROGRESS_S", 0.01)
    machine = seeded()
    gate = machine.gates["drain_guest"] = Gate()
    async with served(tmp_path, machine) as (worker, _):
        for request in (SetupNetwork("acme", NET), START):
            assert (await worker.run(request)).code is Code.OK
        sleeping = await worker.send(SLEEP)
        await gate.reached.wait()

        claims = Claims(
            worker.host, worker.journal, worker.lanes, ready=lambda: True, after=lambda ref: None
        )
        routes = ClaimRoutes(claims, reconciled(worker).sweep, ready=lambda: True)
        names: Body = dict(zip(("tenant_id", "pool_id", "instance_id"), NAMES, strict=True))
        lines = routes.adopt(names)
        waiting = await anext(lines)
        gate.opened.set()
        last = [line async for line in lines][-1]

        assert "lane of acme/web/i-1 is busy" in str(waiting["progress"])
        result = last["result"]
        assert isinstance(result, dict)
        assert result["status"] == "sleeping"
        assert (await worker.reply(sleeping)).code is Code.OK


async def test_an_adoption_that_nobody_waits_for_any_more_is_not_begun(tmp_path: Path) -> None:
    machine = seeded()
    gate = machine.gates["drain_guest"] = Gate()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in (SetupNetwork("acme", NET), START):
            assert (await worker.run(request)).code is Code.OK
        sleeping = await worker.send(SLEEP)
        await gate.reached.wait()
        began: list[str] = []
        claims = Claims(
            worker.host,
            worker.journal,
            worker.lanes,
            ready=lambda: True,
            after=lambda ref: began.append(str(ref)),
        )

        adopting = asyncio.create_task(claims.adopt(worker.record().ref))
        await asyncio.sleep(0)
        adopting.cancel()
        await asyncio.gather(adopting, return_exceptions=True)
        gate.opened.set()

        assert (await worker.reply(sleeping)).code is Code.OK
        assert began == []
