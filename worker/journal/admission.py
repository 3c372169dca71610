"""What may come in: identity of commands, limits of lanes and host, refusals.

These functions run in the writer's thread, inside the transaction; `commands.py` submits them.
A command's identity is its ID and its request; the rest of the envelope may differ. A refused
message is a finished command: same table, same unique ID, so each ID has one reply in the stream.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from handlers.errors import Exhausted
from schemas import codec
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.envelopes import Command, Form
from schemas.requests import DestroyInstance, Request, StopInstance
from schemas.subjects import Lane
from schemas.trace_context import TraceContext
from worker.journal.memory import CommandRow
from worker.journal.transaction import EventSource, Transaction, is_text

# A full lane, or host, takes this many more Stops and Destroys: they are what empties it.
RESERVED: Final = 8
# Copies of one unfinished command that are answered when it ends; further ones are refused.
JOINERS_MAX: Final = 32
# A tenant with fewer unfinished commands than this part of `host_depth` has room on a full host.
TENANT_PARTS: Final = 256

INSERT = (
    "INSERT INTO command (id, lane, subject, stream_seq, kind, request, form, issued_at_ms, "
    "deadline_ms, reply_to, issuer, traceparent, received_at_ms) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
INSERT_REFUSED = (
    "INSERT INTO command (id, lane, subject, stream_seq, kind, request, digest, form, "
    "received_at_ms, code, reply, finished_at_ms) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


class Verdict(StrEnum):
    """What the journal decided about a command; `joined`: a copy of one that is unfinished."""

    NEW = "new"
    JOINED = "joined"
    REPLAY = "replay"
    CONFLICT = "conflict"
    LANE_FULL = "lane_full"
    TENANT_FULL = "tenant_full"
    HOST_FULL = "host_full"
    JOINERS_FULL = "joiners_full"


@dataclass(frozen=True, slots=True)
class Decision:
    """`row` of a new command; `reply` of a replay, for the `reply_to` of this copy only."""

    verdict: Verdict
    row: CommandRow | None = None
    reply: bytes | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Unfinished commands that a lane, a tenant and the host take.

    The host's limit leaves every tenant a few places, so that no set of tenants locks out another;
    it is absolute at twice its value, whatever the number of tenants.
    """

    lane_depth: int
    tenant_depth: int
    host_depth: int

    def full(self, lane: int, tenant: int, host: int, *, reserved: int) -> Verdict | None:
        """Which limit one more command would exceed, given the numbers of unfinished ones."""
        if lane >= self.lane_depth + reserved:
            return Verdict.LANE_FULL
        if tenant >= self.tenant_depth + reserved:
            return Verdict.TENANT_FULL
        own = max(1, self.host_depth // TENANT_PARTS)
        if host >= self.host_depth + reserved and (tenant >= own or host >= 2 * self.host_depth):
            return Verdict.HOST_FULL
        return None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message that is answered without being run.

    `reply` goes to the reply stream, `direct` to `reply_to`, which is set only if hostd may publish
    there. `request` is the identity of one that was decoded (a limit was reached); else the bytes
    are. Unless it `owns_id`, the ID was read from something that is no valid envelope and may be
    another's: then the row has one that no command can have. `dead` is the reason if the bytes are
    kept as a dead letter, with `trace` in its headers.
    """

    id: str
    code: Code
    reply: bytes
    direct: bytes
    received_at_ms: int
    finished_at_ms: int
    form: Form
    lane: Lane
    subject: str
    stream_seq: int
    data: bytes
    reply_to: str | None = None
    request: Request | None = None
    owns_id: bool = True
    dead: str | None = None
    trace: TraceContext | None = None

    @property
    def key(self) -> str:
        """The ID of its row, and the `Nats-Msg-Id` of what is published about it."""
        return self.id if self.owns_id else refused_id(self.stream_seq, self.data)


def refused_id(stream_seq: int, data: bytes) -> str:
    """The ID of a message that is no valid envelope. `:` is in no command's ID."""
    return f"seq:{stream_seq}:{hashlib.sha256(data).hexdigest()[:12]}"


def stored_digest(request: object) -> str | None:
    """`request_digest` of what the column `request` has, which is compared byte by byte; None if
    there is no request, or one that this version cannot read."""
    if not isinstance(request, bytes):
        return None
    try:
        codec.decode_request(request)
    except DecodeError:
        return None
    return codec.digest_of(request)


def reserved_for(request: Request) -> int:
    """How far beyond the limits this command is still taken."""
    return RESERVED if isinstance(request, StopInstance | DestroyInstance) else 0


def too_many(verdict: Verdict, lane: Lane, limits: Limits) -> Exhausted:
    """What a command is told that would exceed a limit."""
    what, limit = {
        Verdict.LANE_FULL: (f"lane {lane}", limits.lane_depth),
        Verdict.TENANT_FULL: (f"tenant {lane.tenant_id}", limits.tenant_depth),
    }.get(verdict, ("this host", limits.host_depth))
    return Exhausted(
        f"{what} has {limit} unfinished commands, its limit; retry later with a new id"
    )


def joined_trace(command: Command) -> str | None:
    """Both texts of the trace context in one column: a space is in no `traceparent`."""
    parent, state = command.traceparent, command.tracestate
    return f"{parent} {state}" if parent and state else parent


def insert(tx: Transaction, row: CommandRow, subject: str) -> None:
    """Write a new command and give its row the place in the order of intake."""
    command = row.command
    values = (
        command.id, str(row.lane), subject, row.stream_seq, command.request.kind, row.request,
        command.form.value, command.issued_at_ms, command.deadline_ms, command.reply_to,
        command.issuer, joined_trace(command), row.received_at_ms,
    )  # fmt: skip
    row.n = tx.execute(INSERT, values).lastrowid or 0


def decide(
    tx: Transaction,
    row: CommandRow,
    subject: str,
    limits: Limits,
    *,
    redelivered: bool,
) -> Decision:
    """Insert the command, or say what is known of its ID or which limit it would exceed."""
    command = row.command
    stored = tx.execute(
        "SELECT request, stream_seq, reply_to, reply FROM command WHERE id = ?", (command.id,)
    ).fetchone()
    if stored is not None:
        stored_request, stream_seq, reply_to, reply = stored
        if stored_request != row.request:
            return Decision(Verdict.CONFLICT)
        if redelivered and (stream_seq, reply_to) == (row.stream_seq, command.reply_to):
            return Decision(Verdict.JOINED)  # this very message: its reply goes out anyway
        if reply is not None:
            return Decision(Verdict.REPLAY, reply=codec.mark_replayed(reply))
        if command.reply_to is not None and not join(
            tx, command.id, row.stream_seq, command.reply_to
        ):
            return Decision(Verdict.JOINERS_FULL)
        return Decision(Verdict.JOINED)
    full = limits.full(
        _unfinished(tx, "lane = ?", str(row.lane)),
        _unfinished(tx, *lanes_of_tenant(row.lane.tenant_id)),
        _unfinished(tx, "1"),
        reserved=reserved_for(command.request),
    )
    if full is not None:
        return Decision(full)
    insert(tx, row, subject)
    return Decision(Verdict.NEW, row)


def refuse(tx: Transaction, source: EventSource, refusal: Refusal) -> None:
    """Answer without running; the outcome is final for the ID.

    A known ID is not disturbed: what was sent now is answered on its own `reply_to` only (with
    the stored reply if it is the same message again), and kept as a dead letter.
    """
    digest = hashlib.sha256(refusal.data).digest()
    request = None if refusal.request is None else codec.encode_request(refusal.request)
    identity = (request, None) if request is not None else (None, digest)
    answer, first = refusal.direct, True
    stored = tx.execute(
        "SELECT request, digest, stream_seq, reply FROM command WHERE id = ?", (refusal.key,)
    ).fetchone()
    if stored is not None:
        first = False
        if stored[:2] == identity and stored[3] is None:
            if refusal.reply_to is not None:  # meanwhile a copy of it found room
                join(tx, refusal.id, refusal.stream_seq, refusal.reply_to)
            return
        if stored[:2] == identity:
            if stored[2] == refusal.stream_seq:
                return  # this very message, delivered again
            answer = codec.mark_replayed(stored[3])
    else:
        _insert_refused(tx, refusal, identity)
        subject = source.subjects.reply(refusal.lane)
        source.queue(tx, "reply", subject, refusal.reply, msg_id=refusal.key)
    if refusal.reply_to is not None:
        source.queue(tx, "direct", refusal.reply_to, answer)
    if refusal.dead is not None:
        source.queue(
            tx,
            "dead",
            source.subjects.dead(refusal.lane),
            refusal.data,
            msg_id=refusal.key if first else f"{refusal.key}:{refusal.stream_seq}",
            headers={
                "Hostd-Sha256": digest.hex(),
                "Hostd-Reason": refusal.dead,
                **(refusal.trace.headers if refusal.trace is not None else {}),
            },
        )


def join(tx: Transaction, command_id: str, stream_seq: int, reply_to: str) -> bool:
    """Answer a copy of an unfinished command on its own `reply_to` when the command ends.

    False if `JOINERS_MAX` others wait for that already.
    """
    values = (command_id, stream_seq, reply_to)
    tx.execute(
        "INSERT OR IGNORE INTO joiner SELECT ?, ?, ? WHERE "
        "(SELECT count(*) FROM joiner WHERE command_id = ?) < ?",
        (*values, command_id, JOINERS_MAX),
    )
    joined = tx.execute(
        "SELECT 1 FROM joiner WHERE command_id = ? AND stream_seq = ?", (command_id, stream_seq)
    )
    return joined.fetchone() is not None


def answer_joiners(tx: Transaction, source: EventSource, command_id: str, reply: bytes) -> None:
    """Queue the reply, marked as replayed, for all copies that joined."""
    joiners = tx.execute(
        "SELECT reply_to FROM joiner WHERE command_id = ? ORDER BY stream_seq", (command_id,)
    ).fetchall()
    if not joiners:
        return
    replayed = codec.mark_replayed(reply)
    for (reply_to,) in joiners:
        if not is_text(reply_to):
            continue  # quarantined: nobody can be reached by it
        source.queue(tx, "direct", reply_to, replayed)
    tx.execute("DELETE FROM joiner WHERE command_id = ?", (command_id,))


def _insert_refused(
    tx: Transaction, refusal: Refusal, identity: tuple[bytes | None, bytes | None]
) -> None:
    values = (
        refusal.key, str(refusal.lane), refusal.subject, refusal.stream_seq,
        "" if refusal.request is None else refusal.request.kind, *identity, refusal.form.value,
        refusal.received_at_ms, refusal.code.value, refusal.reply, refusal.finished_at_ms,
    )  # fmt: skip
    tx.execute(INSERT_REFUSED, values)


def lanes_of_tenant(tenant_id: str | None) -> tuple[str, str, str, str]:
    """A condition on `lane` and its parameters: `/` follows `.`, and no ID has either."""
    where = "(lane = ? OR lane > ? AND lane < ?)"
    return where, f"network.{tenant_id}", f"instance.{tenant_id}.", f"instance.{tenant_id}/"


def _unfinished(tx: Transaction, where: str, *values: str) -> int:
    row = tx.execute(
        f"SELECT count(*) FROM command WHERE finished_at_ms IS NULL AND {where}",  # noqa: S608
        values,
    ).fetchone()
    return int(row[0])
