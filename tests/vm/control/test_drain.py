"""Draining a real host: guests sleep or stop, over a kill of the worker; none starts."""

import asyncio
import json
from typing import Any

from schemas.requests import InstanceRef, StartInstance, WakeInstance
from tests.constants import NAMES, REF, WAKE
from tests.live_host import LiveHost, live_host
from tests.vm.control.local_cli import hostd
from tests.vm.whole_host.shared_host import events

OTHER = InstanceRef("acme", "web", "i-2")


async def two_guests(host: LiveHost) -> None:
    await host.net_up(host.seed())
    host.seed(OTHER)
    for ref in (REF, OTHER):
        request = StartInstance(ref.tenant_id, ref.pool_id, ref.instance_id)
        assert (await host.run(request))["code"] == "ok"


async def test_a_drained_host_sleeps_refuses_starts_and_wakes_again_after_undrain() -> None:
    async with live_host() as host:
        await two_guests(host)

        drained = await hostd(host, "drain", "--mode", "sleep", "--json")
        refused = await host.run(WAKE)
        pong = await host.ping()
        undrained = await hostd(host, "undrain")
        woken = [await host.run(each) for each in (WAKE, WakeInstance(*NAMES[:2], "i-2"))]

        assert drained.exit_code == 0, drained.output
        result = json.loads(drained.stdout.splitlines()[-1])["result"]
        assert (result["done"], result["failed"], result["left"]) == (2, 0, [])
        assert (refused["code"], refused["retryable"]) == ("draining", True)
        assert pong["detail"]["host_state"] == "draining"
        assert undrained.exit_code == 0
        assert [reply["code"] for reply in woken] == ["ok", "ok"]
        kinds = [event["detail"] for event in await events(host) if event["kind"] == "drain"]
        assert (kinds[0]["active"], kinds[-1]["active"]) == (True, False)
        commands = [
            event
            for event in await events(host)
            if event["kind"] == "command" and event["command_id"].startswith("drain-")
        ]
        assert [each["detail"]["type"] for each in commands] == ["SleepInstance"] * 2


async def test_a_drain_goes_on_in_the_next_worker_and_a_slow_guest_is_stopped() -> None:
    async with live_host() as host:
        await two_guests(host)
        await host.ask_guest({"Set": {"drain": "hold"}})

        timed_out = await hostd(host, "drain", "--mode", "sleep", "--timeout", "0")
        await host.wait_status("draining")
        await host.wait_status("sleeping", OTHER)
        await host.kill_worker()
        await host.start_worker(ready=False)
        await wait_state(host, "draining")
        refused = await host.run(WakeInstance(*NAMES[:2], "i-2"))
        drained = await hostd(host, "drain", "--mode", "stop")

        assert timed_out.exit_code == 15
        assert refused["code"] == "draining"
        assert drained.exit_code == 0, drained.output
        assert host.vm_pids() == []
        assert (await host.describe())["status"] == "stopped"
        assert (await host.describe(OTHER))["status"] == "sleeping"


async def wait_state(host: LiveHost, wanted: str) -> None:
    async with asyncio.timeout(60):
        found: Any = None
        while found != wanted:
            found = (await host.ping())["detail"]["host_state"]
