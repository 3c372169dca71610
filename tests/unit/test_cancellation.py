"""Shielded work, two things at once, and races, each also when the caller is cancelled twice."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import pytest

from handlers.cancellation import Interrupted, finish, race, run_shielded, together


class Work:
    """Work that ends when the test says so; `stubborn` work does not end by being cancelled."""

    def __init__(self, *, stubborn: bool = False) -> None:
        self.go = asyncio.Event()
        self.failure: Exception | None = None
        self.ended = False
        self._stubborn = stubborn

    async def run(self) -> str:
        try:
            await self._wait()
        finally:
            self.ended = True
        if self.failure is not None:
            raise self.failure
        return "done"

    async def _wait(self) -> None:
        while not self.go.is_set():
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                if not self._stubborn:
                    raise

    def end(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.go.set()


async def started(caller: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = asyncio.ensure_future(caller)
    await turns()
    return task


async def turns() -> None:
    """Let everything that can run do so: a few passes of the loop, no time."""
    for _ in range(10):
        await asyncio.sleep(0)


async def cancel_twice(task: asyncio.Task[Any]) -> None:
    for _ in range(2):
        task.cancel()
        await turns()


async def cancellation_of(task: asyncio.Task[Any]) -> asyncio.CancelledError:
    with pytest.raises(asyncio.CancelledError) as raised:
        await task
    return raised.value


# -- run_shielded ------------------------------------------------------------------------------


async def test_shielded_work_returns_its_result() -> None:
    work = Work()
    work.end()

    assert await run_shielded(work.run()) == "done"


async def test_shielded_work_raises_its_failure() -> None:
    work = Work()
    work.end(OSError("disk"))

    with pytest.raises(OSError, match="disk"):
        await run_shielded(work.run())


async def test_shielded_work_ends_before_two_cancellations_take_effect() -> None:
    work = Work()
    caller = await started(run_shielded(work.run()))

    await cancel_twice(caller)

    assert not caller.done()
    work.end()
    await cancellation_of(caller)
    assert work.ended


async def test_a_cancellation_wins_over_the_failure_of_shielded_work_and_names_it() -> None:
    work, failure = Work(), OSError("disk")
    caller = await started(run_shielded(work.run()))

    await cancel_twice(caller)
    work.end(failure)

    assert (await cancellation_of(caller)).__cause__ is failure


async def test_a_cancellation_that_races_the_end_of_shielded_work_is_not_lost() -> None:
    work = Work()
    caller = await started(run_shielded(work.run()))

    work.end()
    await asyncio.sleep(0)  # the work has ended, the caller has not yet been resumed
    caller.cancel()

    await cancellation_of(caller)
    assert work.ended


async def test_shielded_work_is_asked_once_to_end_early() -> None:
    work, asked = Work(), list[str]()
    caller = await started(run_shielded(work.run(), on_cancel=lambda: asked.append("stop")))

    await cancel_twice(caller)
    work.end()
    await cancellation_of(caller)

    assert asked == ["stop"]


async def test_work_that_cancels_itself_cancels_the_caller() -> None:
    async def give_up() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await run_shielded(give_up())


async def test_a_timeout_around_shielded_work_takes_effect_after_it() -> None:
    work = Work()

    async def within_no_time() -> None:
        async with asyncio.timeout(0):
            await run_shielded(work.run())

    caller = await started(within_no_time())
    assert not caller.done()
    work.end()

    with pytest.raises(TimeoutError):
        await caller


# -- finish ------------------------------------------------------------------------------------


async def test_finish_returns_the_cancellation_that_came_meanwhile() -> None:
    works = Work(), Work()
    tasks = [asyncio.ensure_future(work.run()) for work in works]
    caller = await started(finish(*tasks))

    await cancel_twice(caller)
    works[0].end()
    await turns()
    assert not caller.done()
    works[1].end()

    assert isinstance(await caller, asyncio.CancelledError)


async def test_finish_of_nothing_cancelled_returns_none() -> None:
    work = Work()
    work.end()

    assert await finish(asyncio.ensure_future(work.run())) is None


# -- together ----------------------------------------------------------------------------------


async def test_together_returns_both_results() -> None:
    one, other = Work(), Work()
    one.end()
    other.end()

    assert await together(one.run(), other.run()) == ("done", "done")


@pytest.mark.parametrize("failing", [0, 1])
async def test_the_failure_of_one_part_waits_for_the_other(failing: int) -> None:
    works = Work(), Work()
    caller = await started(together(works[0].run(), works[1].run()))

    works[failing].end(OSError("disk"))
    await turns()
    assert not caller.done()
    works[1 - failing].end()

    with pytest.raises(OSError, match="disk"):
        await caller
    assert works[1 - failing].ended


async def test_of_two_failures_the_first_part_s_is_raised() -> None:
    one, other = Work(), Work()
    one.end(OSError("first"))
    other.end(OSError("second"))

    with pytest.raises(OSError, match="first"):
        await together(one.run(), other.run())


async def test_both_parts_have_ended_when_two_cancellations_take_effect() -> None:
    one, stubborn = Work(), Work(stubborn=True)
    caller = await started(together(one.run(), stubborn.run()))

    await cancel_twice(caller)
    assert one.ended
    assert not caller.done()
    stubborn.end()

    await cancellation_of(caller)
    assert stubborn.ended


async def test_a_failure_does_not_hide_a_cancellation_of_two_parts() -> None:
    one, stubborn = Work(), Work(stubborn=True)
    caller = await started(together(one.run(), stubborn.run()))

    caller.cancel()
    await turns()
    stubborn.end(OSError("disk"))

    await cancellation_of(caller)


# -- race --------------------------------------------------------------------------------------


async def test_work_that_is_done_first_wins_the_race() -> None:
    work, until = Work(), Work()
    work.end()

    assert await race(work.run(), until.run()) == "done"
    assert until.ended


async def test_work_that_is_done_at_the_same_moment_wins_the_race() -> None:
    work, until = Work(), Work()
    work.end()
    until.end()

    assert await race(work.run(), until.run()) == "done"


async def test_a_failure_of_the_work_is_raised() -> None:
    work, until = Work(), Work()
    work.end(OSError("disk"))

    with pytest.raises(OSError, match="disk"):
        await race(work.run(), until.run())
    assert until.ended


async def test_a_lost_race_has_cancelled_the_work() -> None:
    work, until = Work(), Work()
    until.end()

    with pytest.raises(Interrupted):
        await race(work.run(), until.run())
    assert work.ended


async def test_a_lost_race_names_the_failure_of_the_other_side() -> None:
    work, until, failure = Work(), Work(), OSError("pidfd")
    until.end(failure)

    with pytest.raises(Interrupted) as raised:
        await race(work.run(), until.run())
    assert raised.value.__cause__ is failure


async def test_a_race_out_of_time_is_lost_and_both_sides_have_ended() -> None:
    work, until = Work(), Work()

    with pytest.raises(Interrupted):
        await race(work.run(), until.run(), timeout_s=0)
    assert work.ended
    assert until.ended


async def test_both_sides_of_a_race_have_ended_when_two_cancellations_take_effect() -> None:
    stubborn, until = Work(stubborn=True), Work()
    caller = await started(race(stubborn.run(), until.run()))

    await cancel_twice(caller)
    assert until.ended
    assert not caller.done()
    stubborn.end()

    await cancellation_of(caller)


async def test_a_lost_race_waits_for_work_that_cannot_be_cut() -> None:
    stubborn, until = Work(stubborn=True), Work()
    until.end()
    caller = await started(race(stubborn.run(), until.run()))

    assert not caller.done()
    with contextlib.suppress(Interrupted):
        stubborn.end(OSError("too late to matter"))
        await caller
    assert stubborn.ended
