"""`/metrics`, `/livez` and `/readyz` over HTTP, on loopback unless the settings say otherwise.

Read-only, one request per connection, bounded in size, time and number: a stuck scraper costs one
connection slot for a few seconds.
"""

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Final, Self

import h11

from handlers.errors import HostFault
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
    """

    def __init__(self, listen: str, metrics: Metrics, checks: Checks) -> None:
        host, _, port = listen.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._metrics = metrics
        self._checks = checks
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], str] = {}

    async def __aenter__(self) -> Self:
        """Listen.

        Raises:
            HostFault: the address is in use or not on this host.
        """
        try:
            self._server = await asyncio.start_server(
                self._accept, self._host, self._port, limit=MAX_HEADER_BYTES
            )
        except OSError as error:
            # asyncio's own text shows the address as a Python tuple.
            known = error.errno is not None and error.errno in errno.errorcode
            why = os.strerror(error.errno) if known and error.errno else error.strerror
            raise HostFault(
                f"cannot listen on {self._host}:{self._port}: {why}: change [metrics] listen, or "
                "stop the process that uses this address"
            ) from error
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is None:
            return
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    @property
    def port(self) -> int:
        """The port in use."""
        if self._server is None:
            raise RuntimeError("the health server is not running")
        return int(self._server.sockets[0].getsockname()[1])

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        address = str(peer[0]) if peer else ""
        from_there = sum(each == address for each in self._open.values())
        if len(self._open) >= MAX_CONNECTIONS or from_there >= MAX_PER_ADDRESS:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._serve(reader, writer))
        self._open[task] = address
        task.add_done_callback(lambda done: self._open.pop(done, None))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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
