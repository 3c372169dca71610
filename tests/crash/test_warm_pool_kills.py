"""kill -9 while a command takes a VMM that was launched ahead: nothing left, nothing used twice."""

import asyncio
from pathlib import Path

import pytest

from schemas.requests import Request
from tests.constants import SLEEP, START, STOP, WAKE
from tests.crash.kills import assert_one_outcome, until
from tests.live_host import LiveHost, live_host
from worker.failpoints import FILE, POINT

LAUNCHED = ("processes", "jails", "cgroups", "warm")
MOMENTS = [
    *(("start", f"after:{step}") for step in ("reservation", "cgroup", "data_disk", "jail")),
    *(("start", moment) for moment in ("before:jail", "before:vmm", "after:vmm", "after:boot")),
    *(("wake", f"after:{step}") for step in ("cgroup", "jail", "link_snapshot", "vmm")),
    ("wake", "after:load_snapshot"),
]


async def until_warm(host: LiveHost, count: int) -> None:
    async with asyncio.timeout(30):
        while (await host.inventory())["warm"] != count:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(("name", "moment"), MOMENTS)
async def test_a_killed_claim_leaves_nothing_and_no_second_guest(name: str, moment: str) -> None:
    async with live_host(warm_pool=1) as host:
        seeded = host.seed()
        await host.net_up(seeded)
        request: Request = START
        if name == "wake":
            request = WAKE
            assert (await host.run(START))["code"] == "ok"
            assert (await host.run(SLEEP))["code"] == "ok"
        await host.stop_worker()
        assert (await host.inventory())["warm"] == 0
        reached = Path(host.directory, "reached")
        await host.start_worker(environment={POINT: moment, FILE: str(reached)})
        await until_warm(host, 1)
        await host.publish(request, "killed")
        await until(reached.exists, moment)
        await host.kill_worker()

        await host.start_worker()
        await host.result("killed")

        reply = await assert_one_outcome(host, "killed")
        assert (reply["code"], reply["left_behind"]) == ("ok", []), reply
        assert (await host.stat())["boots"] == 1
        await until_warm(host, 1)
        found = await host.inventory()
        assert [found[kind] for kind in LAUNCHED] == [1, 1, 1, 1]
        assert (await host.run(STOP))["code"] == "ok"
        await host.stop_worker()
        left = await host.inventory()
        assert [left[kind] for kind in LAUNCHED] == [0, 0, 0, 0]
        assert host.vm_pids() == []
