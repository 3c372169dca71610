"""The tenant's network lock: shared or exclusive, fair; a cancelled waiter changes nothing."""

import asyncio
from contextlib import AbstractAsyncContextManager

import pytest

from handlers.tenant_locks import TenantLocks


class Hold:
    """A holder of the lock, until `leave`."""

    def __init__(self, lock: AbstractAsyncContextManager[None]) -> None:
        self._lock = lock
        self._leave = asyncio.Event()
        self.inside = asyncio.Event()
        self.task = asyncio.create_task(self._hold())

    async def _hold(self) -> None:
        async with self._lock:
            self.inside.set()
            await self._leave.wait()

    async def leave(self) -> None:
        self._leave.set()
        await self.task


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_sharers_hold_it_together() -> None:
    locks = TenantLocks()
    first, second = Hold(locks.shared("acme")), Hold(locks.shared("acme"))

    await settle()

    assert first.inside.is_set()
    assert second.inside.is_set()
    await first.leave()
    await second.leave()


@pytest.mark.parametrize(("one", "other"), [(True, True), (True, False), (False, True)])
async def test_exclusive_excludes_every_other(*, one: bool, other: bool) -> None:
    locks = TenantLocks()
    pick = {True: locks.exclusive, False: locks.shared}
    first = Hold(pick[one]("acme"))
    await settle()
    second = Hold(pick[other]("acme"))

    await settle()

    assert first.inside.is_set()
    assert not second.inside.is_set()
    await first.leave()
    await second.leave()


async def test_tenants_do_not_wait_for_each_other() -> None:
    locks = TenantLocks()
    first, second = Hold(locks.exclusive("acme")), Hold(locks.exclusive("umbra"))

    await settle()

    assert second.inside.is_set()
    await first.leave()
    await second.leave()


async def test_a_later_sharer_waits_behind_who_wants_it_alone() -> None:
    locks = TenantLocks()
    first = Hold(locks.shared("acme"))
    await settle()
    alone = Hold(locks.exclusive("acme"))
    await settle()
    late = Hold(locks.shared("acme"))
    await settle()
    assert not late.inside.is_set()

    await first.leave()
    await settle()

    assert alone.inside.is_set()
    assert not late.inside.is_set()
    await alone.leave()
    await late.leave()


async def test_who_gives_up_waiting_blocks_nobody() -> None:
    locks = TenantLocks()
    first = Hold(locks.shared("acme"))
    await settle()
    alone = Hold(locks.exclusive("acme"))
    await settle()
    late = Hold(locks.shared("acme"))
    await settle()

    alone.task.cancel()
    await settle()

    assert late.inside.is_set()
    await first.leave()
    await late.leave()
    assert alone.task.cancelled()


async def test_a_turn_given_in_the_moment_of_giving_up_goes_to_the_next() -> None:
    locks = TenantLocks()
    first = Hold(locks.exclusive("acme"))
    await settle()
    second, third = Hold(locks.exclusive("acme")), Hold(locks.exclusive("acme"))
    await settle()

    leaving = asyncio.create_task(first.leave())
    while not first.task.done():
        await asyncio.sleep(0)
    second.task.cancel()
    await settle()

    assert second.task.done()
    assert third.inside.is_set()
    await leaving
    await third.leave()


async def test_an_idle_lock_is_forgotten() -> None:
    locks = TenantLocks()

    async with locks.exclusive("acme"):
        pass
    async with locks.shared("acme"), locks.subnets():
        pass

    assert locks._locks == {}
