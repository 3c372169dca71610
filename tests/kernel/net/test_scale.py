"""No command's network work grows with the networks, routes, TAPs and pins of the host.

Two hosts, one with a single network and one with many. What is counted is executed lines: each
message that is decoded, and each element that is looked at, adds some. What the kernel walks itself
to answer is not seen in them, so the listings that are asked for are compared, too.
"""

import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import pytest

from handlers.host.net.host_network import NetworkMechanisms
from handlers.host.net.rtnetlink_reader import ADDRESS, RTM_GETADDR, Reader
from handlers.specs import BridgeSpec, TenantRulesSpec
from schemas.settings import NetworkSettings
from tests.kernel.net.netns import HostNet
from tests.kernel.net.plans import GuestPlan, net_of, plug_in, set_up
from tests.lines import Lines

NETWORKS, GUESTS = 150, 3
SPREAD = 20  # of two equal runs: in how many datagrams the kernel answers
NET = net_of(9)
GUEST = GuestPlan("acme", NET, 5)
RULES, BRIDGE = TenantRulesSpec("acme", NET), BridgeSpec("acme", NET)
Call = Callable[[NetworkMechanisms], Awaitable[object]]

# In the order of a tenant's life; each is called on both hosts, with effect and then without.
CALLS: Mapping[str, Call] = {
    "overlapping_route": lambda m: m.networks.overlapping_route(
        NET.ipv4_subnet, except_bridge=NET.bridge_name
    ),
    "prepare": lambda m: m.networks.prepare(),
    "ensure rules": lambda m: m.tenant_rules.ensure(RULES),
    "ensure bridge": lambda m: m.bridges.ensure(BRIDGE),
    "warnings": lambda m: m.networks.warnings(1),
    "ensure pin": lambda m: m.pins.ensure(GUEST.pin),
    "ensure TAP": lambda m: m.taps.ensure(GUEST.spec),
    "ports": lambda m: m.networks.taps_on(NET.bridge_name),
    "pin exists": lambda m: m.pins.exists(GUEST.pin.key),
    "TAP exists": lambda m: m.taps.exists(GUEST.spec.key),
    "flush_conntrack": lambda m: m.networks.flush_conntrack(f"{GUEST.ip}/32"),
    "remove TAP": lambda m: m.taps.remove(GUEST.spec.key),
    "remove pin": lambda m: m.pins.remove(GUEST.pin.key),
    "bridge exists": lambda m: m.bridges.exists(BRIDGE.key),
    "rules exist": lambda m: m.tenant_rules.exists(RULES.key),
    "remove bridge": lambda m: m.bridges.remove(BRIDGE.key),
    "remove rules": lambda m: m.tenant_rules.remove(RULES.key),
}


@pytest.fixture(params=["without a policy", "each tenant with a policy"])
def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[HostNet, HostNet]]:
    file = tmp_path / "policy.toml"
    tenants = ["acme", *(f"t-{number}" for number in range(NETWORKS))]
    file.write_text("".join(f"[{each}]\nallowed = ['192.0.2.0/24']\n" for each in tenants))
    policy = str(file) if request.param.startswith("each") else ""
    with (
        HostNet(NetworkSettings(policy=policy)) as one,
        HostNet(NetworkSettings(policy=policy)) as many,
    ):
        yield one, many


async def crowd(net: HostNet, networks: int) -> None:
    """Other tenants' networks with guests, and each call once, which opens what is kept."""
    for number in range(networks):
        other = net_of(100 + number)
        await set_up(net, f"t-{number}", other)
        for offset in range(10, 10 + GUESTS):
            await plug_in(net, GuestPlan(f"t-{number}", other, offset))
    for call in CALLS.values():
        await call(net.mechanisms)


async def lines_of(net: HostNet, call: Call) -> int:
    """What the two threads that do the work execute for it."""
    lines = Lines()
    threads = net.mechanisms.netlink, net.mechanisms.nft
    for each in threads:
        await each.run(lambda _: sys.settrace(lines.trace))
    try:
        await call(net.mechanisms)
    finally:
        for each in threads:
            await each.run(lambda _: sys.settrace(None))
    return lines.count


async def test_a_call_executes_as_much_and_lists_nothing_on_a_crowded_host(
    hosts: tuple[HostNet, HostNet], monkeypatch: pytest.MonkeyPatch
) -> None:
    lists: list[bytes] = []
    dump = Reader.__dict__["_dump"]

    def listing(reader: Reader, kind: int, request: bytes) -> list[bytes]:
        if kind != RTM_GETADDR or not ADDRESS.unpack_from(request)[4]:
            lists.append(request)
        found: list[bytes] = dump(reader, kind, request)
        return found

    for net, networks in zip(hosts, (1, NETWORKS), strict=True):
        await crowd(net, networks)
    monkeypatch.setattr(Reader, "_dump", listing)
    grown: dict[str, list[int]] = {}
    for name, call in (*CALLS.items(), *((f"{name} again", CALLS[name]) for name in CALLS)):
        lists.clear()
        if name.endswith("again"):
            for net in hosts:
                await call(net.mechanisms)
        counts = [await lines_of(net, call) for net in hosts]
        if counts[1] > counts[0] + SPREAD or lists:
            grown[name] = counts

    assert grown == {}
