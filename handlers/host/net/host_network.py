"""Questions about the host's network, what no single resource owns, and how the parts are wired."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network

from handlers.host.linux.file_threads import run_in_thread
from handlers.host.linux.kernel_thread import CALL_S, no_namespace
from handlers.host.net.antispoof import Pins
from handlers.host.net.bridges import Bridges
from handlers.host.net.drift_watch import HostWatch
from handlers.host.net.foreign_chains import foreign_drops
from handlers.host.net.nft.nftables import Nft, Tables
from handlers.host.net.point_lookups import default_routes, port_names
from handlers.host.net.rtnetlink import Kernel, Netlink
from handlers.host.net.rtnetlink_reader import RT_TABLE_MAIN, Route
from handlers.host.net.ruleset import BaseRules
from handlers.host.net.survey import without_links, without_rules
from handlers.host.net.sysctl import ensure_sysctl, read_sysctl
from handlers.host.net.taps import Taps
from handlers.host.net.tenant_rules import TenantRules
from handlers.specs import ExpectedNetwork
from schemas import naming
from schemas.settings import NetworkSettings

CONNTRACK_MAX = "netfilter/nf_conntrack_max"
# Frames between guests of one bridge are the bridge table's business, not the forward chain's.
SYSCTLS = {
    "ipv4/ip_forward": "1",
    "bridge/bridge-nf-call-iptables": "0",
    "bridge/bridge-nf-call-ip6tables": "0",
    "bridge/bridge-nf-call-arptables": "0",
}


class Networks:
    """The `Networks` of this host, of the namespace that the worker is in. Needs: CAP_NET_ADMIN."""

    def __init__(self, netlink: Netlink, base: BaseRules, settings: NetworkSettings) -> None:
        self._netlink = netlink
        self._base = base
        self._max_flows = settings.max_flows
        self._isolate_guests = settings.isolate_guests
        self._uplinks = settings.uplinks
        self._exempt = [IPv4Network(route) for route in settings.exempt_routes]
        self._drops: tuple[int, tuple[str, ...]] | None = None

    async def prepare(self) -> bool:
        """Base table, uplinks, `ip_forward` and `bridge-nf-call-*`; true if any had to change."""

        def prepared(kernel: Kernel) -> tuple[bool, Sequence[str]]:
            changed = [ensure_sysctl(name, value) for name, value in SYSCTLS.items()]
            return any(changed), self._uplinks or default_links(kernel)

        changed, uplinks = await self._netlink.run(prepared)
        policy = self._base.policy
        if policy.is_set and await run_in_thread(policy.refresh):
            # What the operator changed is no drift.
            await self._base.ensure(uplinks)
        return await self._base.ensure(uplinks) or changed

    async def reload(self, settings: NetworkSettings) -> None:
        """Take changed settings while guests run, in one transaction of nftables.

        Not `isolate_guests` and `max_flows`, which a restart applies.

        Raises:
            HostFault, Invalid: the policy file is invalid; the settings in effect stay.
        """
        policy = self._base.policy.at(settings.policy)
        await run_in_thread(policy.refresh)
        self._base.reload(settings, policy)
        self._uplinks = settings.uplinks
        self._exempt = [IPv4Network(route) for route in settings.exempt_routes]
        await self.prepare()

    async def warnings(self, tenants: int) -> tuple[str, ...]:
        """What outside of hostd keeps the guests of so many tenants from working."""
        if not tenants:
            return ()

        def read(tables: Tables) -> tuple[tuple[str, ...], str | None]:
            return self._foreign_drops(tables), read_sysctl(CONNTRACK_MAX)

        # One call, and not behind a bridge that is being made in the other thread.
        drops, maximum = await self._base.nft.run(read)
        found = [
            f"nftables chain {chain} of another program drops guests' packets by its policy: add "
            'rules to its table that accept iifname and oifname "br-tenant-*"'
            for chain in drops
        ]
        needed = tenants * self._max_flows
        if maximum is not None and int(maximum) < needed:
            found.append(
                f"net.{CONNTRACK_MAX.replace('/', '.')} is {maximum}, but {tenants} tenants may "
                f"track {self._max_flows} connections each: set it to {needed} or more, or lower "
                "[network] max_flows"
            )
        return tuple(found)

    def _foreign_drops(self, tables: Tables) -> tuple[str, ...]:
        """As other programs' commits have left it: read again after the next one."""
        now = tables.foreign_commits()
        if self._drops is None or self._drops[0] != now:
            self._drops = now, foreign_drops(tables)
        return self._drops[1]

    async def overlapping_route(self, subnet: str, *, except_bridge: str) -> str | None:
        """The first host route that overlaps the subnet, or None.

        Left out: the default route, those of the bridge itself, and those that lie within one of
        `[network] exempt_routes`.
        """
        wanted = naming.subnet_of(subnet)

        def overlapping(kernel: Kernel) -> str | None:
            bridge = kernel.link(except_bridge)
            own = () if bridge is None else (bridge.index,)

            def counts(route: Route) -> bool:
                network = IPv4Network(route.dst)
                exempt = any(network.subnet_of(allowed) for allowed in self._exempt)
                return not exempt and not (own and route.links == own)

            found = kernel.kept_routes.overlapping(wanted, counts)
            return found[0].dst if found else None

        return await self._netlink.run(overlapping)

    async def damaged(
        self, expected: Sequence[ExpectedNetwork], *, rules_only: bool
    ) -> Sequence[str]:
        """The tenants whose networks are not as expected, by listings of the whole host."""
        isolate = self._isolate_guests

        def rules(tables: Tables) -> set[str]:
            # Also those that nobody has to repair have their tenant's policy, now and later.
            for each in expected:
                self._base.join(each.bridge.key, each.rules.tenant_id)
            self._base.ensure_in(tables)
            return without_rules(tables, expected)

        found = await self._base.nft.run(rules)
        if not rules_only:
            found |= await self._netlink.run(
                lambda kernel: without_links(kernel, expected, isolate=isolate)
            )
        return sorted(found)

    async def taps_on(self, bridge: str) -> Sequence[str]:
        """Names of the links enslaved to the bridge; none if there is no such bridge."""

        def ports(kernel: Kernel) -> list[str]:
            link = kernel.link(bridge)
            if link is None:
                return []
            return port_names(kernel, link)

        return await self._netlink.run(ports)

    async def flush_conntrack(self, address: str) -> None:
        """Delete the address's conntrack entries, of either direction and side of NAT.

        At once if that was done since it last had a TAP: the kernel goes through its whole table.
        """
        guest = IPv4Network(address)
        if str(guest.network_address) not in self._netlink.flushed:
            await self._netlink.run(lambda kernel: kernel.flush_conntrack(guest))

    async def owned_links(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the bridges and of the TAPs in this namespace that carry hostd's alias."""

        def owned(kernel: Kernel, kind: str) -> tuple[str, ...]:
            links = kernel.links(kind=kind)
            return tuple(
                sorted(link.name for link in links if link.alias.startswith(naming.ALIAS_PREFIX))
            )

        return await self._netlink.run(
            lambda kernel: (owned(kernel, "bridge"), owned(kernel, "tun"))
        )


def default_links(kernel: Kernel) -> Sequence[str]:
    """The links of the default routes: the uplinks, unless they are set."""
    indexes = {link for route in default_routes(RT_TABLE_MAIN) for link in route.links}
    return sorted(name for name in map(kernel.link_name, indexes) if name is not None)


@dataclass(frozen=True, slots=True)
class NetworkMechanisms:
    """All network mechanisms of a host, sharing one netlink and one nftables thread."""

    netlink: Netlink
    nft: Nft
    base: BaseRules
    networks: Networks
    bridges: Bridges
    tenant_rules: TenantRules
    pins: Pins
    taps: Taps
    watch: HostWatch

    def close(self) -> None:
        """End the threads; what was made stays."""
        self.taps.close()
        self.netlink.close()
        self.nft.close()


def open_network_mechanisms(
    settings: NetworkSettings,
    enter: Callable[[], None] = no_namespace,
    *,
    call_s: float = CALL_S,
) -> NetworkMechanisms:
    """Wire the mechanisms. `enter` runs first in each thread, e.g. to enter a namespace; a call of
    more than `call_s` is abandoned."""
    netlink, nft = Netlink(enter, limit_s=call_s), Nft(enter, limit_s=call_s)
    base = BaseRules(nft, settings)
    return NetworkMechanisms(
        netlink=netlink,
        nft=nft,
        base=base,
        networks=Networks(netlink, base, settings),
        bridges=Bridges(netlink),
        tenant_rules=TenantRules(nft, base, netlink),
        pins=Pins(nft, base),
        taps=Taps(netlink, isolate_guests=settings.isolate_guests, enter=enter),
        watch=HostWatch(netlink, nft, enter),
    )
