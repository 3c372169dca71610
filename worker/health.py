"""`/metrics`, `/livez` and `/readyz` over HTTP, on loopback unless the settings say otherwise.

Read-only, one request per connection, bounded in size, time and number: a stuck scraper costs one
connection slot for a few seconds.
"""

import asyncio
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
from worker.control.connections import (
    BACKLOG,
    Bounds,
    Connections,
    next_event,
    response,
    send,
)
from worker.descriptors import DescriptorReserve
from worker.metrics import Metrics

REQUEST_TIMEOUT_S: Final = 5.0
MAX_HEADER_BYTES: Final = 8192
MAX_CONNECTIONS: Final = 16
MAX_PER_ADDRESS: Final = 8
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
        self.connections = Connections(
            self._serve,
            reserve,
            Bounds(MAX_CONNECTIONS, MAX_PER_ADDRESS, MAX_HEADER_BYTES),
            lambda _, address: str(address[0]),
        )
        self._listeners: list[socket.socket] = []

    async def __aenter__(self) -> Self:
        """Listen.

        Raises:
            HostFault: the address is in use or not on this host.
        """
        try:
            await self._listen()
        except OSError as error:
            for listener in self._listeners:
                listener.close()
            known = error.errno is not None and error.errno in errno.errorcode
            why = os.strerror(error.errno) if known and error.errno else error.strerror
            raise HostFault(
                f"cannot listen on {self._host}:{self._port}: {why}: change [metrics] listen, or "
                "stop the process that uses this address"
            ) from error
        self.connections.accept(self._listeners)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.connections.close()
        self._listeners.clear()

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

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await send(writer, await self._exchange(reader))

    async def _exchange(self, reader: asyncio.StreamReader) -> bytes:
        """The response to the connection's one request; empty if it sent none."""
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        try:
            event = await next_event(http, reader)
        except h11.RemoteProtocolError as error:
            return response(http, HTTPStatus(error.error_status_hint), "text/plain", b"")
        if not isinstance(event, h11.Request):
            return b""
        return response(http, *self._answer(event))

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
