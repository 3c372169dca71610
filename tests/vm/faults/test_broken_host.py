"""A host that can launch nothing: it reports itself degraded, takes no Starts, and comes back."""

import asyncio
import os

import pytest

from handlers.host.vmm.cgroups import CgroupTree
from tests.constants import START
from tests.crash.kills import wait_event
from tests.live_host import live_host
from worker.cli.control_client import ControlClient


async def test_a_host_that_can_launch_nothing_takes_no_starts_until_undrain() -> None:
    async with live_host(worker=False) as host:
        if host.settings.limits.enforce:
            pytest.skip("a threaded cgroup has no memory controller: another failure than here")
        environment = {"HOSTD_LIMITS_QUARANTINE_AFTER": "2"}
        tree = CgroupTree.of(host.settings)
        base = tree.path(tree.base)
        os.makedirs(base, exist_ok=True)
        with open(f"{base}/cgroup.type", "w", encoding="ascii") as kind:
            kind.write("threaded")  # its children take no process: the jailer cannot enter them
        await host.start_worker(environment=environment)
        await host.net_up(host.seed())

        for _ in range(2):
            failed = await host.run(START)
            assert (failed["code"], failed["left_behind"]) == ("host_fault", []), failed
        refused = await host.run(START)

        assert (refused["code"], refused["steps"]) == ("unavailable", [])
        event = await wait_event(host, lambda e: e["kind"] == "host")
        assert (event["detail"]["launches_quarantined"], event["detail"]["failures"]) == (True, 2)
        pong = await host.ping()
        assert (pong["detail"]["host_state"], pong["detail"]["degraded_by"]) == (
            "degraded",
            ["launches"],
        )

        await host.kill_worker()
        os.rmdir(base)  # empty: what failed left nothing
        await host.start_worker(ready=False, environment=environment)  # it is degraded
        assert (await host.run(START))["code"] == "unavailable"
        client = ControlClient(host.settings)
        ended = await asyncio.to_thread(client.post, "/v1/undrain", {})

        assert ended == {"was_draining": False, "was_quarantined": True}
        assert (await host.run(START))["code"] == "ok"
        assert (await host.ping())["detail"]["host_state"] == "ready"
