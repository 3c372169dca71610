"""What is answered without being run: one reply per id in the stream all the same."""

import hashlib
from dataclasses import dataclass

from schemas import codec
from schemas.envelopes import Form, Reply
from schemas.requests import Request
from schemas.subjects import Lane
from worker.journal.admission import JournalAdmission
from worker.journal.transaction import Transaction


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


class JournalRefusals(JournalAdmission):
    """A refused message is a finished command: same table, same unique id."""

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
