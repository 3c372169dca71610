"""The health server: ready only when all checks are true; limits against any client."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from handlers.errors import HostFault
from worker import health
from worker.descriptors import DescriptorReserve
from worker.health import HealthServer
from worker.metrics import Metrics


class State:
    """The checks, as a test sets them."""

    def __init__(self) -> None:
        self.checks = {"recovered": True, "connected": True, "can_commit": True}


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
async def server(state: State) -> AsyncIterator[HealthServer]:
    async with HealthServer(
        "127.0.0.1:0", Metrics("9.9"), lambda: state.checks, DescriptorReserve(2)
    ) as server:
        yield server


async def exchange(server: HealthServer, sent: bytes) -> tuple[int, bytes]:
    """Status (0: closed without one) and body of one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        async with asyncio.timeout(10):
            writer.write(sent)
            answer = await reader.read()
    except ConnectionResetError:
        return 0, b""
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def test_metrics_are_served(server: HealthServer) -> None:
    status, body = await exchange(server, get("/metrics"))

    assert status == 200
    assert b'hostd_build_info{version="9.9"} 1.0' in body


async def test_alive_whatever_the_checks_say(server: HealthServer, state: State) -> None:
    state.checks["connected"] = False

    assert (await exchange(server, get("/livez")))[0] == 200


@pytest.mark.parametrize("failing", ["recovered", "connected", "can_commit"])
async def test_ready_only_if_every_check_holds(
    server: HealthServer, state: State, failing: str
) -> None:
    status, body = await exchange(server, get("/readyz"))
    assert status == 200
    assert json.loads(body)["ok"] is True

    state.checks[failing] = False
    status, body = await exchange(server, get("/readyz?verbose"))

    assert status == 503
    assert json.loads(body) == {"ok": False, "checks": state.checks}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (get("/"), 404),
        (get("/metrics/../etc"), 404),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", 405),
        (b"\x16\x03\x01 not http\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 20_000 + b"\r\n\r\n", 431),
    ],
)
async def test_other_requests_are_rejected(server: HealthServer, sent: bytes, status: int) -> None:
    assert (await exchange(server, sent))[0] == status


async def test_a_request_that_never_ends_is_cut(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "REQUEST_TIMEOUT_S", 0.05)

    assert await exchange(server, b"GET /metrics HTTP/1.1\r\n") == (0, b"")


async def test_connections_above_the_limit_are_closed_and_the_others_served(
    server: HealthServer,
) -> None:
    idle = [
        await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(health.MAX_CONNECTIONS)
    ]
    assert await exchange(server, get("/livez")) == (0, b"")

    reader, writer = idle[0]
    writer.write(get("/livez"))
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200")

    for _, writer in idle:
        writer.close()


async def test_one_address_leaves_connections_for_another(server: HealthServer) -> None:
    idle = [
        await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(health.MAX_CONNECTIONS)
    ]
    assert await exchange(server, get("/livez")) == (0, b"")

    reader, writer = await asyncio.open_connection(
        "127.0.0.1", server.port, local_addr=("127.0.0.2", 0)
    )
    writer.write(get("/livez"))

    assert (await reader.read()).startswith(b"HTTP/1.1 200")
    for _, each in [*idle, (reader, writer)]:
        each.close()


async def test_leaving_it_closes_open_connections(state: State) -> None:
    async with HealthServer(
        "127.0.0.1:0", Metrics("1"), lambda: state.checks, DescriptorReserve(2)
    ) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        port = server.port
        await exchange(server, get("/livez"))

    assert await reader.read() == b""
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_an_address_in_use_is_named_with_its_setting(server: HealthServer) -> None:
    second = HealthServer(f"127.0.0.1:{server.port}", Metrics("9.9"), dict, DescriptorReserve(0))

    with pytest.raises(HostFault) as caught:
        await second.__aenter__()

    assert caught.value.message == (
        f"cannot listen on 127.0.0.1:{server.port}: Address already in use: change [metrics] "
        "listen, or stop the process that uses this address"
    )
