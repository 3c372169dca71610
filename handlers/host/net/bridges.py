"""Tenant bridges: one per tenant, with the gateway's address.

The bridge has a fixed MAC (offset 1 of the tenant's range), so that a guest which slept through a
teardown still reaches its gateway. The interface's alias marks it as hostd's.
"""

from typing import ClassVar

from handlers.errors import Conflict, HostFault
from handlers.host.net.rtnetlink import Kernel, Netlink
from handlers.host.net.rtnetlink_reader import (
    IFLA_BR_FORWARD_DELAY,
    IFLA_BR_MCAST_SNOOPING,
    IFLA_BR_STP_STATE,
    RT_TABLE_MAIN,
    Address,
    Link,
)
from handlers.host.net.sysctl import ensure_sysctl
from handlers.mechanism import Durability
from handlers.specs import BridgeSpec
from schemas import naming

GATEWAY_OFFSET = 1
# ip-sysctl.rst. A guest's ARP request is answered for the gateway's address alone, not for the
# host's other ones (arp_ignore), packets come from where they could be answered to (rp_filter),
# redirects are neither sent nor accepted, and there is no IPv6 at all.
SYSCTLS = {
    "ipv6/conf/{}/disable_ipv6": "1",
    "ipv4/conf/{}/rp_filter": "1",
    "ipv4/conf/{}/arp_ignore": "1",
    "ipv4/conf/{}/arp_announce": "2",
    "ipv4/conf/{}/accept_redirects": "0",
    "ipv4/conf/{}/send_redirects": "0",
    "ipv4/conf/{}/accept_source_route": "0",
    "ipv4/conf/{}/proxy_arp": "0",
}
BRIDGE = {IFLA_BR_STP_STATE: 0, IFLA_BR_FORWARD_DELAY: 0, IFLA_BR_MCAST_SNOOPING: 0}


class Bridges:
    """Bridges by interface name. `ensure` is true if anything was created or repaired.

    Source: rtnetlink(7), ip-link(8) type bridge. Needs: CAP_NET_ADMIN.
    """

    name: ClassVar[str] = "bridge"
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = True

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink

    async def exists(self, key: str) -> bool:
        return await self._netlink.run(lambda kernel: own_bridge(kernel, key) is not None)

    async def ensure(self, spec: BridgeSpec) -> bool:
        """Make or repair the bridge, read everything back; a partly configured one is completed.

        Raises:
            Conflict: another interface, or another tenant's bridge, has the name.
            HostFault: the read-back differs from what was set.
        """
        return await self._netlink.run(lambda kernel: ensure_bridge(kernel, spec))

    async def remove(self, key: str) -> None:
        """Delete the bridge; an interface of the name that is not hostd's is left alone."""

        await self._netlink.run(lambda kernel: remove_bridge(kernel, key))

    async def remove_unused(self, key: str) -> None:
        """As `remove`, but of a bridge with a port: Conflict, and nothing is changed."""

        def unused(kernel: Kernel) -> None:
            link = own_bridge(kernel, key)
            if link is not None and (ports := kernel.links(master=link.index)):
                names = ", ".join(sorted(port.name for port in ports)[:8])
                raise Conflict(f"bridge {key} has ports: {names}")
            remove_bridge(kernel, key)

        await self._netlink.run(unused)


def own_bridge(kernel: Kernel, name: str) -> Link | None:
    """The bridge if it is hostd's. Without an alias its creation was interrupted."""
    link = kernel.link(name)
    if link is None or link.kind != "bridge":
        return None
    return link if link.alias.startswith(naming.ALIAS_PREFIX) or not link.alias else None


def ensure_bridge(kernel: Kernel, spec: BridgeSpec) -> bool:
    kernel.unwanted.discard(spec.key)
    mac = naming.mac_address(spec.net.tenant_net_id, GATEWAY_OFFSET)
    link = kernel.link(spec.key)
    created = link is None
    if link is None:
        kernel.add_bridge(spec.key, mac)
        link = kernel.existing_link(spec.key)
    else:
        refuse_foreign_bridge(kernel, link, spec)
    try:
        if created:
            changed = configure_bridge(kernel, link, spec)
        else:
            changed = converge_bridge(kernel, link, spec, mac)
        verify_bridge(kernel, spec, mac)
    except BaseException:
        if created:
            kernel.delete_link(link.index)
        raise
    return created or changed


