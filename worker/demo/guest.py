"""The demo's view of the guest: traffic through its TAP, and the state its agent reports."""

import asyncio
import json
from typing import Any

from handlers.errors import Unavailable
from handlers.host.vmm.guest_agent import exchange

ECHO_PORT = 7
AGENT_PORT = 5252
ATTEMPT_S = 3.0


async def echo_through_tap(guest_ip: str, text: bytes, *, timeout_s: float = 20.0) -> float:
    """Send text to the guest's TCP echo service; return the round-trip time in seconds."""
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
        raise Unavailable(
            f"echo mismatch from guest {guest_ip}: sent {text!r}, received {answer!r}"
        )
    return loop.time() - started


async def read_stat(jail_root: str, *, timeout_s: float = 20.0) -> dict[str, Any]:
    """The test guests' own request `Stat`: counter, boots, boot_id, clock; retried on silence."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                frame = await exchange(
                    jail_root,
                    AGENT_PORT,
                    lambda: "Stat",
                    connect_timeout_s=ATTEMPT_S,
                    answer_timeout_s=ATTEMPT_S,
                )
            except (OSError, EOFError, TimeoutError):
                await asyncio.sleep(0.05)
                continue
            stat: dict[str, Any] = json.loads(frame)["Stat"]
            return stat
