"""Reloaded settings: another credential, server or authority is used; what is invalid is not."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
from msgspec.structs import replace

from handlers.errors import HostFault
from schemas.settings import HostSettings, LogSettings, NatsSettings, Settings, VmmSettings
from tests.broker.server import QUICK, Server, eventually, running_server
from tests.broker.test_tls import answers, authority, tls_config
from worker import logs
from worker.bus.connection import Connection
from worker.reload import Reload
from worker.settings import SettingsError

DEVELOPMENT = HostSettings(production=False)


def user(password: str) -> str:
    return f"authorization {{ user: host, password: {password} }}"


def credentials(path: Path, password: str) -> str:
    path.write_text(f"host:{password}")
    path.chmod(0o600)
    return str(path)


@asynccontextmanager
async def connected(settings: NatsSettings) -> AsyncGenerator[Connection]:
    connection = Connection(settings, name="reload", inbox="_INBOX.reload", tuning=QUICK)
    await connection.start()
    try:
        await asyncio.wait_for(connection.wait_connected(), 10)
        yield connection
    finally:
        await connection.close()


async def test_an_unchanged_connection_is_left_alone(tmp_path: Path) -> None:
    creds = credentials(tmp_path / "creds", "one")
    async with running_server(tmp_path / "nats", config=user("one")) as server:
        settings = NatsSettings(url=server.url, creds=creds)
        async with connected(settings) as connection:
            client = connection.client

            assert not await connection.reload(settings)
            assert connection.client is client


async def test_another_credential_server_and_authority_are_used(tmp_path: Path) -> None:
    creds = credentials(tmp_path / "creds", "one")
    cert = authority(tmp_path, "server")
    async with (
        running_server(tmp_path / "a", config=user("one")) as first,
        running_server(tmp_path / "b", config=f"{user('two')}\n{tls_config(cert)}") as second,
        connected(NatsSettings(url=first.url, creds=creds)) as connection,
    ):
        fresh: list[bool] = []
        connection.on_up(fresh.append)
        await first.stop()
        assert await eventually(lambda: not connection.connected, 5)
        credentials(tmp_path / "creds", "two")

        settings = NatsSettings(url=second.url, creds=creds, tls=str(cert))
        assert await connection.reload(settings)

        await asyncio.wait_for(connection.wait_connected(), 10)
        assert await answers(connection)
        assert fresh == [True]


class Programs:
    """Firecracker's; `used` are the settings by which they were put into effect."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.used: VmmSettings | None = None

    async def reread(self, vmm: VmmSettings) -> Callable[[], None]:
        if self.fault is not None:
            raise self.fault

        def use() -> None:
            self.used = vmm

        return use


def no_such_file(directory: Path, now: NatsSettings) -> NatsSettings:
    return replace(now, creds=f"{directory}/none")


def readable_by_all(directory: Path, now: NatsSettings) -> NatsSettings:
    path = Path(credentials(directory / "open", "two"))
    path.chmod(0o644)
    return replace(now, creds=str(path))


def no_credentials(directory: Path, now: NatsSettings) -> NatsSettings:
    return replace(now, creds=credentials(directory / "empty", "two\nlines"))


def no_authority(directory: Path, now: NatsSettings) -> NatsSettings:
    (directory / "ca.pem").write_text("no certificate")
    return replace(now, tls=f"{directory}/ca.pem")


def plain_beyond_loopback(_directory: Path, now: NatsSettings) -> NatsSettings:
    return replace(now, url="nats://192.0.2.1:4222")


def no_settings(_directory: Path, _now: NatsSettings) -> NatsSettings:
    raise SettingsError("hostd.toml", "nats.url", "is not")


def a_bug(_directory: Path, now: NatsSettings) -> NatsSettings:
    return replace(now, url="tls://[::1:4222")  # which the settings refuse


INVALID = (
    a_bug,
    no_such_file,
    readable_by_all,
    no_credentials,
    no_authority,
    plain_beyond_loopback,
    no_settings,
)


@pytest.mark.parametrize("broken", INVALID)
async def test_what_is_invalid_changes_nothing_and_is_logged(
    server: Server, tmp_path: Path, broken: Callable[[Path, NatsSettings], NatsSettings]
) -> None:
    now = NatsSettings(url=server.url, creds=credentials(tmp_path / "creds", "one"))
    settings = Settings(nats=now)
    async with connected(now) as connection:
        client = connection.client

        def read() -> Settings:
            return replace(settings, nats=broken(tmp_path, now))

        programs = Programs()
        with structlog.testing.capture_logs() as logged:
            await Reload(settings, read, connection, programs.reread).apply()

        assert [line["event"] for line in logged] == ["settings.reload_failed"]
        assert programs.used is None
        assert connection.client is client
        assert await answers(connection)


async def test_production_cannot_be_reloaded_away(server: Server, tmp_path: Path) -> None:
    """The credential of a worker that requires TLS is not sent without it."""
    now = NatsSettings(url=server.url, creds=credentials(tmp_path / "creds", "one"))
    plain = Settings(host=DEVELOPMENT, nats=plain_beyond_loopback(tmp_path, now))
    async with connected(now) as connection:
        client = connection.client
        with structlog.testing.capture_logs() as logged:
            await Reload(Settings(nats=now), lambda: plain, connection, Programs().reread).apply()

        assert [line["event"] for line in logged] == ["settings.reload_failed"]
        assert connection.client is client


@pytest.mark.parametrize(
    "fault",
    [HostFault("no Firecracker to start VMs with"), OSError(30, "Read-only file system")],
)
async def test_programs_that_are_none_change_nothing(
    server: Server, tmp_path: Path, fault: Exception
) -> None:
    now = NatsSettings(url=server.url, creds=credentials(tmp_path / "creds", "one"))
    other = NatsSettings(url=server.url, creds=credentials(tmp_path / "other", "two"))
    async with connected(now) as connection:
        client = connection.client
        programs = Programs(fault)
        new = Settings(nats=other)

        with structlog.testing.capture_logs() as logged:
            await Reload(Settings(nats=now), lambda: new, connection, programs.reread).apply()

        assert [line["event"] for line in logged] == ["settings.reload_failed"]
        assert connection.client is client


async def test_the_programs_are_read_by_the_new_settings_that_can_change(server: Server) -> None:
    now = Settings(host=DEVELOPMENT, nats=NatsSettings(url=server.url))
    vmm = VmmSettings(version="1.13.0", allow_untested=True, versions_dir="/opt/firecracker")
    async with connected(now.nats) as connection:
        programs = Programs()

        with structlog.testing.capture_logs() as logged:
            new = replace(now, vmm=vmm)
            await Reload(now, lambda: new, connection, programs.reread).apply()

        assert programs.used == VmmSettings(version="1.13.0", allow_untested=True)
        assert logged[-1]["need_restart"] == ["vmm.versions_dir"]


async def test_what_needs_a_restart_is_named(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    now = Settings(host=DEVELOPMENT, nats=NatsSettings(url=server.url))
    new = replace(now, log=LogSettings(level="debug"), host=replace(DEVELOPMENT, id="h9"))
    async with connected(now.nats) as connection:
        logs.configure("error")

        await Reload(now, lambda: new, connection, Programs().reread).apply()

        structlog.get_logger().debug("seen")
    out = capsys.readouterr().out
    assert '"need_restart":["host.id"]' in out
    assert '"event":"seen"' in out
