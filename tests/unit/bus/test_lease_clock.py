"""A lease that a wrong clock wrote is not believed for ever; one is given back at once."""

import asyncio

import pytest

from schemas import unpack
from tests.fakes.bus import FakeBus
from worker.bus.protocol import BusError
from worker.lease import Holder, Lease, LeaseHeld

KEY = "h1.host"
NOW_MS = 1_700_000_000_000
DAY_MS = 86_400_000


def lease(bus: FakeBus, machine: str, now_ms: int, monotonic_s: list[float]) -> Lease:
    return Lease(
        bus,
        KEY,
        Holder(machine, "b1", "j1"),
        lambda: {"host_state": "ready"},
        clock=lambda: now_ms,
        monotonic_s=lambda: monotonic_s[0],
    )


async def test_a_lease_of_a_clock_days_ahead_is_taken_once_nobody_renews_it() -> None:
    bus, monotonic_s = FakeBus(), [0.0]
    ahead = lease(bus, "m1", NOW_MS + 3 * DAY_MS, monotonic_s)
    await ahead.acquire()
    mine = lease(bus, "m2", NOW_MS, monotonic_s)

    for now_s in (0.0, 29.0):
        monotonic_s[0] = now_s
        with pytest.raises(BusError, match="a clock is wrong"):
            await mine._renew()
    await ahead._renew()
    monotonic_s[0] = 31.0
    with pytest.raises(BusError, match="a clock is wrong"):
        await mine._renew()
    monotonic_s[0] = 61.0
    await mine._renew()

    assert mine.held


async def test_a_lease_of_another_machine_in_the_range_of_a_lease_is_believed() -> None:
    bus = FakeBus()
    await lease(bus, "m1", NOW_MS, [0.0]).acquire()

    with pytest.raises(LeaseHeld):
        await lease(bus, "m2", NOW_MS, [0.0]).acquire()


async def test_a_lease_that_is_given_back_is_free_whatever_the_clock_was() -> None:
    bus = FakeBus()
    ahead = lease(bus, "m1", NOW_MS + 3 * DAY_MS, [0.0])
    await ahead.acquire()
    await ahead.release()

    assert unpack.unpack_map(bus.state[KEY][0])["lease_until_ms"] == 0
    async with asyncio.timeout(5):
        await lease(bus, "m2", NOW_MS, [0.0]).acquire()
