"""What the page shows is what is there: hostile text, reconnects, changes while it is read."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgpack
import pytest
import pytest_asyncio
from playwright.async_api import Page, expect

from tests.broker.proxy import proxied
from tests.broker.server import OLD_SERVER, connection_to
from tests.page.browser import Browser, sign_in
from tests.page.fleet import DOMAIN, SUBJECTS, Cell, cell
from worker.bus.connection import Connection

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROGRAMS = {"newest": "", "oldest": str(OLD_SERVER)}
HOSTILE = "<img/src=x/onerror=pwned=1>"
BUCKET = f"$KV.{SUBJECTS.state_bucket}"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=PROGRAMS)
async def bus(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cell]:
    """As elsewhere, with each of the servers."""
    directory = tmp_path_factory.mktemp("nats")
    async with cell(directory, program=PROGRAMS[request.param]) as made:
        yield made


async def put(host: Connection, key: str, seq: int, **more: object) -> None:
    """A value as a worker of h3 writes it."""
    value = {"v": 1, "status": "running", "journal_id": "j", "seq": seq, "at_ms": seq} | more
    await host.request(f"{BUCKET}.h3.{key}", msgpack.packb(value))


async def delete(host: Connection, key: str) -> None:
    await host.request(f"{BUCKET}.h3.{key}", b"", headers={"KV-Operation": "DEL"})


async def enter(page: Page, url: str) -> None:
    await sign_in(page, url, "dashboard", "dashboard", DOMAIN)


async def test_hostile_text_is_text(alone: Browser, bus: Cell, host: Connection) -> None:
    lane = f"instance.{HOSTILE}.pool.i"
    await put(host, lane, 3, status=HOSTILE, reason="<script>pwned=1</script>\u202egnp.exe\x1b[2J")
    event = {"id": "x", "journal_id": "j", "seq": 2, "at_ms": 2, "to": HOSTILE, "reason": HOSTILE}
    await host.request(f"{SUBJECTS.root}.h3.evt.{lane}.status", msgpack.packb(dict(event)))
    await host.request(f"{SUBJECTS.root}.h3.evt.{lane}.command", b"\xc1 no msgpack")
    async with alone.page("#/instances") as page:
        await enter(page, bus.server.web_url)

        row = page.get_by_role("row").filter(has_text="h3")
        await expect(row).to_contain_text(f"{HOSTILE}/pool/i")
        await expect(row).to_contain_text("<script>pwned=1</script>\ufffdgnp.exe\ufffd[2J")
        await row.get_by_role("link").first.click()
        await expect(page.get_by_role("heading", level=2)).to_have_text(
            f"Instance {HOSTILE}/pool/i"
        )
        await expect(page.get_by_role("table", name="History")).to_contain_text(HOSTILE)

        assert await page.evaluate("typeof pwned") == "undefined"
        assert await page.locator("#view img, #view script").count() == 0
    assert alone.complaints == []
    await delete(host, lane)


async def test_no_host_hides_or_outlasts_the_events_of_another(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    """By an ID that the other uses too, or by a time to come."""
    event = {"id": "same", "journal_id": "j", "seq": 2, "at_ms": 4_102_444_800_000}  # in 2100
    async with alone.page("#/events") as page:
        await enter(page, bus.server.web_url)
        events = page.get_by_role("table", name="Events")
        await publish(host, "h3", "status", event | {"to": "first", "reason": "from-h3"})
        await expect(events).to_contain_text("from-h3")
        async with connection_to(bus.url("host-h1"), inbox="_INBOX_HOSTD.h1") as other:
            await publish(other, "h1", "status", event | {"to": "second", "reason": "from-h1"})
        await expect(events).to_contain_text("from-h1")
        await expect(events).not_to_contain_text("2100-")
    assert alone.complaints == []


async def test_an_outcome_is_shown_once_though_its_event_was_pushed_out(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    outcome = {"id": "o", "seq": 1, "at_ms": 1, "command_id": "once", "detail": {"code": "ok"}}
    async with alone.page("#/commands") as page:
        await enter(page, bus.server.web_url)
        outcomes = page.get_by_role("table", name="Outcomes")
        row = outcomes.get_by_role("row").filter(has_text="once")
        await publish(host, "h3", "command", outcome)
        await expect(row).to_have_count(1)
        for at in range(20):
            numbers = range(at * 100, at * 100 + 100)
            fillers = [{"id": f"f{number}", "at_ms": 2} for number in numbers]
            await asyncio.gather(*(publish(host, "h3", "status", filler) for filler in fillers))
        await publish(host, "h3", "command", outcome)
        await publish(host, "h3", "command", outcome | {"id": "p", "command_id": "last"})
        await expect(outcomes.get_by_role("row").filter(has_text="last")).to_have_count(1)
        await expect(row).to_have_count(1)
    assert alone.complaints == []


@pytest.mark.parametrize("depth", [31, 100_000])
async def test_the_bytes_of_a_dead_letter_are_shown_however_deep_it_is_nested(
    alone: Browser, bus: Cell, host: Connection, depth: int
) -> None:
    body = b"\x81\xa1a" + b"\x91" * depth + b"\xc0"  # {"a": [[...[nil]...]]}
    kept = await host.request(f"{SUBJECTS.root}.h3.dead.host", body)
    seq = json.loads(kept.data)["seq"]
    async with alone.page(f"#/letter/{seq}") as page:
        await enter(page, bus.server.web_url)
        await expect(page.locator("pre").last).to_contain_text("81 a1 61 91 91")
        read = page.get_by_role("heading", name="As msgpack")
        await expect(read).to_have_count(1 if depth < 32 else 0)
    assert alone.complaints == []


async def test_a_dead_letter_that_is_dropped_leaves_the_list(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    seqs: list[int] = []
    for number in range(3):
        kept = await host.request(f"{SUBJECTS.root}.h3.dead.host", b"\xc1 no command %d" % number)
        seqs.append(json.loads(kept.data)["seq"])
    async with alone.page("#/dead") as page:
        await enter(page, bus.server.web_url)
        letters = page.get_by_role("table", name="Dead letters")
        first, dropped, last = (
            letters.get_by_role("link", name=f"{seq}", exact=True) for seq in seqs
        )
        await expect(dropped).to_have_count(1)

        async with connection_to(bus.url("admin")) as admin:
            delete = f"$JS.API.STREAM.MSG.DELETE.{SUBJECTS.dead_stream}"
            await admin.request(delete, json.dumps({"seq": seqs[1]}).encode())
        await expect(dropped).to_have_count(0)
        await expect(first).to_have_count(1)
        await expect(last).to_have_count(1)
    assert alone.complaints == []


async def publish(host: Connection, host_id: str, kind: str, event: Mapping[str, object]) -> None:
    subject = f"{SUBJECTS.root}.{host_id}.evt.host.{kind}"
    await host.request(subject, msgpack.packb(dict(event)))


async def test_the_page_itself_refuses_markup_and_foreign_scripts(alone: Browser) -> None:
    async with alone.page() as page:
        refused = await page.evaluate(
            "() => { try { document.body.innerHTML = '<b>x</b>'; } catch (e) { return e.name; } }"
        )
    assert refused == "TypeError"  # by `require-trusted-types-for` of the page's policy
    alone.complaints.clear()


async def test_a_hidden_page_requests_no_frame_and_a_slow_one_has_one_request(
    alone: Browser,
) -> None:
    """The frames never come, as in a tab that is not drawn; `hidden` is what the page is told."""
    async with alone.page() as page:
        await page.evaluate(
            """() => {
              globalThis.requested = 0;
              globalThis.requestAnimationFrame = () => ++requested;
              globalThis.hide = (isHidden) => {
                Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
                document.dispatchEvent(new Event("visibilitychange"));
                return requested;
              };
              hide(true);
              requested = 0;  // what was requested before counts for nothing
            }"""
        )
        await page.wait_for_timeout(1_000)
        hidden = await page.evaluate("requested")
        shown = await page.evaluate("hide(false)")
        await page.wait_for_timeout(1_000)
        slow = await page.evaluate("requested")

    assert (hidden, shown, slow) == (0, 1, 1)


async def test_what_changes_while_the_state_is_read_is_neither_lost_nor_undone(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    keys = [f"instance.t.p.i{number}" for number in range(600)]
    for key in keys:
        await put(host, key, 1, status="running")
    async with alone.page("#/instances") as page:
        entering = asyncio.create_task(enter(page, bus.server.web_url))
        seq = 2
        while not entering.done():  # each key in turn, so that some change at every moment
            key = keys[seq % len(keys)]
            if seq % 3:
                await put(host, key, seq, status="sleeping")
            else:
                await delete(host, key)
            seq += 1
        await entering
        expected = await bus.statuses("h3")

        count = page.locator(".filters p")
        await expect(count).to_have_text(str(sum(expected.values())))
        for status, number in expected.items():
            await expect(page.get_by_label("Status")).to_contain_text(f"{status} ({number})")
    for key in keys:
        await delete(host, key)
    assert alone.complaints == []


async def test_a_value_of_another_writer_is_read_back(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    """The bucket refuses a fenced worker's write, which subscribers see all the same."""
    await put(host, "instance.t.p.fenced", 7, status="running")
    async with alone.page("#/instances") as page:
        await enter(page, bus.server.web_url)
        row = page.get_by_role("row").filter(has_text="t/p/fenced")
        await expect(row).to_contain_text("running")

        value = {"v": 1, "status": "stopped", "journal_id": "other", "seq": 9, "at_ms": 9}
        refused = await host.request(
            f"{BUCKET}.h3.instance.t.p.fenced",
            msgpack.packb(value),
            headers={"Nats-Expected-Last-Subject-Sequence": "1"},
        )
        await put(host, "instance.t.p.after", 10)
        await expect(page.get_by_role("row").filter(has_text="t/p/after")).to_have_count(1)
        await expect(row).to_contain_text("running")

    assert b"wrong last sequence" in refused.data
    await delete(host, "instance.t.p.fenced")
    await delete(host, "instance.t.p.after")


