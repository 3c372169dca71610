"""The guest agent over Firecracker's vsock socket: framed JSON, one request per connection.

The guest is not trusted: sizes, times and texts are bounded, and only the few fields named here are
used. A booting guest has no listener yet (the VMM closes the connection), the first connection
after a resume may be cut, and a paused guest never replies: so each attempt makes a new connection,
until the time is up.

Source: docs/vsock.md of Firecracker; the frames are agentd's contract, `SetClock` is hostd's own.
"""

import asyncio
import socket
import struct
import time
from collections.abc import Callable
from typing import Annotated

import msgspec

from handlers.errors import Unavailable
from handlers.host.jail.layout import JailLayout
from handlers.host.jail.sockets import connect
from handlers.jail_names import VSOCK_SOCKET
from handlers.specs import Ack
from schemas.settings import Settings

FRAME_BYTES = 262_144
LINE_BYTES = 64
TEXT_CHARS = 200
FIRST_WAIT_S = 0.0005
LAST_WAIT_S = 0.1
WAIT_GROWTH = 1.25
FIRST_SILENCE_S = 0.25
LAST_SILENCE_S = 2.0
REFUSALS = 3
WAKE_ANSWER_S = 5.0


class _Success(msgspec.Struct, frozen=True):
    success: bool
    detail: str | None = None


class _Clock(msgspec.Struct, frozen=True):
    was_off_nanos: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Message(msgspec.Struct, frozen=True):
    message: str = ""


class _Answer(msgspec.Struct, frozen=True):
    """serde's externally tagged enum as a map with one key; `Pong` is a plain string."""

    SleepPrepAck: _Success | None = None
    WakeAck: _Success | None = None
    ClockAck: _Clock | None = None
    Error: _Message | None = None


class GuestAgents:
    """Sends agentd's requests to the guests of jails below `[vmm] jail_base`.

    Each call connects again and retries until `timeout_s`.

    Raises:
        Unavailable: no well-formed reply within `timeout_s`, or the agent replied with an error.
        HostFault: the vsock socket in the jail is not a socket.
    """

    def __init__(self, settings: Settings) -> None:
        self._layout = JailLayout(settings.jail_base)

    async def ping(self, jail_id: str, port: int, *, timeout_s: float) -> None:
        answer = await self._ask(jail_id, port, lambda: "Ping", timeout_s=timeout_s)
        if answer != "Pong":
            raise _unexpected("Ping", answer)

    async def sleep_prep(
        self, jail_id: str, port: int, *, drain_timeout_s: int, timeout_s: float
    ) -> Ack:
        request = {"SleepPrep": {"drain_timeout_secs": drain_timeout_s}}
        answer = await self._ask(
            jail_id, port, lambda: request, timeout_s=timeout_s, answer_timeout_s=timeout_s
        )
        if isinstance(answer, str) or answer.SleepPrepAck is None:
            raise _unexpected("SleepPrep", answer)
        return _ack(answer.SleepPrepAck)

    async def wake(self, jail_id: str, port: int, *, timeout_s: float) -> Ack:
        # Mounting takes the agent a while; a second request meanwhile would make it mount twice.
        answer = await self._ask(
            jail_id,
            port,
            lambda: "Wake",
            timeout_s=timeout_s,
            answer_timeout_s=min(timeout_s, WAKE_ANSWER_S),
        )
        if isinstance(answer, str) or answer.WakeAck is None:
            raise _unexpected("Wake", answer)
        return _ack(answer.WakeAck)

    async def set_clock(self, jail_id: str, port: int, *, timeout_s: float) -> float:
        answer = await self._ask(
            jail_id,
            port,
            lambda: {"SetClock": {"unix_nanos": time.time_ns()}},
            timeout_s=timeout_s,
        )
        if isinstance(answer, str) or answer.ClockAck is None:
            raise _unexpected("SetClock", answer)
        return answer.ClockAck.was_off_nanos / 1e9

    async def _ask(
        self,
        jail_id: str,
        port: int,
        request: Callable[[], object],
        *,
        timeout_s: float,
        answer_timeout_s: float | None = None,
    ) -> str | _Answer:
        """Retry until there is a reply; each attempt sends a new `request()`.

        An attempt without a reply ends after 0.25 s at first, later after 2 s; a request that takes
        the agent longer sets `answer_timeout_s`.
        """
        root = self._layout.root(jail_id)
        last = "no reply"
        wait_s = FIRST_WAIT_S
        silence_s = FIRST_SILENCE_S
        refusals = 0
        limit = f" within {timeout_s:g} s"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        last = "no reply"
                        frame = await exchange(
                            root,
                            port,
                            request,
                            connect_timeout_s=silence_s,
                            answer_timeout_s=answer_timeout_s or silence_s,
                        )
                        return _decode(frame)
                    except ConnectionRefusedError:
                        refusals += 1
                        last = "the VMM is gone"
                        if refusals >= REFUSALS:
                            limit = ""
                            break
                    except TimeoutError:
                        silence_s = min(silence_s * 2, LAST_SILENCE_S)
                    except (OSError, EOFError) as error:
                        missing = isinstance(error, FileNotFoundError)
                        last = "no socket" if missing else "connection closed"
                    await asyncio.sleep(wait_s)
                    wait_s = min(wait_s * WAIT_GROWTH, LAST_WAIT_S)
        except TimeoutError:
            pass
        raise Unavailable(
            f"the guest agent did not reply on port {port}{limit}: {last}",
            detail={"agent": last},
        )


