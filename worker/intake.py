"""From a message to a journalled command or an answer. Never waits for a lane.

A message is acknowledged when the journal owns it, or when it was answered and needs no journal
(Ping, a replay, a conflict). What fails before that stays in the stream and is redelivered.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
import structlog

from handlers.clock import now_ms
from handlers.errors import Exhausted
from schemas import codec, serde, trace_context
from schemas.acceptance import judge
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.envelopes import Command, Form, Reply
from schemas.naming import COMMAND_ID_PATTERN
from schemas.requests import PROTOCOL_MAX, PROTOCOL_MIN, Error, Ping, Pong, Request
from schemas.subjects import Lane
from schemas.trace_context import TraceContext, fields_of, log_fields
from worker.bus.protocol import Bus, BusError, Delivery
from worker.journal.admission import JOINERS_MAX, Refusal, Verdict, refused_id, too_many
from worker.journal.journal import Journal
from worker.journal.writer import JournalFault
from worker.lanes import Lanes
from worker.tracing.tracing import Tracing

AGAIN_S: Final = 0.1
TRIES: Final = 3  # deliveries of a message that crashes intake before it is given up

log = structlog.get_logger()


class IntakeMeters(Protocol):
    """What intake counts (`worker/metrics.py`)."""

    def command_done(self, kind: str, code: Code, seconds: float) -> None: ...

    def redelivered(self) -> None: ...

    def keys_ignored(self, count: int) -> None: ...

    def trace_ignored(self, place: str, field: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Message:
    """One delivery, decoded. `reply_to` is set only if hostd may publish there.

    `request` is None if it could not be read. `owns_id`: the ID is that of a valid envelope,
    whatever else is wrong. `trace` is the sender's.
    """

    delivery: Delivery
    received_at_ms: int
    id: str
    lane: Lane
    reply_to: str | None
    form: Form
    content: Command | DecodeError
    request: Request | None
    owns_id: bool
    trace: TraceContext | None


class _Failed:
    """Messages whose commit failed and that are tried again: the later ones of their lane wait for
    them, so that it keeps the order of the stream."""

    def __init__(self) -> None:
        self._ends: dict[int, tuple[Lane, asyncio.Future[None]]] = {}  # by place in the stream

    async def precede(self, lane: Lane, stream_seq: int) -> None:
        """Wait for the end of those before this one."""
        while before := [
            end for seq, (of, end) in self._ends.items() if of == lane and seq < stream_seq
        ]:
            await asyncio.wait(before)

    def add(self, lane: Lane, stream_seq: int) -> None:
        if stream_seq not in self._ends:
            self._ends[stream_seq] = lane, asyncio.get_running_loop().create_future()

    def end(self, stream_seq: int) -> None:
        """It is taken in, or left to the stream."""
        if (found := self._ends.pop(stream_seq, None)) is not None:
            found[1].set_result(None)


class Intake:
    """Answers or journals each delivery; `receive` is what the bus calls.

    Args:
        facts: the part of a Pong's `detail` beyond version, protocol and uptime: `boot_id`,
            `host_state`, `capacity`.
        inbox_prefixes: what a `reply_to` must begin with.
    """

    def __init__(
        self,
        bus: Bus,
        journal: Journal,
        lanes: Lanes,
        *,
        inbox_prefixes: Sequence[str],
        version: str,
        facts: Callable[[], dict[str, Any]],
        meters: IntakeMeters,
        tracing: Tracing | None = None,
        clock_ms: Callable[[], int] = now_ms,
    ) -> None:
        self._bus = bus
        self._journal = journal
        self._lanes = lanes
        self._prefixes = inbox_prefixes
        self._version = version
        self._facts = facts
        self._meters = meters
        self._tracing = tracing or Tracing("")
        self._clock_ms = clock_ms
        self._subjects = journal.store.subjects
        self._started = time.monotonic()
        self._failed = _Failed()
        journal.store.watch(self._pause_or_resume)
        self._pause_or_resume()

    def _pause_or_resume(self) -> None:
        """Leave the commands in the stream while the journal can take none."""
        if self._journal.store.writable and not self._journal.outbox.backlogged:
            self._bus.resume()
        else:
            self._bus.pause()

    async def receive(self, delivery: Delivery) -> None:
        """Journal or answer one message, then acknowledge it.

        A message whose handling raises what nothing here expects is redelivered; at its
        `TRIES`-th delivery it is answered `internal` and kept as a dead letter, so that no
        message stays in the acknowledgement window of the consumer for ever.
        """
        if delivery.delivered > 1:
            self._meters.redelivered()
        try:
            try:
                message = self._decode(delivery)
                await self._when_writable(lambda again: self._handle(message, again=again))
            except BusError:
                raise
            except Exception:
                log.exception(
                    "intake.crashed", stream_seq=delivery.stream_seq, tries=delivery.delivered
                )
                if delivery.delivered < TRIES:
                    return
                await self._when_writable(lambda _: self._give_up(delivery))
            await delivery.ack()
        except BusError as error:
            # the stream still has the message and delivers it again
            log.warning("intake.ack_skipped", stream_seq=delivery.stream_seq, error=str(error))
        finally:
            self._failed.end(delivery.stream_seq)

    async def _when_writable(self, do: Callable[[bool], Awaitable[None]]) -> None:
        """`do` is told whether an earlier run failed: what that wrote may be in the journal."""
        again = False
        while True:
            try:
                return await do(again)
            except JournalFault:
                again = True
                await asyncio.sleep(AGAIN_S)  # it may be that it can be written and not read
                await self._journal.store.until_writable()

    async def _give_up(self, delivery: Delivery) -> None:
        """Answer a message that crashes intake: from nothing of it that was interpreted."""
        message = _Message(
            delivery,
            self._clock_ms(),
            _fallback_id(delivery),
            Lane.host(),
            None,
            Form.NAMED,
            DecodeError("$", "crashed intake"),
            request=None,
            owns_id=False,
            trace=None,
        )
        reply = self._error(
            message,
            Code.INTERNAL,
            "internal error; see the log of this host",
            detail={"act": "operator"},
        )
        await self._refuse(message, reply, dead="internal error")

    def _decode(self, delivery: Delivery) -> _Message:
        """Decode and check. An error in the subject is reported before one in the bytes."""
        received_at_ms = self._clock_ms()
        judged = judge(
            delivery.data,
            self._prefixes,
            lambda: self._subjects.parse_command(delivery.subject),
        )
        content = judged.content
        if delivery.server_headers:
            found = ", ".join(delivery.server_headers)
            content = DecodeError("headers", f"got {found}, want a command that no server copied")
        message_id = judged.id or _fallback_id(delivery)
        trace = judged.trace
        self._note_ignored(message_id, "envelope", judged.trace_ignored)
        if trace is None:
            header = delivery.traceparent, delivery.tracestate
            trace = trace_context.parse(*header)
            self._note_ignored(message_id, "header", trace_context.ignored(*header, trace))
        if isinstance(content, Command):
            content = _with_trace(content, trace)
        if isinstance(content, Command) and content.unknown_keys:
            self._meters.keys_ignored(len(content.unknown_keys))
            log.debug("envelope.keys_ignored", command_id=message_id, keys=content.unknown_keys)
        return _Message(
            delivery,
            received_at_ms,
            message_id,
            judged.lane or Lane.host(),
            judged.reply_to,
            judged.form,
            content,
            judged.request,
            judged.owns_id,
            trace,
        )

    def _note_ignored(self, message_id: str, place: str, fields: Sequence[str]) -> None:
        for field in fields:
            self._meters.trace_ignored(place, field)
            log.debug("trace.context_ignored", command_id=message_id, place=place, field=field)

    async def _handle(self, message: _Message, *, again: bool) -> None:
        match message.content:
            case DecodeError() as error:
                await self._refuse_malformed(message, error)
            case Command(request=Ping()) as command:
                await self._answer_ping(message, command)
            case command:
                await self._in_turn(message, command, again=again)

    async def _in_turn(self, message: _Message, command: Command, *, again: bool) -> None:
        """Take it in behind the earlier ones of its lane, also those whose commit failed."""
        place = message.lane, message.delivery.stream_seq
        await self._failed.precede(*place)
        try:
            await self._take_in(message, command, again=again)
        except JournalFault:
            self._failed.add(*place)
            raise

    async def _take_in(self, message: _Message, command: Command, *, again: bool) -> None:
        delivery = message.delivery
        decision = await self._journal.commands.take_in(
            command,
            lane=message.lane,
            subject=delivery.subject,
            stream_seq=delivery.stream_seq,
            received_at_ms=message.received_at_ms,
            redelivered=again or delivery.delivered > 1,
        )
        match decision.verdict:
            case Verdict.NEW if decision.row is not None:
                self._lanes.put(decision.row)
                await decision.row.stored()
            case Verdict.REPLAY if decision.reply is not None:
                if command.reply_to is not None:
                    await self._bus.send(command.reply_to, decision.reply)
            case Verdict.CONFLICT:
                await self._answer_conflict(message)
            case Verdict.LANE_FULL | Verdict.TENANT_FULL | Verdict.HOST_FULL as full:
                limits = self._journal.commands.limits
                await self._refuse_full(message, command, too_many(full, message.lane, limits))
            case Verdict.JOINERS_FULL:
                await self._answer_too_many_copies(message)
            case _:
                pass  # joined: answered when the first one ends

    # -- answers -------------------------------------------------------------------------------

    async def _refuse_malformed(self, message: _Message, error: DecodeError) -> None:
        reply = self._error(
            message,
            error.code,
            str(error),
            supported=serde.SUPPORTED if error.code is Code.UNSUPPORTED else (),
            detail={"act": "sender", "path": error.path},
        )
        log.info(
            "command.refused",
            command_id=message.id,
            code=error.code.value,
            reason=str(error),
            **log_fields(self._trace_of(message)),
        )
        await self._refuse(message, reply, dead=str(error))

    async def _refuse_full(self, message: _Message, command: Command, failure: Exhausted) -> None:
        reply = self._error(
            message,
            failure.code,
            failure.message,
            retryable=failure.retryable,
            detail={"act": failure.act},
        )
        await self._refuse(message, reply, request=command.request)

    async def _refuse(
        self,
        message: _Message,
        reply: Reply,
        *,
        request: Request | None = None,
        dead: str | None = None,
    ) -> None:
        delivery = message.delivery
        kept = reply if message.owns_id else _unclaimed(reply, delivery)
        await self._journal.commands.refuse(
            Refusal(
                id=reply.id,
                code=reply.code,
                reply=codec.encode_reply(kept, message.form),
                direct=codec.encode_reply(reply, message.form),
                received_at_ms=reply.received_at_ms,
                finished_at_ms=reply.finished_at_ms,
                form=message.form,
                lane=message.lane,
                subject=delivery.subject,
                stream_seq=delivery.stream_seq,
                data=delivery.data,
                reply_to=message.reply_to,
                request=request,
                owns_id=message.owns_id,
                dead=dead,
                trace=self._trace_of(message),
            )
        )
        kind = "unknown" if request is None else request.kind
        self._answered(message, kind, reply)

    async def _answer_conflict(self, message: _Message) -> None:
        """The ID is in use: only the sender of this message gets the answer."""
        if message.reply_to is None:
            return
        reply = self._error(
            message,
            Code.CONFLICT,
            f"the id {message.id} was used for another request; send this one with a new id",
            detail={"act": "sender", "path": "$.id"},
        )
        await self._bus.send(message.reply_to, codec.encode_reply(reply, message.form))

    async def _answer_too_many_copies(self, message: _Message) -> None:
        """Only the sender of this message gets the answer; the command itself goes on.

        It is not the outcome, and does not invite a new ID, which would be a second command.
        """
        reply = self._error(
            message,
            Code.EXHAUSTED,
            f"the id {message.id} is unfinished and {JOINERS_MAX} copies wait for its reply, the "
            "limit; its reply goes to the reply stream",
            detail={"act": "sender", "path": "$.reply_to"},
        )
        if message.reply_to is not None:
            await self._bus.send(message.reply_to, codec.encode_reply(reply, message.form))

    async def _answer_ping(self, message: _Message, command: Command) -> None:
        if await self._journal.commands.result(message.id) is not None:
            await self._answer_conflict(message)
            return
        if command.deadline_ms is not None and command.deadline_ms <= self._clock_ms():
            reply = self._error(
                message,
                Code.EXPIRED,
                "the deadline passed before the command was started",
                detail={"act": "sender"},
            )
        else:
            reply = Reply(
                id=message.id,
                host_id=self._subjects.host_id,
                response=Pong(),
                code=Code.OK,
                attempts=1,
                received_at_ms=message.received_at_ms,
                finished_at_ms=self._clock_ms(),
                detail={
                    "version": self._version,
                    "protocol": {"min": PROTOCOL_MIN, "max": PROTOCOL_MAX},
                    "uptime_s": int(time.monotonic() - self._started),
                    **self._facts(),
                },
                request_digest=_digest_of(message),
                **fields_of(self._trace_of(message)),
            )
        data = codec.encode_reply(reply, message.form)
        if message.reply_to is not None:
            await self._bus.send(message.reply_to, data)
        await self._bus.publish(self._subjects.reply(message.lane), data, msg_id=message.id)
        self._answered(message, Ping.kind, reply)

    def _answered(self, message: _Message, kind: str, reply: Reply) -> None:
        self._meters.command_done(kind, reply.code, 0.0)
        self._tracing.answered(_key(message), message.trace, kind, message.lane, reply)

    def _trace_of(self, message: _Message) -> TraceContext | None:
        """The span of an answer that intake gives."""
        return self._tracing.of(_key(message), message.trace)

    def _error(
        self,
        message: _Message,
        code: Code,
        text: str,
        *,
        detail: dict[str, Any],
        retryable: bool = False,
        supported: tuple[str, ...] = (),
    ) -> Reply:
        return Reply(
            id=message.id,
            host_id=self._subjects.host_id,
            response=Error(text),
            code=code,
            retryable=retryable,
            received_at_ms=message.received_at_ms,
            finished_at_ms=self._clock_ms(),
            supported=supported,
            detail=detail,
            request_digest=_digest_of(message),
            **fields_of(self._trace_of(message)),
        )


def _unclaimed(reply: Reply, delivery: Delivery) -> Reply:
    """For the reply stream: the message proved nothing about the ID in it, which may be another's.

    The ID as read is in `detail.claimed_id`; the answer on `reply_to` has it as its `id`.
    """
    return msgspec.structs.replace(
        reply,
        id=refused_id(delivery.stream_seq, delivery.data),
        detail={**reply.detail, "claimed_id": reply.id},
    )


def _digest_of(message: _Message) -> str | None:
    """Of the request, if it could be read."""
    return None if message.request is None else codec.request_digest(message.request)


def _key(message: _Message) -> str:
    """Not the ID alone: another command may have it."""
    return f"{message.id}:{message.delivery.stream_seq}"


def _with_trace(command: Command, trace: TraceContext | None) -> Command:
    """The command as it is journalled: with a valid context, of the envelope or else of the headers
    of its message, or with none."""
    if trace is None and command.traceparent is None and command.tracestate is None:
        return command
    return msgspec.structs.replace(
        command,
        traceparent=None if trace is None else trace.traceparent,
        tracestate=None if trace is None else trace.state or None,
    )


def _fallback_id(delivery: Delivery) -> str:
    """The ID in the answer to a message whose own ID cannot be read."""
    if delivery.msg_id is not None and COMMAND_ID_PATTERN.fullmatch(delivery.msg_id):
        return delivery.msg_id
    return f"seq-{delivery.stream_seq}"
