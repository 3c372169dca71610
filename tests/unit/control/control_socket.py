"""A control server with the routes of a test, and raw requests to it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

from worker.control.endpoint import short_path
from worker.control.routes import Route
from worker.control.server import ControlServer
from worker.descriptors import DescriptorReserve


@contextlib.asynccontextmanager
async def control_server(
    run: Path, *routes: Route, writable: Callable[[], bool] = lambda: True
) -> AsyncGenerator[ControlServer]:
    run.mkdir(exist_ok=True)
    reserve = DescriptorReserve(2)
    try:
        async with ControlServer(str(run), routes, writable=writable, reserve=reserve) as server:
            yield server
    finally:
        reserve.close()


async def connect(run: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    with short_path(str(run)) as path:
        return await asyncio.open_unix_connection(path)


async def exchange(run: Path, sent: bytes) -> tuple[int, bytes]:
    """Status (0: closed without one) and body of one connection."""
    answer = b""
    reader, writer = await connect(run)
    try:
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                writer.write(sent)
                answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), body


def request(method: str, path: str, body: object = None) -> bytes:
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def ask(run: Path, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Status and decoded answer."""
    status, answer = await exchange(run, request(method, path, body))
    return status, json.loads(answer)


def lines_of(body: bytes) -> Sequence[Any]:
    """The JSON lines of a chunked answer; a chunk is a line here."""
    chunks = body.split(b"\r\n")[1::2]
    return [json.loads(chunk) for chunk in chunks if chunk]