async def exchange(
    root: str,
    port: int,
    request: Callable[[], object],
    *,
    connect_timeout_s: float,
    answer_timeout_s: float,
) -> bytes:
    """Send one request on a new connection to a guest's port; returns the frame of the reply.

    Args:
        root: the root directory of the VMM's jail.
        port: the guest's vsock port.
        request: makes the request, once the connection is accepted.

    Raises:
        Unavailable: the guest broke the protocol.
        OSError, EOFError, TimeoutError: no connection, cut, or no reply; may be tried again.
        HostFault: the vsock socket in the jail is not a socket.
    """
    with connect(root, VSOCK_SOCKET) as connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(connect_timeout_s):
            await loop.sock_sendall(connection, f"CONNECT {port}\n".encode())
            await _read_ok(connection)
        body = msgspec.json.encode(request())
        async with asyncio.timeout(answer_timeout_s):
            await loop.sock_sendall(connection, struct.pack(">I", len(body)) + body)
            (length,) = struct.unpack(">I", await _read_exactly(connection, 4))
            if length > FRAME_BYTES:
                raise Unavailable(
                    f"guest agent protocol error: frame of {length} bytes, at most {FRAME_BYTES}"
                )
            return await _read_exactly(connection, length)


def _decode(frame: bytes) -> str | _Answer:
    try:
        return msgspec.json.decode(frame, type=str | _Answer)
    except (ValueError, RecursionError) as error:
        raise Unavailable("guest agent protocol error: the reply cannot be decoded") from error


async def _read_ok(connection: socket.socket) -> None:
    """Read the VMM's `OK <host port>\\n`, after which the guest's bytes begin."""
    line = b""
    while b"\n" not in line and len(line) < LINE_BYTES:
        more = await asyncio.get_running_loop().sock_recv(connection, LINE_BYTES - len(line))
        if not more:
            raise EOFError
        line += more
    if not (line.startswith(b"OK ") and line.endswith(b"\n")):
        raise Unavailable("guest agent protocol error: unsolicited data")


async def _read_exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        more = await asyncio.get_running_loop().sock_recv(connection, length - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)


def _ack(success: _Success) -> Ack:
    return Ack(success.success, None if success.detail is None else _bounded(success.detail))


def _bounded(text: str) -> str:
    """At most 200 characters of a guest's text, all printable."""
    return "".join(c if c.isprintable() else "?" for c in text[:TEXT_CHARS])


def _unexpected(asked: str, answer: str | _Answer) -> Unavailable:
    if isinstance(answer, _Answer) and answer.Error is not None:
        message = _bounded(answer.Error.message)
        return Unavailable(f"the guest agent refused {asked}: {message}", detail={"agent": message})
    return Unavailable(f"guest agent protocol error: unexpected reply type to {asked}")
