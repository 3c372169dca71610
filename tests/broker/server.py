"""A real nats-server for tests that can be paused, crashed and restarted; an admin client."""

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

from schemas.settings import NatsSettings
from schemas.subjects import Subjects
from worker.bus.connection import Connection
from worker.bus.guarded_client import ALL_GUARDS, Guard, Tuning
from worker.bus.nats import NatsBus
from worker.bus.protocol import BusError, Delivery
from worker.bus.provision import provision
from worker.demo.nats_server import EmbeddedNats

CELL = "test"
HOST = "h1"
SUBJECTS = Subjects(f"hostd.v1.{CELL}", HOST, CELL)
OLD_SERVER = Path(__file__).parents[2] / "build" / "tools" / "nats-server-debian"

# As in production, but with short times, so that a test sees the recovery soon.
QUICK = Tuning(
    ping_s=0.3,
    pings=2,
    connect_timeout_s=1.0,
    backoff_base_s=0.05,
    backoff_cap_s=0.3,
    request_timeout_s=2.0,
    heartbeat_s=0.5,
    pull_expires_s=3.0,
    missing_retry_s=0.2,
    check_s=0.3,
)


class Server(EmbeddedNats):
    """An embedded server that can be paused, killed and restarted."""

    def pause(self) -> None:
        """Stop every thread of it; returns once the kernel shows them stopped."""
        self.process.signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid()}/task")
        while {(t / "stat").read_text().rsplit(") ", 1)[1][0] for t in tasks.iterdir()} != {"T"}:
            time.sleep(0.001)

    def go_on(self) -> None:
        self.process.signal(signal.SIGCONT)

    async def restart(self) -> None:
        """An orderly restart: the server notifies its clients and their pulls."""
        await self.stop()
        await self.start()

    async def crash(self) -> None:
        """A restart after SIGKILL: nobody is notified."""
        await asyncio.to_thread(self.process.kill)
        await self.start()


class ExampleServer(Server):
    """Runs a configuration of `deploy/nats` as it stands, but for its store."""

    example: ClassVar[Path]

    def configure(self, config: str) -> None:
        text = self.example.read_text(encoding="utf-8")
        text, count = re.subn(r'store_dir: "[^"]+"', f'store_dir: "{self.directory}"', text)
        assert count == 1
        assert f'listen: "127.0.0.1:{self.port}"' in text
        Path(self.config_file).write_text(text, encoding="utf-8")


@asynccontextmanager
async def running_server(
    directory: Path, *, config: str = "", program: str = "", web: bool = False
) -> AsyncGenerator[Server]:
    """A running server with its own directory, stopped afterwards."""
    server = Server(str(directory), config=config, program=program, web=web)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connection_to(
    url: str,
    *,
    creds: str = "",
    guards: frozenset[Guard] = ALL_GUARDS,
    tuning: Tuning = QUICK,
    inbox: str = "_INBOX.admin",
) -> AsyncGenerator[Connection]:
    """A connected client, closed afterwards."""
    connection = Connection(
        NatsSettings(url=url, creds=creds), name="test", inbox=inbox, guards=guards, tuning=tuning
    )
    await connection.start()
    try:
        await asyncio.wait_for(connection.wait_connected(), 10)
        yield connection
    finally:
        await connection.close()


class Receiver:
    """Acknowledges and keeps deliveries."""

    def __init__(self, *, ack: bool = True) -> None:
        self.got: list[Delivery] = []
        self.running = 0
        self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.ack = ack
        self._news = asyncio.Event()

    async def __call__(self, delivery: Delivery) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
            if self.ack:
                await delivery.ack()
        finally:
            self.running -= 1
            self.got.append(delivery)
            self._news.set()

    @property
    def bodies(self) -> list[bytes]:
        return [delivery.data for delivery in self.got]

    async def wait_for(self, body: bytes, timeout_s: float) -> bool:
        """Whether that body arrives in time."""
        return await eventually(lambda: body in self.bodies, timeout_s, self._news)


async def eventually(
    holds: Callable[[], bool], timeout_s: float, news: asyncio.Event | None = None
) -> bool:
    """Whether a condition becomes true in time; checked on each event and every 10 ms."""
    end = time.monotonic() + timeout_s
    while not holds():
        left = end - time.monotonic()
        if left <= 0:
            return False
        if news is None:
            await asyncio.sleep(min(left, 0.01))
            continue
        news.clear()
        try:
            await asyncio.wait_for(news.wait(), left)
        except TimeoutError:
            return holds()
    return True


class Host:
    """A provisioned cell with one host's bus that consumes into `receiver`."""

    def __init__(
        self,
        server: Server,
        admin: Connection,
        bus: NatsBus,
        receiver: Receiver,
        consumer: asyncio.Task[None],
    ) -> None:
        self.server, self.admin, self.bus, self.receiver = server, admin, bus, receiver
        self.consumer = consumer
        self._sent = 0

    async def command(self, body: bytes, *, msg_id: str = "", lane: str = "host") -> None:
        """Publish a command as agentd would, again and again until the stream has it."""
        self._sent += 1
        headers = {"Nats-Msg-Id": msg_id or f"{body.decode()}-{self._sent}"}
        subject = f"{SUBJECTS.root}.{HOST}.cmd.{lane}"
        end = time.monotonic() + 20
        while True:
            try:
                await self.admin.request(subject, body, headers=headers, timeout_s=1)
            except BusError:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.02)
            else:
                return


@asynccontextmanager
async def consuming_host(
    server: Server,
    *,
    guards: frozenset[Guard] = ALL_GUARDS,
    window: int = 8,
    tuning: Tuning = QUICK,
    url: str = "",
    creds: str = "",
    admin_creds: str = "",
    receiver: Receiver | None = None,
) -> AsyncGenerator[Host]:
    """Provision, start a bus and consume."""
    receiver = receiver or Receiver()
    async with connection_to(server.url, creds=admin_creds) as admin:
        await provision(admin, SUBJECTS, [HOST], ack_wait_ns=500_000_000)
        settings = NatsSettings(url=url or server.url, creds=creds)
        bus = NatsBus(settings, SUBJECTS, guards=guards, window=window, tuning=tuning)
        await bus.start()
        consumer = asyncio.create_task(bus.consume(receiver))
        try:
            assert await eventually(lambda: bus.connected, 10)
            yield Host(server, admin, bus, receiver, consumer)
        finally:
            if server.process.running():
                os.kill(server.process.pid(), signal.SIGCONT)
            consumer.cancel()
            await asyncio.gather(consumer, return_exceptions=True)
            await bus.close()
