"""What each account of deploy/nats/hostd.conf may do, and what it may not, on real servers.

A privileged subject is tried twice: as the subject of a publication, and as the reply subject of
every request that the account may send. The server answers with rights of its own, so only the
second shows whether an account is closed.
"""

import asyncio
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import pytest_asyncio
from click.testing import CliRunner

from schemas.settings import NatsSettings
from schemas.subjects import Subjects
from tests.broker.server import OLD_SERVER, QUICK, Receiver, Server, connection_to, eventually
from tests.broker.test_queries import Answers
from tests.plain import unpacked
from worker.bus import accounts, streams
from worker.bus.connection import Connection
from worker.bus.message import Message, NoResponder
from worker.bus.nats import NatsBus
from worker.bus.protocol import BusError
from worker.bus.provision import provision
from worker.cli.main import main
from worker.demo.nats_server import find_program
from worker.queries.service import query_service

EXAMPLE = Path(__file__).parents[3] / "deploy" / "nats" / "hostd.conf"
H1 = Subjects("hostd.v1.default", "h1", "default")
H2 = replace(H1, host_id="h2")
HOSTS = ("h1", "h2")
DOMAIN = "hostd"
API = "$JS.hostd.API."
GRANTS = accounts.grants(H1, HOSTS, DOMAIN)
STREAMS = tuple(str(config["name"]) for config in streams.stream_configs(H1))
INBOXES = {"host-h1": "_INBOX_HOSTD.h1", "host-h2": "_INBOX_HOSTD.h2"}
ACCOUNTS = {user: account for account, user in accounts.users(HOSTS).items()}
ROLES = ("host-h1", "agentd-h1", "dashboard")
NO_OLD_SERVER = pytest.mark.skipif(
    not OLD_SERVER.exists() and not os.environ.get("CI"), reason=f"no {OLD_SERVER}"
)
PROGRAMS = ["", pytest.param(str(OLD_SERVER), marks=NO_OLD_SERVER)]


def password(user: str) -> str:
    """The example's: the host's ID, or the name of the user."""
    return user.removeprefix("host-").removeprefix("agentd-")


class Roles:
    """A server with the example's accounts, and a connection for each role."""

    def __init__(self, server: Server, stack: AsyncExitStack) -> None:
        self.server, self.stack = server, stack

    async def role(self, user: str, *, url: str = "") -> Connection:
        inbox = INBOXES.get(user, f"_INBOX.{user}")
        url = url or self.url(user)
        opened = connection_to(url, inbox=inbox)
        return await self.stack.enter_async_context(opened)

    def url(self, user: str) -> str:
        return self.server.url.replace("//", f"//{user}:{password(user)}@")

    async def host(self, subjects: Subjects = H1) -> NatsBus:
        settings = NatsSettings(url=self.url(f"host-{subjects.host_id}"), js_domain=DOMAIN)
        bus = NatsBus(settings, subjects, tuning=QUICK)
        await bus.start()
        self.stack.push_async_callback(bus.close)
        await asyncio.wait_for(bus.connection.wait_connected(), 10)
        return bus


def example_accounts() -> str:
    return re.sub(r"(?s)\A.*?(?=^PASSWORD_ADMIN)", "", EXAMPLE.read_text(), flags=re.MULTILINE)


@pytest_asyncio.fixture(params=PROGRAMS, ids=["newest", "oldest"])
async def roles(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Roles]:
    async with AsyncExitStack() as stack:
        server = Server(str(tmp_path / "nats"), config=example_accounts(), program=request.param)
        await server.start()
        stack.push_async_callback(server.stop)
        roles = Roles(server, stack)
        await provision(await roles.role("admin"), H1, HOSTS)
        yield roles


# -- the example file ------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [EXAMPLE, EXAMPLE.with_name("mirror.conf")])
@pytest.mark.parametrize("program", PROGRAMS)
def test_nats_server_accepts_the_example_configuration(program: str, example: Path) -> None:
    done = subprocess.run(
        [program or find_program(), "-t", "-c", str(example)],
        capture_output=True,
        check=False,
        timeout=20,
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_nats_server_accepts_the_example_for_browsers(tmp_path: Path, program: str) -> None:
    block = re.search(r"(?m)^# websocket \{\n(?:# .*\n)*?# \}\n", EXAMPLE.read_text())
    assert block is not None
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x"),
            *("-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")),
        ],
        check=True,
        capture_output=True,
        timeout=20,
    )
    path = tmp_path / "nats.conf"
    path.write_text(block[0].replace("# ", "").replace("/etc/nats", str(tmp_path)))

    done = subprocess.run(
        [program or find_program(), "-t", "-c", str(path)],
        capture_output=True,
        check=False,
        timeout=20,
    )

    assert done.returncode == 0, done.stderr


