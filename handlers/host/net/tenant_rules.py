"""A tenant's membership in the base rules: NAT, isolation and input rules are in force by it.

All of a tenant's elements come and go in one transaction. Removal also takes what an earlier crash
may have left of its guests' pins, and ends its flows: an established one would outlive the rules.
"""

from typing import ClassVar

from handlers.errors import HostFault
from handlers.host.net.antispoof import GUESTS, PINS
from handlers.host.net.nft.elements import Member
from handlers.host.net.nft.nftables import Nft, Tables
from handlers.host.net.rtnetlink import Netlink
from handlers.host.net.ruleset import TENANT_ALLOWED, TENANT_DENIED, BaseRules
from handlers.mechanism import Durability
from handlers.specs import TenantRulesKey, TenantRulesSpec
from schemas import naming

TENANTS, GATEWAYS, DROPPED = "inet hostd tenants", "inet hostd gateways", "inet hostd dropped"


class TenantRules:
    """Tenants' rules by `<tenant_net_id>,<subnet>,<gateway>`. `ensure` is true if it changed any.

    Source: nft(8). Needs: CAP_NET_ADMIN.
    """

    name: ClassVar[str] = "tenant_rules"
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = True

    def __init__(self, nft: Nft, base: BaseRules, netlink: Netlink) -> None:
        self._nft = nft
        self._base = base
        self._netlink = netlink

    async def exists(self, key: str) -> bool:
        wanted = tenant_members(key)
        return await self._nft.run(lambda tables: len(tables.missing(wanted)) < len(wanted))

    async def ensure(self, spec: TenantRulesSpec) -> bool:
        """Put the rules in force, and nothing else for this bridge, and read them back.

        Raises:
            HostFault: the read-back differs from what was set.
        """
        return await self._nft.run(lambda tables: self._ensure_in(tables, spec))

    async def remove(self, key: str) -> None:
        """Take the tenant's elements, leftover pins and conntrack entries away."""
        rules = TenantRulesKey.parse(key)
        taps = naming.tap_name_prefix(rules.tenant_net_id)

        def remove_members(tables: Tables) -> None:
            doomed = tables.present(tenant_members(key))
            for name in (PINS, GUESTS):
                doomed += [(name, e) for e in tables.members_beginning(name, taps)]
            bridge = naming.bridge_name(rules.tenant_net_id)
            self._base.leave(bridge)
            for name in (TENANT_ALLOWED, TENANT_DENIED):
                doomed += [(name, e) for e in tables.members_of(name, bridge)]
            if doomed:
                self._base.ensure_in(tables)
                tables.change(remove=doomed)

        await self._nft.run(remove_members)
        await self._netlink.run(
            lambda kernel: kernel.flush_conntrack(naming.subnet_of(rules.ipv4_subnet))
        )

    def _ensure_in(self, tables: Tables, spec: TenantRulesSpec) -> bool:
        self._base.join(spec.net.bridge_name, spec.tenant_id)
        changed = self._base.ensure_in(tables)
        wanted = tenant_members(spec.key)
        stray = [
            (GATEWAYS, (bridge, address))
            for bridge, address in tables.members_of(GATEWAYS, spec.net.bridge_name)
            if address != spec.net.gateway_ip
        ]
        if not stray and not tables.missing(wanted):
            return changed
        tables.change(remove=stray, add=wanted)
        if not tables.has(wanted):
            raise HostFault(
                f"nftables read-back failed: tenant rules for {spec.net.bridge_name} missing"
            )
        return True


def tenant_members(key: str) -> tuple[Member, ...]:
    """All that makes the rules apply to a tenant."""
    rules = TenantRulesKey.parse(key)
    bridge = naming.bridge_name(rules.tenant_net_id)
    return ((DROPPED, (bridge,)), (GATEWAYS, (bridge, rules.gateway_ip)), (TENANTS, (bridge,)))
