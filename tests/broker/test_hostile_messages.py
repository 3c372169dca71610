"""Messages that nats-py cannot parse, published with a raw socket: each is answered or dropped.

None of them holds up what follows, on the command stream and on `ask.*`, and each command message
ends in the dead letter stream with an acknowledgement.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from schemas.unpack import unpack_map
from tests.broker.server import HOST, SUBJECTS, Server, consuming_host, eventually
from tests.broker.test_exactly_once import Agentd, agentd, worker
from tests.broker.test_guarded_client import DEAF_S, guard_cases
from tests.broker.test_queries import asked
from tests.fakes.shell_worker import FakeHandlers, start
from worker.bus.guarded_client import Guard

COMMANDS = f"{SUBJECTS.root}.{HOST}.cmd.".encode()
HEADERS = b"NATS/1.0"
DEAD = SUBJECTS.dead_stream


def pub(subject: bytes, data: bytes, *, reply: bytes = b"") -> bytes:
    return b" ".join(filter(None, (b"PUB", subject, reply, b"%d" % len(data)))) + (
        b"\r\n" + data + b"\r\n"
    )


def hpub(subject: bytes, block: bytes, data: bytes, *, reply: bytes = b"") -> bytes:
    sizes = b"%d %d" % (len(block), len(block) + len(data))
    return b" ".join(filter(None, (b"HPUB", subject, reply, sizes))) + (
        b"\r\n" + block + data + b"\r\n"
    )


HOSTILE = {
    "subject not UTF-8": pub(COMMANDS + b"instance.\xff\xfe.a.b", b"x"),
    "subject with VT": pub(COMMANDS + b"host\x0b1", b"x"),
    "subject with FF": pub(COMMANDS + b"host\x0c", b"x"),
    "subject with NEL": pub(COMMANDS + b"host\xc2\x85", b"x"),
    "subject with NUL": pub(COMMANDS + b"host\x00", b"x"),
    "subject of 3,900 bytes": pub(COMMANDS + b"host." + b"a" * 3900, b"x"),
    "8 bytes of headers": hpub(COMMANDS + b"host", HEADERS, b"x"),
    "headers without an end": hpub(COMMANDS + b"host", HEADERS + b"\r\nA: b", b"x"),
    "a status in the headers": hpub(COMMANDS + b"host", HEADERS + b" 503\r\n\r\n", b"x"),
    "a status not UTF-8": hpub(COMMANDS + b"host", HEADERS + b" \xff\xff\r\n\r\n", b"x"),
    "header values not UTF-8": hpub(COMMANDS + b"host", HEADERS + b"\r\nA: \xff\r\n\r\n", b"x"),
    "an id with VT": hpub(COMMANDS + b"host", HEADERS + b"\r\nNats-Msg-Id: a\x0bb\r\n\r\n", b"x"),
    "no header line": hpub(COMMANDS + b"host", b"\r\n" * 6, b"x"),
}


async def unfinished(sender: Agentd) -> tuple[int, int]:
    """Messages that await an acknowledgement, and those that are not delivered yet."""
    consumer = f"{SUBJECTS.commands_stream}.{SUBJECTS.consumer}"
    info = await sender.connection.request(f"$JS.API.CONSUMER.INFO.{consumer}", b"")
    state = json.loads(info.data)
    return state["num_ack_pending"], state["num_pending"]


@asynccontextmanager
async def raw_client(
    server: Server,
) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A signed-in socket that a test writes the protocol to."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    await reader.readline()
    writer.write(b'CONNECT {"verbose":false,"pedantic":false,"headers":true,"protocol":1}\r\n')
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def publish_raw(server: Server, *lines: bytes) -> None:
    """Send these bytes; returns once the server has processed them.

    A client library would not send them; the server accepts each.
    """
    async with raw_client(server) as (reader, writer):
        writer.write(b"".join(lines) + b"PING\r\n")
        answer = await asyncio.wait_for(reader.readline(), 10)
        while answer.startswith(b"INFO"):
            answer = await asyncio.wait_for(reader.readline(), 10)
        assert answer == b"PONG\r\n", answer


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_command_that_cannot_be_parsed_is_a_dead_letter_and_acknowledged(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    machine = FakeHandlers()
    async with (
        agentd(server) as sender,
        worker(server, tmp_path / "j", machine, monkeypatch) as running,
    ):
        await publish_raw(server, HOSTILE[name])
        await sender.send(start(), "after")

        assert await eventually(lambda: ("after", "StartInstance") in machine.runs, 10)
        async with asyncio.timeout(10):
            while await unfinished(sender) != (0, 0) or not await sender.kept(DEAD):
                await asyncio.sleep(0.02)
        assert await sender.kept(DEAD) == [b"x"]
        assert running.bus.reconnects == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(("guards", "heals"), guard_cases(Guard.PARSER))
async def test_what_upstreams_parser_does_with_such_a_command(
    server: Server, guards: frozenset[Guard], heals: bool
) -> None:
    async with consuming_host(server, guards=guards) as host:
        await publish_raw(server, HOSTILE["8 bytes of headers"])
        await host.command(b"after")

        assert await host.receiver.wait_for(b"x", 8 if heals else DEAF_S) == heals


ASK = SUBJECTS.ask("ping").encode()
QUESTIONS = {
    "no reply subject": pub(ASK, b""),
    "reply subject not UTF-8": pub(ASK, b"", reply=b"_INBOX.\xff"),
    "reply subject with VT": pub(ASK, b"", reply=b"_INBOX.a\x0b1"),
    "reply subject with FF": pub(ASK, b"", reply=b"_INBOX.\x0c"),
    "reply subject of 3,000 bytes": pub(ASK, b"", reply=b"_INBOX." + b"a" * 3000),
    "8 bytes of headers": hpub(ASK, HEADERS, b"", reply=b"\x0b_INBOX.1"),
    "reply subject with DEL": hpub(ASK, HEADERS, b"\xc1", reply=b"_INBOX.\x7f"),
    "discovery with VT": pub(b"$SRV.PING.hostd", b"", reply=b"_INBOX.\x0b"),
}


@pytest.mark.parametrize("name", QUESTIONS)
async def test_a_question_that_cannot_be_parsed_is_dropped_with_a_count(
    server: Server, name: str
) -> None:
    async with asked(server) as to:
        await publish_raw(server, QUESTIONS[name])

        assert (await to.ask("ping"))["host_id"] == HOST
        assert await eventually(lambda: to.service.dropped == 1, 5)
        assert to.bus.reconnects == 0


async def test_a_question_with_8_bytes_of_headers_is_answered(server: Server) -> None:
    async with asked(server), raw_client(server) as (reader, writer):
        writer.write(b"SUB _INBOX.raw 1\r\n" + hpub(ASK, HEADERS, b"", reply=b"_INBOX.raw"))
        line = await asyncio.wait_for(reader.readuntil(b"MSG _INBOX.raw 1 "), 10)
        size = int((await asyncio.wait_for(reader.readline(), 10)).split()[-1])

        answer = unpack_map(await reader.readexactly(size))

        assert line
        assert answer["host_id"] == HOST
