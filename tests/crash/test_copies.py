"""The same command again and again: one effect, the same reply."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest
from nats.aio.msg import Msg
from nats.js.client import JetStreamContext

from schemas import codec
from schemas.envelopes import Command
from schemas.requests import Request, SetupNetwork, TeardownNetwork
from schemas.subjects import Lane
from tests.constants import DESTROY, REF, SLEEP, START, STOP, WAKE
from tests.crash.kills import until
from tests.live_host import LiveHost, live_host

COPIES = 10


class Sender:
    """Publishes copies over one connection and keeps what comes to their common inbox."""

    inbox = "_INBOX.copies.one"

    def __init__(self, host: LiveHost, stream: JetStreamContext) -> None:
        self.told: list[bytes] = []
        self._host = host
        self._stream = stream

    async def send(self, request: Request, command_id: str, *, msg_id: bool) -> bool:
        """One copy; whether the stream swallowed it as a duplicate."""
        command = Command(id=command_id, request=request, reply_to=self.inbox)
        ack = await self._stream.publish(
            self._host.subjects.command(Lane.of_request(request)),
            codec.encode_command(command),
            headers={"Nats-Msg-Id": command_id} if msg_id else None,
        )
        return bool(ack.duplicate)

    async def send_many(self, request: Request, command_id: str, *, msg_id: bool) -> list[bytes]:
        """Ten at once; what their sender is told in all, once each copy is answered."""
        self.told.clear()
        copies = [self.send(request, command_id, msg_id=msg_id) for _ in range(COPIES)]
        swallowed = sum(await asyncio.gather(*copies))
        await self._host.result(command_id)
        await until(lambda: len(self.told) >= COPIES - swallowed, "an answer to each copy")
        return list(self.told)


@contextlib.asynccontextmanager
async def sending(host: LiveHost) -> AsyncGenerator[Sender]:
    async with host.client() as client:
        sender = Sender(host, client.nats.jetstream())

        async def note(message: Msg) -> None:
            sender.told.append(message.data)

        await client.nats.subscribe(sender.inbox, cb=note)
        await client.nats.flush()
        yield sender


async def kept_bytes(host: LiveHost, command_id: str) -> bytes:
    """The one reply of the command in the reply stream."""
    kept = await host.kept(host.subjects.replies_stream)
    (data,) = [data for _, headers, data in kept if headers["Nats-Msg-Id"] == command_id]
    return data


@pytest.mark.parametrize("msg_id", [False, True])
async def test_ten_copies_at_once_and_after_a_restart_are_one_command(msg_id: bool) -> None:
    async with live_host() as host:
        seeded = host.seed()
        life: dict[str, Request] = {
            "net-up": SetupNetwork(REF.tenant_id, seeded.net),
            "start": START,
            "sleep": SLEEP,
            "wake": WAKE,
            "stop": STOP,
            "destroy": DESTROY,
            "net-down": TeardownNetwork(REF.tenant_id, seeded.net),
        }
        clean = await host.inventory()
        kept: dict[str, bytes] = {}
        async with sending(host) as sender:
            for name, request in life.items():
                told = await sender.send_many(request, name, msg_id=msg_id)
                kept[name] = await kept_bytes(host, name)
                assert set(told) <= {kept[name], codec.mark_replayed(kept[name])}
                assert told.count(kept[name]) == 1
                reply = codec.decode_reply(kept[name])
                assert (reply.code, reply.changed, reply.attempts) == ("ok", True, 1), name
                if name in {"start", "wake"}:
                    assert (await host.stat())["boots"] == 1
                again = await sender.send_many(request, name, msg_id=False)
                assert set(again) == {codec.mark_replayed(kept[name])}

            await host.kill_worker()
            await host.start_worker()
            for name, request in life.items():
                sender.told.clear()
                swallowed = await sender.send(request, name, msg_id=True)
                assert swallowed is msg_id
                if not swallowed:  # its answer is not to be taken for one of the next command's
                    await until(lambda: bool(sender.told), "an answer to the copy")
                again = await sender.send_many(request, name, msg_id=False)
                assert set(again) == {codec.mark_replayed(kept[name])}

        for name in life:
            assert await kept_bytes(host, name) == kept[name]
        assert host.jailer_runs() == 2
        assert await host.inventory() == clean


async def test_the_same_id_with_another_request_is_refused_and_changes_nothing() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        await host.run(START, "one")

        assert (await host.run_again(STOP, "one"))["code"] == "conflict"

        assert (await host.describe())["status"] == "running"
        (reply,) = await host.replies("one")
        assert reply["code"] == "ok"
