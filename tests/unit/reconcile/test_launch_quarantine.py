"""A host whose launches keep failing by its own fault takes no Starts until one succeeds."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import pytest

from handlers.errors import Failure, HostFault, Invalid, Unavailable
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Event, EventKind
from schemas.requests import SetupNetwork, StartInstance
from tests.constants import NET, SLEEP, START, STOP, WAKE
from tests.fakes.host import FakeHost, instance_file, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from worker.journal.journal import Journal
from worker.journal.writer import JournalFault
from worker.reconcile.launch_quarantine import (
    FIRST_PROBE_S,
    LAST_PROBE_S,
    META,
    LaunchQuarantine,
)

AFTER = 3
OTHER = StartInstance("acme", "web", "i-2")
BROKEN = HostFault("jailer exited with status 1")


@dataclass
class Rig:
    machine: FakeHost
    worker: MemoryWorker
    quarantine: LaunchQuarantine
    clock: list[float]

    async def start(self) -> Code:
        return (await self.worker.run(START)).code

    async def fail(
        self,
        count: int,
        effect: str = "vmm",
        failure: Failure = BROKEN,
        command: StartInstance = START,
    ) -> None:
        self.machine.fail[effect] = failure
        for _ in range(count):
            assert (await self.worker.run(command)).code is failure.code
        self.machine.fail.clear()

    async def events(self) -> list[Event]:
        rows = await self.worker.journal.outbox.pending("event", 1000)
        found = [codec.decode_event(row.payload) for row in rows]
        return [event for event in found if event.kind is EventKind.HOST]


@contextlib.asynccontextmanager
async def rig(
    path: Path, machine: FakeHost | None = None, *, after: int = AFTER
) -> AsyncGenerator[Rig]:
    machine = machine or seeded()
    clock, made = [0.0], list[LaunchQuarantine]()

    def gate(journal: Journal) -> LaunchQuarantine:
        made.append(LaunchQuarantine(journal, after, changed=lambda: None, clock=lambda: clock[0]))
        return made[0]

    async with memory_worker(path, machine, gate=gate) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        yield Rig(machine, worker, made[0], clock)


async def test_after_failures_in_a_row_no_start_is_taken_and_nothing_is_launched(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path / "j") as made:
        await made.fail(AFTER - 1)
        assert not made.quarantine.active
        await made.fail(1)
        assert made.quarantine.active
        seen = len(made.machine.seen)

        reply = await made.worker.run(START)

        assert (reply.code, reply.retryable) == (Code.UNAVAILABLE, True)
        assert (reply.detail["act"], reply.steps) == ("scheduler", ())
        assert len(made.machine.seen) == seen
        (event,) = await made.events()
        assert event.detail == {"launches_quarantined": True, "failures": AFTER, "step": "vmm"}
        assert event.reason == BROKEN.message


async def test_a_success_between_failures_starts_the_count_anew(tmp_path: Path) -> None:
    async with rig(tmp_path / "j") as made:
        for _ in range(3):
            await made.fail(AFTER - 1)
            assert await made.start() is Code.OK
            assert (await made.worker.run(STOP)).code is Code.OK

        assert not made.quarantine.active


@pytest.mark.parametrize(
    ("effect", "failure"),
    [
        ("configure_vm", HostFault("Firecracker refused the kernel")),  # the tenant's file
        ("data_disk", HostFault("damaged")),
        ("artifact", HostFault("damaged")),
        ("vmm", Unavailable("busy").not_retryable()),
        ("vmm", Invalid("a bad file")),
    ],
)
async def test_what_a_tenant_or_a_moment_can_cause_does_not_count(
    tmp_path: Path, effect: str, failure: Failure
) -> None:
    async with rig(tmp_path / "j") as made:
        await made.fail(AFTER * 2, effect, failure)

        assert not made.quarantine.active


async def test_a_probe_launch_that_succeeds_ends_it(tmp_path: Path) -> None:
    async with rig(tmp_path / "j") as made:
        await made.fail(AFTER)
        assert await made.start() is Code.UNAVAILABLE

        made.clock[0] += FIRST_PROBE_S
        assert await made.start() is Code.OK

        assert not made.quarantine.active
        assert (await made.worker.run(STOP)).code is Code.OK
        assert await made.start() is Code.OK
        last = (await made.events())[-1]
        assert last.detail["launches_quarantined"] is False


async def test_a_probe_that_fails_makes_the_next_one_wait_longer_up_to_a_bound(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path / "j") as made:
        await made.fail(AFTER)
        pause_s = FIRST_PROBE_S
        for _ in range(6):
            made.clock[0] += pause_s - 1
            assert await made.start() is Code.UNAVAILABLE
            made.clock[0] += 1
            await made.fail(1)
            pause_s = min(pause_s * 2, LAST_PROBE_S)

        assert pause_s == LAST_PROBE_S
        assert len(await made.events()) == 1


async def test_one_start_at_a_time_is_let_through(tmp_path: Path) -> None:
    async with rig(tmp_path / "j") as made:
        await made.fail(AFTER)
        made.clock[0] += FIRST_PROBE_S
        made.machine.fail["vmm"] = BROKEN

        first = await made.worker.send(START)
        second = await made.worker.send(OTHER)
        replies = await asyncio.gather(made.worker.reply(first), made.worker.reply(second))

        assert sorted(reply.code for reply in replies) == [Code.HOST_FAULT, Code.UNAVAILABLE]


async def test_a_probe_that_says_nothing_about_the_host_is_followed_by_another(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path / "j") as made:
        await made.fail(AFTER)
        made.clock[0] += FIRST_PROBE_S
        await made.fail(1, "data_disk", Invalid("a bad disk"))

        assert made.quarantine.active
        assert await made.start() is Code.OK


async def test_everything_but_a_launch_goes_on_also_a_start_of_what_runs(tmp_path: Path) -> None:
    async with rig(tmp_path / "j") as made:
        made.machine.files[OTHER.ref] = instance_file(OTHER.ref, 6)
        assert await made.start() is Code.OK
        await made.fail(AFTER, command=OTHER)
        assert made.quarantine.active
        assert (await made.worker.run(OTHER)).code is Code.UNAVAILABLE

        again = await made.worker.run(START)
        slept = await made.worker.run(SLEEP)

        assert (again.code, again.changed, slept.code) == (Code.OK, False, Code.OK)
        assert made.quarantine.active
        # A sleeper can be woken, and that it could be ends the quarantine.
        assert (await made.worker.run(WAKE)).code is Code.OK
        assert not made.quarantine.active


async def test_an_operator_ends_it(tmp_path: Path) -> None:
    async with rig(tmp_path / "j") as made:
        assert not await made.quarantine.lift("an operator")
        await made.fail(AFTER)

        assert await made.quarantine.lift("an operator")

        assert await made.start() is Code.OK


async def test_it_outlasts_the_worker(tmp_path: Path) -> None:
    machine = seeded()
    async with rig(tmp_path / "j", machine) as made:
        await made.fail(AFTER)

    async with rig(tmp_path / "j", machine) as made:
        assert made.quarantine.active
        assert await made.start() is Code.UNAVAILABLE
        made.clock[0] += FIRST_PROBE_S
        assert await made.start() is Code.OK
        assert (await made.worker.run(STOP)).code is Code.OK

    async with rig(tmp_path / "j", machine) as made:
        assert not made.quarantine.active


async def test_zero_turns_it_off(tmp_path: Path) -> None:
    machine = seeded()
    async with rig(tmp_path / "j", machine) as made:
        await made.fail(AFTER)

    async with rig(tmp_path / "j", machine, after=0) as made:
        await made.fail(AFTER * 2)

        assert not made.quarantine.active


async def test_an_end_that_cannot_be_committed_is_kept_after_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path / "j") as made:
        store = made.worker.journal.store
        await made.fail(AFTER)
        kept = store.meta(META)

        async def refuse(*_: object, **__: object) -> None:
            raise JournalFault("disk full")

        with monkeypatch.context() as full:
            full.setattr(type(store), "put_meta", refuse)
            assert await made.quarantine.lift("an operator ended it")
        assert store.meta(META) == kept != ""

        await made.worker.run(STOP)

        assert store.meta(META) == ""
        assert [event.detail for event in await made.events()][1:] == [
            {"launches_quarantined": False}
        ]
