"""What the worker needs of the bus. `worker/bus/nats.py` is the only code that knows NATS."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


class BusError(Exception):
    """The bus did not take or give something now; the caller keeps it and tries again."""


class StateConflict(BusError):
    """A compare-and-set failed; read the key back."""


class NotProvisioned(BusError):
    """A stream, consumer or bucket is missing or not as needed; the text says what to provision."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One command message as it came. `ack` is confirmed by the server before it returns.

    `delivered` counts from 1, but a server that crashed may count anew: no proof of a first time.
    """

    subject: str
    data: bytes
    msg_id: str | None
    stream_seq: int
    delivered: int
    ack: Callable[[], Awaitable[None]]


Receive = Callable[[Delivery], Awaitable[None]]


class Bus(Protocol):
    @property
    def connected(self) -> bool: ...

    async def consume(self, receive: Receive) -> None:
        """Pull this host's commands for ever, several at a time, across reconnects.

        `receive` returns when the message is settled; at most `window` of them run at once.
        """
        ...

    def pause(self) -> None:
        """Ask for no more messages (the stream keeps them); `resume` undoes it."""
        ...

    def resume(self) -> None: ...

    async def publish(
        self, subject: str, payload: bytes, *, msg_id: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Into a stream, acknowledged. A duplicate is success. Raises BusError."""
        ...

    async def send(self, subject: str, payload: bytes) -> None:
        """Core NATS, at most once; for `reply_to`."""
        ...

    async def read_state(self, key: str) -> tuple[bytes, int] | None:
        """The bucket's value and revision of a key, or None."""
        ...

    async def write_state(self, key: str, value: bytes, *, revision: int | None) -> int:
        """Compare-and-set (None: whatever is there). Returns the new revision."""
        ...

    async def delete_state(self, key: str, *, revision: int | None) -> None: ...
