"""From the journal to the bus: replies, dead letters, events. A row goes when the bus has it.

Each kind has a task of its own, so replies wait for no event. Replies and dead letters go several
at once; events one in flight in the order of `seq`, resent with the same id until confirmed.
"""

import asyncio
import random
from collections.abc import Sequence
from typing import Final

import msgspec
import structlog

from worker.bus.protocol import Bus, BusError
from worker.journal.journal import Journal
from worker.journal.memory import OUT_KINDS
from worker.journal.transaction import OutRow
from worker.journal.writer import JournalFault

WINDOWS: Final = {"reply": 64, "direct": 64, "dead": 8, "event": 1}
BACKOFF_S: Final = 0.05
BACKOFF_MAX_S: Final = 2.0

log = structlog.get_logger()
HEADERS = msgspec.json.Decoder(dict[str, str])


class Outbox:
    """Runs until cancelled. What was sent but not yet forgotten is sent again: same id."""

    def __init__(self, bus: Bus, journal: Journal) -> None:
        self._bus = bus
        self._journal = journal
        self._woken = {kind: asyncio.Event() for kind in OUT_KINDS}

    async def run(self) -> None:
        """Send all kinds, each in its task."""
        async with asyncio.TaskGroup() as group:
            for kind in OUT_KINDS:
                group.create_task(self._send_kind(kind), name=f"outbox {kind}")

    def wake(self) -> None:
        """Try again now; the bus is connected again."""
        for woken in self._woken.values():
            woken.set()

    async def drained(self) -> None:
        """Return when all replies and dead letters are sent; for the shutdown, with a timeout."""
        while any(self._journal.count(kind) for kind in ("reply", "direct", "dead", "event")):
            await self._journal.wait_sent()

    async def _send_kind(self, kind: str) -> None:
        failures = 0
        while True:
            await self._journal.wait_pending(kind)
            try:
                rows = await self._journal.pending(kind, WINDOWS[kind])
            except JournalFault:
                await self._journal.until_writable()
                continue
            self._woken[kind].clear()
            sent = await self._send(rows)
            if sent:
                self._journal.sent(sent)
            if len(sent) == len(rows):
                failures = 0
            else:
                failures += 1
                await self._back_off(kind, failures)

    async def _send(self, rows: Sequence[OutRow]) -> list[OutRow]:
        """Those that the bus confirmed."""
        if len(rows) == 1:
            results: list[BusError | None] = [await self._send_one(rows[0])]
        else:
            results = await asyncio.gather(*(self._send_one(row) for row in rows))
        for row, error in zip(rows, results, strict=True):
            if error is not None:
                log.warning(
                    "outbox.send_failed", kind=row.kind, msg_id=row.msg_id, error=str(error)
                )
                break
        return [row for row, error in zip(rows, results, strict=True) if error is None]

    async def _send_one(self, row: OutRow) -> BusError | None:
        try:
            if row.kind == "direct":
                await self._bus.send(row.subject, row.payload)
            else:
                headers = HEADERS.decode(row.headers) if row.kind == "dead" else None
                await self._bus.publish(
                    row.subject, row.payload, msg_id=row.msg_id, headers=headers
                )
        except BusError as error:
            return error
        return None

    async def _back_off(self, kind: str, failures: int) -> None:
        """Full jitter; a wake, also one while it was being sent, ends it."""
        limit = min(BACKOFF_MAX_S, BACKOFF_S * 2 ** min(failures, 10))
        try:
            await asyncio.wait_for(self._woken[kind].wait(), random.uniform(0, limit))  # noqa: S311
        except TimeoutError:
            return
