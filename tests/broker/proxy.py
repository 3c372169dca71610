"""A TCP proxy in front of a nats-server that can stall, mute, cut and falsify connections.

`sent` is what clients sent; `rewrite` changes what the server sends, as a man in the middle can.
"""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

PULL = re.compile(rb"PUB \$JS\.API\.CONSUMER\.MSG\.NEXT\S* \S+ \d+\r\n[^\r]*\r\n")


class Proxy:
    """Forwards each connection to the server, except where a test sets a fault."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._clients: list[asyncio.StreamWriter] = []
        self._pumps: set[asyncio.Task[None]] = set()
        self._stalled: set[int] = set()
        self.connections = 0
        self.swallow_pulls = 0
        self.mute = False
        self.rewrite: Callable[[bytes], bytes] = lambda data: data
        self.sent = b""
        self.port = 0

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def stall(self) -> None:
        """From now on read nothing from the connections that are open; new ones are served."""
        self._stalled.update(range(1, self.connections + 1))

    def inject(self, data: bytes) -> None:
        """Send bytes to the newest client as if from the server."""
        self._clients[-1].write(data)

    async def start(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))  # again the same after `close`
        self.port = listener.getsockname()[1]
        self._server = await asyncio.start_server(self._serve, sock=listener)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self._pumps.add(serving)
        self.connections += 1
        number = self.connections
        self._writers.append(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers.append(far_writer)
        self._clients.append(writer)
        for pump in (
            self._pump(number, reader, far_writer, to_server=True),
            self._pump(number, far_reader, writer, to_server=False),
        ):
            task = asyncio.create_task(pump)
            self._pumps.add(task)

    async def _pump(
        self,
        number: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        to_server: bool,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if number in self._stalled:
                    await asyncio.Event().wait()
                if to_server and self.swallow_pulls:
                    data, dropped = PULL.subn(b"", data, self.swallow_pulls)
                    self.swallow_pulls -= dropped
                if self.mute and not to_server:
                    continue
                if to_server:
                    self.sent += data
                else:
                    data = self.rewrite(data)
                writer.write(data)
                await writer.drain()
            writer.close()


@asynccontextmanager
async def proxied(target_port: int) -> AsyncGenerator[Proxy]:
    """A running proxy, closed afterwards with all its connections."""
    proxy = Proxy(target_port)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
