"""`ask.usage` of a real VMM: its CPU, memory and traffic, anew with each launch."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from schemas.requests import (
    DestroyInstance,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)
from tests.crash.kills import events, wait_event
from tests.live_host import LiveHost
from tests.vm.scraped.scraped_host import NAMES, REF, scraped_host

pytestmark = pytest.mark.asyncio(loop_scope="module")
COUNTERS = {
    "duration_ms",
    "vcpu_ms",
    "memory_mib_s",
    "cpu_us",
    "memory_bytes",
    "memory_peak_bytes",
    "guest_sent_bytes",
    "guest_sent_packets",
    "guest_received_bytes",
    "guest_received_packets",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[LiveHost]:
    async with scraped_host() as made:
        yield made


async def usage(host: LiveHost) -> dict[str, Any]:
    body = {"tenant_id": NAMES[0], "pool_id": NAMES[1], "instance_id": NAMES[2]}
    async with host.client() as client:
        return await client.ask(host.settings.host.id, "usage", body)


async def test_a_running_vmm_uses_more_and_more_cpu(host: LiveHost) -> None:
    first = await usage(host)

    assert (first["status"], first["launch"], first["mem_mib"]) == ("running", 1, 32)
    assert first["vmm"].keys() == COUNTERS
    assert first["vmm"]["cpu_us"] > 0
    assert (first["vmm"]["memory_bytes"] is None) == (not host.settings.limits.enforce)
    async with asyncio.timeout(30):
        while (await usage(host))["vmm"]["cpu_us"] <= first["vmm"]["cpu_us"]:
            await asyncio.sleep(0.2)


async def test_it_goes_on_with_the_next_worker_and_begins_anew_with_a_wake(host: LiveHost) -> None:
    before = await usage(host)
    await host.kill_worker()
    await host.start_worker()
    after = await usage(host)
    assert after["launch"] == before["launch"]
    assert after["vmm"]["cpu_us"] >= before["vmm"]["cpu_us"]

    assert (await host.run(SleepInstance(*NAMES, force=False)))["code"] == "ok"
    assert ((await usage(host))["status"], (await usage(host))["vmm"]) == ("sleeping", None)
    assert (await host.run(WakeInstance(*NAMES)))["code"] == "ok"

    woken = await usage(host)
    assert woken["launch"] == before["launch"] + 1
    assert woken["vmm"]["cpu_us"] > 0


async def test_a_whole_life_is_the_sum_of_its_events(host: LiveHost) -> None:
    """Last: it ends with a Destroy. Launches 1 and 2 were those of the tests before."""
    await burn(host)
    assert (await host.run(SleepInstance(*NAMES, force=False)))["code"] == "ok"
    asleep = await usage(host)
    assert asleep["span"]["state"] == "sleeping"
    assert asleep["snapshot"]["size_bytes"] > 32 << 20
    assert 0 < asleep["snapshot"]["allocated_bytes"] <= asleep["snapshot"]["size_bytes"] + (1 << 20)
    await asyncio.sleep(0.3)
    assert (await host.run(WakeInstance(*NAMES)))["code"] == "ok"
    await burn(host)
    running = await usage(host)
    assert (await host.run(StopInstance(*NAMES)))["code"] == "ok"
    stopped = await usage(host)
    assert (stopped["vmm"], stopped["snapshot"], stopped["span"]["state"]) == (
        None,
        None,
        "stopped",
    )
    assert (await host.run(StartInstance(*NAMES)))["code"] == "ok"
    os.kill((await host.describe(REF))["pid"], signal.SIGKILL)
    await host.wait_status("failed", REF)
    of_tenant = await of_the_tenant(host)
    assert (await host.run(StartInstance(*NAMES)))["code"] == "ok"
    assert (await host.run(DestroyInstance(*NAMES, wipe_volumes=True)))["code"] == "ok"

    gone = await wait_event(host, lambda event: event.get("to") == "destroyed")
    used = [each["detail"] for each in await events(host) if each["kind"] == "usage"]
    launches = [each for each in used if each["launch"] is not None]
    sleeps = [each for each in used if each["snapshot"] is not None]
    totals = gone["detail"]["totals"]
    assert [each["launch"]["launch"] for each in launches] == [1, 2, 3, 4, 5]
    assert totals == used[-1]["totals"]
    assert (totals["launches"], totals["incomplete"], len(sleeps)) == (5, 0, 2)
    for name in ("cpu_us", "vcpu_ms", "memory_mib_s", "guest_sent_bytes", "guest_received_packets"):
        assert totals[name] == sum(each["launch"][name] for each in launches)
    assert totals["running_ms"] == sum(each["span"]["duration_ms"] for each in launches)
    assert totals["sleeping_ms"] == sum(each["span"]["duration_ms"] for each in sleeps) >= 300
    final = launches[2]
    assert final["launch"]["cpu_us"] >= running["vmm"]["cpu_us"] > 0
    assert final["span"]["duration_ms"] >= running["vmm"]["duration_ms"]
    assert stopped["totals"] == final["totals"]
    assert of_tenant["totals"] == launches[3]["totals"]
    assert (of_tenant["instances"], of_tenant["current"]["stopped"]) == (1, 1)


async def of_the_tenant(host: LiveHost) -> dict[str, Any]:
    async with host.client() as client:
        return await client.ask(host.settings.host.id, "usage", {"tenant_id": NAMES[0]})


async def burn(host: LiveHost) -> None:
    """Until the guest has used some CPU more."""
    before = (await usage(host))["vmm"]["cpu_us"]
    async with asyncio.timeout(30):
        while (await usage(host))["vmm"]["cpu_us"] <= before:
            await asyncio.sleep(0.1)
