"""The measured host: a worker process with its own nats-server, and a sender."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from nats.aio.client import Client as Nats

from schemas import codec
from schemas.envelopes import Command
from schemas.requests import InstanceRef, Request
from schemas.subjects import Lane, Subjects
from tests.live_host import LiveHost, live_host
from tests.plain import unpacked
from worker.cli.client import connect, new_id
from worker.cli.seed import Seeded

TIMEOUT_S = 60.0
PAGE_KIB = os.sysconf("SC_PAGESIZE") // 1024


@dataclass(frozen=True, slots=True)
class Sent:
    """One command as seen by its sender."""

    took_s: float
    reply: dict[str, Any]

    def step_s(self, *names: str) -> float:
        steps: list[dict[str, Any]] = self.reply["steps"]
        return sum(float(s["took_us"]) for s in steps if not names or s["name"] in names) / 1e6


class Sender:
    """A minimal client: one connection, one subscription for all replies."""

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
        return await self.send_raw(command_id, subject, data, expect=expect)

    async def send_raw(self, command_id: str, subject: str, data: bytes, *, expect: str) -> Sent:
        waiting = self._waiting[command_id] = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        await self._stream.publish(subject, data)
        async with asyncio.timeout(TIMEOUT_S):
            answer = await waiting
        took_s = time.perf_counter() - began
        del self._waiting[command_id]
        reply: dict[str, Any] = unpacked(answer)
        if expect and reply["code"] != expect:
            raise RuntimeError(f"{subject}: {reply}")
        return Sent(took_s, reply)

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


@dataclass(frozen=True, slots=True)
class BenchHost:
    """The measured host with a sender."""

    host: LiveHost
    sender: Sender

    @property
    def worker_pid(self) -> int:
        assert self.host.worker is not None
        return self.host.worker.pid

    def seed(self, name: str, *, tenant: str = "acme", net_id: int = 7, **more: Any) -> Seeded:
        return self.host.seed(InstanceRef(tenant, "web", name), net_id=net_id, **more)


@contextlib.asynccontextmanager
async def bench_host() -> AsyncGenerator[BenchHost]:
    """A host in a private network namespace; leaves nothing behind."""
    async with live_host() as host, connect(host.settings) as client:
        sender = Sender(client.nats, host.subjects)
        await sender.start()
        yield BenchHost(host, sender)


def rss_kib(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * PAGE_KIB


def cpu_s(pid: int) -> float:
    """User and system time that a process has used."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
