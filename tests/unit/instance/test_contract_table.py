"""docs/contract.md's table of `steps` and `detail` says what the commands really send."""

import asyncio
import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from handlers.errors import Unavailable
from handlers.registry import HANDLERS
from schemas.codes import Code
from schemas.envelopes import Reply
from schemas.requests import (
    DestroyInstance,
    Request,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    TeardownNetwork,
    WakeInstance,
)
from tests.fakes.host import FakeHost, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker

CONTRACT = Path(__file__).parents[3] / "docs" / "contract.md"
HEAD = "| command | `steps[].name` | `detail` of `Ok` |"

NAMES = ("acme", "web", "i-1")
NET = seeded().tenants["acme"].net
UP, DOWN = SetupNetwork("acme", NET), TeardownNetwork("acme", NET)
START, STOP, WAKE = StartInstance(*NAMES), StopInstance(*NAMES), WakeInstance(*NAMES)
SLEEP = SleepInstance(*NAMES, force=False)
WIPE = DestroyInstance(*NAMES, wipe_volumes=True)
KEEP = DestroyInstance(*NAMES, wipe_volumes=False)


class Sent(NamedTuple):
    steps: set[str]
    detail: set[str]


def documented() -> dict[str, Sent]:
    """The rows of the table, by command."""
    lines = CONTRACT.read_text(encoding="utf-8").splitlines()
    rows: dict[str, Sent] = {}
    for line in lines[lines.index(HEAD) + 2 :]:
        if not line.startswith("|"):
            break
        command, steps, detail = (cell.strip() for cell in line.strip("|").split("|"))
        rows[command] = Sent(set(re.findall("`([a-z_]+)`", steps)), keys_of(detail))
    return rows


def keys_of(cell: str) -> set[str]:
    """The keys are the code at the start of each part; what follows a colon are values."""
    return {m[1] for part in cell.split(";") if (m := re.match("`([a-z_]+)`", part.strip()))}


async def waiting(worker: MemoryWorker, request: Request) -> Reply:
    """Run a command while all slots for heavy work are taken, so that it has to wait for one."""
    slots = worker.host.slots
    kinds = [getattr(slots, field.name) for field in dataclasses.fields(slots)]
    for kind in kinds:
        for n in range(kind.count):
            await kind.acquire(f"other-{n}")
    command_id = await worker.send(request)
    reply = asyncio.ensure_future(worker.reply(command_id))
    async with asyncio.timeout(10):
        while not reply.done():
            for kind in kinds:
                if kind.waiting:  # it waits for all the kinds that it needs, one after the other
                    kind.release("other-0")
                    while kind.waiting:
                        await asyncio.sleep(0)
                    await kind.acquire("other-0")
            await asyncio.sleep(0)
    for kind in kinds:
        for n in range(kind.count):
            kind.release(f"other-{n}")
    return await reply


async def all_sent(tmp_path: Path) -> dict[str, Sent]:
    """Each command in each of its forms that ends in `Ok`; what their replies had in them."""
    sent = {request.__name__: Sent(set(), set()) for request in HANDLERS}

    def note(request: Request, reply: Reply) -> None:
        assert reply.code is Code.OK, reply
        sent[request.kind].steps.update(step.name for step in reply.steps)
        sent[request.kind].detail.update(reply.detail)

    machine: FakeHost = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        request: Request
        for request in (UP, START, SLEEP, WAKE):
            note(request, await waiting(worker, request))
        machine.network_warnings = ("another table drops all",)
        note(UP, await worker.run(UP))
        for request in (STOP, START, SLEEP, STOP, START):
            note(request, await worker.run(request))
        machine.drain_ack = False
        note(SLEEP, await worker.run(SLEEP))
        machine.fail["wake_agent"] = Unavailable("injected")
        note(WAKE, await worker.run(WAKE))
        machine.fail = {"set_clock": Unavailable("injected")}
        note(SLEEP, await worker.run(SLEEP))
        note(WAKE, await worker.run(WAKE))
        for request in (KEEP, WIPE):
            note(request, await waiting(worker, request))
        never = DestroyInstance("acme", "web", "never", wipe_volumes=False)
        note(never, await worker.run(never))
        note(DOWN, await waiting(worker, DOWN))
    return sent


@pytest.mark.parametrize("kind", [request.__name__ for request in HANDLERS])
async def test_the_table_of_steps_and_detail(kind: str, tmp_path: Path) -> None:
    sent = await all_sent(tmp_path)

    assert documented()[kind] == sent[kind]


def test_the_table_has_every_command() -> None:
    assert documented().keys() == {request.__name__ for request in HANDLERS}


async def test_steps_are_nouns_of_mechanisms_or_verbs_with_an_object(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        nouns = worker.mechanisms.keys()
    verbs = {
        "check", "configure", "discard", "drain",
    "flush", "link", "load", "prepare", "publish", "read", "remove",
        "resume", "set", "start", "stop", "verify", "wait", "wake", "wipe",
    }  # fmt: skip

    for kind, sent in documented().items():
        for step in sent.steps - nouns:
            assert step.partition("_")[0] in verbs, (kind, step)
            assert step.partition("_")[2], (kind, step)
