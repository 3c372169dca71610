"""What the fleet page says of `usage` events that a test publishes with a host's credential.

Each test has a tenant of its own: nothing of the others is in its sums.
"""

import re
from typing import Any

import pytest
from playwright.async_api import Locator, Page, expect

from tests.broker.proxy import proxied
from tests.broker.server import connection_to
from tests.page.browser import Browser, sign_in
from tests.page.fleet import DOMAIN, SUBJECTS, Cell
from tests.page.sender import FROM_MS, Sender
from tests.page.test_trust import HOSTILE
from worker.bus.connection import Connection

pytestmark = pytest.mark.asyncio(loop_scope="module")

FIRST_WINDOW = 512  # messages that a page reads of the stream before "Older"
WHOLE = re.compile(r"^What ended since 2026-09-2\d \d\d:\d\d:\d\d, when counting began$")
UNREAD = re.compile(r"^Partial: what ended since 20.*; older events were not read yet$")
REST = "; the rest has left the stream, or this page forgot it: reload it"


async def enter(page: Page, bus: Cell, url: str = "") -> None:
    await sign_in(page, url or bus.server.web_url, "dashboard", "dashboard", DOMAIN)


def launch(number: int, **more: object) -> dict[str, Any]:
    """The detail of a launch of one second, the `number`th since the host counts."""
    used = {
        "launch": number,
        "vcpu_ms": 2_000,
        "memory_mib_s": 128,
        "cpu_us": 500_000,
        "memory_peak_bytes": 4_096,
        "guest_sent_bytes": 10,
        "guest_received_bytes": 20,
    }
    totals = {"from_ms": FROM_MS, "launches": number, "sleeping_ms": 0}
    return {"span": span("running"), "launch": used | more, "snapshot": None, "totals": totals}


def sleep(launches: int, sleeping_ms: int, **more: object) -> dict[str, Any]:
    """The detail of a sleep of one second."""
    kept = {"size_bytes": 9, "allocated_bytes": 4_096, "snapshot_mib_s": 7} | more
    totals = {"from_ms": FROM_MS, "launches": launches, "sleeping_ms": sleeping_ms}
    return {"span": span("sleeping"), "launch": None, "snapshot": kept, "totals": totals}


def span(state: str) -> dict[str, Any]:
    return {"state": state, "ended_ms": FROM_MS + 5_000, "duration_ms": 1_000}


def said(page: Page) -> Locator:
    return page.locator(".usage p")


def fact(page: Page, name: str) -> Locator:
    return page.locator(".usage dt", has_text=re.compile(f"^{re.escape(name)}$")).locator("+ dd")


def rows(page: Page) -> Locator:
    return page.get_by_role("table", name="Usage").locator("tbody tr:visible:not(.space)")


