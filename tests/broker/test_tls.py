"""TLS: the server's certificate is checked against `[nats] tls`, and a lost connection comes back.

Also in Python 3.11.2, Debian 12's, whose TLS transport raises AttributeError when it is aborted
after it was closed twice, as nats-py does.
"""

import asyncio
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path

import pytest
from msgspec.structs import replace
from nats.aio.transport import TcpTransport

from schemas.settings import NatsSettings, Settings
from tests.broker.proxy import Proxy, proxied
from tests.broker.server import QUICK, Server, eventually, running_server
from tests.broker.test_guarded_client import DEAF_S, HEALS_S, guard_cases
from worker.bus.connection import Connection
from worker.bus.guarded_client import ALL_GUARDS, Guard, GuardedClient
from worker.cli.client import connect
from worker.cli.context import NoAnswer

BLOCK = b"x" * 1_000_000


def authority(directory: Path, name: str) -> Path:
    """A self-signed certificate for 127.0.0.1, its own authority."""
    key, cert = directory / f"{name}.key", directory / f"{name}.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "1", "-subj", f"/CN={name}",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return cert


def tls_config(cert: Path) -> str:
    return f'tls {{ cert_file: "{cert}", key_file: "{cert.with_suffix(".key")}" }}'


@asynccontextmanager
async def linked_by_tls(
    directory: Path, *, guards: frozenset[Guard]
) -> AsyncGenerator[tuple[Connection, Server, Proxy]]:
    """A connection over TLS and a proxy to a server; connected."""
    cert = authority(directory, "server")
    async with (
        running_server(directory / "nats", config=tls_config(cert)) as server,
        proxied(server.port) as proxy,
    ):
        settings = NatsSettings(url=proxy.url, tls=str(cert))
        connection = Connection(
            settings, name="tls", inbox="_INBOX.tls", guards=guards, tuning=QUICK
        )
        await connection.start()
        try:
            await asyncio.wait_for(connection.wait_connected(), 10)
            yield connection, server, proxy
        finally:
            await connection.close()


async def answers(connection: Connection) -> bool:
    return b"account_info_response" in (await connection.request("$JS.API.INFO", b"")).data


@pytest.mark.parametrize("trusted", [True, False])
async def test_only_a_certificate_of_that_authority_is_trusted(
    tmp_path: Path, trusted: bool
) -> None:
    cert, other = authority(tmp_path, "server"), authority(tmp_path, "other")
    async with running_server(tmp_path / "nats", config=tls_config(cert)) as server:
        settings = NatsSettings(url=server.url, tls=str(cert if trusted else other))
        connection = Connection(settings, name="tls", inbox="_INBOX.tls", tuning=QUICK)
        await connection.start()
        try:
            if trusted:
                await asyncio.wait_for(connection.wait_connected(), 10)
                assert await answers(connection)
            else:
                assert await eventually(lambda: "certificate" in connection.last_error.lower(), 5)
                assert not connection.connected
        finally:
            await connection.close()


def tls_transport(
    connection: Connection,
) -> tuple[GuardedClient, TcpTransport, asyncio.WriteTransport]:
    client = connection.client
    assert isinstance(client, GuardedClient)
    transport = client._transport
    assert isinstance(transport, TcpTransport)
    assert transport._io_writer is not None
    return client, transport, transport._io_writer.transport


async def leave_unsent(connection: Connection) -> None:
    """Send to a stalled peer until the client holds data back, in front of a full TLS transport."""
    client, _, tls = tls_transport(connection)
    _, high = tls.get_write_buffer_limits()  # above that, the client's flusher waits
    sends: list[asyncio.Task[None]] = []
    while connection.connected and not (
        tls.get_write_buffer_size() > high and client.pending_data_size
    ):
        sends.append(asyncio.create_task(connection.send("x.y", BLOCK)))
        await asyncio.sleep(0.005)
    for send in sends:
        send.cancel()
    await asyncio.gather(*sends, return_exceptions=True)


@pytest.mark.parametrize("unsent", [False, True], ids=["all_sent", "unsent"])
@pytest.mark.parametrize("how", ["crash", "restart", "stall"])
async def test_a_lost_connection_comes_back_by_itself(
    tmp_path: Path, how: str, unsent: bool
) -> None:
    async with linked_by_tls(tmp_path, guards=ALL_GUARDS) as (connection, server, proxy):
        client = connection.client
        if how == "stall" or unsent:
            proxy.stall()
        if unsent:
            await leave_unsent(connection)

        if how == "crash":
            await server.crash()
        elif how == "restart":
            await server.restart()

        assert await eventually(lambda: connection.reconnects == 1, HEALS_S)
        assert connection.client is client
        assert await answers(connection)


