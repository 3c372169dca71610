"""The tenant's network lock: shared or exclusive, fair; a cancelled waiter changes nothing."""

import asyncio
from contextlib import AbstractAsyncContextManager

import pytest

from handlers.control import Control, Halted
from handlers.errors import Expired, Superseded
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


async def test_shared_holders_hold_it_together() -> None:
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


async def test_a_later_shared_request_waits_behind_an_exclusive_one() -> None:
    locks = TenantLocks()
    first = Hold(locks.shared("acme"))
    await settle()
    writer = Hold(locks.exclusive("acme"))
    await settle()
    late = Hold(locks.shared("acme"))
    await settle()
    assert not late.inside.is_set()

    await first.leave()
    await settle()

    assert writer.inside.is_set()
    assert not late.inside.is_set()
    await writer.leave()
    await late.leave()


async def test_a_cancelled_waiter_blocks_no_other() -> None:
    locks = TenantLocks()
    first = Hold(locks.shared("acme"))
    await settle()
    writer = Hold(locks.exclusive("acme"))
    await settle()
    late = Hold(locks.shared("acme"))
    await settle()

    writer.task.cancel()
    await settle()

    assert late.inside.is_set()
    await first.leave()
    await late.leave()
    assert writer.task.cancelled()


async def test_a_lock_granted_during_a_cancellation_goes_to_the_next() -> None:
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


async def test_an_idle_lock_is_removed() -> None:
    locks = TenantLocks()

    async with locks.exclusive("acme"):
        pass
    async with locks.shared("acme"), locks.subnets():
        pass

    assert locks._locks == {}


@pytest.mark.parametrize("why", ["deadline", "superseded", "shutdown"])
async def test_what_ends_a_command_ends_its_wait_for_a_lock(why: str) -> None:
    locks, now_ms = TenantLocks(), [0]
    first = Hold(locks.exclusive("acme"))
    await first.inside.wait()
    control = Control(20 if why == "deadline" else None, lambda: now_ms[0])
    second = Hold(locks.shared("acme", control))
    await settle()
    assert not second.inside.is_set()

    if why == "superseded":
        control.supersede("stop-1")
    elif why == "shutdown":
        control.halt()
    wanted = {"deadline": Expired, "superseded": Superseded, "shutdown": Halted}[why]
    with pytest.raises(wanted):
        await second.task

    third = Hold(locks.shared("acme", Control()))
    await first.leave()
    await third.inside.wait()
    await third.leave()
    assert locks.states() == {}


async def test_a_command_past_its_point_of_no_return_waits_on() -> None:
    locks = TenantLocks()
    first = Hold(locks.exclusive("acme"))
    await first.inside.wait()
    control = Control(0, lambda: 1)
    control.finalize()
    second = Hold(locks.shared("acme", control))
    await settle()
    assert not second.task.done()

    await first.leave()
    await second.inside.wait()
    await second.leave()


async def test_a_lock_that_somebody_is_about_to_wait_for_is_not_replaced() -> None:
    locks = TenantLocks()
    first = Hold(locks.subnets())
    await settle()
    # In one turn of the loop: the second asks for it, the first leaves, the third asks for it.
    second = Hold(locks.subnets(Control()))
    leaving = asyncio.create_task(first.leave())
    third = Hold(locks.subnets())
    await settle()

    assert second.inside.is_set() != third.inside.is_set()
    await leaving
    for each in (second, third) if second.inside.is_set() else (third, second):
        await each.inside.wait()
        await each.leave()
    assert locks.states() == {}
