"""Live events in order, with a bounded buffer; a loss is an error, never a silent gap."""

import asyncio
import logging
from collections import deque
from typing import Any, Final

from schemas import codec
from schemas.decode_error import DecodeError
from schemas.envelopes import Event
from schemas.unpack import ANSWER, unpack_map
from worker.bus.message import Message
from worker.client.errors import BadAnswer, EventsLost
from worker.client.queries import Listing

__all__ = ["EventFeed"]

CAPACITY: Final = 10_000

program_log = logging.getLogger("hostd.client")


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
    are left out, and so is what is no event of the host of its subject, with a warning to Python's
    logger `hostd.client`. Raises `EventsLost` once something is missing; the feed has then ended.
    """

    def __init__(self, buffer: Buffer, root: str) -> None:
        self._buffer = buffer
        self._root = root
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
            message = await self._buffer.take()
            try:
                raw = envelope_of(self._root, message.subject, message.data)
            except BadAnswer as error:
                program_log.warning("event left out: %s", error.message)
                continue
            host, journal, seq = raw["host_id"], raw["journal_id"], raw["seq"]
            before = self._last.get(host)
            if before is not None and before[0] == journal and seq <= before[1]:
                continue
            if before is not None and (journal, seq) != (before[0], before[1] + 1):
                raise EventsLost(
                    f"events of host {host} were lost: expected {before[0]}:{before[1] + 1}, "
                    f"found {journal}:{seq}"
                )
            self._last[host] = journal, seq
            if (event := known_event(raw)) is not None:
                return event


def envelope_of(root: str, subject: str, data: bytes) -> dict[str, Any]:
    """The envelope of an event, with `host_id`, `journal_id` and `seq`.

    Raises:
        BadAnswer: it is none, or of another host than its subject, which the server's accounts
            guard; a reader leaves it out.
    """
    try:
        raw = unpack_map(data, ANSWER)
    except DecodeError as error:
        raise BadAnswer(f"cannot decode an event on {subject}: {error}") from error
    host, journal, seq = raw.get("host_id"), raw.get("journal_id"), raw.get("seq")
    if not isinstance(host, str) or not isinstance(journal, str) or not isinstance(seq, int):
        raise BadAnswer(f"cannot decode an event on {subject}: no host_id, journal_id or seq")
    if subject.removeprefix(f"{root}.").partition(".")[0] != host:
        raise BadAnswer(f"an event on {subject} says that it is of host {host!a}")
    return raw


def known_event(raw: dict[str, Any]) -> Event | None:
    """The event of an envelope; None if it is one of a newer hostd."""
    try:
        return codec.read_event(raw)
    except DecodeError:
        return None
