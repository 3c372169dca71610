"""Slots for heavy work: no tenant takes them all, nobody waits for ever, none gets lost."""

import asyncio
import dataclasses

import pytest

from handlers.concurrency import FairSlots, Slots
from schemas.settings import LimitSettings

KINDS = [field.name for field in dataclasses.fields(Slots)]


@pytest.mark.parametrize("kind", KINDS)
async def test_one_tenant_never_takes_all_slots_of_any_kind(kind: str) -> None:
    slots = getattr(Slots.of(LimitSettings()), kind)
    greedy = [asyncio.create_task(slots.acquire("greedy")) for _ in range(3 * slots.count)]
    await asyncio.sleep(0)

    async with asyncio.timeout(10):
        await slots.acquire("other")

    assert slots.held("greedy") == slots.share < slots.count
    for task in greedy:
        task.cancel()
    await asyncio.gather(*greedy, return_exceptions=True)


def test_each_semaphore_of_the_handlers_is_fair() -> None:
    kinds = {field.name: field.type for field in dataclasses.fields(Slots)}

    assert set(kinds.values()) == {FairSlots}


async def test_a_single_slot_can_be_had_by_anyone() -> None:
    slots = FairSlots(1)
    await slots.acquire("a")
    turn = asyncio.create_task(slots.acquire("b"))
    await asyncio.sleep(0)

    slots.release("a")

    async with asyncio.timeout(10):
        await turn
    assert (slots.held("a"), slots.held("b")) == (0, 1)


async def test_the_tenant_with_the_fewest_slots_is_next() -> None:
    slots = FairSlots(4)
    for tenant in ("a", "a", "b", "c"):
        await slots.acquire(tenant)
    turns = {name: asyncio.create_task(slots.acquire(name)) for name in ("b", "d")}
    await asyncio.sleep(0)

    slots.release("a")

    async with asyncio.timeout(10):
        await turns["d"]
    assert not turns["b"].done()
    slots.release("c")
    async with asyncio.timeout(10):
        await turns["b"]


async def test_a_tenant_at_its_share_is_passed_over_until_it_releases() -> None:
    slots = FairSlots(4)
    for _ in range(2):
        await slots.acquire("a")
    third = asyncio.create_task(slots.acquire("a"))
    await asyncio.sleep(0)
    await slots.acquire("b")

    slots.release("b")
    await asyncio.sleep(0)
    assert not third.done()

    slots.release("a")
    async with asyncio.timeout(10):
        await third


@pytest.mark.parametrize("granted", [False, True])
async def test_a_cancelled_wait_leaves_no_slot_taken(*, granted: bool) -> None:
    slots = FairSlots(1)
    await slots.acquire("a")
    turn = asyncio.create_task(slots.acquire("b"))
    await asyncio.sleep(0)

    if granted:
        slots.release("a")  # its turn comes before the cancellation arrives
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    if not granted:
        slots.release("a")

    assert slots.waiting == 0
    assert slots.available("c")
    assert (slots.held("a"), slots.held("b")) == (0, 0)
