"""`hostd doctor` on a real host: nothing to find, then each trouble that a test makes."""

import asyncio
import json
from pathlib import Path

from schemas.subjects import Lane
from tests.constants import START
from tests.live_host import LiveHost, live_host
from tests.vm.control.local_cli import hostd


async def checks_of(host: LiveHost) -> set[str]:
    """The checks of hostd's worker that found something that needs an action."""
    result = await hostd(host, "doctor", "--json")
    found = json.loads(result.stdout)["findings"]
    acting = {each["check"] for each in found if each["severity"] != "info"}
    assert result.exit_code == (1 if acting else 0)
    return acting - {"network"}  # what else runs on this machine


async def test_a_sound_host_needs_no_action_and_what_is_wrong_is_found() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        assert (await host.run(START))["code"] == "ok"
        sound = await checks_of(host)

        await host.publish_raw(host.subjects.command(Lane.host()), b"\xc1 no envelope")
        async with asyncio.timeout(30):
            while (refused := await checks_of(host)) == set():
                await asyncio.sleep(0.02)

        await host.nats.stop()
        await wait_disconnected(host)
        Path(host.settings.paths.state).chmod(0o755)
        troubled = await checks_of(host)
        await host.kill_worker()
        dead = await checks_of(host)
        Path(host.settings.paths.state).chmod(0o700)

        assert sound == set()
        assert refused == {"dead_letters"}
        assert troubled == {"readiness", "directories"}
        assert dead == {"worker", "directories"}


async def wait_disconnected(host: LiveHost) -> None:
    async with asyncio.timeout(30):
        while "connected: false" not in (await hostd(host, "dump")).stdout:
            await asyncio.sleep(0.02)
