"""A command's `traceparent` header comes through the accounts, whatever servers do with it."""

import asyncio
import re
from contextlib import AsyncExitStack
from pathlib import Path

from schemas import codec
from schemas.envelopes import Command
from schemas.requests import StartInstance
from schemas.subjects import Lane
from tests.broker.provisioning.test_permissions import H1, HOSTS, Roles, example_accounts, roles
from tests.broker.server import Receiver, Server
from worker.bus.connection import Connection
from worker.bus.message import Message
from worker.bus.nats import NatsBus
from worker.bus.protocol import Delivery
from worker.bus.provision import provision

__all__ = ["roles"]
START = StartInstance("acme", "web", "i-1")
SUBJECT = H1.command(Lane.of_request(START))
SAMPLED = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def delivered(bus: NatsBus, agentd: Connection) -> list[Delivery]:
    """What arrives of one command with a sampled `traceparent`."""
    receiver = Receiver()
    consuming = asyncio.create_task(bus.consume(receiver))
    try:
        data = codec.encode_command(Command(id="c1", request=START))
        headers = {"traceparent": SAMPLED, "tracestate": "a=1"}
        await agentd.request(SUBJECT, data, headers=headers)
        assert await receiver.wait_for(data, 10)
        await asyncio.sleep(0.2)  # for a second one
        return receiver.got
    finally:
        consuming.cancel()
        await asyncio.gather(consuming, return_exceptions=True)


async def test_a_sampled_command_comes_once_and_as_it_was_sent(roles: Roles) -> None:
    (delivery,) = await delivered(await roles.host(), await roles.role("agentd-h1"))

    assert (delivery.traceparent, delivery.tracestate) == (SAMPLED, "a=1")
    assert delivery.server_headers == ()


async def test_an_account_that_traces_messages_loses_no_command(tmp_path: Path) -> None:
    """Source: `msg_trace` of an account in nats-server's configuration."""
    traced = re.sub(
        r"(?m)^(  AGENTD_h1 \{)",
        r'\1 msg_trace: { dest: "traced", sampling: "100%" }',
        example_accounts(),
    )
    assert "msg_trace" in traced
    async with AsyncExitStack() as stack:
        server = Server(str(tmp_path / "nats"), config=traced)
        await server.start()
        stack.push_async_callback(server.stop)
        roles = Roles(server, stack)
        await provision(await roles.role("admin"), H1, HOSTS)

        agentd = await roles.role("agentd-h1")
        traces: list[Message] = []
        await agentd.subscribe("traced", traces.append)

        (delivery,) = await delivered(await roles.host(), agentd)

    assert b"4bf92f3577b34da6a3ce929d0e0e4736" in traces[0].data
    assert (delivery.traceparent, delivery.server_headers) == (SAMPLED, ())
