"""Failpoints: off without the environment; the documented example stops a Start."""

import asyncio
import re
from pathlib import Path

from handlers.steps import no_failpoint
from schemas.codes import Code
from schemas.requests import SetupNetwork, StartInstance
from tests.constants import REF
from tests.fakes.host import seeded
from tests.fakes.memory_worker import memory_worker
from worker import failpoints
from worker.failpoints import FILE, POINT, failpoint

UP = SetupNetwork("acme", seeded().tenants["acme"].net)
START = StartInstance(REF.tenant_id, REF.pool_id, REF.instance_id)


def test_without_both_variables_there_is_no_failpoint(tmp_path: Path) -> None:
    assert failpoint({}) is no_failpoint
    assert failpoint({POINT: "after:tap"}) is no_failpoint
    assert failpoint({FILE: str(tmp_path / "f")}) is no_failpoint


async def test_the_documented_example_stops_a_start_after_that_step(tmp_path: Path) -> None:
    example = re.search(rf"`{POINT}=(\S+)`", failpoints.__doc__ or "")
    assert example is not None
    reached = tmp_path / "reached"
    hook = failpoint({POINT: example[1], FILE: str(reached)})
    machine = seeded()

    async with memory_worker(tmp_path / "j", machine, failpoint=hook) as worker:
        assert (await worker.run(UP)).code is Code.OK
        await worker.send(START)
        async with asyncio.timeout(10):
            while not reached.exists():
                await asyncio.sleep(0)

        assert reached.read_text(encoding="ascii") == example[1]
        assert ("tap", "tn3i5") in machine.resources
        assert ("vmms", f"{worker.record().jail_id}") not in machine.resources
