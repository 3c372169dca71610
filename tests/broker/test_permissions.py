"""What each role of deploy/nats/hostd.conf may do, and what it may not, on a real server."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from schemas.settings import NatsSettings
from schemas.subjects import Subjects
from tests.broker.server import QUICK, Receiver, Server, eventually
from tests.broker.test_queries import Answers
from tests.plain import unpacked
from worker.bus.connection import Connection
from worker.bus.message import Message
from worker.bus.nats import NatsBus
from worker.bus.protocol import BusError
from worker.bus.provision import provision
from worker.demo.nats_server import find_program
from worker.queries.service import query_service

EXAMPLE = Path(__file__).parents[2] / "deploy" / "nats" / "hostd.conf"
H1 = Subjects("hostd.v1.default", "h1", "default")
INBOXES = {"admin": "_INBOX.admin", "agentd": "_INBOX.agentd", "dashboard": "_INBOX.dashboard"}


class Roles:
    """A server with the example's accounts, and a connection for each role."""

    def __init__(self, server: Server, stack: AsyncExitStack) -> None:
        self.server, self.stack = server, stack

    async def connection(self, user: str, password: str, inbox: str) -> Connection:
        url = self.server.url.replace("//", f"//{user}:{password}@")
        connection = Connection(NatsSettings(url=url), name=user, inbox=inbox, tuning=QUICK)
        await connection.start()
        self.stack.push_async_callback(connection.close)
        await asyncio.wait_for(connection.wait_connected(), 10)
        return connection

    async def role(self, user: str) -> Connection:
        return await self.connection(user, user, INBOXES[user])

    async def host(self) -> NatsBus:
        url = self.server.url.replace("//", "//host-h1:h1@")
        bus = NatsBus(NatsSettings(url=url), H1, tuning=QUICK)
        await bus.start()
        self.stack.push_async_callback(bus.close)
        await asyncio.wait_for(bus.connection.wait_connected(), 10)
        return bus


