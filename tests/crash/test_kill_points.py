"""kill -9 between a step's effect and its row, in each command: one effect, one reply.

"Started once" is proved by the guest's own boot counter, which it keeps on its disk, and by the
log of jailer executions.
"""

from typing import Any

import pytest

from schemas.requests import Request, SetupNetwork, TeardownNetwork
from tests.constants import DESTROY, REF, SLEEP, START, STOP, WAKE
from tests.crash.kills import assert_one_outcome, kill_at
from tests.live_host import LiveHost, live_host

# What has to go before, in order, and after it how often the jailer was executed in all.
BEFORE: dict[str, tuple[tuple[str, ...], int]] = {
    "net-up": ((), 0),
    "start": (("net-up",), 1),
    "sleep": (("net-up", "start"), 1),
    "wake": (("net-up", "start", "sleep"), 2),
    "stop": (("net-up", "start"), 1),
    "destroy": (("net-up", "start"), 1),
    "net-down": (("net-up",), 0),
}
STATUS = {
    "start": "running",
    "sleep": "sleeping",
    "wake": "running",
    "stop": "stopped",
    "destroy": "destroyed",
}
POINTS = [
    ("net-up", "after:tenant_rules"),
    ("net-up", "after:bridge"),
    ("start", "after:reservation"),
    ("start", "after:pin"),
    ("start", "after:tap"),
    ("start", "after:jail"),
    ("start", "after:vmm"),
    ("start", "after:configure_vm"),
    ("start", "after:boot"),
    ("start", "after:start_vm"),
    ("sleep", "after:pause"),
    ("sleep", "after:snapshot_draft"),
    ("sleep", "after:publish_snapshot"),
    ("sleep", "after:remove_vmm"),
    ("wake", "after:tap"),
    ("wake", "before:vmm"),
    ("wake", "after:vmm"),
    ("wake", "after:link_snapshot"),
    ("wake", "after:load_snapshot"),
    ("wake", "after:consumed"),
    ("wake", "after:resume_vm"),
    ("stop", "after:stop_vmm"),
    ("stop", "after:remove_tap"),
    ("destroy", "after:remove_vmm"),
    ("destroy", "after:wipe_volumes"),
    ("destroy", "after:remove_files"),
    ("net-down", "after:remove_bridge"),
]


@pytest.mark.parametrize(("name", "moment"), POINTS)
async def test_a_killed_command_has_one_effect_and_one_reply(name: str, moment: str) -> None:
    async with live_host() as host:
        seeded = host.seed()
        requests: dict[str, Request] = {
            "net-up": SetupNetwork(REF.tenant_id, seeded.net),
            "start": START,
            "sleep": SLEEP,
            "wake": WAKE,
            "stop": STOP,
            "destroy": DESTROY,
            "net-down": TeardownNetwork(REF.tenant_id, seeded.net),
        }
        clean = await host.inventory()
        before, launches = BEFORE[name]
        for earlier in before:
            assert (await host.run(requests[earlier]))["code"] == "ok"
        slept = await host.stat() if "start" in before and "sleep" not in before else None

        await kill_at(host, moment, requests[name], "killed")
        await host.start_worker()
        await host.result("killed")

        reply = await assert_one_outcome(host, "killed")
        assert (reply["code"], reply["changed"], reply["left_behind"]) == ("ok", True, [])
        assert reply["attempts"] == 2
        assert reply["status"] == STATUS.get(name)
        assert host.jailer_runs() == launches
        if reply["status"] == "running":
            await assert_it_booted_once(host, reply)
        if name == "sleep":
            assert (await host.run(WAKE))["code"] == "ok"
            woken = await host.stat()
            assert slept is not None
            assert (woken["boots"], woken["boot_id"]) == (1, slept["boot_id"])
            assert woken["counter"] > slept["counter"]
        assert (await host.run(DESTROY))["code"] == "ok"
        assert (await host.run(requests["net-down"]))["code"] == "ok"
        assert await host.inventory() == clean


async def assert_it_booted_once(host: LiveHost, reply: dict[str, Any]) -> None:
    stat, told = await host.stat(), await host.describe()
    assert stat["boots"] == 1
    assert (told["status"], told["pid"]) == ("running", reply["detail"]["pid"])
