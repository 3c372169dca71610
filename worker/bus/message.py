"""Messages and subscriptions without nats-py's types."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from nats.aio.msg import Msg

from worker.bus.protocol import BusError


@dataclass(frozen=True, slots=True)
class Message:
    """One message as received; `reply` is empty when no answer is wanted."""

    subject: str
    reply: str
    data: bytes
    headers: Mapping[str, str]


class Subscription(Protocol):
    """The part of nats-py's subscription that the worker uses."""

    async def unsubscribe(self, limit: int = 0) -> None: ...


class NoResponder(BusError):
    """No responder on that subject: no such stream, consumer or service."""


def to_message(message: Msg) -> Message:
    return Message(message.subject, message.reply, message.data, message.headers or {})
