"""A fleet on one machine: a nats-server with the accounts of a cell, and three real hosts.

Each host has a network namespace of its own, and a pair of interfaces to that of the test, where
the nats-server and the browser are. Agentd, dashboard and worker have the credentials of their
roles, whose passwords are the names of their users.
"""

import asyncio
import contextlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from schemas.requests import Request
from schemas.settings import HostSettings, NatsSettings, Settings
from schemas.subjects import Subjects
from tests.broker.server import Server, connection_to
from tests.guests.namespace import own_network
from tests.live_host import LiveHost
from tests.plain import unpacked
from worker.bus import accounts
from worker.bus.provision import provision
from worker.bus.streams import bucket_stream
from worker.cli.client import connect

CELL = "default"
DOMAIN = "hostd"
HOSTS = ("h1", "h2", "h3")
SUBJECTS = Subjects(f"hostd.v1.{CELL}", HOSTS[0], CELL)
UIDS = 65536


@dataclass
class Cell:
    """A provisioned server, in a network namespace of the test's."""

    server: Server

    def url(self, user: str) -> str:
        return f"nats://{user}:{user}@127.0.0.1:{self.server.port}"

    async def statuses(self, host_id: str) -> dict[str, int]:
        """How many instances of a host the bucket has, by status."""
        nats = NatsSettings(url=self.url("dashboard"), js_domain=DOMAIN)
        settings = Settings(host=HostSettings(id=host_id, cell=CELL), nats=nats)
        found: Counter[str] = Counter()
        async with connect(settings) as client:
            stream = bucket_stream(SUBJECTS)
            answer = await client.nats.request(
                f"$JS.{DOMAIN}.API.STREAM.INFO.{stream}", b'{"subjects_filter": ">"}'
            )
            for subject in json.loads(answer.data)["state"]["subjects"]:
                if f".{host_id}.instance." not in subject:
                    continue
                kept = await client.nats.request(f"$JS.{DOMAIN}.API.DIRECT.GET.{stream}.{subject}")
                if "KV-Operation" not in (kept.headers or {}):
                    found[unpacked(kept.data)["status"]] += 1
        return dict(found)


@dataclass
class PageFleet(Cell):
    """The server, and the hosts by ID."""

    hosts: dict[str, LiveHost]

    async def send(self, host_id: str, request: Request, **more: Any) -> dict[str, Any]:
        """As the host's agentd; returns the reply envelope."""
        nats = NatsSettings(url=self.url(f"agentd-{host_id}"), js_domain=DOMAIN)
        settings = msgspec.structs.replace(self.hosts[host_id].settings, nats=nats)
        async with connect(settings) as client:
            return await client.send(host_id, request, timeout_s=60, **more)


def passwords(*, mirror: bool = False) -> str:
    """For the accounts that `hostd provision --server-config` prints."""
    users = accounts.users(HOSTS, mirror=mirror)
    return "".join(f"PASSWORD_{account}: {user}\n" for account, user in users.items())


@contextlib.asynccontextmanager
async def cell(directory: Path, *, program: str = "") -> AsyncGenerator[Cell]:
    """A server with the accounts and the streams of the cell, and no worker."""
    config = passwords() + accounts.server_config(SUBJECTS, HOSTS, DOMAIN)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(own_network())
        server = Server(str(directory), config=config, program=program, address="0.0.0.0", web=True)
        await server.start()
        stack.push_async_callback(server.stop)
        made = Cell(server)
        async with connection_to(made.url("admin")) as admin:
            await provision(admin, SUBJECTS, HOSTS)
        yield made


@contextlib.asynccontextmanager
async def page_fleet(directory: Path) -> AsyncGenerator[PageFleet]:
    """Three hosts that are ready; all is removed afterwards."""
    async with contextlib.AsyncExitStack() as stack:
        fleet = PageFleet((await stack.enter_async_context(cell(directory))).server, {})
        for number, host_id in enumerate(HOSTS, start=1):
            space = stack.enter_context(_host_network(number))
            url = f"nats://host-{host_id}:host-{host_id}@10.99.{number}.1:{fleet.server.port}"
            host = LiveHost(
                host_id=host_id,
                cell=CELL,
                bus=NatsSettings(url=url, js_domain=DOMAIN),
                enter=("nsenter", f"--net=/run/netns/{space}"),
                uid_base=2_000_000_000 + number * UIDS,
            )
            stack.push_async_callback(host.close)
            fleet.hosts[host_id] = host
        await asyncio.gather(*(host.start_worker() for host in fleet.hosts.values()))
        yield fleet


@contextlib.contextmanager
def _host_network(number: int) -> Generator[str]:
    """A namespace at 10.99.<number>.2 whose peer in this one is 10.99.<number>.1; its name."""
    name, ours = f"hostd-page-{os.getpid()}-{number}", f"fleet{number}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("addr", "add", f"10.99.{number}.1/30", "dev", ours)
        _ip("link", "set", ours, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"10.99.{number}.2/30", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "route", "add", "default", "via", f"10.99.{number}.1")
        yield name
    finally:
        _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=10)
