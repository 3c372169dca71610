"""A private nats-server with JetStream in one directory: for one machine, the demo, tests."""

import asyncio
import os
import signal
import socket
import time

from handlers.errors import HostFault
from worker.demo.nats_config import ServerProcess

CONFIG = """\
listen: "127.0.0.1:{port}"
server_name: hostd-embedded
jetstream {{ store_dir: "{directory}/jetstream" }}
{more}
"""


class EmbeddedNats:
    """One nats-server on the loopback.

    Args:
        directory: its own; made if missing; streams stay there from one start to the next.
        port: 0 takes a free one, and keeps it over restarts.
        program: path of nats-server; empty means next to the interpreter, else in PATH.
        config: more lines of its configuration, e.g. an `authorization` block.
    """

    def __init__(
        self, directory: str, *, port: int = 0, program: str = "", config: str = ""
    ) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self.directory = directory
        self.port = port or _free_port()
        self._file = os.path.join(directory, "nats.conf")
        self.log = os.path.join(directory, "nats.log")
        self.process = ServerProcess(self._file, self.log, program=program)
        self.configure(config)

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def configure(self, more: str) -> None:
        """Write the configuration; a running server reads it at `reload`."""
        with open(self._file, "w", encoding="utf-8") as file:
            file.write(CONFIG.format(port=self.port, directory=self.directory, more=more))

    async def start(self, timeout_s: float = 15.0) -> str:
        """Start it and return its url once it takes connections and JetStream is up.

        Raises:
            HostFault: no such program, or it ended, or it is not up in time; names its log.
        """
        self.process.start()
        end = time.monotonic() + timeout_s
        while not await self._answers():
            if not self.process.running() or time.monotonic() > end:
                await self.stop()
                raise HostFault(f"the embedded nats-server did not start: see {self.log}")
            await asyncio.sleep(0.02)
        return self.url

    async def stop(self) -> None:
        """End it orderly; absent already is success."""
        await asyncio.to_thread(self.process.stop)

    def reload(self) -> None:
        self.process.signal(signal.SIGHUP)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            return b'"jetstream":true' in await asyncio.wait_for(reader.readline(), 5)
        except (OSError, TimeoutError):
            return False
        finally:
            writer.transport.abort()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
