"""What others do to hostd's network is noticed; what hostd does to its rules is not."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from handlers.host.net.drift_watch import Change
from tests.kernel.net.netns import HostNet
from tests.kernel.net.plans import GuestPlan, net_of, plug_in, set_up

ACME = net_of(3)
GUEST = GuestPlan("acme", ACME, 5)
DEADLINE_S = 5.0
LINK, RULES, UPLINKS = Change("link", 3), Change("rules"), Change("uplinks")


@pytest.fixture
async def net() -> AsyncIterator[HostNet]:
    with HostNet() as made:
        await set_up(made, "acme", ACME)
        await plug_in(made, GUEST)
        yield made


async def listening(net: HostNet) -> AsyncGenerator[Change]:
    """A watch that has begun to listen."""
    changes = net.mechanisms.watch.changes()
    assert await anext(changes) == Change("all")
    return changes


@pytest.mark.parametrize(
    ("harm", "noticed"),
    [
        ("ip link del br-tenant-3", LINK),
        ("ip link set br-tenant-3 down", LINK),
        ("ip link set br-tenant-3 address 02:00:00:00:00:01", LINK),
        ("ip addr del 10.240.3.1/24 dev br-tenant-3", LINK),
        ("ip addr add 10.240.3.9/24 dev br-tenant-3", LINK),
        ("ip route del 10.240.3.0/24", LINK),
        ("ip link del tn3i5", LINK),
        ("ip link set tn3i5 down", LINK),
        ("ip link set tn3i5 nomaster", LINK),
        ("ip route del default", UPLINKS),
        ("nft flush ruleset", RULES),
        ("nft flush chain bridge hostd from_guest", RULES),
    ],
)
async def test_harm_is_noticed(net: HostNet, harm: str, noticed: Change) -> None:
    changes = await listening(net)

    net.host.command(*harm.split())

    async with asyncio.timeout(DEADLINE_S):
        while await anext(changes) != noticed:
            pass
    await changes.aclose()


async def test_hostds_own_transactions_and_foreign_links_are_not_reported(net: HostNet) -> None:
    changes = await listening(net)

    await net.mechanisms.pins.remove(GUEST.pin.key)
    await net.mechanisms.pins.ensure(GUEST.pin)
    net.host.ip("link add other0 type veth peer name other1")
    net.host.ip("link del other0")
    net.host.ip("route del default")

    async with asyncio.timeout(DEADLINE_S):
        assert await anext(changes) == UPLINKS
    await changes.aclose()


async def test_lost_messages_mean_look_at_everything(net: HostNet) -> None:
    changes = await listening(net)

    lines = "link set br-tenant-3 down\nlink set br-tenant-3 up\n" * 4000
    net.host.command("ip", "-batch", "-", text=lines)  # while nobody reads

    async with asyncio.timeout(DEADLINE_S * 2):
        while await anext(changes) != Change("all"):
            pass
    await changes.aclose()


async def test_the_watch_leaves_nothing_open(net: HostNet) -> None:
    changes = await listening(net)
    waiting = asyncio.create_task(anext(changes))
    await asyncio.sleep(0)

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await changes.aclose()

    assert len(asyncio.all_tasks()) == 1
