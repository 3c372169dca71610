"""A draining host: what it refuses, what it puts to sleep or stops, and that it survives a kill."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncGenerator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from handlers.errors import Conflict, HostFault, Invalid
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Event
from schemas.records import Status
from schemas.requests import InstanceRef, SetupNetwork, StartInstance
from tests.constants import DESTROY, NET, REF, SLEEP, START, STOP, WAKE
from tests.fakes.host import FakeHost, Gate, instance_file, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from worker.control import emptying as emptying_module
from worker.control.drain_routes import DrainRoutes
from worker.control.draining import KEY
from worker.control.emptying import Emptying, command_id_of
from worker.journal.transaction import EventSource
from worker.journal.writer import JournalFault

UP = SetupNetwork("acme", NET)
COUNT = 5
REFS = [InstanceRef("acme", "web", f"i-{n + 1}") for n in range(COUNT)]


def machine_of(count: int) -> FakeHost:
    machine = seeded()
    for n, ref in enumerate(REFS[:count]):
        machine.files[ref] = instance_file(ref, 5 + n)
    return machine


async def nothing_to_lift(reason: str) -> bool:
    assert reason
    return False


async def start_all(worker: MemoryWorker, count: int) -> None:
    assert (await worker.run(UP)).code is Code.OK
    for ref in REFS[:count]:
        reply = await worker.run(StartInstance(ref.tenant_id, ref.pool_id, ref.instance_id))
        assert reply.code is Code.OK, reply


@contextlib.asynccontextmanager
async def emptying_of(worker: MemoryWorker) -> AsyncGenerator[Emptying]:
    emptying = Emptying(worker.drain, worker.journal, worker.lanes)
    task = asyncio.create_task(emptying.run())
    try:
        yield emptying
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def begun(worker: MemoryWorker, emptying: Emptying) -> None:
    """A drain is in effect, and has been looked at."""
    async with asyncio.timeout(20):
        while worker.drain.active is None:
            await asyncio.sleep(0)
    seen = emptying.looks
    while emptying.looks == seen:
        await emptying.wait_look(seen, 10)


async def finished(emptying: Emptying) -> None:
    async with asyncio.timeout(20):
        while not emptying.ended:
            await emptying.wait_look(emptying.looks, 10)


async def drained(
    worker: MemoryWorker, emptying: Emptying, **body: object
) -> tuple[list[Any], dict[str, Any]]:
    """Progress and result of one request."""
    lines = [
        line async for line in DrainRoutes(worker.drain, emptying, lift=nothing_to_lift).drain(body)
    ]
    result: Any = lines[-1]["result"]
    return [line["progress"] for line in lines[:-1]], result


async def drain_events(worker: MemoryWorker) -> list[Event]:
    rows = await worker.journal.outbox.pending("event", 1000)
    events = [codec.decode_event(row.payload) for row in rows]
    return [event for event in events if event.kind == "drain"]


# -- what is refused -------------------------------------------------------------------------------


async def test_a_start_and_a_wake_are_refused_and_everything_else_runs(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await worker.run(UP)
        await worker.drain.begin("wait")
        start = await worker.run(START)
        await worker.drain.end()
        assert (await worker.run(START)).code is Code.OK
        await worker.drain.begin("wait")

        slept = await worker.run(SLEEP)
        wake = await worker.run(WAKE)
        stopped = await worker.run(STOP)
        destroyed = await worker.run(DESTROY)

    for refused in (start, wake):
        assert (refused.code, refused.retryable, refused.attempts) == (Code.DRAINING, True, 0)
        assert refused.detail["act"] == "scheduler"
    assert [reply.code for reply in (slept, stopped, destroyed)] == [Code.OK] * 3


async def test_a_start_that_had_begun_is_completed(tmp_path: Path) -> None:
    at_step = asyncio.Event()
    goes_on = asyncio.Event()

    async def failpoint(moment: str) -> None:
        if moment == "before:cgroup":
            at_step.set()
            await goes_on.wait()

    async with memory_worker(tmp_path / "j", seeded(), failpoint=failpoint) as worker:
        await worker.run(UP)
        begun = await worker.send(START)
        waiting = await worker.send(WAKE)
        await at_step.wait()
        await worker.drain.begin("wait")
        goes_on.set()

        assert (await worker.reply(begun)).code is Code.OK
        assert (await worker.reply(waiting)).code is Code.DRAINING


async def test_a_drain_survives_a_kill_and_an_undrain_too(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        drain = await worker.drain.begin("sleep")
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert worker.drain.active == drain
        assert (await worker.run(START)).code is Code.DRAINING
        assert await worker.drain.end()
    async with memory_worker(tmp_path / "j", machine) as worker:
        assert worker.drain.active is None
        assert not await worker.drain.end()
        assert (await worker.run(START)).code is Code.OK


@pytest.mark.parametrize("kept", ['{"mode": "evict", "id": "1", "since_ms": 2}', "{", "[]"])
async def test_a_drain_that_this_version_cannot_read_is_one_and_can_be_ended(
    tmp_path: Path, kept: str
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await worker.run(UP)
        await worker.journal.store.put_meta("drain", kept)
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        assert worker.drain.active is not None
        assert worker.drain.active.mode == "wait"
        assert await worker.drain.end()
        assert worker.drain.active is None


@pytest.mark.parametrize("active", [True, False])
async def test_a_change_that_is_committed_takes_effect_though_its_sender_has_gone(
    tmp_path: Path, active: bool
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        if not active:
            await worker.drain.begin("wait")
        committed, goes_on, put_meta = (
            asyncio.Event(),
            asyncio.Event(),
            worker.journal.store.put_meta,
        )

        async def slow(key: str, value: str, **more: Any) -> None:
            await put_meta(key, value, **more)
            committed.set()
            await goes_on.wait()

        worker.journal.store.put_meta = slow  # type: ignore[method-assign]
        change = worker.drain.begin("wait") if active else worker.drain.end()
        asking = asyncio.create_task(change)
        await committed.wait()
        asking.cancel()
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await asking

        assert (worker.drain.active is not None) == active
        assert (await drain_events(worker))[-1].detail["active"] is active


# -- what is emptied -------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "status"), [("sleep", Status.SLEEPING), ("stop", Status.STOPPED)])
async def test_every_running_instance_gets_one_command_and_the_host_is_empty(
    tmp_path: Path, mode: str, status: Status
) -> None:
    async with memory_worker(tmp_path / "j", machine_of(COUNT)) as worker:
        await start_all(worker, COUNT)
        async with emptying_of(worker) as emptying:
            progress, result = await drained(worker, emptying, mode=mode)

        assert {record.status for record in worker.journal.records.instances()} == {status}
        assert (result["empty"], result["left"], result["failed"]) == (True, [], 0)
        assert result["done"] == COUNT
        assert progress[0]["in_use"] == COUNT
        assert worker.drain.active is not None
        for ref in REFS:
            found = await worker.journal.commands.result(command_id_of(worker.drain.active, ref))
            assert found is not None
            assert found.reply is not None
            assert codec.decode_reply(found.reply).code is Code.OK


async def test_no_more_than_so_many_commands_of_a_drain_are_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emptying_module, "PARALLEL", 2)
    machine = machine_of(COUNT)
    machine.gates["drain_guest"] = Gate()
    most = 0
    async with memory_worker(tmp_path / "j", machine) as worker:
        await start_all(worker, COUNT)
        worker.journal.store.on_commit(lambda _: note())

        def note() -> None:
            nonlocal most
            most = max(most, worker.journal.commands.count())

        async with emptying_of(worker) as emptying:
            await worker.drain.begin("sleep")
            while worker.journal.commands.count() < 2:
                await emptying.wait_look(emptying.looks, 10)
            machine.gates["drain_guest"].opened.set()
            await finished(emptying)

    assert most == 2


async def test_an_instance_whose_sleep_fails_is_reported_and_runs_on_and_the_others_sleep(
    tmp_path: Path,
) -> None:
    machine = machine_of(2)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await start_all(worker, 2)
        machine.fail["create_snapshot"] = HostFault("disk error")
        async with emptying_of(worker) as emptying:
            _, failed = await drained(worker, emptying, mode="sleep")
            del machine.fail["create_snapshot"]
            _, again = await drained(worker, emptying, mode="sleep")

    assert (failed["empty"], failed["failed"]) == (False, 2)
    assert failed["left"][0]["code"] == "host_fault"
    assert "disk error" in failed["left"][0]["message"]
    assert (again["empty"], again["failed"], again["done"]) == (True, 0, 2)


async def test_the_next_worker_goes_on_and_sends_no_second_command(tmp_path: Path) -> None:
    machine = machine_of(3)
    machine.gates["drain_guest"] = Gate()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await start_all(worker, 3)
        async with emptying_of(worker) as emptying:
            drain = await worker.drain.begin("sleep")
            while worker.journal.commands.count() < 3:
                await emptying.wait_look(emptying.looks, 10)
    machine.gates["drain_guest"].opened.set()
    async with memory_worker(tmp_path / "j", machine) as worker:
        async with emptying_of(worker) as emptying:
            await finished(emptying)

        ids = {command_id_of(drain, ref) for ref in REFS[:3]}
        rows = await worker.journal.outbox.pending("reply", 1000)
        replies = [codec.decode_reply(row.payload) for row in rows]
        assert sorted(reply.id for reply in replies if reply.id in ids) == sorted(ids)
        assert {record.status for record in worker.journal.records.instances()} == {Status.SLEEPING}


async def test_a_stop_drain_supersedes_a_guest_that_takes_its_time(tmp_path: Path) -> None:
    machine = machine_of(1)
    machine.gates["drain_guest"] = Gate()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await start_all(worker, 1)
        async with emptying_of(worker) as emptying:
            await worker.drain.begin("sleep")
            while worker.record().status is not Status.DRAINING:
                await emptying.wait_look(emptying.looks, 10)
            _, result = await drained(worker, emptying, mode="stop")

        assert (result["empty"], worker.record().status) == (True, Status.STOPPED)


async def test_a_senders_own_stop_supersedes_the_drains_sleep(tmp_path: Path) -> None:
    machine = machine_of(1)
    machine.gates["drain_guest"] = Gate()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await start_all(worker, 1)
        async with emptying_of(worker) as emptying:
            drain = await worker.drain.begin("sleep")
            while worker.record().status is not Status.DRAINING:
                await emptying.wait_look(emptying.looks, 10)
            assert (await worker.run(STOP)).code is Code.OK
            await finished(emptying)

            assert (await worker.reply(command_id_of(drain, REF))).code is Code.SUPERSEDED
            assert (emptying.counts()["failed"], emptying.counts()["in_use"]) == (0, 0)


async def test_a_slow_guest_does_not_hold_up_an_instance_that_starts_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Start that had begun before the drain, and ends while another guest is being drained."""
    monkeypatch.setattr(emptying_module, "EVENT_EVERY_S", 0.05)
    at_step, goes_on = asyncio.Event(), asyncio.Event()
    held = False

    async def failpoint(moment: str) -> None:
        if held and moment == "before:cgroup":
            at_step.set()
            await goes_on.wait()

    machine = machine_of(2)
    gate = machine.gates["drain_guest"] = Gate()
    async with memory_worker(tmp_path / "j", machine, failpoint=failpoint) as worker:
        await start_all(worker, 1)
        held = True
        late = REFS[1]
        start = await worker.send(StartInstance(late.tenant_id, late.pool_id, late.instance_id))
        await at_step.wait()
        async with emptying_of(worker) as emptying:
            drain = await worker.drain.begin("sleep")
            await gate.reached.wait()
            goes_on.set()
            async with asyncio.timeout(20):
                while not worker.journal.commands.is_unfinished(command_id_of(drain, late)):
                    await emptying.wait_look(emptying.looks, 10)
            gate.opened.set()
            await finished(emptying)

        assert (await worker.reply(start)).code is Code.OK
        assert {record.status for record in worker.journal.records.instances()} == {Status.SLEEPING}


