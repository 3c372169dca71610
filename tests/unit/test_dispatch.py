"""One run of one command: attempts, undo, and what the sender is told."""

import asyncio
import errno
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import structlog

from handlers.errors import (
    Conflict,
    Draining,
    Exhausted,
    Failure,
    HostFault,
    Invalid,
    NotFound,
    Unavailable,
    Unsupported,
    of_os_error,
)
from handlers.steps import Done, Steps
from schemas.codes import Code
from schemas.requests import Error, Request
from schemas.settings import LimitSettings
from tests.fakes.shell_worker import FakeHandlers, Thing, shell_worker, start, stop
from worker.journal.store import now_ms

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
        (Draining("drained"), Code.DRAINING, "scheduler", True),
        (HostFault("broken"), Code.HOST_FAULT, "operator", False),
        (Unavailable("busy").not_retryable(), Code.UNAVAILABLE, "sender", True),
        (OSError(errno.ENOSPC, "x", "/disk"), Code.EXHAUSTED, "scheduler", True),
        (PermissionError(errno.EPERM, "x", "/dev/net/tun"), Code.HOST_FAULT, "operator", False),
    ],
)
async def test_a_failure_is_not_tried_again_undone_and_says_who_must_act(
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


async def test_unsupported_names_the_protocols_that_are(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j", machine=failing(Unsupported("volumes"))) as worker:
        worker.send(start())
        reply = await worker.reply()

    assert (reply.code, reply.supported) == (Code.UNSUPPORTED, ("1", "2"))


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("busy"),
        OSError(errno.EBUSY, "busy"),
        TimeoutError(),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    ],
)
async def test_what_is_busy_is_tried_again_here(tmp_path: Path, error: Exception) -> None:
    machine = failing(error, times=2)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start())
        reply = await worker.reply()

        assert (reply.code, reply.attempts, reply.changed) == (Code.OK, 3, True)
        assert machine.things.made == ["made"]
        assert worker.meters.retries == [Code.UNAVAILABLE] * 2
        assert worker.meters.done == [("StartInstance", Code.OK)]


def wait_between_attempts(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """The backoff draws these, then more than any budget."""
    drawn = itertools.chain(seconds, itertools.repeat(1e6))

    def draw(_low: float, _high: float) -> float:
        return next(drawn)

    monkeypatch.setattr(random, "uniform", draw)


async def test_attempts_end_with_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_between_attempts(monkeypatch, 0.0, 0.0)
    limits = LimitSettings(retry_budget_s=1000.0)
    async with shell_worker(
        tmp_path / "j", machine=failing(Unavailable("busy")), limits=limits
    ) as worker:
        worker.send(start())
        reply = await worker.reply()

    assert (reply.code, reply.retryable, reply.attempts) == (Code.UNAVAILABLE, True, 3)


async def test_an_attempt_that_took_the_whole_budget_is_the_last(tmp_path: Path) -> None:
    class Slow(Failing):
        async def __call__(self, request: Request, steps: Steps) -> Done:
            await asyncio.sleep(limits.retry_budget_s)
            return await super().__call__(request, steps)

    limits = LimitSettings(retry_budget_s=0.05)
    machine = FakeHandlers(behave=(behave := Slow(Unavailable("busy"))))
    behave.machine = machine
    async with shell_worker(tmp_path / "j", machine=machine, limits=limits) as worker:
        worker.send(start())
        reply = await worker.reply()

    assert (reply.code, reply.attempts) == (Code.UNAVAILABLE, 1)


async def test_attempts_end_with_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_between_attempts(monkeypatch, 0.0)
    machine = failing(Unavailable("busy"))
    limits = LimitSettings(retry_budget_s=2e6)  # the deadline alone ends it
    async with shell_worker(tmp_path / "j", machine=machine, limits=limits) as worker:
        worker.send(start(), deadline_ms=now_ms() + 600_000)
        reply = await worker.reply()

    assert (reply.code, reply.attempts) == (Code.UNAVAILABLE, 2)
    assert machine.things.there == set()


async def test_an_expired_command_is_not_started(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.send(start(), deadline_ms=now_ms() - 1)
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


async def test_a_detail_that_has_no_msgpack_is_internal_and_blocks_nothing(tmp_path: Path) -> None:
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


async def test_what_cannot_be_undone_is_left_behind_by_name_and_record(tmp_path: Path) -> None:
    machine = failing(Conflict("no"))
    machine.things.stuck = True
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start())
        reply = await worker.reply()

        assert (reply.code, reply.left_behind) == (Code.CONFLICT, ("things made",))
        assert [row.key for row in worker.journal.leftovers()["c1"]] == ["made"]


async def test_a_bug_in_an_undo_leaves_behind_and_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def buggy(key: str) -> None:
        raise KeyError(key)

    machine = failing(Conflict("no"))
    monkeypatch.setattr(machine.things, "remove", buggy)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start())
        reply = await worker.reply()

        assert (reply.code, reply.left_behind) == (Code.CONFLICT, ("things made",))
        assert [row.key for row in worker.journal.leftovers()["c1"]] == ["made"]


