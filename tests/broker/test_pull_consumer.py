"""The pull loop against a real server: restarts, lost pulls, deleted consumers, windows, loads."""

import asyncio
import json
from dataclasses import replace

import pytest

from schemas.settings import NatsSettings
from tests.broker.proxy import proxied
from tests.broker.server import (
    HOST,
    QUICK,
    SUBJECTS,
    Host,
    Receiver,
    Server,
    connection_to,
    consuming_host,
    eventually,
    running_server,
)
from tests.broker.test_guarded_client import SLOW_PINGS, guard_cases, still_delivers
from worker.bus.guarded_client import Guard
from worker.bus.message import Message
from worker.bus.nats import NatsBus
from worker.bus.provision import provision

CONSUMER = f"{SUBJECTS.commands_stream}.{HOST}"


async def unacknowledged(host: Host) -> int:
    answer = await host.admin.request(f"$JS.API.CONSUMER.INFO.{CONSUMER}", b"")
    number: int = json.loads(answer.data)["num_ack_pending"]
    return number


@pytest.mark.parametrize(
    ("guards", "heals"), guard_cases(Guard.REPULL, also_off=(Guard.HEARTBEAT, Guard.REBUILD))
)
async def test_pulls_are_sent_again_after_a_crash_of_the_server(
    server: Server, guards: frozenset[Guard], heals: bool
) -> None:
    async with consuming_host(server, guards=guards) as host:
        await host.command(b"before")
        assert await host.receiver.wait_for(b"before", 5)

        await server.crash()

        await still_delivers(host, heals)
        assert host.bus.connected


@pytest.mark.parametrize(("guards", "heals"), guard_cases(Guard.HEARTBEAT))
async def test_a_lost_pull_is_noticed_by_missing_heartbeats(
    server: Server, guards: frozenset[Guard], heals: bool
) -> None:
    patient = replace(QUICK, pull_expires_s=30.0)
    async with proxied(server.port) as proxy:
        proxy.swallow_pulls = 1
        async with consuming_host(server, guards=guards, url=proxy.url, tuning=patient) as host:
            assert await eventually(lambda: proxy.swallow_pulls == 0, 5)

            await still_delivers(host, heals)


@pytest.mark.parametrize(("guards", "bounded"), guard_cases(Guard.FRESH_INBOX))
async def test_stale_pulls_do_not_deliver_beyond_the_window(
    server: Server, guards: frozenset[Guard], bounded: bool
) -> None:
    # A stall makes the loop replace its pull; afterwards the server has the old ones too.
    tuning = replace(SLOW_PINGS, heartbeat_s=0.2)
    receiver = Receiver(ack=False)
    async with consuming_host(
        server, guards=guards, tuning=tuning, window=8, receiver=receiver
    ) as host:
        loop = host.bus._loop
        assert loop is not None
        assert await eventually(lambda: loop.pulls == 1, 5)
        server.pause()
        assert await eventually(lambda: loop.pulls == 4, 10)
        receiver.gate.clear()
        server.go_on()
        for number in range(40):
            await host.command(f"c{number}".encode())

        await eventually(lambda: receiver.running + len(loop._tasks) >= 40, 0.2)

        assert (await unacknowledged(host) <= 8) == bounded
        receiver.gate.set()


@pytest.mark.parametrize(("guards", "reported"), guard_cases(Guard.STATUS))
async def test_a_deleted_consumer_is_reported_and_used_again_once_it_is_back(
    server: Server, guards: frozenset[Guard], reported: bool
) -> None:
    async with consuming_host(server, guards=guards) as host:
        assert host.bus._loop is not None
        assert await eventually(lambda: host.bus._loop is not None and host.bus._loop.pulls > 0, 5)
        await host.admin.request(f"$JS.API.CONSUMER.DELETE.{CONSUMER}", b"")

        assert await eventually(lambda: bool(host.bus.trouble), 2) == reported

        if reported:
            assert f"consumer {HOST} of {SUBJECTS.commands_stream} is missing" in host.bus.trouble
            assert "hostd provision" in host.bus.trouble
            await provision(host.admin, SUBJECTS, [HOST])
            await still_delivers(host, True)
            assert host.bus.trouble == ""


async def test_a_deleted_stream_is_reported_and_used_again_once_it_is_back(server: Server) -> None:
    async with consuming_host(server) as host:
        name = SUBJECTS.commands_stream
        await host.admin.request(f"$JS.API.STREAM.DELETE.{name}", b"")
        assert await eventually(lambda: f"stream {name} is missing" in host.bus.trouble, 5)

        await provision(host.admin, SUBJECTS, [HOST])

        await still_delivers(host, True)
        assert host.bus.trouble == ""


