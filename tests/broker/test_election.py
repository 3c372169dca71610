"""The command line and a cluster whose server has just been killed."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

from pathlib import Path

import pytest

from schemas.requests import Ping
from schemas.settings import HostSettings, NatsSettings, Settings
from schemas.subjects import Lane, Subjects
from tests.broker.server import Server
from tests.guests.namespace import own_network
from tests.soak.cluster import Cluster
from worker.cli.client import connect
from worker.cli.context import NoAnswer
from worker.client.link import open_link


async def test_a_command_waits_for_the_new_leader_of_its_stream(tmp_path: Path) -> None:
    with own_network():
        cluster = Cluster(str(tmp_path))
        nats = NatsSettings(url=cluster.url)
        settings = Settings(host=HostSettings(id="h1", cell="test", production=False), nats=nats)
        subjects = Subjects(settings.root, "h1", "test")
        await cluster.start()
        try:
            await cluster.provision(settings, subjects)
            leader = await cluster.leader(settings, subjects.commands_stream)
            assert leader is not None
            cluster.nodes[leader].kill()
            subject = subjects.command(Lane.of_request(Ping()))

            async with connect(settings) as client:
                await client.publish_bytes(subject, b"taken", "id-1")

                assert [each async for each in client.kept(subjects.events_stream, "h1.>")] == []
                info = await client.nats.jetstream().stream_info(subjects.commands_stream)
                assert info.state.messages == 1
        finally:
            await cluster.stop()


async def test_a_single_server_without_the_stream_is_not_waited_for(tmp_path: Path) -> None:
    server = Server(str(tmp_path))
    await server.start()
    try:
        settings = Settings(nats=NatsSettings(url=server.url))
        opened = open_link(settings.nats, name="test", inbox="_INBOX.test", timeout_s=5)
        async with connect(settings) as client, opened as link:
            assert link.election_s == 0
            with pytest.raises(NoAnswer, match="hostd provision"):
                await client.send("h1", Ping(), timeout_s=10)
    finally:
        await server.stop()