async def test_an_unknown_instance_whose_command_failed_is_counted_once(tmp_path: Path) -> None:
    machine = machine_of(2)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await start_all(worker, 2)
        machine.fail["pause"] = HostFault("stuck")
        async with emptying_of(worker) as emptying:
            await worker.drain.begin("sleep")
            await finished(emptying)
            assert emptying.counts()["failed"] == 2
            await worker.journal.records.put_instance(
                replace(worker.record(), status=Status.UNKNOWN)
            )

            counts = emptying.counts()

    assert (counts["in_use"], counts["failed"], counts["unknown"]) == (2, 2, 0)


async def test_a_start_that_has_begun_is_in_use_before_it_has_a_reservation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emptying_module, "EVENT_EVERY_S", 0.05)
    first, goes_on = asyncio.Event(), asyncio.Event()
    armed = False

    async def failpoint(moment: str) -> None:
        if armed and not first.is_set():
            first.set()
            await goes_on.wait()

    async with memory_worker(tmp_path / "j", machine_of(1), failpoint=failpoint) as worker:
        await worker.run(UP)
        armed = True
        start = await worker.send(START)
        await first.wait()
        assert worker.journal.records.instance(REF) is None
        async with emptying_of(worker) as emptying:
            _, result = await drained(worker, emptying, mode="wait", timeout_s=0)
            await begun(worker, emptying)
            assert not emptying.ended
        goes_on.set()

        assert (await worker.reply(start)).code is Code.OK
        assert (result["empty"], result["in_use"]) == (False, 1)
        assert [(each["instance_id"], each["status"]) for each in result["left"]] == [
            ("i-1", "starting")
        ]


