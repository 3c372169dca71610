"""Each defect of nats-py that stops the connection: repaired with its guard, seen without it.

Pings are slow here, unless they are what is tested: they would heal most of it, too late.
"""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from nats import errors

from tests.broker.proxy import proxied
from tests.broker.server import QUICK, Host, Server, consuming_host, eventually
from worker.bus.guarded_client import ALL_GUARDS, Guard
from worker.bus.protocol import BusError

SLOW_PINGS = replace(QUICK, ping_s=60.0, heartbeat_s=14.0, pull_expires_s=30.0)
HEALS_S, DEAF_S = 8.0, 2.0


def guard_cases(*off: Guard, also_off: tuple[Guard, ...] = ()) -> list[object]:
    """Everything on but what would heal the same later; and the guards in question off too."""
    rest = ALL_GUARDS - set(also_off)
    return [
        pytest.param(rest, True, id="guarded"),
        pytest.param(rest - set(off), False, id="without"),
    ]


async def still_delivers(host: Host, expected: bool) -> None:
    sender = asyncio.create_task(host.command(b"after"))
    arrived = await host.receiver.wait_for(b"after", HEALS_S if expected else DEAF_S)
    assert arrived == expected
    await sender


@pytest.mark.parametrize(
    ("guards", "heals"), guard_cases(Guard.LATE_PONG, also_off=(Guard.DEAD_READER,))
)
async def test_a_pong_after_its_timeout(
    server: Server, guards: frozenset[Guard], heals: bool
) -> None:
    async with consuming_host(server, guards=guards, tuning=SLOW_PINGS) as host:
        assert host.bus.connection.client is not None
        server.pause()
        with pytest.raises(errors.FlushTimeoutError):
            await host.bus.connection.client.flush(timeout=0.2)  # type: ignore[arg-type]
        server.go_on()

        await still_delivers(host, heals)

        assert host.bus.connected


@pytest.mark.parametrize(("guards", "heals"), guard_cases(Guard.DEAD_READER))
async def test_an_exception_in_the_parser(
    server: Server, guards: frozenset[Guard], heals: bool
) -> None:
    async with consuming_host(server, guards=guards, tuning=SLOW_PINGS) as host:
        client = host.bus.connection.client
        assert client is not None
        good = client.take

        def bad(*_: object) -> bool:
            client.take = good  # type: ignore[method-assign]
            raise RuntimeError("the parser met what it did not expect")

        client.take = bad  # type: ignore[method-assign, assignment]
        await host.command(b"poison")

        await still_delivers(host, heals)

        assert host.bus.connected


@pytest.mark.parametrize(
    ("guards", "heals"), guard_cases(Guard.DEAD_READER, also_off=(Guard.PARSER,))
)
async def test_an_error_line_that_the_parser_cannot_read(
    server: Server, guards: frozenset[Guard], heals: bool
) -> None:
    async with (
        proxied(server.port) as proxy,
        consuming_host(server, guards=guards, tuning=SLOW_PINGS, url=proxy.url) as host,
    ):
        proxy.inject(b"-ERR \r\n")

        await still_delivers(host, heals)


@pytest.mark.parametrize(
    ("guards", "heals"), guard_cases(Guard.FATAL_ERR, also_off=(Guard.REBUILD,))
)
@pytest.mark.parametrize(
    "line", ["User Authentication Expired", "Maximum Connections Exceeded", "Slow Consumer"]
)
async def test_an_err_line_does_not_close_the_client(
    server: Server, guards: frozenset[Guard], heals: bool, line: str
) -> None:
    async with (
        proxied(server.port) as proxy,
        consuming_host(server, guards=guards, tuning=SLOW_PINGS, url=proxy.url) as host,
    ):
        client = host.bus.connection.client
        proxy.inject(f"-ERR '{line}'\r\n".encode())
        if not heals:  # what is delivered before the line was read says nothing
            assert client is not None
            assert await eventually(lambda: client.is_closed, 5)

        await still_delivers(host, heals)

        assert not heals or host.bus.connection.client is client


@pytest.mark.parametrize(("guards", "heals"), guard_cases(Guard.REBUILD))
async def test_a_client_that_closed_is_replaced(
    server: Server, guards: frozenset[Guard], heals: bool
) -> None:
    async with consuming_host(server, guards=guards) as host:
        assert host.bus.connection.client is not None
        await host.bus.connection.client.close()

        await still_delivers(host, heals)


