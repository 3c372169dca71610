"""The control server: typed answers, bounds against any client, and what it refuses."""

import asyncio
import json
import os
import stat
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog

from handlers.errors import Conflict, Failure, HostFault, Invalid, NotFound, Unavailable
from schemas.codes import Code
from tests.unit.control.control_socket import (
    ask,
    connect,
    control_server,
    exchange,
    lines_of,
    request,
)
from worker.control import server as server_module
from worker.control.endpoint import SOCKET
from worker.control.routes import MAX_BODY_BYTES, STATUS, Answer, Body, Route, read_body


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    count: int
    name: str = "x"


async def echo(body: Body) -> Answer:
    wanted = read_body(body, Wanted)
    return {"count": wanted.count, "name": wanted.name}


ECHO = Route("POST", "/v1/echo", echo)


def failing(error: Exception) -> Route:
    async def fail(body: Body) -> Answer:
        raise error

    return Route("POST", "/v1/fail", fail)


async def test_a_route_gets_the_body_and_its_answer_is_json(tmp_path: Path) -> None:
    async with control_server(tmp_path, ECHO):
        assert await ask(tmp_path, "POST", "/v1/echo", {"count": 3}) == (
            200,
            {"count": 3, "name": "x"},
        )


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "$.count"),
        ({"count": "3"}, "$.count"),
        ({"count": True}, "$.count"),
        ({"count": 3, "colour": "y"}, "$"),
        (b'{"count": 1, "count": 2}', "$.count"),
        (b"[1]", "$"),
        (b"\xff", "$"),
        (b'{"count": 1e999}', "$.count"),
        (b"[" * 10_000, "$"),
    ],
)
async def test_a_body_that_is_wrong_is_invalid_and_names_the_field(
    tmp_path: Path, body: object, path: str
) -> None:
    async with control_server(tmp_path, ECHO):
        status, answer = await ask(tmp_path, "POST", "/v1/echo", body)

    assert status == 400
    assert answer["error"]["code"] == "invalid"
    assert answer["error"]["path"] == path
    assert answer["error"]["act"] == "sender"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Conflict("it runs"), 409, "conflict"),
        (NotFound("no such instance"), 404, "not_found"),
        (Unavailable("try again"), 503, "unavailable"),
        (HostFault("no nft"), 500, "host_fault"),
        (FileNotFoundError(2, "No such file", "/x"), 500, "host_fault"),
        (OSError(28, "No space left"), 507, "exhausted"),
    ],
)
async def test_a_failure_is_answered_with_its_code_and_a_status(
    tmp_path: Path, error: Exception, status: int, code: str
) -> None:
    async with control_server(tmp_path, failing(error)):
        got, answer = await ask(tmp_path, "POST", "/v1/fail")

    assert (got, answer["error"]["code"]) == (status, code)
    assert answer["error"]["message"]
    assert answer["error"]["act"] in {"sender", "scheduler", "operator"}


def test_every_code_has_a_status() -> None:
    assert set(STATUS) == set(Code)


async def test_the_path_and_detail_of_a_failure_are_in_the_answer(tmp_path: Path) -> None:
    error: Failure = Invalid("bad", path="$.a", detail={"errno": "EIO"})
    async with control_server(tmp_path, failing(error)):
        _, answer = await ask(tmp_path, "POST", "/v1/fail")

    assert answer["error"] == {
        "code": "invalid",
        "message": "bad",
        "act": "sender",
        "path": "$.a",
        "detail": {"errno": "EIO"},
    }


