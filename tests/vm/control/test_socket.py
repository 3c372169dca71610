"""The control socket of a real worker: with a guest, without NATS, and while it cannot commit."""

import asyncio
import resource
from pathlib import Path
from typing import Any

from schemas.requests import SleepInstance
from tests.constants import NAMES, REF, START
from tests.live_host import LiveHost, live_host
from tests.vm.control.local_cli import hostd
from worker.cli.control_client import ControlClient
from worker.control.endpoint import SOCKET

HELD = SleepInstance(*NAMES, force=False, drain_timeout_secs=600)


async def dump(host: LiveHost) -> dict[str, Any]:
    answer = await asyncio.to_thread(ControlClient(host.settings).get, "/v1/dump")
    assert [name for name, value in answer.items() if "error" in str(value)[:10]] == []
    return dict(answer)


async def test_a_dump_shows_a_guest_and_the_step_that_its_command_waits_in() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        await host.run(START)
        await host.ask_guest({"Set": {"drain": "hold"}})
        await host.publish(HELD, "held")
        await host.wait_status("draining")

        found = await dump(host)
        text = await hostd(host, "dump")

        (command,) = found["commands"]["shown"]
        assert (command["id"], command["state"]) == ("held", "running")
        assert [each["step"] for each in command["doing"]] == ["drain_guest"]
        (instance,) = found["instances"]["shown"]
        assert (instance["tenant_id"], instance["status"]) == (REF.tenant_id, "draining")
        assert instance["pid"] in host.vm_pids()
        assert found["networks"]["count"] == 1
        assert found["connections"]["bus"]["connected"] is True
        assert found["versions"]["firecracker"]
        assert found["host"]["pid"] == (host.worker.pid if host.worker else 0)
        assert all(found["host"]["checks"].values())
        assert "journal" in {thread["name"] for thread in found["threads"]}
        assert "step drain_guest" in text.stdout
        await host.ask_guest("Release")
        await host.result("held")


async def test_it_answers_without_nats_and_the_next_worker_replaces_what_a_kill_left() -> None:
    async with live_host(worker=False) as host:
        await host.nats.stop()
        await host.start_worker(ready=False)
        without = await until_it_answers(host)
        await host.kill_worker()
        assert Path(host.settings.paths.run, SOCKET).exists()
        await host.nats.start()
        await host.start_worker()
        found = await dump(host)
        assert await host.stop_worker() == 0

        assert without["connections"]["bus"]["connected"] is False
        assert without["host"]["checks"]["connected"] is False
        assert found["host"]["host_state"] == "ready"
        assert not Path(host.settings.paths.run, SOCKET).exists()


async def test_it_answers_while_the_journal_cannot_commit() -> None:
    async with live_host() as host:
        assert host.worker is not None
        await host.net_up(host.seed())

        limits = resource.prlimit(host.worker.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(host.worker.pid, resource.RLIMIT_FSIZE, (0, limits[1]))
        await host.publish(START, "late")
        async with asyncio.timeout(30):
            while (found := await dump(host))["journal"]["writable"]:
                await asyncio.sleep(0.02)
        resource.prlimit(host.worker.pid, resource.RLIMIT_FSIZE, limits)

        assert found["host"]["checks"]["can_commit"] is False
        await host.wait_status("running")


async def until_it_answers(host: LiveHost) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while not Path(host.settings.paths.run, SOCKET).exists():
            await asyncio.sleep(0.02)
    return await dump(host)
