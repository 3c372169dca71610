"""The bus in memory and the bus over NATS keep the same promises, so that the fake cannot lie."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import pytest

from schemas.settings import NatsSettings
from tests.broker.server import (
    HOST,
    QUICK,
    SUBJECTS,
    Receiver,
    Server,
    connection_to,
    eventually,
    running_server,
)
from tests.fakes.bus import FakeBus
from worker.bus.connection import Connection
from worker.bus.nats import NatsBus
from worker.bus.protocol import Bus, BusError, StateConflict
from worker.bus.provision import provision

BASE = f"{SUBJECTS.root}.{HOST}"
KEY = f"{HOST}.host"


class BusUnderTest(Protocol):
    """A bus and the other side of it."""

    bus: Bus

    async def command(self, data: bytes, msg_id: str) -> None: ...
    async def waiting(self) -> int: ...
    async def published(self) -> int: ...
    async def break_bus(self) -> None: ...


class FakeWorld:
    def __init__(self) -> None:
        self.fake = FakeBus()
        self.bus: Bus = self.fake

    async def command(self, data: bytes, msg_id: str) -> None:
        self.fake.command(f"{BASE}.cmd.host", data, msg_id)

    async def waiting(self) -> int:
        return len(self.fake.commands)

    async def published(self) -> int:
        return len(self.fake.replies())

    async def break_bus(self) -> None:
        self.fake.up = False


class RealWorld:
    def __init__(self, server: Server, admin: Connection, bus: NatsBus) -> None:
        self.server, self.admin, self.nats = server, admin, bus
        self.bus: Bus = bus

    async def command(self, data: bytes, msg_id: str) -> None:
        subject, headers = f"{BASE}.cmd.host", {"Nats-Msg-Id": msg_id}
        await self.admin.request(subject, data, headers=headers)

    async def waiting(self) -> int:
        return await self._count(SUBJECTS.commands_stream)

    async def published(self) -> int:
        return await self._count(SUBJECTS.replies_stream)

    async def break_bus(self) -> None:
        await self.server.stop()
        assert await eventually(lambda: not self.nats.connected, 5)

    async def _count(self, stream: str) -> int:
        answer = await self.admin.request(f"$JS.API.STREAM.INFO.{stream}", b"")
        number: int = json.loads(answer.data)["state"]["messages"]
        return number


@asynccontextmanager
async def world_of(kind: str, directory: Path) -> AsyncGenerator[BusUnderTest]:
    if kind == "fake":
        yield FakeWorld()
        return
    async with running_server(directory / "nats") as server, connection_to(server.url) as admin:
        await provision(admin, SUBJECTS, [HOST])
        bus = NatsBus(NatsSettings(url=server.url), SUBJECTS, tuning=QUICK)
        await bus.start()
        try:
            await asyncio.wait_for(bus.connection.wait_connected(), 10)
            yield RealWorld(server, admin, bus)
        finally:
            await bus.close()


@pytest.fixture(params=["fake", "nats"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@asynccontextmanager
async def consumed(world: BusUnderTest, receiver: Receiver) -> AsyncGenerator[None]:
    consumer = asyncio.create_task(world.bus.consume(receiver))
    try:
        yield
    finally:
        consumer.cancel()
        await asyncio.gather(consumer, return_exceptions=True)


async def test_what_is_sent_at_once_is_counted_up_to_the_first_that_cannot_be(
    kind: str, tmp_path: Path
) -> None:
    async with world_of(kind, tmp_path) as world:
        large = b"x" * 1_100_000

        assert world.bus.send_now([("_INBOX.1", b"a"), ("_INBOX.1", b"b")]) == 2
        assert world.bus.send_now([("_INBOX.1", b"a"), ("_INBOX.1", large), ("x.y", b"b")]) == 1
        await world.break_bus()
        assert world.bus.send_now([("_INBOX.1", b"a")]) == 0


async def test_a_command_stays_until_its_ack_returned(kind: str, tmp_path: Path) -> None:
    async with world_of(kind, tmp_path) as world:
        receiver = Receiver()
        receiver.gate.clear()
        async with consumed(world, receiver):
            await world.command(b"x", "c-1")
            assert await eventually(lambda: receiver.running == 1, 5)
            assert await world.waiting() == 1

            receiver.gate.set()

            assert await receiver.wait_for(b"x", 5)
            assert await world.waiting() == 0
            delivery = receiver.got[0]
            assert delivery.subject == f"{BASE}.cmd.host"
            assert (delivery.msg_id, delivery.stream_seq, delivery.delivered) == ("c-1", 1, 1)
            await delivery.ack()


async def test_a_duplicate_command_is_swallowed(kind: str, tmp_path: Path) -> None:
    async with world_of(kind, tmp_path) as world:
        await world.command(b"x", "c-1")
        await world.command(b"x", "c-1")

        assert await world.waiting() == 1


async def test_a_duplicate_publication_is_success(kind: str, tmp_path: Path) -> None:
    async with world_of(kind, tmp_path) as world:
        for _ in range(2):
            await world.bus.publish(f"{BASE}.reply.host", b"r", msg_id="c-1")

        assert await world.published() == 1


async def test_state_is_compared_and_set(kind: str, tmp_path: Path) -> None:
    async with world_of(kind, tmp_path) as world:
        bus = world.bus
        assert await bus.read_state(KEY) is None
        first = await bus.write_state(KEY, b"1", revision=0)
        second = await bus.write_state(KEY, b"2", revision=first)
        assert await bus.read_state(KEY) == (b"2", second)
        for stale in (0, first):
            with pytest.raises(StateConflict):
                await bus.write_state(KEY, b"x", revision=stale)
            with pytest.raises(StateConflict):
                await bus.delete_state(KEY, revision=stale)

        await bus.delete_state(KEY, revision=second)
        assert await bus.read_state(KEY) is None
        await bus.delete_state(KEY, revision=None)
        third = await bus.write_state(KEY, b"3", revision=0)
        assert await bus.read_state(KEY) == (b"3", third)
        await bus.write_state(KEY, b"4", revision=None)
        await bus.delete_state(KEY, revision=None)
        assert await bus.read_state(KEY) is None


async def test_a_broken_bus_refuses_everything(kind: str, tmp_path: Path) -> None:
    async with world_of(kind, tmp_path) as world:
        await world.break_bus()

        assert not world.bus.connected
        with pytest.raises(BusError):
            await world.bus.publish(f"{BASE}.reply.host", b"r", msg_id="c-1")
        with pytest.raises(BusError):
            await world.bus.send("_INBOX.x", b"r")
        with pytest.raises(BusError):
            await world.bus.read_state(KEY)
        with pytest.raises(BusError):
            await world.bus.write_state(KEY, b"1", revision=None)
        with pytest.raises(BusError):
            await world.bus.delete_state(KEY, revision=1)
