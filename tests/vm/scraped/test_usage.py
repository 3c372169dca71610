"""`ask.usage` of a real VMM: its CPU, memory and traffic, anew with each launch."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from schemas.requests import SleepInstance, WakeInstance
from tests.live_host import LiveHost
from tests.vm.scraped.scraped_host import NAMES, scraped_host

pytestmark = pytest.mark.asyncio(loop_scope="module")
COUNTERS = {
    "cpu_us",
    "memory_bytes",
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
