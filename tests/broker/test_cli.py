"""The command line against a real NATS server: commands, queries, events, provisioning.

What answers is a stand-in that keeps to the wire; the worker itself is driven elsewhere.
"""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import nats
import pytest
from click.testing import CliRunner, Result
from nats.aio.client import Client
from nats.aio.msg import Msg

from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Command, Event, EventKind, Reply
from schemas.requests import (
    DestroyInstance,
    Error,
    InstanceRef,
    Ok,
    Ping,
    Pong,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    TeardownNetwork,
)
from schemas.subjects import Lane
from schemas.unpack import pack, unpack_map
from tests.broker.server import CELL, HOST, SUBJECTS, Server
from worker.cli.main import main
from worker.cli.seed import Seed, net_of, write_seed


async def hostd(server: Server, *args: str, **env: str) -> Result:
    """Run the command line in a thread, settings by environment only."""
    setting = {
        "HOSTD_CONFIG": None,
        "HOSTD_HOST_ID": HOST,
        "HOSTD_HOST_CELL": CELL,
        "HOSTD_NATS_URL": server.url,
        **env,
    }
    return await asyncio.to_thread(CliRunner().invoke, main, args, env=setting)


@dataclass
class StandIn:
    """Answers commands with the reply set, and queries with the answers set."""

    connection: Client
    reply: dict[str, Any] = field(default_factory=dict[str, Any])
    answers: dict[str, dict[str, Any]] = field(default_factory=lambda: {"ping": {"v": 1}})
    silent: bool = False
    commands: list[tuple[str, Command]] = field(default_factory=list[tuple[str, Command]])
    questions: list[tuple[str, dict[str, Any]]] = field(
        default_factory=list[tuple[str, dict[str, Any]]]
    )
    connected: asyncio.Event = field(default_factory=asyncio.Event)
    _came: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, *, commands: int = 0, questions: int = 0) -> None:
        """Wait until at least so many came."""
        async with asyncio.timeout(20):
            while len(self.commands) < commands or len(self.questions) < questions:
                self._came.clear()
                await self._came.wait()

    async def on_command(self, message: Msg) -> None:
        command = codec.decode_command(message.data)
        self.commands.append((message.subject, command))
        self._came.set()
        if not self.silent:
            assert command.reply_to is not None
            await self.connection.publish(
                command.reply_to, codec.encode_reply(self.reply_to(command))
            )

    def reply_to(self, command: Command) -> Reply:
        response = Pong() if isinstance(command.request, Ping) else Ok()
        facts: dict[str, Any] = {
            "response": response,
            "code": Code.OK,
            "changed": True,
            **self.reply,
        }
        return Reply(id=command.id, host_id=HOST, received_at_ms=1000, finished_at_ms=1042, **facts)

    async def on_question(self, message: Msg) -> None:
        verb = message.subject.rpartition(".")[2]
        self.questions.append((verb, unpack_map(message.data)))
        self._came.set()
        await message.respond(pack(self.answers[verb]))


@pytest.fixture
async def worker(server: Server) -> AsyncIterator[StandIn]:
    """A provisioned cell in which the stand-in answers."""
    done = await hostd(server, "provision", "--json")
    assert done.exit_code == 0, done.output
    connected = asyncio.Event()

    async def lost() -> None:
        connected.clear()

    async def is_back() -> None:
        connected.set()

    connection = await nats.connect(server.url, disconnected_cb=lost, reconnected_cb=is_back)
    connected.set()
    stand_in = StandIn(connection, connected=connected)
    await connection.subscribe(f"{SUBJECTS.root}.{HOST}.cmd.>", cb=stand_in.on_command)
    await connection.subscribe(f"{SUBJECTS.root}.{HOST}.ask.*", cb=stand_in.on_question)
    await connection.flush()
    yield stand_in
    await connection.close()


Body = Callable[[], Awaitable[None]]
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
REF = ("acme", "web", "i-1")


@pytest.mark.parametrize(
    ("args", "request_"),
    [
        (("ping",), Ping()),
        (("start", *REF), StartInstance(*REF)),
        (("sleep", *REF), SleepInstance(*REF, force=False)),
        (
            ("sleep", *REF, "--force", "--drain-timeout", "7"),
            SleepInstance(*REF, force=True, drain_timeout_secs=7),
        ),
        (("destroy", *REF), DestroyInstance(*REF, wipe_volumes=False)),
        (("destroy", *REF, "--wipe-volumes"), DestroyInstance(*REF, wipe_volumes=True)),
    ],
)
async def test_a_command_goes_to_its_lane_and_its_reply_is_printed(
    server: Server, worker: StandIn, args: tuple[str, ...], request_: object
) -> None:
    result = await hostd(server, *args)

    assert result.exit_code == 0, result.output
    ((subject, command),) = worker.commands
    lane = "host" if isinstance(request_, Ping) else "instance.acme.web.i-1"
    assert subject == f"{SUBJECTS.root}.{HOST}.cmd.{lane}"
    assert command.request == request_
    assert result.output.startswith(f"ok: {'host' if lane == 'host' else 'acme/web/i-1'}")
    assert "42 ms" in result.output


