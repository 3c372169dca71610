"""The control server: HTTP/1.1 with JSON on a Unix socket, one request per connection.

It answers while the bus is down, while the worker recovers, and while the journal cannot commit;
then a route that writes is answered `unavailable`. A client that goes away ends its request, never
what the request began elsewhere. What one client can cost is bounded: connections, sizes, times.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Self

import h11
import structlog

from handlers.errors import Failure, Invalid, NotFound, Unavailable, of_os_error
from worker.control import endpoint
from worker.control.connections import Bounds, Connections, next_event, response, send
from worker.control.routes import (
    MAX_BODY_BYTES,
    Answer,
    MethodNotAllowed,
    Route,
    decode_body,
    encode,
    error_of,
    status_of,
)
from worker.descriptors import DescriptorReserve

MAX_CONNECTIONS: Final = 16
MAX_PER_PROCESS: Final = 8
MAX_HEADER_BYTES: Final = 8192
REQUEST_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 30.0  # of a route without progress
WRITE_TIMEOUT_S: Final = 10.0  # until the client has read an answer, or a line
JSON: Final = "application/json"
LINES: Final = "application/x-ndjson"

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


class ControlServer:
    """Serves inside `async with`. A socket that cannot be made is logged; the worker goes on.

    Args:
        run: `[paths] run`, whose lock this worker holds.
        writable: whether the journal can commit.
        reserve: with a descriptor for each of `MAX_CONNECTIONS`.
    """

    def __init__(
        self,
        run: str,
        routes: Sequence[Route],
        *,
        writable: Callable[[], bool],
        reserve: DescriptorReserve,
    ) -> None:
        self._run = run
        self._routes = {(route.method, route.path): route for route in routes}
        self._writable = writable
        self.connections = Connections(
            self._serve,
            reserve,
            Bounds(MAX_CONNECTIONS, MAX_PER_PROCESS, MAX_HEADER_BYTES),
            lambda connection, _: endpoint.client_of(connection),
        )
        self._listening = False

    async def __aenter__(self) -> Self:
        path = endpoint.path_in(self._run)
        try:
            listener = endpoint.listen(self._run)
        except OSError as error:
            log.error("control.listen_failed", path=path, error=str(error))  # noqa: TRY400
        else:
            self._listening = True
            self.connections.accept([listener])
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.connections.close()
        if self._listening:
            with contextlib.suppress(OSError):
                os.unlink(endpoint.path_in(self._run))

    # -- one request ---------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                request, data = await _receive(http, reader)
        except h11.RemoteProtocolError as error:
            status = HTTPStatus(error.error_status_hint)
            await _send(http, writer, status, encode(error_of(Invalid(f"no request: {error}"))))
            return
        if request is None:
            return
        method, target = request.method.decode("ascii"), request.target.decode("ascii")
        try:
            answered = self._route(method, target).handler(decode_body(data))
            if isinstance(answered, AsyncGenerator):
                await _until_gone(reader, _send_lines(http, writer, answered, target))
                return
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                body = await asyncio.to_thread(encode, await answered)
            status = HTTPStatus.OK
        except Exception as error:  # noqa: BLE001 - answered, and logged if it is a bug
            failure = _failure_of(error, target)
            status, body = status_of(failure), encode(error_of(failure))
        await _send(http, writer, status, body)

    def _route(self, method: str, target: str) -> Route:
        route = self._routes.get((method, target))
        if route is None:
            methods = sorted(each for each, path in self._routes if path == target)
            if methods:
                raise MethodNotAllowed(f"{target} takes {' or '.join(methods)}, not {method[:20]}")
            paths = ", ".join(sorted({path for _, path in self._routes}))
            raise NotFound(f"no route {target[:200]!r}; there are {paths}")
        if route.writes and not self._writable():
            raise Unavailable(
                f"{target} is refused while the journal cannot commit; check the file system of "
                "[paths] state"
            )
        return route


async def _receive(
    http: h11.Connection, reader: asyncio.StreamReader
) -> tuple[h11.Request | None, bytes]:
    """The request and its body, one byte too long if it was larger; None if there is none.

    The rest of a body that is too large is read all the same: else the client, still writing,
    would see a lost connection instead of the answer.
    """
    request = await next_event(http, reader)
    if not isinstance(request, h11.Request):
        return None, b""
    data = bytearray()
    while isinstance(event := await next_event(http, reader), h11.Data):
        data += event.data[: MAX_BODY_BYTES + 1 - len(data)]
    return request, bytes(data)


def _failure_of(error: Exception, target: str) -> Failure | None:
    """What the client is told; None: a bug, whose facts are in the log only."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, TimeoutError) and not error.errno:
        return Unavailable(f"{target} took longer than {ANSWER_TIMEOUT_S:g} s; try again")
    if isinstance(error, OSError):
        return of_os_error(error)
    log.error("control.crashed", target=target, exc_info=error)
    return None


async def _until_gone(reader: asyncio.StreamReader, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it when the client ends the connection."""

    async def gone() -> None:
        while await reader.read(MAX_HEADER_BYTES):
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _send(
    http: h11.Connection, writer: asyncio.StreamWriter, status: HTTPStatus, body: bytes
) -> None:
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await send(writer, response(http, status, JSON, body))


async def _send_lines(
    http: h11.Connection,
    writer: asyncio.StreamWriter,
    lines: AsyncGenerator[Answer],
    target: str,
) -> None:
    """Send each line as it comes, and a failure as the last one."""
    headers = [("Content-Type", LINES), ("Connection", "close"), ("Transfer-Encoding", "chunked")]
    writer.write(http.send(h11.Response(status_code=200, reason="OK", headers=headers)) or b"")
    async with contextlib.aclosing(_failsafe(lines, target)) as answered:
        async for line in answered:
            writer.write(http.send(h11.Data(line)) or b"")
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await writer.drain()
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await send(writer, http.send(h11.EndOfMessage()) or b"")


async def _failsafe(lines: AsyncGenerator[Answer], target: str) -> AsyncGenerator[bytes]:
    async with contextlib.aclosing(lines):
        try:
            async for line in lines:
                yield encode(line)
        except Exception as error:  # noqa: BLE001 - answered, and logged if it is a bug
            yield encode(error_of(_failure_of(error, target)))
