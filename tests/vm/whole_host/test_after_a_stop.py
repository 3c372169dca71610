"""What a Stop leaves to the kernel to finish is in nobody's way: the next command, or its copy."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from schemas.requests import DestroyInstance, InstanceRef, StartInstance, StopInstance
from tests.constants import DESTROY, REF, SLEEP, START, STOP, WAKE
from tests.live_host import LiveHost, live_host
from worker.cli.seed import Seeded

SIZE: dict[str, Any] = {"mem_mib": 32, "data_disk_mib": 16}


@pytest.fixture
async def host() -> AsyncIterator[LiveHost]:
    async with live_host() as made:
        yield made


async def up(host: LiveHost) -> Seeded:
    seeded = host.seed(offset=3, **SIZE)
    assert (await host.net_up(seeded))["code"] == "ok"
    return seeded


async def test_an_instance_starts_right_after_its_stop_again_and_again(host: LiveHost) -> None:
    clean = await host.inventory()
    seeded = await up(host)
    for turn in range(8):
        started = await host.run(START)
        assert (started["code"], started["changed"]) == ("ok", True), started
        stopped = await host.run(STOP)
        assert (stopped["code"], stopped["left_behind"]) == ("ok", []), turn
    for _turn in range(4):
        for command in (START, SLEEP, WAKE, STOP):
            assert (await host.run(command))["code"] == "ok", command
    assert (await host.run(START))["code"] == "ok"
    assert (await host.stat())["boots"] == 13

    assert (await host.run(DESTROY))["code"] == "ok"
    assert (await host.net_down(seeded.net))["code"] == "ok"
    assert await host.inventory() == clean


async def test_a_start_that_waits_behind_a_stop_succeeds(host: LiveHost) -> None:
    await up(host)
    assert (await host.run(START))["code"] == "ok"

    stopped, started = await asyncio.gather(host.run(STOP, "s-1"), host.run(START, "s-2"))

    # Whichever came first: a Start that has not ended is superseded.
    assert stopped["code"] == "ok"
    assert started["code"] in {"ok", "superseded"}
    if not started["changed"]:
        started = await host.run(START)
    assert (started["code"], started["changed"]) == ("ok", True)


async def test_a_network_is_torn_down_right_after_a_stop(host: LiveHost) -> None:
    clean = await host.inventory()
    seeded = await up(host)
    for command in (STOP, SLEEP):
        assert (await host.run(START))["code"] == "ok"
        assert (await host.run(command))["code"] == "ok"

        down = await host.net_down(seeded.net)

        assert down["code"] == "ok", down
        counts = await host.inventory()
        assert (counts["taps"], counts["bridges"], counts["nft"]) == (0, 0, clean["nft"])
        assert (await host.net_up(seeded))["code"] == "ok"


async def test_of_two_stops_at_once_one_stops(host: LiveHost) -> None:
    await up(host)
    assert (await host.run(START))["code"] == "ok"

    replies = await asyncio.gather(host.run(STOP), host.run(STOP))

    assert [reply["code"] for reply in replies] == ["ok", "ok"]
    assert sorted(reply["changed"] for reply in replies) == [False, True]


async def test_another_instance_gets_the_address_right_after_a_stop(host: LiveHost) -> None:
    await up(host)
    other = InstanceRef(REF.tenant_id, REF.pool_id, "i-other")
    host.seed(other, offset=3, **SIZE)
    names = (other.tenant_id, other.pool_id, other.instance_id)
    for _turn in range(3):
        for command in (START, STOP, StartInstance(*names), StopInstance(*names)):
            reply = await host.run(command)
            assert (reply["code"], reply["changed"]) == ("ok", True), (command, reply)


async def test_what_many_stops_at_once_leave_to_the_kernel_is_gone_soon(host: LiveHost) -> None:
    await up(host)
    refs = [InstanceRef(REF.tenant_id, REF.pool_id, f"m-{n}") for n in range(6)]
    for n, ref in enumerate(refs):
        host.seed(ref, offset=20 + n, **SIZE)
    names = [(ref.tenant_id, ref.pool_id, ref.instance_id) for ref in refs]
    clean = await host.inventory()
    starts = await asyncio.gather(*(host.run(StartInstance(*each)) for each in names))
    assert {reply["code"] for reply in starts} == {"ok"}

    stops = await asyncio.gather(*(host.run(StopInstance(*each)) for each in names))

    assert {reply["code"] for reply in stops} == {"ok"}
    assert [reply["left_behind"] for reply in stops] == [[]] * len(stops)

    async with asyncio.timeout(20):
        while (counts := await host.inventory())["taps"]:
            await asyncio.sleep(0.005)
    assert counts == clean | {"artifacts": counts["artifacts"]}
    for each in names:
        await host.run(DestroyInstance(*each, wipe_volumes=True))
