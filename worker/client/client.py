"""`HostdClient`: commands with their replies, queries, events and state of hosts, over NATS.

    async with HostdClient.connect("nats://127.0.0.1:4222", cell="default") as client:
        reply = await client.send("h1", StartInstance("acme", "web", "i-1"), timeout_s=60)

One connection for a whole program; it comes back by itself. All methods may be called at once from
several tasks of its loop. Times are seconds (`_s`) or absolute Unix milliseconds (`_ms`).
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar, cast

from msgspec.structs import replace

from schemas import codec
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.envelopes import Command, Event, Reply
from schemas.requests import Error, Request
from schemas.settings import NatsSettings
from schemas.subjects import Lane, Subjects, lane_of_any
from schemas.unpack import Limits, convert, pack, unpack_map
from worker.bus import streams
from worker.bus.api_reply import header_number
from worker.bus.message import NoResponder
from worker.client import arguments, errors, queries
from worker.client.feed import CAPACITY, Buffer, EventFeed, envelope_of, known_event, program_log
from worker.client.inbox import Expected, Inbox
from worker.client.link import ASK_TIMEOUT_S, Kept, Link, open_link

__all__ = ["DeadLetter", "HostdClient", "StateValue", "StoredEvent", "new_id"]

A = TypeVar("A")

CONNECT_TIMEOUT_S: Final = 3.0
# Copies of a command wait for its reply, at most 32 of them (the contract, Bounds).
COPIES_MAX: Final = 16
FIRST_LOOK_S, LOOK_MAX_S, RETRY_S = 2.0, 15.0, 0.2
STORED_FIRST_S, STORED_MAX_S = 0.02, 5.0
_CODES = frozenset(code.value for code in Code)
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
class StoredEvent:
    """An event of the stream; `stream_seq` is where a reader resumes after it."""

    stream_seq: int
    event: Event


@dataclass(frozen=True, slots=True)
class StateValue:
    """The bucket's value of one lane: it reflects event `seq` of `journal_id`.

    `fields` is the whole value; of the lane `host` it is the lease, with `lease_until_ms`.
    """

    status: str | None
    journal_id: str | None
    seq: int | None
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that could not be processed: its bytes, cut if `truncated_from_bytes` is set.

    `message_id` is the header `Nats-Msg-Id`: the command's ID only if the message is a valid
    envelope and was the first with that ID; then `<ID>:<stream sequence>`, and
    `seq:<stream sequence>:<hash>` of what is no valid envelope. Empty without the header.
    """

    stream_seq: int
    lane: Lane
    message_id: str
    reason: str
    sha256: str
    data: bytes
    truncated_from_bytes: int | None


class _Looked(NamedTuple):
    """Of a kept reply; `unknown`: a worker runs that does not know the command; `taken`: a reply to
    another request is kept under its ID, and no worker says whether that still counts."""

    reply: bytes | None = None
    unknown: bool = False
    taken: errors.Conflict | None = None