def remove_bridge(kernel: Kernel, name: str) -> None:
    kernel.unwanted.add(name)
    if (link := own_bridge(kernel, name)) is not None:
        kernel.delete_link(link.index)
        kernel.kept_routes.forget(link.index)


def refuse_foreign_bridge(kernel: Kernel, link: Link, spec: BridgeSpec) -> None:
    if link.kind != "bridge":
        raise Conflict(
            f"{link.name} is an interface of kind {link.kind!r},"
            " expected the tenant's bridge: rename or delete it"
        )
    if link.alias == naming.interface_alias(spec.tenant_id):
        return
    if link.alias:
        raise Conflict(f"bridge {link.name} belongs to {link.alias!r}")
    if any(address != gateway_address(spec) for address in kernel.addresses(link.index)):
        raise Conflict(f"bridge {link.name} has addresses that are not hostd's")


def gateway_address(spec: BridgeSpec) -> Address:
    return Address(spec.net.gateway_ip, naming.prefix_len(spec.net))


def configure_bridge(kernel: Kernel, link: Link, spec: BridgeSpec) -> bool:
    """Complete one that has just been made; it goes up last, without IPv6 and with its alias."""
    for name, value in SYSCTLS.items():
        ensure_sysctl(name.format(link.name), value)
    with kernel.together():
        kernel.add_address(link.index, gateway_address(spec))
        kernel.set_link(link.index, state="up", ifalias=naming.interface_alias(spec.tenant_id))
    return True


def converge_bridge(kernel: Kernel, link: Link, spec: BridgeSpec, mac: str) -> bool:
    """Change what differs; it goes up last, without IPv6 and with its alias, in one message."""
    changed = False
    if link.mac != mac:
        kernel.set_link(link.index, address=mac)
        changed = True
    if any(link.info.get(name) != value for name, value in BRIDGE.items()):
        kernel.set_bridge(link.index, br_stp_state=0)  # first: with STP no delay may be 0
        kernel.set_bridge(link.index, br_forward_delay=0, br_mcast_snooping=0)
        changed = True
    for name, value in SYSCTLS.items():
        changed |= ensure_sysctl(name.format(link.name), value)
    present = kernel.addresses(link.index)
    for address in present:
        if address != gateway_address(spec):
            kernel.delete_address(link.index, address)
            changed = True
    if gateway_address(spec) not in present:
        kernel.add_address(link.index, gateway_address(spec))
        changed = True
    alias = naming.interface_alias(spec.tenant_id)
    if not link.up or link.alias != alias:
        kernel.set_link(link.index, state="up", ifalias=alias)
        changed = True
    return ensure_route(kernel, link, spec) or changed


def ensure_route(kernel: Kernel, link: Link, spec: BridgeSpec) -> bool:
    """The subnet's route, which the kernel adds with the address, unless it was removed since."""
    if has_route(kernel, link, spec):
        return False
    kernel.add_connected_route(link.index, spec.net.ipv4_subnet, spec.net.gateway_ip)
    return True


def has_route(kernel: Kernel, link: Link, spec: BridgeSpec) -> bool:
    """Whether the subnet's route leads to the bridge, by a lookup of one of its addresses.

    Another route may answer for that address, e.g. one of the operator's for a part of the subnet:
    then the bridge's own routes are listed, for which the kernel walks all.
    """
    subnet = naming.subnet_of(spec.net.ipv4_subnet)
    guest = next(host for host in map(str, subnet.hosts()) if host != spec.net.gateway_ip)
    wanted = spec.net.ipv4_subnet, RT_TABLE_MAIN, (link.index,)
    found = kernel.route_to(guest)
    if found is not None and (found.dst, found.table, found.links) == wanted:
        return True
    routes = kernel.routes(link=link.index, table=RT_TABLE_MAIN)
    return any(route.dst == spec.net.ipv4_subnet for route in routes)


def verify_bridge(kernel: Kernel, spec: BridgeSpec, mac: str) -> None:
    link = kernel.existing_link(spec.key)
    checks = {
        "kind": link.kind == "bridge",
        "alias": link.alias == naming.interface_alias(spec.tenant_id),
        "address": kernel.addresses(link.index) == [gateway_address(spec)],
        "MAC": link.mac == mac,
        "up": link.up,
        "attributes": all(link.info.get(name) == value for name, value in BRIDGE.items()),
        "route": has_route(kernel, link, spec),
    }
    if wrong := [fact for fact, ok in checks.items() if not ok]:
        raise HostFault(f"bridge {spec.key} read-back mismatch: {', '.join(wrong)}")