async def test_it_says_when_it_is_stale_and_reads_again_after_a_reconnect(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    await put(host, "instance.t.p.gone", 1)
    await put(host, "instance.t.p.stays", 1)
    async with proxied(bus.server.web_port) as proxy, alone.page("#/instances") as page:
        await enter(page, f"ws://127.0.0.1:{proxy.port}")
        gone = page.get_by_role("row").filter(has_text="t/p/gone")
        await expect(gone).to_have_count(1)

        await proxy.close()
        status = page.get_by_role("status")
        await expect(status).to_contain_text("Connection lost, reconnecting; shown is the state of")
        await delete(host, "instance.t.p.gone")
        await put(host, "instance.t.p.new", 1)
        await expect(gone).to_have_count(1)
        await proxy.start()

        await expect(status).to_have_text("Live")
        await expect(gone).to_have_count(0)
        await expect(page.get_by_role("row").filter(has_text="t/p/new")).to_have_count(1)
        await expect(page.get_by_role("row").filter(has_text="t/p/stays")).to_have_count(1)
    for name in ("stays", "new"):
        await delete(host, f"instance.t.p.{name}")
    alone.complaints.clear()  # the browser's own lines about the refused connection


async def test_it_is_not_live_while_the_server_denies_a_subscription(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    granted = Path(bus.server.config_file).read_text(encoding="utf-8")
    deny = r'\1, permissions: { subscribe: { deny: "$KV.>" } }'
    denied, count = re.subn(r'(user: "dashboard", password: [^ ]+)', deny, granted)
    async with alone.page("#/instances") as page:
        await enter(page, bus.server.web_url)
        status = page.get_by_role("status")

        reconfigure(bus, denied)
        await expect(status).to_contain_text(f"{BUCKET}.>: Permissions Violation")
        await expect(status).to_contain_text("shown is the state of")
        await put(host, "instance.t.p.denied", 1)
        shown = {await status.inner_text()}
        for _ in range(30):  # it tries again meanwhile
            await page.wait_for_timeout(100)
            shown.add(await status.inner_text())

        reconfigure(bus, granted)
        await expect(status).to_have_text("Live")
        await expect(page.get_by_role("row").filter(has_text="t/p/denied")).to_have_count(1)
        await put(host, "instance.t.p.granted", 1)
        await expect(page.get_by_role("row").filter(has_text="t/p/granted")).to_have_count(1)

    assert count == 1
    assert "Live" not in shown
    for name in ("denied", "granted"):
        await delete(host, f"instance.t.p.{name}")
    alone.complaints.clear()


def reconfigure(bus: Cell, config: str) -> None:
    Path(bus.server.config_file).write_text(config, encoding="utf-8")
    bus.server.reload()


async def test_a_host_whose_lease_is_not_renewed_is_stale(
    alone: Browser, bus: Cell, host: Connection
) -> None:
    lease = {"status": "ready", "worker_id": "w", "at_ms": 1_000, "lease_until_ms": 1_500}
    async with alone.page() as page:
        await enter(page, bus.server.web_url)
        await put(host, "host", 1, **lease)

        row = page.get_by_role("table", name="Hosts").get_by_role("row").filter(has_text="h3")
        await expect(row).to_contain_text("stale")
    await delete(host, "host")


async def test_a_wrong_credential_or_cell_is_said(alone: Browser, bus: Cell) -> None:
    async with alone.page() as page:
        await page.get_by_label("WebSocket URL of NATS").fill(bus.server.web_url)
        await page.get_by_label("User").fill("dashboard")
        await page.get_by_label("Password").fill("wrong")
        await page.get_by_role("button", name="Connect", exact=True).click()
        await expect(page.get_by_role("alert")).to_contain_text("uthoriz")

        await page.get_by_label("Password").fill("dashboard")
        await page.get_by_text("More", exact=True).click()
        await page.get_by_label(re.compile("JetStream domain")).fill(DOMAIN)
        await page.get_by_label("Cell", exact=True).fill("elsewhere")
        await page.get_by_role("button", name="Connect", exact=True).click()
        await expect(page.get_by_role("alert")).to_contain_text("STREAM.INFO.KV_HOSTD_STATE")
        assert await page.evaluate("localStorage.length") == 0
    alone.complaints.clear()