@pytest_asyncio.fixture
async def roles(tmp_path: Path) -> AsyncIterator[Roles]:
    accounts = re.sub(r"(?s)\A.*?(?=^accounts)", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    async with AsyncExitStack() as stack:
        server = Server(str(tmp_path / "nats"), config=accounts)
        await server.start()
        stack.push_async_callback(server.stop)
        roles = Roles(server, stack)
        await provision(await roles.role("admin"), H1, ["h1", "h2"])
        yield roles


async def denied(connection: Connection, subject: str, *, reply: str = "") -> bool:
    """Whether the server denies a publication."""
    before = connection.permission_errors
    await connection.send(subject, b"x", reply=reply)
    return await eventually(lambda: connection.permission_errors > before, 1)


async def deaf(connection: Connection, subject: str) -> bool:
    """Whether the server denies a subscription."""

    async def ignore(_: Message) -> None: ...

    before = connection.permission_errors
    await connection.subscribe(subject, ignore)
    return await eventually(lambda: connection.permission_errors > before, 1)


def test_nats_server_accepts_the_example_configuration(tmp_path: Path) -> None:
    done = subprocess.run(
        [find_program(), "-t", "-c", str(EXAMPLE)], capture_output=True, check=False, timeout=20
    )

    assert done.returncode == 0, done.stderr


async def test_a_host_can_do_its_whole_job(roles: Roles) -> None:
    bus, agentd = await roles.host(), await roles.role("agentd")
    receiver = Receiver()
    consumer = asyncio.create_task(bus.consume(receiver))
    service = query_service(bus.connection, H1, Answers(), version="1.2.3")
    await service.start()
    got: list[Message] = []

    async def note(message: Message) -> None:
        got.append(message)

    try:
        await bus.verify()
        await agentd.subscribe("_INBOX.agentd.c1", note)
        await agentd.request(f"{H1.root}.h1.cmd.host", b"x", headers={"Nats-Msg-Id": "c1"})
        assert await receiver.wait_for(b"x", 5)

        await bus.publish(f"{H1.root}.h1.reply.host", b"r", msg_id="c1")
        await bus.publish(f"{H1.root}.h1.evt.host.status", b"e", msg_id="h1:j:1")
        await bus.publish(f"{H1.root}.h1.dead.host", b"d", msg_id="c2")
        await bus.send("_INBOX.agentd.c1", b"r")
        assert await eventually(lambda: len(got) == 1, 5)
        revision = await bus.write_state("h1.host", b"v1", revision=0)
        assert await bus.read_state("h1.host") == (b"v1", revision)
        await bus.delete_state("h1.host", revision=revision)

        answer = await agentd.request(H1.ask("ping"), b"")
        assert unpacked(answer.data)["host_id"] == "h1"
        found = await agentd.request("$SRV.PING.hostd", b"")
        assert json.loads(found.data)["metadata"]["host_id"] == "h1"
        info = await (await roles.role("admin")).request(
            "$JS.API.CONSUMER.INFO.HOSTD_CMD_default.h1", b""
        )
        assert json.loads(info.data)["num_ack_pending"] == 0
        assert bus.permission_errors == 0
    finally:
        await service.close()
        consumer.cancel()
        await asyncio.gather(consumer, return_exceptions=True)


@pytest.mark.parametrize(
    "subject",
    [
        "hostd.v1.default.h2.evt.host.status",
        "hostd.v1.default.h2.reply.host",
        "hostd.v1.default.h1.cmd.host",
        "$KV.HOSTD_STATE_default.h2.host",
        "$JS.API.CONSUMER.MSG.NEXT.HOSTD_CMD_default.h2",
        "$JS.API.CONSUMER.INFO.HOSTD_CMD_default.h2",
        "$JS.API.CONSUMER.DURABLE.CREATE.HOSTD_CMD_default.h1",
        "$JS.API.CONSUMER.CREATE.HOSTD_CMD_default",
        "$JS.API.STREAM.DELETE.HOSTD_CMD_default",
        "$JS.API.STREAM.PURGE.HOSTD_CMD_default",
        "$JS.ACK.HOSTD_CMD_default.h2.1.1.1.1.0",
        "$JS.ACK._.hash.HOSTD_CMD_default.h2.1.1.1.1.0",
        "_INBOX_HOSTD.h2.forged",
        "hostd.v1.default.h2.ask.ping",
    ],
)
async def test_a_host_may_not(roles: Roles, subject: str) -> None:
    bus = await roles.host()

    assert await denied(bus.connection, subject, reply=bus.connection.new_inbox())


@pytest.mark.parametrize(
    "subject",
    [
        "hostd.v1.default.*.cmd.>",
        "_INBOX.>",
        "_INBOX_HOSTD.h2.>",
        "hostd.v1.default.h2.ask.>",
        "$KV.HOSTD_STATE_default.>",
        ">",
    ],
)
async def test_a_host_may_not_subscribe_to(roles: Roles, subject: str) -> None:
    bus = await roles.host()

    assert await deaf(bus.connection, subject)


@pytest.mark.parametrize(
    ("user", "subject"),
    [
        ("agentd", "$KV.HOSTD_STATE_default.h1.host"),
        ("agentd", "hostd.v1.default.h1.reply.host"),
        ("agentd", "hostd.v1.default.h1.evt.host.status"),
        ("agentd", "$JS.API.CONSUMER.MSG.NEXT.HOSTD_CMD_default.h1"),
        ("agentd", "$JS.API.STREAM.DELETE.HOSTD_CMD_default"),
        ("agentd", "_INBOX_HOSTD.h1.forged"),
        ("dashboard", "hostd.v1.default.h1.cmd.host"),
        ("dashboard", "$KV.HOSTD_STATE_default.h1.host"),
        ("dashboard", "$JS.API.CONSUMER.CREATE.HOSTD_CMD_default"),
        ("dashboard", "_INBOX_HOSTD.h1.forged"),
    ],
)
async def test_others_may_not(roles: Roles, user: str, subject: str) -> None:
    connection = await roles.role(user)

    assert await denied(connection, subject)


async def test_agentd_reads_kept_replies_and_state(roles: Roles) -> None:
    bus, agentd = await roles.host(), await roles.role("agentd")
    await bus.publish(f"{H1.root}.h1.reply.host", b"kept", msg_id="c1")
    await bus.write_state("h1.host", b"v1", revision=0)

    reply = await agentd.request(
        f"$JS.API.DIRECT.GET.HOSTD_REPLY_default.{H1.root}.h1.reply.host", b""
    )
    state = await agentd.request(
        "$JS.API.DIRECT.GET.KV_HOSTD_STATE_default.$KV.HOSTD_STATE_default.h1.host", b""
    )

    assert (reply.data, state.data) == (b"kept", b"v1")
    assert await deaf(agentd, "_INBOX.>")
    with pytest.raises(BusError):
        await agentd.request("$JS.API.STREAM.INFO.HOSTD_CMD_default", b"", timeout_s=0.3)


async def test_a_dashboard_replays_events_and_watches_state(roles: Roles) -> None:
    bus, dashboard = await roles.host(), await roles.role("dashboard")
    await bus.publish(f"{H1.root}.h1.evt.host.status", b"e1", msg_id="h1:j:1")
    await bus.write_state("h1.host", b"v1", revision=0)
    client = dashboard.client
    assert client is not None
    js = client.jetstream(timeout=2)

    events = await js.subscribe(
        "hostd.v1.default.*.evt.>", stream="HOSTD_EVT_default", ordered_consumer=True
    )
    event = await events.next_msg(5)
    bucket = await js.key_value("HOSTD_STATE_default")
    entry = await bucket.get("h1.host")
    watch: Any = await bucket.watchall()
    seen = await watch.updates(timeout=5)

    assert (event.data, entry.value, seen.value) == (b"e1", b"v1", b"v1")
    await watch.stop()
    await events.unsubscribe()
