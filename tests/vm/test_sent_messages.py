"""What a worker really sends is held against the schemas of the protocol, each message of it."""

import pytest

from schemas.protocol.json_schema import documents
from tests.constants import DESTROY, SLEEP, START, STOP, WAKE
from tests.live_host import LiveHost, live_host
from tests.protocol.sent import Sent, read
from tests.protocol.validators import faults_in
from worker.cli.context import CliError


async def live(host: LiveHost) -> None:
    """A life that has each schema of what a worker sends in it."""
    seeded = host.seed()
    await host.ping()
    await host.net_up(seeded)
    for request in (START, SLEEP, WAKE, STOP):
        await host.run(request)
    await host.publish_raw(host.subjects.command_filter.replace(">", "host"), b"no command")
    async with host.client() as client:
        for verb in ("ping", "status", "list"):
            await client.ask(host.host_id, verb)
        names = {"tenant_id": "acme", "pool_id": "web", "instance_id": "i-1"}
        for body in (names, {"tenant_id": "acme"}):
            await client.ask(host.host_id, "describe", body)
        await client.ask(host.host_id, "usage", names)
        await client.ask(host.host_id, "explain", {"request": {"StopInstance": names}})
        with pytest.raises(CliError):
            await client.ask(host.host_id, "result", {"id": "unknown"})
    await host.run(DESTROY)
    await host.net_down(seeded.net)


async def test_every_message_of_a_life_is_as_its_schema_says() -> None:
    async with live_host() as host:
        await live(host)
        await host.stop_worker()

        sent = list(read(host.sent))
        assert {each.schema for each in sent} == {
            name for name in documents() if not name.endswith("request") and name != "command"
        }
        assert faults_in(sent) == []


@pytest.mark.parametrize(
    "sent",
    [
        Sent("event", b"\x80", {}),
        Sent("ask.ping.answer", b'{"v": 1, "host_id": "h1", "more": 1}', {}),
        Sent("dead.headers", b"", {"Nats-Msg-Id": "x"}),
    ],
)
def test_a_message_that_is_not_is_a_fault(sent: Sent) -> None:
    assert faults_in([sent])
