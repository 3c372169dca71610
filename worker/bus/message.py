"""What comes over the link, without nats-py's types."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from nats.aio.msg import Msg

from worker.bus.protocol import BusError


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it came; `reply` is empty where no answer is asked for."""

    subject: str
    reply: str
    data: bytes
    headers: Mapping[str, str]


class Subscription(Protocol):
    """What is left of nats-py's once it is made."""

    async def unsubscribe(self, limit: int = 0) -> None: ...


class NoResponder(BusError):
    """Nobody listens on that subject: no such stream, consumer or service."""


def to_message(message: Msg) -> Message:
    return Message(message.subject, message.reply, message.data, message.headers or {})
