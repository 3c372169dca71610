"""One commit as the journal's parts see it: SQL, outbox rows, events with their `seq`, state rows.

All of it runs in the writer's thread, inside the transaction of the change that it reports.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeGuard

import msgspec

from schemas import codec
from schemas.envelopes import Event, EventKind
from schemas.requests import InstanceRef
from schemas.subjects import Lane, Subjects
from schemas.trace_context import TraceContext, fields_of

WORKER: Final = "worker"
OPERATOR: Final = "operator"
AUDITED: Final[Mapping[EventKind, str]] = {
    EventKind.VMM_EXITED: WORKER,
    EventKind.VMM_HUNG: WORKER,
    EventKind.DRIFT: WORKER,
    EventKind.REMOVED: WORKER,
    EventKind.QUARANTINED: WORKER,
    EventKind.RECOVERED: WORKER,
    EventKind.DISK: WORKER,
    EventKind.HOST: WORKER,
    EventKind.DRAIN: OPERATOR,
    EventKind.RELEASED: OPERATOR,
}
"""Events of what no command asked for, and who did: each has a row in `audit`, in one commit."""
AUDIT_ROWS_MAX: Final = 10_000
AUDIT_KEEP_MS: Final = 30 * 24 * 3_600_000
AUDIT_SPENT_MS: Final = 2 * 3_600_000  # more than the hour of the sweep's budget
REASON_MAX: Final = 1000
TRIM_EVERY: Final = 64


@dataclass(frozen=True, slots=True)
class OutRow:
    """One message to send. `kind`: reply, direct (to a `reply_to`), dead, event."""

    n: int
    kind: str
    subject: str
    msg_id: str
    headers: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class StateRow:
    """The newest value of one key of the state bucket; None: delete the key."""

    key: str
    value: bytes | None
    seq: int


@dataclass(slots=True)
class Transaction:
    """What one commit does. `seq`, `n`: of the last event and outbox row; `out`, `states`: new.

    `at_ms` is the last event's time; no later event is stamped earlier.
    """

    connection: sqlite3.Connection
    seq: int
    n: int
    at_ms: int = 0
    out: list[OutRow] = field(default_factory=list[OutRow])
    states: list[StateRow] = field(default_factory=list[StateRow])

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self.connection.execute(sql, values)


@dataclass(frozen=True, slots=True)
class EventDraft:
    """An event without a place in the order: the journal adds `id`, `seq` and its source.

    `actor`: who did it, if not who `AUDITED` says; `audited`: it has a row of its own already.
    """

    kind: EventKind
    lane: Lane
    from_: str | None = None
    to: str | None = None
    command_id: str | None = None
    reason: str | None = None
    detail: dict[str, Any] | None = None
    actor: str | None = None
    audited: bool = False


@dataclass(frozen=True, slots=True)
class EventSource:
    """Adds messages to a transaction; its fields are the same in all events of one worker.

    `trace_of`: the span of an unfinished command, by its ID.
    """

    subjects: Subjects
    boot_id: str
    journal_id: str
    trace_of: Callable[[str], TraceContext | None] = lambda command_id: None

    def queue(
        self,
        transaction: Transaction,
        kind: str,
        subject: str,
        payload: bytes,
        *,
        msg_id: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Add one outbox row, sent after all earlier ones of its kind."""
        packed = msgspec.json.encode(headers) if headers else b"{}"
        transaction.n += 1
        values = (transaction.n, kind, subject, msg_id, packed, payload)
        transaction.execute("INSERT INTO outbox VALUES (?, ?, ?, ?, ?, ?)", values)
        transaction.out.append(OutRow(*values))

    def event(self, transaction: Transaction, draft: EventDraft, at_ms: int) -> int:
        """Add one event; returns its `seq`, the next without a gap."""
        transaction.seq += 1
        # A part is stamped when it is made, which is not always the order of commits.
        transaction.at_ms = max(transaction.at_ms, at_ms)
        host_id = self.subjects.host_id
        ref = draft.lane.ref or InstanceRef("", "", "")
        trace = None if draft.command_id is None else self.trace_of(draft.command_id)
        event = Event(
            id=f"{host_id}:{self.journal_id}:{transaction.seq}",
            host_id=host_id,
            boot_id=self.boot_id,
            journal_id=self.journal_id,
            seq=transaction.seq,
            at_ms=transaction.at_ms,
            kind=draft.kind,
            tenant_id=draft.lane.tenant_id,
            pool_id=ref.pool_id or None,
            instance_id=ref.instance_id or None,
            from_=draft.from_,
            to=draft.to,
            command_id=draft.command_id,
            reason=draft.reason,
            detail=draft.detail or {},
            **fields_of(trace),
        )
        subject = self.subjects.event(draft.lane, draft.kind.value)
        self.queue(transaction, "event", subject, codec.encode_event(event), msg_id=event.id)
        actor = None if draft.audited else draft.actor or AUDITED.get(draft.kind)
        if actor is not None:
            _audit(transaction, actor, draft, at_ms)
        return transaction.seq

    def announce(
        self,
        transaction: Transaction,
        draft: EventDraft,
        at_ms: int,
        state: dict[str, Any] | None,
    ) -> None:
        """Publish a new status, `draft.to`, unless it is the last one published for this lane.

        The event's `from` is the last `to`. `state` is merged into the value of the state bucket;
        None deletes the key.
        """
        lane = str(draft.lane)
        last = transaction.execute(
            "SELECT status FROM announced WHERE lane = ?", (lane,)
        ).fetchone()
        before = last[0] if last is not None and is_text(last[0]) else None
        if before == draft.to:
            return
        seq = self.event(transaction, replace(draft, from_=before), at_ms)
        transaction.execute("INSERT OR REPLACE INTO announced VALUES (?, ?)", (lane, draft.to))
        value = None
        if state is not None:
            fixed = {
                "v": 1,
                "status": draft.to,
                "journal_id": self.journal_id,
                "seq": seq,
                "at_ms": at_ms,
            }
            value = msgspec.msgpack.encode(fixed | state)
        key = self.subjects.state_key(draft.lane)
        transaction.execute("INSERT OR REPLACE INTO state VALUES (?, ?, ?, 1)", (key, value, seq))
        transaction.states.append(StateRow(key, value, seq))


