"""A client of the wire protocol: plain nats-py with short timeouts.

Of the worker it imports only how to connect and sign in, so that it doubles as the reference client
for authors of an agentd in any language.
"""

# pyright: reportUnknownMemberType=false
# (nats-py has untyped parameters)

import asyncio
import json
import os
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from schemas import codec
from schemas.decode_error import DecodeError
from schemas.envelopes import Command
from schemas.requests import Request
from schemas.settings import Settings
from schemas.subjects import Lane, Subjects
from schemas.unpack import Limits, pack, unpack_map
from worker.bus.api_reply import header_number, member, read_reply, sequence_of
from worker.bus.credentials import CredentialsFile
from worker.bus.protocol import BusError
from worker.bus.strict_client import StrictClient, requires_tls, without_password
from worker.cli.context import CliError, NoAnswer, NoWorker

CONNECT_TIMEOUT_S: Final = 3
PUBLISH_TIMEOUT_S: Final = 5.0
ASK_TIMEOUT_S: Final = 5.0
_ANSWER = Limits(size_bytes=8 << 20, containers=100_000, items=50_000, depth=16)


def new_id() -> str:
    """A UUIDv7: 48 bits of Unix milliseconds, then random bits; sorts by time. Source: RFC 9562."""
    now_ms = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = now_ms << 80 | random
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    text = f"{value:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


@dataclass(frozen=True, slots=True)
class Kept:
    """One message of a stream, with its headers and those that the server adds."""

    seq: int
    subject: str
    headers: Mapping[str, str]
    data: bytes


