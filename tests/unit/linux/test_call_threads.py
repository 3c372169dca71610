"""Calls run in threads, in order where there is one; one that hangs is left and replaced."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import Any

import pytest

from handlers.errors import Abandoned, Unavailable
from handlers.host.linux import file_threads
from handlers.host.linux.call_threads import (
    SPARE,
    CallThreads,
    Progress,
    exhausted_kinds,
    hung_calls,
)
from handlers.host.vmm.migration import MigrationLock

LIMIT_S = 0.05


class State:
    """What a thread opens: its own, with what was done to it."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.closed = threading.Event()


class Rig:
    """Threads of one kind, and calls of theirs that hang until `release`."""

    def __init__(self, count: int = 1, limit_s: float = LIMIT_S) -> None:
        self.states: list[State] = []
        self.entered: list[int] = []
        self.released = threading.Event()
        self.threads = CallThreads(
            "test",
            limit_s=limit_s,
            open=self._open,
            close=lambda state: state.closed.set(),
            enter=lambda: self.entered.append(threading.get_ident()),
            count=count,
        )

    def _open(self) -> State:
        self.states.append(State())
        return self.states[-1]

    def hang(self, state: State) -> str:
        assert state.thread == threading.get_ident()
        assert self.released.wait(60)
        return "late"

    async def abandon(self, times: int = 1) -> list[Abandoned]:
        """Have so many calls abandoned, one after the other."""
        failures: list[Abandoned] = []
        for _each in range(times):
            with pytest.raises(Abandoned) as caught:
                await self.threads.run(self.hang)
            failures.append(caught.value)
        return failures

    async def until_returned(self) -> None:
        self.released.set()
        async with asyncio.timeout(30):
            while self.threads.hung:
                await asyncio.sleep(0.001)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.released.set()
    rig.threads.stop()


def threads_of(kind: str) -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith(f"{kind}_")]


async def test_calls_run_in_order_in_one_thread_that_was_entered_first(rig: Rig) -> None:
    seen: list[tuple[int, int]] = []

    def note(number: int, state: State) -> None:
        seen.append((number, threading.get_ident()))

    await asyncio.gather(*(rig.threads.run(partial(note, n)) for n in range(5)))
    rig.threads.stop()

    assert [number for number, _ in seen] == list(range(5))
    assert {where for _, where in seen} == set(rig.entered) == {rig.states[0].thread}
    assert len(rig.entered) == 1
    assert rig.states[0].closed.is_set()


