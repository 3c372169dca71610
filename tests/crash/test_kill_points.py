"""kill -9 at every point of every command: one effect, one reply, the end of an undisturbed run.

The points come from the registry (`tests/crash/points.py`); `make crash` tries all, other runs a
slice that their printed seed chooses. "Booted once" is the guest's own count, kept on its disk.
"""

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from tests.constants import DESTROY, REF, WAKE
from tests.crash.kills import assert_one_outcome, events, kill_while, wait_event
from tests.crash.points import BEFORE, ENDS, KINDS, every_point, of_this_run, points, requests
from tests.crash.undisturbed import End, statuses, undisturbed
from tests.live_host import LiveHost, live_host
from worker.failpoints import ARM, FILE, POINT

EVERY = every_point()
COMPARED = ("code", "changed", "status", "left_behind", "response")


@pytest.mark.parametrize(("kind", "point"), of_this_run(EVERY))
async def test_a_killed_command_has_one_effect_and_one_reply(kind: str, point: str) -> None:
    want = await undisturbed(kind)
    async with live_host(worker=False) as host:
        reached = Path(host.directory, "reached")
        clean = await host.inventory()
        environment = {POINT: point, FILE: str(reached), ARM: f"{reached}.armed"}
        await host.start_worker(environment=environment)
        wanted = requests(host.seed().net)
        for earlier in BEFORE[kind]:
            assert (await host.run(wanted[earlier]))["code"] == "ok"
        before = await host.stat() if kind == "SleepInstance" else None

        await kill_while(host, wanted[kind], "killed", reached)
        await host.start_worker()
        await host.result("killed")

        reply = await assert_one_outcome(host, "killed")
        assert {key: reply[key] for key in COMPARED} == {key: want.reply[key] for key in COMPARED}
        assert (await host.run_again(wanted[kind], "killed"))["replayed"]
        await assert_same_end(host, want)
        if reply["status"] == "running":
            assert (await host.stat())["boots"] == 1
        if before is not None:
            await assert_it_goes_on(host, before)
        assert (await host.run(DESTROY))["code"] == "ok"
        assert (await host.run(wanted["TeardownNetwork"]))["code"] == "ok"
        await assert_inventory(host, clean)
        await assert_usage_once(host)


async def assert_same_end(host: LiveHost, want: End) -> None:
    """State, status events and resources are those of an undisturbed run.

    A command that was cut repeats the transitional statuses of its first run; where it came from
    and where it ended are the same.
    """
    await assert_inventory(host, want.inventory)
    told = await statuses(host)
    assert [end for _, end in told[-1:]] == [end for _, end in want.events[-1:]]
    assert all(later[0] == earlier[1] for earlier, later in itertools.pairwise(told))
    # A jailer that was cut before its VMM ran is executed again; a guest is not booted again.
    assert want.launches <= host.jailer_runs() <= want.launches + 1
    assert len(host.vm_pids()) == want.inventory["processes"]


async def assert_usage_once(host: LiveHost) -> None:
    """Each launch that ran is one event, with its counters; their sums go with the instance."""
    gone = await wait_event(host, lambda event: event.get("to") == "destroyed")
    used = [each["detail"] for each in await events(host) if each["kind"] == "usage"]
    launches = [each["launch"] for each in used if each["launch"] is not None]
    numbers = [each["launch"] for each in launches]
    assert numbers == list(range(1, len(numbers) + 1))
    assert all(each["cpu_us"] > 0 and each["guest_sent_bytes"] is not None for each in launches)
    totals = gone["detail"].get("totals")
    if launches:
        assert totals["launches"] == len(launches)
        assert totals["incomplete"] == 0
        for name in ("cpu_us", "vcpu_ms", "memory_mib_s", "guest_sent_bytes"):
            assert totals[name] == sum(each[name] for each in launches)


async def assert_inventory(host: LiveHost, want: dict[str, int]) -> None:
    """What is left to the kernel and to the background is gone in some seconds."""
    end = time.monotonic() + 30
    while (now := await host.inventory()) != want and time.monotonic() < end:
        await asyncio.sleep(0.1)
    assert now == want


async def assert_it_goes_on(host: LiveHost, before: dict[str, Any]) -> None:
    """The guest that slept is the one that wakes."""
    assert (await host.run(WAKE))["code"] == "ok"
    woken = await host.stat(REF)
    assert (woken["boots"], woken["boot_id"]) == (1, before["boot_id"])
    assert woken["counter"] > before["counter"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_real_worker_goes_through_the_points_of_the_list(kind: str) -> None:
    real = await undisturbed(kind)

    listed = {point for each, point in EVERY if each == kind}
    assert set(points(real.moments)) - set(ENDS) == listed - set(ENDS)
    assert set(ENDS) <= set(real.moments)
