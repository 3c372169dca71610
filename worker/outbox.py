"""From the journal to the bus: replies, dead letters, events. A row is deleted once confirmed.

Each kind has its own task, so replies wait for no event. Replies and dead letters go several at
once; events one in flight in the order of `seq`, resent with the same ID until confirmed.

A row that the bus does not accept as it is does not hold up the others: a dead letter is shortened,
any other row is held back in the journal until the next connection.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import structlog

from handlers.steps import Failpoint, no_failpoint
from worker.bus.protocol import Bus, BusError, Unsendable
from worker.journal.journal import Journal
from worker.journal.memory import OUT_KINDS
from worker.journal.transaction import OutRow
from worker.journal.writer import JournalFault

WINDOWS: Final = {"reply": 64, "direct": 64, "dead": 8, "event": 1}
# Room for the headers that publishing adds, and for the protocol.
RESERVE_BYTES: Final = 1024
BACKOFF_S: Final = 0.05
BACKOFF_MAX_S: Final = 2.0

log = structlog.get_logger()
HEADERS = msgspec.json.Decoder(dict[str, str])


class Outbox:
    """Runs until cancelled. A restart sends rows that are not deleted yet again, same ID."""

    def __init__(
        self,
        bus: Bus,
        journal: Journal,
        *,
        failpoint: Failpoint = no_failpoint,
        sent: Callable[[OutRow, float], None] = lambda row, seconds: None,
    ) -> None:
        """`sent` is called with each row that the bus confirmed, and how many seconds it took."""
        self._bus = bus
        self._note_sent = sent
        self._failpoint = failpoint
        self._outbox = journal.outbox
        self._store = journal.store
        self._woken = {kind: asyncio.Event() for kind in OUT_KINDS}
        self._was_connected = False
        self._reported: set[str] = set()  # kinds whose failure is in the log

    async def run(self) -> None:
        """Send all kinds, each in its own task; direct replies in the callback of their commit."""
        self._outbox.send_at_once(self._send_at_once)
        try:
            async with asyncio.TaskGroup() as group:
                for kind in OUT_KINDS:
                    group.create_task(self._send_kind(kind), name=f"outbox {kind}")
        finally:
            self._outbox.send_at_once(None)

    def _send_at_once(self, rows: Sequence[OutRow]) -> int:
        return self._bus.send_now([(row.subject, row.payload) for row in rows])

    def wake(self) -> None:
        """Try again now, held rows too; the bus is connected again."""
        self._was_connected = True
        self._reported.clear()
        self._outbox.release()
        for woken in self._woken.values():
            woken.set()

    async def drained(self) -> None:
        """Return when everything is sent that can be; for the shutdown, with a timeout."""
        while any(self._outbox.sendable(kind) for kind in OUT_KINDS):
            await self._outbox.wait_sent()

    async def _send_kind(self, kind: str) -> None:
        failures = 0
        while True:
            await self._outbox.wait_pending(kind)
            try:
                rows = await self._outbox.pending(kind, WINDOWS[kind])
            except JournalFault:
                await self._store.until_writable()
                await self._back_off(kind, 1)  # it may be that it can be written and not read
                continue
            self._woken[kind].clear()
            if not rows:  # counted, and yet not found
                await self._back_off(kind, 1)
                continue
            sent, held = await self._send(rows)
            if sent:
                self._reported.discard(kind)
                self._outbox.sent(sent)
            if len(sent) == len(rows) - held:
                failures = 0
            else:
                failures += 1
                await self._back_off(kind, failures)

    async def _send(self, rows: Sequence[OutRow]) -> tuple[list[OutRow], int]:
        """The rows that the bus confirmed, and how many are held back from now on."""
        if len(rows) == 1:
            results: list[BusError | None] = [await self._send_one(rows[0])]
        else:
            results = await asyncio.gather(*(self._send_one(row) for row in rows))
        held = 0
        for row, error in zip(rows, results, strict=True):
            if isinstance(error, Unsendable):
                held += 1
                self._outbox.hold(row)
                log.error("outbox.row_held", kind=row.kind, msg_id=row.msg_id, error=str(error))
            elif error is not None:
                self._report(row, error)
        return [row for row, error in zip(rows, results, strict=True) if error is None], held

    def _report(self, row: OutRow, error: BusError) -> None:
        """Log a failure once per outage; none before the first connection, which is no fault."""
        connected = self._bus.connected
        self._was_connected = self._was_connected or connected
        known = row.kind in self._reported if connected else bool(self._reported)
        if self._was_connected and not known:
            self._reported.add(row.kind)
            log.warning("outbox.send_failed", kind=row.kind, msg_id=row.msg_id, error=str(error))

    async def _send_one(self, row: OutRow) -> BusError | None:
        started_s = time.perf_counter()
        try:
            match row.kind:
                case "direct":
                    await self._bus.send(row.subject, row.payload)
                case "dead":
                    await self._send_dead(row)
                case "reply":
                    await self._failpoint("before:reply")
                    await self._bus.publish(row.subject, row.payload, msg_id=row.msg_id)
                    await self._failpoint("after:reply")
                case _:
                    await self._bus.publish(row.subject, row.payload, msg_id=row.msg_id)
        except BusError as error:
            return error
        except Exception as error:
            # Of this row only: an exception here would end the worker, and again at each start.
            log.exception("outbox.send_crashed", kind=row.kind, msg_id=row.msg_id)
            return Unsendable(f"{type(error).__name__}: {error}")
        self._note_sent(row, time.perf_counter() - started_s)
        return None

    async def _send_dead(self, row: OutRow) -> None:
        """Publish a dead letter; what is too large for the bus is cut and marked as cut."""
        headers, payload = HEADERS.decode(row.headers), row.payload
        while True:
            try:
                await self._bus.publish(row.subject, payload, msg_id=row.msg_id, headers=headers)
            except Unsendable as error:
                if not error.limit_bytes or not payload:
                    raise
                names = sum(len(name) + len(value) + 4 for name, value in headers.items())
                left = max(0, min(error.limit_bytes - names - RESERVE_BYTES, len(payload) - 1))
                payload = payload[:left]
                headers["Hostd-Truncated"] = str(len(row.payload))
            else:
                break
        if len(payload) < len(row.payload):
            log.warning(
                "outbox.dead_letter_truncated",
                msg_id=row.msg_id,
                size_bytes=len(row.payload),
                kept_bytes=len(payload),
            )

    async def _back_off(self, kind: str, failures: int) -> None:
        """Wait with full jitter; a `wake`, also one during the send, ends it."""
        limit = min(BACKOFF_MAX_S, BACKOFF_S * 2 ** min(failures, 10))
        try:
            await asyncio.wait_for(self._woken[kind].wait(), random.uniform(0, limit))  # noqa: S311
        except TimeoutError:
            return
