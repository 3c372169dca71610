"""What a page of one host, one command or one instance shows while it stays open."""

import datetime as dt
import json
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import pytest
from playwright.async_api import Page, expect

from tests.broker.proxy import proxied
from tests.broker.server import connection_to
from tests.page.browser import Browser, sign_in
from tests.page.fleet import DOMAIN, SUBJECTS, Cell
from tests.page.sender import Sender
from worker.bus.connection import Connection
from worker.bus.message import Message

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVENTS_READ = 300  # of the stream, at each connect
EVENTS_MAX = 2_000
SHOWN = "; shown is the state of "
Answer = Callable[[int], Mapping[str, object] | None]


async def enter(page: Page, bus: Cell, url: str = "") -> None:
    await sign_in(page, url or bus.server.web_url, "dashboard", "dashboard", DOMAIN)


class Worker:
    """Answers questions as the worker of h3: `answer` is given how many came before; None: not."""

    def __init__(self, host: Connection, answer: Answer) -> None:
        self._host, self._answer, self.questions = host, answer, 0

    async def listen(self, verb: str) -> None:
        await self._host.subscribe(f"{SUBJECTS.root}.h3.ask.{verb}", self._take)
        await self._host.settle()

    def _take(self, message: Message) -> None:
        self.questions += 1
        answer = self._answer(self.questions - 1)
        if answer is not None:
            self._host.send_now([(message.reply, msgpack.packb(dict(answer)))])