class HostdClient:
    """Opened by `connect`. Raises only what `worker.client.errors` has.

    `link` is not part of the stable surface.
    """

    def __init__(self, link: Link, inbox: Inbox, root: str, cell: str) -> None:
        self.link = link
        self._inbox = inbox
        self._root = root
        self._cell = cell

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        url: str = "nats://127.0.0.1:4222",
        *,
        cell: str = "default",
        root: str = "",
        creds: str = "",
        ca_file: str = "",
        js_domain: str = "",
        inbox_prefix: str = "_INBOX",
        name: str = "hostd-client",
        timeout_s: float = CONNECT_TIMEOUT_S,
        patient: bool = True,
    ) -> AsyncGenerator["HostdClient"]:
        """Connect to NATS.

        Args:
            url: one or several servers, separated by commas; others are not connected to.
            root: of the subjects, if it is not `hostd.v1.<cell>`.
            creds: a NATS credentials file, or one with the line `user:password`; mode 0600.
            ca_file: connect by TLS only, to servers with a certificate of this authority.
            js_domain: `hostd` with the accounts that `hostd provision --server-config` prints.
            inbox_prefix: of replies; the worker must allow it (`[nats] inbox_prefixes`).
            name: shown in the server's list of connections.
            timeout_s: of the first connect.
            patient: try until then; else until each server was tried, as the command line does.

        Raises:
            BadSetting: an argument or a file cannot be used.
            NoConnection: no server takes this client.
        """
        root = root or f"hostd.v1.{cell}"
        _subjects(root, "any", cell)
        arguments.check_timeout(timeout_s)
        prefix = f"{inbox_prefix}.{os.urandom(8).hex()}"
        nats = NatsSettings(url=url, creds=creds, tls=ca_file, js_domain=js_domain)
        async with AsyncExitStack() as stack:
            opened = open_link(nats, name=name, inbox=prefix, timeout_s=timeout_s, patient=patient)
            link = await stack.enter_async_context(opened)
            inbox = await stack.enter_async_context(Inbox.open(link, f"{prefix}.reply"))
            yield cls(link, inbox, root, cell)

    # -- commands --------------------------------------------------------------------------------

    async def send(
        self,
        host: str,
        request: Request,
        *,
        timeout_s: float,
        command_id: str | None = None,
        deadline_ms: int | None = None,
        issuer: str | None = None,
        traceparent: str | None = None,
    ) -> Reply:
        """Send one command; return its reply if it is `ok`.

        A lost message costs nothing: until the reply is there, the client asks for it and sends
        the command again under the same ID, which has one effect.

        Args:
            timeout_s: how long to wait for the reply; the command itself goes on.
            command_id: of an earlier command with the same request, for its outcome; else a new
                one. With another request: `Conflict`, whose `path` is `$.id`. (A reply that an
                older hostd left does not say of which request it is, and is taken.) `replayed` is
                set where the worker answered again, not in a reply that was found.
            deadline_ms: the host does not begin, and does not go on trying, after this time.
            traceparent: W3C Trace Context of the caller's span; one that is invalid is ignored.

        Raises:
            Refused: its subclass says the code: `Conflict`, `Exhausted`, ... Final for this ID.
            NoReply: it may still run; send it again under `error.command_id`.
            NotStored: it will not run, unless an earlier call under this ID had no reply.
            BadSetting: an argument is none that can be sent.
        """
        raw = await self.exchange(
            host,
            request,
            timeout_s=timeout_s,
            command_id=command_id,
            deadline_ms=deadline_ms,
            issuer=issuer,
            traceparent=traceparent,
        )
        return _succeeded(_reply_of(raw))

    async def exchange(
        self,
        host: str,
        request: Request,
        *,
        timeout_s: float,
        command_id: str | None = None,
        deadline_ms: int | None = None,
        issuer: str | None = None,
        traceparent: str | None = None,
    ) -> dict[str, Any]:
        """As `send`, but returns the reply envelope as a map, whatever its code.

        It has what a newer hostd adds to replies.

        Raises:
            Conflict: a worker says that the ID is that of another request; `path` is `$.id`, and
                `reply` None. Where the worker refuses the command itself, its reply is returned.
            NoReply, NotStored, BadSetting: as `send`.
        """
        arguments.check_timeout(timeout_s)
        arguments.check_command_id(command_id)
        arguments.check_deadline(deadline_ms)
        command = Command(
            id=command_id or new_id(),
            request=request,
            issued_at_ms=time.time_ns() // 1_000_000,
            deadline_ms=deadline_ms,
            reply_to=None,
            issuer=issuer,
            traceparent=traceparent,
        )
        subjects = self._subjects(host)
        with self._inbox.expect(host, command.id, codec.request_digest(request)) as expected:
            finding = asyncio.create_task(self._find(subjects, command, expected))
            try:
                # The reply may arrive at any time, whatever else is waited for.
                await asyncio.wait(
                    (expected.arrived, finding),
                    timeout=timeout_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                finding.cancel()
                await asyncio.gather(finding, return_exceptions=True)
        if expected.arrived.done():
            return _map(expected.arrived.result())
        if not finding.cancelled():
            return _map(finding.result())
        trouble = f" ({expected.trouble})" if expected.trouble else ""
        raise errors.NoReply(
            f"no reply from host {host} to command {command.id} within {timeout_s:g} s"
            f"{trouble}; it may still run: send it again under this ID for its outcome",
            command.id,
        )

    async def kept_reply(self, host: str, request: Request, command_id: str) -> Reply | None:
        """The reply of an earlier command, whatever its code, without sending anything.

        It is looked for in the reply stream, which has the newest reply of a lane also while no
        worker runs, then in the journal of the worker. None if the worker says that it has none
        (yet).

        Raises:
            Conflict: the ID is that of another request: the worker says so, or, if it cannot be
                asked, the reply that is kept.
            NoAnswer: it is not the newest reply of its lane, and the worker cannot be asked.
            BadRefusal: its code is one of a newer hostd.
            BadSetting: it is no command ID.
        """
        arguments.check_command_id(command_id)
        looked = await self._look(self._subjects(host), request, command_id)
        if looked.taken is not None:
            raise looked.taken
        return None if looked.reply is None else _reply_of(_map(looked.reply))

    async def _find(self, subjects: Subjects, command: Command, expected: Expected) -> bytes:
        """Publish the command, and look for its reply where it is kept, until it is found."""
        subject = subjects.command(Lane.of_request(command.request))
        data = codec.encode_command(replace(command, reply_to=expected.subject))
        await self._store(subject, data, expected)
        copies, wait_s = 0, FIRST_LOOK_S
        while True:
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LOOK_MAX_S)
            try:
                looked = await self._look(subjects, command.request, command.id)
            except errors.NoAnswer:
                continue
            if looked.taken is not None:  # perhaps once: a worker that forgot the ID runs this one
                expected.trouble = looked.taken.message
            if looked.reply is not None:
                return looked.reply
            if looked.unknown and copies < COPIES_MAX:
                copies += 1
                await self._store(subject, data, expected)

    async def _store(self, subject: str, data: bytes, expected: Expected) -> None:
        """Publish, again and again until the stream has it, or refuses a copy of what it may have.

        Raises:
            NotStored: the stream has no message of this exchange.
        """
        while True:
            sent = self.link.connection.connected
            try:
                await self.link.publish(subject, data)
            except errors.NotStored as error:
                if not expected.maybe_stored:
                    raise
                expected.trouble = error.message
                return
            except errors.NoAnswer as error:
                expected.maybe_stored |= sent
                expected.trouble = error.message
                await asyncio.sleep(RETRY_S)
            else:
                expected.maybe_stored = True
                expected.trouble = ""
                return

    async def _look(self, subjects: Subjects, request: Request, command_id: str) -> "_Looked":
        """Look for the reply where it is kept.

        The reply stream may have the reply to another request, under an ID that the worker has
        forgotten since: what a worker that runs says is before that.

        Raises:
            Conflict: the worker has the ID with another request.
            NoAnswer: no reply with this ID is the newest of its lane, and the worker cannot be
                asked.
        """
        digest = codec.request_digest(request)
        taken: errors.Conflict | None = None
        with suppress(errors.HostdError):
            subject = subjects.reply(Lane.of_request(request))
            kept = await self.link.last(subjects.replies_stream, subject)
            if kept is not None and (found := _map(kept.data)).get("id") == command_id:
                if found.get("request_digest", digest) == digest:
                    return _Looked(kept.data)
                taken = _taken(subjects, command_id)
        try:
            done = await self.ask(subjects.host_id, queries.result(command_id))
        except errors.NotFound:
            return _Looked(unknown=True)
        except errors.HostdError as error:
            if taken is not None:
                return _Looked(taken=taken)
            if isinstance(error, errors.NoAnswer):
                raise
            raise errors.NoAnswer(  # of the query: it says nothing about the command
                f"cannot ask host {subjects.host_id} for command {command_id}: {error.message}"
            ) from error
        reply = done.reply
        if (done.request_digest or (reply or {}).get("request_digest", digest)) != digest:
            raise _taken(subjects, command_id)
        return _Looked(None if reply is None else pack(reply))

    # -- queries ---------------------------------------------------------------------------------

    async def ask(
        self, host: str, query: queries.Query[A], *, timeout_s: float = ASK_TIMEOUT_S
    ) -> A:
        """Ask a worker; changes nothing, and waits for no command. See `worker.client.queries`.

        Raises:
            NoWorker: no worker of this host runs.
            NoAnswer: it did not answer in time.
            Refused: e.g. `NotFound`, `Invalid`.
            BadAnswer: it answered something else.
        """
        answer = await self.ask_map(host, query.verb, query.body, timeout_s=timeout_s)
        try:
            return convert(answer, query.answer)
        except DecodeError as error:
            raise errors.BadAnswer(f"answer of host {host} to {query.verb}: {error}") from error

    async def ask_map(
        self,
        host: str,
        verb: str,
        body: Mapping[str, object],
        *,
        timeout_s: float = ASK_TIMEOUT_S,
    ) -> dict[str, Any]:
        """As `ask`, with the last token of the subject, the body and the answer as maps."""
        arguments.check_timeout(timeout_s)
        subject = self._subjects(host).ask(verb)
        try:
            message = await self.link.request(subject, pack(dict(body)), timeout_s=timeout_s)
        except NoResponder as error:
            raise errors.NoWorker(
                f"no worker is running for host {host} (no responders)"
            ) from error
        except errors.NoAnswer as error:
            raise errors.NoAnswer(
                f"no answer from host {host} to query {verb!r} within {timeout_s:g} s: "
                f"{error.message}"
            ) from error
        answer = _map(message.data)
        failure = answer.get("error")
        if isinstance(failure, dict):
            told = cast("dict[str, object]", failure)
            raise _refusal(str(told.get("code")), str(told.get("message")))
        return answer

    # -- events and state ------------------------------------------------------------------------

    @asynccontextmanager
    async def events(self, host: str, *, capacity: int = CAPACITY) -> AsyncGenerator[EventFeed]:
        """Events from now on, of one host or, for who may, of all (`*`).

        Subscribed on entry: a list that is asked for afterwards joins without a gap.

            async with client.events("h1") as feed:
                listing = await client.ask("h1", queries.listing())
                feed.after("h1", listing)
                async for event in feed: ...

        Args:
            capacity: how many events wait for the reader at most; more are `EventsLost`.
        """
        arguments.check_count("capacity", capacity, 1)
        buffer = Buffer(capacity)
        subject = self._events_of(host)
        async with self.link.subscribed(subject, buffer.put, buffer.lose):
            yield EventFeed(buffer, self._root)

    async def stored_events(
        self, host: str = "*", *, after: int = 0, follow: bool = True
    ) -> AsyncGenerator[StoredEvent]:
        """Events of the stream after a stream sequence, oldest first, of one host or of all.

        Needs the right to read the event stream: the dashboards' credential. A reader that keeps
        the `stream_seq` of the last one that it has dealt with misses none and gets none twice, for
        as long as the stream keeps them (7 days or 1 GiB). What is no event, or of another host
        than its subject, is left out, with a warning to Python's logger `hostd.client`. With
        `follow` it never ends.

        Raises:
            EventsLost: the stream ends before `after`: it was made anew, or is a mirror that is
                behind the stream that `after` is of. Begin again at 0.
            NoAnswer: the stream cannot be read now, or not by this account.
        """
        arguments.check_count("after", after, 0)
        subject = self._events_of(host)
        stream = self._subjects("any").events_stream
        news = asyncio.Event()
        # A live event says only that there is something to read: what is missed costs time alone.
        async with self.link.subscribed(subject, lambda _: news.set(), news.set):
            pause_s, idle, first = STORED_FIRST_S, True, True
            while True:
                news.clear()
                message = await self.link.next(stream, subject, after)
                if message is not None:
                    after, pause_s, idle = message.seq, STORED_FIRST_S, False
                    event = self._stored_event(message)
                    if event is not None:
                        yield StoredEvent(message.seq, event)
                    continue
                if idle:
                    await self._check_position(stream, after, may_fail=not first)
                    first = False
                if not follow:
                    return
                idle = True
                pause_s = await _pause(news, pause_s)

    async def _check_position(self, stream: str, after: int, *, may_fail: bool) -> None:
        try:
            last = await self.link.last_seq(stream)
        except errors.NoAnswer:
            if not may_fail:
                raise
            return  # no leader now: the next round asks again
        if after > last:
            raise errors.EventsLost(
                f"stream {stream} ends at message {last}, before {after}: it was made anew; "
                "begin again at 0"
            )

    def _stored_event(self, message: Kept) -> Event | None:
        try:
            return known_event(envelope_of(self._root, message.subject, message.data))
        except errors.BadAnswer as error:  # the next reader would meet it again, and the next one
            program_log.warning("event %d of the stream left out: %s", message.seq, error.message)
            return None

    async def state(self, host: str, lane: Lane) -> StateValue | None:
        """The bucket's value of a lane of this host; None if it has none (destroyed, torn down).

        Also while no worker runs. It is written after the events: `queries.listing` is newer.
        """
        subjects = self._subjects(host)
        subject = streams.state_subject(subjects, subjects.state_key(lane))
        kept = await self.link.last(streams.bucket_stream(subjects), subject)
        if kept is None or "KV-Operation" in kept.headers:
            return None
        value = _map(kept.data)
        seq = value.get("seq")
        return StateValue(
            status=_text(value.get("status")),
            journal_id=_text(value.get("journal_id")),
            seq=seq if isinstance(seq, int) else None,
            fields=value,
        )

    async def dead_letters(self, host: str) -> AsyncGenerator[DeadLetter]:
        """A host's dead letters, oldest first, up to now. Needs the dashboards' or the
        administrator's credential.

        Raises:
            NoAnswer: the stream cannot be read by this account.
        """
        subjects = self._subjects(host)
        stream = subjects.dead_stream
        async for kept in self.link.kept(stream, f"{self._root}.{host}.dead.>"):
            yield _dead_letter(kept)

    def _events_of(self, host: str) -> str:
        if host != "*":
            self._subjects(host)
        return f"{self._root}.{host}.evt.>"

    def _subjects(self, host: str) -> Subjects:
        return _subjects(self._root, host, self._cell)


