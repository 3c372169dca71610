"""A launch whose VMM is killed from outside: the failure says why, and is not the host's."""

import asyncio
import json
import os
import signal
from pathlib import Path

from tests.constants import START
from tests.crash.test_deaths import leftovers
from tests.live_host import LiveHost, live_host
from tests.vm.control.local_cli import hostd

NO_AGENT = "9"  # a port of the guest that nobody listens on


async def steps_of(host: LiveHost) -> set[str]:
    """The steps that commands are in now."""
    found = json.loads((await hostd(host, "top", "--once", "--json")).stdout)["running"]
    return {step for each in found for step in each["steps"]}


async def test_a_start_whose_vmm_is_killed_says_so_and_leaves_nothing() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        pool = Path(host.settings.paths.data, "tenants/acme/pools/web/pool.json")
        spec = json.loads(pool.read_text())
        spec.setdefault("metadata", {}).setdefault("tags", {})["hostd.agent_port"] = NO_AGENT
        pool.write_text(json.dumps(spec))
        before = await leftovers(host)
        start = asyncio.ensure_future(host.run(START))
        async with asyncio.timeout(30):
            while "wait_agent" not in await steps_of(host):
                await asyncio.sleep(0.02)

        (pid,) = host.vm_pids()
        os.kill(pid, signal.SIGKILL)
        reply = await start

        assert (reply["code"], reply["detail"]["act"]) == ("unavailable", "sender")
        assert reply["response"]["Error"]["message"].endswith("answered: killed by SIGKILL")
        end = reply["detail"]["vmm_end"]
        assert (end["reason"], end["evidence"], end["signal"]) == ("signal_9", "kernel", 9)
        assert await leftovers(host) == before
