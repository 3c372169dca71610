"""What the worker removed by itself: a row before each effect, its result and an event after it.

So a removal that a kill cut off is known, and the hourly budget outlives the worker. Bounded by age
and number.
"""

from functools import partial
from typing import Any, Final

import msgspec
import structlog

from handlers.claims.orphan import Orphan
from schemas.envelopes import EventKind
from schemas.subjects import Lane
from worker.journal.store import Store
from worker.journal.transaction import EventDraft, Transaction

KEEP_MS: Final = 30 * 24 * 3_600_000
ROWS_MAX: Final = 10_000
REMOVED, KEPT, FAILED, CUT = "removed", "kept", "failed", "cut off"

log = structlog.get_logger()


class JournalAudit:
    """The rows of `audit`. `by`: `sweep`, or `operator` for one that was asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def begin(self, orphan: Orphan, by: str) -> int:
        """Commit, durably, that it is about to be removed; returns the row's number."""
        at_ms = self._store.now_ms()

        def do(tx: Transaction) -> int:
            # Damaged times, also such as are no numbers, are beyond.
            tx.execute(
                "DELETE FROM audit WHERE at_ms NOT BETWEEN ? AND ?",
                (at_ms - KEEP_MS, at_ms + KEEP_MS),
            )
            tx.execute(
                "DELETE FROM audit WHERE n <= "
                "(SELECT n FROM audit ORDER BY n DESC LIMIT 1 OFFSET ?)",
                (ROWS_MAX - 1,),
            )
            row = tx.execute(
                "INSERT INTO audit (at_ms, actor, kind, name) VALUES (?, ?, ?, ?)",
                (at_ms, by, orphan.kind, orphan.name),
            )
            return row.lastrowid or 0

        return await self._store.writer.submit(do, durable=True)

    async def end(self, number: int, orphan: Orphan, by: str, result: str, reason: str) -> None:
        """Commit the result; one that changed the host, or may have, with a `removed` event."""
        draft = EventDraft(
            EventKind.REMOVED,
            Lane.host(),
            reason=reason,
            detail={"kind": orphan.kind, "name": orphan.name, "by": by, "result": result},
        )
        at_ms = self._store.now_ms()

        def do(tx: Transaction) -> None:
            _set_result(number, result, reason, tx)
            if result != KEPT:
                self._store.source.event(tx, draft, at_ms)

        await self._store.writer.submit(do)

    async def close_cut_off(self) -> int:
        """End the rows that a killed worker began; returns how many. A damaged one has no event."""
        count = 0
        while (row := await self._begun()) is not None:
            number, *columns = row
            reason = "the worker was killed while it removed it"
            try:
                kind, name, actor = msgspec.convert(columns, tuple[str, str, str])
                f"{kind}{name}{actor}".encode()
            except (msgspec.ValidationError, UnicodeEncodeError) as error:
                log.error("audit.unreadable", row=number, error=str(error))  # noqa: TRY400
                await self._store.writer.submit(partial(_set_result, number, CUT, reason))
            else:
                await self.end(number, Orphan(kind, name), actor, CUT, reason)
            count += 1
        return count

    async def _begun(self) -> tuple[Any, ...] | None:
        return await self._store.questions.first(
            "SELECT n, kind, name, actor FROM audit WHERE result IS NULL ORDER BY n LIMIT 1", ()
        )

    async def spent_within(self, period_ms: int) -> int:
        """How many of the sweep's own removals began in that time; those that kept it not counted.

        A row with a later time, by a clock that was set back, counts, but for one that is damaged.
        """
        now_ms = self._store.now_ms()
        row = await self._store.questions.first(
            "SELECT count(*) FROM audit WHERE actor = 'sweep' AND at_ms BETWEEN ? AND ? "
            "AND coalesce(result, '') != ?",
            (now_ms - period_ms, now_ms + KEEP_MS, KEPT),
        )
        return 0 if row is None else int(row[0])


def _set_result(number: int, result: str, reason: str, tx: Transaction) -> None:
    tx.execute("UPDATE audit SET result = ?, reason = ? WHERE n = ?", (result, reason, number))
