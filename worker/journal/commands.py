"""Commands in the journal: taken in once per ID, run, and ended with one reply.

A command that is surely new may begin while its own commit is under way (`take_in`). Commits keep
the order of submission, so whatever a command writes is on disk only with or after its admission,
and one that changes nothing is admitted and answered in a single commit. Effects on the host wait
for the admission (`Steps`), and so does the acknowledgement.
"""

import asyncio
import contextlib
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

from handlers.errors import Conflict
from schemas import codec
from schemas.decode_error import DecodeError
from schemas.envelopes import Command, EventKind, Reply
from schemas.records import InstanceRecord, NetworkRecord, Tombstone
from schemas.requests import Error, Request
from schemas.subjects import Lane
from worker.journal import admission, schema
from worker.journal.admission import (
    Decision,
    Limits,
    Refusal,
    Verdict,
    lanes_of_tenant,
    reserved_for,
)
from worker.journal.known_ids import RENEW_AT, KnownIds, read_known
from worker.journal.memory import Admission, CommandRow, Mirror
from worker.journal.records import Change, JournalRecords
from worker.journal.store import Store
from worker.journal.transaction import EventDraft, Transaction

RETENTION: Final = "retention_ms"
RETENTION_MS: Final = 24 * 3_600_000
FINISHED_MAX: Final = 200_000  # finished commands that are kept; then the largest tenant's go early
REFUSED_MAX: Final = 10_000  # of them those that never ran


@dataclass(frozen=True, slots=True)
class CommandState:
    """`state`: waiting, running or done; `reply` of a done one, as it went out.

    `request_digest` says of which request; None of a message that was refused as it came: its reply
    has the digest, if the request could be read.
    """

    state: Literal["waiting", "running", "done"]
    request_digest: str | None
    reply: bytes | None = None