async def test_net_up_and_net_down_send_the_net_of_tenant_json(
    server: Server, worker: StandIn, tmp_path: Any
) -> None:
    write_seed(str(tmp_path), Seed(InstanceRef(*REF), 7))

    for verb, request in (("net-up", SetupNetwork), ("net-down", TeardownNetwork)):
        result = await hostd(server, verb, "acme", HOSTD_PATHS_DATA=str(tmp_path))
        assert result.exit_code == 0, result.output
        subject, command = worker.commands[-1]
        assert subject.endswith(".cmd.network.acme")
        assert command.request == request("acme", net_of(7))


async def test_a_tenant_id_never_becomes_another_path(server: Server, tmp_path: Any) -> None:
    result = await hostd(server, "net-up", "../acme", HOSTD_PATHS_DATA=str(tmp_path))

    assert result.exit_code == 10


async def test_a_failure_exits_with_its_class_and_says_all_that_helps(
    server: Server, worker: StandIn
) -> None:
    worker.reply = {
        "response": Error("no memory for it"),
        "code": Code.EXHAUSTED,
        "retryable": True,
        "left_behind": ("taps tn7i3",),
    }

    result = await hostd(server, "start", *REF)

    assert result.exit_code == 14
    assert result.output == (
        "exhausted: acme/web/i-1: no memory for it; retryable with a new command ID\n"
        "left behind: taps tn7i3\n"
    )


async def test_json_is_the_reply_envelope(server: Server, worker: StandIn) -> None:
    worker.reply = {"status": "running", "detail": {"a": [1]}}

    options = ("--json", "--id", "my-1", "--deadline", "60", "--traceparent", PARENT)
    result = await hostd(server, "start", *REF, *options)

    reply = json.loads(result.output)
    assert (reply["id"], reply["response"], reply["status"]) == ("my-1", "Ok", "running")
    (_, command) = worker.commands[0]
    assert command.traceparent == PARENT
    assert command.deadline_ms is not None
    assert 50_000 < command.deadline_ms - time.time() * 1000 < 60_000


async def test_without_a_reply_the_command_line_exits_with_no_answer(
    server: Server, worker: StandIn
) -> None:
    worker.silent = True

    result = await hostd(server, "stop", *REF, "--timeout", "0.3")

    assert result.exit_code == 30
    assert "the command may still run" in result.output


async def test_without_a_stream_the_message_says_what_to_do(server: Server) -> None:
    result = await hostd(server, "ping")

    assert result.exit_code == 30
    assert "hostd provision" in result.output


async def test_without_a_worker_a_query_has_no_answer(server: Server) -> None:
    result = await hostd(server, "ls")

    assert result.exit_code == 30
    assert "no worker is running for host h1" in result.output


async def test_ls_and_show_print_what_the_worker_answers(server: Server, worker: StandIn) -> None:
    worker.answers["list"] = {
        "v": 1,
        "instances": [
            {
                "tenant_id": "acme",
                "pool_id": "web",
                "instance_id": "i-1",
                "status": "running",
                "since_ms": 1_700_000_000_123,
            }
        ],
        "networks": [{"tenant_id": "acme", "bridge_name": "br-tenant-7", "status": "up"}],
        "warm_vmms": 2,
    }
    worker.answers["describe"] = {
        "v": 1,
        "status": "running",
        "since_ms": 1_700_000_000_123,
        "pid": None,
    }

    worker.answers["usage"] = {
        "v": 1,
        "status": "running",
        "vmm": {"duration_ms": 7, "cpu_us": 1500, "memory_bytes": None},
        "span": {"state": "running", "duration_ms": 60_000},
        "snapshot": None,
        "totals": {"from_ms": 0, "launches": 2, "running_ms": 5000, "cpu_us": 70_000},
    }

    listed = await hostd(server, "ls")
    shown = await hostd(server, "show", *REF)
    used = await hostd(server, "usage", *REF)
    worker.answers["usage"] = {
        "v": 1,
        "current": {"running": 1, "cpu_us": 30},
        "totals": {"launches": 2, "cpu_us": 70_000},
    }
    of_tenant = await hostd(server, "usage", "acme")

    assert listed.output.splitlines() == [
        "acme          network   up       br-tenant-7",
        "acme/web/i-1  instance  running  since 2023-11-14 22:13:20.123Z",
        "warm_pool     vmms      ready    2",
    ]
    assert "since: 2023-11-14 22:13:20.123Z" in shown.output
    assert "pid: none" in shown.output
    assert used.output.splitlines() == [
        "v: 1",
        "status: running",
        "snapshot: none",
        "counted since: 1970-01-01 00:00:00.000Z",
        "              CURRENT  ENDED",
        "launches                   2",
        "running_ms      60000   5000",
        "cpu_us           1500  70000",
        "memory_bytes     none",
    ]
    assert of_tenant.output.splitlines()[1:] == [
        "          CURRENT  ENDED",
        "launches               2",
        "cpu_us         30  70000",
        "running         1",
    ]
    body = {"tenant_id": "acme", "pool_id": "web", "instance_id": "i-1"}
    assert worker.questions[-3:] == [
        ("describe", body),
        ("usage", body),
        ("usage", {"tenant_id": "acme"}),
    ]


