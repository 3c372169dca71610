"""kill -9 while the kernel still finishes what a Stop or a Sleep has let go of: nothing stays."""

from pathlib import Path

import pytest

from schemas.requests import Request, TeardownNetwork
from tests.constants import DESTROY, REF, SLEEP, START, STOP, WAKE
from tests.crash.kills import assert_one_outcome, kill_at, until
from tests.live_host import LiveHost, live_host
from worker.cli.seed import Seeded


def snapshot_files(host: LiveHost) -> list[Path]:
    return [p for p in Path(host.settings.paths.state, "snapshots").rglob("*") if p.is_file()]


async def asleep_once(host: LiveHost) -> Seeded:
    seeded = host.seed()
    assert (await host.net_up(seeded))["code"] == "ok"
    for command in (START, SLEEP, WAKE):
        assert (await host.run(command))["code"] == "ok"
    return seeded


@pytest.mark.parametrize("request_", [STOP, SLEEP], ids=["stop", "sleep"])
async def test_the_kernel_deletes_the_tap_and_frees_the_memory_without_a_worker(
    request_: Request,
) -> None:
    async with live_host() as host:
        clean = await host.inventory()
        seeded = await asleep_once(host)
        memory = next(p for p in snapshot_files(host) if p.name == "mem")

        await kill_at(host, "after:discard_snapshot", request_, "killed")

        assert not memory.exists()
        assert [p.name for p in snapshot_files(host)].count("mem") == (request_ is SLEEP)
        for _attempt in range(200):
            if not (await host.inventory())["taps"]:
                break
        assert (await host.inventory())["taps"] == 0
        await host.start_worker()
        await host.result("killed")
        reply = await assert_one_outcome(host, "killed")
        assert (reply["code"], reply["left_behind"]) == ("ok", [])
        again = START if request_ is STOP else WAKE
        assert (await host.run(again))["code"] == "ok"
        assert (await host.run(DESTROY))["code"] == "ok"
        down = TeardownNetwork(REF.tenant_id, seeded.net)
        assert (await host.run(down))["code"] == "ok"
        assert await host.inventory() == clean


async def test_a_worker_killed_right_after_a_stop_leaves_nothing_in_the_way() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        for turn in range(3):
            assert (await host.run(START, f"start-{turn}"))["code"] == "ok"
            assert (await host.run(STOP, f"stop-{turn}"))["code"] == "ok"
            await host.kill_worker()
            await host.start_worker()
        assert (await host.run(START))["code"] == "ok"
        await until(lambda: bool(host.vm_pids()), "the VM")
        assert (await host.run(DESTROY))["code"] == "ok"
        assert (await host.inventory())["taps"] == 0