class JournalCommands:
    """Admission, refusals, attempts, outcomes; `limits` are those of unfinished commands."""

    def __init__(
        self,
        store: Store,
        records: JournalRecords,
        limits: Limits,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._store = store
        self._records = records
        self._monotonic_s = monotonic_s
        known_ms = schema.number(store.meta(RETENTION)) or store.now_ms()
        self._retention = known_ms, monotonic_s()  # and as of which monotonic time
        self._spent: set[str] = set()  # IDs that have a row in `retry`
        self._undecided: set[str] = set()  # IDs that are being looked up in the file
        self._awaited: Counter[Lane] = Counter()  # of these lanes, by number
        self._known: KnownIds | None = None  # all that the file has; None: not read yet
        self._new: KnownIds | None = None  # those since the file is being read
        self._queue: Callable[[CommandRow], None] = lambda row: None
        self.kept: tuple[int, int] | None = None  # finished and refused rows, as of the last prune
        store.on_reload(self._reloaded)

    # -- admission -----------------------------------------------------------------------------

    async def take_in(
        self,
        command: Command,
        *,
        lane: Lane,
        subject: str,
        stream_seq: int,
        received_at_ms: int,
        redelivered: bool = False,
    ) -> Decision:
        """Take a command in, or say what is known of its ID.

        A new one may be returned before it is on disk: it can be queued, and is acknowledged
        after `row.stored()`. If its commit fails it is `withdrawn`. A copy of an unfinished
        command joins it and gets the outcome on its own `reply_to`. A redelivered message that
        was taken in before joins without a second answer. Those of a lane are returned in the order
        of the calls: behind one that waits for its commit, none is returned before its own. If the
        commit of one fails, so does each that was called before the failure could be known.
        """
        request = codec.encode_request(command.request)
        row = CommandRow(0, command, request, lane, stream_seq, received_at_ms)
        has_room = self.limit_reached(command.request, lane) is None
        is_behind = self._awaited[lane] > 0
        if not redelivered and has_room and not is_behind and self._is_new(command.id):
            self._admit(row, subject)
            return Decision(Verdict.NEW, row)

        def do(tx: Transaction) -> Decision:
            return admission.decide(tx, row, subject, self.limits, redelivered=redelivered)

        def apply(decision: Decision) -> None:
            if decision.row is not None and row.id not in self._store.mirror.commands:
                self._store.mirror.add_command(decision.row)

        self._awaited[lane] += 1
        try:
            with self._deciding(command.id):
                decision = await self._store.writer.submit(
                    do, apply=apply, durable=True, in_order=True
                )
        finally:
            self._awaited -= Counter((lane,))
        if decision.row is not None and self._store.mirror.commands.get(row.id) is not decision.row:
            return Decision(Verdict.JOINED)  # read from the file after a fault, and queued
        return decision

    def _admit(self, row: CommandRow, subject: str) -> None:
        self._note_id(row.id)

        def do(tx: Transaction) -> None:
            admission.insert(tx, row, subject)

        admitted = row.admission = Admission()

        def apply(_: None) -> None:
            self._store.mirror.add_command(row)
            admitted.decide()

        def failed(error: BaseException) -> None:
            row.withdrawn = True
            if self._store.mirror.commands.get(row.id) is row:
                self._store.mirror.drop_command(row.id)
            admitted.decide(error)

        self._store.writer.submit_soon(do, apply=apply, failed=failed)
        self._store.mirror.add_command(row)

    def _is_new(self, command_id: str) -> bool:
        return (
            self._store.writable
            and command_id not in self._store.mirror.commands
            and command_id not in self._undecided
            and not self._is_stored(command_id)
        )

    def limit_reached(self, request: Request, lane: Lane) -> Verdict | None:
        """The limit that one more such command would exceed."""
        mirror = self._store.mirror
        return self.limits.full(
            mirror.lanes.get(lane, 0),
            mirror.tenants.get(lane.tenant_id, 0),
            len(mirror.commands),
            reserved=reserved_for(request),
        )

    def _is_stored(self, command_id: str) -> bool:
        """If that is not ruled out, one read of an index whose pages are in memory, on the loop."""
        if self._known is not None and not self._known.may_have(command_id):
            return False
        try:
            found = self._store.reader.execute("SELECT 1 FROM command WHERE id = ?", (command_id,))
            return found.fetchone() is not None
        except sqlite3.Error:
            return True

    async def refuse(self, refusal: Refusal) -> None:
        """Answer a message without running it, durably; the outcome is final for its ID."""
        with self._deciding(refusal.key):
            await self._store.writer.submit(
                lambda tx: admission.refuse(tx, self._store.source, refusal), durable=True
            )

    @contextmanager
    def _deciding(self, command_id: str) -> Generator[None]:
        self._undecided.add(command_id)
        self._note_id(command_id)
        try:
            yield
        finally:
            self._undecided.discard(command_id)

    def _note_id(self, command_id: str) -> None:
        """Before the file may have it."""
        for known in (self._known, self._new):
            if known is not None:
                known.add(command_id)

    async def read_ids(self) -> None:
        """Read which IDs the file has, at the start and once too many of the known are pruned.

        Raises:
            JournalFault: the file cannot be read now.
        """
        if self._new is not None or (self._known is not None and self._known.count < RENEW_AT):
            return
        new = self._new = KnownIds()
        try:
            for command_id in (*self._store.mirror.commands, *self._undecided):
                new.add(command_id)  # may be committed after the file was read
            known = await self._store.questions.run(read_known)
            known.merge(new)
            self._known = known
        finally:
            self._new = None

    # -- running -------------------------------------------------------------------------------

    def resume(self, queue: Callable[[CommandRow], None]) -> None:
        """Call `queue` with each command that `take_in` does not return as new.

        Those that the file has now, in the order of intake; later those whose commit failed as
        far as the writer could tell, and that are in the file all the same.
        """
        self._queue = queue
        for row in self.unfinished():
            queue(row)

    def unfinished(self) -> Sequence[CommandRow]:
        """All commands without an outcome, in the order of intake."""
        return sorted(self._store.mirror.commands.values(), key=lambda row: row.n)

    def count(self) -> int:
        """How many commands have no outcome."""
        return len(self._store.mirror.commands)

    def fullest(self) -> tuple[int, int]:
        """How many unfinished commands the lane and the tenant have that have most."""
        mirror = self._store.mirror
        tenants = (count for tenant, count in mirror.tenants.items() if tenant is not None)
        return max(mirror.lanes.values(), default=0), max(tenants, default=0)

    def is_unfinished(self, command_id: str) -> bool:
        return command_id in self._store.mirror.commands

    def lanes(self) -> dict[Lane, int]:
        """Unfinished commands per lane that has any."""
        return dict(self._store.mirror.lanes)

    def begin_attempt(self, command_id: str) -> int:
        """Count one more attempt, from 1 over all workers.

        On disk with, and not after, the first step of the attempt: the order of submission is
        the order of commits.
        """
        row = self._store.mirror.commands[command_id]
        row.attempts += 1
        values = (row.attempts, command_id)

        def do(tx: Transaction) -> None:
            tx.execute("UPDATE command SET attempts = ? WHERE id = ?", values)

        self._store.writer.later(do)
        return row.attempts

    def spend(self, command_id: str, seconds: float) -> None:
        """So much of its retry budget the command has spent in all; on disk as `later`."""
        values = (command_id, int(seconds * 1000))

        def do(tx: Transaction) -> None:
            tx.execute("INSERT OR REPLACE INTO retry VALUES (?, ?)", values)

        self._spent.add(command_id)
        self._store.writer.later(do)

    async def finish(
        self,
        reply: Reply,
        data: bytes,
        *,
        record: InstanceRecord | None = None,
        tombstone: Tombstone | None = None,
        network: NetworkRecord | None = None,
    ) -> None:
        """The outcome with its replies and event, durably, in one transaction. Once only.

        `data` is the encoded reply. The instance's `record` is saved with it; with a `tombstone`
        it is deleted instead. A `network` is saved too, or deleted if it is absent. The command's
        step rows are deleted, except those that `reply.left_behind` names.

        Raises:
            Conflict: another record has the net id, uid slot or offset; nothing was committed.
        """
        mirror, source = self._store.mirror, self._store.source
        row = mirror.commands.get(reply.id)
        if row is None:
            return
        command = row.command
        change = self._change(record, tombstone, network, reply.id)
        ended = _command_event(row, reply)
        steps = mirror.steps.get(reply.id, {})
        points = mirror.points.get(reply.id)
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
            if command.reply_to is not None:  # first: a client waits for it
                source.queue(tx, "direct", command.reply_to, data)
            admission.answer_joiners(tx, source, reply.id, data)
            source.queue(tx, "reply", source.subjects.reply(row.lane), data, msg_id=reply.id)
            if reply.attempts > 1 or reply.id in self._spent:
                tx.execute("DELETE FROM retry WHERE command_id = ?", (reply.id,))
            if points:
                tx.execute("DELETE FROM point WHERE command_id = ?", (reply.id,))
            if gone:
                tx.connection.executemany(
                    "DELETE FROM step WHERE command_id = ? AND mechanism = ? AND key = ?", gone
                )
            if change is not None:
                change.save(tx)
            source.event(tx, ended, reply.finished_at_ms)

        def apply(_: None) -> None:
            if change is not None:
                change.remember()
            self._spent.discard(reply.id)
            mirror = self._store.mirror
            mirror.drop_command(reply.id)
            mirror.points.pop(reply.id, None)
            mirror.steps.pop(reply.id, None)
            if kept:
                mirror.steps[reply.id] = kept

        with self._refused(network):
            await self._store.writer.submit(do, apply=apply, durable=True)

    @contextmanager
    def _refused(self, network: NetworkRecord | None) -> Generator[None]:
        """Turns the refusal of a commit, for a row that another record's row excludes."""
        try:
            yield
        except sqlite3.IntegrityError as error:
            if network is not None:
                self._records.unexpect_network(network.tenant_id)
            raise Conflict(
                f"cannot record the outcome: {error}; a row of the journal, perhaps one that this "
                "version cannot read, has what this one needs"
            ) from error

    def _change(
        self,
        record: InstanceRecord | None,
        tombstone: Tombstone | None,
        network: NetworkRecord | None,
        command_id: str,
    ) -> Change | None:
        """What a command's outcome does to the record of its instance or network."""
        if network is not None:
            return self._records.change_network(network)
        if record is None:
            return None
        if tombstone is not None:
            return self._records.change_drop(
                record.ref, tombstone, command_id=command_id, metering=record.metering
            )
        return self._records.change_put(record, command_id=command_id)

    def _reloaded(self, mirror: Mirror) -> None:
        known = self._store.mirror.commands
        found = [row for command_id, row in mirror.commands.items() if command_id not in known]
        for row in sorted(found, key=lambda row: row.n):
            asyncio.get_running_loop().call_soon(self._queue, row)  # once `mirror` is in use
        for command_id, row in known.items():
            if command_id in mirror.commands:
                mirror.commands[command_id] = row  # lanes have this object; it counts attempts
            elif row.admission is not None and not row.admission.decided:
                mirror.add_command(row)

    # -- results -------------------------------------------------------------------------------

    async def result(self, command_id: str) -> CommandState | None:
        """The state of a command, or None for an ID that is unknown or was pruned."""
        row = self._store.mirror.commands.get(command_id)
        if row is not None:
            digest = codec.digest_of(row.request)
            return CommandState("running" if row.attempts else "waiting", digest)
        stored = await self._store.questions.first(
            "SELECT request, reply FROM command WHERE id = ?", (command_id,)
        )
        if stored is None:
            return None
        request, reply = stored
        return CommandState("done", admission.stored_digest(request), reply)

    def _retention_ms(self) -> int:
        """The time by which IDs are forgotten: the wall clock, but never in a jump.

        It advances at most twice as fast as the monotonic clock, from where the last worker left
        it: a wall clock that is days ahead forgets nothing early, and the time in which no worker
        ran is caught up.
        """
        last_ms, at_s = self._retention
        now_s = self._monotonic_s()
        now_ms = min(self._store.now_ms(), last_ms + int(2000 * (now_s - at_s)))
        self._retention = now_ms, now_s
        return now_ms

    async def prune(
        self,
        *,
        keep_ms: int = RETENTION_MS,
        limit: int = 500,
        finished_max: int = FINISHED_MAX,
        refused_max: int = REFUSED_MAX,
    ) -> int:
        """Delete up to `limit` commands that ended `keep_ms` ago or earlier; returns how many.

        Earlier go the oldest of those that never ran beyond `refused_max`, and beyond
        `finished_max` the oldest of the tenant that has most.
        """
        now_ms = self._retention_ms()
        before_ms = now_ms - keep_ms

        def do(tx: Transaction) -> int:
            schema.write_meta(tx.connection, RETENTION, str(now_ms))
            old = tx.execute(
                "DELETE FROM command WHERE n IN (SELECT n FROM command "
                "WHERE finished_at_ms <= ? ORDER BY finished_at_ms LIMIT ?)",
                (before_ms, limit),
            ).rowcount
            pruned = (
                old
                + _prune_refused(tx, refused_max, limit)
                + _prune_largest(tx, finished_max, limit)
            )
            self.kept = _count_kept(tx)
            return pruned

        return await self._store.writer.submit(do)


def _count_kept(tx: Transaction) -> tuple[int, int]:
    """Finished commands, and those of them that never ran; each by an index alone."""
    finished = "SELECT count(*) FROM command WHERE finished_at_ms IS NOT NULL"
    (all_of_them,) = tx.execute(finished).fetchone()
    (never_ran,) = tx.execute(f"{finished} AND attempts = 0").fetchone()
    return all_of_them, never_ran


def _prune_refused(tx: Transaction, keep: int, limit: int) -> int:
    return tx.execute(
        "DELETE FROM command WHERE n IN (SELECT n FROM command WHERE attempts = 0 AND "
        "finished_at_ms IS NOT NULL ORDER BY n DESC LIMIT ? OFFSET ?)",
        (limit, keep),
    ).rowcount


def _prune_largest(tx: Transaction, keep: int, limit: int) -> int:
    """So that one tenant's commands do not shorten how long another's are known."""
    finished = "FROM command WHERE finished_at_ms IS NOT NULL"
    (count,) = tx.execute(f"SELECT count(*) {finished}").fetchone()
    if count <= keep:
        return 0
    tenants: Counter[str | None] = Counter()
    for lane, rows in tx.execute(f"SELECT lane, count(*) {finished} GROUP BY lane"):
        with contextlib.suppress(DecodeError, TypeError, AttributeError):  # a damaged row
            tenants[Lane.parse(lane).tenant_id] += rows
    if not tenants:
        return 0
    (largest, _), *_ = tenants.most_common(1)
    where, *values = lanes_of_tenant(largest) if largest is not None else ("lane = ?", "host")
    return tx.execute(
        f"DELETE FROM command WHERE n IN (SELECT n {finished} AND {where} "  # noqa: S608 - constants
        "ORDER BY finished_at_ms LIMIT ?)",
        (*values, min(limit, count - keep)),
    ).rowcount


def _command_event(row: CommandRow, reply: Reply) -> EventDraft:
    """The event of an outcome; of a failure with its message and the tail of the VMM's log."""
    detail: dict[str, object] = {
        "type": row.command.request.kind,
        "code": reply.code.value,
        "changed": reply.changed,
        "attempts": reply.attempts,
    }
    if isinstance(reply.response, Error):
        detail["message"] = reply.response.message
        if vmm_log := reply.detail.get("vmm_log"):
            detail["vmm_log"] = str(vmm_log)
    return EventDraft(EventKind.COMMAND, row.lane, command_id=reply.id, detail=detail)
