"""A netlink or nftables call that hangs is left; the mechanisms go on in a thread of their own."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from handlers.errors import Abandoned, Unavailable
from handlers.host.net.chains import GUARD
from handlers.host.net.host_network import open_network_mechanisms
from schemas.settings import NetworkSettings
from tests.kernel.net.memory_records import MemoryRecords, host_of
from tests.kernel.net.netns import HostNet
from tests.kernel.net.test_network import ACME, UMBRA, Desk

LIMIT_S = 2.0


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What the hung calls wait for."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
async def desk(released: threading.Event) -> AsyncIterator[Desk]:
    with HostNet() as net:
        net.mechanisms.close()
        net.mechanisms = open_network_mechanisms(NetworkSettings(), net.host.enter, call_s=LIMIT_S)
        journal = MemoryRecords({"acme": ACME, "umbra": UMBRA})
        yield Desk(net, journal, host_of(net, journal))
        released.set()


async def test_commands_go_on_beside_a_netlink_call_that_hangs(
    desk: Desk, released: threading.Event
) -> None:
    await desk.setup("acme", ACME)
    with pytest.raises(Abandoned):
        await desk.net.mechanisms.netlink.run(lambda _: released.wait(60))

    assert (await desk.setup("umbra", UMBRA)).changed
    assert (await desk.teardown("acme", ACME)).changed

    assert await desk.net.link(UMBRA.bridge_name) is not None
    assert await desk.net.link(ACME.bridge_name) is None


async def test_rules_that_a_hung_call_owns_are_unavailable_until_it_returns(
    desk: Desk, released: threading.Event
) -> None:
    await desk.setup("acme", ACME)
    nft = desk.net.mechanisms.nft
    if not await nft.run(lambda tables: tables.can_own):
        assert not os.environ.get("CI"), "libnftables1 is missing"
        pytest.skip("this host has no libnftables, so that nothing owns a table")
    with pytest.raises(Abandoned):
        await nft.run(lambda _: released.wait(60))

    with pytest.raises(Unavailable, match="a call that hangs owns them"):
        await desk.setup("umbra", UMBRA)
    assert UMBRA.bridge_name not in desk.net.host.ruleset()

    released.set()
    async with asyncio.timeout(30):
        while nft.hangs:
            await asyncio.sleep(0.01)
    await desk.setup("umbra", UMBRA)

    tables = desk.net.host.ruleset().split("table ")
    guards = [table for table in tables if GUARD in table.partition("{")[0]]
    assert guards
    assert any(UMBRA.bridge_name in table for table in guards)
    assert any(ACME.bridge_name in table for table in guards)