class Client:
    """One NATS connection, opened by `connect`. Raises only NoAnswer and CliError."""

    def __init__(self, connection: Nats, root: str, cell: str, js_domain: str = "") -> None:
        self.nats = connection
        self._api = f"$JS.{js_domain}.API." if js_domain else "$JS.API."
        self._root = root
        self._cell = cell

    def _subjects(self, host: str) -> Subjects:
        try:
            return Subjects(self._root, host, self._cell)
        except ValueError as error:
            raise CliError("invalid", str(error)) from error

    async def send(
        self,
        host: str,
        request: Request,
        *,
        timeout_s: float,
        command_id: str | None = None,
        deadline_ms: int | None = None,
        issuer: str = "hostd-cli",
    ) -> dict[str, Any]:
        """Publish one command and return its reply envelope as a map.

        The `command_id` of an earlier command with the same request returns its stored reply; with
        another request the reply is `conflict`.
        """
        command = Command(
            id=command_id or new_id(),
            request=request,
            issued_at_ms=time.time_ns() // 1_000_000,
            deadline_ms=deadline_ms,
            reply_to=(inbox := self.nats.new_inbox()),
            issuer=issuer,
        )
        subject = self._subjects(host).command(Lane.of_request(request))
        replies = await self.nats.subscribe(inbox)
        try:
            async with asyncio.timeout(timeout_s):
                await self._publish(subject, codec.encode_command(command))
                message = await replies.next_msg(timeout=timeout_s)
                return _map(message.data)
        except (TimeoutError, nats.errors.Error) as error:
            raise NoAnswer(
                f"no reply from host {host} to command {command.id} within {timeout_s:g} s; "
                f"the command may still run: resend with --id {command.id} for its outcome"
            ) from error
        finally:
            await replies.unsubscribe()

    async def _publish(
        self, subject: str, payload: bytes, headers: dict[str, str] | None = None
    ) -> None:
        """Publish to the command stream.

        A command has no `Nats-Msg-Id`: the server would drop a different request with the same ID,
        and its sender would get the reply to the first. The worker deduplicates and compares the
        requests.
        """
        try:
            await self.nats.jetstream().publish(
                subject, payload, timeout=PUBLISH_TIMEOUT_S, headers=headers
            )
        except nats.js.errors.NoStreamResponseError as error:
            raise NoAnswer(
                f"no JetStream stream is bound to {subject}: run `hostd provision`"
            ) from error
        except nats.js.errors.APIError as error:
            raise NoAnswer(
                f"JetStream refused to publish {subject}: {error.description}"
            ) from error

    async def ask(
        self, host: str, question: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Send a read-only query to a worker.

        Raises:
            CliError: the worker's error.
            NoAnswer: no worker of this host is subscribed, or it did not answer in time.
        """
        subject = self._subjects(host).ask(question)
        try:
            message = await self.nats.request(
                subject, pack(dict(body or {})), timeout=ASK_TIMEOUT_S
            )
        except nats.errors.NoRespondersError as error:
            raise NoWorker(f"no worker is running for host {host} (no responders)") from error
        except nats.errors.TimeoutError as error:
            raise NoAnswer(
                f"no answer from host {host} to query {question!r} within {ASK_TIMEOUT_S:g} s"
            ) from error
        answer = _map(message.data)
        if failure := answer.get("error"):
            raise CliError(str(failure.get("code")), str(failure.get("message")))
        return answer

    async def live_events(self, host: str) -> AsyncIterator[dict[str, Any]]:
        """Events from now on, of one host or of all (`*`). Never ends."""
        subscription = await self.nats.subscribe(f"{self._root}.{host}.evt.>")
        await self.nats.flush()

        async def each() -> AsyncIterator[dict[str, Any]]:
            async for message in subscription.messages:
                yield _map(message.data)

        return each()

    async def kept_events(self, stream: str, host: str) -> AsyncIterator[dict[str, Any]]:
        """Retained events of the stream, oldest first, up to now."""
        async for message in self.kept(stream, f"{self._root}.{host}.evt.>"):
            yield _map(message.data)

    async def kept(self, stream: str, subjects: str) -> AsyncIterator["Kept"]:
        """Retained messages of these subjects, oldest first, up to now.

        Read message by message: a consumer would need the right to make the server publish.
        """
        answer = await self._read(f"STREAM.INFO.{stream}", {}, stream)
        try:
            info = read_reply(answer.data, f"stream {stream}")
            if "error" in info:
                raise NoAnswer(f"cannot read stream {stream}: {info['error'].get('description')}")
            last = sequence_of(member(info, "state", stream), "last_seq", stream)
        except BusError as error:
            raise NoAnswer(f"cannot read stream {stream}: {error}") from error
        sequence = 0
        while sequence < last:
            message = await self._get(stream, {"seq": sequence + 1, "next_by_subj": subjects})
            if message is None:
                return
            if message.seq <= sequence:
                raise NoAnswer(f"cannot read stream {stream} after message {sequence}: it repeats")
            sequence = message.seq
            if sequence <= last:
                yield message

    async def kept_message(self, stream: str, seq: int) -> "Kept":
        """One retained message.

        Raises:
            CliError: `not_found`.
        """
        message = await self._get(stream, {"seq": seq})
        if message is None:
            raise CliError("not_found", f"stream {stream} has no message {seq}")
        return message

    async def _get(self, stream: str, body: Mapping[str, Any]) -> "Kept | None":
        answer = await self._read(f"DIRECT.GET.{stream}", body, stream)
        headers = answer.headers or {}
        if headers.get("Status") == "404":
            return None
        seq = header_number(headers.get("Nats-Sequence", ""))
        if seq is None:
            why = headers.get("Description", "no sequence")
            raise NoAnswer(f"cannot read stream {stream}: {why}")
        return Kept(seq, headers.get("Nats-Subject", ""), headers, answer.data)

    async def delete_kept(self, stream: str, seq: int) -> None:
        """Delete one message of a stream; needs an administrator's credential.

        Raises:
            CliError: `not_found`.
        """
        body = {"seq": seq, "no_erase": True}
        answer = await self._read(f"STREAM.MSG.DELETE.{stream}", body, stream)
        try:
            reply = read_reply(answer.data, f"stream {stream}")
        except BusError as error:
            raise NoAnswer(f"cannot delete message {seq}: {error}") from error
        if failure := reply.get("error"):
            raise CliError(
                "not_found",
                f"cannot delete message {seq} of {stream}: {failure.get('description')}",
            )

    async def publish_bytes(self, subject: str, payload: bytes, msg_id: str) -> None:
        """Publish bytes as they are to the command stream, under a message ID of their own."""
        await self._publish(subject, payload, headers={"Nats-Msg-Id": msg_id})

    async def _read(self, endpoint: str, body: Mapping[str, Any], stream: str) -> Msg:
        """One answer of the JetStream API."""
        payload = json.dumps(body).encode() if body else b""
        try:
            return await self.nats.request(f"{self._api}{endpoint}", payload, timeout=ASK_TIMEOUT_S)
        except nats.errors.NoRespondersError as error:
            raise NoAnswer(
                f"cannot read stream {stream}: nothing answers {self._api}{endpoint}; check that "
                "`hostd provision` was run, that this account imports that subject, and "
                "[nats] js_domain"
            ) from error
        except nats.errors.TimeoutError as error:
            raise NoAnswer(
                f"cannot read stream {stream}: no answer to {self._api}{endpoint} within "
                f"{ASK_TIMEOUT_S:g} s"
            ) from error


@asynccontextmanager
async def connect(
    settings: Settings, *, url: str | None = None, creds: str | None = None
) -> AsyncGenerator[Client]:
    """Connect once, without retries.

    Raises:
        NoAnswer: the server is unreachable or refused the connection.
        CliError: `invalid` CA file or credentials file.
    """
    target = url or settings.nats.url
    servers = [server.strip() for server in target.split(",")]
    options: dict[str, Any] = {}
    if path := creds or settings.nats.creds:
        options |= _credentials(path)
    if settings.nats.tls:
        options["tls"] = _trust(settings.nats.tls)
    seen: list[Exception] = []

    async def note(error: Exception) -> None:
        seen.append(error)

    connection = StrictClient(tls=requires_tls(servers, settings.nats.tls))
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await connection.connect(
                servers,
                name="hostd-cli",
                connect_timeout=CONNECT_TIMEOUT_S,
                allow_reconnect=False,
                max_reconnect_attempts=1,  # 0 means unlimited
                reconnect_time_wait=0,
                error_cb=note,
                inbox_prefix=settings.nats.inbox_prefixes[0].removesuffix("."),
                **options,
            )
    except (OSError, nats.errors.Error, TimeoutError) as error:
        await connection.drop()
        why = seen[0] if seen else error
        raise NoAnswer(
            f"cannot connect to NATS at {without_password(target)}:"
            f" {str(why) or type(why).__name__}"
        ) from error
    try:
        yield Client(connection, settings.root, settings.host.cell, settings.nats.js_domain)
    finally:
        await connection.close()


def check_credentials(path: str) -> CredentialsFile:
    """The credentials file, readable and in one of its two forms.

    Raises:
        CliError: `invalid`; the message names the file.
    """
    file = CredentialsFile(path)
    try:
        file.check()
    except OSError as error:
        raise CliError(
            "invalid",
            f"cannot read NATS credentials file {path}: {error.strerror}; "
            "check --creds and [nats] creds",
        ) from error
    except nats.errors.Error as error:
        raise CliError("invalid", str(error)) from error
    return file


def _credentials(path: str) -> dict[str, Any]:
    """What nats-py takes for either form of the file."""
    file = check_credentials(path)
    if file.is_jwt():
        return {"user_credentials": path}
    return {"user": file.user, "password": file.password}


def _trust(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise CliError("invalid", f"{ca_file}: {error.strerror or error}") from error


def _map(payload: bytes) -> dict[str, Any]:
    """Decode an envelope into a map.

    Raises:
        CliError: `internal`: the answer is not a valid envelope.
    """
    try:
        return unpack_map(payload, _ANSWER)
    except DecodeError as error:
        raise CliError("internal", f"cannot decode the answer: {error}") from error
