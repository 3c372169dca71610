"""The only owner of SQLite. What is in the journal will be answered, once, also after kill -9.

This file has the commands: taken in, counted, answered. `journal_steps`, `journal_records` and
`journal_outbox` are its other tables, `journal_writer` its one thread.
"""

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from schemas import codec
from schemas.envelopes import Command, EventKind, Form, Reply
from schemas.requests import Request
from schemas.subjects import Lane
from worker.journal_admission import JournalAdmission, insert_command
from worker.journal_messages import EventDraft
from worker.journal_mirror import CommandRow
from worker.journal_outbox import JournalOutbox
from worker.journal_records import JournalRecords
from worker.journal_steps import JournalSteps
from worker.journal_writer import Transaction

RETENTION_MS: Final = 24 * 3_600_000


class Found(StrEnum):
    """What `accept` found. Identity is the id and the request; the rest may differ."""

    NEW = "new"
    JOINED = "joined"
    REPLAY = "replay"
    CONFLICT = "conflict"
    LANE_FULL = "lane_full"
    HOST_FULL = "host_full"


@dataclass(frozen=True, slots=True)
class Accepted:
    """`row` of a new command; `reply`, to be sent to its own `reply_to` only, of a replay."""

    kind: Found
    row: CommandRow | None = None
    reply: bytes | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message that is answered without being run.

    `reply_to` is set only if hostd may publish there. `request` is the identity of one that was
    understood (the lane was full); else the bytes are. `dead` is the reason if the bytes are to
    be kept as a dead letter.
    """

    reply: Reply
    form: Form
    lane: Lane
    subject: str
    stream_seq: int
    data: bytes
    reply_to: str | None = None
    request: Request | None = None
    dead: str | None = None


@dataclass(frozen=True, slots=True)
class CommandState:
    """`state`: waiting, running or done; `reply` of a done one, as it went out."""

    state: str
    reply: bytes | None = None


class Journal(JournalAdmission, JournalSteps, JournalRecords, JournalOutbox):
    """One file, one process. Every async method returns when its change is committed.

    Raises:
        JournalFault: from every async method; the change was not committed.
    """

    # -- taking in -----------------------------------------------------------------------------

    async def accept(
        self,
        command: Command,
        *,
        lane: Lane,
        subject: str,
        stream_seq: int,
        received_at_ms: int,
        redelivered: bool = False,
    ) -> Accepted:
        """Take a command in, durably, or say what is known of its id.

        A copy of an unfinished command joins it: it is told the outcome on its own `reply_to`.
        A redelivered message that is already in joins without being told twice.
        """
        request = codec.encode_request(command.request)
        crowded = len(self._mirror.commands) * 2 >= self.host_depth

        def do(tx: Transaction) -> Accepted:
            known = tx.execute(
                "SELECT request, stream_seq, reply_to, finished_at_ms, reply "
                "FROM command WHERE id = ?",
                (command.id,),
            ).fetchone()
            if known is not None:
                same = redelivered and known[1:3] == (stream_seq, command.reply_to)
                return self._again(tx, command, stream_seq, request, known, same=same)
            if self._unfinished(tx, str(lane)) >= self.lane_depth:
                return Accepted(Found.LANE_FULL)
            if crowded and self._unfinished(tx, None) >= self.host_depth:
                return Accepted(Found.HOST_FULL)
            row = CommandRow(0, command, lane, stream_seq, received_at_ms)
            insert_command(tx, command, row, subject, request)
            return Accepted(Found.NEW, row)

        def apply(accepted: Accepted) -> None:
            if accepted.row is not None:
                self._mirror.add_command(accepted.row)

        with self._deciding(command.id):
            return await self._writer.submit(do, apply=apply, durable=True)

    @contextmanager
    def _deciding(self, command_id: str) -> Generator[None]:
        self._undecided.add(command_id)
        try:
            yield
        finally:
            self._undecided.discard(command_id)

    @staticmethod
    def _again(
        tx: Transaction,
        command: Command,
        stream_seq: int,
        request: bytes,
        known: tuple[bytes | None, int, str | None, int | None, bytes | None],
        *,
        same: bool,
    ) -> Accepted:
        known_request, _, _, finished_at_ms, reply = known
        if known_request != request:
            return Accepted(Found.CONFLICT)
        if same:
            return Accepted(Found.JOINED)
        if finished_at_ms is not None and reply is not None:
            return Accepted(Found.REPLAY, reply=codec.mark_replayed(reply))
        if command.reply_to is not None:
            Journal._join(tx, command.id, stream_seq, command.reply_to)
        return Accepted(Found.JOINED)

    @staticmethod
    def _join(tx: Transaction, command_id: str, stream_seq: int, reply_to: str) -> None:
        values = (command_id, stream_seq, reply_to)
        tx.execute("INSERT OR IGNORE INTO joiner VALUES (?, ?, ?)", values)

    @staticmethod
    def _unfinished(tx: Transaction, lane: str | None) -> int:
        where = "finished_at_ms IS NULL" + (" AND lane = ?" if lane else "")
        row = tx.execute(
            f"SELECT count(*) FROM command WHERE {where}",  # noqa: S608 - constants
            (lane,) if lane else (),
        ).fetchone()
        return int(row[0])

    async def refuse(self, refusal: Refusal) -> None:
        """Answer without running, durably; the outcome is final for the id.

        A known id is not disturbed: what was sent now is answered on its own `reply_to` only
        (with the stored reply if it is the same message again), and kept as a dead letter.
        """
        reply = refusal.reply
        data = codec.encode_reply(reply, refusal.form)
        digest = hashlib.sha256(refusal.data).digest()
        request = None if refusal.request is None else codec.encode_request(refusal.request)
        identity = (request, None) if request is not None else (None, digest)

        def do(tx: Transaction) -> None:
            answer, first = data, True
            known = tx.execute(
                "SELECT request, digest, stream_seq, reply FROM command WHERE id = ?", (reply.id,)
            ).fetchone()
            if known is not None:
                first = False
                if known[:2] == identity and known[3] is None:
                    if refusal.reply_to is not None:  # meanwhile a copy of it found room
                        self._join(tx, reply.id, refusal.stream_seq, refusal.reply_to)
                    return
                if known[:2] == identity:
                    if known[2] == refusal.stream_seq:
                        return  # this very message, delivered again
                    answer = codec.mark_replayed(known[3])
            else:
                self._insert_refused(tx, refusal, data, identity)
                subject = self.source.subjects.reply(refusal.lane)
                self.source.queue(tx, "reply", subject, data, msg_id=reply.id)
            if refusal.reply_to is not None:
                self.source.queue(tx, "direct", refusal.reply_to, answer)
            if refusal.dead is not None:
                self.source.queue(
                    tx,
                    "dead",
                    self.source.subjects.dead(refusal.lane),
                    refusal.data,
                    msg_id=reply.id if first else f"{reply.id}:{refusal.stream_seq}",
                    headers={"Hostd-Sha256": digest.hex(), "Hostd-Reason": refusal.dead},
                )

        with self._deciding(reply.id):
            await self._writer.submit(do, durable=True)

    @staticmethod
    def _insert_refused(
        tx: Transaction, refusal: Refusal, data: bytes, identity: tuple[bytes | None, bytes | None]
    ) -> None:
        reply = refusal.reply
        tx.execute(
            "INSERT INTO command (id, lane, subject, stream_seq, kind, request, digest, form, "
            "received_at_ms, code, reply, finished_at_ms) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                reply.id, str(refusal.lane), refusal.subject, refusal.stream_seq,
                "" if refusal.request is None else refusal.request.kind, *identity,
                refusal.form.value, reply.received_at_ms, reply.code.value, data,
                reply.finished_at_ms,
            ),
        )  # fmt: skip

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

    async def finish(self, reply: Reply, events: Sequence[EventDraft] = ()) -> None:
        """The outcome with its replies and events, durably, in one transaction. Once only.

        The command's step rows go, but for what `reply.left_behind` names.
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
            },
        )
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
            for draft in (*events, ended):
                self.source.event(tx, draft, reply.finished_at_ms)

        def apply(_: None) -> None:
            self._mirror.drop_command(reply.id)
            self._mirror.points.pop(reply.id, None)
            self._mirror.steps.pop(reply.id, None)
            if kept:
                self._mirror.steps[reply.id] = kept

        await self._writer.submit(do, apply=apply, durable=True)

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
