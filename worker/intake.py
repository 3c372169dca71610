"""From a message to a journalled command or an answer. Never waits for a lane.

A message is acknowledged when the journal owns it, or when it was answered and needs no journal
(Ping, a replay, a conflict). What fails before that stays in the stream and comes again.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from schemas import codec, serde
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.envelopes import Command, Form, Reply
from schemas.naming import COMMAND_ID_PATTERN
from schemas.partial import PartialEnvelope, peek
from schemas.requests import PROTOCOL_MAX, PROTOCOL_MIN, Error, Ping, Pong, Request
from schemas.subjects import Lane, check_reply_to
from worker.bus.protocol import Bus, BusError, Delivery
from worker.journal.admission import Accepted, Found
from worker.journal.journal import Journal
from worker.journal.refusals import Refusal
from worker.journal.store import now_ms
from worker.journal.writer import JournalFault
from worker.lanes import Lanes

log = structlog.get_logger()


class IntakeMeters(Protocol):
    """What intake counts (`worker/metrics.py`)."""

    def command_done(self, kind: str, code: Code, seconds: float) -> None: ...

    def redelivered(self) -> None: ...


@dataclass(slots=True)
class _Message:
    """One delivery and what is known of it so far; `reply_to` only once hostd may publish there."""

    delivery: Delivery
    received_at_ms: int
    lane: Lane = field(default_factory=Lane.host)
    id: str = ""
    reply_to: str | None = None
    form: Form = Form.NAMED
    request: Request | None = None


class Intake:
    """Takes each delivery to its end; `receive` is what the bus calls.

    Args:
        facts: what a Pong's `detail` says beyond version, protocol and uptime: `boot_id`,
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
    ) -> None:
        self.unknown_keys = 0
        self._bus = bus
        self._journal = journal
        self._lanes = lanes
        self._prefixes = inbox_prefixes
        self._version = version
        self._facts = facts
        self._meters = meters
        self._subjects = journal.source.subjects
        self._started = time.monotonic()
        journal.watch(self._flow)
        self._flow()

    def _flow(self) -> None:
        """The stream keeps the commands while the journal can take none."""
        if self._journal.writable and not self._journal.backlogged:
            self._bus.resume()
        else:
            self._bus.pause()

    async def receive(self, delivery: Delivery) -> None:
        """Settle one message: journalled or answered, then acknowledged."""
        if delivery.delivered > 1:
            self._meters.redelivered()
        message = _Message(delivery, now_ms())
        try:
            while True:
                try:
                    await self._settle(message)
                    break
                except JournalFault:
                    await self._journal.until_writable()
            await delivery.ack()
        except BusError as error:
            # the stream has it still, and delivers it again
            log.warning("intake.deferred", command_id=message.id, error=str(error))

    async def _settle(self, message: _Message) -> None:
        try:
            command = self._read(message)
        except DecodeError as error:
            await self._refuse_malformed(message, error)
            return
        if isinstance(command.request, Ping):
            await self._answer_ping(message, command)
            return
        delivery = message.delivery
        if delivery.delivered == 1:
            row = self._journal.admit(
                command,
                lane=message.lane,
                subject=delivery.subject,
                stream_seq=delivery.stream_seq,
                received_at_ms=message.received_at_ms,
            )
            if row is not None and row.admission is not None:
                self._lanes.put(row)
                await asyncio.shield(row.admission)
                return
        accepted = await self._journal.accept(
            command,
            lane=message.lane,
            subject=delivery.subject,
            stream_seq=delivery.stream_seq,
            received_at_ms=message.received_at_ms,
            redelivered=delivery.delivered > 1,
        )
        await self._go_on(message, command, accepted)

    def _read(self, message: _Message) -> Command:
        """Decode and check; on the way `message` learns whom to answer, and how.

        Raises:
            DecodeError: invalid or unsupported.
        """
        delivery = message.delivery
        malformed: DecodeError | None = None
        seen: Command | PartialEnvelope
        try:
            seen = codec.decode_command(delivery.data)
        except DecodeError as error:
            seen, malformed = peek(delivery.data), error
        message.id, message.form = seen.id or _fallback_id(delivery), seen.form
        if seen.reply_to is not None:
            try:
                check_reply_to(seen.reply_to, self._prefixes)
                message.reply_to = seen.reply_to
            except DecodeError as error:
                malformed = malformed or error
        message.lane = self._subjects.parse_command(delivery.subject)
        if isinstance(seen, PartialEnvelope) or malformed is not None:
            raise malformed or DecodeError("$", "does not decode")
        message.lane.check(seen.request)
        if seen.unknown_keys:
            self.unknown_keys += len(seen.unknown_keys)
            log.debug("intake.keys_ignored", command_id=message.id, keys=seen.unknown_keys)
        return seen

    async def _go_on(self, message: _Message, command: Command, accepted: Accepted) -> None:
        match accepted.kind:
            case Found.NEW if accepted.row is not None:
                self._lanes.put(accepted.row)
            case Found.REPLAY if accepted.reply is not None:
                if command.reply_to is not None:
                    await self._bus.send(command.reply_to, accepted.reply)
            case Found.CONFLICT:
                await self._answer_conflict(message)
            case Found.LANE_FULL | Found.HOST_FULL:
                lane_full = accepted.kind is Found.LANE_FULL
                what, limit = (
                    (f"lane {message.lane}", self._journal.lane_depth)
                    if lane_full
                    else ("this host", self._journal.host_depth)
                )
                message.request = command.request
                reply = self._error(
                    message,
                    Code.EXHAUSTED,
                    f"{what} has {limit} unfinished commands, its limit",
                    retryable=True,
                    detail={"act": "scheduler"},
                )
                await self._refuse(message, reply, dead=None)
            case _:
                pass  # joined: told when the first ends

    # -- answers -------------------------------------------------------------------------------

    async def _refuse_malformed(self, message: _Message, error: DecodeError) -> None:
        reply = self._error(
            message,
            error.code,
            str(error),
            supported=serde.SUPPORTED if error.code is Code.UNSUPPORTED else (),
            detail={"act": "sender", "path": error.path},
        )
        log.info("intake.refused", command_id=message.id, code=error.code.value, reason=str(error))
        await self._refuse(message, reply, dead=str(error))

    async def _refuse(self, message: _Message, reply: Reply, *, dead: str | None) -> None:
        delivery = message.delivery
        await self._journal.refuse(
            Refusal(
                reply=reply,
                form=message.form,
                lane=message.lane,
                subject=delivery.subject,
                stream_seq=delivery.stream_seq,
                data=delivery.data,
                reply_to=message.reply_to,
                request=message.request,
                dead=dead,
            )
        )
        kind = "unknown" if message.request is None else message.request.kind
        self._meters.command_done(kind, reply.code, 0.0)

    async def _answer_conflict(self, message: _Message) -> None:
        """The id is taken: its own sender alone hears of it."""
        if message.reply_to is None:
            return
        reply = self._error(
            message,
            Code.CONFLICT,
            f"the id {message.id} was used for another request; a new request takes a new id",
            detail={"act": "sender", "path": "$.id"},
        )
        await self._bus.send(message.reply_to, codec.encode_reply(reply, message.form))

    async def _answer_ping(self, message: _Message, command: Command) -> None:
        if await self._journal.result(message.id) is not None:
            await self._answer_conflict(message)
            return
        if command.deadline_ms is not None and command.deadline_ms <= now_ms():
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
                finished_at_ms=now_ms(),
                detail={
                    "version": self._version,
                    "protocol": {"min": PROTOCOL_MIN, "max": PROTOCOL_MAX},
                    "uptime_s": int(time.monotonic() - self._started),
                    **self._facts(),
                },
            )
        data = codec.encode_reply(reply, message.form)
        if message.reply_to is not None:
            await self._bus.send(message.reply_to, data)
        await self._bus.publish(self._subjects.reply(message.lane), data, msg_id=message.id)
        self._meters.command_done(Ping.kind, reply.code, 0.0)

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
            finished_at_ms=now_ms(),
            supported=supported,
            detail=detail,
        )


def _fallback_id(delivery: Delivery) -> str:
    """What answers a message whose own id cannot be read."""
    if delivery.msg_id is not None and COMMAND_ID_PATTERN.fullmatch(delivery.msg_id):
        return delivery.msg_id
    return f"seq-{delivery.stream_seq}"