def test_the_example_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(
        main, ["provision", "--server-config", "--host", "h1", "--host", "h2"]
    )

    assert printed.exit_code == 0, printed.output
    assert example_accounts().endswith("\n\n" + printed.output)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_server_accepts_the_accounts_of_any_host_id(tmp_path: Path, program: str) -> None:
    hosts = ("A-b_1", "7", "-", "x" * 63)
    passwords = "".join(f"PASSWORD_{name}: x\n" for name in accounts.users(hosts))
    path = tmp_path / "nats.conf"
    path.write_text(
        passwords
        + accounts.server_config(H1, hosts, DOMAIN)
        + f'jetstream {{ store_dir: "{tmp_path}" }}\n'
    )

    done = subprocess.run(
        [program or find_program(), "-t", "-c", str(path)],
        capture_output=True,
        check=False,
        timeout=20,
    )

    assert done.returncode == 0, done.stderr


# -- what each role can do -------------------------------------------------------------------------


async def test_a_host_can_do_its_whole_job(roles: Roles) -> None:
    bus, agentd = await roles.host(), await roles.role("agentd-h1")
    dashboard = await roles.role("dashboard")
    receiver = Receiver()
    consumer = asyncio.create_task(bus.consume(receiver))
    service = query_service(bus.connection, H1, Answers(), version="1.2.3")
    await service.start()
    got: list[Message] = []

    def note(message: Message) -> None:
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

        for asker, discovery in (
            (agentd, "$SRV"),
            (dashboard, accounts.discovery_subject(H1).removesuffix(".>")),
        ):
            answer = await asker.request(H1.ask("ping"), b"")
            assert unpacked(answer.data)["host_id"] == "h1"
            found = await asker.request(f"{discovery}.PING.hostd", b"")
            assert json.loads(found.data)["metadata"]["host_id"] == "h1"
        admin = await roles.role("admin")
        info = await call(admin, "$JS.API.CONSUMER.INFO.HOSTD_CMD_default.h1")
        assert (info["num_ack_pending"], info["num_pending"]) == (0, 0)
        assert bus.permission_errors == 0
    finally:
        await service.close()
        consumer.cancel()
        await asyncio.gather(consumer, return_exceptions=True)


async def test_commands_arrive_across_accounts_after_restarts_and_crashes(roles: Roles) -> None:
    bus, agentd, receiver = await roles.host(), await roles.role("agentd-h1"), Receiver()
    consumer = asyncio.create_task(bus.consume(receiver))

    async def deliver(body: bytes) -> None:
        while True:
            try:
                await agentd.request(
                    f"{H1.root}.h1.cmd.host", body, headers={"Nats-Msg-Id": body.decode()}
                )
            except BusError:
                await asyncio.sleep(0.02)
            else:
                break
        assert await receiver.wait_for(body, 10)

    try:
        async with asyncio.timeout(60):
            for number in range(100):
                await deliver(f"c{number}".encode())
            await roles.server.restart()
            await deliver(b"restarted")
            await roles.server.crash()
            await deliver(b"crashed")
    finally:
        consumer.cancel()
        await asyncio.gather(consumer, return_exceptions=True)


async def test_agentd_reads_kept_replies_and_state(roles: Roles) -> None:
    bus, agentd = await roles.host(), await roles.role("agentd-h1")
    await bus.publish(f"{H1.root}.h1.reply.host", b"kept", msg_id="c1")
    await bus.write_state("h1.host", b"v1", revision=0)

    reply = await agentd.request(
        f"{API}DIRECT.GET.HOSTD_REPLY_default.{H1.root}.h1.reply.host", b""
    )
    state = await agentd.request(
        f"{API}DIRECT.GET.KV_HOSTD_STATE_default.$KV.HOSTD_STATE_default.h1.host", b""
    )

    assert (reply.data, state.data) == (b"kept", b"v1")


