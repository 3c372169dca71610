"""The client's connection: requests, publications, and what streams keep, with the client's errors.

Not part of the stable surface. Stands on the worker's own connection (`worker/bus/connection.py`),
which reconnects for as long as it is open and sends a credential only where it may.
"""

import asyncio
import json
import logging
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, cast

import structlog
from nats import errors

from schemas.settings import NatsSettings, without_password
from worker.bus import streams
from worker.bus.api_reply import header_number, member, read_reply, sequence_of
from worker.bus.connection import Connection
from worker.bus.credentials import CredentialsFile
from worker.bus.guarded_client import Tuning
from worker.bus.message import Message, NoResponder, Subscription
from worker.bus.protocol import BusError, Unsendable
from worker.client.errors import BadSetting, NoAnswer, NoConnection, NotFound, NotStored

PUBLISH_TIMEOUT_S: Final = 5.0
ASK_TIMEOUT_S: Final = 5.0
# The first attempt at once: a command line connects for one command.
TUNING: Final = Tuning(backoff_base_s=0.01)
ELECTION_S: Final = 15.0  # within which a stream of a cluster has a leader again
AGAIN_S: Final = 0.25
# Source: errors.json of nats-server: no message found, sequence not found, stream not found.
MISSING: Final = frozenset({10037, 10043, 10059})
TRIES: Final = 2  # per server; an attempt may report two errors

_python_log = logging.getLogger("hostd.client")
_python_log.addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class Kept:
    """One message of a stream, with its headers and those that the server adds."""

    seq: int
    subject: str
    headers: Mapping[str, str]
    data: bytes


class _Subscribed:
    """One subscription, over any number of connections."""

    def __init__(
        self, subject: str, receive: Callable[[Message], None], lost: Callable[[], None]
    ) -> None:
        self._subject, self._receive, self.lost = subject, receive, lost
        self._current: Subscription | None = None

    async def subscribe(self, connection: Connection) -> None:
        made = await connection.subscribe(self._subject, self._receive)
        before, self._current = self._current, made
        if before is not None:  # of the connection before; or two have subscribed at once
            with suppress(errors.Error, OSError):
                await before.unsubscribe()

    async def unsubscribe(self) -> None:
        if self._current is not None:
            await self._current.unsubscribe()


