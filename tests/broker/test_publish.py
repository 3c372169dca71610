"""Publishing: acknowledged, stored once, and an error without a connection."""

import asyncio
import json
from pathlib import Path
from typing import cast

import pytest

from schemas.subjects import Lane
from tests.broker.proxy import proxied
from tests.broker.server import (
    HOST,
    SUBJECTS,
    Server,
    connection_to,
    consuming_host,
    eventually,
    running_server,
)
from tests.broker.test_exactly_once import agentd, worker
from tests.broker.test_guarded_client import guard_cases
from tests.fakes.shell_worker import FakeHandlers, start
from worker.bus.connection import Connection
from worker.bus.guarded_client import Guard
from worker.bus.nats import NatsBus
from worker.bus.protocol import BusError, NotProvisioned, Unsendable

REPLY = f"{SUBJECTS.root}.{HOST}.reply.host"
DEAD = f"{SUBJECTS.root}.{HOST}.dead.host"


async def stored(admin: Connection, stream: str) -> int:
    answer = await admin.request(f"$JS.API.STREAM.INFO.{stream}", b"")
    number: int = json.loads(answer.data)["state"]["messages"]
    return number


@pytest.mark.parametrize(("guards", "once"), guard_cases(Guard.MSG_ID))
async def test_a_message_published_again_after_a_lost_acknowledgement_is_stored_once(
    server: Server, guards: frozenset[Guard], once: bool
) -> None:
    async with (
        proxied(server.port) as proxy,
        consuming_host(server, guards=guards, url=proxy.url) as host,
    ):
        proxy.mute = True
        with pytest.raises(BusError):
            await host.bus.publish(REPLY, b"r", msg_id="c-1")
        proxy.mute = False

        assert await eventually(lambda: host.bus.connected, 5)
        await host.bus.publish(REPLY, b"r", msg_id="c-1")

        assert (await stored(host.admin, SUBJECTS.replies_stream) == 1) == once


async def test_without_a_connection_publishing_fails_at_once_and_sends_nothing_later(
    server: Server,
) -> None:
    async with consuming_host(server) as host:
        await server.stop()
        assert await eventually(lambda: not host.bus.connected, 5)

        # No reply is waited for: the request timeout would be another error.
        with pytest.raises(BusError, match="not connected"):
            await host.bus.publish(REPLY, b"r", msg_id="c-1")
        with pytest.raises(BusError, match="not connected"):
            await host.bus.send("_INBOX.x", b"r")
        with pytest.raises(BusError, match="not connected"):
            await host.bus.write_state("h1.host", b"v", revision=None)

        await server.start()
        assert await eventually(lambda: host.bus.connected and host.admin.connected, 5)
        assert await stored(host.admin, SUBJECTS.replies_stream) == 0


async def test_a_subject_without_a_stream_names_what_to_provision(server: Server) -> None:
    async with consuming_host(server) as host:
        with pytest.raises(NotProvisioned, match="hostd provision"):
            await host.bus.publish("elsewhere.x", b"r", msg_id="c-1")


async def test_the_error_of_the_stream_is_raised(server: Server) -> None:
    async with consuming_host(server) as host:
        config = {"name": SUBJECTS.dead_stream, "subjects": [SUBJECTS.of_all_hosts("dead")]}
        limited = {**config, "storage": "file", "max_msgs": 1, "discard": "new"}
        name = SUBJECTS.dead_stream
        await host.admin.request(f"$JS.API.STREAM.DELETE.{name}", b"")
        await host.admin.request(f"$JS.API.STREAM.CREATE.{name}", json.dumps(limited).encode())
        subject = f"{SUBJECTS.root}.{HOST}.dead.host"
        await host.bus.publish(subject, b"1", msg_id="d-1")

        with pytest.raises(BusError, match="maximum messages exceeded"):
            await host.bus.publish(subject, b"2", msg_id="d-2")


async def test_the_headers_of_the_caller_are_not_changed(server: Server) -> None:
    # nats-py adds to the headers that it gets.
    async with consuming_host(server) as host:
        headers = {"Hostd-Reason": "x"}

        await host.bus.publish(REPLY, b"r", msg_id="c-1", headers=headers)

        assert headers == {"Hostd-Reason": "x"}


@pytest.mark.parametrize(("guards", "cancelled"), guard_cases(Guard.CANCEL))
async def test_a_cancellation_while_nats_py_flushes_is_not_lost(
    server: Server, guards: frozenset[Guard], cancelled: bool
) -> None:
    async with connection_to(server.url, guards=guards - {Guard.PING}) as connection:
        server.pause()
        block = b"x" * 1_000_000
        stuck = [asyncio.create_task(connection.send("x.y", block)) for _ in range(20)]
        _, waiting = await asyncio.wait(stuck, timeout=0.3)
        assert waiting

        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)

        assert any(task.cancelled() for task in waiting) == cancelled
        server.go_on()


def limited_to(size: int) -> str:
    return f"max_payload: {size}"


async def test_a_message_too_large_with_its_headers_is_not_sent(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "nats", config=limited_to(4096)) as server,
        consuming_host(server) as host,
    ):
        for size in (4096, 5000):
            with pytest.raises(Unsendable) as raised:
                await host.bus.publish(REPLY, b"x" * size, msg_id="c-1")
            assert raised.value.limit_bytes == 4096
        for subject in ("a b", "a.\u00e9", ""):
            with pytest.raises(Unsendable):
                await host.bus.send(subject, b"x")
        with pytest.raises(Unsendable):
            await host.bus.publish(REPLY, b"x", msg_id="c-1", headers={"a\udcff": "b"})
        await host.bus.publish(REPLY, b"x" * 3900, msg_id="c-2")

        assert host.bus.reconnects == 0


async def test_a_stream_that_takes_no_such_size_says_so(server: Server) -> None:
    async with consuming_host(server) as host:
        stream = SUBJECTS.dead_stream
        info = await host.admin.request(f"$JS.API.STREAM.INFO.{stream}", b"")
        config = {**json.loads(info.data)["config"], "max_msg_size": 2000}
        await host.admin.request(f"$JS.API.STREAM.UPDATE.{stream}", json.dumps(config).encode())

        with pytest.raises(Unsendable) as raised:
            await host.bus.publish(DEAD, b"x" * 3000, msg_id="c-1")

        assert 1000 < raised.value.limit_bytes < 2000


@pytest.mark.parametrize("lowered", [False, True], ids=["at start", "by reload"])
async def test_a_dead_letter_larger_than_max_payload_ends_in_the_stream_and_holds_up_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowered: bool
) -> None:
    body = b"\xc1" * 60_000
    async with (
        running_server(tmp_path / "nats", config=limited_to(64_000)) as server,
        agentd(server) as sender,
        worker(server, tmp_path / "j", FakeHandlers(), monkeypatch) as running,
    ):
        bus = cast("NatsBus", running.bus)
        bus.pause()
        await sender.connection.request(SUBJECTS.command(Lane.host()), body)
        server.configure(limited_to(20_000 if lowered else 64_000))
        server.reload()
        bus.resume()
        await sender.send(start(), "after")

        assert len(await sender.replies(2)) == 2
        async with asyncio.timeout(10):
            while not (dead := await sender.kept(SUBJECTS.dead_stream)):
                await asyncio.sleep(0.02)
        assert await eventually(lambda: running.journal.outbox.depth == 0, 10)
        assert dead == [body] if not lowered else len(dead[0]) in range(17_000, 20_000)
        # The server announces a lower limit only with the next connection.
        assert bus.reconnects <= lowered
