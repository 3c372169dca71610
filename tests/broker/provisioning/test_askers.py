"""Who asks from another account, with the example's accounts and a real server."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from tests.broker.provisioning.test_permissions import H1, Roles, roles
from tests.broker.server import eventually
from tests.broker.test_queries import Answers
from tests.plain import unpacked
from worker.bus.connection import Connection
from worker.bus.message import Message
from worker.bus.protocol import BusError
from worker.queries.micro import REQUESTER, MicroService, asker_of
from worker.queries.service import query_service

__all__ = ["roles"]


@asynccontextmanager
async def served(roles: Roles, source: Answers) -> AsyncGenerator[MicroService]:
    bus = await roles.host()
    service = query_service(bus.connection, H1, source, version="1.2.3")
    await service.start()
    try:
        yield service
    finally:
        source.gate.set()
        await service.close()


async def host_state(asker: Connection) -> object:
    answer = await asker.request(H1.ask("ping"), b"", timeout_s=2)
    return unpacked(answer.data)["host_state"]


async def answering(asker: Connection) -> None:
    """Return once queries are answered."""
    async with asyncio.timeout(10):
        while True:
            try:
                await host_state(asker)
            except BusError:
                await asyncio.sleep(0.02)
            else:
                return


async def test_a_flood_of_one_account_leaves_another_its_part(roles: Roles) -> None:
    agentd, dashboard = await roles.role("agentd-h1"), await roles.role("dashboard")
    async with served(roles, Answers()) as service:
        await answering(agentd)
        for n in range(500):
            reply = f"_INBOX.dashboard.{n}.x"  # each time another inbox
            await dashboard.send(H1.ask("status"), b"", reply=reply)
        assert await eventually(lambda: service.dropped > 100, 10)

        # None of the dashboard's questions has ended: the source waits for its gate.
        assert await host_state(agentd) == "ready"


@pytest.mark.parametrize("forged", ['{"acc":"AGENTD_h1"}', "no JSON"])
async def test_who_asks_is_named_by_the_server_and_not_by_the_asker(
    roles: Roles, forged: str
) -> None:
    host, dashboard = await roles.role("host-h1"), await roles.role("dashboard")
    got: list[Message] = []
    await host.subscribe(H1.ask("ping"), got.append)
    await host.request("$JS.hostd.API.STREAM.INFO.HOSTD_EVT_default", b"")  # after the subscription
    for headers in (None, {REQUESTER: forged}):
        await dashboard.send(H1.ask("ping"), b"", reply="_INBOX.dashboard.1", headers=headers)
    assert await eventually(lambda: len(got) == 2, 10)

    assert [asker_of(message) for message in got] == ["account DASHBOARD"] * 2
