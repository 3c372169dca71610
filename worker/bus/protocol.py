"""What the worker needs of the bus. In the worker only this package imports NATS."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol


class BusError(Exception):
    """The bus did not accept or return something now; the caller keeps it and tries again."""


class Unsendable(BusError):
    """The bus will not accept this message as it is: too large, or an invalid subject or header.

    `limit_bytes` is what headers and payload may have together; 0 if size is not the reason.
    """

    def __init__(self, message: str, *, limit_bytes: int = 0) -> None:
        super().__init__(message)
        self.limit_bytes = limit_bytes


class StateConflict(BusError):
    """A compare-and-set failed: the key has another revision. Read it back."""


class NotProvisioned(BusError):
    """A stream, consumer or bucket is missing or differs; the text says what to provision."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One command message as received. `ack` returns once the server confirmed it.

    `delivered` counts from 1, but a server that crashed may restart the count: 1 does not prove a
    first delivery. `server_headers` are headers that only a server adds: the message is a copy that
    a server made of another one (ADR 0208). `traceparent` and `tracestate` are headers, as sent.
    """

    subject: str
    data: bytes
    msg_id: str | None
    stream_seq: int
    delivered: int
    ack: Callable[[], Awaitable[None]]
    server_headers: tuple[str, ...] = ()
    traceparent: str | None = None
    tracestate: str | None = None


Receive = Callable[[Delivery], Awaitable[None]]


class Bus(Protocol):
    @property
    def connected(self) -> bool: ...

    async def consume(self, receive: Receive) -> None:
        """Pull this host's commands until cancelled, several at a time, across reconnects.

        `receive` returns when the message is settled; at most `window` of them run at once.
        """
        ...

    def pause(self) -> None:
        """Stop pulling messages (the stream keeps them) until `resume`."""
        ...

    def resume(self) -> None: ...

    async def publish(
        self, subject: str, payload: bytes, *, msg_id: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Publish to a stream, acknowledged; a duplicate is success.

        Raises:
            Unsendable: not as it is; the same message fails again on this connection.
            BusError: try again.
        """
        ...

    async def send(self, subject: str, payload: bytes) -> None:
        """Publish with core NATS, at most once; for `reply_to`. Raises as `publish`."""
        ...

    def send_now(self, messages: Iterable[tuple[str, bytes]]) -> int:
        """As `send` for subjects and payloads, in order and without waiting or raising.

        Returns how many were sent; `send` the others.
        """
        ...

    async def read_state(self, key: str) -> tuple[bytes, int] | None:
        """The bucket's value and revision of a key, or None."""
        ...

    async def write_state(self, key: str, value: bytes, *, revision: int | None) -> int:
        """Compare-and-set (None: any revision). Returns the new revision."""
        ...

    async def delete_state(self, key: str, *, revision: int | None) -> None: ...
