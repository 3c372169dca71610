"""What may come in: identity of commands, limits of lanes and host, refusals.

These functions run in the writer's thread, inside the transaction; `commands.py` submits them.
A command's identity is its ID and its request; the rest of the envelope may differ. A refused
message is a finished command: same table, same unique ID, so each ID has one reply in the stream.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Command, Form
from schemas.requests import DestroyInstance, Request, StopInstance
from schemas.subjects import Lane
from worker.journal.memory import CommandRow
from worker.journal.transaction import EventSource, Transaction

# A full lane, or host, takes this many more Stops and Destroys: they are what empties it.
RESERVED: Final = 8

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
    HOST_FULL = "host_full"


@dataclass(frozen=True, slots=True)
class Decision:
    """`row` of a new command; `reply` of a replay, for the `reply_to` of this copy only."""

    verdict: Verdict
    row: CommandRow | None = None
    reply: bytes | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Unfinished commands that a lane and the host take."""

    lane_depth: int
    host_depth: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message that is answered without being run.

    `reply` is what goes out. `reply_to` is set only if hostd may publish there. `request` is the
    identity of one that was decoded (the lane was full); else the bytes are. `dead` is the reason
    if the bytes are kept as a dead letter.
    """

    id: str
    code: Code
    reply: bytes
    received_at_ms: int
    finished_at_ms: int
    form: Form
    lane: Lane
    subject: str
    stream_seq: int
    data: bytes
    reply_to: str | None = None
    request: Request | None = None
    dead: str | None = None


def reserved_for(command: Command) -> int:
    """How far beyond the limits this command is still taken."""
    return RESERVED if isinstance(command.request, StopInstance | DestroyInstance) else 0


def insert(tx: Transaction, row: CommandRow, subject: str, request: bytes) -> None:
    """Write a new command and give its row the place in the order of intake."""
    command = row.command
    values = (
        command.id, str(row.lane), subject, row.stream_seq, command.request.kind, request,
        command.form.value, command.issued_at_ms, command.deadline_ms, command.reply_to,
        command.issuer, command.traceparent, row.received_at_ms,
    )  # fmt: skip
    row.n = tx.execute(INSERT, values).lastrowid or 0


def decide(
    tx: Transaction,
    row: CommandRow,
    subject: str,
    request: bytes,
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
        if stored_request != request:
            return Decision(Verdict.CONFLICT)
        if redelivered and (stream_seq, reply_to) == (row.stream_seq, command.reply_to):
            return Decision(Verdict.JOINED)  # this very message: its reply goes out anyway
        if reply is not None:
            return Decision(Verdict.REPLAY, reply=codec.mark_replayed(reply))
        if command.reply_to is not None:
            join(tx, command.id, row.stream_seq, command.reply_to)
        return Decision(Verdict.JOINED)
    reserved = reserved_for(command)
    if _unfinished(tx, row.lane) >= limits.lane_depth + reserved:
        return Decision(Verdict.LANE_FULL)
    if _unfinished(tx) >= limits.host_depth + reserved:
        return Decision(Verdict.HOST_FULL)
    insert(tx, row, subject, request)
    return Decision(Verdict.NEW, row)


def refuse(tx: Transaction, source: EventSource, refusal: Refusal) -> None:
    """Answer without running; the outcome is final for the ID.

    A known ID is not disturbed: what was sent now is answered on its own `reply_to` only (with
    the stored reply if it is the same message again), and kept as a dead letter.
    """
    digest = hashlib.sha256(refusal.data).digest()
    request = None if refusal.request is None else codec.encode_request(refusal.request)
    identity = (request, None) if request is not None else (None, digest)
    answer, first = refusal.reply, True
    stored = tx.execute(
        "SELECT request, digest, stream_seq, reply FROM command WHERE id = ?", (refusal.id,)
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
        source.queue(tx, "reply", subject, refusal.reply, msg_id=refusal.id)
    if refusal.reply_to is not None:
        source.queue(tx, "direct", refusal.reply_to, answer)
    if refusal.dead is not None:
        source.queue(
            tx,
            "dead",
            source.subjects.dead(refusal.lane),
            refusal.data,
            msg_id=refusal.id if first else f"{refusal.id}:{refusal.stream_seq}",
            headers={"Hostd-Sha256": digest.hex(), "Hostd-Reason": refusal.dead},
        )


def join(tx: Transaction, command_id: str, stream_seq: int, reply_to: str) -> None:
    """Answer a copy of an unfinished command on its own `reply_to` when the command ends."""
    values = (command_id, stream_seq, reply_to)
    tx.execute("INSERT OR IGNORE INTO joiner VALUES (?, ?, ?)", values)


def answer_joiners(tx: Transaction, source: EventSource, command_id: str, reply: bytes) -> None:
    """Queue the reply, marked as replayed, for all copies that joined."""
    joiners = tx.execute(
        "SELECT reply_to FROM joiner WHERE command_id = ? ORDER BY stream_seq", (command_id,)
    ).fetchall()
    if not joiners:
        return
    replayed = codec.mark_replayed(reply)
    for (reply_to,) in joiners:
        source.queue(tx, "direct", reply_to, replayed)
    tx.execute("DELETE FROM joiner WHERE command_id = ?", (command_id,))


def _insert_refused(
    tx: Transaction, refusal: Refusal, identity: tuple[bytes | None, bytes | None]
) -> None:
    values = (
        refusal.id, str(refusal.lane), refusal.subject, refusal.stream_seq,
        "" if refusal.request is None else refusal.request.kind, *identity, refusal.form.value,
        refusal.received_at_ms, refusal.code.value, refusal.reply, refusal.finished_at_ms,
    )  # fmt: skip
    tx.execute(INSERT_REFUSED, values)


def _unfinished(tx: Transaction, lane: Lane | None = None) -> int:
    where = "finished_at_ms IS NULL" + ("" if lane is None else " AND lane = ?")
    row = tx.execute(
        f"SELECT count(*) FROM command WHERE {where}",  # noqa: S608 - constants
        () if lane is None else (str(lane),),
    ).fetchone()
    return int(row[0])
