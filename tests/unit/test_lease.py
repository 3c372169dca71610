"""Whose lease it is: the same host after a crash or a reboot, or another one, also a clone."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from schemas import unpack
from tests.fakes.bus import FakeBus
from worker.lease import Holder, Lease, LeaseHeld

KEY = "h1.host"
HERE = Holder(
    "m1",
    "boot-1",
    "j1",
    product_uuid="11111111-2222-3333-4444-555555555555",
    macs=("02:00:00:00:00:01", "02:00:00:00:00:02"),
    hostname="alpha",
    worker_id="w1",
)
REBOOTED = replace(HERE, boot_id="boot-2", worker_id="w2")


def lease(bus: FakeBus, holder: Holder) -> Lease:
    return Lease(bus, KEY, holder, lambda: {"host_state": "ready"})


SAME = {
    "after kill -9": replace(HERE, worker_id="w2"),
    "after kill -9 with the journal lost": replace(HERE, worker_id="w2", journal_id="j2"),
    "after a reboot": REBOOTED,
    "after a reboot with one network card replaced": replace(
        REBOOTED, macs=("02:00:00:00:00:02", "02:00:00:00:00:09")
    ),
    "after a reboot, hardware unknown": replace(REBOOTED, product_uuid="", macs=()),
}
OTHER = {
    "machine_id": replace(HERE, machine_id="m2"),
    "journal_id": replace(REBOOTED, journal_id="j2"),
    "product_uuid": replace(REBOOTED, product_uuid="99999999-2222-3333-4444-555555555555"),
    "macs": replace(REBOOTED, macs=("02:00:00:00:00:09",)),
}


@pytest.mark.parametrize("case", SAME)
async def test_the_next_worker_of_the_same_host_takes_its_lease(case: str) -> None:
    bus = FakeBus()
    await lease(bus, HERE).acquire()

    await lease(bus, SAME[case]).acquire()


@pytest.mark.parametrize("fact", OTHER)
async def test_another_host_with_the_same_id_does_not_start_and_names_the_one_that_runs(
    fact: str,
) -> None:
    bus = FakeBus()
    await lease(bus, HERE).acquire()

    with pytest.raises(LeaseHeld) as raised:
        await lease(bus, replace(OTHER[fact], hostname="beta")).acquire()

    text = str(raised.value)
    assert f"differs in {fact}" in text
    assert text.index("'alpha'") < text.index("this host: hostname 'beta'")
    assert "02:00:00:00:00:01" in text
    assert HERE.product_uuid in text
    assert ("clone" in text) == (fact != "machine_id")


async def test_a_lease_of_an_older_version_is_taken_by_the_same_host_only() -> None:
    old: dict[str, Any] = {"machine_id": "m1", "boot_id": "boot-1", "journal_id": "j1"}
    for holder in (HERE, REBOOTED):
        bus = FakeBus()
        bus.state[KEY] = unpack.pack(old | {"lease_until_ms": 2**50}), 0

        await lease(bus, holder).acquire()


@pytest.mark.parametrize("clone", [REBOOTED, replace(HERE, worker_id="w2")])
async def test_a_clone_that_nothing_distinguishes_is_noticed_by_the_worker_that_ran_first(
    clone: Holder,
) -> None:
    bus = FakeBus()
    first, second = lease(bus, HERE), lease(bus, clone)
    await first.acquire()
    await second.acquire()
    renewing = asyncio.create_task(first.run())
    first.touch()
    try:
        async with asyncio.timeout(10):
            while first.held:
                await asyncio.sleep(0)
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)

    assert second.held


@pytest.mark.parametrize("macs", [None, 5, [], [1, None], ["x" * 30_000]])
async def test_a_value_of_any_content_is_judged(macs: object) -> None:
    bus = FakeBus()
    value = {"machine_id": "m2", "lease_until_ms": 2**60, "macs": macs, "hostname": "\n" * 30_000}
    bus.state[KEY] = unpack.pack(value), 0

    with pytest.raises(LeaseHeld) as raised:
        await lease(bus, HERE).acquire()

    assert len(str(raised.value)) < 2000
    assert "\n" not in str(raised.value)
