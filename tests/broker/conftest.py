"""Fixtures of the broker tests: one fresh nats-server per test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.broker.server import Server, running_server


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A nats-server with JetStream on a free loopback port."""
    async with running_server(tmp_path / "nats") as started:
        yield started
