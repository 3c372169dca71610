"""What ends a running command, and what no longer does past its point of no return."""

import asyncio
from collections.abc import Callable

import pytest

from handlers.control import Control, Halted
from handlers.errors import Expired, Superseded


class Clock:
    """A clock that the test sets."""

    def __init__(self, now_ms: int) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


def test_a_safe_point_passes_before_the_deadline_and_expires_at_it() -> None:
    clock = Clock(1_000)
    control = Control(3_000, clock)

    control.safe_point()
    assert control.left_s() == 2.0
    clock.now_ms = 3_000

    with pytest.raises(Expired):
        control.safe_point()


def test_without_a_deadline_nothing_expires() -> None:
    control = Control(None, Clock(1 << 60))

    control.safe_point()

    assert control.left_s() is None


def test_a_later_command_ends_it_and_is_named() -> None:
    control = Control()
    control.supersede("c2")

    with pytest.raises(Superseded) as superseded:
        control.safe_point()

    assert superseded.value.detail == {"by": "c2"}


def test_past_the_point_of_no_return_only_a_shutdown_stops_it() -> None:
    control = Control(0, Clock(1))
    control.supersede("c2")
    control.finalize()

    control.safe_point()
    control.halt()

    with pytest.raises(Halted):
        control.safe_point()


def superseded(control: Control) -> None:
    control.supersede("c2")


def halted(control: Control) -> None:
    control.halt()


@pytest.mark.parametrize(
    ("end", "raised"),
    [(superseded, Superseded), (halted, Halted)],
    ids=["superseded", "halted"],
)
async def test_a_wait_is_interrupted_and_what_it_waited_for_is_cancelled(
    end: Callable[[Control], None], raised: type[BaseException]
) -> None:
    control = Control()
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    waiting = asyncio.create_task(control.interruptible("wait_agent", work))
    await begun.wait()
    end(control)

    with pytest.raises(raised):
        await waiting
    assert cancelled.is_set()


async def test_a_wait_past_its_deadline_names_the_step() -> None:
    control = Control(1, Clock(0))  # 1 ms are left, and the clock stands still

    with pytest.raises(Expired) as expired:
        await control.interruptible("wait_agent", asyncio.Event().wait)

    assert expired.value.detail == {"step": "wait_agent"}


async def test_a_result_that_is_there_is_returned_even_if_superseded() -> None:
    control = Control()

    async def work() -> int:
        control.supersede("c2")
        return 7

    assert await control.interruptible("wait_agent", work) == 7


async def test_supersede_ends_the_pause_between_two_attempts() -> None:
    control = Control()
    control.supersede("c2")

    with pytest.raises(Superseded):
        await control.pause(3_600)


async def test_a_hurried_command_gives_a_guest_no_more_time_and_goes_on() -> None:
    control = Control()
    control.finalize()
    begun = asyncio.Event()

    async def wait() -> bool:
        begun.set()
        return await asyncio.Event().wait()

    waiting = asyncio.create_task(control.unhurried(wait))
    await begun.wait()
    control.hurry()

    assert await waiting is None
    assert await control.unhurried(wait) is None
    control.safe_point()