async def test_a_bug_is_logged_and_its_text_is_not_answered(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logged:
        async with control_server(tmp_path, failing(KeyError("secret"))):
            status, answer = await ask(tmp_path, "POST", "/v1/fail")

    assert (status, answer["error"]["code"]) == (500, "internal")
    assert "secret" not in json.dumps(answer)
    assert [line["event"] for line in logged] == ["control.crashed"]


async def test_an_answer_that_is_no_json_is_a_bug_not_a_lost_connection(tmp_path: Path) -> None:
    async def answer(body: Body) -> Answer:
        return {"x": object()}

    with structlog.testing.capture_logs() as logged:
        async with control_server(tmp_path, Route("GET", "/v1/odd", answer)):
            status, answered = await ask(tmp_path, "GET", "/v1/odd")

    assert (status, answered["error"]["code"]) == (500, "internal")
    assert logged[0]["event"] == "control.crashed"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request("GET", "/v1/nothing"), 404),
        (request("GET", "/v1/echo?x=1"), 404),
        (request("GET", "/v1/echo"), 405),
        (b"\x16\x03\x01 not http\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (request("POST", "/v1/echo", b"x" * (MAX_BODY_BYTES + 1)), 400),
        (request("POST", "/v1/echo", b"x" * (4 * MAX_BODY_BYTES)), 400),
    ],
)
async def test_other_requests_are_refused(tmp_path: Path, sent: bytes, status: int) -> None:
    async with control_server(tmp_path, ECHO):
        got, body = await exchange(tmp_path, sent)

    assert got == status
    assert json.loads(body)["error"]["code"] in {"invalid", "not_found"}


async def test_an_unknown_route_is_answered_with_those_that_exist(tmp_path: Path) -> None:
    async with control_server(tmp_path, ECHO):
        _, answer = await ask(tmp_path, "GET", "/v1/nothing")
        _, wrong_method = await ask(tmp_path, "PUT", "/v1/echo")

    assert "there are /v1/echo" in answer["error"]["message"]
    assert wrong_method["error"]["message"] == "/v1/echo takes POST, not PUT"


async def test_a_route_that_writes_is_refused_while_the_journal_cannot_commit(
    tmp_path: Path,
) -> None:
    writable = False
    route = Route("POST", "/v1/write", echo, writes=True)
    async with control_server(tmp_path, ECHO, route, writable=lambda: writable):
        refused = await ask(tmp_path, "POST", "/v1/write", {"count": 1})
        read = await ask(tmp_path, "POST", "/v1/echo", {"count": 1})
        writable = True
        written = await ask(tmp_path, "POST", "/v1/write", {"count": 1})

    assert refused[0] == 503
    assert refused[1]["error"]["code"] == "unavailable"
    assert (read[0], written[0]) == (200, 200)


# -- routes that take long -------------------------------------------------------------------------


async def test_progress_comes_line_by_line_before_the_result(tmp_path: Path) -> None:
    seen = asyncio.Event()

    async def work(body: Body) -> AsyncGenerator[Answer]:
        yield {"progress": {"n": 1}}
        await seen.wait()  # the client has read the first line
        yield {"result": {"n": 2}}

    async with control_server(tmp_path, Route("POST", "/v1/work", work)):
        reader, writer = await connect(tmp_path)
        writer.write(request("POST", "/v1/work"))
        head = await reader.readuntil(b'{"progress":{"n":1}}')
        seen.set()
        rest = await reader.read()
        writer.close()

    assert b"application/x-ndjson" in head
    assert b'{"result":{"n":2}}' in rest


@pytest.mark.parametrize(
    ("error", "code"), [(Conflict("no"), "conflict"), (KeyError("secret"), "internal")]
)
async def test_a_failure_after_progress_is_the_last_line(
    tmp_path: Path, error: Exception, code: str
) -> None:
    async def work(body: Body) -> AsyncGenerator[Answer]:
        yield {"progress": {}}
        raise error

    async with control_server(tmp_path, Route("POST", "/v1/work", work)):
        status, body = await exchange(tmp_path, request("POST", "/v1/work"))

    first, last = lines_of(body)
    assert (status, first) == (200, {"progress": {}})
    assert last["error"]["code"] == code


async def test_a_client_that_goes_away_ends_its_request(tmp_path: Path) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work(body: Body) -> AsyncGenerator[Answer]:
        try:
            begun.set()
            await asyncio.Event().wait()
            yield {}
        finally:
            ended.set()

    async with control_server(tmp_path, Route("POST", "/v1/work", work)) as server:
        _, writer = await connect(tmp_path)
        writer.write(request("POST", "/v1/work"))
        await begun.wait()
        writer.close()
        async with asyncio.timeout(10):
            await ended.wait()
            while server.connections.count:
                await asyncio.sleep(0)


