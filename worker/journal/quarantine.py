"""What the journal does about quarantined rows: names them, answers commands, closes lanes."""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from handlers.errors import HostFault
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import EventKind, Form, Reply
from schemas.requests import Error
from schemas.subjects import Lane
from worker.journal import admission
from worker.journal.quarantined_rows import Quarantined, QuarantinedRow, UnreadCommand, shown
from worker.journal.store import Store
from worker.journal.transaction import EventDraft, Transaction, is_text

EVENTS_MAX: Final = 100
UNREAD: Final = "this version of hostd cannot read the command in its journal"


class JournalQuarantine:
    """Rows that this version cannot read, as of when the file was opened."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._mechanisms: frozenset[str] | None = None

    @property
    def _found(self) -> Quarantined:
        return self._store.mirror.quarantined

    def know(self, mechanisms: frozenset[str]) -> None:
        """Steps of other mechanisms count as quarantined from now on."""
        self._mechanisms = mechanisms

    def rows(self) -> Sequence[QuarantinedRow]:
        """By table and key; bounded."""
        return (*self._found.rows, *self._unknown_steps())

    def counts(self) -> Mapping[str, int]:
        """By table."""
        return self._found.counts + Counter(row.table for row in self._unknown_steps())

    @property
    def hides_records(self) -> bool:
        """Whether what belongs to no record may belong to one that cannot be read."""
        return self._found.hides_records

    def holds(self, lane: Lane) -> bool:
        """Whether the record of this instance or network cannot be read."""
        return lane in self._found.lanes

    def refusal(self, lane: Lane) -> HostFault | None:
        """Why no command may run in the lane: it would take the record for absent."""
        if not self.holds(lane):
            return None
        return HostFault(
            f"this version of hostd cannot read the journal's record of {lane}; run the version "
            "that wrote it: see docs/operations.md#rows-that-cannot-be-read",
            detail={"quarantined": str(lane)},
        )

    def covers(self, command_id: str) -> bool:
        """Whether what the command left behind may belong to a record that cannot be read."""
        if not self._found.lanes:
            return False
        try:
            row = self._store.reader.execute(
                "SELECT lane FROM command WHERE id = ?", (command_id,)
            ).fetchone()
        except sqlite3.Error:
            return True
        return row is None or row[0] in {str(lane) for lane in self._found.lanes}

    async def answer(self, inbox_prefixes: Sequence[str]) -> None:
        """Answer each unread command `internal`, keep its request as a dead letter, and publish
        what is quarantined. Once per worker, before lanes start.

        Raises:
            JournalFault: it cannot be committed now.
        """
        commands, self._found.commands = self._found.commands, []
        rows = self._found.rows[:EVENTS_MAX]
        at_ms = self._store.now_ms()
        prefixes = tuple(inbox_prefixes)

        def do(tx: Transaction) -> None:
            for unread in commands:
                self._answer(tx, unread, at_ms, prefixes)
            for row in rows:
                detail = {"table": row.table, "key": row.key, "error": row.reason}
                draft = EventDraft(
                    EventKind.QUARANTINED,
                    Lane.host(),
                    reason="a row of the journal cannot be read by this version",
                    detail=detail,
                )
                self._store.source.event(tx, draft, at_ms)

        if not rows:
            return
        try:
            await self._store.writer.submit(do, durable=True)
        except BaseException:
            self._found.commands = commands
            raise

    def _answer(
        self, tx: Transaction, unread: UnreadCommand, at_ms: int, prefixes: tuple[str, ...]
    ) -> None:
        source, columns = self._store.source, unread.columns
        msg_id = unread.id or f"row:{unread.n}:{at_ms}"
        reply = Reply(
            id=unread.id or "",
            host_id=source.subjects.host_id,
            response=Error(UNREAD),
            code=Code.INTERNAL,
            attempts=_number(columns["attempts"]),
            received_at_ms=_number(columns["received_at_ms"]),
            finished_at_ms=at_ms,
            detail={"act": "operator", "reason": shown(unread.reason)},
            request_digest=admission.stored_digest(columns["request"]),
        )
        form = columns["form"] if columns["form"] in set(Form) else Form.NAMED
        data = codec.encode_reply(reply, Form(form))
        tx.execute(
            "UPDATE command SET code = ?, reply = ?, finished_at_ms = ? WHERE n = ?",
            (reply.code.value, data, at_ms, unread.n),
        )
        if unread.id is not None:
            reply_to = columns["reply_to"]
            if is_text(reply_to) and reply_to.startswith(prefixes):
                source.queue(tx, "direct", reply_to, data)
            admission.answer_joiners(tx, source, unread.id, data)
            source.queue(tx, "reply", source.subjects.reply(unread.lane), data, msg_id=unread.id)
        request = _bytes(columns["request"])
        source.queue(
            tx,
            "dead",
            source.subjects.dead(unread.lane),
            request,
            msg_id=msg_id,
            headers={
                "Hostd-Sha256": hashlib.sha256(request).hexdigest(),
                "Hostd-Reason": f"unreadable in the journal: {shown(unread.reason)}",
            },
        )

    def _unknown_steps(self) -> list[QuarantinedRow]:
        if self._mechanisms is None:
            return []
        return [
            QuarantinedRow("step", shown(f"{command_id} {mechanism} {key}"), "unknown mechanism")
            for command_id, rows in self._store.mirror.steps.items()
            for mechanism, key in rows
            if mechanism not in self._mechanisms
        ]


def _number(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 53 else 0


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return str(value).encode(errors="replace")
