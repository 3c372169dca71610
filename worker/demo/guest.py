"""The demo's side of the guest: traffic through its TAP, and what its agent remembers."""

import asyncio
import json
import struct
from typing import Any

from handlers.errors import Unavailable
from handlers.host.jail.sockets import connect
from handlers.jail_names import VSOCK_SOCKET

ECHO_PORT = 7
AGENT_PORT = 5252


async def echo_through_tap(guest_ip: str, text: bytes, *, timeout_s: float = 20.0) -> float:
    """Send text to the guest's TCP echo service; returns the seconds until it came back."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                reader, writer = await asyncio.open_connection(guest_ip, ECHO_PORT)
                break
            except OSError:
                await asyncio.sleep(0.1)
        try:
            writer.write(text)
            answer = await reader.readexactly(len(text))
        finally:
            writer.transport.abort()
    if answer != text:
        raise Unavailable(f"the guest at {guest_ip} echoed something else")
    return loop.time() - started


async def read_stat(jail_root: str, *, timeout_s: float = 20.0) -> dict[str, Any]:
    """The test guests' own `Stat`: counter, boots, boot_id, clock; asked until answered."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                answer = await asyncio.wait_for(_ask(jail_root, "Stat"), 3)
            except (OSError, EOFError, TimeoutError):
                await asyncio.sleep(0.05)
                continue
            stat: dict[str, Any] = answer["Stat"]
            return stat


async def _ask(jail_root: str, request: object) -> Any:
    body = json.dumps(request).encode()
    loop = asyncio.get_running_loop()
    with connect(jail_root, VSOCK_SOCKET) as connection:
        await loop.sock_sendall(connection, f"CONNECT {AGENT_PORT}\n".encode())
        line = b""
        while not line.endswith(b"\n"):
            line += await loop.sock_recv(connection, 1) or _eof()
        await loop.sock_sendall(connection, struct.pack(">I", len(body)) + body)
        frame = b""
        while len(frame) < 4 or len(frame) < 4 + int.from_bytes(frame[:4], "big"):
            frame += await loop.sock_recv(connection, 65536) or _eof()
    return json.loads(frame[4:])


def _eof() -> bytes:
    raise EOFError