# -- bounds ----------------------------------------------------------------------------------------


async def test_a_request_that_never_ends_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "REQUEST_TIMEOUT_S", 0.05)

    async with control_server(tmp_path, ECHO):
        assert await exchange(tmp_path, b"POST /v1/echo HTTP/1.1\r\n") == (0, b"")
        unfinished = request("POST", "/v1/echo", {"count": 1})[:-1]
        assert await exchange(tmp_path, unfinished) == (0, b"")


async def test_a_route_without_progress_that_takes_too_long_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "ANSWER_TIMEOUT_S", 0.05)

    async def forever(body: Body) -> Answer:
        await asyncio.Event().wait()
        return {}

    async with control_server(tmp_path, Route("GET", "/v1/forever", forever)):
        status, answer = await ask(tmp_path, "GET", "/v1/forever")

    assert (status, answer["error"]["code"]) == (503, "unavailable")


async def test_a_client_that_does_not_read_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "WRITE_TIMEOUT_S", 0.05)
    ended = asyncio.Event()

    async def flood(body: Body) -> AsyncGenerator[Answer]:
        try:
            while True:
                yield {"progress": "x" * 60_000}
        finally:
            ended.set()

    async with control_server(tmp_path, Route("POST", "/v1/flood", flood)):
        _, writer = await connect(tmp_path)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(request("POST", "/v1/flood"))
        async with asyncio.timeout(10):
            await ended.wait()
        writer.close()


async def test_connections_above_the_limit_are_closed_and_the_others_served(
    tmp_path: Path,
) -> None:
    async with control_server(tmp_path, ECHO):
        idle = [await connect(tmp_path) for _ in range(server_module.MAX_PER_PROCESS)]
        assert await exchange(tmp_path, request("POST", "/v1/echo", {"count": 1})) == (0, b"")

        reader, writer = idle[0]
        writer.write(request("POST", "/v1/echo", {"count": 1}))
        assert (await reader.read()).startswith(b"HTTP/1.1 200")

        for _, writer in idle:
            writer.close()


# -- the socket ------------------------------------------------------------------------------------


async def test_only_its_owner_can_open_the_socket_and_it_is_gone_afterwards(
    tmp_path: Path,
) -> None:
    previous = os.umask(0)
    try:
        async with control_server(tmp_path, ECHO):
            found = (tmp_path / SOCKET).stat()
    finally:
        os.umask(previous)

    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert not (tmp_path / SOCKET).exists()


async def test_the_socket_of_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    async with control_server(tmp_path, ECHO) as killed:
        (tmp_path / SOCKET).rename(tmp_path / "kept")  # so that its orderly end leaves it
        (tmp_path / SOCKET).write_text("left")
        async with control_server(tmp_path, ECHO):
            assert (await ask(tmp_path, "POST", "/v1/echo", {"count": 1}))[0] == 200
        assert killed.connections.count == 0


async def test_a_run_directory_with_a_path_longer_than_an_address_is_served(
    tmp_path: Path,
) -> None:
    run = tmp_path / ("long" * 40)

    async with control_server(run, ECHO):
        assert (await ask(run, "POST", "/v1/echo", {"count": 1}))[0] == 200


async def test_a_name_that_is_taken_is_logged_and_the_worker_goes_on(tmp_path: Path) -> None:
    (tmp_path / SOCKET).mkdir()

    with structlog.testing.capture_logs() as logged:
        async with control_server(tmp_path, ECHO):
            pass

    assert [line["event"] for line in logged] == ["control.listen_failed"]
    assert (tmp_path / SOCKET).is_dir()


async def test_leaving_it_ends_requests(tmp_path: Path) -> None:
    begun = asyncio.Event()
    ended: list[Any] = []

    async def forever(body: Body) -> Answer:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(body)
        return {}

    async with control_server(tmp_path, Route("GET", "/v1/forever", forever)):
        reader, writer = await connect(tmp_path)
        writer.write(request("GET", "/v1/forever"))
        await begun.wait()

    assert ended == [{}]
    assert await reader.read() == b""
    writer.close()
