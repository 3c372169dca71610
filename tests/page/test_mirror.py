"""The fleet page on a mirror, a leaf node with the configuration of deploy/nats/mirror.conf."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgpack
import pytest
import pytest_asyncio
from playwright.async_api import expect

from tests.broker.server import OLD_SERVER, ExampleServer, Server, connection_to
from tests.console import steps
from tests.guests.namespace import own_network
from tests.page.browser import Browser, browser, served, sign_in
from tests.page.fleet import CELL, DOMAIN, HOSTS, SUBJECTS, passwords
from worker.bus import accounts, streams
from worker.bus.compact import compact
from worker.bus.connection import Connection
from worker.bus.message import NoResponder
from worker.bus.provision import provision, provision_mirrors

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
EXAMPLE, PAGES = ROOT / "deploy" / "nats" / "mirror.conf", ROOT / "docs"
LEAF_PORT, MIRROR_PORT, WEB_PORT = (
    7422,
    4223,
    9223,
)  # the example's, in a network namespace of the test's
BUCKET = f"$KV.{SUBJECTS.state_bucket}"


class MirrorServer(ExampleServer):
    example = EXAMPLE


@dataclass
class Mirrored:
    cell: Server
    mirror: Server

    def url(self, user: str) -> str:
        return self.cell.url.replace("//", f"//{user}:{user}@")

    @property
    def mirror_url(self) -> str:
        return self.mirror.url.replace("//", "//mirror:mirror@")


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["", str(OLD_SERVER)], ids=["newest", "oldest"]
)
async def mirrored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mirrored]:
    config = (
        f'leafnodes {{ listen: "127.0.0.1:{LEAF_PORT}" }}\n'
        + passwords(mirror=True)
        + accounts.server_config(SUBJECTS, HOSTS, DOMAIN, mirror=True)
    )
    directory = tmp_path_factory.mktemp("nats")
    async with AsyncExitStack() as stack:
        stack.enter_context(own_network())
        cell = Server(str(directory / "cell"), config=config, program=request.param)
        mirror = MirrorServer(str(directory / "mirror"), port=MIRROR_PORT)
        for server in (cell, mirror):
            await server.start()
            stack.push_async_callback(server.stop)
        made = Mirrored(cell, mirror)
        async with connection_to(made.url("admin")) as admin:
            await provision(admin, SUBJECTS, HOSTS)
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(mirrored: Mirrored) -> AsyncIterator[Browser]:
    async with AsyncExitStack() as stack:
        url = stack.enter_context(served(Path("build/dashboard")))
        yield await stack.enter_async_context(browser(url))


async def put(host: Connection, key: str) -> None:
    value = {"v": 1, "status": "running", "journal_id": "j", "seq": 1, "at_ms": 1}
    await host.request(f"{BUCKET}.h3.instance.t.p.{key}", msgpack.packb(value))


async def make_mirrors(mirrored: Mirrored) -> None:
    async with connection_to(mirrored.mirror_url) as connection:
        await provision_mirrors(connection, SUBJECTS, DOMAIN)


async def test_mirrors_are_made_by_copying(mirrored: Mirrored) -> None:
    (step,) = steps(PAGES / "operations.md", "test_mirrors_are_made_by_copying")

    assert step.matches(await typed(step.block.text))
    again = await typed(step.block.text)

    assert [line.split()[0] for line in again.splitlines()] == ["found"] * 3


async def typed(text: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = await asyncio.create_subprocess_shell(
        text, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PATH": path}
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_the_page_follows_the_cell_through_a_mirror(
    alone: Browser, mirrored: Mirrored
) -> None:
    h3 = connection_to(mirrored.url("host-h3"), inbox="_INBOX_HOSTD.h3")
    async with h3 as host, alone.page("#/instances") as page:
        await put(host, "before")

        await make_mirrors(mirrored)
        await sign_in(page, f"ws://127.0.0.1:{WEB_PORT}", "dashboard", "dashboard", "mirror")
        status = page.get_by_role("status")
        await expect(page.get_by_role("row").filter(has_text="t/p/before")).to_have_count(1)
        await expect(status).to_have_text("Live")
        await put(host, "live")

        await expect(page.get_by_role("row").filter(has_text="t/p/live")).to_have_count(1)
        event = {"id": "e1", "journal_id": "j", "seq": 2, "at_ms": 2, "reason": "by the leaf node"}
        await host.request(f"{SUBJECTS.root}.h3.evt.host.status", msgpack.packb(event))
        await page.get_by_role("link", name="Events").click()
        events = page.get_by_role("table", name="Events")
        await expect(events).to_contain_text("by the leaf node")


async def test_the_page_says_that_a_mirror_hears_nothing_and_goes_on_by_itself(
    alone: Browser, mirrored: Mirrored
) -> None:
    await make_mirrors(mirrored)
    async with alone.page("#/instances") as page:
        await sign_in(page, f"ws://127.0.0.1:{WEB_PORT}", "dashboard", "dashboard", "mirror")
        status = page.get_by_role("status")
        await expect(status).to_have_text("Live")

        await asyncio.to_thread(mirrored.cell.pause)
        silent = "The mirror does not hear from the cell's servers; shown is the state of"
        await expect(status).to_contain_text(silent, timeout=30_000)
        mirrored.cell.go_on()
        async with connection_to(mirrored.url("host-h3"), inbox="_INBOX_HOSTD.h3") as host:
            await put(host, "after")

        await expect(status).to_have_text("Live", timeout=30_000)
        await expect(page.get_by_role("row").filter(has_text="t/p/after")).to_have_count(1)
    alone.complaints.clear()


@pytest.mark.parametrize(
    "endpoint",
    [
        f"CONSUMER.CREATE.HOSTD_CMD_{CELL}",
        f"CONSUMER.CREATE.HOSTD_REPLY_{CELL}",
        f"CONSUMER.DELETE.HOSTD_CMD_{CELL}.h3",
        f"STREAM.DELETE.HOSTD_EVT_{CELL}",
        f"STREAM.UPDATE.HOSTD_EVT_{CELL}",
        f"STREAM.PURGE.KV_HOSTD_STATE_{CELL}",
        f"STREAM.MSG.GET.HOSTD_CMD_{CELL}",
        f"DIRECT.GET.HOSTD_REPLY_{CELL}",
    ],
)
async def test_the_account_of_a_mirror_sees_no_command_and_changes_no_stream(
    mirrored: Mirrored, endpoint: str
) -> None:
    async with connection_to(mirrored.url("mirror")) as connection:
        await connection.request(f"$JS.{DOMAIN}.API.CONSUMER.CREATE.HOSTD_EVT_{CELL}", b"{}")
        with pytest.raises(NoResponder):
            await connection.request(f"$JS.{DOMAIN}.API.{endpoint}", b"{}")


async def test_a_mirror_is_compacted_like_the_cell(mirrored: Mirrored) -> None:
    """Markers in a mirror outlast those of the cell, whose removal it does not copy."""
    await make_mirrors(mirrored)
    later = datetime.now(UTC) + timedelta(hours=2)
    async with (
        connection_to(mirrored.url("host-h3"), inbox="_INBOX_HOSTD.h3") as host,
        connection_to(mirrored.url("admin")) as admin,
        connection_to(mirrored.mirror_url) as mirror,
    ):
        await put(host, "stays")
        marker = f"{BUCKET}.h3.instance.t.p.gone"
        await host.request(marker, b"", headers={"KV-Operation": "DEL"})
        async with asyncio.timeout(20):
            while (await compact(mirror, SUBJECTS, dry_run=True, now=later)).old == 0:
                await asyncio.sleep(0.05)

        of_cell = await compact(admin, SUBJECTS, now=later)
        of_mirror = await compact(mirror, SUBJECTS, now=later)
        left = await compact(mirror, SUBJECTS, now=later)

        assert (of_cell.old, of_mirror.old, left.old) == (1, 1, 0)
        await put(host, "after")  # the mirror goes on
        query = {"last_by_subj": f"{BUCKET}.h3.instance.t.p.after"}
        endpoint = f"$JS.API.DIRECT.GET.{streams.bucket_stream(SUBJECTS)}"
        async with asyncio.timeout(20):
            while True:
                found = await mirror.request(endpoint, json.dumps(query).encode())
                if "Status" not in found.headers:
                    break
                await asyncio.sleep(0.05)