async def test_past_a_point_of_no_return_a_failure_is_retried_and_never_undone(
    tmp_path: Path,
) -> None:
    machine = failing(HostFault("broken"), times=2, point="consumed")
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start())
        reply = await worker.reply()

    assert (reply.code, reply.attempts, machine.things.there) == (Code.OK, 3, {"made"})


async def test_a_shutdown_answers_and_undoes_nothing_and_the_next_worker_goes_on(
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
        assert [row.id for row in worker.journal.unfinished()] == ["c1"]
        assert [reply.id for reply in worker.replies()] == ["c2"]
        bus = worker.bus
    gate.set()
    async with shell_worker(tmp_path / "j", bus, machine) as worker:
        reply = await worker.reply("c1")

        assert (reply.code, reply.attempts) == (Code.OK, 2)
        assert machine.things.made == ["acme/web/a1"]


async def test_a_shutdown_cancels_what_reaches_no_safe_point_in_its_budget(tmp_path: Path) -> None:
    began = asyncio.Event()

    async def forever(request: Request, steps: Steps) -> Done:
        began.set()
        await asyncio.Event().wait()
        return DONE

    async with shell_worker(tmp_path / "j", machine=FakeHandlers(behave=forever)) as worker:
        worker.send(start())
        await began.wait()
        await worker.lanes.stop(0.05)

        assert worker.lanes.counts() == {"busy": 0, "waiting": 0}
        assert worker.journal.is_unfinished("c1")
        assert worker.replies() == []


async def test_a_shutdown_ends_the_wait_before_the_next_attempt(tmp_path: Path) -> None:
    limits = LimitSettings(retry_budget_s=600)
    machine = failing(Unavailable("busy"))
    async with shell_worker(tmp_path / "j", machine=machine, limits=limits) as worker:
        worker.send(start())
        async with asyncio.timeout(10):
            while not worker.meters.retries:
                await asyncio.sleep(0)
        await asyncio.wait_for(worker.lanes.stop(5), 2)

        assert worker.journal.is_unfinished("c1")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EAGAIN, Unavailable),
        (errno.EBUSY, Unavailable),
        (errno.EINTR, Unavailable),
        (errno.ENOBUFS, Unavailable),
        (errno.ETIMEDOUT, Unavailable),
        (errno.ENOMEM, Exhausted),
        (errno.ENOSPC, Exhausted),
        (errno.EDQUOT, Exhausted),
        (errno.EMFILE, Exhausted),
        (errno.EACCES, HostFault),
        (errno.EPERM, HostFault),
        (errno.EIO, HostFault),
        (errno.ENOTTY, HostFault),
        (None, HostFault),
    ],
)
def test_each_errno_says_who_must_act(number: int | None, kind: type[Failure]) -> None:
    failure = of_os_error(OSError(number, "text") if number else OSError("text"))

    assert type(failure) is kind


async def nothing() -> None:
    """What a point of no return of these tests commits."""
