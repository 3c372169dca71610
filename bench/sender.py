"""A minimal client of a worker: one connection, one subscription for all replies."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nats.aio.client import Client as Nats

from schemas import codec
from schemas.envelopes import Command
from schemas.requests import Request
from schemas.subjects import Lane, Subjects
from tests.plain import unpacked
from worker.cli.client import new_id

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Sent:
    """One command as seen by its sender; `began_s` is CLOCK_MONOTONIC, common to all processes."""

    began_s: float
    took_s: float
    reply: dict[str, Any]

    @property
    def took_ms(self) -> float:
        return self.took_s * 1e3

    def step_s(self, *names: str) -> float:
        """The steps of these names, or all. Steps that run concurrently count each."""
        steps: list[dict[str, Any]] = self.reply["steps"]
        return sum(float(s["took_us"]) for s in steps if not names or s["name"] in names) / 1e6


class Sender:
    """Sends commands and measures until their replies."""

    def __init__(self, nats: Nats, subjects: Subjects) -> None:
        self._nats = nats
        self._stream = nats.jetstream()
        self._subjects = subjects
        self._inbox = nats.new_inbox()
        self._waiting: dict[str, asyncio.Future[bytes]] = {}

    async def start(self) -> None:
        await self._nats.subscribe(f"{self._inbox}.*", cb=self._on_reply)

    async def _on_reply(self, message: Any) -> None:
        waiting = self._waiting.get(message.subject.rpartition(".")[2])
        if waiting is not None and not waiting.done():
            waiting.set_result(message.data)

    def encode(self, request: Request, command_id: str) -> tuple[str, bytes]:
        """Subject and bytes of a command whose reply comes here."""
        reply_to = f"{self._inbox}.{command_id}"
        command = Command(id=command_id, request=request, reply_to=reply_to)
        return self._subjects.command(Lane.of_request(request)), codec.encode_command(command)

    async def send(self, request: Request, *, expect: str = "ok") -> Sent:
        """Publish, wait for the stream's ack and the reply; the time covers all of it."""
        command_id = new_id()
        subject, data = self.encode(request, command_id)
        waiting = self._waiting[command_id] = asyncio.get_running_loop().create_future()
        began = time.monotonic()
        await self._stream.publish(subject, data)
        async with asyncio.timeout(TIMEOUT_S):
            answer = await waiting
        took_s = time.monotonic() - began
        del self._waiting[command_id]
        reply: dict[str, Any] = unpacked(answer)
        if reply["code"] != expect:
            raise RuntimeError(f"{subject}: expected code {expect}, got {reply}")
        return Sent(began, took_s, reply)

    async def send_all(self, requests: Sequence[Request], at_once: int = 4) -> None:
        """Send them, at most `at_once` outstanding; for what is not measured."""
        gate = asyncio.Semaphore(at_once)

        async def one(request: Request) -> None:
            async with gate:
                await self.send(request)

        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(one(request))

    async def send_many(self, commands: Sequence[tuple[str, str, bytes]], window: int) -> float:
        """Seconds until all have replies; at most `window` outstanding at once."""
        loop = asyncio.get_running_loop()
        free = asyncio.Semaphore(window)
        began = time.perf_counter()
        for command_id, subject, data in commands:
            await free.acquire()
            waiting = self._waiting[command_id] = loop.create_future()
            waiting.add_done_callback(lambda _: free.release())
            await self._nats.publish(subject, data)
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(*(self._waiting[command_id] for command_id, _, _ in commands))
        took_s = time.perf_counter() - began
        self._waiting.clear()
        return took_s
