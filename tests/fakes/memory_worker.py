"""Real journal, lanes, dispatch and handlers over a host in memory: commands in, replies out."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from handlers.interfaces import Host
from handlers.mechanism import Removable
from handlers.registry import HANDLERS, mechanisms
from handlers.steps import Failpoint, no_failpoint
from schemas import codec
from schemas.envelopes import Reply
from schemas.records import InstanceRecord
from schemas.requests import Request
from schemas.settings import LimitSettings, Settings, SweepSettings, VmmSettings
from schemas.subjects import Lane
from tests.constants import REF
from tests.fakes.host import FakeHost
from tests.fakes.shell_worker import SUBJECTS, NoMeters, command
from tests.plain import unpacked
from tests.protocol.validators import faults
from worker.control.draining import DrainSwitch
from worker.dispatch import Dispatch, LaunchGate, OpenGate
from worker.journal.journal import Journal
from worker.lanes import Lanes
from worker.queries.explain import Explain
from worker.reconcile.vmm_watch import NotifyingRunner
from worker.tracing.tracing import Tracing

EVENTS_MAX = 10_000
INBOX_PREFIXES = ("_INBOX.",)


@dataclass
class MemoryWorker:
    """One worker from start to kill, on a host that outlives it."""

    machine: FakeHost
    journal: Journal
    host: Host
    lanes: Lanes
    mechanisms: Mapping[str, Removable]
    runner: NotifyingRunner
    drain: DrainSwitch
    explain: Explain
    tracing: Tracing
    seq: int = 0
    ids: list[str] = field(default_factory=list[str])
    closers: list[Callable[[], Awaitable[None]]] = field(
        default_factory=list[Callable[[], Awaitable[None]]]
    )

    async def send(self, request: Request, command_id: str | None = None, **more: object) -> str:
        """Take a command in as intake does; returns its ID."""
        self.seq += 1
        command_id = command_id or f"{request.kind}-{uuid.uuid4().hex[:12]}"
        decision = await self.journal.commands.take_in(
            command(request, command_id, **more),
            lane=Lane.of_request(request),
            subject=SUBJECTS.command(Lane.of_request(request)),
            stream_seq=self.seq,
            received_at_ms=1,
        )
        if decision.row is not None:
            self.lanes.put(decision.row)
            await decision.row.stored()
        return command_id

    async def outcome(self, command_id: str) -> bytes:
        """The reply as it is sent, once the lane has finished the command."""
        async with asyncio.timeout(20):
            await self.lanes.idle()
            found = await self.journal.commands.result(command_id)
        assert found is not None
        assert found.reply is not None, f"{command_id} is {found.state}"
        return found.reply

    async def reply(self, command_id: str) -> Reply:
        """The outcome, held against its schema."""
        reply = await self.outcome(command_id)
        assert faults("reply", unpacked(reply)) == []
        return codec.decode_reply(reply)

    async def run(self, request: Request, command_id: str | None = None, **more: object) -> Reply:
        return await self.reply(await self.send(request, command_id, **more))

    def record(self) -> InstanceRecord:
        found = self.journal.records.instance(REF)
        assert found is not None
        return found

    async def kill(self) -> None:
        """As kill -9: a running command is cut off, nothing is undone or answered."""
        await self.lanes.stop(0)
        for close in self.closers:
            await close()
        for event in await self.journal.outbox.pending("event", EVENTS_MAX):
            assert faults("event", unpacked(event.payload)) == []
        await self.journal.close()


@contextlib.asynccontextmanager
async def memory_worker(
    path: Path,
    machine: FakeHost,
    *,
    failpoint: Failpoint = no_failpoint,
    gate: Callable[[Journal], LaunchGate] = lambda journal: OpenGate(),
    limits: LimitSettings = LimitSettings(retry_budget_s=0.0),  # noqa: B008 (frozen)
    vmm: VmmSettings = VmmSettings(),  # noqa: B008 (frozen)
    sweep: SweepSettings = SweepSettings(),  # noqa: B008 (frozen)
    tracing: Tracing = Tracing(""),  # noqa: B008 (without spans it has no state)
) -> AsyncGenerator[MemoryWorker]:
    """A worker on the journal at `path`, with recovery of what is in it."""
    settings = Settings(limits=limits, vmm=vmm, sweep=sweep)
    journal = await Journal.open(str(path), subjects=SUBJECTS, boot_id="b1")
    host = machine.host(journal.records, settings)
    known = mechanisms(host)
    drain = DrainSwitch(journal)
    dispatch = Dispatch(
        journal,
        HANDLERS,
        host,
        known,
        meters=NoMeters(),
        refuse=drain.refusal,
        gate=gate(journal),
        failpoint=failpoint,
        tracing=tracing,
    )
    runner = NotifyingRunner(dispatch)
    lanes = Lanes(runner)
    journal.quarantine.know(frozenset(known))
    await journal.quarantine.answer(INBOX_PREFIXES)
    for row in journal.commands.unfinished():
        lanes.put(row)
    lanes.start()
    explain = Explain(host, journal, lanes, dispatch, lambda: True)
    made = MemoryWorker(machine, journal, host, lanes, known, runner, drain, explain, tracing)
    try:
        yield made
    finally:
        await made.kill()