async def test_an_error_in_an_answer_exits_with_its_class(server: Server, worker: StandIn) -> None:
    worker.answers["describe"] = {"error": {"code": "not_found", "message": "no such tenant"}}

    result = await hostd(server, "show", "nobody", "--json")

    assert result.exit_code == 13
    assert json.loads(result.output)["error"]["message"] == "no such tenant"


def event(seq: int) -> bytes:
    return codec.encode_event(
        Event(
            id=f"{HOST}:j1:{seq}",
            host_id=HOST,
            boot_id="b1",
            journal_id="j1",
            seq=seq,
            at_ms=1_700_000_000_000 + seq,
            kind=EventKind.STATUS,
            tenant_id="acme",
            from_="stopped",
            to="running",
        )
    )


async def test_kept_events_come_first_then_new_ones_each_once(
    server: Server, worker: StandIn
) -> None:
    subject = f"{SUBJECTS.root}.{HOST}.evt.network.acme.status"
    for seq in (1, 2, 2):
        await worker.connection.jetstream().publish(subject, event(seq))

    kept = await hostd(server, "events", "--kept", "--no-follow", "--json")
    assert [json.loads(line)["seq"] for line in kept.output.splitlines()] == [1, 2]

    following = asyncio.create_task(hostd(server, "events", "--kept", "--count", "3"))
    sender = asyncio.create_task(_again_and_again(worker.connection, subject, event(3)))
    try:
        followed = await asyncio.wait_for(following, 20)
    finally:
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)

    assert followed.exit_code == 0
    assert followed.output.splitlines()[2] == (
        "2023-11-14 22:13:20.003Z 3 status acme stopped -> running"
    )


async def _again_and_again(connection: Client, subject: str, payload: bytes) -> None:
    """Until the follower has surely subscribed; it shows each event once."""
    while True:
        await connection.publish(subject, payload)
        await asyncio.sleep(0.05)


async def test_what_is_no_event_of_its_host_is_left_out_with_a_note(
    server: Server, worker: StandIn
) -> None:
    publish = worker.connection.jetstream().publish
    subject = SUBJECTS.event(Lane.host(), "host")
    await publish(subject, b"\xc1")
    await publish(subject, pack({"host_id": "h2", "journal_id": "j", "seq": 1}))

    result = await hostd(server, "events", "--kept", "--no-follow", "--json")

    assert (result.exit_code, result.stdout) == (0, "")
    assert "left out: cannot decode" in result.stderr
    assert "of host 'h2'" in result.stderr


async def test_without_events_in_time_the_command_line_exits_with_no_answer(
    server: Server, worker: StandIn
) -> None:
    result = await hostd(server, "events", "--count", "1", "--timeout", "0.2")

    assert result.exit_code == 30
    assert "0 of 1 events" in result.output
    assert "note:" not in result.output


async def test_events_of_a_host_without_a_worker_are_followed_with_a_note(
    server: Server, worker: StandIn
) -> None:
    result = await hostd(server, "events", "--host", "h7", "--count", "1", "--timeout", "0.5")

    assert result.exit_code == 30
    assert "note: no worker is running for host h7" in result.stderr
    assert result.stdout == ""


async def test_a_dry_run_says_what_is_missing_and_makes_nothing(server: Server) -> None:
    before = await hostd(server, "provision", "--dry-run", "--json")
    again = await hostd(server, "provision", "--dry-run")
    await hostd(server, "provision")
    after = await hostd(server, "provision", "--dry-run")
    changed = await hostd(server, "provision", "--dry-run", "--size", "evt=2048")

    assert (before.exit_code, again.exit_code, after.exit_code) == (1, 1, 0)
    assert {made["how"] for made in json.loads(before.stdout)} == {"missing"}
    assert "missing consumer h1 of HOSTD_CMD_test" in again.stdout
    assert changed.exit_code == 1
    text = "differs stream HOSTD_EVT_test  (max_bytes: is 1073741824, must be 2147483648)"
    assert text in changed.stdout


async def test_provision_may_be_repeated_and_serves_several_hosts(server: Server) -> None:
    first = await hostd(server, "provision", "--host", "h1", "--host", "h2")
    again = await hostd(server, "provision", "--host", "h1", "--host", "h2", "--json")

    assert first.exit_code == again.exit_code == 0
    assert "made    consumer h2 of HOSTD_CMD_test" in first.stdout
    assert "made    bucket HOSTD_STATE_test" in first.stdout
    assert {made["how"] for made in json.loads(again.stdout)} == {"found"}
