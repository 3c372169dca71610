"""`/metrics`, `/livez` and `/readyz` over HTTP, on loopback unless the settings say otherwise.

Read-only, one request per connection, bounded in size, time and number: a stuck scraper costs one
connection slot for a few seconds. When the process has no free descriptor, a connection takes one
of the reserve. asyncio's own server would log each failed accept a hundred times.
"""

import asyncio
import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Final, Self

import h11

from handlers.errors import HostFault
from worker.descriptors import DescriptorReserve
from worker.metrics import Metrics

REQUEST_TIMEOUT_S: Final = 5.0
MAX_HEADER_BYTES: Final = 8192
MAX_CONNECTIONS: Final = 16
MAX_PER_ADDRESS: Final = 8
BACKLOG: Final = 100
ACCEPT_RETRY_S: Final = 0.5
_JSON = "application/json"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"

Checks = Callable[[], Mapping[str, bool]]


class HealthServer:
    """Serves inside `async with`.

    Args:
        listen: `host:port`; port 0 means any free port, see `port`.
        checks: ready when all of these are true, e.g. `recovered`, `connected`, `can_commit`.
        reserve: of `MAX_CONNECTIONS` descriptors, so that each connection can have one.
    """

    def __init__(
        self, listen: str, metrics: Metrics, checks: Checks, reserve: DescriptorReserve
    ) -> None:
        host, _, port = listen.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._metrics = metrics
        self._checks = checks
        self._reserve = reserve
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._open: dict[asyncio.Task[None], str] = {}

    async def __aenter__(self) -> Self:
        """Listen.

        Raises:
            HostFault: the address is in use or not on this host.
        """
        try:
            await self._listen()
        except OSError as error:
            self._close_listeners()
            known = error.errno is not None and error.errno in errno.errorcode
            why = os.strerror(error.errno) if known and error.errno else error.strerror
            raise HostFault(
                f"cannot listen on {self._host}:{self._port}: {why}: change [metrics] listen, or "
                "stop the process that uses this address"
            ) from error
        self._accepting = [asyncio.create_task(self._accept(each)) for each in self._listeners]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tasks = [*self._accepting, *self._open]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._close_listeners()

    @property
    def port(self) -> int:
        """The port in use."""
        if not self._listeners:
            raise RuntimeError("the health server is not running")
        return int(self._listeners[0].getsockname()[1])

    async def _listen(self) -> None:
        found = await asyncio.get_running_loop().getaddrinfo(
            self._host or None, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            self._listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.setblocking(False)
            listener.bind(address)
            listener.listen(BACKLOG)

    def _close_listeners(self) -> None:
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
            self._take(connection, str(peer[0]))
            await asyncio.sleep(0)  # an accept that succeeds at once does not yield

    def _take(self, connection: socket.socket, address: str) -> None:
        from_there = sum(each == address for each in self._open.values())
        if len(self._open) >= MAX_CONNECTIONS or from_there >= MAX_PER_ADDRESS:
            connection.close()
            self._reserve.refill()
            return
        task = asyncio.create_task(self._serve(connection))
        self._open[task] = address

        def served(done: asyncio.Task[None]) -> None:
            del self._open[done]
            connection.close()
            self._reserve.refill()

        task.add_done_callback(served)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_HEADER_BYTES)
        except OSError:
            return
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                writer.write(await self._exchange(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError):
            pass
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader) -> bytes:
        """The response to the connection's one request; empty if it sent none."""
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        try:
            while (event := http.next_event()) is h11.NEED_DATA:
                http.receive_data(await reader.read(MAX_HEADER_BYTES))
        except h11.RemoteProtocolError as error:
            return _respond(http, HTTPStatus(error.error_status_hint), "text/plain", b"")
        if not isinstance(event, h11.Request):
            return b""
        return _respond(http, *self._answer(event))

    def _answer(self, request: h11.Request) -> tuple[HTTPStatus, str, bytes]:
        if request.method != b"GET":
            return HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET\n"
        match request.target.partition(b"?")[0]:
            case b"/metrics":
                return HTTPStatus.OK, _METRICS, self._metrics.render()
            case b"/livez":
                return HTTPStatus.OK, _JSON, _checks(alive=True)
            case b"/readyz":
                checks = self._checks()
                ready = all(checks.values())
                status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
                return status, _JSON, _checks(**checks)
            case _:
                return HTTPStatus.NOT_FOUND, "text/plain", b"/metrics, /livez or /readyz\n"


def _checks(**checks: bool) -> bytes:
    return json.dumps({"ok": all(checks.values()), "checks": checks}).encode() + b"\n"


def _respond(http: h11.Connection, status: HTTPStatus, kind: str, body: bytes) -> bytes:
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
