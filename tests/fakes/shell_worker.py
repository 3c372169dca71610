"""A worker without a host: real journal, intake, lanes, dispatch and outbox, a fake bus.

Its handlers change a set; tests make them fail or wait, and read how often they ran.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

from handlers.clock import now_ms
from handlers.interfaces import Host
from handlers.mechanism import Durability, Removable
from handlers.registry import Handler
from handlers.steps import Done, Steps
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Command, Event, Reply
from schemas.requests import (
    DestroyInstance,
    InstanceRef,
    Request,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)
from schemas.settings import LimitSettings, Settings
from schemas.subjects import Lane, Subjects
from tests.fakes.bus import FakeBus
from tests.fakes.clock import FakeClock
from worker.dispatch import Dispatch
from worker.intake import Intake
from worker.journal.journal import Journal
from worker.lanes import Lanes
from worker.outbox import Outbox
from worker.tracing.tracing import Tracing

SUBJECTS = Subjects("hostd.v1.test", "h1", "test")
REF = InstanceRef("acme", "web", "a1")


def start(instance: str = "a1") -> StartInstance:
    return StartInstance("acme", "web", instance)


def stop(instance: str = "a1") -> StopInstance:
    return StopInstance("acme", "web", instance)


def command(request: Request, command_id: str = "c1", **more: Any) -> Command:
    return Command(id=command_id, request=request, **more)


@dataclass
class NoMeters:
    """Counts in lists, exports nothing."""

    done: list[tuple[str, Code]] = field(default_factory=list[tuple[str, Code]])
    retries: list[Code] = field(default_factory=list[Code])
    retried: asyncio.Event = field(default_factory=asyncio.Event)
    snapshots: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    redeliveries: int = 0
    ignored_keys: int = 0
    ignored_traces: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def command_done(self, kind: str, code: Code, seconds: float) -> None:
        self.done.append((kind, code))

    def step(self, name: str, seconds: float) -> None: ...

    def retry(self, kind: str, code: Code) -> None:
        self.retries.append(code)
        self.retried.set()

    def snapshot(self, seconds: float, size_bytes: int) -> None:
        self.snapshots.append((seconds, size_bytes))

    def redelivered(self) -> None:
        self.redeliveries += 1

    def keys_ignored(self, count: int) -> None:
        self.ignored_keys += count

    def trace_ignored(self, place: str, field: str) -> None:
        self.ignored_traces.append((place, field))


@dataclass(frozen=True)
class Thing:
    key: str


@dataclass
class Things:
    """A mechanism whose resources are names in a set."""

    name: ClassVar[str] = "thing"
    durability: ClassVar[Durability] = Durability.DURABLE
    swept: ClassVar[bool] = True
    there: set[str] = field(default_factory=set[str])
    made: list[str] = field(default_factory=list[str])
    stuck: bool = False

    async def exists(self, key: str) -> bool:
        return key in self.there

    async def ensure(self, spec: Thing) -> str:
        if spec.key not in self.there:
            self.there.add(spec.key)
            self.made.append(spec.key)
        return spec.key

    async def remove(self, key: str) -> None:
        if self.stuck:
            raise OSError(5, "Input/output error")
        self.there.discard(key)


Behave = Callable[[Request, Steps], Any]


@dataclass
class FakeHandlers:
    """What the handlers do. With `gate`, a Start waits in its step until it is set."""

    things: Things = field(default_factory=Things)
    runs: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    behave: Behave | None = None
    gate: asyncio.Event | None = None
    at_gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: Any, steps: Steps, host: Host) -> Done:
        self.runs.append((steps.command_id, request.kind))
        if self.behave is not None:
            value = self.behave(request, steps)
            if asyncio.iscoroutine(value):
                value = await value
            if isinstance(value, Done):
                return value
        key = str(request.ref)
        if isinstance(request, StartInstance | WakeInstance | SleepInstance):
            changed = key not in self.things.there
            await steps.ensure(self.things, Thing(key))
            if self.gate is not None:
                gate = self.gate
                self.at_gate.set()
                await steps.interruptible("gate", gate.wait)
            return Done(changed=changed, status="running", detail={})
        steps.finalize()
        changed = key in self.things.there
        await steps.remove(self.things, key)
        return Done(changed=changed, status="stopped", detail={})

    def handlers(self) -> Mapping[type, Handler]:
        kinds = (StartInstance, StopInstance, SleepInstance, WakeInstance, DestroyInstance)
        return dict.fromkeys(kinds, self.handle)


@dataclass
class ShellWorker:
    """One worker from start to kill."""

    bus: FakeBus
    machine: FakeHandlers
    journal: Journal
    lanes: Lanes
    dispatch: Dispatch
    intake: Intake
    outbox: Outbox
    meters: NoMeters
    tasks: list[asyncio.Task[None]]

    def send(
        self, request: Request, command_id: str = "c1", *, msg_id: bool = False, **more: Any
    ) -> None:
        """Publish a command as agentd would."""
        data = codec.encode_command(command(request, command_id, **more))
        subject = SUBJECTS.command(Lane.of_request(request))
        self.bus.command(subject, data, command_id if msg_id else None)

    def replies(self) -> list[Reply]:
        return [codec.decode_reply(p.payload) for p in self.bus.replies()]

    def events(self) -> list[Event]:
        return [codec.decode_event(p.payload) for p in self.bus.events()]

    async def reply(self, command_id: str = "c1") -> Reply:
        """The reply of a command, once the stream has it."""
        async with asyncio.timeout(20):
            while True:
                for reply in self.replies():
                    if reply.id == command_id:
                        return reply
                self.bus.changed.clear()
                await self.bus.changed.wait()

    async def kill(self) -> None:
        """As kill -9: nothing is finished, answered or closed in order."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.lanes.stop(0)
        await self.journal.close()