async def test_no_server_and_no_streams_at_the_start(server: Server) -> None:
    await server.stop()
    receiver = Receiver()
    bus = NatsBus(NatsSettings(url=server.url), SUBJECTS, tuning=QUICK)
    await bus.start()
    consumer = asyncio.create_task(bus.consume(receiver))
    provisioned = asyncio.create_task(bus.wait_provisioned())
    try:
        assert not bus.connected
        await server.start()
        assert await eventually(lambda: "is missing" in bus.trouble, 5)
        assert "Run `hostd provision`" in bus.trouble
        assert not provisioned.done()

        async with connection_to(server.url) as admin:
            await provision(admin, SUBJECTS, [HOST])
            await asyncio.wait_for(provisioned, 5)
            host = Host(server, admin, bus, receiver, consumer)
            await still_delivers(host, True)
        assert bus.trouble == ""
    finally:
        consumer.cancel()
        await asyncio.gather(consumer, return_exceptions=True)
        await bus.close()


async def test_nothing_is_lost_while_the_server_crashes_again_and_again(server: Server) -> None:
    async with consuming_host(server) as host:
        sent = [f"c{number}".encode() for number in range(200)]

        async def send() -> None:
            for body in sent:
                await host.command(body, msg_id=body.decode())

        sending = asyncio.create_task(send())
        for _ in range(3):
            await eventually(lambda: len(host.receiver.got) % 50 == 49 or sending.done(), 3)
            await server.crash()
        await sending

        assert await eventually(lambda: set(host.receiver.bodies) == set(sent), 10)
        # Some come twice, but each was stored once. A server that crashed may have forgotten
        # that it delivered them: `delivered` is 1 again; only the command ID identifies them.
        places = {(delivery.data, delivery.stream_seq) for delivery in host.receiver.got}
        assert len(places) == len(sent)


async def test_at_most_a_window_of_deliveries_is_handled_at_once(server: Server) -> None:
    async with consuming_host(server, window=4) as host:
        host.receiver.gate.clear()
        await asyncio.gather(*(host.command(f"c{n}".encode()) for n in range(30)))
        assert await eventually(lambda: host.receiver.running == 4, 5)
        host.receiver.gate.set()

        assert await eventually(lambda: len(set(host.receiver.bodies)) == 30, 10)

        assert host.receiver.most == 4


async def test_while_paused_the_stream_keeps_the_commands(server: Server) -> None:
    async with consuming_host(server) as host:
        host.bus.pause()
        assert await eventually(
            lambda: host.bus._loop is not None and host.bus._loop.credit == 0, 5
        )
        await host.command(b"kept")

        assert not await host.receiver.wait_for(b"kept", 0.5)

        host.bus.resume()
        assert await host.receiver.wait_for(b"kept", 5)


async def test_a_failing_receiver_gets_the_command_again(server: Server) -> None:
    class Failing(Receiver):
        async def __call__(self, delivery: object) -> None:
            if not self.got:
                self.got.append(delivery)  # type: ignore[arg-type]
                raise RuntimeError("the journal could not commit")
            await super().__call__(delivery)  # type: ignore[arg-type]

    async with consuming_host(server, receiver=Failing()) as host:
        await host.command(b"x")

        assert await eventually(lambda: len(host.receiver.got) == 2, 5)
        assert host.receiver.got[1].delivered == 2


async def test_a_cancelled_consumer_finishes_the_deliveries_it_has(server: Server) -> None:
    receiver = Receiver()
    receiver.gate.clear()
    async with consuming_host(server, receiver=receiver) as host:
        await host.command(b"in hand")
        assert await eventually(lambda: receiver.running == 1, 5)
        host.consumer.cancel()
        await asyncio.sleep(0)
        receiver.gate.set()

        await asyncio.gather(host.consumer, return_exceptions=True)

        assert receiver.bodies == [b"in hand"]
        assert await unacknowledged(host) == 0


async def test_both_forms_of_ack_subjects(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Version 2 carries domain and account before the stream; it is announced as the default.
    config = "feature_flags { js_ack_fc_v2: true }"
    async with (
        running_server(tmp_path_factory.mktemp("v2"), config=config) as server,
        consuming_host(server) as host,
    ):
        acks: list[str] = []

        def note(message: Message) -> None:
            acks.append(message.subject)

        await host.admin.subscribe("$JS.ACK.>", note)
        await host.command(b"x", msg_id="id-7")

        assert await host.receiver.wait_for(b"x", 5)
        assert await eventually(lambda: bool(acks), 5)
        assert acks[0].split(".")[4:6] == [SUBJECTS.commands_stream, HOST]
        delivery = host.receiver.got[0]
        assert (delivery.stream_seq, delivery.delivered, delivery.msg_id) == (1, 1, "id-7")
        assert await unacknowledged(host) == 0