def _subjects(root: str, host: str, cell: str) -> Subjects:
    try:
        return Subjects(root, host, cell)
    except ValueError as error:
        raise errors.BadSetting(str(error)) from error


async def _pause(news: asyncio.Event, pause_s: float) -> float:
    """Wait for news; returns the next pause. The stream may store an event a moment after it."""
    try:
        async with asyncio.timeout(pause_s):
            await news.wait()
    except TimeoutError:
        return min(2 * pause_s, STORED_MAX_S)
    return STORED_FIRST_S


def _succeeded(reply: Reply) -> Reply:
    if reply.code is Code.OK:
        return reply
    raise _refusal(reply.code, _message_of(reply), reply)


def _message_of(reply: Reply) -> str:
    response = reply.response
    return response.message if isinstance(response, Error) else str(reply.code)


def _taken(subjects: Subjects, command_id: str) -> errors.Conflict:
    error = errors.Conflict(
        f"host {subjects.host_id} has a command {command_id} with another request; send this one "
        "with a new ID"
    )
    error.path = "$.id"
    return error


def _refusal(code: str, message: str, reply: Reply | None = None) -> errors.Refused:
    kind = errors.REFUSALS.get(code)
    return errors.BadRefusal(code, message, reply) if kind is None else kind(message, reply)


