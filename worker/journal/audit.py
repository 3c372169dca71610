"""What was done without a command, newest first: a row each, bounded by age and number.

A removal of the sweep has its row before the effect, and its result and event after it: so one that
a kill cut off is known, and the hourly budget outlives the worker. Every other action is done when
its event is committed, and gets its row with it (`transaction.AUDITED`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec
import structlog

from handlers.claims.orphan import Orphan
from schemas.envelopes import EventKind
from schemas.subjects import Lane
from worker.journal.store import Store
from worker.journal.transaction import AUDIT_KEEP_MS, EventDraft, Transaction, trim_audit

SHOWN: Final = 1000
REMOVED, KEPT, FAILED, CUT = "removed", "kept", "failed", "cut off"

log = structlog.get_logger()


class AuditRow(msgspec.Struct, frozen=True):
    """One action. `kind`, `name`: of the event and the lane, or of the orphan that was removed.
    `result`: None until it is known."""

    n: int
    at_ms: int
    actor: str
    kind: str
    name: str
    tenant_id: str | None
    result: str | None
    reason: str | None


class JournalAudit:
    """The rows of `audit`. `by`: `sweep`, or `operator` for one that was asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def begin(self, orphan: Orphan, by: str, tenant_id: str | None = None) -> int:
        """Commit, durably, that it is about to be removed; returns the row's number.

        `tenant_id`: in whose directory it is.
        """
        at_ms = self._store.now_ms()

        def do(tx: Transaction) -> int:
            trim_audit(tx, at_ms)
            row = tx.execute(
                "INSERT INTO audit (at_ms, actor, kind, name, tenant_id) VALUES (?, ?, ?, ?, ?)",
                (at_ms, by, orphan.kind, orphan.name, tenant_id),
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
            audited=True,
        )
        at_ms = self._store.now_ms()

        def do(tx: Transaction) -> None:
            _set_result(number, result, reason, tx)
            if result != KEPT:
                self._store.source.event(tx, draft, at_ms)

        await self._store.writer.submit(do)

    async def close_cut_off(self, is_there: Callable[[Orphan], bool] | None = None) -> int:
        """End the rows whose result is not known; returns how many. A damaged one has no event.

        Their worker was killed, or could not commit the result.

        Args:
            is_there: whether it is still on the host, for the row's reason.
        """
        count = 0
        while (row := await self._begun()) is not None:
            number, *columns = row
            reason = "the worker was killed, or could not commit, while it removed it"
            try:
                kind, name, actor = msgspec.convert(columns, tuple[str, str, str])
                f"{kind}{name}{actor}".encode()
            except (msgspec.ValidationError, UnicodeEncodeError) as error:
                log.error("audit.unreadable", row=number, error=str(error))  # noqa: TRY400
                await self._store.writer.submit(partial(_set_result, number, CUT, reason))
            else:
                orphan = Orphan(kind, name)
                if is_there is not None:
                    reason += "; it is still there" if is_there(orphan) else "; it is gone"
                await self.end(number, orphan, actor, CUT, reason)
            count += 1
        return count

    async def _begun(self) -> tuple[Any, ...] | None:
        return await self._store.questions.first(
            "SELECT n, kind, name, actor FROM audit WHERE result IS NULL ORDER BY n LIMIT 1", ()
        )

    async def newest(self) -> list[AuditRow]:
        """The newest `SHOWN` rows, newest first; one that is damaged is left out and logged.

        Raises:
            JournalFault: the file cannot be read now.
        """
        columns = ", ".join(AuditRow.__struct_fields__)
        query = f"SELECT {columns} FROM audit ORDER BY n DESC LIMIT ?"  # noqa: S608
        rows = await self._store.questions.run(
            lambda connection: connection.execute(query, (SHOWN,)).fetchall()
        )
        shown: list[AuditRow] = []
        for row in rows:
            facts = dict(zip(AuditRow.__struct_fields__, row, strict=True))
            try:
                found = msgspec.convert(facts, AuditRow)
                msgspec.json.encode(found)
            except (msgspec.ValidationError, UnicodeEncodeError) as error:
                log.error("audit.unreadable", row=row[0], error=str(error))  # noqa: TRY400
            else:
                shown.append(found)
        return shown

    async def spent_within(self, period_ms: int) -> int:
        """How many of the sweep's own removals began in that time; those that kept it not counted.

        A row with a later time, by a clock that was set back, counts, but for one that is damaged.
        """
        now_ms = self._store.now_ms()
        row = await self._store.questions.first(
            "SELECT count(*) FROM audit WHERE actor = 'sweep' AND at_ms BETWEEN ? AND ? "
            "AND coalesce(result, '') != ?",
            (now_ms - period_ms, now_ms + AUDIT_KEEP_MS, KEPT),
        )
        return 0 if row is None else int(row[0])

    async def shares(self, period_ms: int) -> Mapping[str | None, tuple[int, int]]:
        """By the tenant in whose directory it was, or None, to share the sweep's budget out: how
        much of it was spent within that time, and the number of the last row."""
        now_ms = self._store.now_ms()
        rows = await self._store.questions.run(
            lambda connection: connection.execute(
                "SELECT tenant_id, sum(at_ms BETWEEN ? AND ? "
                "AND coalesce(result, '') != ?), max(n) FROM audit WHERE actor = 'sweep' "
                "GROUP BY tenant_id",
                (now_ms - period_ms, now_ms + AUDIT_KEEP_MS, KEPT),
            ).fetchall()
        )
        return {tenant_id: (spent, last) for tenant_id, spent, last in rows}


def _set_result(number: int, result: str, reason: str, tx: Transaction) -> None:
    tx.execute("UPDATE audit SET result = ?, reason = ? WHERE n = ?", (result, reason, number))