async def test_a_result_and_an_error_come_back(rig: Rig) -> None:
    assert await rig.threads.run(lambda _: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await rig.threads.run(lambda _: 1 // 0)
    assert await rig.threads.run(lambda _: 8) == 8


@pytest.mark.parametrize("part", ["enter", "open"])
async def test_each_call_raises_what_entering_or_opening_raised(part: str) -> None:
    def refuse() -> Any:
        raise PermissionError(part)

    given: dict[str, Any] = {"enter": lambda: None, "open": lambda: None} | {part: refuse}
    threads: CallThreads[Any] = CallThreads("test", limit_s=9, close=lambda _: None, **given)
    for _twice in range(2):
        with pytest.raises(PermissionError, match=part):
            await threads.run(lambda _: 1)
    threads.stop()


async def test_a_call_that_is_cancelled_before_it_begins_is_left_out() -> None:
    rig = Rig(limit_s=60)
    begun = threading.Event()
    ran: list[str] = []

    def hold(state: State) -> None:
        begun.set()
        rig.hang(state)
        ran.append("first")

    first = asyncio.ensure_future(rig.threads.run(hold))
    await asyncio.to_thread(begun.wait)
    second = asyncio.ensure_future(rig.threads.run(lambda _: ran.append("second")))
    third = rig.threads.begin(lambda _: ran.append("third"))
    await asyncio.sleep(0)
    for task in (first, second):
        task.cancel()
    third.withdraw()
    await asyncio.gather(first, second, return_exceptions=True)
    assert third.future.cancelled()
    rig.released.set()
    await rig.threads.run(lambda _: ran.append("fourth"))
    rig.threads.stop()

    assert ran == ["first", "fourth"]


async def test_a_call_that_has_begun_is_not_withdrawn() -> None:
    rig = Rig(limit_s=60)
    begun = threading.Event()

    def hold(state: State) -> str:
        begun.set()
        return rig.hang(state)

    call = rig.threads.begin(hold)
    await asyncio.to_thread(begun.wait)
    call.withdraw()
    rig.released.set()

    assert await call.future == "late"
    rig.threads.stop()


async def test_stopped_threads_take_no_call(rig: Rig) -> None:
    rig.threads.stop()
    rig.threads.stop()

    with pytest.raises(RuntimeError, match="stopped"):
        await rig.threads.run(lambda _: 1)


def test_a_loop_that_is_closed_before_the_call_ends_harms_nothing() -> None:
    rig = Rig(limit_s=60)

    async def leave() -> None:
        waiting = asyncio.ensure_future(rig.threads.run(rig.hang))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(leave())
    rig.released.set()

    assert asyncio.run(rig.threads.run(lambda _: 5)) == 5
    rig.threads.stop()


async def test_as_many_threads_as_calls_but_no_more_than_the_count() -> None:
    rig = Rig(count=3, limit_s=60)
    barrier = threading.Barrier(3)

    await rig.threads.run(lambda _: None)
    await rig.threads.run(lambda _: None)
    assert len(rig.states) == 1
    await asyncio.gather(*(rig.threads.run(lambda _: barrier.wait(30)) for _ in range(6)))

    assert len(rig.states) == 3
    rig.threads.stop()


async def test_a_call_that_hangs_is_abandoned_and_the_next_one_gets_a_thread_of_its_own(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = asyncio.gather(rig.threads.run(rig.hang), rig.threads.run(lambda s: s.thread))
    with pytest.raises(Abandoned, match="may still take effect"):
        await waiting
    there = await rig.threads.run(lambda state: state.thread)

    hung, fresh = rig.states
    assert there == fresh.thread != hung.thread
    assert rig.threads.hung == hung_calls()["test"] == rig.threads.abandoned == 1
    log = capsys.readouterr().out
    assert "call.abandoned" in log
    assert "test_call_threads.py" in log  # where it hangs
    assert not hung.closed.is_set()


async def test_what_waits_behind_a_call_that_hangs_goes_on_without_another_call(rig: Rig) -> None:
    hanging = asyncio.ensure_future(rig.threads.run(rig.hang))
    behind = asyncio.ensure_future(rig.threads.run(lambda _: "done"))

    assert await asyncio.wait_for(behind, 30) == "done"
    with pytest.raises(Abandoned):
        await hanging


async def test_a_thread_that_returns_late_is_accounted_and_ends_with_its_state(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    (failure,) = await rig.abandon()
    assert failure.pending()

    await rig.until_returned()

    assert not failure.pending()
    assert rig.states[0].closed.is_set()
    assert "call.returned" in capsys.readouterr().out
    assert await rig.threads.run(lambda state: state is rig.states[-1])
    assert len(threads_of("test")) == 1


async def test_beyond_the_spare_threads_calls_fail_at_once_until_one_returns(rig: Rig) -> None:
    await rig.abandon(SPARE)
    behind = asyncio.gather(
        rig.threads.run(rig.hang), rig.threads.run(lambda _: 1), return_exceptions=True
    )
    last, refused = await behind
    assert isinstance(last, Abandoned)
    assert type(refused) is Unavailable

    with pytest.raises(Unavailable, match="5 calls of kind test hang"):
        await rig.threads.run(lambda _: 1)
    assert exhausted_kinds() == ("test",)
    assert len(threads_of("test")) == SPARE + 1

    await rig.until_returned()
    assert await rig.threads.run(lambda _: 1) == 1
    assert exhausted_kinds() == ()


async def test_a_call_that_makes_progress_is_not_abandoned() -> None:
    rig = Rig(limit_s=1.0)  # of which a busy machine uses up some between two steps
    progress = Progress()
    steps = threading.Event()

    def work(_: State) -> str:
        for _each in range(30):
            steps.wait(0.05)
            progress.made()
        return "done"

    try:
        assert await rig.threads.begin(work, progress).future == "done"
        assert rig.threads.abandoned == 0
    finally:
        rig.threads.stop()


async def test_stopping_does_not_wait_for_a_call_that_was_abandoned(rig: Rig) -> None:
    await rig.abandon()

    rig.threads.stop()

    assert rig.threads.hung == 1


async def test_work_that_nobody_waits_for_is_left_out_while_too_many_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()
    monkeypatch.setattr(file_threads, "_quick", rig.threads)
    migration = MigrationLock("/nowhere")
    try:
        await rig.abandon(1 + SPARE)
        assert file_threads.start_in_thread(lambda: None) is False
        migration.prepare()
        await rig.until_returned()
        assert file_threads.start_in_thread(lambda: None) is True
    finally:
        rig.released.set()
        rig.threads.stop()


# -- a call whose caller is cancelled ------------------------------------------------------------


class Held:
    """Work in a thread that ends when the test says so; then it returns, or raises `failure`."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.ended = False
        self._failure = failure

    def run(self) -> str:
        self.begun.set()
        assert self.go.wait(60)
        self.ended = True
        if self._failure is not None:
            raise self._failure
        return "done"


async def begun(held: Held, caller: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = asyncio.create_task(caller)
    while not held.begun.is_set():
        await asyncio.sleep(0.001)
    return task


@pytest.mark.parametrize("failure", [None, OSError("disk")])
async def test_a_cancelled_caller_waits_for_the_thread_and_is_cancelled_then(
    failure: Exception | None,
) -> None:
    held = Held(failure)
    caller = await begun(held, file_threads.run_in_thread(held.run))

    for _ in range(2):
        caller.cancel()
        await asyncio.sleep(0.001)

    assert not caller.done()
    held.go.set()
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await caller
    assert held.ended
    assert cancelled.value.__cause__ is failure


async def test_a_cancellation_that_races_the_end_of_the_thread_is_not_lost() -> None:
    rig = Rig(limit_s=60)
    future = rig.threads.begin_uncut(rig.hang)

    async def result() -> str:
        return await future

    caller = asyncio.create_task(result())
    await asyncio.sleep(0)
    rig.released.set()
    while not future.done():
        await asyncio.sleep(0)
    caller.cancel()

    with pytest.raises(asyncio.CancelledError):
        await caller
    rig.threads.stop()


async def test_a_timeout_takes_effect_once_the_thread_has_ended() -> None:
    held = Held()

    async def within_no_time() -> None:
        async with asyncio.timeout(0):
            await file_threads.run_in_thread(held.run)

    caller = await begun(held, within_no_time())
    await asyncio.sleep(0.001)
    assert not caller.done()
    held.go.set()

    with pytest.raises(TimeoutError):
        await caller
