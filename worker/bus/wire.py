"""Reads what a NATS server sends. Whatever a message contains, the next one is read.

Replaces nats-py's parser. That one separates fields by any white space: a subject with a vertical
tab or a form feed, which the server permits, ends the reader or moves the message to another
subscription. It also fails on a subject that is not UTF-8 and on headers without a line of their
own. The stream redelivers such a message after each reconnect, so that no other one is received.

Source: the NATS client protocol (MSG, HMSG, INFO, -ERR, PING, PONG, +OK); fields are separated by
spaces or tabs, lines end with CR LF.
"""

# ruff: noqa: SLF001 (the methods of nats-py's client that its own parser calls)
# pyright: reportPrivateUsage=false

import json
import re
from collections.abc import Awaitable
from typing import Any, Protocol

from nats import errors
from nats.js.api import Header

LINE_MAX = 1_048_576
MESSAGE_MAX = 67_108_864  # the server's own limit of max_payload
_CRLF = b"\r\n"
_BLANKS = re.compile(rb"[ \t]+")
_VERSION = b"NATS/1.0"
_NAME = re.compile(rb"[\x21-\x39\x3b-\x7e]+")


class Receiver(Protocol):
    """The client that is called for what was read; all but `take` is nats-py's."""

    def take(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> bool:
        """Whether the message was handed over; else `_process_msg` is called with it."""
        ...

    def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> Awaitable[None]: ...

    def _process_err(self, err_msg: str) -> Awaitable[None]: ...

    def _process_info(self, info: dict[str, Any]) -> Awaitable[None]: ...

    def _process_ping(self) -> Awaitable[None]: ...

    def _process_pong(self) -> Awaitable[None]: ...


class WireParser:
    """Has the interface of nats-py's `Parser`: `parse` bytes as they arrive, `reset`."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._buffer = bytearray()
        self._message: tuple[bytes, int, bytes, int, int] | None = None
        self._searched = 0

    def reset(self) -> None:
        """Forget what was read: another connection begins."""
        self._buffer = bytearray()
        self._message = None
        self._searched = 0

    async def parse(self, data: bytes = b"") -> None:
        """Read all that is complete.

        Raises:
            errors.ProtocolError: the server sent something that is not the NATS protocol; where
                its next line begins is unknown.
        """
        self._buffer.extend(data)
        while self._buffer:
            if self._message is not None:
                if not await self._read_message(self._message):
                    return
                continue
            end = self._buffer.find(_CRLF, self._searched)
            if end < 0:
                self._searched = max(0, len(self._buffer) - 1)
                if len(self._buffer) > LINE_MAX:
                    raise errors.ProtocolError(f"a line of more than {LINE_MAX} bytes")
                return
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 2]
            self._searched = 0
            await self._read_line(line)

    async def _read_line(self, line: bytes) -> None:
        verb, _, rest = line.partition(b" ") if b" " in line else line.partition(b"\t")
        match verb.upper():
            case b"MSG":
                self._message = _message(rest, headers=False)
            case b"HMSG":
                self._message = _message(rest, headers=True)
            case b"PING":
                await self._receiver._process_ping()
            case b"PONG":
                await self._receiver._process_pong()
            case b"+OK":
                pass
            case b"-ERR":
                await self._receiver._process_err(rest.decode(errors="replace").strip().lower())
            case b"INFO":
                await self._receiver._process_info(_info(rest))
            case _:
                raise errors.ProtocolError(f"unknown operation {verb[:32]!r}")

    async def _read_message(self, message: tuple[bytes, int, bytes, int, int]) -> bool:
        """Pass on the message whose line was read; false while bytes of it are missing."""
        subject, sid, reply, headers, size = message
        if len(self._buffer) < size + 2:
            return False
        block, data = bytes(self._buffer[:headers]), bytes(self._buffer[headers:size])
        del self._buffer[: size + 2]
        self._message = None
        if not self._receiver.take(sid, subject, reply, data, block):
            await self._receiver._process_msg(sid, subject, reply, data, block)
        return True


def _message(fields: bytes, *, headers: bool) -> tuple[bytes, int, bytes, int, int]:
    """Subject, subscription, reply subject, size of the headers, size with the headers."""
    found = fields.split(b" ")
    if b"" in found or b"\t" in fields:  # spelt as no server does
        found = _BLANKS.split(fields.strip(b" \t"))
    numbers = 2 if headers else 1
    if len(found) not in (2 + numbers, 3 + numbers):
        raise errors.ProtocolError(f"a message line with {len(found)} fields")
    reply = found[2] if len(found) == 3 + numbers else b""
    sid, size = _number(found[1]), _number(found[-1])
    header_size = _number(found[-2]) if headers else 0
    if header_size > size or size > MESSAGE_MAX:
        raise errors.ProtocolError(f"a message of {size} bytes with headers of {header_size}")
    return found[0], sid, reply, header_size, size


def _number(field: bytes) -> int:
    if not field.isdigit() or len(field) > 18:
        raise errors.ProtocolError(f"expected a number, found {field[:32]!r}")
    return int(field)


def _info(text: bytes) -> dict[str, Any]:
    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise errors.ProtocolError("INFO is not JSON") from error
    if not isinstance(info, dict):
        raise errors.ProtocolError("INFO is not a JSON object")
    return info  # pyright: ignore[reportUnknownVariableType]


def read_headers(block: bytes) -> dict[str, str] | None:
    """The headers of a message; None without any. A line that is not a header is left out.

    The server's own status is returned as headers `Status` and `Description`. Of a repeated name
    the last value counts. Bytes that are not UTF-8 become U+FFFD.
    """
    first, _, rest = block.partition(_CRLF)
    found: dict[str, str] = {}
    status, _, description = first.removeprefix(_VERSION).strip(b" \t").partition(b" ")
    if status.isdigit():
        found[Header.STATUS.value] = status.decode()
        if description := description.strip():
            found[Header.DESCRIPTION.value] = description.decode(errors="replace")
    for line in rest.split(_CRLF):
        name, colon, value = line.partition(b":")
        if colon and _NAME.fullmatch(name := name.strip(b" \t")):
            found[name.decode()] = value.strip().decode(errors="replace")
    return found or None
