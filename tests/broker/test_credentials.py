"""Decentralised JWT credentials: the worker's connection signs in with a NATS credentials file."""

import asyncio
import base64
import hashlib
import json
import os
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nkeys
import pytest

from schemas.settings import NatsSettings, Settings
from tests.broker.server import Server, running_server
from worker.bus.connection import Connection
from worker.bus.protocol import BusError
from worker.cli.client import connect
from worker.cli.context import CliError


def new_key(prefix: int) -> nkeys.KeyPair:
    """A fresh key of a role: operator, account or user."""
    seed = nkeys.encode_seed(os.urandom(32), prefix)
    return nkeys.from_seed(bytearray(seed))


def signed(issuer: nkeys.KeyPair, subject: nkeys.KeyPair, nats: dict[str, Any]) -> str:
    """A NATS JWT (version 2, `ed25519-nkey`) of `subject`, signed by `issuer`."""
    claims: dict[str, Any] = {
        "iat": int(time.time()),
        "iss": issuer.public_key.decode(),
        "sub": subject.public_key.decode(),
        "name": "test",
        "nats": {"version": 2, **nats},
    }
    digest = hashlib.sha256(json.dumps(claims).encode()).digest()
    claims["jti"] = base64.b32encode(digest).decode().rstrip("=")
    parts = [_b64(json.dumps(p).encode()) for p in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims)]
    return f"{'.'.join(parts)}.{_b64(issuer.sign('.'.join(parts).encode()))}"


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@dataclass
class SignedIn:
    """A server with decentralised JWTs, and the file of its only user."""

    server: Server
    creds: Path

    def write(self, text: str) -> None:
        """Replace the file, as a rotation does."""
        new = self.creds.with_suffix(".new")
        new.write_text(text)
        new.chmod(0o600)
        new.rename(self.creds)


@asynccontextmanager
async def server_of_jwts(directory: Path) -> AsyncGenerator[SignedIn]:
    operator = new_key(nkeys.PREFIX_BYTE_OPERATOR)
    account = new_key(nkeys.PREFIX_BYTE_ACCOUNT)
    system = new_key(nkeys.PREFIX_BYTE_ACCOUNT)
    user = new_key(nkeys.PREFIX_BYTE_USER)
    limits = {"subs": -1, "conn": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1}
    storage = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
    account_jwt = signed(
        operator,
        account,
        {"type": "account", "limits": {**limits, **storage, "wildcards": True, "leaf": -1}},
    )
    system_jwt = signed(operator, system, {"type": "account", "limits": limits})
    user_jwt = signed(
        account, user, {"type": "user", "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1}
    )
    seed = user.seed
    assert seed is not None
    server = Server(
        str(directory / "nats"),
        config=(
            f"operator: {signed(operator, operator, {'type': 'operator'})}\n"
            f"system_account: {system.public_key.decode()}\n"
            "resolver: MEMORY\n"
            f"resolver_preload {{ {account.public_key.decode()}: {account_jwt}\n"
            f"{system.public_key.decode()}: {system_jwt} }}\n"
        ),
    )
    found = SignedIn(server, directory / "host.creds")
    found.write(
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed.decode()}\n------END USER NKEY SEED------\n"
    )
    await server.start()
    try:
        yield found
    finally:
        await server.stop()


async def test_the_connection_authenticates_with_a_jwt_credentials_file(tmp_path: Path) -> None:
    async with server_of_jwts(tmp_path) as host:
        connection = connection_of(host)
        try:
            await connection.start()
            await asyncio.wait_for(connection.wait_connected(), 10)
            answer = await connection.request("$JS.API.INFO", b"")

            assert json.loads(answer.data)["limits"]["max_streams"] == -1
        finally:
            await connection.close()


async def test_a_rotation_to_a_damaged_file_is_mended_by_the_next_one(tmp_path: Path) -> None:
    async with server_of_jwts(tmp_path) as host:
        sound = host.creds.read_text()
        connection = connection_of(host)
        host.write(sound.replace("NKEY SEED-----\nSU", "NKEY SEED-----\nXX"))
        try:
            await connection.start()
            async with asyncio.timeout(10):
                while not connection.failures:
                    await asyncio.sleep(0.01)
            host.write(sound)
            await asyncio.wait_for(connection.wait_connected(), 20)

            host.write(sound.partition("-----BEGIN USER NKEY")[0])
            settings = NatsSettings(url=host.server.url, creds=str(host.creds))
            with pytest.raises(BusError, match="expected the seed of a NATS user"):
                await connection.reload(settings)
            assert connection.connected
        finally:
            await connection.close()


def connection_of(host: SignedIn) -> Connection:
    settings = NatsSettings(url=host.server.url, creds=str(host.creds))
    return Connection(settings, name="jwt", inbox="_INBOX.jwt")


async def test_the_command_line_signs_in_with_the_same_file_as_the_worker(tmp_path: Path) -> None:
    creds = tmp_path / "creds"
    creds.write_text("host:one")
    creds.chmod(0o600)
    async with running_server(
        tmp_path / "nats", config="authorization { user: host, password: one }"
    ) as server:
        settings = Settings(nats=NatsSettings(url=server.url, creds=str(creds)))
        async with connect(settings) as client:
            assert client.nats.is_connected

        creds.chmod(0o644)
        with pytest.raises(CliError, match="readable by group or others; chmod 600"):
            async with connect(settings):
                pass