def _reply_of(raw: dict[str, Any]) -> Reply:
    """The reply, whatever its code. Raises `BadRefusal` for one that `Code` does not have."""
    code = raw.get("code")
    newer = isinstance(code, str) and code not in _CODES
    try:
        reply = codec.read_reply({**raw, "code": Code.INTERNAL.value} if newer else raw)
    except DecodeError as error:
        raise errors.BadAnswer(f"cannot decode the reply: {error}") from error
    if newer:
        raise _refusal(str(code), _message_of(reply), reply)
    return reply


def _map(payload: bytes) -> dict[str, Any]:
    try:
        return unpack_map(payload, _ANSWER)
    except DecodeError as error:
        raise errors.BadAnswer(f"cannot decode the answer: {error}") from error


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _dead_letter(kept: Kept) -> DeadLetter:
    try:
        lane = lane_of_any(kept.subject, "dead")
    except DecodeError as error:
        raise errors.BadAnswer(f"dead letter {kept.seq}: {error}") from error
    return DeadLetter(
        stream_seq=kept.seq,
        lane=lane,
        message_id=kept.headers.get("Nats-Msg-Id", ""),
        reason=kept.headers.get("Hostd-Reason", ""),
        sha256=kept.headers.get("Hostd-Sha256", ""),
        data=kept.data,
        truncated_from_bytes=header_number(kept.headers.get("Hostd-Truncated", "")),
    )
