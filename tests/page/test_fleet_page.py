"""The fleet page shows what real hosts do, as it happens."""

import re

import pytest
from playwright.async_api import Page, expect

from schemas.requests import InstanceRef, SetupNetwork, StartInstance, StopInstance
from tests.page.browser import Browser, sign_in
from tests.page.fleet import DOMAIN, PageFleet

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def enter(page: Page, fleet: PageFleet) -> None:
    await sign_in(page, fleet.server.web_url, "dashboard", "dashboard", DOMAIN)


async def test_it_shows_each_host_with_lease_state_capacity_and_versions(
    fleet: PageFleet, chromium: Browser
) -> None:
    async with chromium.page() as page:
        await enter(page, fleet)
        rows = page.get_by_role("table", name="Hosts").get_by_role("row")

        for number, host_id in enumerate(fleet.hosts, start=1):
            row = rows.nth(number)
            await expect(row).to_contain_text(host_id)
            await expect(row).to_contain_text("ready")
            await expect(row).to_contain_text("valid")
            await expect(row).to_contain_text(re.compile(r"\d+ / \d+"))
            await expect(row).to_contain_text(re.compile(r"0\.1\.0.*1\.1\d"))
    assert chromium.complaints == []


async def test_an_instance_and_its_events_appear_as_they_happen(
    fleet: PageFleet, chromium: Browser
) -> None:
    host = fleet.hosts["h2"]
    ref = InstanceRef("acme", "web", "i-1")
    names = (ref.tenant_id, ref.pool_id, ref.instance_id)
    seeded = host.seed(ref)
    async with chromium.page("#/instances") as page:
        await enter(page, fleet)
        row = page.get_by_role("row").filter(has_text="acme/web/i-1")
        await expect(row).to_have_count(0)

        up = await fleet.send("h2", SetupNetwork(ref.tenant_id, seeded.net))
        started = await fleet.send("h2", StartInstance(*names))
        await expect(row).to_contain_text("running")
        await fleet.send("h2", StopInstance(*names))
        await expect(row).to_contain_text("stopped")
        await page.get_by_role("link", name="Events").click()
        events = page.get_by_role("table", name="Events")
        await expect(events).to_contain_text("starting → running")
        await expect(events).to_contain_text("StopInstance ok")

    assert (up["code"], started["code"]) == ("ok", "ok")
    assert chromium.complaints == []
