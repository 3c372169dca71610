"""The only owner of SQLite. What is in the journal will be answered, once, also after kill -9.

This file runs and ends commands; `journal_admission` and `journal_refusals` take them in,
`journal_steps`, `journal_records` and `journal_outbox` are its other tables, `journal_file` opens
it, `journal_writer` is its one thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from schemas import codec
from schemas.envelopes import EventKind, Reply
from schemas.records import InstanceRecord, Tombstone
from schemas.requests import Error
from schemas.subjects import Lane
from worker.journal.events import EventDraft
from worker.journal.memory import CommandRow
from worker.journal.outbox import JournalOutbox
from worker.journal.records import JournalRecords
from worker.journal.refusals import JournalRefusals
from worker.journal.step_log import JournalSteps
from worker.journal.transaction import Transaction

RETENTION_MS: Final = 24 * 3_600_000


@dataclass(frozen=True, slots=True)
class CommandState:
    """`state`: waiting, running or done; `reply` of a done one, as it went out."""

    state: str
    reply: bytes | None = None


class Journal(JournalRefusals, JournalSteps, JournalRecords, JournalOutbox):
    """One file, one process. Every async method returns when its change is committed.

    Raises:
        JournalFault: from every async method; the change was not committed.
    """

    # -- running -------------------------------------------------------------------------------

    def unfinished(self) -> Sequence[CommandRow]:
        """All commands without an outcome, in the order of intake."""
        return sorted(self._mirror.commands.values(), key=lambda row: row.n)

    def is_unfinished(self, command_id: str) -> bool:
        return command_id in self._mirror.commands

    def lanes(self) -> dict[Lane, int]:
        """Unfinished commands per lane that has any."""
        return dict(self._mirror.lanes)

    def begin_attempt(self, command_id: str) -> int:
        """Count one more attempt, from 1 over all workers.

        On disk with, and not after, the first step of the attempt: the order of submission is
        the order of commits.
        """
        row = self._mirror.commands[command_id]
        row.attempts += 1
        values = (row.attempts, command_id)

        def do(tx: Transaction) -> None:
            tx.execute("UPDATE command SET attempts = ? WHERE id = ?", values)

        self._writer.later(do)
        return row.attempts

    async def finish(
        self,
        reply: Reply,
        events: Sequence[EventDraft] = (),
        *,
        record: InstanceRecord | None = None,
        tombstone: Tombstone | None = None,
    ) -> None:
        """The outcome with its replies and events, durably, in one transaction. Once only.

        The instance's `record` is saved with it; with a `tombstone` it is dropped instead. The
        command's step rows go, but for what `reply.left_behind` names.
        """
        row = self._mirror.commands.get(reply.id)
        if row is None:
            return
        command = row.command
        data = codec.encode_reply(reply, command.form)
        ended = EventDraft(
            kind=EventKind.COMMAND,
            lane=row.lane,
            command_id=reply.id,
            detail={
                "type": command.request.kind,
                "code": reply.code.value,
                "changed": reply.changed,
                "attempts": reply.attempts,
                **_trouble(reply),
            },
        )
        save, remember = self._outcome(record, tombstone, reply.id)
        steps = self._mirror.steps.get(reply.id, {})
        points = self._mirror.points.get(reply.id)
        kept = {k: s for k, s in steps.items() if f"{k[0]} {k[1]}" in reply.left_behind}
        gone = [(reply.id, *key) for key in steps if key not in kept]

        def do(tx: Transaction) -> None:
            done = tx.execute(
                "UPDATE command SET code = ?, reply = ?, finished_at_ms = ?, attempts = ? "
                "WHERE id = ? AND finished_at_ms IS NULL",
                (reply.code.value, data, reply.finished_at_ms, reply.attempts, reply.id),
            )
            if not done.rowcount:
                return
            if command.reply_to is not None:  # first: someone waits for it
                self.source.queue(tx, "direct", command.reply_to, data)
            self._answer_joiners(tx, reply.id, data)
            subject = self.source.subjects.reply(row.lane)
            self.source.queue(tx, "reply", subject, data, msg_id=reply.id)
            if points:
                tx.execute("DELETE FROM point WHERE command_id = ?", (reply.id,))
            if gone:
                tx.connection.executemany(
                    "DELETE FROM step WHERE command_id = ? AND mechanism = ? AND key = ?", gone
                )
            save(tx)
            for draft in (*events, ended):
                self.source.event(tx, draft, reply.finished_at_ms)

        def apply(_: None) -> None:
            remember(None)
            self._mirror.drop_command(reply.id)
            self._mirror.points.pop(reply.id, None)
            self._mirror.steps.pop(reply.id, None)
            if kept:
                self._mirror.steps[reply.id] = kept

        await self._writer.submit(do, apply=apply, durable=True)

    def _outcome(
        self, record: InstanceRecord | None, tombstone: Tombstone | None, command_id: str
    ) -> tuple[Callable[[Transaction], None], Callable[[object], None]]:
        """What a command's end does to its instance's record."""
        if record is None:
            return (lambda _: None), (lambda _: None)
        if tombstone is not None:
            return self._dropping(record.ref, tombstone, command_id=command_id)
        return self._putting(record, command_id=command_id)

    def _answer_joiners(self, tx: Transaction, command_id: str, data: bytes) -> None:
        joiners = tx.execute(
            "SELECT reply_to FROM joiner WHERE command_id = ? ORDER BY stream_seq", (command_id,)
        ).fetchall()
        if not joiners:
            return
        copy = codec.mark_replayed(data)
        for (reply_to,) in joiners:
            self.source.queue(tx, "direct", reply_to, copy)
        tx.execute("DELETE FROM joiner WHERE command_id = ?", (command_id,))

    # -- asking --------------------------------------------------------------------------------

    async def result(self, command_id: str) -> CommandState | None:
        """Where a command stands, or None for an id that is not known (any more)."""
        row = self._mirror.commands.get(command_id)
        if row is not None:
            return CommandState("running" if row.attempts else "waiting")
        found = await self._writer.read(
            lambda tx: tx.execute(
                "SELECT reply FROM command WHERE id = ?", (command_id,)
            ).fetchone()
        )
        return None if found is None else CommandState("done", found[0])

    async def prune(self, *, keep_ms: int = RETENTION_MS, limit: int = 500) -> int:
        """Forget up to `limit` commands that ended `keep_ms` ago or earlier; returns how many."""
        before_ms = self._now_ms() - keep_ms

        def do(tx: Transaction) -> int:
            return tx.execute(
                "DELETE FROM command WHERE n IN (SELECT n FROM command "
                "WHERE finished_at_ms <= ? ORDER BY finished_at_ms LIMIT ?)",
                (before_ms, limit),
            ).rowcount

        return await self._writer.submit(do)


def _trouble(reply: Reply) -> dict[str, str]:
    """Why a command failed, for its event: the message, and the tail of the VMM's log if any."""
    if not isinstance(reply.response, Error):
        return {}
    log = reply.detail.get("vmm_log")
    return {"message": reply.response.message} | ({"vmm_log": str(log)} if log else {})