async def test_a_full_lane_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emptying_module, "FULL_AGAIN_S", 0.01)
    async with memory_worker(tmp_path / "j", machine_of(1)) as worker:
        await start_all(worker, 1)
        limits = worker.journal.commands.limits
        worker.journal.commands.limits = type(limits)(0, 0, 0)
        async with emptying_of(worker) as emptying:
            await worker.drain.begin("sleep")
            await emptying.wait_look(emptying.looks, 10)
            assert not emptying.ended
            worker.journal.commands.limits = limits
            await finished(emptying)

        assert worker.record().status is Status.SLEEPING


async def test_mode_wait_sends_nothing_and_ends_when_the_last_instance_is_gone(
    tmp_path: Path,
) -> None:
    async with memory_worker(tmp_path / "j", machine_of(1)) as worker:
        await start_all(worker, 1)
        async with emptying_of(worker) as emptying:
            watching = asyncio.create_task(drained(worker, emptying))
            await begun(worker, emptying)
            assert worker.journal.commands.count() == 0
            assert (await worker.run(STOP)).code is Code.OK
            progress, result = await watching

    assert (progress[0]["in_use"], result["mode"], result["empty"]) == (1, "wait", True)


# -- the route -------------------------------------------------------------------------------------


async def test_after_a_timeout_the_drain_goes_on_and_what_is_left_is_named(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", machine_of(1)) as worker:
        await start_all(worker, 1)
        async with emptying_of(worker) as emptying:
            _, result = await drained(worker, emptying, mode="wait", timeout_s=0)

        assert (result["empty"], result["draining"]) == (False, True)
        assert result["left"] == [
            {
                "tenant_id": "acme",
                "pool_id": "web",
                "instance_id": "i-1",
                "status": "running",
            }
        ]
        assert worker.drain.active is not None


async def test_an_undrain_meanwhile_ends_the_watching(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", machine_of(1)) as worker:
        await start_all(worker, 1)
        async with emptying_of(worker) as emptying:
            routes = DrainRoutes(worker.drain, emptying, lift=nothing_to_lift)
            watching = asyncio.create_task(_raised(drained(worker, emptying)))
            await begun(worker, emptying)
            assert await routes.undrain({}) == {"was_draining": True, "was_quarantined": False}
            raised = await watching

        assert isinstance(raised, Conflict)
        assert (await routes.state({}))["draining"] is False


async def _raised(work: Coroutine[Any, Any, object]) -> BaseException | None:
    try:
        await work
    except Conflict as error:
        return error
    return None


@pytest.mark.parametrize(
    "body",
    [{"mode": "reboot"}, {"timeout_s": -1}, {"timeout_s": 1e9}, {"timeout_s": "5"}, {"force": 1}],
)
async def test_a_wrong_body_changes_nothing(tmp_path: Path, body: dict[str, object]) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        emptying = Emptying(worker.drain, worker.journal, worker.lanes)
        with pytest.raises(Invalid):
            await drained(worker, emptying, **body)

        assert worker.drain.active is None


async def test_a_drain_its_progress_and_its_end_are_events(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", machine_of(2)) as worker:
        await start_all(worker, 2)
        async with emptying_of(worker) as emptying:
            await drained(worker, emptying, mode="sleep")
            while len(await drain_events(worker)) < 2:
                await emptying.wait_look(emptying.looks, 10)
            await worker.drain.end()

            begun, *_, done, ended = await drain_events(worker)

    assert (begun.detail["active"], begun.detail["mode"]) == (True, "sleep")
    assert (done.detail["done"], done.detail["in_use"]) == (2, 0)
    assert ended.detail["active"] is False
    assert begun.tenant_id is None


@pytest.mark.parametrize("drained", [False, True])
async def test_a_drain_or_its_end_without_its_event_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drained: bool
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        if drained:
            await worker.drain.begin("wait")
        kept = worker.journal.store.meta(KEY)

        def full(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as disk:
            disk.setattr(EventSource, "event", full)
            with pytest.raises(JournalFault):
                await (worker.drain.end() if drained else worker.drain.begin("wait"))

        assert (worker.drain.active is not None) is drained
        assert worker.journal.store.meta(KEY) == kept