def _audit(tx: Transaction, actor: str, draft: EventDraft, at_ms: int) -> None:
    """Add the row of an action that is done."""
    # The tail of a VMM's log is the guest's data, and is in its log.
    detail = {key: each for key, each in (draft.detail or {}).items() if key != "log_tail"}
    reason = f"{draft.reason or ''} {msgspec.json.encode(detail).decode()}".strip()[:REASON_MAX]
    row = tx.execute(
        "INSERT INTO audit (at_ms, actor, kind, name, result, reason, tenant_id) "
        "VALUES (?, ?, ?, ?, 'done', ?, ?)",
        (at_ms, actor, draft.kind.value, str(draft.lane), reason, draft.lane.tenant_id),
    )
    if (row.lastrowid or 0) % TRIM_EVERY == 0:
        trim_audit_rows(tx, at_ms)


def trim_audit(tx: Transaction, at_ms: int) -> None:
    """Keep the newest rows, none older than `AUDIT_KEEP_MS`."""
    # Damaged times, also such as are no numbers, are beyond.
    tx.execute(
        "DELETE FROM audit WHERE at_ms NOT BETWEEN ? AND ?",
        (at_ms - AUDIT_KEEP_MS, at_ms + AUDIT_KEEP_MS),
    )
    trim_audit_rows(tx, at_ms)


def trim_audit_rows(tx: Transaction, at_ms: int) -> None:
    """Keep the newest rows, and what the sweep's budget and its open removals need.

    Rows of the future stay here: an event may come while the clock is not set yet.
    """
    tx.execute("DELETE FROM audit WHERE at_ms < ? AND result IS NOT NULL", (at_ms - AUDIT_KEEP_MS,))
    tx.execute(
        "DELETE FROM audit WHERE n <= (SELECT n FROM audit ORDER BY n DESC LIMIT 1 OFFSET ?) "
        "AND result IS NOT NULL AND NOT (actor = 'sweep' AND at_ms > ?)",
        (AUDIT_ROWS_MAX - 1, at_ms - AUDIT_SPENT_MS),
    )


def is_text(value: object) -> TypeGuard[str]:
    """Whether a column holds a text that can be written to UTF-8 again."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
