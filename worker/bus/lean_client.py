"""nats-py's client with publications, requests and deliveries of its own.

nats-py connects, signs in, pings and reconnects. For each message it also makes a future, a task
that flushes, a queue and a task per subscription, and `wait_for` per request: more than all else of
a command that changes nothing. Here a message is written to the transport at once (uvloop makes one
system call per turn of the loop of it), an answer resolves the future of its request, and what was
read is handed over without a task. What the transport cannot take now goes nats-py's way, which
waits for the peer. No subjects, no policy.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# pyright: reportPrivateUsage=false

import asyncio
import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import structlog
from nats import errors
from nats.aio.client import Client
from nats.aio.subscription import Subscription

from worker.bus.message import Message, to_message
from worker.bus.strict_client import StrictClient
from worker.bus.wire import read_headers

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

BUFFERED_MAX: Final = 65_536  # of unsent bytes; beyond it nats-py's flusher waits for the peer
TOKEN_BYTES, TOKENS = 8, 128
_SPACE = re.compile(r"[ \t\r\n]")
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_LINE_ENDS = str.maketrans({"\r": " ", "\n": " "})


class LeanClient(StrictClient):
    """A strict client; `put`, `ask` and `listen` are for a client that is connected."""

    def __init__(self, *, tls: bool, own_parser: bool = True) -> None:
        super().__init__(tls=tls, own_parser=own_parser)
        self._listeners: dict[int, Callable[[Message], None]] = {}
        self._asked: dict[str, asyncio.Future[Message]] = {}
        self._write_due = False
        self._answers = ""
        self._tokens: list[str] = []

    # -- out -------------------------------------------------------------------------------------

    def put(self, subject: str, payload: bytes, *, headers: bytes = b"", reply: str = "") -> None:
        """Send one message; `headers` as `encode_headers` makes them.

        Raises:
            errors.BadSubjectError: the subject is empty or has a space.
        """
        if not subject or _SPACE.search(subject):
            raise errors.BadSubjectError
        if headers:
            size = len(headers) + len(payload)
            line = f"HPUB {subject} {reply} {len(headers)} {size}\r\n"
        else:
            line = f"PUB {subject} {reply} {len(payload)}\r\n"
        command = b"".join((line.encode(), headers, payload, b"\r\n"))
        self._pending.append(command)
        self._pending_data_size += len(command)
        if not self._write_due:
            self._write_due = True
            asyncio.get_running_loop().call_soon(self.write_now)

    def write_now(self) -> bool:
        """Write what was put, now and not in the next turn of the loop.

        False: the connection has just ended, and what was put is lost with it.
        """
        self._write_due = False
        if not self._pending:
            return True
        writer: Any = getattr(self._transport, "_io_writer", None)  # None: a WebSocket
        if self._status != Client.CONNECTED:
            return True  # written once it is connected again, or with the last words of `close`
        if (
            writer is None
            or writer.transport.get_write_buffer_size() + self._pending_data_size > BUFFERED_MAX
        ):
            if self._flush_queue is not None and self._flush_queue.empty():
                self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())
            return True
        commands, self._pending, self._pending_data_size = self._pending, [], 0
        try:
            writer.write(b"".join(commands))
        except (OSError, RuntimeError):  # the transport is closed, which nats-py does not know yet
            return False
        return True

    @property
    def congested(self) -> bool:
        """Whether so much is unsent that a sender must wait (`relieved`)."""
        return self._pending_data_size > self._max_pending_size > 0

    async def relieved(self) -> None:
        """Return once what is unsent was sent, or after the client's `flush_timeout`."""
        await self._flush_pending(force_flush=True)

    async def settle(self, timeout_s: float) -> None:
        """Return once the server has taken all that was sent before, e.g. a subscription.

        Raises:
            errors.Error: it does not answer in time, or the connection was lost.
        """
        # nats-py's `flush` writes its PING in front of what is pending.
        self.write_now()
        if self._pending:
            await self.relieved()
        await self.flush(timeout_s)  # type: ignore[arg-type]

    # -- requests --------------------------------------------------------------------------------

    async def listen_for_answers(self) -> None:
        """Once, after connecting: `ask` needs it."""
        prefix = f"{self.new_inbox()}."
        await self.listen(f"{prefix}*", self._answered)
        self._answers = prefix

    async def ask(
        self, subject: str, payload: bytes, *, headers: bytes = b"", timeout_s: float
    ) -> Message:
        """Put a message whose reply subject is this client's; return the first answer.

        Raises:
            errors.TimeoutError: none came in time.
            errors.ConnectionClosedError: the connection was lost (`fail_asked`).
        """
        if not self._tokens:
            # Whoever sees one reply subject must not be able to answer the next request.
            fresh = os.urandom(TOKEN_BYTES * TOKENS).hex()
            step = 2 * TOKEN_BYTES
            self._tokens = [fresh[at : at + step] for at in range(0, len(fresh), step)]
        token = self._tokens.pop()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Message] = loop.create_future()
        self._asked[token] = future
        timer = loop.call_later(timeout_s, _expire, future)
        try:
            self.put(subject, payload, headers=headers, reply=f"{self._answers}{token}")
            if self.congested:
                await self.relieved()
            return await future
        finally:
            timer.cancel()
            self._asked.pop(token, None)

    def _answered(self, message: Message) -> None:
        future = self._asked.get(message.subject[len(self._answers) :])
        if future is not None and not future.done():
            future.set_result(message)

    def fail_asked(self) -> None:
        """No answer can arrive any more."""
        for future in list(self._asked.values()):
            if not future.done():
                future.set_exception(errors.ConnectionClosedError())

    # -- in --------------------------------------------------------------------------------------

    async def listen(
        self, subject: str, receive: Callable[[Message], None], *, queue: str = ""
    ) -> Subscription:
        """Subscribe; `receive` is called by the reader. Repeated by nats-py after a reconnect."""
        sid = self._sid + 1  # of the next one; a message may arrive before `subscribe` returns
        self._listeners[sid] = receive
        try:
            # With a future nats-py starts no task. It never gets a message: `take` is first.
            unused: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            subscription: Subscription = await self.subscribe(subject, queue=queue, future=unused)
        except BaseException:
            self._listeners.pop(sid, None)
            raise
        return subscription

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        super()._remove_sub(sid, max_msgs)
        self._listeners.pop(sid, None)

    def take(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> bool:
        receive = self._listeners.get(sid)
        if receive is None:
            return False
        # U+FFFD is in no subject of hostd: the message is refused as any other that is invalid.
        _hand_over(
            receive,
            Message(
                subject.decode(errors="replace"),
                reply.decode(errors="replace"),
                data,
                (read_headers(headers) if headers else None) or {},
            ),
        )
        return True

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        if (receive := self._listeners.get(sid)) is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        found = await self._process_headers(headers)
        _hand_over(receive, to_message(self._build_message(sid, subject, reply, data, found)))


def _hand_over(receive: Callable[[Message], None], message: Message) -> None:
    try:
        receive(message)
    except Exception:
        # It would end the reader, and with it all that arrives.
        log.exception("bus.callback_failed", subject=message.subject)


def _expire(future: asyncio.Future[Message]) -> None:
    if not future.done():
        future.set_exception(errors.TimeoutError())


def encode_headers(headers: Mapping[str, str] | None) -> bytes:
    """The headers of a message as they are sent; empty without any.

    Raises:
        errors.BadHeaderError: a name has a character that no name may have.
        UnicodeEncodeError: a value has no UTF-8.
    """
    if not headers:
        return b""
    lines = [b"NATS/1.0"]
    lines += [
        _header_name(name) + value.strip().translate(_LINE_ENDS).encode()
        for name, value in headers.items()
    ]
    return b"\r\n".join((*lines, b"\r\n"))


@lru_cache(maxsize=64)
def _header_name(name: str) -> bytes:
    if not _HEADER_NAME.fullmatch(name):
        raise errors.BadHeaderError(name)
    return name.encode() + b": "
