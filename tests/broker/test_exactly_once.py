"""A command end to end over a real nats-server: one effect, one stored reply."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result

from schemas import codec
from schemas.codes import Code
from schemas.requests import Request
from schemas.settings import NatsSettings
from schemas.subjects import Lane
from tests.broker.server import CELL, HOST, QUICK, SUBJECTS, Server, connection_to, eventually
from tests.fakes import shell_worker as fakes
from tests.fakes.bus import FakeBus
from tests.fakes.shell_worker import FakeHandlers, ShellWorker, command, start, stop
from worker.bus.connection import Connection
from worker.bus.message import Message
from worker.bus.nats import NatsBus
from worker.bus.protocol import BusError
from worker.bus.provision import provision
from worker.cli.main import main


class Agentd:
    """The sender: publishes until the stream has it, listens on inboxes, reads the streams."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.received: list[bytes] = []

    async def listen(self, inbox: str) -> None:
        def hear(message: Message) -> None:
            self.received.append(message.data)

        await self.connection.subscribe(inbox, hear)

    async def send(
        self, request: Request, command_id: str, *, msg_id: bool = False, **more: Any
    ) -> None:
        data = codec.encode_command(command(request, command_id, **more))
        subject = SUBJECTS.command(Lane.of_request(request))
        headers = {"Nats-Msg-Id": command_id} if msg_id else {}
        async with asyncio.timeout(20):
            while True:
                try:
                    await self.connection.request(subject, data, headers=headers, timeout_s=1)
                except BusError:
                    await asyncio.sleep(0.02)
                else:
                    return

    async def kept(self, stream: str) -> list[bytes]:
        """All messages of a stream, in order."""
        info = json.loads(
            (await self.connection.request(f"$JS.API.STREAM.INFO.{stream}", b"")).data
        )
        found: list[bytes] = []
        for seq in range(1, info["state"]["last_seq"] + 1):
            body = json.dumps({"seq": seq}).encode()
            answer = await self.connection.request(f"$JS.API.STREAM.MSG.GET.{stream}", body)
            found.append(base64.b64decode(json.loads(answer.data)["message"]["data"]))
        return found

    async def replies(self, count: int) -> list[bytes]:
        """The reply stream, once it has at least so many; a moment later, so extra ones show."""
        end = asyncio.get_running_loop().time() + 20
        while True:
            found: list[bytes] = []
            with suppress(BusError):
                found = await self.kept(SUBJECTS.replies_stream)
            if len(found) >= count or asyncio.get_running_loop().time() > end:
                return found
            await asyncio.sleep(0.05)


@asynccontextmanager
async def agentd(server: Server) -> AsyncGenerator[Agentd]:
    async with connection_to(server.url) as connection:
        await provision(connection, SUBJECTS, [HOST], ack_wait_ns=500_000_000)
        yield Agentd(connection)


