"""Live events in order, with a bounded buffer; a loss is an error, never a silent gap."""

import asyncio
from collections import deque
from typing import Final

from schemas import codec
from schemas.decode_error import DecodeError
from schemas.envelopes import Event
from schemas.unpack import ANSWER, unpack_map
from worker.bus.message import Message
from worker.client.errors import BadAnswer, EventsLost
from worker.client.queries import Listing

__all__ = ["EventFeed"]

CAPACITY: Final = 10_000


class Buffer:
    """Messages between a subscription and its reader; after a loss, `take` raises in its place."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._messages: deque[Message] = deque()
        self._lost = ""
        self._news = asyncio.Event()

    def put(self, message: Message) -> None:
        """Called by the connection's reader for each message."""
        if self._lost:
            return
        if len(self._messages) >= self._capacity:
            self.lose(f"{self._capacity} messages wait: the reader is too slow")
            return
        self._messages.append(message)
        self._news.set()

    def lose(self, why: str = "the connection was lost") -> None:
        self._lost = self._lost or why
        self._news.set()

    async def take(self) -> Message:
        """The oldest message. Raises `EventsLost` after the last one before a loss."""
        while not self._messages:
            if self._lost:
                raise EventsLost(f"messages were lost: {self._lost}")
            self._news.clear()
            await self._news.wait()
        return self._messages.popleft()


class EventFeed:
    """An asynchronous iterator of `Event`, from `HostdClient.events`.

    Each event of a host comes once and in order. Events of a kind that this client does not know
    are left out. Raises `EventsLost` once something is missing; the feed has then ended.
    """

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._last: dict[str, tuple[str, int]] = {}

    def after(self, host: str, listing: Listing) -> None:
        """Leave out what a list reflects that was asked for on this feed's client, after it began.

        Then the list and the events have no gap.
        """
        if listing.journal_id is not None and listing.seq is not None:
            self._last[host] = listing.journal_id, listing.seq

    def __aiter__(self) -> "EventFeed":
        return self

    async def __anext__(self) -> Event:
        while True:
            host, journal, seq, event = read_event((await self._buffer.take()).data)
            before = self._last.get(host)
            if before is not None and before[0] == journal and seq <= before[1]:
                continue
            if before is not None and (journal, seq) != (before[0], before[1] + 1):
                raise EventsLost(
                    f"events of host {host} were lost: expected {before[0]}:{before[1] + 1}, "
                    f"found {journal}:{seq}"
                )
            self._last[host] = journal, seq
            if event is not None:
                return event


def read_event(data: bytes) -> tuple[str, str, int, Event | None]:
    """Host, journal, number, and the event; None if it is one of a newer hostd.

    Raises:
        BadAnswer: not even an envelope.
    """
    try:
        raw = unpack_map(data, ANSWER)
    except DecodeError as error:
        raise BadAnswer(f"cannot decode an event: {error}") from error
    host, journal, seq = raw.get("host_id"), raw.get("journal_id"), raw.get("seq")
    if not isinstance(host, str) or not isinstance(journal, str) or not isinstance(seq, int):
        raise BadAnswer("cannot decode an event: it has no host_id, journal_id or seq")
    try:
        return host, journal, seq, codec.read_event(raw)
    except DecodeError:
        return host, journal, seq, None
