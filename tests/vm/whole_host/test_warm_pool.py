"""Instances of a worker with `[vmm] warm_pool`: real bus, jailer, Firecracker and mini guest."""

from pathlib import Path

from tests.constants import SLEEP, START, STOP, WAKE
from tests.crash.test_warm_pool_kills import LAUNCHED, until_warm
from tests.live_host import LiveHost, live_host


def jailed(host: LiveHost) -> list[str]:
    """The jail IDs of all launches, oldest first: of warm ones when made and when taken."""
    log = Path(host.settings.paths.state, "launches.log").read_text(encoding="ascii")
    return [line.split()[1] for line in log.splitlines()]


async def test_start_and_wake_use_vmms_that_were_launched_ahead() -> None:
    async with live_host(warm_pool=2) as host:
        seeded = host.seed()
        await host.net_up(seeded)
        await until_warm(host, 2)

        started = await host.run(START)
        assert started["code"] == "ok", started
        awake = await host.stat()
        assert (await host.run(SLEEP))["status"] == "sleeping"
        await until_warm(host, 2)
        woken_reply = await host.run(WAKE)
        assert woken_reply["code"] == "ok", woken_reply
        woken = await host.stat()

        assert woken["counter"] > awake["counter"]
        assert woken["boots"] == 1
        assert woken_reply["detail"]["pid"] != started["detail"]["pid"]
        assert "warm_pool.vmm_lost" not in host.log()
        assert (await host.ping())["detail"]["warm_vmms"] <= 2
        assert (await host.run(STOP))["code"] == "ok"
        await until_warm(host, 2)
        assert sum(not each.startswith("warm-") for each in jailed(host)) == 2
        assert sum(each.startswith("warm-") for each in jailed(host)) == 4
        assert await host.stop_worker() == 0
        left = await host.inventory()
        assert [left[kind] for kind in LAUNCHED] == [0, 0, 0, 0]
