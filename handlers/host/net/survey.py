"""All tenants' networks looked at together: whose are not as they should be. Changes nothing.

For the periodic pass: a listing of each kind of object costs less than a question for each of 500
tenants and their guests. Who is named here is then restored by the mechanisms themselves, which ask
again; so what a command is just changing may be named, and does no harm.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from handlers.host.net.antispoof import PINS, pin_members
from handlers.host.net.bridges import BRIDGE, GATEWAY_OFFSET, SYSCTLS, gateway_address
from handlers.host.net.nft.nftables import Tables
from handlers.host.net.rtnetlink import Kernel
from handlers.host.net.rtnetlink_reader import (
    IFLA_TUN_OWNER,
    IFLA_TUN_PERSIST,
    RT_TABLE_MAIN,
    Address,
    Link,
)
from handlers.host.net.sysctl import read_sysctl
from handlers.host.net.taps import port_flags
from handlers.host.net.tenant_rules import GATEWAYS, tenant_members
from handlers.specs import BridgeSpec, ExpectedNetwork, TapSpec
from schemas import naming

NO_IPV6 = "ipv6/conf/{}/disable_ipv6"


def without_rules(tables: Tables, expected: Iterable[ExpectedNetwork]) -> set[str]:
    """The tenants of whose rules and pins one is missing, or is there beside the right one."""
    return {
        each.rules.tenant_id
        for each in expected
        if tables.missing(tenant_members(each.rules.key))
        or len(tables.members_of(GATEWAYS, each.bridge.key)) != 1
        or any(
            tables.missing(pin_members(pin.key)) or len(tables.members_of(PINS, pin.tap)) != 1
            for pin, _ in each.ports
        )
    }


@dataclass(frozen=True, slots=True)
class Listing:
    """What the kernel holds, by index of the link where it belongs to one."""

    links: Mapping[str, Link]
    addresses: Mapping[int, Sequence[Address]]
    routes: frozenset[tuple[str, int]]
    neighbours: Mapping[tuple[int, str], str]
    fdb: frozenset[tuple[int, str]]

    @classmethod
    def of(cls, kernel: Kernel) -> "Listing":
        links = [*kernel.links(kind="bridge"), *kernel.links(kind="tun")]
        routes = kernel.routes(table=RT_TABLE_MAIN)
        return cls(
            links={link.name: link for link in links},
            addresses=kernel.all_addresses(),
            routes=frozenset((route.dst, link) for route in routes for link in route.links),
            neighbours=kernel.all_permanent_neighbours(),
            fdb=frozenset(kernel.all_static_fdb()),
        )


def without_links(
    kernel: Kernel, expected: Iterable[ExpectedNetwork], *, isolate: bool
) -> set[str]:
    """The tenants of whose bridges and TAPs one is missing or not as hostd leaves it."""
    listing = Listing.of(kernel)
    return {
        each.rules.tenant_id
        for each in expected
        if not bridge_holds(listing, each.bridge)
        or not all(tap_holds(listing, tap, isolate=isolate) for _, tap in each.ports)
    }


def bridge_holds(listing: Listing, spec: BridgeSpec) -> bool:
    link = listing.links.get(spec.key)
    return (
        link is not None
        and link.kind == "bridge"
        and link.up
        and link.alias == naming.interface_alias(spec.tenant_id)
        and link.mac == naming.mac_address(spec.net.tenant_net_id, GATEWAY_OFFSET)
        and all(link.info.get(name) == value for name, value in BRIDGE.items())
        and list(listing.addresses.get(link.index, ())) == [gateway_address(spec)]
        and (spec.net.ipv4_subnet, link.index) in listing.routes
        and all(sysctl_holds(name.format(spec.key), value) for name, value in SYSCTLS.items())
    )


def tap_holds(listing: Listing, spec: TapSpec, *, isolate: bool) -> bool:
    link, bridge = listing.links.get(spec.name), listing.links.get(spec.bridge)
    return (
        link is not None
        and bridge is not None
        and link.up
        and link.alias == spec.alias
        and link.info.get(IFLA_TUN_OWNER) == spec.owner_uid
        and link.info.get(IFLA_TUN_PERSIST) == 1
        and link.master == bridge.index
        and all(link.port.get(f) == value for f, value in port_flags(isolate=isolate).items())
        and (link.index, spec.mac) in listing.fdb
        and listing.neighbours.get((bridge.index, spec.guest_ip)) == spec.mac
        and sysctl_holds(NO_IPV6.format(spec.name), "1")
    )


def sysctl_holds(name: str, value: str) -> bool:
    return read_sysctl(name) in {None, value}
