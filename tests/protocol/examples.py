"""The worked examples: a worker in memory is really sent each command and asked each question.

Journal, intake, lanes, handlers, outbox and queries are the worker's own; host and bus are fakes.
Times, durations, the order of steps and the journal's ID differ from run to run, and are replaced
by fixed ones.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from schemas import codec, unpack
from schemas.envelopes import Command, EventKind, Form
from schemas.records import Status
from schemas.requests import Ping, Request, SetupNetwork, TeardownNetwork
from schemas.subjects import Lane
from tests.constants import DESTROY, NET, REF, SLEEP, START, STOP, WAKE
from tests.fakes.bus import FakeBus, Published
from tests.fakes.host import FakeHost, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.shell_worker import SUBJECTS, NoMeters
from tests.plain import unpacked
from worker.bus.message import Message
from worker.intake import Intake
from worker.lease import Holder, Lease
from worker.outbox import Outbox
from worker.queries import forms, service
from worker.queries.answers import Answers
from worker.queries.usage import usage_of

INBOX: Final = "_INBOX.agentd.1"
AT_MS: Final = 1_700_000_000_000
STEADY: Final[Mapping[str, object]] = {
    "journal_id": "5f0c2d9a7b1e4c36",
    "took_us": 1200,
    "uptime_s": 3600,
    "worker_id": "c0ffee0123456789",
}
CAPACITY: Final = {
    "instances": 1,
    "vcpus": 1024,
    "vcpus_used": 1,
    "mem_mib": 15872,
    "mem_free_mib": 15680,
    "disk_free_mib": 102400,
}
FACTS: Final[dict[str, Any]] = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "boot_id": "b1",
    "host_state": "ready",
    "degraded_by": [],
    "limits_enforced": True,
    "capacity": CAPACITY,
    "warm_vmms": 0,
    "vmm_versions": [
        {"version": "1.12.1", "state": "installed", "starts": True, "running": 1, "sleeping": 0}
    ],
}
COMMANDS: Final[Mapping[str, Request]] = {
    "Ping": Ping(),
    "SetupNetwork": SetupNetwork(REF.tenant_id, NET),
    "StartInstance": START,
    "SleepInstance": SLEEP,
    "WakeInstance": WAKE,
    "StopInstance": STOP,
    "DestroyInstance": DESTROY,
    "TeardownNetwork": TeardownNetwork(REF.tenant_id, NET),
}
NAMES: Final = {"tenant_id": REF.tenant_id, "pool_id": REF.pool_id, "instance_id": REF.instance_id}
QUESTIONS: Final[Mapping[str, dict[str, object]]] = {
    "ping": {},
    "status": {},
    "list": {},
    "describe": dict(NAMES),
    "usage": dict(NAMES),
    "result": {"id": "example-StartInstance"},
    "explain": {"request": {"StopInstance": dict(NAMES)}},
}
Rare = tuple[EventKind, str, dict[str, Any]]
RARE: Final[tuple[Rare, ...]] = (  # what this life does not have, as the worker reports it
    (EventKind.DRIFT, "changed out of band", {"repaired": ["base_rules"], "lost": []}),
    (
        EventKind.REMOVED,
        "an orphan: it belongs to nothing in the journal",
        {"kind": "taps", "name": "tn9i3", "by": "sweep", "result": "removed"},
    ),
    (
        EventKind.QUARANTINED,
        "no record that can be read, nor the metadata of its jail, explains this VMM",
        {"jail": "2c26b46b68ff-4"},
    ),
    (
        EventKind.RECOVERED,
        "the worker was started",
        {"adopted": 3, "ended": 0, "quarantined": 0, "networks": 1, "failed": 0, "commands": 0},
    ),
    (
        EventKind.DISK,
        "the disk is above its high watermark",
        {
            "low": False,
            "above_watermark": True,
            "free_bytes": 2147483648,
            "used_percent": 98.2,
        },
    ),
    (
        EventKind.RELEASED,
        "released by an operator",
        {"status": "unknown", "launch": 4, "jails": [], "pids": []},
    ),
    (
        EventKind.DRAIN,
        "the host is drained",
        {"active": True, "mode": "sleep", "drain": "1b9d6bcd"},
    ),
    (
        EventKind.VMM_VERSIONS,
        "Firecracker 1.12.1 is removed",
        {"versions": {"1.12.1": {"running": 0, "sleeping": 2}}},
    ),
    (
        EventKind.ORPHANS,
        "the sweep stopped: its budget of this hour is used up",
        {"per_hour": 5, "left": {"taps": 2}},
    ),
    (
        EventKind.HOST,
        "cannot start acme/web/i-1: the jailer exited with status 1",
        {"launches_quarantined": True, "failures": 10, "step": "jail"},
    ),
    (
        EventKind.VMM_HUNG,
        "its API did not answer",
        {"hung": True, "launch": 2, "pid": 1001, "misses": 3},
    ),
    (
        EventKind.VMM_EXITED,
        "VMM exited unexpectedly: the guest crashed with a triple fault",
        {
            "reason": "guest_crash",
            "evidence": "log",
            "launch": 2,
            "at_ms": AT_MS,
            "code": 0,
            "log_tail": "Received KVM_EXIT_SHUTDOWN signal",
        },
    ),
    (
        EventKind.SNAPSHOT,
        "guest was put to sleep without a drain",
        {"drain": "no_answer"},
    ),
)
OF_AN_INSTANCE: Final = {
    EventKind.RELEASED,
    EventKind.VMM_HUNG,
    EventKind.VMM_EXITED,
    EventKind.SNAPSHOT,
}


@dataclass(frozen=True)
class Sent:
    """One message of an example; `payload` has the fixed times."""

    subject: str
    payload: bytes
    headers: dict[str, str]


@dataclass
class Examples:
    """What was sent and what came back. Commands and replies by variant, events by kind, questions
    and answers by verb, state by kind of lane."""

    commands: dict[str, Sent] = field(default_factory=dict[str, Sent])
    replies: dict[str, Sent] = field(default_factory=dict[str, Sent])
    events: dict[str, Sent] = field(default_factory=dict[str, Sent])
    questions: dict[str, Sent] = field(default_factory=dict[str, Sent])
    answers: dict[str, Sent] = field(default_factory=dict[str, Sent])
    state: dict[str, Sent] = field(default_factory=dict[str, Sent])
    dead: list[Sent] = field(default_factory=list[Sent])


def steady(value: object, name: str = "") -> object:
    """The value with fixed times, durations and journal ID."""
    if isinstance(value, dict):
        return {key: steady(each, key) for key, each in cast("dict[str, object]", value).items()}
    if isinstance(value, list):
        made: list[Any] = [steady(each) for each in cast("list[object]", value)]
        # Some steps run at once and end in any order.
        return sorted(made, key=lambda step: str(step["name"])) if name == "steps" else made
    if name.endswith("_ms") and isinstance(value, int):
        return AT_MS
    if isinstance(value, str) and (found := re.fullmatch(r"(h1):[0-9a-f-]+:([0-9]+)", value)):
        return f"{found[1]}:{STEADY['journal_id']}:{found[2]}"
    return STEADY.get(name, value)


def packed(data: bytes) -> bytes:
    return unpack.pack(steady(unpacked(data)))


async def collect(directory: Path) -> Examples:
    """One life of a worker, from its first Ping to the Teardown."""
    machine, bus, found = seeded(), FakeBus(), Examples()
    async with _worker(directory, machine, bus) as worker:
        for name, request in COMMANDS.items():
            if name == "StopInstance":
                await _ask_all(worker, found)
                _states(worker, found)
            await _send(bus, found, name, request)
        await _refused(bus, found)
        for kind, reason, detail in RARE:
            ref = REF if kind in OF_AN_INSTANCE else None
            await worker.journal.records.event(kind, ref=ref, reason=reason, detail=detail)
        await _until(lambda: {_kind(each) for each in bus.events()} == set(EventKind))
        for event in bus.events():  # the first of a kind, but of `status` that of a running one
            value = unpacked(event.payload)
            if value["kind"] != "status" or value["to"] == Status.RUNNING:
                found.events.setdefault(value["kind"], _published(event))
        await _lease(bus, worker, found)
    return found


def _kind(event: Published) -> str:
    return str(unpacked(event.payload)["kind"])


def _published(message: Published) -> Sent:
    msg_id = cast("str", steady(message.msg_id))
    return Sent(message.subject, packed(message.payload), {"Nats-Msg-Id": msg_id})


@contextlib.asynccontextmanager
async def _worker(directory: Path, machine: FakeHost, bus: FakeBus) -> AsyncGenerator[MemoryWorker]:
    async with memory_worker(directory / "journal.db", machine) as worker:
        intake = Intake(
            bus,
            worker.journal,
            worker.lanes,
            inbox_prefixes=("_INBOX.",),
            version="0.1.0",
            facts=lambda: FACTS,
            meters=NoMeters(),
        )
        outbox = Outbox(bus, worker.journal)
        tasks = [
            asyncio.create_task(outbox.run()),
            asyncio.create_task(bus.consume(intake.receive)),
        ]
        try:
            yield worker
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _send(bus: FakeBus, found: Examples, name: str, request: Request) -> None:
    command = Command(
        id=f"example-{name}",
        request=request,
        form=Form.NAMED,
        issued_at_ms=AT_MS,
        reply_to=INBOX,
        issuer="agentd",
    )
    subject = SUBJECTS.command(Lane.of_request(request))
    data = codec.encode_command(command)
    found.commands[name] = Sent(subject, data, {})
    bus.command(subject, data)
    await _until(lambda: any(each.msg_id == command.id for each in bus.replies()))
    kept = next(each for each in bus.replies() if each.msg_id == command.id)
    found.replies[name] = _published(kept)
    await _until(lambda: kept.payload in bus.sent_to(INBOX))


async def _refused(bus: FakeBus, found: Examples) -> None:
    """A command that a newer agentd sends; its dead letter."""
    raw = {"v": 1, "id": "example-unknown", "request": {"MoveInstance": dict(NAMES)}}
    subject = SUBJECTS.command(Lane.instance(REF))
    found.commands["MoveInstance"] = Sent(subject, unpack.pack(raw), {})
    bus.command(subject, unpack.pack(raw))
    await _until(lambda: bool(bus.dead()))
    await _until(lambda: any(each.msg_id == "example-unknown" for each in bus.replies()))
    kept = next(each for each in bus.replies() if each.msg_id == "example-unknown")
    found.replies["MoveInstance"] = _published(kept)
    letter = bus.dead()[0]
    headers = {"Nats-Msg-Id": letter.msg_id, **letter.headers}
    found.dead.append(Sent(letter.subject, letter.payload, headers))


async def _ask_all(worker: MemoryWorker, found: Examples) -> None:
    source = Answers(
        worker.journal,
        "b1",
        host_state=lambda: "ready",
        warm_vmms=lambda: 0,
        usage=partial(usage_of, worker.host),
        explain=worker.explain.explain,
        vmm_versions=lambda: FACTS["vmm_versions"],
    )
    for verb, query in service.queries_of(source).items():
        data = unpack.pack(QUESTIONS[verb])
        message = Message(SUBJECTS.ask(verb), INBOX, data, {})
        answer, failure = await service.answer(verb, query, message)
        assert not failure, failure
        assert forms.forms_of(message).answered is forms.Wire.MSGPACK
        found.questions[verb] = Sent(message.subject, data, {})
        found.answers[verb] = Sent(INBOX, packed(answer), {})


def _states(worker: MemoryWorker, found: Examples) -> None:
    for row in worker.journal.outbox.dirty():
        if row.value is not None:
            kind = row.key.split(".")[1]
            found.state[kind] = Sent(
                f"$KV.{SUBJECTS.state_bucket}.{row.key}", packed(row.value), {}
            )


async def _lease(bus: FakeBus, worker: MemoryWorker, found: Examples) -> None:
    holder = Holder(
        "0123456789abcdef0123456789abcdef",
        "b1",
        worker.journal.store.journal_id,
        product_uuid="11111111-2222-3333-4444-555555555555",
        macs=("52:54:00:12:34:56",),
        hostname="host-1",
    )
    facts = {**FACTS, "version": "0.1.0", "seq": worker.journal.store.seq}
    await Lease(bus, SUBJECTS.host_key, holder, lambda: facts).acquire()
    value, _ = bus.state[SUBJECTS.host_key]
    subject = f"$KV.{SUBJECTS.state_bucket}.{SUBJECTS.host_key}"
    found.state["host"] = Sent(subject, packed(value), {})


async def _until(is_so: Any) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.001)
