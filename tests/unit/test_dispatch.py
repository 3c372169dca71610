"""One run of one command: attempts, undo, and the reply."""

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from handlers.clock import now_ms
from handlers.errors import (
    Conflict,
    Exhausted,
    HostFault,
    Invalid,
    NotFound,
    Unavailable,
)
from handlers.steps import Done, SnapshotMeasure, Steps
from schemas.codes import Code
from schemas.envelopes import StepTaken
from schemas.requests import Error, Request, SleepInstance
from schemas.settings import LimitSettings
from schemas.subjects import Lane
from tests.fakes.clock import FakeClock
from tests.fakes.shell_worker import FakeHandlers, Thing, command, shell_worker, start, stop
from worker import dispatch
from worker.journal.memory import CommandRow
from worker.journal.writer import JournalFault

DONE = Done(changed=True, status="running", detail={})


class Failing:
    """A handler's behaviour: makes one thing, then raises in the first `times` runs."""

    def __init__(self, error: BaseException, times: int = 1000, point: str | None = None) -> None:
        self.error = error
        self.times = times
        self.point = point
        self.machine: FakeHandlers | None = None

    async def __call__(self, request: Request, steps: Steps) -> Done:
        assert self.machine is not None
        await steps.ensure(self.machine.things, Thing("made"))
        if self.point:
            await steps.reach(self.point, nothing)
        if self.times:
            self.times -= 1
            raise self.error
        return DONE


def failing(error: BaseException, times: int = 1000, point: str | None = None) -> FakeHandlers:
    behave = Failing(error, times, point)
    machine = FakeHandlers(behave=behave)
    behave.machine = machine
    return machine


@pytest.mark.parametrize(
    ("error", "code", "act", "retryable"),
    [
        (Conflict("it sleeps"), Code.CONFLICT, "sender", False),
        (Invalid("no", path="$.x"), Code.INVALID, "sender", False),
        (NotFound("no", path="pool.json"), Code.NOT_FOUND, "sender", False),
        (Exhausted("full"), Code.EXHAUSTED, "scheduler", True),
        (HostFault("broken"), Code.HOST_FAULT, "operator", False),
        (Unavailable("busy").not_retryable(), Code.UNAVAILABLE, "sender", True),
        (OSError(errno.ENOSPC, "x", "/disk"), Code.EXHAUSTED, "scheduler", True),
        (PermissionError(errno.EPERM, "x", "/dev/net/tun"), Code.HOST_FAULT, "operator", False),
    ],
)
async def test_a_final_failure_is_undone_not_retried_and_names_who_must_act(
    tmp_path: Path, error: Exception, code: Code, act: str, retryable: bool
) -> None:
    machine = failing(error)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start())
        reply = await worker.reply()

    assert (reply.code, reply.retryable, reply.attempts) == (code, retryable, 1)
    assert reply.detail["act"] == act
    assert reply.detail.get("path") == getattr(error, "path", None)
    assert isinstance(reply.response, Error)
    assert [step.outcome for step in reply.steps] == ["done", "undone"]
    assert (machine.things.there, reply.changed, reply.left_behind) == (set(), False, ())


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("busy"),
        OSError(errno.EBUSY, "busy"),
        TimeoutError(),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    ],
)
async def test_unavailable_is_retried_on_this_host(tmp_path: Path, error: Exception) -> None:
    machine = failing(error, times=2)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start())
        reply = await worker.reply()

        assert (reply.code, reply.attempts, reply.changed) == (Code.OK, 3, True)
        assert machine.things.made == ["made"]
        assert worker.meters.retries == [Code.UNAVAILABLE] * 2
        assert worker.meters.done == [("StartInstance", Code.OK)]


class Slow(Failing):
    """Each attempt takes this long by the clock."""

    def __init__(self, clock: FakeClock, took_ms: int, error: Exception, **more: Any) -> None:
        super().__init__(error, **more)
        self.clock = clock
        self.took_ms = took_ms

    async def __call__(self, request: Request, steps: Steps) -> Done:
        try:
            return await super().__call__(request, steps)
        finally:
            self.clock.advance(self.took_ms)


def slow(clock: FakeClock, took_ms: int, error: Exception, **more: Any) -> FakeHandlers:
    behave = Slow(clock, took_ms, error, **more)
    machine = FakeHandlers(behave=behave)
    behave.machine = machine
    return machine


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKOFF_S", 0.0)


