"""Calls of one kernel interface run in one thread, in order, and a loop waits for none of them."""

import asyncio
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from handlers.host.linux.kernel_thread import KernelThread


@pytest.fixture
def thread() -> Iterator[KernelThread]:
    made = KernelThread("test")
    yield made
    made.stop(lambda: None)


async def test_calls_run_in_order_in_one_thread_that_was_entered_first() -> None:
    seen: list[tuple[str, int]] = []

    def note(what: str) -> None:
        seen.append((what, threading.get_ident()))

    thread = KernelThread("test", lambda: note("enter"))
    await asyncio.gather(*(thread.run(partial(note, str(n))) for n in range(5)))
    thread.stop(lambda: note("last"))

    assert [what for what, _ in seen] == ["enter", "0", "1", "2", "3", "4", "last"]
    assert len({where for _, where in seen}) == 1
    assert seen[0][1] != threading.get_ident()


async def test_a_result_and_an_error_come_back(thread: KernelThread) -> None:
    assert await thread.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await thread.run(lambda: 1 // 0)
    assert await thread.run(lambda: 8) == 8


async def test_each_call_raises_what_entering_raised() -> None:
    def refuse() -> None:
        raise PermissionError("setns")

    thread = KernelThread("test", refuse)
    for _twice in range(2):
        with pytest.raises(PermissionError):
            await thread.run(lambda: 1)
    thread.stop(lambda: None)


async def test_a_call_that_is_cancelled_before_it_begins_is_left_out(thread: KernelThread) -> None:
    begun, go = threading.Event(), threading.Event()
    ran: list[str] = []

    def hold() -> None:
        begun.set()
        go.wait()
        ran.append("first")

    first = asyncio.ensure_future(thread.run(hold))
    await asyncio.to_thread(begun.wait)
    second = asyncio.ensure_future(thread.run(lambda: ran.append("second")))
    await asyncio.sleep(0)
    for task in (first, second):
        task.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    go.set()
    await thread.run(lambda: ran.append("third"))

    assert ran == ["first", "third"]


async def test_a_stopped_thread_takes_no_call() -> None:
    thread = KernelThread("test")
    ended: list[int] = []
    thread.stop(lambda: ended.append(1))
    thread.stop(lambda: ended.append(2))

    with pytest.raises(RuntimeError, match="stopped"):
        await thread.run(lambda: 1)
    assert ended == [1]


def test_a_loop_that_is_closed_before_the_call_ends_harms_nothing() -> None:
    go = threading.Event()
    thread = KernelThread("test")

    async def leave() -> None:
        waiting = asyncio.ensure_future(thread.run(go.wait))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(leave())
    go.set()

    assert asyncio.run(thread.run(lambda: 5)) == 5
    thread.stop(lambda: None)
