"""The fleet page shows what real hosts do, as it happens."""

import asyncio
import os
import re
from pathlib import Path

import pytest
from playwright.async_api import Page, Route, expect

from schemas.requests import InstanceRef, SetupNetwork, StartInstance, StopInstance
from tests.broker.server import connection_to
from tests.page.browser import Browser, sign_in
from tests.page.fleet import DOMAIN, SUBJECTS, PageFleet

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
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


async def test_the_history_of_a_host_and_an_instance_is_there(
    fleet: PageFleet, chromium: Browser
) -> None:
    """Of the instance that the test before started and stopped; read from the stream."""
    async with chromium.page("#/instance/h2/acme/web/i-1") as page:
        await enter(page, fleet)
        history = page.get_by_role("table", name="History")

        await expect(page.get_by_role("heading", level=2)).to_have_text("Instance acme/web/i-1")
        await expect(history).to_contain_text("starting → running")
        await expect(history).to_contain_text("StopInstance ok")
        await expect(page.get_by_text("That is all that is kept")).to_be_visible()
        await expect(page.locator("dl").first).to_contain_text("stopped")
        await expect(page.get_by_text("What the worker answers")).to_be_visible()
        await page.get_by_role("link", name="h2").first.click()
        await expect(page.get_by_role("heading", level=2)).to_have_text("Host h2")
        await expect(history).to_contain_text("SetupNetwork ok")
        await expect(page.locator("dl").first).to_contain_text("ready")
    assert chromium.complaints == []


async def test_a_command_is_seen_in_flight_and_then_with_its_outcome_and_steps(
    fleet: PageFleet, chromium: Browser
) -> None:
    """The worker is held in the middle of a Start, and killed; the next one completes it."""
    host = fleet.hosts["h3"]
    seeded = host.seed(InstanceRef("acme", "slow", "i-3"))
    await host.stop_worker()
    held = {"HOSTD_FAILPOINT": "before:vmm", "HOSTD_FAILPOINT_FILE": f"{host.directory}/held"}
    await host.start_worker(environment=held)
    async with chromium.page("#/commands") as page:
        await enter(page, fleet)
        await fleet.send("h3", SetupNetwork("acme", seeded.net))
        start = StartInstance("acme", "slow", "i-3")
        sent = asyncio.create_task(fleet.send("h3", start, command_id="start-slow"))

        row = page.get_by_role("table", name="In flight").get_by_role("row").nth(1)
        await expect(row).to_contain_text("acme/slow/i-3")
        await expect(row).to_contain_text("starting")
        await expect(row).to_contain_text("start-slow")
        await host.kill_worker()
        await host.start_worker()
        reply = await sent
        outcomes = page.get_by_role("table", name="Outcomes")
        outcome = outcomes.get_by_role("row").filter(has_text="start-slow")
        await expect(outcome).to_contain_text(f"StartInstance{reply['code']}")
        await expect(row).to_be_hidden()
        await outcome.get_by_role("link", name="start-slow").click()
        await expect(page.get_by_role("table", name="Steps")).to_contain_text("vmm")
        await expect(page.locator("dl").last).to_contain_text("done")
    assert chromium.complaints == []


async def test_a_dead_letter_is_listed_with_its_reason_and_its_bytes(
    fleet: PageFleet, chromium: Browser
) -> None:
    async with chromium.page("#/dead") as page:
        await enter(page, fleet)
        async with connection_to(fleet.url("agentd-h1"), inbox="_INBOX.agentd") as agentd:
            await agentd.request(f"{SUBJECTS.root}.h1.cmd.network.acme", b"\xc1\x00no command")

        row = page.get_by_role("table", name="Dead letters").get_by_role("row").nth(1)
        await expect(row).to_contain_text("h1")
        await expect(row).to_contain_text("acme")
        await row.get_by_role("link").first.click()
        await expect(page.locator("dl")).to_contain_text("sha256")
        await expect(page.locator("pre").last).to_contain_text("c1 00 6e 6f 20 63")
    assert chromium.complaints == []


async def test_pictures_of_it_can_be_taken(
    fleet: PageFleet, chromium: Browser, tmp_path: Path
) -> None:
    """Of what the tests before left; with PICTURES=1 they are those of the docs."""
    to = Path("docs/images") if os.environ.get("PICTURES") else tmp_path
    size = {"width": 1100, "height": 420}
    # Without the name of the machine, the last column of the hosts.
    style = "th:last-child, td:last-child { display: none } .scroller { height: 14rem }"
    async with chromium.page(viewport=size, bypass_csp=True) as page:  # else no style
        await enter(page, fleet)
        for view, heading in (("hosts", "Hosts"), ("instance/h2/acme/web/i-1", "Instance")):
            await page.evaluate(f"location.hash = '#/{view}'")
            await expect(page.locator("#view h2").first).to_contain_text(heading)
            await expect(page.locator("#view tbody tr:visible:not(.space)").nth(2)).to_be_visible()
            picture = await page.screenshot(style=style, full_page=True)
            (to / f"{view.split('/', 1)[0]}.png").write_bytes(picture)

            assert len(picture) < 200_000


@pytest.mark.parametrize(
    ("template", "href"),
    [
        ("https://tempo.example/trace/{traceId}?x=1", f"https://tempo.example/trace/{TRACE}?x=1"),
        ("javascript:alert('{traceId}')", None),
        ("https://{traceId}.example/", None),
        ("https://tempo.example/", None),
        (7, None),
    ],
)
async def test_a_command_leads_to_its_trace(
    fleet: PageFleet, chromium: Browser, template: object, href: str | None
) -> None:
    gone = StopInstance("acme", "web", "i-9")
    parent = f"00-{TRACE}-00f067aa0ba902b7-01"
    await fleet.send("h1", gone, command_id="traced-1", traceparent=parent)

    async def configure(route: Route) -> None:
        await route.fulfill(json={"traceUrl": template})

    async with chromium.page("#/events") as page:
        await page.route("**/config.json", configure)
        await page.reload()
        await enter(page, fleet)
        await expect(page.get_by_role("table", name="Events")).to_contain_text("StopInstance")
        link = page.get_by_role("link", name=TRACE[:8]).first
        if href is None:
            await expect(link).to_have_count(0)
        else:
            await expect(link).to_have_attribute("href", href)
            await expect(link).to_have_attribute("rel", "noopener noreferrer")
        await page.goto(f"{chromium.url}#/command/h1/traced-1")
        await expect(page.get_by_text("Attempts")).to_be_visible()
        link = page.get_by_role("link", name=TRACE)
        await expect(link).to_have_count(0 if href is None else 1)
        if href is not None:
            await expect(link).to_have_attribute("href", href)
    assert chromium.complaints == []