@pytest.fixture
def long_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait is 1000 s."""
    monkeypatch.setattr(dispatch, "BACKOFF_S", 1000.0)
    monkeypatch.setattr(dispatch, "BACKOFF_MAX_S", 1000.0)

    def longest(_low: float, high: float) -> float:
        return high

    monkeypatch.setattr("tenacity.wait.random.uniform", longest)


@pytest.mark.usefixtures("no_backoff")
async def test_attempts_end_with_the_budget(tmp_path: Path) -> None:
    clock, limits = FakeClock(), LimitSettings(retry_budget_s=0.3)
    machine = slow(clock, 125, Unavailable("busy"))
    async with shell_worker(tmp_path / "j", machine=machine, limits=limits, clock=clock) as worker:
        worker.send(start())
        reply = await worker.reply()

    assert (reply.code, reply.retryable, reply.attempts) == (Code.UNAVAILABLE, True, 3)
    assert reply.finished_at_ms - reply.received_at_ms == 375


@pytest.mark.usefixtures("no_backoff")
async def test_the_budget_that_one_worker_spent_the_next_one_does_not_have(tmp_path: Path) -> None:
    clock, limits = FakeClock(), LimitSettings(retry_budget_s=0.3)
    at_second, runs = asyncio.Event(), 0

    async def fails_then_hangs(_request: object, steps: Steps) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            clock.at_ms += 200
            raise Unavailable("busy")
        at_second.set()
        await steps.interruptible("gate", asyncio.Event().wait)

    machine = FakeHandlers(behave=fails_then_hangs)
    async with shell_worker(tmp_path / "j", machine=machine, limits=limits, clock=clock) as worker:
        worker.send(start())
        await at_second.wait()
        bus = worker.bus
    clock.at_ms -= 3_600_000  # whatever the wall clock does meanwhile
    machine = slow(clock, 125, Unavailable("busy"))
    async with shell_worker(tmp_path / "j", bus, machine, limits=limits, clock=clock) as worker:
        reply = await worker.reply()

    assert (reply.code, reply.attempts) == (Code.UNAVAILABLE, 3)  # two, and one more


@pytest.mark.usefixtures("no_backoff")
async def test_an_attempt_that_took_the_whole_budget_is_the_last(tmp_path: Path) -> None:
    clock, limits = FakeClock(), LimitSettings(retry_budget_s=0.3)
    machine = slow(clock, 300, Unavailable("busy"))
    async with shell_worker(tmp_path / "j", machine=machine, limits=limits, clock=clock) as worker:
        worker.send(start())
        reply = await worker.reply()

    assert (reply.code, reply.attempts) == (Code.UNAVAILABLE, 1)


@pytest.mark.usefixtures("no_backoff")
async def test_past_a_point_of_no_return_the_first_attempt_does_not_use_up_the_budget(
    tmp_path: Path,
) -> None:
    clock, limits = FakeClock(), LimitSettings(retry_budget_s=0.3)
    machine = slow(clock, 10_000, Unavailable("busy"), times=1, point="consumed")
    async with shell_worker(tmp_path / "j", machine=machine, limits=limits, clock=clock) as worker:
        worker.send(start())
        reply = await worker.reply()

    assert (reply.code, reply.attempts) == (Code.OK, 2)


@pytest.mark.usefixtures("no_backoff")
async def test_attempts_end_with_the_deadline(tmp_path: Path) -> None:
    clock = FakeClock()
    machine = slow(clock, 125, Unavailable("busy"))
    async with shell_worker(tmp_path / "j", machine=machine, clock=clock) as worker:
        worker.send(start(), deadline_ms=clock.at_ms + 300)
        reply = await worker.reply()

    assert (reply.code, reply.attempts) == (Code.UNAVAILABLE, 3)
    assert machine.things.there == set()


@pytest.mark.usefixtures("long_backoff")
async def test_a_wait_that_would_outlast_the_deadline_is_not_begun(tmp_path: Path) -> None:
    limits = LimitSettings(retry_budget_s=10_000)
    clock, machine = FakeClock(), failing(Unavailable("busy"))
    async with shell_worker(tmp_path / "j", machine=machine, limits=limits, clock=clock) as worker:
        worker.send(start(), deadline_ms=clock.at_ms + 999_000)
        reply = await worker.reply()

    assert (reply.code, reply.attempts) == (Code.UNAVAILABLE, 1)


async def test_an_expired_command_is_not_started(tmp_path: Path) -> None:
    clock = FakeClock()
    async with shell_worker(tmp_path / "j", clock=clock) as worker:
        worker.send(start(), deadline_ms=clock.at_ms)
        reply = await worker.reply()

        assert (reply.code, reply.attempts, worker.machine.runs) == (Code.EXPIRED, 0, [])


async def test_a_bug_is_internal_undone_and_logged_with_its_traceback(tmp_path: Path) -> None:
    machine = failing(KeyError("secret"))
    with structlog.testing.capture_logs() as logs:
        async with shell_worker(tmp_path / "j", machine=machine) as worker:
            worker.send(start())
            reply = await worker.reply()

    assert (reply.code, reply.attempts, machine.things.there) == (Code.INTERNAL, 1, set())
    assert "secret" not in str(reply)
    (bug,) = [entry for entry in logs if entry["event"] == "command.crashed"]
    assert bug["exc_info"]


async def test_a_detail_without_a_msgpack_encoding_is_internal_and_does_not_block_the_lane(
    tmp_path: Path,
) -> None:
    machine = FakeHandlers()

    def behave(request: Request, steps: Steps) -> Done | None:
        odd: Any = {"odd": object()}
        return Done(changed=True, status=None, detail=odd) if request == start() else None

    machine.behave = behave
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start())
        assert (await worker.reply()).code is Code.INTERNAL
        worker.send(stop(), "c2")
        assert (await worker.reply("c2")).code is Code.OK


async def test_a_failed_undo_is_left_behind_in_the_reply_and_in_the_step_log(
    tmp_path: Path,
) -> None:
    machine = failing(Conflict("no"))
    machine.things.stuck = True
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start())
        reply = await worker.reply()

        assert (reply.code, reply.left_behind) == (Code.CONFLICT, ("thing made",))
        assert [row.key for row in worker.journal.steps.leftovers()["c1"]] == ["made"]


async def test_a_bug_in_an_undo_is_answered_with_what_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def buggy(key: str) -> None:
        raise KeyError(key)

    machine = failing(Conflict("no"))
    monkeypatch.setattr(machine.things, "remove", buggy)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start())
        reply = await worker.reply()

        assert (reply.code, reply.left_behind) == (Code.CONFLICT, ("thing made",))
        assert [row.key for row in worker.journal.steps.leftovers()["c1"]] == ["made"]


async def test_past_a_point_of_no_return_a_failure_is_retried_and_never_undone(
    tmp_path: Path,
) -> None:
    machine = failing(HostFault("broken"), times=2, point="consumed")
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start())
        reply = await worker.reply()

    assert (reply.code, reply.attempts, machine.things.there) == (Code.OK, 3, {"made"})


async def test_a_shutdown_answers_and_undoes_nothing_and_the_next_worker_continues(
    tmp_path: Path,
) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start())
        worker.send(stop("a2"), "c2")
        await worker.reply("c2")
        await machine.at_gate.wait()
        await worker.lanes.stop(5)

        assert machine.things.there == {"acme/web/a1"}
        assert [row.id for row in worker.journal.commands.unfinished()] == ["c1"]
        assert [reply.id for reply in worker.replies()] == ["c2"]
        bus = worker.bus
    gate.set()
    async with shell_worker(tmp_path / "j", bus, machine) as worker:
        reply = await worker.reply("c1")

        assert (reply.code, reply.attempts) == (Code.OK, 2)
        assert machine.things.made == ["acme/web/a1"]


async def test_a_shutdown_cancels_a_command_that_reaches_no_safe_point_in_time(
    tmp_path: Path,
) -> None:
    began = asyncio.Event()

    async def forever(request: Request, steps: Steps) -> Done:
        began.set()
        await asyncio.Event().wait()
        return DONE

    async with shell_worker(tmp_path / "j", machine=FakeHandlers(behave=forever)) as worker:
        worker.send(start())
        await began.wait()
        await worker.lanes.stop(0)

        assert worker.lanes.counts() == {"busy": 0, "waiting": 0}
        assert worker.journal.commands.is_unfinished("c1")
        assert worker.replies() == []


@pytest.mark.usefixtures("long_backoff")
async def test_a_shutdown_ends_the_wait_before_the_next_attempt(tmp_path: Path) -> None:
    limits = LimitSettings(retry_budget_s=10_000)
    machine = failing(Unavailable("busy"))
    async with shell_worker(tmp_path / "j", machine=machine, limits=limits) as worker:
        worker.send(start())
        await worker.meters.retried.wait()
        with structlog.testing.capture_logs() as logs:
            await worker.lanes.stop(5)

        # Not cancelled when the 5 s were over: the wait itself ended.
        assert [entry["event"] for entry in logs] == ["command.halted"]
        assert worker.journal.commands.is_unfinished("c1")


async def test_a_snapshot_is_measured_by_all_its_steps_not_only_those_in_the_reply(
    tmp_path: Path,
) -> None:
    async def sleeps(request: Request, steps: Steps) -> Done:
        steps.taken += [
            StepTaken("pause", 2_000_000, "done"),
            *(StepTaken("other", 5_000_000, "done") for _ in range(dispatch.STEPS_SHOWN)),
            StepTaken("snapshot_draft", 1_000_000, "done"),
        ]
        seconds = steps.seconds_of("pause", "snapshot_draft")
        return Done(changed=True, status="sleeping", snapshot=SnapshotMeasure(seconds, 7))

    async with shell_worker(tmp_path / "j", machine=FakeHandlers(behave=sleeps)) as worker:
        worker.send(SleepInstance("acme", "web", "a1", force=False))
        reply = await worker.reply()

        assert len(reply.steps) == dispatch.STEPS_SHOWN
        assert worker.meters.snapshots == [(3.0, 7)]


async def nothing() -> None:
    """The commit of a point of no return in these tests."""


async def test_the_wait_for_a_journal_that_cannot_commit_ends_with_the_deadline(
    tmp_path: Path,
) -> None:
    async def fails(_request: object, _steps: Steps) -> None:
        worker.journal.store.writer.writable = False
        worker.journal.store._writable_changed(False)
        raise JournalFault("cannot commit")

    machine = FakeHandlers(behave=fails)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start(), deadline_ms=now_ms() + 500)
        reply = await worker.reply()

    assert (reply.code, reply.attempts) == (Code.EXPIRED, 1)
    assert len(machine.runs) == 1


async def test_a_slow_launch_names_its_slowest_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("handlers.steps.time", SimpleNamespace(perf_counter=lambda: now.seconds))
    took = {"cgroup": 0.002, "start_vm": 4.5, "tap": 0.001, "wait_agent": 0.75}

    async def launch(request: Request, steps: Steps) -> Done:
        for name, seconds in took.items():

            async def do(seconds: float = seconds) -> None:
                now.seconds += seconds

            await steps.act(name, do)
        return DONE

    logged: list[list[Any]] = []
    for limit_s in (0.0, 1e6):
        monkeypatch.setattr(dispatch, "SLOW_LAUNCH_S", limit_s)
        path = tmp_path / f"j{limit_s:.0f}"
        async with shell_worker(path, machine=FakeHandlers(behave=launch)) as shell:
            with structlog.testing.capture_logs() as logs:
                shell.send(start(), "c1")
                await shell.reply()
        logged.append([each for each in logs if each["event"] in {"launch.slow", "command.done"}])

    slow, quick = logged
    assert [each["event"] for each in slow] == ["launch.slow", "command.done"]
    assert list(slow[0]["steps_ms"].items()) == [
        ("start_vm", 4500), ("wait_agent", 750), ("cgroup", 2),
    ]  # fmt: skip
    assert [each.get("slowest_step") for each in quick] == ["start_vm"]


async def test_a_command_that_has_its_outcome_is_not_run_again(tmp_path: Path) -> None:
    """As one whose row was queued twice, after a commit that failed and is in the file."""
    async with shell_worker(tmp_path / "j") as worker:
        worker.send(start())
        await worker.reply()
        sent = command(start())
        lane = Lane.of_request(sent.request)
        worker.lanes.put(CommandRow(1, sent, b"", lane, 1, 1, attempts=1))
        await worker.lanes.idle()

        assert worker.meters.done == [("StartInstance", Code.OK)]
        assert len(worker.machine.runs) == 1
