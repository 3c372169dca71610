"""Waiting for work whose effects must not be cut short, whatever happens to the waiting task.

A step that was cancelled may still be changing the host: a thread cannot be stopped, a program that
was spawned runs. So each of these functions returns or raises only when everything that it started
has ended, also if the caller is cancelled twice; and a cancellation is never lost, since a worker
that shuts down would then retry the command. Nothing here knows what the work is.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Interrupted(Exception):
    """`race`: the other side ended, or the time was up, before the work was done."""


class Uncut(asyncio.Future[T]):
    """The result of work that cannot be stopped, for one task to await: if that task is cancelled,
    it waits on, and the cancellation takes effect once there is a result.

    As `run_shielded`, without a task and a turn of the loop of its own. Source: asyncio's
    `Task.cancel`: what the task awaits is cancelled if it can be, else the task is thrown
    CancelledError when it continues.
    """

    def cancel(self, msg: object = None) -> bool:  # noqa: ARG002 - asyncio's
        return False


async def finish(*work: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait until all of the work has ended, however often the caller is cancelled meanwhile.

    Returns the last of these cancellations, for the caller to raise or to drop.
    """
    cancelled: asyncio.CancelledError | None = None
    while pending := [each for each in work if not each.done()]:
        try:
            await _ended(*pending)
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


async def run_shielded(work: Awaitable[T], *, on_cancel: Callable[[], None] | None = None) -> T:
    """Run the work to its end, then let a cancellation that arrived meanwhile take effect.

    `on_cancel` may ask the work to end early; it is called once, at the first cancellation.

    Raises:
        CancelledError: the caller was cancelled; if the work failed as well, that is the cause.
    """
    task = asyncio.ensure_future(work)
    try:
        await _ended(task)
    except asyncio.CancelledError as first:
        if on_cancel is not None:
            on_cancel()
        cancelled = await finish(task) or first
        raise cancelled from _failure(task)
    return task.result()


async def together(one: Coroutine[Any, Any, T], other: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """Run two parts of a command that do not depend on each other; both have ended on return.

    If one fails the other is not cancelled: an effect that has begun is completed, so that undo
    finds the host at rest. Raises the first one's failure, else the other's.
    """
    loop = asyncio.get_running_loop()
    tasks = loop.create_task(one), loop.create_task(other)
    try:
        await _ended(*tasks)
    except asyncio.CancelledError:
        await _cancel(*tasks)
        raise
    results = [_failure(task) for task in tasks]
    for failure in results:
        if failure is not None:
            raise failure
    return tasks[0].result(), tasks[1].result()


async def race(
    work: Coroutine[Any, Any, T],
    until: Coroutine[Any, Any, object],
    *,
    timeout_s: float | None = None,
) -> T:
    """Do the work, but no longer than `until` runs or the time lasts; both have ended on return.

    Work that is done counts, also if `until` ended at the same moment.

    Raises:
        Interrupted: the work was cancelled; if `until` failed, that is the cause.
    """
    loop = asyncio.get_running_loop()
    working, stopping = loop.create_task(work), loop.create_task(until)
    try:
        await asyncio.wait(
            {working, stopping}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if working.done():
            return working.result()
        raise Interrupted from (_failure(stopping) if stopping.done() else None)
    finally:
        await _cancel(working, stopping)


async def _ended(*work: asyncio.Future[Any]) -> None:
    """Wait until all of the work has ended; a cancellation ends the wait and leaves the work alone.

    Not `asyncio.wait`, which costs three times as much and is in every step of a command.
    """
    waiter = asyncio.get_running_loop().create_future()
    left = len(work)

    def one_ended(_: asyncio.Future[Any]) -> None:
        nonlocal left
        left -= 1
        if not left and not waiter.done():
            waiter.set_result(None)

    for each in work:
        each.add_done_callback(one_ended)
    try:
        await waiter
    finally:
        for each in work:
            each.remove_done_callback(one_ended)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel the tasks and wait for their end; what they then raise is nobody's result.

    Raises:
        CancelledError: the caller was cancelled meanwhile.
    """
    for task in tasks:
        task.cancel()
    cancelled = await finish(*tasks)
    for task in tasks:
        _failure(task)
    if cancelled is not None:
        raise cancelled


def _failure(task: asyncio.Future[Any]) -> BaseException | None:
    """The exception of a task that has ended; asking for it keeps asyncio from logging it."""
    return None if task.cancelled() else task.exception()