async def test_it_is_partial_while_older_events_are_unread_though_each_host_count_is_reached(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    """More instances than a page reads at once, each with its only launch."""
    sender = Sender(host)
    for number in range(FIRST_WINDOW + 50):
        await sender.host.send(*sender.event(f"instance.unread.web.i-{number}.usage", launch(1)))
    await sender.usage("unread.web.last", launch(1))
    async with alone.page("#/tenant/unread") as page:
        await enter(page, bus)

        await expect(said(page)).to_have_text(UNREAD)
        await expect(fact(page, "Launches that ended")).to_have_text(f"{FIRST_WINDOW}")
        await page.get_by_role("button", name="Older").click()
        await expect(said(page)).to_have_text(WHOLE)
        await expect(fact(page, "Launches that ended")).to_have_text(f"{FIRST_WINDOW + 51}")
    assert alone.complaints == []


async def test_it_does_not_say_that_it_reads_when_it_does_not(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    """The newest events of the instance are of other kinds."""
    sender = Sender(host)
    await sender.usage("quiet.web.i-1", launch(1))
    await sender.fill("instance.quiet.web.i-1.status", FIRST_WINDOW)
    async with alone.page("#/instance/h3/quiet/web/i-1") as page:
        await enter(page, bus)

        await expect(said(page)).to_have_text("No launch and no sleep that ended was read yet")
        await page.get_by_role("button", name="Older").click()
        await expect(said(page)).to_have_text(WHOLE)
    assert alone.complaints == []


async def test_what_is_unknown_is_in_no_sum_and_counted(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    await Sender(host).usage(
        "vague.web.i-1",
        launch(1),
        launch(2, cpu_us=None),
        launch(3, memory_peak_bytes=None),
        sleep(3, 1_000),
        sleep(3, 2_000, snapshot_mib_s=None),
    )
    async with alone.page("#/instance/h3/vague/web/i-1") as page:
        await enter(page, bus)

        await expect(fact(page, "Launches that ended")).to_have_text("3")
        await expect(fact(page, "CPU used, s")).to_have_text("1.000")
        await expect(fact(page, "Asleep, s")).to_have_text("2.0")
        await expect(fact(page, "Snapshots, MiB s")).to_have_text("7")
        await expect(fact(page, "Spans with unknown values, left out")).to_have_text("2")
        await expect(rows(page).filter(has_text="unknown")).to_have_count(3)
        await expect(said(page)).to_have_text(WHOLE)
    assert alone.complaints == []


async def test_numbers_that_no_host_can_count_are_unknown(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    beyond: list[object] = [-1, -(2**63), 2**64 - 1, 1e300, float("nan"), float("inf"), "5", [5]]
    await Sender(host).usage(
        "wild.web.i-1",
        *(launch(number, guest_sent_bytes=value) for number, value in enumerate(beyond, start=1)),
        launch(9, guest_sent_bytes=2**63 - 1),
    )
    await Sender(host).usage("wild.web.i-2", launch(1) | {"totals": {"launches": -1}})
    async with alone.page("#/instance/h3/wild/web/i-1") as page:
        await enter(page, bus)

        await expect(fact(page, "Guest sent, bytes")).to_have_text("9,223,372,036,854,776,000")
        await expect(fact(page, "Spans with unknown values, left out")).to_have_text("8")
        await expect(rows(page).filter(has_text="unknown")).to_have_count(8)
        await page.evaluate("location.hash = '#/tenant/wild'")
        await expect(rows(page)).to_have_count(2)
        await expect(said(page)).to_have_text(re.compile(f"^Partial: .*{re.escape(REST)}$"))
    assert alone.complaints == []


async def test_a_state_that_the_page_does_not_know_is_shown_and_in_no_sum(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    other = [launch(1) | {"span": span(state)} for state in ("paused", HOSTILE, "\u202erunning")]
    await Sender(host).usage("states.web.i-1", launch(1), sleep(1, 1_000), *other)
    async with alone.page("#/instance/h3/states/web/i-1") as page:
        await enter(page, bus)

        await expect(rows(page)).to_have_count(5)
        for state in ("paused", HOSTILE, "\ufffdrunning"):
            await expect(rows(page).filter(has_text=state)).to_have_count(1)
        await expect(fact(page, "Launches that ended")).to_have_text("1")
        await expect(fact(page, "Running, s")).to_have_text("1.0")
        await expect(fact(page, "Asleep, s")).to_have_text("1.0")
        await expect(fact(page, "CPU used, s")).to_have_text("0.500")
        await expect(said(page)).to_have_text(WHOLE)
        assert await page.evaluate("typeof pwned") == "undefined"
        assert await page.locator("#view img, #view script").count() == 0
    assert alone.complaints == []


async def test_an_instance_without_events_in_the_stream_is_not_noticed(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    sender = Sender(host)
    await sender.usage("lost.web.i-1", launch(1))
    await sender.usage("lost.web.i-2", launch(1))
    async with connection_to(bus.url("admin")) as admin:
        purge = f"$JS.API.STREAM.PURGE.{SUBJECTS.events_stream}"
        filtered = f'{{"filter": "{SUBJECTS.root}.h3.evt.instance.lost.web.i-1.usage"}}'
        assert b'"success":true' in (await admin.request(purge, filtered.encode())).data
    async with alone.page("#/tenant/lost") as page:
        await enter(page, bus)

        await expect(rows(page)).to_have_count(1)
        await expect(rows(page)).to_contain_text("lost/web/i-2")
        await expect(said(page)).to_have_text(WHOLE)
        await page.evaluate("location.hash = '#/instance/h3/lost/web/i-1'")
        nothing = "No launch and no sleep that ended is in the stream"
        await expect(said(page)).to_have_text(nothing)
    assert alone.complaints == []


async def test_an_instances_page_sums_over_hosts_and_names_them(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    await Sender(host).usage("moved.web.i-1", launch(1))
    async with connection_to(bus.url("host-h1"), inbox="_INBOX_HOSTD.h1") as other:
        await Sender(other, "h1").usage("moved.web.i-1", launch(1), launch(2))
    async with alone.page("#/instance/h3/moved/web/i-1") as page:
        await enter(page, bus)

        await expect(fact(page, "Launches that ended")).to_have_text("3")
        for host_id, count in (("h1", 2), ("h3", 1)):
            link = rows(page).get_by_role("link", name=host_id, exact=True)
            await expect(link).to_have_count(count)
            await expect(link.first).to_have_attribute("href", f"#/host/{host_id}")
        await expect(said(page)).to_have_text(WHOLE)
    assert alone.complaints == []


async def test_what_came_while_the_page_was_not_connected_is_in_its_sums(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    sender = Sender(host)
    await sender.usage("cut.web.i-1", launch(1))
    async with (
        proxied(bus.server.web_port) as proxy,
        alone.page("#/instance/h3/cut/web/i-1") as page,
    ):
        await enter(page, bus, f"ws://127.0.0.1:{proxy.port}")
        await expect(said(page)).to_have_text(WHOLE)

        await proxy.close()
        await expect(page.get_by_role("status")).to_contain_text("Connection lost")
        await sender.usage("cut.web.i-1", launch(2))
        await sender.fill("host.noise", 301)  # more than the page reads of the stream again
        await proxy.start()
        await expect(page.get_by_role("status")).to_have_text("Live")
        await sender.usage("cut.web.i-1", launch(3))
        await expect(fact(page, "Launches that ended")).to_have_text("3")
        await expect(said(page)).to_have_text(WHOLE)
    alone.complaints.clear()  # the browser's own lines about the refused connection


async def test_usage_outlasts_the_fleets_events_also_in_a_hidden_page(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    sender = Sender(host)
    await sender.usage("hidden.web.i-1", launch(1))
    async with alone.page("#/tenant/hidden") as page:
        await enter(page, bus)
        await expect(said(page)).to_have_text(WHOLE)

        await page.evaluate(
            """() => {
              globalThis.hide = (isHidden) => {
                Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
                document.dispatchEvent(new Event("visibilitychange"));
              };
              hide(true);
            }"""
        )
        await sender.usage("hidden.web.i-1", launch(2))
        await sender.fill("host.noise", 2_001)  # more than the fleet's list has
        await page.evaluate("hide(false)")
        await sender.usage("hidden.web.i-1", launch(3))
        await expect(fact(page, "Launches that ended")).to_have_text("3")
        await expect(said(page)).to_have_text(WHOLE)
    assert alone.complaints == []


async def test_a_page_that_stays_open_keeps_no_more_than_its_newest_events(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    """Of a host as many as the fleet's list has; of usage 10,000."""
    async with connection_to(bus.url("host-h2"), inbox="_INBOX_HOSTD.h2") as other:
        sender = Sender(other, "h2")
        sender.seq = 10_000  # later than the other tests' events
        async with alone.page("#/host/h2") as page:
            await enter(page, bus)
            await expect(page.get_by_text("That is all that is kept")).to_be_visible()
            await sender.fill("host.noise", 2_300)
            await sender.publish("host.last", {"reason": "the last"})
            history = page.get_by_role("table", name="History")
            await expect(history).to_contain_text("the last")
            await expect(history).to_have_attribute("aria-rowcount", "2001")
            await expect(page.get_by_text("has forgotten older events")).to_be_visible()
            await expect(page.get_by_text("That is all that is kept")).to_have_count(0)

            await page.evaluate("location.hash = '#/instance/h2/long/web/i-1'")
            await expect(said(page)).to_contain_text("is in the stream")
            await sender.usage("long.web.i-1", *(launch(number) for number in range(1, 10_101)))
            await expect(said(page)).to_have_text(re.compile(f"^Partial: .*{re.escape(REST)}$"))
            await expect(fact(page, "Launches that ended")).to_have_text("10,000")
    assert alone.complaints == []


async def test_a_tenants_page_at_rest_formats_no_number(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    sender = Sender(host)
    for number in range(5):
        await sender.usage(f"calm.web.i-{number}", launch(1))
    async with alone.page("#/tenant/calm") as page:
        await enter(page, bus)
        await expect(said(page)).to_have_text(WHOLE)
        await page.evaluate(
            """() => {
              globalThis.formatted = 0;
              const count = (prototype, name, key) => {
                const own = Object.getOwnPropertyDescriptor(prototype, name);
                const inner = own[key];
                own[key] = function (...given) { formatted += 1; return inner.apply(this, given); };
                Object.defineProperty(prototype, name, own);
              };
              count(Number.prototype, "toLocaleString", "value");
              count(Intl.NumberFormat.prototype, "format", "get");
            }"""
        )
        await page.wait_for_timeout(1_000)  # four draws
        at_rest = await page.evaluate("formatted")
        await sender.usage("calm.web.i-0", launch(2))
        await expect(fact(page, "Launches that ended")).to_have_text("6")

        assert at_rest == 0
        assert await page.evaluate("formatted") > 0
    assert alone.complaints == []
