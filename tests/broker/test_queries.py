"""Queries over core NATS: answers, errors that leak nothing, discovery, reconnects."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats

from handlers.errors import NotFound
from schemas.protocol.ids import SCHEMA_VERSION
from schemas.protocol.json_schema import documents
from schemas.protocol.queries import REQUESTS
from schemas.settings import NatsSettings
from tests.broker.server import (
    HOST,
    QUICK,
    SUBJECTS,
    Server,
    connection_to,
    eventually,
    running_server,
)
from tests.plain import unpacked
from worker.bus.connection import Connection
from worker.bus.message import Message
from worker.bus.nats import NatsBus
from worker.bus.protocol import BusError
from worker.queries.micro import MicroService
from worker.queries.service import ANSWER_BYTES, query_service


class Answers:
    """A source with answers that no worker gives; `status` waits for the gate, `list` has a bug."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.size = 0

    async def ping(self) -> Any:
        filling = "x" * self.size
        return {"v": 1, "host_id": "h1", "host_state": "ready", "uptime_s": 5, "x": filling}

    async def status(self) -> Any:
        await self.gate.wait()
        return {"v": 1, "host_state": "ready"}

    def stats(self) -> Mapping[str, object]:
        return {"unfinished": 3}

    async def list(self) -> Any:
        raise RuntimeError("secret of the host")

    async def describe(self, tenant_id: str, pool_id: str | None, instance_id: str | None) -> Any:
        return {"v": 1, "asked": [tenant_id, pool_id, instance_id]}

    async def usage(self, tenant_id: str, pool_id: str | None, instance_id: str | None) -> Any:
        return {"v": 1, "asked": [tenant_id, pool_id, instance_id]}

    async def result(self, command_id: str) -> Any:
        raise NotFound(f"{command_id} is not known here")

    async def explain(self, request: object) -> Any:
        return {"v": 1, "explained": request}


class Asked:
    def __init__(
        self, caller: Connection, bus: NatsBus, service: MicroService, source: Answers
    ) -> None:
        self.caller, self.bus, self.service, self.source = caller, bus, service, source

    async def ask(self, verb: str, body: object = None) -> dict[str, Any]:
        data = b"" if body is None else msgpack.packb(body)
        answer = await self.caller.request(SUBJECTS.ask(verb), data)
        found: dict[str, Any] = unpacked(answer.data)
        return found


@asynccontextmanager
async def asked(server: Server) -> AsyncGenerator[Asked]:
    bus = NatsBus(NatsSettings(url=server.url), SUBJECTS, tuning=QUICK)
    source = Answers()
    service = query_service(bus.connection, SUBJECTS, source, version="1.2.3")
    async with connection_to(server.url) as caller:
        await service.start()
        await bus.start()
        try:
            await asyncio.wait_for(bus.connection.wait_connected(), 10)
            asked = Asked(caller, bus, service, source)
            await answering(asked)
            yield asked
        finally:
            source.gate.set()
            await service.close()
            await bus.close()


async def answering(asked: Asked) -> None:
    """Return once queries are answered."""
    async with asyncio.timeout(10):
        while True:
            try:
                await asked.caller.request(SUBJECTS.ask("ping"), b"", timeout_s=0.5)
            except BusError:
                await asyncio.sleep(0.02)
            else:
                return


async def test_each_query_gets_its_answer(server: Server) -> None:
    async with asked(server) as to:
        to.source.gate.set()

        assert (await to.ask("ping"))["host_id"] == "h1"
        assert await to.ask("status", {}) == {"v": 1, "host_state": "ready"}
        assert await to.ask("describe", {"tenant_id": "a"}) == {"v": 1, "asked": ["a", None, None]}
        question = {"request": {"StopInstance": {"tenant_id": "a"}}}
        assert (await to.ask("explain", question))["explained"] == question["request"]
        body = {"tenant_id": "a", "pool_id": "p", "instance_id": "i", "newer": 1}
        assert (await to.ask("describe", body))["asked"] == ["a", "p", "i"]
        assert (await to.ask("usage", body))["asked"] == ["a", "p", "i"]


@pytest.mark.parametrize(
    ("verb", "body", "code", "part"),
    [
        ("result", {"id": "c-1"}, "not_found", "c-1 is not known"),
        ("result", {}, "invalid", "$.id: is missing"),
        ("result", {"id": 5}, "invalid", "$.id"),
        ("result", [1], "invalid", "expected a map"),
        ("describe", {"tenant_id": "a", "pool_id": "p"}, "invalid", "set both or neither"),
        ("usage", {"tenant_id": "a", "pool_id": "p"}, "invalid", "set both or neither"),
        ("usage", {}, "invalid", "$.tenant_id: is missing"),
        ("explain", {}, "invalid", "$.request: is missing"),
        ("list", None, "internal", "see the worker's log"),
    ],
)
async def test_an_error_has_its_message_and_leaks_nothing_else(
    server: Server, verb: str, body: object, code: str, part: str
) -> None:
    async with asked(server) as to:
        error = (await to.ask(verb, body))["error"]

        assert error["code"] == code
        assert part in error["message"]
        assert "secret" not in error["message"]