@pytest.mark.parametrize(("guards", "heals"), guard_cases(Guard.DISCARD))
async def test_a_client_that_cannot_be_closed_is_replaced(
    server: Server, guards: frozenset[Guard], heals: bool
) -> None:
    async with consuming_host(server, guards=guards) as host:
        client = host.bus.connection.client
        assert client is not None
        assert client._transport is not None

        def bad() -> None:
            raise RuntimeError("closing met what it did not expect")

        client._transport.close = bad  # type: ignore[method-assign]
        await server.crash()

        await still_delivers(host, heals)


@pytest.mark.parametrize("which", ["loss", "up"])
@pytest.mark.parametrize(
    ("guards", "heals"),
    guard_cases(Guard.SAFE_CALLBACKS, also_off=(Guard.REBUILD, Guard.HEARTBEAT)),
)
async def test_a_callback_that_raises(
    server: Server, guards: frozenset[Guard], heals: bool, which: str
) -> None:
    # As when the observer of the connection has a bug: it must not end the reconnecting.
    async with consuming_host(server, guards=guards) as host:

        def bad(*_: object) -> None:
            raise RuntimeError("a bug in an observer")

        if which == "loss":
            host.bus.connection.on_loss(bad)
        else:
            host.bus.connection._listeners.insert(0, bad)
        await server.crash()

        await still_delivers(host, heals)


@pytest.mark.parametrize(("guards", "heals"), guard_cases(Guard.PING))
async def test_a_stalled_connection_is_detected(
    server: Server, guards: frozenset[Guard], heals: bool
) -> None:
    async with (
        proxied(server.port) as proxy,
        consuming_host(server, guards=guards - {Guard.HEARTBEAT}, url=proxy.url) as host,
    ):
        proxy.stall()

        await still_delivers(host, heals)


@pytest.mark.parametrize(("guards", "heals"), guard_cases(Guard.ABORT))
async def test_a_stalled_connection_with_unsent_data_is_aborted(
    server: Server, guards: frozenset[Guard], heals: bool
) -> None:
    async with (
        proxied(server.port) as proxy,
        consuming_host(server, guards=guards, url=proxy.url) as host,
    ):
        assert host.bus.connection.client is not None
        proxy.stall()
        block = b"x" * 1_000_000
        sends = [asyncio.create_task(host.bus.connection.send("x.y", block)) for _ in range(16)]

        await still_delivers(host, heals)

        for send in sends:
            send.cancel()
        await asyncio.gather(*sends, return_exceptions=True)


@pytest.mark.parametrize(("guards", "fast"), guard_cases(Guard.FAIL_FAST))
async def test_a_request_fails_when_the_connection_is_lost(
    server: Server, guards: frozenset[Guard], fast: bool
) -> None:
    async with consuming_host(server, guards=guards) as host:

        def no_answer(_: object) -> None: ...

        await host.admin.subscribe("silent", no_answer)
        await host.admin.request("$JS.API.INFO", b"")
        waiting = asyncio.create_task(host.bus.connection.request("silent", b"", timeout_s=30))
        await asyncio.sleep(0)
        await server.restart()

        assert await eventually(waiting.done, HEALS_S if fast else DEAF_S) == fast
        if fast:
            assert isinstance(waiting.exception(), BusError)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


def authorization(password: str) -> str:
    return f"""
    authorization {{ users: [
      {{ user: host, password: "{password}" }}, {{ user: admin, password: admin }}
    ] }}"""


@pytest.mark.parametrize("reread", [True, False])
async def test_rotated_credentials_are_used_without_a_restart(
    server: Server, tmp_path: Path, reread: bool
) -> None:
    admin, creds = tmp_path / "admin.creds", tmp_path / "host.creds"
    for file, text in ((admin, "admin:admin"), (creds, "host:first")):
        file.write_text(text)
        file.chmod(0o600)
    server.configure(authorization("first"))
    server.reload()
    guards = ALL_GUARDS if reread else ALL_GUARDS - {Guard.REREAD_CREDS}
    async with consuming_host(
        server, guards=guards, creds=str(creds), admin_creds=str(admin)
    ) as host:
        await host.command(b"before")
        assert await host.receiver.wait_for(b"before", HEALS_S)

        creds.write_text("host:second\n")
        server.configure(authorization("second"))
        server.reload()
        assert await eventually(lambda: host.bus.reconnects > 0 or not host.bus.connected, 5)

        await still_delivers(host, reread)
