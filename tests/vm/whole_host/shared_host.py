"""One live host for all tests of a module: what they leave on it is what they are about.

A module imports the fixture `host`; its `pytestmark` is `pytest.mark.asyncio(loop_scope="module")`.
"""

from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from schemas.requests import InstanceRef
from tests.live_host import LiveHost, live_host
from tests.plain import unpacked


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[LiveHost]:
    """A worker without any network or instance yet."""
    async with live_host() as made:
        yield made


async def dead_letters(host: LiveHost, reply_id: str) -> list[tuple[dict[str, str], bytes]]:
    """Headers and bytes of what was put aside with that answer."""
    kept = await host.kept(host.subjects.dead_stream)
    return [(headers, data) for _, headers, data in kept if headers["Nats-Msg-Id"] == reply_id]


async def events(host: LiveHost) -> list[dict[str, Any]]:
    """All that was told so far, in the stream's order."""
    return [unpacked(data) for _, _, data in await host.kept(host.subjects.events_stream)]


def ref_of(name: str, tenant: str = "acme") -> InstanceRef:
    """An instance in a pool of its own."""
    return InstanceRef(tenant, f"pool-{name}", name)
