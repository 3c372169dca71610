"""The fleet page says what instances used, from the `usage` events of real workers."""

import json
import re

import pytest
import pytest_asyncio
from playwright.async_api import Locator, Page, expect

from schemas.requests import (
    InstanceRef,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)
from tests.broker.server import connection_to
from tests.page.browser import Browser, sign_in
from tests.page.fleet import DOMAIN, SUBJECTS, PageFleet

pytestmark = pytest.mark.asyncio(loop_scope="module")

TENANT = "metered"
FIRST = InstanceRef(TENANT, "web", "i-1")
SECOND = InstanceRef(TENANT, "web", "i-2")
WHOLE = re.compile("^What ended since 20.*, when counting began$")
EVENTS = f"{SUBJECTS.root}.*.evt.instance.{TENANT}.*.*.usage"


async def enter(page: Page, fleet: PageFleet) -> None:
    await sign_in(page, fleet.server.web_url, "dashboard", "dashboard", DOMAIN)


async def cycle(fleet: PageFleet, host_id: str, ref: InstanceRef, net_id: int) -> None:
    """Start, sleep, wake, stop: two launches and a sleep."""
    seeded = fleet.hosts[host_id].seed(ref, net_id=net_id)
    names = (ref.tenant_id, ref.pool_id, ref.instance_id)
    for request in (
        SetupNetwork(ref.tenant_id, seeded.net),
        StartInstance(*names),
        SleepInstance(*names, force=False),
        WakeInstance(*names),
        StopInstance(*names),
    ):
        assert (await fleet.send(host_id, request))["code"] == "ok"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def metered(fleet: PageFleet) -> PageFleet:
    """The fleet, with two instances of the tenant, on a host each, that were used."""
    await cycle(fleet, "h1", FIRST, 7)
    await cycle(fleet, "h2", SECOND, 7)
    return fleet


async def used(fleet: PageFleet, host_id: str, ref: InstanceRef) -> dict[str, int]:
    """The totals that the worker has."""
    body = {
        "tenant_id": ref.tenant_id,
        "pool_id": ref.pool_id,
        "instance_id": ref.instance_id,
    }
    async with fleet.hosts[host_id].client() as client:
        totals: dict[str, int] = (await client.ask(host_id, "usage", body))["totals"]
        return totals


async def used_by_both(fleet: PageFleet) -> dict[str, int]:
    each = [await used(fleet, "h1", FIRST), await used(fleet, "h2", SECOND)]
    names = [name for name in each[0] if name not in {"from_ms", "memory_peak_bytes"}]
    return {name: sum(one[name] for one in each) for name in names}


def fact(page: Page, name: str) -> Locator:
    return page.locator(".usage dt", has_text=re.compile(f"^{re.escape(name)}$")).locator("+ dd")


async def expect_totals(page: Page, totals: dict[str, int]) -> None:
    await expect(fact(page, "Launches that ended")).to_have_text(str(totals["launches"]))
    for name, value, digits in (
        ("Running, s", totals["running_ms"] / 1000, 1),
        ("Asleep, s", totals["sleeping_ms"] / 1000, 1),
        ("vCPUs given, vCPU s", totals["vcpu_ms"] / 1000, 1),
        ("CPU used, s", totals["cpu_us"] / 1e6, 3),
        ("Memory given, MiB s", totals["memory_mib_s"], 0),
        ("Guest sent, bytes", totals["guest_sent_bytes"], 0),
        ("Guest received, bytes", totals["guest_received_bytes"], 0),
        ("Snapshots, MiB s", totals["snapshot_mib_s"], 0),
    ):
        shown = float((await fact(page, name).inner_text()).replace(",", ""))
        assert abs(shown - value) <= 0.51 * 10**-digits, name


async def test_an_instances_page_adds_up_to_what_its_host_counted_and_goes_on(
    metered: PageFleet, chromium: Browser
) -> None:
    async with chromium.page(f"#/instance/h1/{TENANT}/web/i-1") as page:
        await enter(page, metered)
        spans = page.get_by_role("table", name="Usage").locator("tbody tr:visible:not(.space)")

        await expect(spans).to_have_count(3)
        await expect(page.locator(".usage p")).to_have_text(WHOLE)
        await expect_totals(page, await used(metered, "h1", FIRST))
        await expect(spans.nth(1)).to_contain_text("sleeping")

        names = (FIRST.tenant_id, FIRST.pool_id, FIRST.instance_id)
        await metered.send("h1", StartInstance(*names))
        await metered.send("h1", StopInstance(*names))
        await expect(spans).to_have_count(4)
        await expect(fact(page, "Launches that ended")).to_have_text("3")
        await expect_totals(page, await used(metered, "h1", FIRST))
    assert chromium.complaints == []


async def test_a_tenants_page_sums_over_its_instances_and_hosts(
    metered: PageFleet, chromium: Browser
) -> None:
    async with chromium.page(f"#/instance/h2/{TENANT}/web/i-2") as page:
        await enter(page, metered)
        await page.get_by_role("link", name=TENANT, exact=True).click()

        await expect(page.get_by_role("heading", level=2)).to_have_text(f"Tenant {TENANT}")
        rows = page.get_by_role("table", name="Usage").locator("tbody tr:visible:not(.space)")
        await expect(rows).to_have_count(2)
        await expect(page.locator(".usage p")).to_have_text(WHOLE)
        await expect_totals(page, await used_by_both(metered))
        for row, (ref, host_id) in enumerate(((FIRST, "h1"), (SECOND, "h2"))):
            await expect(rows.nth(row)).to_contain_text(f"{TENANT}/web/{ref.instance_id}")
            await expect(rows.nth(row).get_by_role("link", name=host_id)).to_have_count(1)
    assert chromium.complaints == []


async def test_it_says_that_it_is_partial_once_the_stream_lost_the_beginning(
    metered: PageFleet, chromium: Browser
) -> None:
    """The stream loses the first launch of i-1."""
    async with connection_to(metered.url("admin")) as admin:
        api = f"$JS.API.STREAM.{{}}.{SUBJECTS.events_stream}"
        stream = SUBJECTS.events_stream
        body = json.dumps({"seq": 1, "next_by_subj": EVENTS}).encode()
        first = await admin.request(f"$JS.API.DIRECT.GET.{stream}", body)
        seq = int((first.headers or {})["Nats-Sequence"])
        purged = await admin.request(api.format("PURGE"), json.dumps({"seq": seq + 1}).encode())
        assert json.loads(purged.data)["success"]
    left = (await used_by_both(metered))["launches"] - 1
    async with chromium.page(f"#/tenant/{TENANT}") as page:
        await enter(page, metered)

        said = page.locator(".usage p")
        await expect(said).to_contain_text(re.compile("^Partial: what ended since 20"))
        await expect(said).to_contain_text("the rest has left the stream, or this page forgot")
        await expect(fact(page, "Launches that ended")).to_have_text(str(left))
        await page.evaluate(f"location.hash = '#/instance/h2/{TENANT}/web/i-2'")
        await expect(said).to_have_text(WHOLE)
        await page.evaluate("location.hash = '#/tenant/nobody'")
        await expect(said).to_have_text("No launch and no sleep that ended is in the stream")
    assert chromium.complaints == []