async def test_a_dashboard_reads_events_and_state_of_all_hosts_and_sees_new_ones(
    roles: Roles,
) -> None:
    dashboard = await roles.role("dashboard")
    got: list[bytes] = []

    def note(message: Message) -> None:
        got.append(message.data)

    await dashboard.subscribe("hostd.v1.default.*.evt.>", note)
    await dashboard.subscribe("$KV.HOSTD_STATE_default.>", note)
    await flush(dashboard)
    for subjects in (H1, H2):
        bus, host = await roles.host(subjects), subjects.host_id
        await bus.publish(f"{H1.root}.{host}.evt.host.status", host.encode(), msg_id=f"{host}:j:1")
        await bus.write_state(f"{host}.host", f"state {host}".encode(), revision=0)

    kept = await dashboard.request(f"{API}DIRECT.GET.HOSTD_EVT_default", b'{"seq":1}')
    state = await dashboard.request(
        f"{API}DIRECT.GET.KV_HOSTD_STATE_default.$KV.HOSTD_STATE_default.h2.host", b""
    )

    assert (kept.data, state.data) == (b"h1", b"state h2")
    assert await eventually(lambda: sorted(got) == [b"h1", b"h2", b"state h1", b"state h2"], 5)


async def test_the_command_line_replays_events_as_a_dashboard(
    roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for subjects in (H1, H2):
        bus, host = await roles.host(subjects), subjects.host_id
        for seq in (1, 2):
            event = {"host_id": host, "journal_id": "j", "seq": seq, "kind": "status", "at_ms": 1}
            subject = f"{H1.root}.{host}.evt.host.status"
            await bus.publish(subject, msgpack.packb(event), msg_id=f"{host}:j:{seq}")
    monkeypatch.setenv("HOSTD_NATS_JS_DOMAIN", DOMAIN)
    arguments = ["events", "--kept", "--no-follow", "--json", "--url", roles.url("dashboard")]

    for more, expected in (
        (["--host", "h2"], [("h2", 1), ("h2", 2)]),
        (["--all-hosts"], [("h1", 1), ("h1", 2), ("h2", 1), ("h2", 2)]),
    ):
        result = await asyncio.to_thread(CliRunner().invoke, main, [*arguments, *more])
        assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert [(line["host_id"], line["seq"]) for line in lines] == expected


# -- what no role can do ---------------------------------------------------------------------------


def privileged() -> dict[str, bytes]:
    """Subjects by which a cell can be changed, each with a payload that would do it."""
    found: dict[str, Any] = {}
    for api in ("$JS.API.", API):
        for name, config in zip(STREAMS, streams.stream_configs(H1), strict=True):
            republish = {"src": ">", "dest": "hostd.v1.default.h2.cmd.host"}
            found |= {
                f"{api}STREAM.UPDATE.{name}": {**config, "max_age": 0, "republish": republish},
                f"{api}STREAM.MSG.DELETE.{name}": {"seq": 1},
                f"{api}STREAM.PURGE.{name}": {},
                f"{api}STREAM.SNAPSHOT.{name}": {"deliver_subject": "hostd.v1.default.h2.cmd.host"},
                f"{api}CONSUMER.CREATE.{name}": {
                    "stream_name": name,
                    "config": {"deliver_subject": "hostd.v1.default.h2.cmd.host"},
                },
                f"{api}CONSUMER.DURABLE.CREATE.{name}.evil": {
                    "stream_name": name,
                    "config": {"durable_name": "evil", "ack_policy": "explicit"},
                },
            }
        found |= {
            f"{api}STREAM.CREATE.EVIL": {
                "name": "EVIL",
                "subjects": ["evil"],
                "sources": [{"name": STREAMS[0]}],
                "republish": {"src": "evil", "dest": "hostd.v1.default.h2.cmd.host"},
            },
            f"{api}CONSUMER.MSG.NEXT.HOSTD_CMD_default.h2": {"batch": 1},
            f"{api}CONSUMER.PAUSE.HOSTD_CMD_default.h2": {"pause_until": "2099-01-01T00:00:00Z"},
            f"{api}CONSUMER.DELETE.HOSTD_CMD_default.h2": {},
        }
    for host in HOSTS:
        ack = f"HOSTD_CMD_default.{host}"
        subjects = [f"{H1.root}.{host}.{kind}.host" for kind in ("cmd", "evt", "reply", "dead")]
        subjects += [
            f"$KV.HOSTD_STATE_default.{host}.host",
            f"_INBOX_HOSTD.{host}.forged",
            f"$JS.ACK.{ack}.1.1.1.1.0",
            f"$JS.ACK._.hash.{ack}.1.1.1.1.0",
            f"$JS.ACK.HOSTD_CMD_default.h2.{ack}.1.1.1",
            f"$JS.ACK.HOSTD_CMD_default.h2.{ack}.1.1.1.1.0",
            f"{H1.root}.{host}.ask.ping",
        ]
        found |= {subject: {"x": 1} for subject in subjects}
    found |= {f"_INBOX.{user}.forged": {"x": 1} for user in ("admin", "agentd-h2")}
    for name in STREAMS:  # last, so that what the others would change is still there
        for api in ("$JS.API.", API):
            found[f"{api}STREAM.DELETE.{name}"] = {}
    return {subject: json.dumps(payload).encode() for subject, payload in found.items()}


def carriers(account: str) -> dict[str, bytes]:
    """Requests that the account may send, with payloads that are answered."""
    found: dict[str, bytes] = {}
    for grant in GRANTS:
        if account in grant.to and grant.kind == "service":
            subject = grant.local or grant.subject
            found[subject.removesuffix("*").replace("*", "1")] = b""
    for subject in list(found):
        tail, payload = "host", b""
        match subject.split("."):
            case [*_, "evt", ">"]:
                tail = "host.status"
            case [*_, "HOSTD_EVT_default", ">"]:
                tail = f"{H1.root}.h1.evt.host.status"
            case [*_, "KV_HOSTD_STATE_default", ">"]:
                tail = "$KV.HOSTD_STATE_default.h1.host"
            case [*_, "ask", ">"]:
                tail = "ping"
            case [*_, "srv", ">"] | ["$SRV", ">"]:
                tail = "PING"
            case ["$JS", "ACK", *_]:
                tail, payload = "1", b"+ACK"
            case [*_, "DIRECT", "GET", _]:
                payload = b'{"seq":1}'
            case [*_, "NEXT", _, _]:
                payload = b'{"batch":1,"no_wait":true}'
            case _:
                pass
        del found[subject]
        found[re.sub(r"(>|\.)$", tail if subject.endswith(">") else f".{tail}", subject)] = payload
    return found


async def call(connection: Connection, subject: str, body: Mapping[str, Any] | None = None) -> Any:
    answer = await connection.request(subject, json.dumps(body).encode() if body else b"")
    return json.loads(answer.data)


async def flush(connection: Connection) -> None:
    assert connection.client is not None
    await connection.client.flush()


async def cell_state(admin: Connection, own: str) -> dict[str, Any]:
    """Everything that the server keeps of the cell, but messages of `own` subjects."""
    names: list[str] = (await call(admin, "$JS.API.STREAM.NAMES"))["streams"] or []
    found: dict[str, Any] = {"streams": sorted(names)}
    for name in names:
        info = await call(admin, f"$JS.API.STREAM.INFO.{name}", {"subjects_filter": ">"})
        counts = info["state"].get("subjects", {})
        found[name] = {
            "config": info["config"],
            "messages": {s: n for s, n in counts.items() if not re.match(own, s)},
        }
        consumers = await call(admin, f"$JS.API.CONSUMER.LIST.{name}", {})
        for consumer in consumers["consumers"]:
            place = found.setdefault(f"{name} {consumer['name']}", {})
            place["config"] = consumer["config"]
            if consumer["name"] == "h2":
                place["floor"] = consumer["ack_floor"]["stream_seq"]
                place["ack_pending"] = consumer["num_ack_pending"]
                place["delivered"] = consumer["delivered"]["stream_seq"]
    return found


async def hold_one(bus: NatsBus) -> None:
    """Take one command of this host and do not acknowledge it."""
    held = asyncio.Event()

    def hold(_: Message) -> None:
        held.set()

    inbox = bus.connection.new_inbox()
    await bus.connection.subscribe(inbox, hold)
    pull = f"{API}CONSUMER.MSG.NEXT.HOSTD_CMD_default.{bus.subjects.host_id}"
    await bus.connection.send(pull, b"1", reply=inbox)
    await asyncio.wait_for(held.wait(), 10)


async def fill(roles: Roles) -> None:
    """Each host has commands, events, replies, dead letters and state; h2 holds one command."""
    for subjects in (H1, H2):
        host, bus = subjects.host_id, await roles.host(subjects)
        agentd = await roles.role(f"agentd-{host}")
        for number in range(200 if host == "h1" else 2):
            await agentd.request(f"{H1.root}.{host}.cmd.host", f"{number}".encode())
        for kind in ("evt.host.status", "reply.host", "dead.host"):
            await bus.publish(f"{H1.root}.{host}.{kind}", b"mine", msg_id=f"{host}-{kind}")
        await bus.write_state(f"{host}.host", b"mine", revision=0)
    await hold_one(bus)


OWN = {
    "host-h1": r"hostd\.v1\.default\.h1\.(cmd|evt|reply|dead)\.|\$KV\.HOSTD_STATE_default\.h1\.",
    "agentd-h1": r"hostd\.v1\.default\.h1\.cmd\.",
    "dashboard": "nothing",
}


async def attack(connection: Connection, requests: Mapping[str, bytes]) -> None:
    """Each privileged subject as subject, and as reply subject of each allowed request."""
    for subject, payload in privileged().items():
        await connection.send(subject, payload, reply=connection.new_inbox())
        await connection.send(subject, payload, headers={"Nats-Rollup": "all"})
        for request, body in requests.items():
            await connection.send(request, body, reply=subject)
    await flush(connection)
    # The server takes a connection's requests in order: once these are answered, so are all before.
    for request, body in requests.items():
        if "MSG.NEXT" in request or "JS.ACK" in request:
            continue  # answered under other subjects, or not at all
        try:
            await connection.request(request, body, timeout_s=5)
        except NoResponder:
            continue


@pytest.mark.parametrize("user", ROLES)
async def test_no_role_changes_what_is_not_its_own(roles: Roles, user: str) -> None:
    await fill(roles)
    admin = await roles.role("admin")
    forged: list[tuple[str, str]] = []
    service = query_service((await roles.host()).connection, H1, Answers(), version="1.2.3")
    await service.start()
    other = query_service((await roles.host(H2)).connection, H2, Answers(), version="1.2.3")
    await other.start()
    for victim in ("admin", "host-h2", "agentd-h2"):
        connection = await roles.role(victim)

        def note(message: Message, victim: str = victim) -> None:
            asked = user == "dashboard" and re.search(r"\.ask\.|^\$SRV\.", message.subject)
            answered = message.subject.startswith("_R_")
            if not asked and not answered:
                forged.append((victim, message.subject))

        await connection.subscribe(">", note)
        await flush(connection)
    attacker = await roles.role(user)
    try:
        before = await cell_state(await roles.role("admin"), OWN[user])
        forged.clear()

        await attack(attacker, carriers(ACCOUNTS[user]))

        seen = [one for one in forged if "JS.API" not in one[1] and "_INBOX.admin." not in one[1]]
        assert await cell_state(await roles.role("admin"), OWN[user]) == before
        assert seen == []
        assert admin.connected
    finally:
        await service.close()
        await other.close()


ACK_V2 = "feature_flags { js_ack_fc_v2: true }\n"


@pytest.mark.parametrize(
    ("program", "flags"),
    [("", ""), ("", ACK_V2), pytest.param(str(OLD_SERVER), "", marks=NO_OLD_SERVER)],
)
async def test_each_host_acknowledges_its_own_commands_only(
    tmp_path: Path, program: str, flags: str
) -> None:
    # A host ID may be a number, which can stand for a sequence number in another form of subject.
    numeric = replace(H1, host_id="1")
    hosts = ("1", "h2")
    passwords = "".join(
        f'PASSWORD_{account}: "{password(user)}"\n'
        for account, user in accounts.users(hosts).items()
    )
    config = flags + passwords + accounts.server_config(H1, hosts, DOMAIN)
    async with AsyncExitStack() as stack:
        server = Server(str(tmp_path / "nats"), config=config, program=program)
        await server.start()
        stack.push_async_callback(server.stop)
        roles = Roles(server, stack)
        admin = await roles.role("admin")
        await provision(admin, H1, hosts)
        own, receiver = await roles.host(numeric), Receiver()
        attacker = await roles.role("host-1")
        consumer = asyncio.create_task(own.consume(receiver))
        try:
            await (await roles.role("agentd-h2")).request(f"{H1.root}.h2.cmd.host", b"1")
            await (await roles.role("agentd-1")).request(f"{H1.root}.1.cmd.host", b"2")
            assert await receiver.wait_for(b"2", 10)
            await hold_one(await roles.host(H2))
            reply = receiver.got[0]
            stream = H1.commands_stream
            for numbers in ("1.1.1.1.0", "1.1.1.1", "1.1.1", "1.1.1.1.0.x", "1.1.1.1.0.x.y"):
                for forged in (
                    f"$JS.ACK.{stream}.h2.{numbers}",
                    f"$JS.ACK.{stream}.h2.{stream}.1.{numbers}",
                    f"$JS.ACK._.1.{stream}.h2.{numbers}",
                    f"$JS.ACK.{stream}.1.{stream}.h2.{numbers}",
                ):
                    await attacker.send(forged, b"+ACK")
            await flush(attacker)

            infos = [await call(admin, f"$JS.API.CONSUMER.INFO.{stream}.{host}") for host in hosts]
            assert reply.delivered == 1
            assert [info["num_ack_pending"] for info in infos] == [0, 1]
        finally:
            consumer.cancel()
            await asyncio.gather(consumer, return_exceptions=True)


async def test_in_one_account_a_reader_deletes_streams_by_reply_subjects(
    tmp_path: Path,
) -> None:
    """The control of the test above: the same requests do harm if accounts do not separate."""
    readable = [f"$JS.API.DIRECT.GET.{name}" for name in (STREAMS[1], STREAMS[4])]
    config = f"""accounts {{ HOSTD {{ jetstream: enabled, users: [
      {{ user: admin, password: admin }}
      {{ user: dashboard, password: dashboard, permissions: {{
         publish: {{ allow: {json.dumps(readable)} }}
         subscribe: {{ allow: ["_INBOX.dashboard.>"] }}
      }} }} ] }} }}"""
    async with AsyncExitStack() as stack:
        server = Server(str(tmp_path / "nats"), config=config)
        await server.start()
        stack.push_async_callback(server.stop)
        roles = Roles(server, stack)
        admin, dashboard = await roles.role("admin"), await roles.role("dashboard")
        await provision(admin, H1, HOSTS)
        await admin.request(f"{H1.root}.h1.evt.host.status", b"{}")
        before = await cell_state(admin, "nothing")

        await attack(dashboard, {readable[0]: b'{"seq":1}'})

        after = await cell_state(admin, "nothing")
        assert set(before["streams"]) - set(after["streams"])


READS = [
    *(f"STREAM.MSG.GET.{name}" for name in STREAMS),
    *(f"DIRECT.GET.{name}" for name in STREAMS),
    "STREAM.NAMES",
    "STREAM.LIST",
    "INFO",
    "CONSUMER.MSG.NEXT.HOSTD_CMD_default.h2",
    "CONSUMER.INFO.HOSTD_CMD_default.h2",
    f"DIRECT.GET.HOSTD_REPLY_default.{H1.root}.h2.reply.host",
    "DIRECT.GET.KV_HOSTD_STATE_default.$KV.HOSTD_STATE_default.h2.host",
]


@pytest.mark.parametrize("user", ROLES)
async def test_no_role_reads_what_is_not_its_own(roles: Roles, user: str) -> None:
    await fill(roles)
    connection = await roles.role(user)
    allowed = ("HOSTD_EVT_default", "HOSTD_DEAD_default", "KV_HOSTD_STATE_default")
    for endpoint in READS:
        if (
            user == "dashboard"
            and endpoint.startswith("DIRECT")
            and any(n in endpoint for n in allowed)
        ):
            continue
        for api in ("$JS.API.", API):
            try:
                payload = b"" if "INFO" in endpoint else b'{"seq":1}'
                answer = await connection.request(api + endpoint, payload, timeout_s=2)
            except BusError:
                continue  # nobody, or an old server's account without JetStream, which is silent
            error = json.loads(answer.data).get("error", {})
            assert error.get("err_code") == 10039, (api + endpoint, answer)  # not enabled


@pytest.mark.parametrize("user", ROLES)
async def test_no_role_hears_what_is_not_its_own(roles: Roles, user: str) -> None:
    connection = await roles.role(user)
    heard: list[str] = []

    def note(message: Message) -> None:
        heard.append(message.subject)

    await connection.subscribe(">", note)
    await flush(connection)

    await fill(roles)
    bus = await roles.host(H2)
    await bus.send("_INBOX.agentd-h2.reply", b"x")
    await (await roles.role("agentd-h2")).request(f"{H1.root}.h2.cmd.host", b"x")

    await flush(connection)
    foreign = re.compile(
        {
            "host-h1": r"\.h2\.|\.cmd\.|agentd",
            "agentd-h1": r"\.h2\.|agentd-h2",
            "dashboard": r"^(?!hostd\.v1\.default\.h[12]\.evt\.|\$KV\.)",
        }[user]
    )
    assert [subject for subject in heard if foreign.search(subject)] == []
