"""What waits for the commit of a command that was taken in."""

import asyncio

import pytest

from worker.journal.memory import Admission
from worker.journal.writer import JournalFault


async def test_all_that_wait_continue_in_the_turn_after_the_decision() -> None:
    admission = Admission()
    waiting = [asyncio.create_task(admission.wait()) for _ in range(3)]
    await asyncio.sleep(0)

    admission.decide()
    await asyncio.sleep(0)

    assert [each.done() for each in waiting] == [True, True, True]
    await admission.wait()


async def test_one_that_is_cancelled_cancels_no_other() -> None:
    admission = Admission()
    first, second = (asyncio.create_task(admission.wait()) for _ in range(2))
    await asyncio.sleep(0)

    first.cancel()
    await asyncio.sleep(0)
    admission.decide()
    await second

    assert first.cancelled()


async def test_a_failed_commit_is_raised_to_each_also_later() -> None:
    admission = Admission()
    waiting = asyncio.create_task(admission.wait())
    await asyncio.sleep(0)

    admission.decide(JournalFault("no space"))

    for each in (waiting, admission.wait()):
        with pytest.raises(JournalFault, match="no space"):
            await each
    assert admission.decided
