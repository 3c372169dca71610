"""TLS: the server's certificate is checked against the CA file of `[nats] tls`."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from schemas.settings import NatsSettings
from tests.broker.server import QUICK, eventually, running_server
from worker.bus.connection import Connection


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


@pytest.mark.parametrize("trusted", [True, False])
async def test_only_a_certificate_of_that_authority_is_trusted(
    tmp_path: Path, trusted: bool
) -> None:
    cert, other = authority(tmp_path, "server"), authority(tmp_path, "other")
    config = f'tls {{ cert_file: "{cert}", key_file: "{cert.with_suffix(".key")}" }}'
    async with running_server(tmp_path / "nats", config=config) as server:
        settings = NatsSettings(url=server.url, tls=str(cert if trusted else other))
        connection = Connection(settings, name="tls", inbox="_INBOX.tls", tuning=QUICK)
        await connection.start()
        try:
            if trusted:
                await asyncio.wait_for(connection.wait_connected(), 10)
                assert (
                    b"account_info_response" in (await connection.request("$JS.API.INFO", b"")).data
                )
                await server.crash()
                assert await eventually(lambda: connection.reconnects == 1, 10)
            else:
                assert await eventually(lambda: "certificate" in connection.last_error.lower(), 5)
                assert not connection.connected
        finally:
            await connection.close()
