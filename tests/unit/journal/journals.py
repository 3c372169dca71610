"""A journal in a temporary directory, and short ways to fill it."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from handlers.mechanism import Durability, StepIntent
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Command, Event, Reply
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef, Ok, TenantNet
from schemas.subjects import Lane
from tests.fakes.shell_worker import SUBJECTS
from worker.journal.admission import Decision
from worker.journal.journal import Journal

NET = TenantNet(7, "10.240.7.0/24", "10.240.7.1", "br-tenant-7")


@asynccontextmanager
async def opened(path: Path, **more: Any) -> AsyncGenerator[Journal]:
    journal = await Journal.open(str(path / "journal"), subjects=SUBJECTS, boot_id="b1", **more)
    try:
        yield journal
    finally:
        await journal.close()


def record(instance: str = "a1", status: Status = Status.RUNNING, **more: Any) -> InstanceRecord:
    return InstanceRecord(
        ref=InstanceRef("acme", "web", instance), status=status, since_ms=1, **more
    )


def intent(mechanism: str, key: str, *, existed: bool = False) -> StepIntent:
    return StepIntent(mechanism, key, existed, Durability.VOLATILE)


def ok(command_id: str = "c1", **more: Any) -> Reply:
    facts: dict[str, Any] = {"received_at_ms": 1, "finished_at_ms": 2, "attempts": 1} | more
    return Reply(id=command_id, host_id="h1", response=Ok(), code=Code.OK, **facts)


async def accept(
    journal: Journal, given: Command, seq: int = 1, *, redelivered: bool = False
) -> Decision:
    """Take a command in as intake does, and wait until it is on disk."""
    lane = Lane.of_request(given.request)
    decision = await journal.commands.take_in(
        given,
        lane=lane,
        subject=SUBJECTS.command(lane),
        stream_seq=seq,
        received_at_ms=1,
        redelivered=redelivered,
    )
    if decision.row is not None:
        await decision.row.stored()
    return decision


async def finish(journal: Journal, reply: Reply) -> None:
    await journal.commands.finish(reply, codec.encode_reply(reply))


async def events(journal: Journal) -> list[Event]:
    rows = await journal.outbox.pending("event", 10_000)
    return [codec.decode_event(row.payload) for row in rows]