@asynccontextmanager
async def worker(
    server: Server, path: Path, machine: FakeHandlers, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[ShellWorker]:
    monkeypatch.setattr(fakes, "SUBJECTS", SUBJECTS)
    bus = NatsBus(NatsSettings(url=server.url), SUBJECTS, tuning=QUICK)
    await bus.start()
    try:
        async with fakes.shell_worker(path, cast("FakeBus", bus), machine) as running:
            bus.on_connection(running.outbox.wake)
            yield running
    finally:
        await bus.close()


@pytest.mark.parametrize("msg_id", [False, True])
async def test_ten_copies_at_once_and_ten_after_a_restart_are_one_command(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, msg_id: bool
) -> None:
    machine = FakeHandlers(gate=asyncio.Event())
    async with agentd(server) as sender:
        await sender.listen("_INBOX.me")
        copies = [
            sender.send(start(), "c1", msg_id=msg_id, reply_to="_INBOX.me") for _ in range(10)
        ]
        async with worker(server, tmp_path / "j", machine, monkeypatch) as running:
            await asyncio.gather(*copies)
            await machine.at_gate.wait()
            assert machine.gate is not None
            machine.gate.set()
            expected = 1 if msg_id else 10  # the server drops a duplicate within its window
            assert await eventually(lambda: len(sender.received) >= expected, 10)
            (reply,) = await sender.replies(1)
            assert await eventually(lambda: running.journal.outbox.depth == 0, 10)

        async with worker(server, tmp_path / "j", machine, monkeypatch):
            for n in range(10):
                await sender.send(start(), "c1", deadline_ms=n + 1, reply_to="_INBOX.me")
            assert await eventually(lambda: len(sender.received) >= expected + 10, 10)
            assert await sender.replies(1) == [reply]

    assert codec.decode_reply(reply).code is Code.OK
    assert set(sender.received) == {reply, codec.mark_replayed(reply)}
    assert (machine.runs, machine.things.made) == ([("c1", "StartInstance")], ["acme/web/a1"])


async def test_a_server_crash_while_commands_run_loses_and_repeats_none(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = FakeHandlers()
    names = [f"c{n}" for n in range(60)]
    async with (
        agentd(server) as sender,
        worker(server, tmp_path / "j", machine, monkeypatch) as running,
    ):

        async def send_all() -> None:
            for n, name in enumerate(names):
                await sender.send(start(f"a{n}"), name)

        sending = asyncio.create_task(send_all())
        for after in (15, 35):
            await eventually(lambda: len(machine.runs) >= after or sending.done(), 10)  # noqa: B023
            await server.crash()
        await sending
        replies = [codec.decode_reply(data) for data in await sender.replies(60)]
        assert await eventually(lambda: running.journal.outbox.depth == 0, 20)
        events = [codec.decode_event(data) for data in await sender.kept(SUBJECTS.events_stream)]

    assert sorted(reply.id for reply in replies) == sorted(names)
    assert {reply.code for reply in replies} == {Code.OK}
    assert sorted(machine.things.made) == sorted(f"acme/web/a{n}" for n in range(60))
    assert [event.seq for event in events] == list(range(1, 61))


async def test_outcomes_of_a_worker_killed_without_a_server_are_sent_by_the_next(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = FakeHandlers(gate=asyncio.Event())
    async with agentd(server) as sender:
        async with worker(server, tmp_path / "j", machine, monkeypatch) as running:
            await sender.send(start(), "c1")
            await machine.at_gate.wait()
            await server.stop()
            assert machine.gate is not None
            machine.gate.set()
            assert await eventually(lambda: not running.journal.commands.is_unfinished("c1"), 10)
            assert running.journal.outbox.count("reply") == 1
        await server.start()
        async with worker(server, tmp_path / "j", machine, monkeypatch):
            await sender.send(stop(), "c2")
            replies = [codec.decode_reply(data) for data in await sender.replies(2)]

    assert [reply.id for reply in replies] == ["c1", "c2"]
    assert machine.runs == [("c1", "StartInstance"), ("c2", "StopInstance")]


async def test_the_cli_gets_conflict_for_another_request_and_the_stored_reply_for_the_same(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = FakeHandlers()
    settings = {
        "HOSTD_CONFIG": None,
        "HOSTD_HOST_ID": HOST,
        "HOSTD_HOST_CELL": CELL,
        "HOSTD_NATS_URL": server.url,
    }

    async def hostd(verb: str) -> Result:
        args = (verb, "acme", "web", "a1", "--id", "c1")
        return await asyncio.to_thread(CliRunner().invoke, main, args, env=settings)

    async with agentd(server), worker(server, tmp_path / "j", machine, monkeypatch):
        first = await hostd("start")
        other = await hostd("destroy")
        same = await hostd("start")

    assert first.exit_code == 0, first.output
    assert (other.exit_code, other.output.partition(":")[0]) == (12, "conflict"), other.output
    assert same.exit_code == 0
    assert "(replayed)" in same.output
    assert machine.runs == [("c1", "StartInstance")]
