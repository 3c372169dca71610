"""Routes that are kept: no overlap is missed, and one that is gone does not count."""

import random
from collections.abc import Iterator
from contextlib import closing
from ipaddress import IPv4Network

import pytest

from handlers.host.net.kept_routes import KeptRoutes
from handlers.host.net.rtnetlink_reader import Route
from handlers.specs import BridgeSpec
from tests.kernel.net.netns import HostNet
from tests.kernel.net.plans import net_of, set_up

SUBNET = "10.240.9.0/24"
TAKEN = (
    "10.240.9.0/24",
    "10.240.9.128/25",
    "10.240.9.0/25",
    "10.240.9.255/32",
    "10.240.9.0/32",
    "10.240.0.0/16",
    "8.0.0.0/5",
)
FREE = ("10.240.8.0/24", "10.240.10.0/24", "10.240.8.255/32", "10.240.10.0/32", "0.0.0.0/5")


@pytest.fixture
def net() -> Iterator[HostNet]:
    with HostNet() as made:
        yield made


async def overlapping(net: HostNet, subnet: str = SUBNET) -> str | None:
    return await net.mechanisms.networks.overlapping_route(subnet, except_bridge="br-tenant-9")


@pytest.mark.parametrize("asked_before", [True, False])
@pytest.mark.parametrize("route", TAKEN)
async def test_a_route_that_was_added_by_then_is_found(
    net: HostNet, route: str, *, asked_before: bool
) -> None:
    if asked_before:
        assert await overlapping(net) is None

    net.host.ip(f"route add {route} via 198.51.100.2")

    assert await overlapping(net) == route


@pytest.mark.parametrize("route", FREE)
async def test_a_route_beside_the_subnet_is_none(net: HostNet, route: str) -> None:
    net.host.ip(f"route add {route} via 198.51.100.2")

    assert await overlapping(net) is None


@pytest.mark.parametrize(
    "line",
    [
        "route add 10.240.9.0/25 via 198.51.100.2 table 77",
        "route add blackhole 10.240.9.0/25",
        "addr add 10.240.9.7/32 dev lo",
    ],
)
async def test_a_route_of_any_table_and_type_counts(net: HostNet, line: str) -> None:
    assert await overlapping(net) is None

    net.host.ip(line)

    assert await overlapping(net) is not None


async def test_of_two_routes_of_a_network_one_stays(net: HostNet) -> None:
    assert await overlapping(net) is None
    for metric in (1, 2):
        net.host.ip(f"route add {SUBNET} via 198.51.100.2 metric {metric}")

    net.host.ip(f"route del {SUBNET} metric 1")
    assert await overlapping(net) == SUBNET
    net.host.ip(f"route del {SUBNET} metric 2")
    assert await overlapping(net) is None


async def test_a_route_that_went_with_its_link_is_none(net: HostNet) -> None:
    """The kernel does not report it."""
    net.host.ip("link add gone0 type veth peer name gone1")
    net.host.ip("addr add 10.240.9.3/24 dev gone0")
    net.host.ip("link set gone0 up")
    assert await overlapping(net) is not None

    net.host.ip("link del gone0")

    assert await overlapping(net) is None


async def test_a_subnet_is_free_again_after_its_bridge(net: HostNet) -> None:
    other = net_of(9)
    await set_up(net, "umbra", other)
    networks = net.mechanisms.networks
    assert await networks.overlapping_route(SUBNET, except_bridge="br-tenant-8") is not None

    await net.mechanisms.bridges.remove(BridgeSpec("umbra", other).key)

    assert await networks.overlapping_route(SUBNET, except_bridge="br-tenant-8") is None


async def test_lost_notifications_lose_no_route(net: HostNet) -> None:
    assert await overlapping(net) is None
    lines = [f"route add 10.{i // 250 % 200}.{i % 250}.0/24 via 198.51.100.2" for i in range(9000)]
    net.host.command("ip", "-batch", "-", text="\n".join([*lines, f"route add {SUBNET} dev up0"]))

    assert await overlapping(net) == SUBNET


def test_what_is_found_is_what_a_comparison_with_each_route_finds(net: HostNet) -> None:
    chance = random.Random(7)

    def some_network() -> IPv4Network:
        length = chance.randint(1, 32)
        address = chance.choice((10 << 24, 172 << 24)) | chance.getrandbits(18)
        return IPv4Network((address & ~((1 << (32 - length)) - 1), length))

    routes = [Route(str(some_network()), 254, (n,)) for n in range(300)]
    with closing(net.host.run(lambda: KeptRoutes(lambda: routes))) as kept:
        for _ in range(500):
            subnet = some_network()
            expected = {each for each in routes if IPv4Network(each.dst).overlaps(subnet)}

            assert set(kept.overlapping(subnet, lambda _: True)) == expected