JSON = {"Content-Type": "application/json"}


def objects(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data)
    return found


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"{}", None),
        (b' \n{"newer": [1]}', None),
        (b"", JSON),
        (b"", {"accept": "text/plain, Application/JSON; q=0.9"}),
        (b"\x80", {"Accept": "application/json"}),
        (b"{}", JSON | {"Accept": "*/*"}),
    ],
)
async def test_a_query_in_json_or_that_accepts_json_is_answered_in_json(
    server: Server, body: bytes, headers: Mapping[str, str] | None
) -> None:
    async with asked(server) as to:
        answer = await to.caller.request(SUBJECTS.ask("ping"), body, headers=headers)

        assert objects(answer.data) == await to.ask("ping")


async def test_a_query_in_json_may_be_answered_in_msgpack(server: Server) -> None:
    async with asked(server) as to:
        accept = {"Accept": "application/msgpack"}
        answer = await to.caller.request(SUBJECTS.ask("ping"), b"{}", headers=accept)

        assert unpacked(answer.data)["host_id"] == "h1"


@pytest.mark.parametrize(
    ("verb", "body", "code", "part"),
    [
        ("result", b'{"id": "c-1"}', "not_found", "c-1 is not known"),
        ("result", b"{}", "invalid", "$.id: is missing"),
        ("result", b'{"id": 5}', "invalid", "$.id"),
        ("result", b'{"id": "a", "id": "b"}', "invalid", "$.id: duplicate key"),
        ("result", b'{"id": NaN}', "invalid", "$.id: got NaN"),
        ("result", b'{"id": 18446744073709551616}', "invalid", "more than 64 bits"),
        ("result", b'{"id": "\xff"}', "invalid", "invalid JSON"),
        ("result", b"[1]", "invalid", "expected a map, got array"),
        ("result", b"id", "invalid", "invalid JSON"),
        ("result", b"{" * 200, "invalid", "at most 128"),
        ("result", b'{"id": "' + b"x" * 66_000, "invalid", "at most 65536"),
        ("describe", b'{"tenant_id": "a", "pool_id": "p"}', "invalid", "set both or neither"),
        ("list", b"{}", "internal", "see the worker's log"),
    ],
)
async def test_an_error_of_a_query_in_json_is_json_with_the_field_at_fault(
    server: Server, verb: str, body: bytes, code: str, part: str
) -> None:
    async with asked(server) as to:
        error = objects((await to.caller.request(SUBJECTS.ask(verb), body)).data)["error"]

        assert error["code"] == code
        assert part in error["message"]
        assert "secret" not in error["message"]


async def test_what_a_tool_without_msgpack_sends_is_answered_as_text(server: Server) -> None:
    """The bytes of `nats req hostd.v1.test.h1.ask.describe '{"tenant_id": "a"}'`.

    The protocol by hand: that tool is in no package of Debian 12.
    """
    async with asked(server):
        reader, writer = await asyncio.open_connection(
            *server.url.removeprefix("nats://").split(":")
        )
        try:
            body = b'{"tenant_id": "a"}'
            subject = SUBJECTS.ask("describe").encode()
            writer.write(b'CONNECT {"verbose":false,"headers":true}\r\nSUB _INBOX.cli.* 1\r\n')
            writer.write(b"PUB %s _INBOX.cli.1 %d\r\n%s\r\n" % (subject, len(body), body))
            async with asyncio.timeout(10):
                await reader.readuntil(b"MSG _INBOX.cli.1 1 ")
                size = int(await reader.readline())
                answer = await reader.readexactly(size)
        finally:
            writer.close()
            await writer.wait_closed()

        assert answer == b'{"v":1,"asked":["a",null,null]}'


async def test_a_query_that_is_not_msgpack_is_answered_with_an_error(server: Server) -> None:
    async with asked(server) as to:
        answer = await to.caller.request(SUBJECTS.ask("describe"), b"\xc1" * 100)

        assert unpacked(answer.data)["error"]["code"] == "invalid"


@pytest.mark.parametrize(
    ("size", "config"), [(ANSWER_BYTES + 1, ""), (60_000, "max_payload: 50000")]
)
async def test_an_answer_above_the_payload_limit_is_an_error(
    tmp_path: Path, size: int, config: str
) -> None:
    async with running_server(tmp_path / "nats", config=config) as server, asked(server) as to:
        to.source.size = size

        assert (await to.ask("ping"))["error"]["code"] == "exhausted"
        in_json = await to.caller.request(SUBJECTS.ask("ping"), b"{}")
        assert objects(in_json.data)["error"]["code"] == "exhausted"
        assert to.bus.reconnects == 0