async def test_a_command_is_asked_for_until_it_is_done(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    """A question without an answer is one of those that are asked again."""
    reply: dict[str, Any] = {"code": "ok", "attempts": 1, "detail": {}, "steps": []}
    answers = [{"state": "running"}, None, {"state": "done", "reply": reply}]
    worker = Worker(host, lambda number: answers[number])
    await worker.listen("result")
    async with alone.page("#/command/h3/c-1") as page:
        await enter(page, bus)

        await expect(page.locator("dl")).to_contain_text("running")
        await expect(page.get_by_text("No answer")).to_be_visible()
        await expect(page.locator("dl")).to_contain_text("done")
        await expect(page.locator("dl")).to_contain_text("ok")
        await page.wait_for_timeout(6_000)  # longer than between two questions
        assert worker.questions == 3
    assert alone.complaints == []


async def test_what_the_worker_says_of_an_instance_follows_it_until_the_page_is_left(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    worker = Worker(host, lambda number: {"pid": 1_000 + number, "vcpus": 2})
    await worker.listen("describe")
    async with alone.page("#/instance/h3/t/p/i") as page:
        await enter(page, bus)

        for pid in (1_000, 1_001):
            await expect(page.locator("dl").last).to_contain_text(f"{pid}")
        await page.evaluate("location.hash = '#/hosts'")
        await expect(page.get_by_role("heading", name="Hosts")).to_be_visible()
        left = worker.questions
        await page.wait_for_timeout(6_000)
        assert worker.questions == left
    assert alone.complaints == []


async def test_a_hosts_open_history_keeps_its_events_however_many_other_hosts_send(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    async with (
        connection_to(bus.url("host-h1"), inbox="_INBOX_HOSTD.h1") as other,
        alone.page("#/host/h1") as page,
    ):
        await enter(page, bus)
        await expect(page.get_by_text("That is all that is kept")).to_be_visible()
        calm = Sender(other, "h1")
        await calm.publish("host.calm", {"reason": "the first"})
        await Sender(host).fill("host.noise", EVENTS_MAX + 1)
        await calm.publish("host.calm", {"reason": "the second"})

        history = page.get_by_role("table", name="History")
        await expect(history).to_contain_text("the second")
        await expect(history).to_contain_text("the first")
    assert alone.complaints == []


@pytest.mark.parametrize("missed", [EVENTS_READ - 10, EVENTS_READ + 10])
async def test_after_a_reconnect_no_list_has_a_gap(
    alone: Browser, bus: Cell, host: Connection, missed: int
) -> None:
    """A history reads what was missed; the list of events begins after it, if it is too much."""
    sender = Sender(host)
    sender.seq = 1_000 * missed  # later than the events of the other tests, and others
    calm = f"instance.calm.web.missed-{missed}"
    async with (
        proxied(bus.server.web_port) as proxy,
        alone.page(f"#/instance/h3/calm/web/missed-{missed}") as page,
    ):
        await enter(page, bus, f"ws://127.0.0.1:{proxy.port}")
        await expect(page.get_by_text("Reading")).to_have_count(0)
        await sender.publish(f"{calm}.calm", {"reason": "before"})
        history = page.get_by_role("table", name="History")
        await expect(history).to_contain_text("before")

        await proxy.close()
        await expect(page.get_by_role("status")).to_contain_text("Connection lost")
        await sender.publish(f"{calm}.calm", {"reason": "missed"})
        await sender.fill("host.noise", missed)
        await proxy.start()
        await expect(page.get_by_role("status")).to_have_text("Live")
        await sender.publish(f"{calm}.calm", {"reason": "after"})
        for reason in ("before", "missed", "after"):
            await expect(history).to_contain_text(reason)

        await page.evaluate("location.hash = '#/events'")
        await page.get_by_label("Search").fill(f"missed-{missed}")
        events = page.get_by_role("table", name="Events").locator("tbody tr:visible:not(.space)")
        has_all = missed < EVENTS_READ - 1
        await expect(events).to_have_count(3 if has_all else 1)
    alone.complaints.clear()  # the browser's own lines about the refused connection


async def let_events_be_read(bus: Cell, *, allowed: bool) -> None:
    api, name = "$JS.API.STREAM", SUBJECTS.events_stream
    async with connection_to(bus.url("admin")) as admin:
        info = json.loads((await admin.request(f"{api}.INFO.{name}", b"")).data)
        config = info["config"] | {"allow_direct": allowed}
        answer = await admin.request(f"{api}.UPDATE.{name}", json.dumps(config).encode())
        assert "error" not in json.loads(answer.data)


async def test_what_comes_between_two_interruptions_closes_no_gap(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    """The events cannot be read after the first one: only those that come meanwhile are known."""
    sender = Sender(host)
    sender.seq = 390_000  # between the events of the tests before and behind
    lane = "instance.calm.web.twice"
    async with (
        proxied(bus.server.web_port) as proxy,
        alone.page("#/instance/h3/calm/web/twice") as page,
    ):
        await enter(page, bus, f"ws://127.0.0.1:{proxy.port}")
        await expect(page.get_by_text("Reading")).to_have_count(0)
        await sender.publish(f"{lane}.calm", {"reason": "before"})
        history, status = page.get_by_role("table", name="History"), page.get_by_role("status")
        await expect(history).to_contain_text("before")

        await let_events_be_read(bus, allowed=False)
        try:
            await proxy.close()
            await expect(status).to_contain_text("Connection lost")
            await sender.publish(f"{lane}.calm", {"reason": "missed"})
            await proxy.start()
            await expect(status).not_to_contain_text("Connection lost")
            await sender.fill("host.noise", EVENTS_READ)
            await sender.publish(f"{lane}.calm", {"reason": "between"})
            await expect(history).to_contain_text("between")
            await page.wait_for_timeout(5_000)  # longer than between two readings: an interruption
            await expect(status).not_to_have_text("Live")
        finally:
            await let_events_be_read(bus, allowed=True)
        await expect(status).to_have_text("Live", timeout=20_000)
        for reason in ("before", "missed", "between"):
            await expect(history).to_contain_text(reason)

        await page.evaluate("location.hash = '#/events'")
        await page.get_by_label("Search").fill("twice")
        events = page.get_by_role("table", name="Events").locator("tbody tr:visible:not(.space)")
        await expect(events).to_have_count(1)
        await expect(events).to_contain_text("between")
    alone.complaints.clear()  # the browser's own lines about the refused connection


async def test_the_time_of_what_is_shown_is_that_of_the_last_message(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    async with (
        proxied(bus.server.web_port) as proxy,
        alone.page("#/events", timezone_id="UTC") as page,
    ):
        await enter(page, bus, f"ws://127.0.0.1:{proxy.port}")
        await page.wait_for_timeout(1_500)
        sender = Sender(host)
        sender.seq = 400_000
        heard = dt.datetime.now(dt.UTC).replace(microsecond=0)
        await sender.publish("host.calm", {"reason": "the last one"})
        await expect(page.get_by_role("table", name="Events")).to_contain_text("the last one")
        shown = dt.datetime.now(dt.UTC)
        await page.wait_for_timeout(3_000)  # the page is drawn, and hears nothing

        await proxy.close()
        status = page.get_by_role("status")
        await expect(status).to_contain_text(SHOWN)
        _, _, time = (await status.inner_text()).partition(SHOWN)
        assert heard <= dt.datetime.fromisoformat(f"{time}+00:00") <= shown
    alone.complaints.clear()  # the browser's own lines about the refused connection
