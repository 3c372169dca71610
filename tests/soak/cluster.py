"""Three nats-servers on loopback that form a cluster; any of them is killed and comes back."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence

import msgspec

from schemas.settings import Settings
from schemas.subjects import Subjects
from tests.live_host import LiveHost
from worker.bus.connection import Connection
from worker.bus.provision import provision
from worker.cli.client import connect
from worker.demo.nats_server import ServerProcess

SIZE = 3
NODE = """\
listen: "127.0.0.1:{port}"
server_name: n{number}
server_tags: [{tags}]
jetstream {{ store_dir: "{directory}/jetstream", max_file_store: 16GB }}
cluster {{ name: soak, listen: "127.0.0.1:{route}", routes: [{routes}] }}
"""


class Cluster:
    """The servers; each stream has a copy on every one of them."""

    def __init__(self, directory: str, *, tags: Sequence[str] = ()) -> None:
        self.ports, routes = ports(SIZE), ports(SIZE)
        peers = ", ".join(f'"nats://127.0.0.1:{route}"' for route in routes)
        self.nodes: list[ServerProcess] = []
        for number, (port, route) in enumerate(zip(self.ports, routes, strict=True)):
            home = f"{directory}/n{number}"
            os.makedirs(home, mode=0o700)
            text = NODE.format(
                port=port,
                number=number,
                directory=home,
                route=route,
                routes=peers,
                tags=", ".join(f'"{tag}"' for tag in tags),
            )
            with open(f"{home}/nats.conf", "w", encoding="utf-8") as file:
                file.write(text)
            self.nodes.append(ServerProcess(f"{home}/nats.conf", f"{home}/nats.log"))

    @property
    def url(self) -> str:
        return ",".join(f"nats://127.0.0.1:{port}" for port in self.ports)

    async def start(self) -> None:
        for node in self.nodes:
            node.start()

    async def stop(self) -> None:
        for node in self.nodes:
            await asyncio.to_thread(node.stop)

    async def provision(self, settings: Settings, subjects: Subjects) -> None:
        """Create the cell with three replicas, once the cluster has a leader."""
        connection = Connection(settings.nats, name="soak", inbox="_INBOX.soak")
        await connection.start()
        try:
            await connection.wait_connected()
            async with asyncio.timeout(60):
                while True:
                    with contextlib.suppress(Exception):
                        await provision(connection, subjects, [settings.host.id], replicas=SIZE)
                        return
                    await asyncio.sleep(0.5)
        finally:
            await connection.close()

    async def leader(self, settings: Settings, stream: str) -> int | None:
        """Which server leads a stream; None while there is none, or nobody says."""
        with contextlib.suppress(Exception):
            async with connect(settings) as client:
                info = await client.nats.jetstream().stream_info(stream)
                if info.cluster is not None and info.cluster.leader is not None:
                    return int(info.cluster.leader.removeprefix("n"))
        return None


def ports(count: int) -> list[int]:
    """Free ports of the loopback interface, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class SoakHost(LiveHost):
    """A host whose bus is the cluster."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster(f"{self.directory}/cluster")
        nats = msgspec.structs.replace(self.settings.nats, url=self.cluster.url)
        self.settings = msgspec.structs.replace(self.settings, nats=nats)

    async def close(self) -> None:
        await self.cluster.stop()
        await super().close()