@contextlib.asynccontextmanager
async def shell_worker(
    path: Path,
    bus: FakeBus | None = None,
    machine: FakeHandlers | None = None,
    *,
    limits: LimitSettings = LimitSettings(retry_budget_s=2.0),  # noqa: B008 (frozen)
    consume: bool = True,
    send: bool = True,
    run: bool = True,
    clock: FakeClock | None = None,
    tracing: Tracing | None = None,
) -> AsyncGenerator[ShellWorker]:
    """A worker on the journal at `path`, recovering what is in it."""
    tracing = tracing or Tracing(SUBJECTS.host_id)
    bus = bus or FakeBus()
    clock_ms = now_ms if clock is None else clock.now_ms
    monotonic_s = time.monotonic if clock is None else clock.monotonic_s
    machine = machine or FakeHandlers()
    meters = NoMeters()
    journal = await Journal.open(
        str(path),
        subjects=SUBJECTS,
        boot_id="b1",
        lane_depth=limits.lane_depth,
        tenant_depth=limits.tenant_depth,
        host_depth=limits.host_depth,
        clock_ms=clock_ms,
    )
    journal.store.trace_of = tracing.of_command
    host = cast("Host", SimpleNamespace(settings=Settings(limits=limits)))
    mechanisms: Mapping[str, Removable] = {machine.things.name: machine.things}
    dispatch = Dispatch(
        journal,
        machine.handlers(),
        host,
        mechanisms,
        meters=meters,
        tracing=tracing,
        clock_ms=clock_ms,
        monotonic_s=monotonic_s,
    )
    lanes = Lanes(dispatch)
    intake = Intake(
        bus,
        journal,
        lanes,
        inbox_prefixes=("_INBOX.",),
        version="0.0.0",
        facts=lambda: {"boot_id": "b1", "host_state": "ready", "capacity": {}},
        meters=meters,
        tracing=tracing,
        clock_ms=clock_ms,
    )
    outbox = Outbox(bus, journal, sent=tracing.sent)
    journal.commands.resume(lanes.put)
    if run:
        lanes.start()
    tasks: list[asyncio.Task[None]] = []
    if send:
        tasks.append(asyncio.create_task(outbox.run()))
    if consume:
        tasks.append(asyncio.create_task(bus.consume(intake.receive)))
    made = ShellWorker(bus, machine, journal, lanes, dispatch, intake, outbox, meters, tasks)
    try:
        yield made
    finally:
        await made.kill()
