"""Removes deletion markers from the state bucket, with an administrator's credentials.

A deleted key leaves a marker, some 150 bytes that no server removes: it has to outlast the readers
that were away. A bucket full of them takes no new keys; a mirror of it drops its oldest values.

Source: nats-server's `JSApiMsgGetRequest.next_by_subj` (2.9) and `JSApiStreamPurgeRequest`: a
purge with `filter` and `seq` removes what the subject has before that sequence number, so a value
that came after the marker stays.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from schemas.subjects import Subjects
from worker.bus import api_reply, streams
from worker.bus.message import Message, NoResponder
from worker.bus.protocol import BusError, NotProvisioned
from worker.bus.provision import Requester

MARKERS = ("DEL", "PURGE")
KEEP = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Compacted:
    """How many markers are older than an hour, which are removed, and how many others there are."""

    old: int
    kept: int


async def compact(
    connection: Requester, subjects: Subjects, *, dry_run: bool = False, now: datetime | None = None
) -> Compacted:
    """Remove the markers that are older than an hour, by the clock of this machine.

    Safe beside running workers, repeatable, and on a mirror, too, which keeps its own copies. Reads
    all values of the bucket, one after the other.

    Raises:
        NotProvisioned: there is no bucket, or a marker cannot be removed.
        BusError: no answer; what was removed is, run it again.
    """
    before = (now or datetime.now(UTC)) - KEEP
    stream, every = streams.bucket_stream(subjects), streams.state_subject(subjects, ">")
    old = kept = number = 0
    while True:
        query = {"seq": number + 1, "next_by_subj": every}
        found = await _ask(connection, f"DIRECT.GET.{stream}", query, subjects)
        if found.headers.get("Status") == "404":
            return Compacted(old, kept)
        subject, number = _place(found, number)
        if found.headers.get("KV-Operation") not in MARKERS:
            continue
        if _stored_at(found) >= before or not _is_literal(subject):
            kept += 1
            continue
        old += 1
        if not dry_run:
            await _purge(connection, stream, subject, number, subjects)


def _is_literal(subject: str) -> bool:
    """Whether it names one key as a filter, too: servers take a wildcard in a message's subject."""
    return not {"*", ">"} & {*subject.split(".")}


async def _purge(
    connection: Requester, stream: str, subject: str, number: int, subjects: Subjects
) -> None:
    what = f"reply to STREAM.PURGE.{stream}"
    body = {"filter": subject, "seq": number + 1}
    answer = await _ask(connection, f"STREAM.PURGE.{stream}", body, subjects)
    reply = api_reply.read_reply(answer.data, what)
    if "error" in reply:
        why = reply["error"].get("description")
        raise NotProvisioned(f"cannot remove the deletion marker of {subject}: {why}")


async def _ask(
    connection: Requester, endpoint: str, query: Mapping[str, object], subjects: Subjects
) -> Message:
    try:
        return await connection.request(f"$JS.API.{endpoint}", json.dumps(query).encode())
    except NoResponder as error:
        raise NotProvisioned(
            f"no bucket {subjects.state_bucket}: run `hostd provision` for cell {subjects.cell}"
        ) from error


def _place(found: Message, after: int) -> tuple[str, int]:
    """Subject and sequence number of a message, which is behind the one before."""
    status = found.headers.get("Status")
    subject = found.headers.get("Nats-Subject", "")
    number = api_reply.header_number(found.headers.get("Nats-Sequence", ""))
    if status is not None or not subject or number is None or number <= after:
        raise BusError(
            f"expected a message after {after}, got status {status}: "
            f"{found.headers.get('Description', 'no subject or sequence')}"
        )
    return subject, number


def _stored_at(found: Message) -> datetime:
    """Raises BusError if the message has no time."""
    text = found.headers.get("Nats-Time-Stamp", "")
    try:
        stored_at = datetime.fromisoformat(text)
    except ValueError:
        stored_at = None
    if stored_at is None or stored_at.tzinfo is None:
        raise BusError(f"expected a time as Nats-Time-Stamp, got {text[:40]!r}")
    return stored_at
