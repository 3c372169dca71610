"""The way in: commands are journalled once per id, and told apart by id and request.

A command that is surely new may begin while its own commit is under way (`admit`).
Commits keep the order of submission. So whatever a command writes is on disk only with or after
its acceptance, and one that changes nothing is accepted and answered in a single commit. Effects
on the host wait for the acceptance (`Steps`), and so does the acknowledgement.
"""

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from schemas import codec
from schemas.envelopes import Command
from schemas.requests import DestroyInstance, StopInstance
from schemas.subjects import Lane
from worker.journal.memory import CommandRow
from worker.journal.store import JournalFile
from worker.journal.transaction import Transaction

# A full lane, or host, still takes so many Stops and Destroys: they are what empties it.
RESERVED: Final = 8

INSERT = (
    "INSERT INTO command (id, lane, subject, stream_seq, kind, request, form, issued_at_ms, "
    "deadline_ms, reply_to, issuer, traceparent, received_at_ms) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


def insert_command(
    tx: Transaction, command: Command, row: CommandRow, subject: str, request: bytes
) -> None:
    """Write a new command and give its row the place in the order of intake."""
    values = (
        command.id, str(row.lane), subject, row.stream_seq, command.request.kind, request,
        command.form.value, command.issued_at_ms, command.deadline_ms, command.reply_to,
        command.issuer, command.traceparent, row.received_at_ms,
    )  # fmt: skip
    row.n = tx.execute(INSERT, values).lastrowid or 0


def reserved_for(command: Command) -> int:
    """How far past the limits this command is still taken."""
    return RESERVED if isinstance(command.request, StopInstance | DestroyInstance) else 0


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


class JournalAdmission(JournalFile):
    """Takes commands in: `admit` what is surely new, `accept` to find out."""

    def admit(
        self, command: Command, *, lane: Lane, subject: str, stream_seq: int, received_at_ms: int
    ) -> CommandRow | None:
        """Take in a command that is new and has room; None: it takes `accept` to tell.

        The row's `admission` is done when it is on disk; if that fails it is `withdrawn`.
        """
        mirror = self._mirror
        if (
            not self.writable
            or command.id in mirror.commands
            or command.id in self._undecided
            or mirror.lanes.get(lane, 0) >= self.lane_depth + (extra := reserved_for(command))
            or len(mirror.commands) >= self.host_depth + extra
            or self._is_stored(command.id)
        ):
            return None
        request = codec.encode_request(command.request)
        row = CommandRow(0, command, lane, stream_seq, received_at_ms)

        def do(tx: Transaction) -> None:
            insert_command(tx, command, row, subject, request)

        def apply(_: None) -> None:
            self._mirror.add_command(row)

        def failed() -> None:
            row.withdrawn = True
            if self._mirror.commands.get(row.id) is row:
                self._mirror.drop_command(row.id)

        row.admission = self._writer.submit_soon(do, apply=apply, failed=failed)
        mirror.add_command(row)
        return row

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
        extra = reserved_for(command)

        def do(tx: Transaction) -> Accepted:
            known = tx.execute(
                "SELECT request, stream_seq, reply_to, finished_at_ms, reply "
                "FROM command WHERE id = ?",
                (command.id,),
            ).fetchone()
            if known is not None:
                same = redelivered and known[1:3] == (stream_seq, command.reply_to)
                return self._again(tx, command, stream_seq, request, known, same=same)
            if self._unfinished(tx, str(lane)) >= self.lane_depth + extra:
                return Accepted(Found.LANE_FULL)
            if crowded and self._unfinished(tx, None) >= self.host_depth + extra:
                return Accepted(Found.HOST_FULL)
            row = CommandRow(0, command, lane, stream_seq, received_at_ms)
            insert_command(tx, command, row, subject, request)
            return Accepted(Found.NEW, row)

        def apply(accepted: Accepted) -> None:
            if accepted.row is not None:
                self._mirror.add_command(accepted.row)

        with self._deciding(command.id):
            return await self._writer.submit(do, apply=apply, durable=True)

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
            JournalAdmission._join(tx, command.id, stream_seq, command.reply_to)
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

    @contextmanager
    def _deciding(self, command_id: str) -> Generator[None]:
        self._undecided.add(command_id)
        try:
            yield
        finally:
            self._undecided.discard(command_id)

    def _is_stored(self, command_id: str) -> bool:
        """One look at an index whose pages are in memory: some ten microseconds, on the loop."""
        try:
            found = self._reader.execute("SELECT 1 FROM command WHERE id = ?", (command_id,))
            return found.fetchone() is not None
        except sqlite3.Error:
            return True