@pytest.mark.plain_loop  # uvloop's transport aborts also without the guard
@pytest.mark.parametrize(("guards", "let_go"), guard_cases(Guard.RAW_ABORT))
async def test_an_aborted_connection_is_let_go_though_it_was_closed_twice(
    tmp_path: Path, guards: frozenset[Guard], let_go: bool
) -> None:
    # Without: AttributeError in Python 3.11.2; nothing at all in later ones, until 30 s are over.
    async with linked_by_tls(tmp_path, guards=guards - {Guard.PING}) as (connection, _, proxy):
        client, transport, _ = tls_transport(connection)
        close: Callable[[], None] = transport.close
        assert transport._bare_io_writer is not None
        socket = transport._bare_io_writer.get_extra_info("socket")
        proxy.stall()
        await leave_unsent(connection)

        close()
        close()
        with nullcontext() if let_go else suppress(AttributeError):
            client.abort()

        gone = await eventually(lambda: socket.fileno() == -1, HEALS_S if let_go else DEAF_S)
        assert gone == let_go
        transport._bare_io_writer.transport.abort()


SECRET = "hunter2"
USER = f"authorization {{ user: host, password: {SECRET} }}"


def without_tls(data: bytes) -> bytes:
    """INFO as a man in the middle rewrites it; the rest as it is."""
    if not data.startswith(b"INFO "):
        return data
    return data.replace(b'"tls_required":true', b'"tls_required":false').replace(
        b'"tls_verify":true', b'"tls_verify":false'
    )


async def sign_in_of_worker(settings: NatsSettings, attempts: Callable[[], int]) -> str:
    """What the worker's connection reports after some attempts to connect."""
    connection = Connection(settings, name="tls", inbox="_INBOX.tls", tuning=QUICK)
    await connection.start()
    try:
        assert await eventually(lambda: connection.connected or attempts() > 3, 20)
        assert not connection.connected
        return connection.last_error
    finally:
        await connection.close()


async def sign_in_of_cli(settings: NatsSettings, attempts: Callable[[], int]) -> str:
    """What the command line reports."""
    url = settings.url.replace("://", f"://host:{SECRET}@")
    with pytest.raises(NoAnswer) as raised:
        async with connect(Settings(nats=replace(settings, url=url, creds=""))):
            pass
    assert attempts() >= 1
    return str(raised.value)


@pytest.mark.parametrize("how", ["tls://", "[nats] tls"])
@pytest.mark.parametrize("sign_in", [sign_in_of_worker, sign_in_of_cli])
async def test_a_server_that_does_without_tls_gets_no_credential(
    tmp_path: Path, how: str, sign_in: Callable[[NatsSettings, Callable[[], int]], Awaitable[str]]
) -> None:
    cert = authority(tmp_path, "server")
    creds = tmp_path / "creds"
    creds.write_text(f"host:{SECRET}")
    creds.chmod(0o600)
    async with (
        running_server(tmp_path / "nats", config=f"{tls_config(cert)}\n{USER}") as server,
        proxied(server.port) as proxy,
    ):
        proxy.rewrite = without_tls
        settings = NatsSettings(url=proxy.url, tls=str(cert), creds=str(creds))
        if how == "tls://":
            settings = replace(settings, url=proxy.url.replace("nats:", "tls:"), tls="")

        error = await sign_in(settings, lambda: proxy.connections)

        assert "did not offer TLS" in error
        assert b"CONNECT" not in proxy.sent
        assert SECRET.encode() not in proxy.sent


async def test_a_server_learnt_from_another_gets_no_credential(tmp_path: Path) -> None:
    creds = tmp_path / "creds"
    creds.write_text(f"host:{SECRET}")
    creds.chmod(0o600)
    async with (
        running_server(tmp_path / "nats", config=USER) as server,
        proxied(server.port) as named,
        proxied(server.port) as learnt,
    ):
        advert = f'INFO {{"connect_urls":["127.0.0.1:{learnt.port}"],'.encode()
        named.rewrite = lambda data: (
            data.replace(b"INFO {", advert, 1) if data.startswith(b"INFO {") else data
        )
        settings = NatsSettings(url=named.url, creds=str(creds))
        connection = Connection(settings, name="gossip", inbox="_INBOX.g", tuning=QUICK)
        await connection.start()
        try:
            await asyncio.wait_for(connection.wait_connected(), 10)
            named.inject(b'INFO {"connect_urls":["127.0.0.1:%d"]}\r\n' % learnt.port)
            await server.crash()
            assert await eventually(lambda: connection.reconnects == 1, 10)
            before = named.connections
            await server.stop()
            assert await eventually(lambda: named.connections > before + 5, 20)
        finally:
            await connection.close()

    assert learnt.connections == 0
    assert SECRET.encode() in named.sent
