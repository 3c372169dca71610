"""One instance's whole life through the worker: real bus, jailer, Firecracker and mini guest."""

from tests.constants import DESTROY, SLEEP, START, STOP, WAKE
from tests.live_host import live_host


async def test_the_whole_life_of_an_instance() -> None:
    async with live_host() as host:
        before = await host.inventory()
        seeded = host.seed()
        assert (await host.net_up(seeded))["code"] == "ok"

        started = await host.run(START)
        assert started["code"] == "ok", started
        awake = await host.stat()
        assert (await host.run(SLEEP))["status"] == "sleeping"
        woken_reply = await host.run(WAKE)
        woken = await host.stat()

        assert woken["counter"] > awake["counter"]
        assert woken["boot_id"] == awake["boot_id"]
        assert woken["boots"] == 1
        assert woken_reply["detail"]["pid"] != started["detail"]["pid"]
        assert (await host.run(STOP))["detail"]["method"] == "graceful"
        assert (await host.run(DESTROY))["code"] == "ok"
        assert (await host.net_down(seeded.net))["code"] == "ok"
        assert await host.inventory() == before
        assert await host.stop_worker() == 0
