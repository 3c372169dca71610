"""Overwatch: who is asked, what counts as a miss, what follows, and that commands come first."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from msgspec.structs import replace

from handlers.errors import Exhausted, Unavailable
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Event, EventKind
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef, SetupNetwork
from schemas.subjects import Lane
from tests.constants import NET, REF, START, STOP
from tests.fakes.host import FakeHost, FakeVmmApi, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import vmm_watch
from worker.journal.transaction import Transaction
from worker.lanes import MaintenanceTask
from worker.queries.answers import described
from worker.reconcile import overwatch as module
from worker.reconcile.overwatch import AT_ONCE, MISSES, Overwatch

INTERVAL_S = 60.0


@dataclass
class Rig:
    """An overwatch whose clock is moved by its own sleeps; deadlines are real and short."""

    machine: FakeHost
    worker: MemoryWorker
    results: Counter[str] = field(default_factory=Counter[str])
    now_s: float = 0.0
    slept: list[float] = field(default_factory=list[float])

    def probed(self, result: str) -> None:
        self.results[result] += 1

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)

    def overwatch(self, **vmm: object) -> Overwatch:
        settings = self.worker.host.settings
        changed = msgspec.structs.replace(
            settings, vmm=msgspec.structs.replace(settings.vmm, **vmm)
        )
        host = self.machine.host(self.worker.journal.records, changed)
        made = Overwatch(
            host,
            self.worker.journal,
            self.worker.lanes,
            self,
            clock=lambda: self.now_s,
            sleep=self.sleep,
        )
        self.worker.lanes.on_arrival = made.yield_to
        return made

    async def rounds(self, overwatch: Overwatch, count: int) -> None:
        for _ in range(count):
            await overwatch.once()
            await self.worker.lanes.idle()

    async def events(self) -> list[Event]:
        rows = await self.worker.journal.outbox.pending("event", 1000)
        found = [codec.decode_event(row.payload) for row in rows]
        return [event for event in found if event.kind is EventKind.VMM_HUNG]


@pytest_asyncio.fixture(name="rig")
async def one_running_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(module, "DEADLINE_S", 0.01)
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
        assert (await worker.run(START)).code is Code.OK
        yield Rig(machine, worker)


def jail_of(rig: Rig) -> str:
    return rig.worker.record().jail_id


async def test_a_vmm_that_answers_is_not_announced(rig: Rig) -> None:
    await rig.rounds(rig.overwatch(), MISSES + 1)

    assert rig.results == {"answered": MISSES + 1}
    assert await rig.events() == []


async def test_three_misses_in_a_row_are_announced_once_and_the_vm_is_left_alone(rig: Rig) -> None:
    overwatch = rig.overwatch()
    rig.machine.hanging.add(jail_of(rig))

    await rig.rounds(overwatch, MISSES - 1)
    assert (await rig.events(), overwatch.hung) == ([], 0)
    await rig.rounds(overwatch, 3)

    (event,) = await rig.events()
    assert (event.instance_id, event.detail["hung"], event.detail["misses"]) == ("i-1", True, 3)
    assert overwatch.hung == 1
    assert rig.worker.record().status is Status.RUNNING
    assert described(rig.worker.record())["hung_since_ms"] is not None


async def test_a_hang_is_one_commit_with_its_event(rig: Rig) -> None:
    commits: list[Transaction] = []
    rig.worker.journal.store.on_commit(commits.append)
    rig.machine.hanging.add(jail_of(rig))

    await rig.rounds(rig.overwatch(), MISSES)

    (commit,) = commits
    assert [row.kind for row in commit.out] == ["event"]
    assert commit.states == []  # that value has the reason of the status, which is the same
    assert rig.worker.record().hung is not None


async def test_one_answer_between_two_misses_starts_the_count_anew(rig: Rig) -> None:
    overwatch = rig.overwatch()
    for _ in range(3):
        rig.machine.hanging.add(jail_of(rig))
        await rig.rounds(overwatch, MISSES - 1)
        rig.machine.hanging.clear()
        await rig.rounds(overwatch, 1)

    assert await rig.events() == []


async def test_a_vm_that_answers_again_is_announced_also_by_the_next_worker(rig: Rig) -> None:
    rig.machine.hanging.add(jail_of(rig))
    await rig.rounds(rig.overwatch(), MISSES)
    rig.machine.hanging.clear()

    await rig.rounds(rig.overwatch(), 2)

    assert [event.detail["hung"] for event in await rig.events()] == [True, False]
    assert rig.worker.record().hung is None


async def test_by_policy_a_vm_that_hangs_is_killed_and_its_end_says_so(rig: Rig) -> None:
    watch = vmm_watch(rig.worker)
    watch.sync_all()
    overwatch = rig.overwatch(on_hang="kill")
    rig.machine.hanging.add(jail_of(rig))

    await rig.rounds(overwatch, MISSES)
    async with asyncio.timeout(10):
        while rig.worker.record().status is not Status.FAILED:
            await asyncio.sleep(0)

    record = rig.worker.record()
    assert record.last_end is not None
    assert (record.last_end.reason, record.last_end.evidence) == ("hung", "hostd")
    assert record.hung is None
    assert (await rig.worker.run(START)).code is Code.OK
    assert rig.worker.record().hung is None
    await watch.close()


async def test_a_kill_that_failed_is_tried_again(rig: Rig) -> None:
    overwatch = rig.overwatch(on_hang="kill")
    rig.machine.hanging.add(jail_of(rig))
    rig.machine.fail["remove_vmm"] = Unavailable("it does not exit")
    await rig.rounds(overwatch, MISSES)
    assert ("vmm", jail_of(rig)) in rig.machine.resources

    rig.machine.fail.clear()
    await rig.rounds(overwatch, 1)

    assert ("vmm", jail_of(rig)) not in rig.machine.resources
    assert len(await rig.events()) == 1


async def test_no_probe_is_made_while_work_runs_or_waits_in_the_lane(rig: Rig) -> None:
    overwatch = rig.overwatch(on_hang="kill")
    rig.machine.hanging.add(jail_of(rig))
    gate = asyncio.Event()

    async def long_call() -> None:
        await gate.wait()

    rig.worker.lanes.put_maintenance(Lane.instance(REF), MaintenanceTask("long", long_call))
    for _ in range(MISSES + 1):
        await overwatch.once()

    assert rig.results == {"busy": MISSES + 1}
    assert rig.worker.record().hung is None
    gate.set()
    await rig.worker.lanes.idle()


async def test_a_probe_ends_at_once_when_a_command_comes_and_is_no_miss(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEADLINE_S", 30.0)
    overwatch = rig.overwatch()
    asking, closed = asyncio.Event(), asyncio.Event()

    async def never(api: FakeVmmApi) -> str:
        asking.set()
        await asyncio.Event().wait()
        return ""

    async def close(api: FakeVmmApi) -> None:
        closed.set()

    monkeypatch.setattr(FakeVmmApi, "state", never)
    monkeypatch.setattr(FakeVmmApi, "close", close)
    probing = asyncio.create_task(overwatch.once())
    async with asyncio.timeout(10):
        await asking.wait()

        stop = await rig.worker.send(STOP)
        await probing

    assert closed.is_set()
    assert (await rig.worker.reply(stop)).code is Code.OK
    assert rig.results == {"yielded": 1}


@pytest.mark.parametrize(
    "error", [Exhausted("no free descriptor"), OSError(24, "EMFILE"), ValueError("a bug")]
)
async def test_what_hostd_could_not_ask_is_no_miss(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def fails(api: FakeVmmApi) -> str:
        raise error

    monkeypatch.setattr(FakeVmmApi, "state", fails)

    await rig.rounds(rig.overwatch(on_hang="kill"), MISSES + 1)

    assert rig.results == {"failed": MISSES + 1}
    assert await rig.events() == []


async def test_a_worker_that_was_late_itself_blames_no_vmm(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LATE_S", -1.0)  # each deadline is seen too late
    rig.machine.hanging.add(jail_of(rig))

    await rig.rounds(rig.overwatch(), MISSES + 1)

    assert rig.results == {"failed": MISSES + 1}


def crowd(record: InstanceRecord, number: int) -> InstanceRecord:
    ref = InstanceRef("acme", "web", f"n-{number}")
    return replace(record, ref=ref, uid_slot=100 + number, offset=20 + number)


async def test_the_probes_of_a_round_are_spread_over_the_interval(rig: Rig) -> None:
    for number in range(29):
        await rig.worker.journal.records.put_instance(crowd(rig.worker.record(), number))

    await rig.overwatch().once()

    assert rig.now_s == pytest.approx(INTERVAL_S)
    assert max(rig.slept) == pytest.approx(INTERVAL_S / 30)


async def test_of_many_that_hang_a_bounded_number_is_asked_at_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        await rig.worker.journal.records.put_instance(crowd(rig.worker.record(), number))
    asking, most = 0, 0

    async def slow(api: FakeVmmApi) -> str:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        try:
            await asyncio.Event().wait()
        finally:
            asking -= 1
        return ""

    monkeypatch.setattr(FakeVmmApi, "state", slow)

    await rig.overwatch().once()

    assert most == AT_ONCE
    assert rig.results == {"missed": 41}


async def test_without_an_interval_nobody_is_asked(rig: Rig) -> None:
    async with asyncio.timeout(10):
        await rig.overwatch(probe_interval_s=0.0).run()

    assert not rig.results
