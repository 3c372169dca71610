"""Questions about one thing have the answers that a listing of all has, whatever else is there."""

import errno
import fcntl
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from handlers.host.net.bridges import has_route
from handlers.host.net.point_lookups import SIOCDEVPRIVATE, default_routes, port_names
from handlers.host.net.rtnetlink import Kernel
from handlers.host.net.rtnetlink_reader import Reader, Route
from handlers.specs import BridgeSpec
from tests.kernel.net.netns import HostNet
from tests.kernel.net.plans import net_of, set_up

BRIDGE = BridgeSpec("acme", net_of(9))
SUBNET, NAME = BRIDGE.net.ipv4_subnet, BRIDGE.key
BEHIND = "via 198.51.100.2"


@pytest.fixture
def net() -> Iterator[HostNet]:
    with HostNet() as made:
        yield made


def add_routes(net: HostNet, lines: list[str]) -> None:
    batch = "\n".join(f"route add {line}" for line in lines)
    net.host.command("ip", "-batch", "-", text=batch)


def listed_defaults(net: HostNet, table: int) -> list[Route]:
    with closing(net.host.run(Reader)) as reader:
        return [route for route in reader.routes(table=table) if route.dst == "0.0.0.0/0"]


MANY = [f"10.{number // 250}.{number % 250}.0/24 {BEHIND}" for number in range(2000)]
DEFAULTS = [f"default {BEHIND} metric {number}" for number in range(1, 300)]


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        ([], 1),
        ([f"default {BEHIND} metric 9"], 2),
        ([*MANY, f"default {BEHIND} metric 9"], 2),
        (DEFAULTS, 300),
        ([*MANY, *DEFAULTS], 300),
        ([f"0.0.0.0/8 {BEHIND}", f"0.0.0.0/1 {BEHIND}", f"0.0.0.0/32 {BEHIND}"], 1),
        (["default table 77 dev lo", f"10.9.0.0/16 {BEHIND} table 77"], 1),
        (["blackhole default metric 7"], 2),
    ],
)
def test_default_routes_are_those_of_a_listing(net: HostNet, lines: list[str], count: int) -> None:
    add_routes(net, lines)

    found = net.host.run(lambda: default_routes(254))

    assert found == listed_defaults(net, 254)
    assert len(found) == count


@pytest.mark.parametrize("table", [77, 254])
def test_without_default_routes_there_are_none(net: HostNet, table: int) -> None:
    net.host.ip("route del default")
    add_routes(net, MANY)

    assert net.host.run(lambda: default_routes(table)) == []


def test_the_default_routes_of_another_table_are_found(net: HostNet) -> None:
    add_routes(net, [f"{line} table 77" for line in (*MANY, f"default {BEHIND}")])

    assert net.host.run(lambda: default_routes(77)) == listed_defaults(net, 77)
    assert len(listed_defaults(net, 77)) == 1


# -- a subnet's route ------------------------------------------------------------------------------


async def route_is_there(net: HostNet) -> bool:
    def ask(kernel: Kernel) -> bool:
        return has_route(kernel, kernel.existing_link(NAME), BRIDGE)

    return await net.mechanisms.netlink.run(ask)


@pytest.mark.parametrize(
    "line",
    [
        "",
        f"route add 10.240.9.0/25 {BEHIND}",
        f"route add 10.240.9.2/32 {BEHIND}",
        "route add blackhole 10.240.9.2/32",
        "route add unreachable 10.240.9.0/30",
        f"route add {SUBNET} {BEHIND} metric 9",
        f"route add {SUBNET} {BEHIND} table 77",
        "rule add to 10.240.9.0/24 blackhole pref 7",
        "rule add to 10.240.9.0/24 table 77 pref 7",
    ],
)
async def test_the_subnets_route_is_found_whatever_else_answers_for_it(
    net: HostNet, line: str
) -> None:
    await set_up(net, "acme", BRIDGE.net)
    if line:
        net.host.ip(f"route add {SUBNET} {BEHIND} table 77")
        net.host.ip(line.replace("table 77", "table 78") if line.startswith("route") else line)

    assert await route_is_there(net)
    assert not await net.mechanisms.bridges.ensure(BRIDGE)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "route add 10.240.9.0/25 dev br-tenant-9",
        f"route add {SUBNET} {BEHIND} metric 9",
        "route add 10.240.0.0/16 dev br-tenant-9",
        f"route add {SUBNET} dev br-tenant-9 table 77",
        "rule add to 10.240.9.0/24 table 77 pref 7",
    ],
)
async def test_no_other_route_is_taken_for_the_subnets(net: HostNet, line: str) -> None:
    await set_up(net, "acme", BRIDGE.net)
    net.host.ip(f"route del {SUBNET}")
    if line.startswith("rule"):
        net.host.ip(f"route add {SUBNET} dev br-tenant-9 table 77")
    if line:
        net.host.ip(line)

    assert not await route_is_there(net)
    assert await net.mechanisms.bridges.ensure(BRIDGE), "it is repaired"
    assert await route_is_there(net)


# -- a bridge's ports ------------------------------------------------------------------------------


@pytest.fixture
def old_ioctl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a parameter, the kernel refuses the ioctl with that error."""
    if not request.param:
        return
    ioctl: Callable[..., Any] = fcntl.ioctl

    def refuse(descriptor: Any, request_: int, *arguments: Any) -> object:
        if request_ == SIOCDEVPRIVATE:
            raise OSError(request.param, "")
        answer: object = ioctl(descriptor, request_, *arguments)
        return answer

    monkeypatch.setattr(fcntl, "ioctl", refuse)


@pytest.mark.usefixtures("old_ioctl")
@pytest.mark.parametrize(
    "old_ioctl", [0, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL], indirect=True
)
async def test_all_ports_of_a_bridge_are_named_and_no_others(net: HostNet) -> None:
    for number in (8, 9):
        await set_up(net, f"t-{number}", net_of(number))
    assert list(await net.mechanisms.networks.taps_on(NAME)) == []

    names = sorted(f"p{number}" for number in range(70))
    batch = [f"tuntap add {name} mode tap\nlink set {name} master {NAME}" for name in names]
    batch += ["tuntap add other mode tap\nlink set other master br-tenant-8", "link del p3"]
    net.host.command("ip", "-batch", "-", text="\n".join(batch))

    found = list(await net.mechanisms.networks.taps_on(NAME))

    assert found == [name for name in names if name != "p3"]


async def test_no_other_kind_of_link_is_asked_by_a_drivers_own_request(
    net: HostNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await set_up(net, "acme", BRIDGE.net)
    net.host.ip("tuntap add p0 mode tap")
    net.host.ip(f"link set p0 master {NAME}")
    bridge = await net.link(NAME)
    assert bridge is not None
    bond = replace(bridge, kind="bond")
    monkeypatch.delattr(fcntl, "ioctl")

    assert await net.mechanisms.netlink.run(lambda kernel: port_names(kernel, bond)) == ["p0"]


async def test_a_bridge_that_is_gone_has_no_ports(net: HostNet) -> None:
    await set_up(net, "acme", BRIDGE.net)
    bridge = await net.link(NAME)
    assert bridge is not None
    net.host.ip(f"link del {NAME}")

    assert await net.mechanisms.netlink.run(lambda kernel: port_names(kernel, bridge)) == []