class Link:
    """Made by `open_link`. All its methods raise `NoAnswer` where nothing answers."""

    def __init__(self, connection: Connection, js_domain: str) -> None:
        self.connection = connection
        self._api = streams.js_api(js_domain)
        self._subscribed: list[_Subscribed] = []
        self._again: asyncio.Task[None] | None = None
        connection.on_loss(self._on_loss)
        connection.on_up(self._on_up)

    @property
    def election_s(self) -> float:
        """How long a stream may be without a leader before it counts as missing; 0: no cluster."""
        client = self.connection.client
        return ELECTION_S if client is not None and client.is_clustered else 0.0

    async def close(self) -> None:
        """End what the link does in the background."""
        if self._again is not None:
            self._again.cancel()
            await asyncio.gather(self._again, return_exceptions=True)

    def _on_loss(self) -> None:
        for each in self._subscribed:
            each.lost()

    def _on_up(self, fresh: bool) -> None:
        if fresh:  # the subscriptions are gone with nats-py's client
            if self._again is not None:
                self._again.cancel()
            self._again = asyncio.create_task(self._subscribe_again())

    async def _subscribe_again(self) -> None:
        for each in list(self._subscribed):
            with suppress(BusError, errors.Error, OSError):  # lost again: the next one subscribes
                await each.subscribe(self.connection)
                if each not in self._subscribed:  # its block ended meanwhile
                    await each.unsubscribe()

    # -- messages --------------------------------------------------------------------------------

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> Message:
        """One answer to a message.

        Raises:
            NoResponder: nothing has that subject, or not for this account.
            NoAnswer: none in time, or not connected.
        """
        began = time.monotonic()
        try:
            return await self.connection.request(subject, payload, timeout_s=timeout_s)
        except NoResponder:
            raise
        except BusError as error:
            denied = self.connection.denial(subject, began)
            raise NoAnswer(denied or str(error)) from error

    async def publish(
        self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        """Publish to the stream that has this subject; returns once it is stored.

        A command has no `Nats-Msg-Id`: the server would drop a different request with the same ID,
        and its sender would get the reply to the first. The worker compares the requests.

        Raises:
            NotStored: it is not, and will not be.
            NoAnswer: it is open whether it is.
        """
        began = time.monotonic()
        try:
            answer = await self._ask_leader(subject, payload, headers, PUBLISH_TIMEOUT_S)
            reply = read_reply(answer.data, subject)
        except NoResponder as error:
            raise NotStored(
                f"no JetStream stream is bound to {subject}: run `hostd provision`, and check host "
                "ID, cell and the imports of this account"
            ) from error
        except Unsendable as error:
            raise NotStored(f"cannot publish to {subject}: {error}") from error
        except BusError as error:
            if denied := self.connection.denial(subject, began):
                raise NotStored(f"cannot publish to {subject}: {denied}") from error
            raise NoAnswer(f"cannot publish to {subject}: {error}") from error
        if failure := reply.get("error"):
            raise NotStored(f"JetStream refused to publish {subject}: {failure.get('description')}")

    @asynccontextmanager
    async def subscribed(
        self,
        subject: str,
        receive: Callable[[Message], None],
        lost: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[None]:
        """Call `receive` for each message, now and on each later connection.

        `lost` is called when the connection was lost: some messages may be.
        """
        each = _Subscribed(subject, receive, lost)
        self._subscribed.append(each)
        try:
            try:
                await each.subscribe(self.connection)
                await self.connection.settle()  # or what is sent next by others may be missed
            except BusError as error:
                raise NoAnswer(f"cannot subscribe to {subject}: {error}") from error
            yield
        finally:
            self._subscribed.remove(each)
            with suppress(errors.Error, OSError):  # gone with its connection
                await each.unsubscribe()

    # -- streams ---------------------------------------------------------------------------------
    # Read message by message: a consumer would need the right to make the server publish.

    async def kept(self, stream: str, subjects: str) -> AsyncIterator[Kept]:
        """Retained messages of these subjects, oldest first, up to now."""
        last = await self.last_seq(stream)
        sequence = 0
        while sequence < last:
            message = await self.next(stream, subjects, sequence)
            if message is None:
                return
            sequence = message.seq
            if sequence <= last:
                yield message

    async def last_seq(self, stream: str) -> int:
        """The sequence of the newest message that the stream ever had."""
        answer = await self._ask_api(f"STREAM.INFO.{stream}", {}, stream)
        try:
            info = read_reply(answer.data, f"stream {stream}")
            if "error" in info:
                raise NoAnswer(f"cannot read stream {stream}: {info['error'].get('description')}")
            return sequence_of(member(info, "state", stream), "last_seq", stream)
        except BusError as error:
            raise NoAnswer(f"cannot read stream {stream}: {error}") from error

    async def next(self, stream: str, subjects: str, after: int) -> Kept | None:
        """The first retained message of these subjects after a sequence; None if there is none."""
        message = await self._get(stream, {"seq": after + 1, "next_by_subj": subjects})
        if message is not None and message.seq <= after:
            raise NoAnswer(f"cannot read stream {stream} after message {after}: it repeats")
        return message

    async def last(self, stream: str, subject: str) -> Kept | None:
        """The newest message of one subject; a credential of one host may read its own."""
        return await self._get(f"{stream}.{subject}", {})

    async def kept_message(self, stream: str, seq: int) -> Kept:
        """One retained message. Raises `NotFound`."""
        message = await self._get(stream, {"seq": seq})
        if message is None:
            raise NotFound(f"stream {stream} has no message {seq}")
        return message

    async def delete(self, stream: str, seq: int) -> None:
        """Delete a message of a stream, with an administrator's credential.

        Raises:
            NotFound: no message with this sequence, or no stream of this name.
            NoAnswer: the server did not delete it; it may say why.
        """
        body = {"seq": seq, "no_erase": True}
        answer = await self._ask_api(f"STREAM.MSG.DELETE.{stream}", body, stream, reads=False)
        try:
            reply = read_reply(answer.data, f"stream {stream}")
        except BusError as error:
            raise NoAnswer(f"cannot delete message {seq}: {error}") from error
        if failure := reply.get("error"):
            text = f"cannot delete message {seq} of {stream}: {failure.get('description')}"
            raise NotFound(text) if failure.get("err_code") in MISSING else NoAnswer(text)

    async def _get(self, what: str, body: Mapping[str, Any]) -> Kept | None:
        answer = await self._ask_api(f"DIRECT.GET.{what}", body, what)
        headers = answer.headers
        if headers.get("Status") == "404":
            return None
        seq = header_number(headers.get("Nats-Sequence", ""))
        if seq is None:
            why = headers.get("Description", "no sequence")
            raise NoAnswer(f"cannot read stream {what}: {why}")
        return Kept(seq, headers.get("Nats-Subject", ""), headers, answer.data)

    async def _ask_api(
        self, endpoint: str, body: Mapping[str, Any], stream: str, *, reads: bool = True
    ) -> Message:
        payload = json.dumps(body).encode() if body else b""
        subject = f"{self._api}{endpoint}"
        began = time.monotonic()
        try:
            return await self._ask_leader(subject, payload, None, ASK_TIMEOUT_S, reads=reads)
        except NoResponder as error:
            raise NoAnswer(
                f"cannot read stream {stream}: nothing answers {self._api}{endpoint}; check that "
                "`hostd provision` was run, that this account imports that subject, and "
                "[nats] js_domain"
            ) from error
        except BusError as error:
            denied = self.connection.denial(subject, began)
            raise NoAnswer(f"cannot read stream {stream}: {denied or error}") from error

    async def _ask_leader(
        self,
        subject: str,
        payload: bytes,
        headers: Mapping[str, str] | None,
        timeout_s: float,
        *,
        reads: bool = False,
    ) -> Message:
        """What a stream's leader answers: a stream without one looks like one that is missing, or
        does not answer what only `reads`."""
        began = time.monotonic()
        end = began + self.election_s
        while True:
            try:
                return await self.connection.request(
                    subject, payload, headers=headers, timeout_s=timeout_s
                )
            except NoResponder:
                if time.monotonic() >= end:
                    raise
            except Unsendable:
                raise
            except BusError:
                denied = self.connection.denial(subject, began)
                if not reads or denied or time.monotonic() >= end:
                    raise
            await asyncio.sleep(AGAIN_S)


@asynccontextmanager
async def open_link(
    nats: NatsSettings, *, name: str, inbox: str, timeout_s: float, patient: bool = True
) -> AsyncGenerator[Link]:
    """Connect; afterwards a lost connection comes back by itself. `inbox` is without a final dot.

    Tries until `timeout_s`, or, if not `patient`, until each server was tried.

    Raises:
        BadSetting: a file cannot be used.
        NoConnection: no server takes this client within `timeout_s`.
    """
    if nats.creds:
        check_credentials(nats.creds)
    if nats.tls:
        _check_authority(nats.tls)
    connection = Connection(nats, name=name, inbox=inbox, tuning=TUNING, logger=_logger())
    servers = nats.url.split(",")
    await connection.start()
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                if patient:
                    await connection.wait_connected()
                else:
                    await connection.wait_tried(TRIES * len(servers))
        if not connection.connected:
            why = (connection.failures or [f"no connection within {timeout_s:g} s"])[0]
            raise NoConnection(f"cannot connect to NATS at {without_password(nats.url)}: {why}")
        link = Link(connection, nats.js_domain)
        try:
            yield link
        finally:
            await link.close()
    finally:
        await connection.close()


def check_credentials(path: str) -> None:
    """Check that the file is readable, for its owner only, and in one of its two forms.

    Raises:
        BadSetting: the message names the file.
    """
    try:
        CredentialsFile(path).check()
    except OSError as error:
        raise BadSetting(f"cannot read NATS credentials file {path}: {error.strerror}") from error
    except errors.Error as error:
        raise BadSetting(str(error)) from error


def _check_authority(path: str) -> None:
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        raise BadSetting(f"{path}: {error.strerror or error}") from error


def _logger() -> structlog.typing.FilteringBoundLogger:
    """Python's logger `hostd.client`: how a program logs is not the client's to configure."""
    wrapped = structlog.wrap_logger(
        _python_log,
        processors=[
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return cast("structlog.typing.FilteringBoundLogger", wrapped)
