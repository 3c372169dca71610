"""The quick way in: a command that is surely new may begin while its own commit is under way.

Commits keep the order of submission. So whatever a command writes is on disk only with or after
its acceptance, and one that changes nothing is accepted and answered in a single commit. Effects
on the host wait for the acceptance (`Steps`), and so does the acknowledgement.
"""

import sqlite3

from schemas import codec
from schemas.envelopes import Command
from schemas.subjects import Lane
from worker.journal_file import JournalFile
from worker.journal_mirror import CommandRow
from worker.journal_writer import Transaction

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


class JournalAdmission(JournalFile):
    """Admits what memory and one look at the index of ids prove to be new."""

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
            or mirror.lanes.get(lane, 0) >= self.lane_depth
            or len(mirror.commands) >= self.host_depth
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

    def _is_stored(self, command_id: str) -> bool:
        """One look at an index whose pages are in memory: some ten microseconds, on the loop."""
        try:
            found = self._reader.execute("SELECT 1 FROM command WHERE id = ?", (command_id,))
            return found.fetchone() is not None
        except sqlite3.Error:
            return True
