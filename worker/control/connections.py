"""Connections of a small HTTP/1.1 server, bounded in number and by client.

The health server and the control server accept by it. When the process has no free descriptor, a
connection takes one of the reserve. asyncio's own server would log each failed accept a hundred
times.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import h11

from worker.descriptors import DescriptorReserve

BACKLOG: Final = 100
ACCEPT_RETRY_S: Final = 0.5

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
ClientOf = Callable[[socket.socket, Any], str | None]


@dataclass(frozen=True, slots=True)
class Bounds:
    """`connections` at once, `per_client` of them of one; a request's head in `header_bytes`."""

    connections: int
    per_client: int
    header_bytes: int


class Connections:
    """Accepts from `accept` to `close`, and serves each connection in a task of its own.

    Args:
        serve: answers one connection, bounded in time; it is closed afterwards. Errors of the
            connection and a timeout end it silently.
        reserve: with a descriptor for each connection.
        client_of: who a connection counts for, by socket and peer address; None: it is closed.
    """

    def __init__(
        self, serve: Serve, reserve: DescriptorReserve, bounds: Bounds, client_of: ClientOf
    ) -> None:
        self._serve_streams = serve
        self._reserve = reserve
        self._bounds = bounds
        self._client_of = client_of
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._open: dict[asyncio.Task[None], str] = {}

    @property
    def count(self) -> int:
        """How many connections are open."""
        return len(self._open)

    def accept(self, listeners: Sequence[socket.socket]) -> None:
        """Accept on these sockets, which listen and do not block; `close` closes them."""
        self._listeners += listeners
        self._accepting += [asyncio.create_task(self._accept(each)) for each in listeners]

    async def close(self) -> None:
        """End all connections and close the listeners."""
        tasks = [*self._accepting, *self._open]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._listeners:
            self._listeners.pop().close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listener)
            except OSError as error:
                # After `release` nothing else runs on this thread before the next accept.
                exhausted = error.errno in (errno.EMFILE, errno.ENFILE)
                if not (exhausted and self._reserve.release()):
                    await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            self._take(connection, self._client_of(connection, peer))
            await asyncio.sleep(0)  # an accept that succeeds at once does not yield

    def _take(self, connection: socket.socket, client: str | None) -> None:
        of_client = sum(each == client for each in self._open.values())
        full = len(self._open) >= self._bounds.connections or of_client >= self._bounds.per_client
        if client is None or full:
            connection.close()
            self._reserve.refill()
            return
        task = asyncio.create_task(self._serve(connection))
        self._open[task] = client

        def served(done: asyncio.Task[None]) -> None:
            del self._open[done]
            connection.close()
            self._reserve.refill()

        task.add_done_callback(served)

    async def _serve(self, connection: socket.socket) -> None:
        local = connection.family == socket.AF_UNIX
        connect = asyncio.open_unix_connection if local else asyncio.open_connection
        try:
            reader, writer = await connect(sock=connection, limit=self._bounds.header_bytes)
        except OSError:
            return
        try:
            await self._serve_streams(reader, writer)
        except (OSError, TimeoutError):
            pass
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def next_event(http: h11.Connection, reader: asyncio.StreamReader) -> object:
    """The next event of a request.

    Raises:
        h11.RemoteProtocolError: what was sent is not HTTP/1.1, or its head is too large.
    """
    while (event := http.next_event()) is h11.NEED_DATA:
        http.receive_data(await reader.read(1 << 14))
    return event


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write the rest of an answer and end the connection, once the client has it."""
    writer.write(data)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def response(http: h11.Connection, status: HTTPStatus, kind: str, body: bytes) -> bytes:
    """A whole response of this media type; the connection ends with it."""
    headers = [
        ("Content-Type", kind),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    parts = [
        http.send(h11.Response(status_code=status, reason=status.phrase, headers=headers)),
        http.send(h11.Data(body)),
        http.send(h11.EndOfMessage()),
    ]
    return b"".join(part for part in parts if part)
