"""The page with axe-core, by the keyboard alone, at 200 % zoom, in the dark and printed."""

from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

from schemas.requests import InstanceRef, SetupNetwork, StartInstance, StopInstance
from tests.page.browser import Browser, sign_in
from tests.page.fleet import DOMAIN, PageFleet

pytestmark = pytest.mark.asyncio(loop_scope="module")

AXE = Path("build/page-source/node_modules/axe-core/axe.min.js")
VIEWS = (
    *("hosts", "instances", "events", "commands", "dead"),
    *("host/h1", "instance/h1/acme/web/i-1", "tenant/acme"),
)
SCHEMES = ("light", "dark")


async def enter(page: Page, fleet: PageFleet) -> None:
    await sign_in(page, fleet.server.web_url, "dashboard", "dashboard", DOMAIN)


async def violations(page: Page) -> list[str]:
    """What axe-core finds, by its default rules."""
    await page.evaluate(AXE.read_text(encoding="utf-8"))
    found: dict[str, Any] = await page.evaluate("axe.run(document)")
    assert found["passes"]
    return [
        f"{each['id']}: {node['html']}" for each in found["violations"] for node in each["nodes"]
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_axe_finds_nothing_in_any_view(
    fleet: PageFleet, chromium: Browser, scheme: str
) -> None:
    host = fleet.hosts["h1"]
    seeded = host.seed()
    await fleet.send("h1", SetupNetwork("acme", seeded.net))
    ref = InstanceRef("acme", "web", "i-1")
    names = (ref.tenant_id, ref.pool_id, ref.instance_id)
    for request in (StartInstance(*names), StopInstance(*names), StartInstance(*names)):
        await fleet.send("h1", request)
    async with chromium.page(color_scheme=scheme) as page:
        found = {"form": await violations(page)}
        await enter(page, fleet)
        for view in VIEWS:
            await page.evaluate(f"location.hash = '#/{view}'")
            await expect(page.locator("#view h2").first).to_be_visible()
            await expect(page.locator("#view").get_by_role("row").first).to_be_visible()
            if view.startswith(("instance/", "tenant/")):
                await expect(page.get_by_role("table", name="Usage")).to_be_visible()
            found[view] = await violations(page)
    assert {view: each for view, each in found.items() if each} == {}


async def test_it_is_dark_in_the_dark(chromium: Browser) -> None:
    shades: list[int] = []
    for scheme in SCHEMES:
        async with chromium.page(color_scheme=scheme) as page:
            colour = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            shades.append(int(colour.removeprefix("rgb(").split(",")[0]))

    light, dark = shades

    assert dark < 64
    assert light > 192


async def test_everything_is_reached_by_the_keyboard(fleet: PageFleet, chromium: Browser) -> None:
    async with chromium.page() as page:
        await enter(page, fleet)
        await page.keyboard.press("/")
        await page.keyboard.type("h2")
        rows = page.locator("tbody tr:visible:not(.space)")
        await expect(rows).to_have_count(1)
        await expect(page.locator(".filters p")).to_have_text("1 of 3")
        for _ in range(len("h2")):
            await page.keyboard.press("Backspace")
        await expect(rows).to_have_count(3)

        await press_until(page, "Tab", "document.activeElement.textContent === 'Host'")
        await page.keyboard.press("Enter")
        await page.keyboard.press("Enter")
        head = page.get_by_role("columnheader", name="Host", exact=True)
        await expect(head).to_have_attribute("aria-sort", "descending")
        await expect(rows.first).to_contain_text("h3")
        await press_until(page, "Tab", "document.activeElement.textContent === 'h3'")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("heading", level=2)).to_have_text("Host h3")


async def press_until(page: Page, key: str, condition: str) -> None:
    for _ in range(40):
        if await page.evaluate(condition):
            return
        await page.keyboard.press(key)
    pytest.fail(f"not reached: {condition}")


async def test_at_200_percent_nothing_is_cut_off(fleet: PageFleet, chromium: Browser) -> None:
    """A window of 1280 by 800 at 200 % has 640 by 400 CSS pixels."""
    size = {"width": 640, "height": 400}
    async with chromium.page(viewport=size, device_scale_factor=2) as page:
        await enter(page, fleet)
        for view in VIEWS:
            await page.evaluate(f"location.hash = '#/{view}'")
            await expect(page.locator("#view h2").first).to_be_visible()
            wide = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, view


async def test_a_printed_table_has_all_rows_and_no_controls(
    fleet: PageFleet, chromium: Browser
) -> None:
    async with chromium.page() as page:
        await enter(page, fleet)
        await page.emulate_media(media="print")

        await expect(page.get_by_role("navigation")).to_be_hidden()
        await expect(page.locator("#leave")).to_be_hidden()
        for host_id in fleet.hosts:
            await expect(page.get_by_role("link", name=host_id)).to_be_visible()
        assert (await page.pdf()).startswith(b"%PDF")
