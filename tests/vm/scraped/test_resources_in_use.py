"""What a real worker shows to a scrape: for everything bounded what is used, and the limit."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from tests.live_host import LiveHost
from tests.vm.scraped.scraped_host import LISTEN, scraped_host
from worker.bus.streams import SIZES_MIB
from worker.meters.resources import RESOURCES

pytestmark = pytest.mark.asyncio(loop_scope="module")

# None of them is the default.
LIMITS: dict[str, Any] = {
    "imports": 3, "boots": 7, "restores": 11, "snapshots": 5, "networks": 6, "lane_depth": 90,
    "tenant_depth": 900, "host_depth": 4000, "quarantine_after": 9,
}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[LiveHost]:
    async with scraped_host(**LIMITS) as made:
        yield made


async def scrape() -> str:
    reader, writer = await asyncio.open_connection(*LISTEN.split(":"))
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    assert text.startswith("HTTP/1.1 200")
    return text


async def capacity(which: str) -> Mapping[str, float]:
    found = re.findall(
        rf'^hostd_capacity_{which}{{resource="(\w+)"}} (\S+)$', await scrape(), re.MULTILINE
    )
    return {name: float(value) for name, value in found}


async def until_all_known() -> None:
    """The server's reports and the first pruning come some seconds after the start."""
    async with asyncio.timeout(60):
        while (await capacity("used")).keys() != RESOURCES.keys():
            await asyncio.sleep(0.2)


async def test_everything_bounded_has_both_gauges(host: LiveHost) -> None:
    await until_all_known()

    used, limit = await capacity("used"), await capacity("limit")
    assert used.keys() == limit.keys() == RESOURCES.keys()
    assert [name for name in used if not 0 <= used[name] <= limit[name]] == []


async def test_the_limits_are_those_in_effect(host: LiveHost) -> None:
    limit = await capacity("limit")

    assert {
        **{kind: limit[f"slots_{kind}"] for kind in ("imports", "boots", "restores", "snapshots")},
        "networks": limit["slots_networks"],
        "lane_depth": limit["commands_of_fullest_lane"],
        "tenant_depth": limit["commands_of_fullest_tenant"],
        "host_depth": limit["commands_of_host"],
        "quarantine_after": limit["failed_launches"],
    } == LIMITS
    assert limit["warm_vmms"] == host.settings.vmm.warm_pool
    assert limit["stream_replies_bytes"] == SIZES_MIB["reply"] << 20
    assert limit["uids"] == host.settings.vmm.uid_count
    assert limit["removals_of_hour"] == host.settings.sweep.per_hour


async def test_what_an_instance_takes_is_counted(host: LiveHost) -> None:
    used = await capacity("used")

    mib = 32 + host.settings.limits.vmm_overhead_mib
    assert used["memory_bytes"] == mib << 20
    assert used["addresses"] == 1
    assert used["descriptors"] > 10


async def test_rows_of_the_journal_are_counted_with_the_next_pruning(host: LiveHost) -> None:
    async with asyncio.timeout(60):
        while (await capacity("used"))["commands_finished"] < 2:  # of the network and the instance
            await asyncio.sleep(0.2)