async def test_a_flood_of_one_asker_is_dropped_and_another_is_answered(server: Server) -> None:
    async with asked(server) as to, connection_to(server.url) as flooder:
        for n in range(2000):
            await flooder.send(SUBJECTS.ask("status"), b"", reply=f"_INBOX.flood.{n}")
        assert await eventually(lambda: to.service.dropped > 1000, 10)

        # None of the flooder's questions has ended: the source waits for its gate.
        assert (await to.ask("ping"))["host_id"] == "h1"


async def test_a_slow_query_does_not_delay_others(server: Server) -> None:
    async with asked(server) as to:
        slow = [asyncio.create_task(to.ask("status")) for _ in range(5)]

        assert (await to.ask("ping"))["host_state"] == "ready"

        assert not any(task.done() for task in slow)
        to.source.gate.set()
        assert len(await asyncio.gather(*slow)) == 5


@pytest.mark.parametrize("subject", [SUBJECTS.ask("ping"), "$SRV.PING"])
async def test_an_answer_is_sent_to_inboxes_only(server: Server, subject: str) -> None:
    async with asked(server) as to:
        got: list[Message] = []

        def note(message: Message) -> None:
            got.append(message)

        await to.caller.subscribe("$KV.>", note)
        await to.caller.request("$JS.API.INFO", b"")
        await to.caller.send(subject, b"", reply="$KV.HOSTD_STATE_test.h1.host")

        assert await eventually(lambda: to.service.dropped == 1, 5)
        await to.ask("ping")
        assert got == []


async def test_micro_tools_can_read_discovery(server: Server) -> None:
    async with asked(server) as to:
        ping = json.loads((await to.caller.request("$SRV.PING", b"")).data)
        info = json.loads((await to.caller.request("$SRV.INFO.hostd", b"")).data)
        stats = json.loads((await to.caller.request(f"$SRV.STATS.hostd.{HOST}", b"")).data)

        assert ServicePing.from_dict(ping).metadata == {
            "host_id": HOST,
            "cell": SUBJECTS.cell,
            "version": "1.2.3",
            "protocol": "1-2",
        }
        names = {endpoint.name for endpoint in ServiceInfo.from_dict(info).endpoints}
        assert names == {"ping", "status", "list", "describe", "usage", "result", "explain"}
        counts = {e.name: e.num_requests for e in ServiceStats.from_dict(stats).endpoints}
        assert counts["ping"] >= 1
        assert [ping["type"], info["type"], stats["type"]] == [
            f"io.nats.micro.v1.{kind}_response" for kind in ("ping", "info", "stats")
        ]


async def test_discovery_names_the_schemas_of_each_endpoint(server: Server) -> None:
    ids = {name: document["$id"] for name, document in documents().items()}

    async with asked(server) as to:
        info = json.loads((await to.caller.request("$SRV.INFO.hostd", b"")).data)

    found = {each.name: each.metadata for each in ServiceInfo.from_dict(info).endpoints}
    assert found == {
        verb: {
            "request_schema": ids[f"ask.{verb}.request"],
            "response_schema": ids[f"ask.{verb}.answer"],
            "schema_version": SCHEMA_VERSION,
        }
        for verb in REQUESTS
    }


async def test_the_statistics_have_the_last_error_the_time_and_the_hosts_numbers(
    server: Server,
) -> None:
    async with asked(server) as to:
        await to.ask("result", {"id": "c-1"})
        await to.ask("result", {"id": 5})
        stats = json.loads((await to.caller.request("$SRV.STATS.hostd", b"")).data)

        of = {endpoint["name"]: endpoint for endpoint in stats["endpoints"]}
        assert (of["result"]["num_requests"], of["result"]["num_errors"]) == (2, 2)
        assert of["result"]["last_error"] == "invalid: $.id: Expected str, got int"
        assert of["result"]["processing_time"] >= of["result"]["average_processing_time"] > 0
        assert of["ping"]["last_error"] == ""
        assert of["status"]["data"] == {"unfinished": 3}


@pytest.mark.parametrize("how", ["restart", "rebuild"])
async def test_queries_are_answered_again_after(server: Server, how: str) -> None:
    async with asked(server) as to:
        if how == "restart":
            await server.crash()
        else:
            assert to.bus.connection.client is not None
            await to.bus.connection.client.close()

        await answering(to)

        assert (await to.ask("ping"))["v"] == 1


async def test_closing_answers_the_requests_already_received(server: Server) -> None:
    async with asked(server) as to:
        waiting = asyncio.create_task(to.ask("status"))
        assert await eventually(lambda: to.service._queue.busy, 5)
        closing = asyncio.create_task(to.service.close())
        await asyncio.sleep(0)
        to.source.gate.set()

        assert (await waiting)["v"] == 1
        await closing
